"""Linear relaxation: bounds of any piecewise smooth function over a ball.

``trace`` takes a function apart into affine pieces between activations;
``lower`` bounds linear functions of its output while the inputs move inside a
``Ball`` (CROWN), ``sensitivity`` its gradients (Fast-Lip), ``largest`` finds
the largest radius that a test of one ball confirms. Everything is for one
example: ``vmap`` does the batch.
"""

from robust_mm.relaxation.bounds import Ball
from robust_mm.relaxation.bounds import Box
from robust_mm.relaxation.bounds import inside
from robust_mm.relaxation.bounds import lower
from robust_mm.relaxation.local import sensitivity
from robust_mm.relaxation.network import BoundNetwork
from robust_mm.relaxation.network import Network
from robust_mm.relaxation.network import trace
from robust_mm.relaxation.search import largest

__all__ = [
  "Ball",
  "BoundNetwork",
  "Box",
  "Network",
  "inside",
  "largest",
  "lower",
  "sensitivity",
  "trace",
]
