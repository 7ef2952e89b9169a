r"""Statistics of the wrong logits of every item: all, or a window of ranks.

A window ``(start, stop)`` means the wrong logits of ranks start..stop-1, the
largest of rank 0: ``(0, 4)`` the four largest. All of them, ``(0, C - 1)``, are
a masked reduction; fewer are ``jax.lax.top_k``, so that 50,000 classes are
never sorted. The label is masked before anything is selected: a ``-inf`` that
is multiplied by zero would be NaN in the backward pass.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from robust_mm import margins

FIRST_FOUR = (0, 4)


class Values(NamedTuple):
  """Logits ``[*n, v]`` and which of them count, ``bool[*n, v]``."""

  values: Float[Array, "*n v"]
  counted: Bool[Array, "*n v"]

  @property
  def number(self) -> Array:
    """``[*n]``: how many count."""
    return jnp.sum(self.counted, axis=-1).astype(self.values.dtype)

  def mean(self) -> Array:
    """``[*n]``."""
    return self._sum(self.values) / self.number

  def dispersion(self, centre: Array | None = None) -> Array:
    """``[*n]``: the sum of squared distances from ``centre``, or the mean."""
    centre = self.mean() if centre is None else centre
    return self._sum(jnp.square(self.values - centre[..., None]))

  def logsumexp(self) -> Array:
    """``[*n]``."""
    return jax.nn.logsumexp(self.values, axis=-1, where=self.counted)

  def _sum(self, values):
    zero = jnp.zeros_like(values)
    return jnp.sum(jnp.where(self.counted, values, zero), axis=-1)


def everything(logits: Float[Array, "*n k"], label) -> Values:
  """All wrong logits."""
  return Values(logits, ~margins.one_hot(label, logits.shape[-1]))


def ranked(
  logits: Float[Array, "*n k"], label, window: Sequence[int]
) -> Values:
  """The wrong logits whose ranks lie in ``window``."""
  start, stop = window
  num_classes = logits.shape[-1]
  if (start, stop) == (0, num_classes - 1):
    return everything(logits, label)
  selected = margins.one_hot(label, num_classes)
  wrong = jnp.where(selected, -jnp.inf, logits)
  return _all(jax.lax.top_k(wrong, stop)[0][..., start:])


def largest(logits: Float[Array, "*n k"], window: Sequence[int]) -> Values:
  """Of all logits, the label's as well, those whose ranks lie in ``window``."""
  start, stop = window
  return _all(jax.lax.top_k(logits, stop)[0][..., start:])


def _all(values: Array) -> Values:
  return Values(values, jnp.ones(values.shape, bool))


def check_window(window: Sequence[int], *, at_least: int = 1) -> tuple:
  """``(start, stop)``; ValueError where it holds fewer ranks than that."""
  try:
    start, stop = window
    whole = int(start) == start and int(stop) == stop
  except (TypeError, ValueError):
    whole = False
  if not whole or start < 0 or stop - start < at_least:
    raise ValueError(
      f"window must be two integers 0 <= start < stop with at least {at_least} "
      f"rank{'s' if at_least > 1 else ''} between them, such as (0, 4); got "
      f"{window!r}."
    )
  return int(start), int(stop)


def check_fits(
  window: Sequence[int], num_classes: int, word: str = "classes"
) -> None:
  """ValueError where there are not so many wrong classes."""
  if window[1] > num_classes - 1:
    raise ValueError(
      f"window must end at {num_classes - 1} at most, the number of wrong "
      f"{word}; got {tuple(window)!r}."
    )


def need_spread(name: str, num_classes: int, word: str = "classes") -> None:
  """ValueError where there is one wrong class, whose dispersion is 0."""
  if num_classes < 3:
    raise ValueError(
      f"{name} needs at least three {word}: with {num_classes} there is one "
      f"wrong logit, and the dispersion of one number is always 0."
    )


def finite_or_nan(logits: Array) -> Array:
  """The logits; infinite ones are refused where known, else become NaN."""
  if margins.known_values(logits) and np.any(np.isinf(np.asarray(logits))):
    raise ValueError("logits must be finite; some are infinite.")
  return jnp.where(jnp.isinf(logits), jnp.nan, logits)
