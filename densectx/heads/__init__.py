"""Heads: feature maps and the task input to an output at the resolution of the task."""
