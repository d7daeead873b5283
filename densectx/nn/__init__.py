"""Neural network parts: the context module, padding and resampling, colour, normalisation."""

from densectx.nn.context import Context, ContextModule, NoContext

__all__ = ["Context", "ContextModule", "NoContext"]
