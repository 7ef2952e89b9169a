r"""What takes the place of the Hessian H in ``H^-1 v``, as values.

The protocol is ``operator(matvec, bounds) -> Shifted`` with a product with H
and the ends of its spectrum; any hashable callable that keeps it will do.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import PyTree

from robust_mm import _validate
from robust_mm import linalg
from robust_mm.hypergrad import iterations
from robust_mm.linalg import trees


class Shifted(NamedTuple):
  """The map A that is inverted.

  Attributes:
    matvec: product with A.
    interval: ends of its spectrum and the step size of its Neumann series.
    damping: what was added to the diagonal of H.
  """

  matvec: Callable[[PyTree], PyTree]
  interval: iterations.Interval
  damping: Float[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Damped:
  """Made by :func:`damped`, and by :func:`ift` with no damping at all."""

  delta: float | None
  ratio: float

  @property
  def needs_bounds(self) -> bool:
    return self.delta is None

  def __call__(self, matvec, bounds: linalg.SpectralBounds) -> Shifted:
    lower, upper = bounds.lower, bounds.upper
    if self.delta is None:
      # Where -l > L the share is of -l: A must not be nearly singular there.
      share = self.ratio * jnp.maximum(upper, -lower)
      delta = jnp.maximum(share, share - lower)
    else:
      delta = jnp.asarray(self.delta, jnp.result_type(lower))
    bottom, top = lower + delta, upper + delta

    def shifted(vector: PyTree) -> PyTree:
      return trees.axpy(delta, vector, matvec(vector))

    plain = self.delta == 0
    interval = iterations.Interval(bottom, top, 1 / top)
    return Shifted(matvec if plain else shifted, interval, delta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
  """Made by :func:`published`."""

  q: float

  needs_bounds = True

  def __call__(self, matvec, bounds: linalg.SpectralBounds) -> Shifted:
    alpha = self.q / jnp.maximum(jnp.abs(bounds.lower), jnp.abs(bounds.upper))
    one = jnp.ones_like(alpha)

    def contracted(vector: PyTree) -> PyTree:
      return trees.axpy(-alpha, matvec(vector), vector)

    interval = iterations.Interval((1 - self.q) * one, (1 + self.q) * one, one)
    return Shifted(contracted, interval, jnp.zeros_like(alpha))


def damped(delta: float | None = None, *, ratio: float = 0.05) -> Damped:
  r"""``A = H + delta I``, positive definite by construction.

  .. math:: \delta = \max(s, s - l), \qquad s = ratio \cdot \max(L, -l)

  with the spectrum of H in [l, L], so that :math:`\mu = \delta + l \ge s`.

  Formal guarantees:

  - At a stationary theta this is the exact hyper-gradient of the proximal
    problem :math:`\min_t inner(t, \phi) + \frac\delta2 \|t - \theta\|^2` with
    theta fixed.
  - Nothing bounds its bias against the inverse of H.

  >>> damped(ratio=0.1) == damped(ratio=0.1)
  True

  Args:
    delta: in units of the eigenvalues of H; it must exceed -l or nothing is
      certified. None: chosen by ``ratio``.
    ratio: of ``max(L, -l)``; larger is better conditioned and more biased.

  Raises:
    ValueError: naming the argument that is not positive.

  References:
    `Rajeswaran et al. (2019) <https://arxiv.org/abs/1909.04630>`_.
  """
  if delta is not None:
    _validate.positive(delta=delta)
  _validate.positive(ratio=ratio)
  return Damped(delta=delta, ratio=ratio)


def ift() -> Damped:
  """``A = H``: the implicit function theorem, for positive definite H only.

  Nothing is certified where the lower end of the bounds is not positive, which
  Lanczos bounds of networks never are; see :func:`damped`.

  >>> ift().delta
  0.0

  References:
    `Lorraine et al. (2020) <https://arxiv.org/abs/1911.02590>`_.
  """
  return Damped(delta=0.0, ratio=0.0)


def published(q: float = 0.9) -> Published:
  r"""``A = I - alpha H``, for fidelity runs only.

  .. math:: \alpha = q / \max(|l|, |L|), \qquad
    A^{-1} = \sum_k (\alpha H)^k

  A reconstruction of a form in the literature. It is **not** the implicit
  hyper-gradient: directions are weighted by :math:`1/(1 - \alpha\lambda)`,
  which grows with the curvature, where the inverse of H weights by
  :math:`1/\lambda`. The certificate is about the series, not about that.

  Formal guarantees:

  - The spectrum of A lies in [1 - q, 1 + q], whatever the signs of H's.

  >>> published().q
  0.9

  Args:
    q: in (0, 1).

  Raises:
    ValueError: ``q`` outside.
  """
  if not 0 < q < 1:
    raise ValueError(f"q must be between 0 and 1, got {q}.")
  return Published(q=q)
