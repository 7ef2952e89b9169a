"""The loops of the solvers, and what they observe on the way."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import PyTree

from robust_mm.linalg import trees

Matvec = Callable[[PyTree], PyTree]

# By how much a product may miss a bound before it counts as a refutation, as a
# share of the largest eigenvalue: the arithmetic is float32.
_ROUNDING = 1e-5
# The same for the length of one term against the one before.
_GROWTH = 1e-4


class Interval(NamedTuple):
  """What a solver may know of the map that it inverts.

  Attributes:
    lower: mu, at most the smallest eigenvalue of A.
    upper: at least the largest.
    step_size: alpha of the Neumann series.
  """

  lower: Float[Array, ""]
  upper: Float[Array, ""]
  step_size: Float[Array, ""]


class Solution(NamedTuple):
  """An approximate solution of A x = v and what was seen on the way.

  Attributes:
    x: like v, float32 or float64.
    residual: v - A x, computed with a product of its own.
    num_matvecs: products with A that were spent, that one included.
    negative_curvature: a direction with p^T A p <= 0 was met: A is not
      positive definite.
    refuted: an observation that is impossible if the bounds hold.
  """

  x: PyTree
  residual: PyTree
  num_matvecs: Int[Array, ""]
  negative_curvature: Bool[Array, ""]
  refuted: Bool[Array, ""]


class Series(NamedTuple):
  term: PyTree
  total: PyTree
  size: Array
  refuted: Array


class Conjugate(NamedTuple):
  x: PyTree
  residual: PyTree
  direction: PyTree
  squared: Array
  live: Array
  negative: Array
  refuted: Array


def contraction(interval: Interval) -> Array:
  """By how much a term is at most as long as the one before."""
  alpha = interval.step_size
  ends = jnp.stack([1 - alpha * interval.lower, 1 - alpha * interval.upper])
  return jnp.max(jnp.abs(ends))


def series(matvec, state, num_steps, interval, rhs_size) -> Series:
  longest = contraction(interval) + _GROWTH
  # Rounding makes what is far below v grow or shrink as it likes.
  floor = jnp.finfo(rhs_size.dtype).eps * rhs_size

  def step(_, state):
    term = trees.axpy(-interval.step_size, matvec(state.term), state.term)
    size = trees.norm(term)
    grew = (size > longest * state.size) & (size > floor)
    total = trees.axpy(1, term, state.total)
    return Series(term, total, size, state.refuted | grew)

  return jax.lax.fori_loop(0, num_steps, step, state)


def check_last_term(found, state, rhs_size, interval) -> Solution:
  """The residual is a term too, but has the rounding of the whole sum."""
  size = trees.norm(found.residual)
  longest = contraction(interval) + _GROWTH
  floor = jnp.sqrt(jnp.finfo(rhs_size.dtype).eps) * rhs_size
  grew = (size > longest * state.size) & (size > floor)
  return found._replace(refuted=found.refuted | grew)


def conjugate(matvec, state, num_steps, interval, stop) -> Conjugate:
  def step(_, state):
    image = matvec(state.direction)
    curvature = trees.dot(state.direction, image)
    length = trees.dot(state.direction, state.direction)
    outside = state.live & _outside(curvature, length, interval)
    negative = state.live & (curvature <= 0)
    # A curvature that is not a number goes on and spoils x, as it must.
    live = state.live & ~negative
    alpha = jnp.where(live, state.squared / jnp.where(live, curvature, 1), 0)
    x = trees.axpy(alpha, state.direction, state.x)
    residual = trees.axpy(-alpha, image, state.residual)
    squared = trees.dot(residual, residual)
    live = live & ~(squared <= stop)
    beta = jnp.where(live, squared / jnp.where(live, state.squared, 1), 0)
    direction = jax.tree.map(
      lambda new, old: jnp.where(live, new, old),
      trees.axpy(beta, state.direction, residual),
      state.direction,
    )
    return Conjugate(
      x,
      residual,
      direction,
      squared,
      live,
      state.negative | negative,
      state.refuted | outside,
    )

  return jax.lax.fori_loop(0, num_steps, step, state)


def _outside(curvature, length, interval) -> Array:
  """A Rayleigh quotient beyond the bounds: proof that they do not hold."""
  slack = _ROUNDING * jnp.abs(interval.upper) * length
  below = curvature < interval.lower * length - slack
  return (below | (curvature > interval.upper * length + slack)) & (length > 0)


def finish(
  matvec, rhs, x, num_steps, interval, refuted, negative=False
) -> Solution:
  """The explicit residual, and the Rayleigh quotient that it gives away."""
  image = matvec(x)
  curvature, length = trees.dot(x, image), trees.dot(x, x)
  return Solution(
    x=x,
    residual=trees.axpy(-1, image, rhs),
    num_matvecs=jnp.asarray(num_steps + 1, jnp.int32),
    negative_curvature=negative | ((curvature <= 0) & (length > 0)),
    refuted=refuted | _outside(curvature, length, interval),
  )
