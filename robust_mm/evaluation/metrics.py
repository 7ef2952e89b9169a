"""Numbers for tables: accuracies, F1, regression, robustness, intervals.

Plain NumPy on host arrays. Labels come first everywhere, predictions second:
an F1 with its arguments swapped is another number.
"""

import itertools
import math
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import numpy as np

from robust_mm import _validate
from robust_mm import modalities

VARIANTS = ("nonzero", "has_zero")
# 2^8 subsets; the weights are exact beyond, nobody measures so many.
MAX_MODALITIES = 8


class Interval(NamedTuple):
  """A difference and the ends of its interval."""

  difference: float
  low: float
  high: float


def accuracy(label: Any, prediction: Any) -> float:
  """The share that is right; for IEMOCAP this is WA, "weighted accuracy".

  It weighs the recall of every class by its frequency.
  """
  label, prediction = _pair(label, prediction)
  return float(np.mean(label == prediction))


def unweighted_accuracy(label: Any, prediction: Any) -> float:
  """The mean recall over the classes that labels have; UA for IEMOCAP."""
  label, prediction = _pair(label, prediction)
  recalls = [np.mean(prediction[label == k] == k) for k in np.unique(label)]
  return float(np.mean(recalls))


def weighted_f1(label: Any, prediction: Any) -> float:
  r"""The F1 of every class, weighted by its share of the labels.

  .. math:: \sum_k \frac{n_k}{N} F1_k

  A class that no label has weighs nothing; one that is never predicted has 0.
  """
  label, prediction = _pair(label, prediction)
  total = 0.0
  for k in np.unique(label):
    hits = np.sum((label == k) & (prediction == k))
    either = np.sum(label == k) + np.sum(prediction == k)
    total += np.mean(label == k) * 2 * hits / either
  return float(total)


def mean_absolute_error(label: Any, prediction: Any) -> float:
  """The mean of ``abs(prediction - label)``."""
  label, prediction = _numbers(label, prediction)
  return float(np.mean(np.abs(prediction - label)))


def correlation(label: Any, prediction: Any) -> float:
  """Pearson's; NaN, never 0, where either is constant."""
  label, prediction = _numbers(label, prediction)
  if np.ptp(label) == 0 or np.ptp(prediction) == 0:
    return math.nan
  a, b = label - label.mean(), prediction - prediction.mean()
  a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
  return float(np.clip(np.sum(a * b), -1.0, 1.0))


def accuracy_7(label: Any, prediction: Any) -> float:
  """Sentiment in [-3, 3] rounded to seven classes, halves to the even one.

  >>> accuracy_7([0.5, 1.5, -9.0], [0.0, 2.0, -3.0])
  1.0
  """
  label, prediction = _numbers(label, prediction)
  rounded = [np.round(np.clip(x, -3, 3)) for x in (label, prediction)]
  return float(np.mean(rounded[0] == rounded[1]))


def accuracy_2(label: Any, prediction: Any, *, variant: str) -> float:
  """Sentiment as two classes; always print which variant.

  Args:
    label: ``[n]``, in [-3, 3].
    prediction: ``[n]``.
    variant: ``"nonzero"``: rows with a label other than 0, above 0 against the
      rest; ``"has_zero"``: all rows, 0 and above against the rest.

  Returns:
    A share; NaN where no row counts.

  Raises:
    ValueError: another variant.
  """
  label, prediction = _binary(label, prediction, variant)
  return accuracy(label, prediction) if label.size else math.nan


def f1_2(label: Any, prediction: Any, *, variant: str) -> float:
  """:func:`weighted_f1` of the two classes of :func:`accuracy_2`."""
  label, prediction = _binary(label, prediction, variant)
  return weighted_f1(label, prediction) if label.size else math.nan


def average_precision(label: Any, score: Any) -> float:
  r"""The area under the steps of precision over recall, of one class.

  .. math:: \sum_n (R_n - R_{n-1}) P_n

  over the distinct scores from the highest on; NaN without a positive label.

  Args:
    label: ``bool[n]``.
    score: ``[n]``, higher for the class.
  """
  label, score = _pair(label, score)
  label = label.astype(bool)
  if not label.any():
    return math.nan
  order = np.argsort(-score, kind="stable")
  # Ties are one step: their order means nothing.
  last = np.append(np.diff(score[order]) != 0, True)
  hits = np.cumsum(label[order])[last]
  precision = hits / (np.flatnonzero(last) + 1)
  recall = hits / label.sum()
  return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def mean_average_precision(label: Any, score: Any) -> float:
  """mAP: over the classes of ``[n, k]`` that have a positive label.

  NaN without any, or where a score is NaN.

  Raises:
    ValueError: shapes that are not the same ``[n, k]``.
  """
  label, score = np.asarray(label), np.asarray(score)
  if label.ndim != 2 or label.shape != score.shape:
    raise ValueError(
      f"label and score must be [n, k] of one shape, got {label.shape} and "
      f"{score.shape}."
    )
  if np.isnan(score).any():
    return math.nan
  found = [average_precision(a, b) for a, b in zip(label.T, score.T)]
  found = [value for value in found if not math.isnan(value)]
  return float(np.mean(found)) if found else math.nan


def mean_corruption_score(table: Mapping[str, Mapping[Any, float]]) -> float:
  """The mean over kinds of the mean over severities; higher is better.

  Every kind counts alike, however many severities were measured.

  >>> mean_corruption_score({"blur": {1: 0.8, 5: 0.4}, "swap": {5: 0.2}})
  0.4

  Args:
    table: ``{kind: {severity: accuracy}}``.

  Raises:
    ValueError: naming ``table`` if it, or a kind of it, is empty.
  """
  if not table or not all(table.values()):
    raise ValueError("table must have a number for every kind, got an empty.")
  return float(np.mean([np.mean(list(row.values())) for row in table.values()]))


