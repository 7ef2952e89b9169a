"""Where the ends of a spectrum come from, as values.

The protocol is ``bounds(matvec, like, key) -> linalg.SpectralBounds``, and
``bounds.num_matvecs(like)`` says what that costs.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import PRNGKeyArray
from jaxtyping import PyTree

from robust_mm import _validate
from robust_mm import linalg
from robust_mm.linalg import trees


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanczosBounds:
  """Made by :func:`lanczos_bounds`."""

  num_steps: int
  failure_probability: float
  positive: bool
  reorthogonalize: bool

  def num_matvecs(self, like: PyTree) -> int:
    """Products that a call spends."""
    return min(self.num_steps, trees.size(like))

  def __call__(
    self, matvec, like: PyTree, key: PRNGKeyArray
  ) -> linalg.SpectralBounds:
    return linalg.spectral_bounds(
      matvec,
      like,
      key,
      num_steps=self.num_steps,
      failure_probability=self.failure_probability,
      positive=self.positive,
      reorthogonalize=self.reorthogonalize,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownBounds:
  """Made by :func:`known_bounds`."""

  lower: float
  upper: float

  def num_matvecs(self, like: PyTree) -> int:
    del like
    return 0

  def __call__(self, matvec, like: PyTree, key) -> linalg.SpectralBounds:
    del matvec, key
    dtype = trees.norm(trees.zeros_like(like)).dtype
    lower, upper = (
      jnp.asarray(self.lower, dtype),
      jnp.asarray(self.upper, dtype),
    )
    return linalg.SpectralBounds(
      lower=lower,
      upper=upper,
      smallest=lower,
      largest=upper,
      failure_probability=jnp.zeros((), dtype),
    )


def lanczos_bounds(
  num_steps: int = 20,
  *,
  failure_probability: float = 1e-3,
  positive: bool = False,
  reorthogonalize: bool = True,
) -> LanczosBounds:
  """Ends of the spectrum of H from Lanczos iteration with a random start.

  Formal guarantees: those of ``linalg.spectral_bounds``: [l, L] holds the
  spectrum with probability ``1 - failure_probability`` over the start vector,
  in exact arithmetic. A heuristic without ``reorthogonalize``.

  >>> lanczos_bounds(30).failure_probability
  0.001

  Args:
    num_steps: products with H; the least that will do grows with the number of
      parameters (8 for a thousand, 11 for 1e9) and too few are refused when
      that number is known.
    failure_probability: in (0, 1).
    positive: H is known to be positive semidefinite: l = 0.
    reorthogonalize: keep ``num_steps`` copies of theta; False keeps two.

  Raises:
    ValueError: naming the argument.
  """
  _validate.at_least(1, num_steps=num_steps)
  if not 0 < failure_probability < 1:
    raise ValueError(
      f"failure_probability must be between 0 and 1, got {failure_probability}."
    )
  return LanczosBounds(
    num_steps=num_steps,
    failure_probability=failure_probability,
    positive=positive,
    reorthogonalize=reorthogonalize,
  )


def known_bounds(*, lower: float, upper: float) -> KnownBounds:
  """Ends of the spectrum of H that are known, such as the l2 penalty of inner.

  Formal guarantees: the caller's. Observations that contradict them are
  reported (``certified=False``).

  >>> known_bounds(lower=0.1, upper=2.0).upper
  2.0

  Args:
    lower: at most the smallest eigenvalue.
    upper: at least the largest.

  Raises:
    ValueError: not finite, or ``lower`` above ``upper``.
  """
  for name, value in (("lower", lower), ("upper", upper)):
    if not math.isfinite(value):
      raise ValueError(f"{name} must be finite, got {value}.")
  if lower > upper:
    raise ValueError(f"lower must be at most {upper}, upper, got {lower}.")
  return KnownBounds(lower=float(lower), upper=float(upper))


def no_bounds(like: PyTree) -> linalg.SpectralBounds:
  """Nothing is known: an interval that holds every spectrum."""
  infinite = jnp.full_like(trees.norm(trees.zeros_like(like)), jnp.inf)
  return linalg.SpectralBounds(
    lower=-infinite,
    upper=infinite,
    smallest=infinite,
    largest=-infinite,
    failure_probability=jnp.ones_like(infinite),
  )
