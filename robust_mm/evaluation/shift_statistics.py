r"""Aggregates of a matrix of scores s(T -> E), for one kind of shift.

Everything is an array over leading axes (replicates, seeds), so that the
bootstrap is the formula itself.
"""

from typing import Any
from typing import NamedTuple

import numpy as np

STATISTICS = (
  "performance",
  "worst",
  "relative",
  "relative_raw",
  "pooled",
  "pooled_raw",
  "drop",
  "gain",
)
SHIFTED = "shifted"
"""All pairs of ``SHIFTED_KINDS`` together."""
SHIFTED_KINDS = ("missing", "added", "transfer")
FORMS = ("pooled", "performance", "worst", "relative")
# A reference nearer to chance than so many standard errors has no ratio.
ERRORS = 2.0


class Estimate(NamedTuple):
  """A number, its interval, and what single seeds say.

  Attributes:
    value: over all seeds and items.
    low: end of the bootstrap interval.
    high: end of it.
    seed_low: the smallest over single seeds.
    seed_high: the largest.
  """

  value: float
  low: float
  high: float
  seed_low: float
  seed_high: float


def defined(
  reference: np.ndarray, error: np.ndarray, chance: float
) -> np.ndarray:
  """Where a ratio to ``reference - chance`` means something, ``bool[E]``."""
  return reference - chance > ERRORS * error


def aggregate(
  scores: np.ndarray,
  reference: np.ndarray,
  own: np.ndarray,
  *,
  pairs: np.ndarray,
  kinds: np.ndarray,
  chance: float,
  corrected: np.ndarray,
  raw: np.ndarray,
) -> dict[str, np.ndarray]:
  """Every statistic of one kind of shift.

  Args:
    scores: s, ``[..., T, E]``.
    reference: s_ref(E -> E), ``[..., E]``.
    own: s(T -> T) of the same method, ``[..., T]``.
    pairs: ``bool[T, E]``, those of this kind.
    kinds: ``[T, E]``; drop is over the missing among the pairs, gain over the
      added.
    chance: s0.
    corrected: ``bool[E]``, where the ratio with s0 is defined.
    raw: ``bool[E]``, where it is without.

  Returns:
    ``{statistic: [...]}``, NaN where it does not apply.
  """
  rows, columns = np.nonzero(pairs)
  nothing = np.full(scores.shape[:-2], np.nan)
  if not len(rows):
    return dict.fromkeys(STATISTICS, nothing)
  values = scores[..., rows, columns]
  matched = reference[..., columns]
  change = values - own[..., rows]

  def over(kind):
    chosen = kinds[rows, columns] == kind
    return change[..., chosen].mean(axis=-1) if chosen.any() else nothing

  found = {
    "performance": values.mean(axis=-1),
    "worst": values.min(axis=-1),
    "relative": _of_ratios(
      values - chance, matched - chance, corrected[columns]
    ),
    "relative_raw": _of_ratios(values, matched, raw[columns]),
    "pooled": _pooled(values - chance, matched - chance),
    "pooled_raw": _pooled(values, matched),
    "drop": -over("missing"),
    "gain": over("added"),
  }
  return {name: np.asarray(value) for name, value in found.items()}


def summary(value, draws, by_seed, level: float) -> Estimate:
  """A number with the percentile interval of its replicates."""
  low, high = np.nan, np.nan
  if not np.any(np.isnan(draws)):
    # Replicates may be infinite: interpolating between two of them is NaN.
    ends = [(1 - level) / 2, (1 + level) / 2]
    infinite = not np.all(np.isfinite(draws))
    method = "nearest" if infinite else "linear"
    low, high = np.quantile(draws, ends, method=method)
  seeds = by_seed[~np.isnan(by_seed)]
  return Estimate(
    float(value),
    float(low),
    float(high),
    float(seeds.min()) if seeds.size else np.nan,
    float(seeds.max()) if seeds.size else np.nan,
  )


def quotient(above: Any, below: Any) -> np.ndarray:
  """``above / below``; infinite where ``below`` is not positive."""
  above, below = np.broadcast_arrays(above, below)
  infinite = np.full(above.shape, np.inf)
  return np.divide(above, below, out=infinite, where=below > 0)


def _of_ratios(above, below, keep):
  if not keep.any():
    return np.full(above.shape[:-1], np.nan)
  with np.errstate(divide="ignore", invalid="ignore"):
    return np.mean(above[..., keep] / below[..., keep], axis=-1)


def _pooled(above, below):
  total = below.sum(axis=-1)
  empty = np.full(total.shape, np.nan)
  return np.divide(above.sum(axis=-1), total, out=empty, where=total > 0)
