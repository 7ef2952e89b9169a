r"""Certified balls around examples, beside or instead of a polytope.

Bounds that hold inside a ball (``relaxed``) prove a radius for all modalities
together and one for each alone, and nothing about other mixtures of budgets
than those balls contain.
"""

from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from robust_mm import _validate
from robust_mm import margins


class Balls(NamedTuple):
  """Radii in the units of the certificate; open balls.

  Attributes:
    joint: ``[b]``, all modalities: :math:`\\sum_m \\epsilon_m^2 < r^2`.
    alone: ``{m: [b]}``, that modality only.
  """

  joint: Array
  alone: Any


def covers(
  balls: Balls, present: Mapping[str, Array], budgets: Mapping[str, Any]
) -> Bool[Array, "*b"]:
  """Whether a ball contains all of these budgets together."""
  square = jnp.zeros_like(balls.joint)
  used = {}
  for name, size in budgets.items():
    size = jnp.asarray(size, balls.joint.dtype)
    used[name] = jnp.where(present[name], size, 0)
    square = square + jnp.square(used[name])
  inside = jnp.sqrt(square) < balls.joint
  for name in used:
    others = [used[other] == 0 for other in used if other != name]
    only = jnp.all(jnp.stack([*others, jnp.ones_like(inside)]), axis=0)
    inside |= only & (used[name] < balls.alone[name])
  return inside


def joint_radius(balls: Balls, ball: str) -> Float[Array, "*b"]:
  """The radius of another joint ball that the l2 one contains."""
  _validate.one_of(margins.BALLS, ball=ball)
  # Sizes of at most r each have an l2 norm of at most r times the root of
  # their number; a sum of sizes bounds it as it is.
  number = len(balls.alone) if ball == "linf" else 1
  return balls.joint / number**0.5


def frontier(
  balls: Balls, first: str, second: str, grid: Float[Array, " g"]
) -> Float[Array, "*b g"]:
  """The largest budget of ``second`` beside each of ``first``."""
  radius = balls.joint[..., None]
  size = jnp.reshape(grid, (1,) * balls.joint.ndim + (-1,))
  left = jnp.square(radius) - jnp.square(size)
  beside = jnp.where(left > 0, jnp.sqrt(jnp.maximum(left, 0)), 0)
  beside = jnp.where(jnp.isposinf(radius), jnp.inf, beside)
  return jnp.where(
    size == 0, jnp.maximum(beside, balls.alone[second][..., None]), beside
  )
