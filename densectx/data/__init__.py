"""Data: sources, samples and loaders; knows no model."""
