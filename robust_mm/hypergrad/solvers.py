r"""Truncated solvers of A x = v as values: swapping one changes one line.

The protocol is ``solver(matvec, rhs, bounds) -> Solution``; any hashable
callable that keeps it will do. A solver with the attribute ``max_steps`` (not
None) is also given ``accept=``, see :class:`Neumann`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import PyTree

from robust_mm import _validate
from robust_mm.hypergrad import iterations
from robust_mm.linalg import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neumann:
  """Made by :func:`neumann`."""

  num_steps: int
  max_steps: int | None = None
  step_size: float | None = None

  @property
  def needs_bounds(self) -> bool:
    return self.step_size is None

  def contraction(self, bounds: Any) -> Array:
    """At most so much of the error is left by one more step."""
    return iterations.contraction(_interval(bounds, self.step_size, "neumann"))

  def prior_share(self, bounds: Any) -> Array:
    """The error is at most so many times ``||v|| / mu``, before it runs."""
    return self.contraction(bounds) ** (self.num_steps + 1)

  def __call__(
    self,
    matvec: iterations.Matvec,
    rhs: PyTree,
    bounds: Any = None,
    *,
    accept: Callable[[PyTree, PyTree], Array] | None = None,
  ) -> iterations.Solution:
    """Solves A x = rhs.

    Args:
      matvec: symmetric, on pytrees like ``rhs``.
      rhs: v; half precision is raised to float32.
      bounds: of A, an :class:`Interval` or anything with ``lower`` and
        ``upper``; None without a certificate.
      accept: ``accept(x, residual) -> bool[]``, is it good enough? Without it
        ``max_steps`` does nothing.
    """
    rhs = trees.upcast(rhs)
    interval = _interval(bounds, self.step_size, "neumann")
    size = trees.norm(rhs)
    begin = iterations.Series(rhs, rhs, size, jnp.zeros((), bool))
    state = iterations.series(matvec, begin, self.num_steps, interval, size)
    x = trees.scale(interval.step_size, state.total)
    found = iterations.finish(
      matvec, rhs, x, self.num_steps, interval, state.refuted
    )
    if accept is not None and self.max_steps is not None:
      state, found = self._double(
        matvec, rhs, interval, accept, state, found, size
      )
    return iterations.check_last_term(found, state, size, interval)

  def _double(self, matvec, rhs, interval, accept, state, found, size):
    """Rounds of twice as many steps; the residual is the next term."""

    def unfinished(carry):
      _, found, steps = carry
      return (
        (steps < self.max_steps)
        & ~accept(found.x, found.residual)
        & ~found.refuted
        & jnp.isfinite(trees.norm(found.residual))
      )

    def go_on(carry):
      state, found, steps = carry
      wanted = jnp.minimum(jnp.maximum(2 * steps, 1), self.max_steps)
      # r = v - A x_K is term K + 1, fresh: no product is wasted, no drift.
      term = found.residual
      state = iterations.Series(
        term, trees.axpy(1, term, state.total), trees.norm(term), found.refuted
      )
      state = iterations.series(
        matvec, state, wanted - steps - 1, interval, size
      )
      x = trees.scale(interval.step_size, state.total)
      found = iterations.finish(
        matvec,
        rhs,
        x,
        wanted,
        interval,
        state.refuted,
        found.negative_curvature,
      )
      return state, found, wanted

    begin = state, found, jnp.asarray(self.num_steps, jnp.int32)
    state, found, _ = jax.lax.while_loop(unfinished, go_on, begin)
    return state, found


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConjugateGradient:
  """Made by :func:`conjugate_gradient`."""

  num_steps: int
  max_steps: int | None = None
  tolerance: float | None = None

  needs_bounds = False

  def contraction(self, bounds: Any) -> Array:
    r"""``(sqrt(c) - 1) / (sqrt(c) + 1)`` of the condition number c, or inf."""
    safe = jnp.where(bounds.lower > 0, bounds.lower, 1)
    root = jnp.sqrt(jnp.maximum(bounds.upper / safe, 1))
    return jnp.where(bounds.lower > 0, (root - 1) / (root + 1), jnp.inf)

  def prior_share(self, bounds: Any) -> Array:
    """See :meth:`Neumann.prior_share`; Chebyshev's, or where it stops early."""
    left = 2 * self.contraction(bounds) ** self.num_steps
    return jnp.maximum(left, self._relative(left.dtype))

  def _relative(self, dtype) -> float:
    if self.tolerance is not None:
      return self.tolerance
    return float(jnp.finfo(dtype).eps)

  def __call__(
    self,
    matvec: iterations.Matvec,
    rhs: PyTree,
    bounds: Any = None,
    *,
    accept: Callable[[PyTree, PyTree], Array] | None = None,
  ) -> iterations.Solution:
    """See :meth:`Neumann.__call__`; the bounds only serve to be refuted."""
    rhs = trees.upcast(rhs)
    interval = _interval(bounds, 1.0, "conjugate_gradient")
    squared = trees.dot(rhs, rhs)
    stop = self._relative(squared.dtype) ** 2 * squared
    no = jnp.zeros((), bool)
    begin = iterations.Conjugate(
      trees.zeros_like(rhs), rhs, rhs, squared, squared > 0, no, no
    )
    state = iterations.conjugate(matvec, begin, self.num_steps, interval, stop)

    def finish(state, count):
      return iterations.finish(
        matvec, rhs, state.x, count, interval, state.refuted, state.negative
      )

    def go_on(state, num_steps):
      return iterations.conjugate(matvec, state, num_steps, interval, stop)

    found = finish(state, self.num_steps)
    if accept is None or self.max_steps is None:
      return found
    return self._double(go_on, finish, accept, state, found)

  def _double(self, go_on, finish, accept, state, found):
    """Rounds of twice as many steps; each has a residual, a product more."""

    def unfinished(carry):
      state, found, steps = carry
      undone = ~accept(found.x, found.residual) & ~found.refuted
      return state.live & (steps < self.max_steps) & undone

    def another(carry):
      state, found, steps = carry
      wanted = jnp.minimum(2 * steps, self.max_steps)
      state = go_on(state, wanted - steps)
      return state, finish(state, found.num_matvecs + wanted - steps), wanted

    begin = state, found, jnp.asarray(self.num_steps, jnp.int32)
    return jax.lax.while_loop(unfinished, another, begin)[1]


