"""Inference on files."""
