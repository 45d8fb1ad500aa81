"""From losses to `.grad`: one file for each kind of step, and what they share."""

from gradbal._balancer.balancer import Balancer
from gradbal._balancer.call import BackwardCall

__all__ = ["BackwardCall", "Balancer"]