def neumann(
  num_steps: int,
  *,
  max_steps: int | None = None,
  step_size: float | None = None,
) -> Neumann:
  r"""The Neumann series, ``num_steps + 1`` terms of it.

  .. math:: x = \alpha \sum_{k=0}^{K} (I - \alpha A)^k v, \qquad
    v - A x = (I - \alpha A)^{K+1} v

  The same as differentiating K + 1 steps of gradient descent of size
  :math:`\alpha` from a stationary point. :func:`conjugate_gradient` costs as
  much and converges faster; this one is linear in v.

  Formal guarantees:

  - With :math:`0 < \mu I \preceq A` and :math:`\alpha \|A\| \le 1` the error is
    at most :math:`(1 - \alpha\mu)^{K+1} \|v\| / \mu`.
  - The memory is three vectors, whatever ``num_steps``.

  >>> solver = neumann(2, step_size=0.5)
  >>> found = solver(lambda x: x, jnp.array([8.0]))
  >>> float(found.x[0]), float(found.residual[0]), int(found.num_matvecs)
  (7.0, 1.0, 3)

  Args:
    num_steps: K, products with A; 0 gives ``alpha * v``. One more makes the
      residual.
    max_steps: where a caller says what is good enough, K doubles until it is
      or until this many; the terms that are there are kept. None: exactly K.
    step_size: alpha; None: 1 / upper end of the bounds.

  Raises:
    ValueError: naming the argument; when called without bounds or step size.

  References:
    `Lorraine et al. (2020) <https://arxiv.org/abs/1911.02590>`_, algorithm 3.
  """
  _validate.at_least(0, num_steps=num_steps)
  if max_steps is not None:
    _validate.at_least(max(num_steps, 1), max_steps=max_steps)
  if step_size is not None:
    _validate.positive(step_size=step_size)
  return Neumann(num_steps=num_steps, max_steps=max_steps, step_size=step_size)


def identity(*, scale: float | None = None) -> Neumann:
  """``x = scale * v``: the Neumann series with no product.

  The greedy gradient of Luketina et al.: curvature is ignored.

  >>> float(identity(scale=0.1)(lambda x: 2 * x, jnp.array([5.0])).x[0])
  0.5

  Args:
    scale: None: 1 / upper end of the bounds.

  References:
    `Luketina et al. (2016) <https://arxiv.org/abs/1511.06727>`_.
  """
  if scale is not None:
    _validate.positive(scale=scale)
  return Neumann(num_steps=0, step_size=scale)


def conjugate_gradient(
  num_steps: int,
  *,
  max_steps: int | None = None,
  tolerance: float | None = None,
) -> ConjugateGradient:
  """Conjugate gradients from 0, a fixed number of steps.

  After convergence x no longer moves; after a direction of negative curvature
  neither, and the solution says so. Not linear in v.

  >>> A = jnp.diag(jnp.array([1.0, 4.0]))
  >>> solver = conjugate_gradient(2)
  >>> solver(lambda x: A @ x, jnp.array([2.0, 4.0])).x.round(4).tolist()
  [2.0, 1.0]

  Args:
    num_steps: products with A; one more makes the residual.
    max_steps: see :func:`neumann`; a round costs one product more here.
    tolerance: relative residual below which x stays; None: the rounding of the
      dtype.

  Raises:
    ValueError: naming the argument.
  """
  _validate.at_least(1, num_steps=num_steps)
  if max_steps is not None:
    _validate.at_least(num_steps, max_steps=max_steps)
  if tolerance is not None:
    _validate.positive(tolerance=tolerance)
  return ConjugateGradient(
    num_steps=num_steps, max_steps=max_steps, tolerance=tolerance
  )


def _interval(bounds, step_size, name: str) -> iterations.Interval:
  if bounds is None:
    if step_size is None:
      raise ValueError(f"{name} needs bounds, or a step_size of its own.")
    infinite = jnp.asarray(jnp.inf)
    return iterations.Interval(-infinite, infinite, jnp.asarray(step_size))
  lower, upper = jnp.asarray(bounds.lower), jnp.asarray(bounds.upper)
  if step_size is None:
    step_size = getattr(bounds, "step_size", 1 / upper)
  return iterations.Interval(lower, upper, jnp.asarray(step_size))
