"""Backbones: an image to a pyramid of feature maps."""
