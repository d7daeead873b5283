"""Tasks: the unit of extension."""
