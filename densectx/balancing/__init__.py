"""How the losses of several tasks become one number: methods, and what they are shown."""

from densectx.balancing.balancer import Balancer
from densectx.balancing.base import Balancing, Learned, Seen
from densectx.balancing.methods import make_balancer

__all__ = ["Balancer", "Balancing", "Learned", "Seen", "make_balancer"]
