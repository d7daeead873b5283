"""A task and a data set for densectx."""