def robustness(scores: Mapping[Any, float]) -> dict[str, float]:
  """What is left over all sets of modalities.

  >>> found = robustness({"a": 0.4, "b": 0.6, "a+b": 0.8})
  >>> round(found["mean"], 4), found["min"], round(found["retention"], 4)
  (0.6, 0.4, 0.625)

  Args:
    scores: ``{set: score}``, sets as tuples of names or ``"a+b"``; the largest
      one holds all modalities.

  Returns:
    ``{"mean", "min", "retention"}``; retention is the mean over the incomplete
    sets divided by the score of the full one, NaN where that is 0 or there
    are no incomplete ones.

  Raises:
    ValueError: naming ``scores`` if the full set is missing.
  """
  by_set = _by_set(scores)
  full = frozenset().union(*by_set)
  if full not in by_set:
    raise ValueError("scores lacks the set of all modalities.")
  values = list(by_set.values())
  parts = [value for key, value in by_set.items() if key != full]
  whole = by_set[full]
  retention = float(np.mean(parts)) / whole if parts and whole else math.nan
  return {
    "mean": float(np.mean(values)),
    "min": float(np.min(values)),
    "retention": retention,
  }


def shapley(
  scores: Mapping[Any, float], *, empty: float = 0.0
) -> dict[str, float]:
  r"""The exact Shapley contribution of each modality to a score.

  .. math:: \phi_m = \sum_{S \not\ni m} \frac{|S|!\, (M - |S| - 1)!}{M!}
            \left( v(S \cup \{m\}) - v(S) \right)

  Contributions sum to the score of all modalities less ``empty``.

  >>> found = shapley({"a": 0.5, "b": 0.7, "a+b": 0.8})
  >>> {name: round(value, 4) for name, value in found.items()}
  {'a': 0.3, 'b': 0.5}

  Args:
    scores: of every non-empty set of at most eight modalities, sets as tuples
      of names or ``"a+b"``.
    empty: v of the empty set, such as the share of the commonest class.

  Raises:
    ValueError: naming ``scores`` if a set is missing or there are too many.
  """
  by_set = {frozenset(): empty, **_by_set(scores)}
  names = modalities.names(frozenset().union(*by_set))
  count = len(names)
  if not 1 <= count <= MAX_MODALITIES:
    raise ValueError(
      f"scores must be of 1 to {MAX_MODALITIES} modalities, got {count}."
    )
  for subset in modalities.subsets(names):
    if frozenset(subset) not in by_set:
      raise ValueError(
        f"scores lacks the set {modalities.subset_name(subset)!r}."
      )
  found = {}
  for name in names:
    others = [other for other in names if other != name]
    total = 0.0
    for size in range(count):
      weight = 1 / (count * math.comb(count - 1, size))
      for rest in map(frozenset, itertools.combinations(others, size)):
        total += weight * (by_set[rest | {name}] - by_set[rest])
    found[name] = float(total)
  return found


def paired_bootstrap(
  first: Any,
  second: Any,
  *,
  num_samples: int = 2000,
  level: float = 0.95,
  seed: int = 0,
) -> Interval:
  """The mean of ``first - second`` and its percentile interval.

  Items, and with two axes the seeds too, are drawn again with replacement, the
  same ones for both: the interval is about other items and other seeds. Few
  seeds make it too short; with one of them it is about items alone.

  Args:
    first: ``[items]`` or ``[seeds, items]``, such as 1 where right.
    second: of the same shape, paired entry by entry.
    num_samples: draws.
    level: of the interval.
    seed: of the draws.

  Raises:
    ValueError: shapes that differ, no entries, or a bad ``level``.
  """
  first, second = np.asarray(first, float), np.asarray(second, float)
  if first.shape != second.shape or first.ndim not in (1, 2) or not first.size:
    raise ValueError(
      "first and second must be [items] or [seeds, items] of one shape, got "
      f"{first.shape} and {second.shape}."
    )
  _validate.at_least(1, num_samples=num_samples)
  if not 0 < level < 1:
    raise ValueError(f"level must lie in (0, 1), got {level}.")
  difference = np.atleast_2d(first - second)
  rng = np.random.default_rng(seed)
  num_seeds, num_items = difference.shape
  means = np.empty(num_samples)
  for number in range(num_samples):
    weights = np.bincount(
      rng.integers(num_items, size=num_items), minlength=num_items
    )
    chosen = rng.integers(num_seeds, size=num_seeds)
    means[number] = np.mean((difference @ weights)[chosen]) / num_items
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return Interval(float(np.mean(difference)), float(low), float(high))


def _pair(label, prediction) -> tuple[np.ndarray, np.ndarray]:
  label, prediction = np.asarray(label), np.asarray(prediction)
  if label.ndim != 1 or label.shape != prediction.shape or not label.size:
    raise ValueError(
      "label and prediction must be [n] of one length above 0, got "
      f"{label.shape} and {prediction.shape}."
    )
  return label, prediction


def _numbers(label, prediction):
  return tuple(x.astype(np.float64) for x in _pair(label, prediction))


def _binary(label, prediction, variant):
  _validate.one_of(VARIANTS, variant=variant)
  label, prediction = _numbers(label, prediction)
  if variant == "has_zero":
    return label >= 0, prediction >= 0
  rows = label != 0
  return label[rows] > 0, prediction[rows] > 0


def _by_set(scores: Mapping[Any, float]) -> dict[frozenset, float]:
  if not scores:
    raise ValueError("scores must hold at least one set, got none.")
  return {_as_set(key): float(value) for key, value in scores.items()}


def _as_set(key: str | Iterable[str]) -> frozenset:
  return frozenset(key.split("+") if isinstance(key, str) else key)
