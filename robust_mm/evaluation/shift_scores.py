"""Scores of many predictions at once, under many weights of the items.

A bootstrap replicate is a weight for every cluster of items. Accuracy,
balanced accuracy and macro-F1 are ratios of sums over clusters, so all
replicates are one matrix product; mean average precision and AUROC are computed
again for each. That costs seeds * T * E * classes * items * replicates steps:
half an hour a method and seed on one core for mAP at AudioSet's size (two
modalities, 527 classes, 20,000 items, 2,000 replicates); in memory, beside the
logits, a few blocks of ``shift_draws.CHUNK`` numbers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from robust_mm import _validate

SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "map", "auroc")
MULTI_LABEL = ("map", "auroc")
"""Those of several labels at once."""

Weighted = Callable[[np.ndarray], np.ndarray]
Prepare = Callable[[np.ndarray, np.ndarray], Weighted]


def chance_level(
  label: Any, *, score: str = "accuracy", num_classes: int | None = None
) -> float:
  """What a score is worth without looking at any input.

  The share of the commonest class for accuracy, 1 / k for balanced accuracy
  and by convention for macro-F1, the mean share of positives for mAP (over the
  classes that have any, as in the score), 1 / 2 for AUROC.

  >>> chance_level([0, 0, 0, 1]), chance_level([0, 1], score="macro_f1")
  (0.75, 0.5)

  Args:
    label: of the test split, int ``[item]``, or ``bool[item, k]`` for mAP and
      AUROC.
    score: one of :data:`SCORES`.
    num_classes: k; None for those that labels have.

  Raises:
    ValueError: naming ``score``, or ``label`` if it has the wrong shape.
  """
  _validate.one_of(SCORES, score=score)
  label = check_label(label, score)
  if score == "map":
    return float(np.mean(label[:, label.any(axis=0)])) if label.any() else 0.0
  if score == "auroc":
    return 0.5
  found = np.unique(label, return_counts=True)[1]
  if score == "accuracy":
    return float(found.max() / found.sum())
  return 1 / (num_classes or len(found))


def check_label(label: Any, score: str) -> np.ndarray:
  """Labels as an array; ValueError naming ``label`` for another shape."""
  label = np.asarray(label)
  several = score in MULTI_LABEL
  wanted = "bool[item, k]" if several else "int [item]"
  if label.ndim != (2 if several else 1) or not label.size:
    raise ValueError(
      f"label must be {wanted} for the score {score!r}, got the shape "
      f"{label.shape}."
    )
  return label.astype(bool) if several else label


def scorer(
  score: str, label: np.ndarray | None, cluster: np.ndarray
) -> Prepare:
  """``prepare(results, counted) -> (weights -> scores)``.

  Args:
    score: one of :data:`SCORES`.
    label: of :func:`check_label`; None for an accuracy of what is right.
    cluster: int ``[item]``, 0 and up, the cluster of every item.

  Returns:
    a function of ``results`` (``[*lead, item]`` right or not, where there is no
    label, else logits ``[*lead, item, k]``) and ``counted``
    (``bool[*lead, item]``, axes of length 1 allowed), whose value maps weights
    ``[r, cluster]`` to scores ``[r, *lead]``: NaN where nothing is counted.
    Classes without a label in a replicate are left out of it.
  """

  def prepare(results, counted):
    if score in MULTI_LABEL:
      area = _precision_area if score == "map" else _roc_area
      return _mean_area(results, counted, label, cluster, area)
    if label is None:
      right = results
    else:
      guess = predictions(results)
      right = guess == label
    if score == "accuracy":
      hits = _sums(np.where(counted, right, 0), cluster)
      size = _sums(counted, cluster)
      return lambda w: _ratio(_weigh(w, hits), _weigh(w, size))
    return _by_class(guess, counted, label, cluster, score)

  return prepare


def predictions(logits: np.ndarray) -> np.ndarray:
  """The largest of ``[*lead, item, k]``; -1, never right, for a NaN."""
  guess = logits.argmax(axis=-1)  # the first NaN, where there is one
  best = np.take_along_axis(logits, guess[..., None], axis=-1)[..., 0]
  return np.where(np.isnan(best), -1, guess)


def _by_class(guess, counted, label, cluster, score: str) -> Weighted:
  classes = np.unique(label)

  def weighted(w):
    total, number = 0.0, 0.0
    for k in classes:
      own, said = counted & (label == k), guess == k
      hits = _weigh(w, _sums(own & said, cluster))
      support = _weigh(w, _sums(own, cluster))
      if score == "macro_f1":
        every = _weigh(w, _sums(counted & said, cluster))
        value = _ratio(2 * hits, support + every)
      else:
        value = _ratio(hits, support)
      some = np.broadcast_to(support > 0, value.shape)
      total = total + np.where(some, value, 0)
      number = number + some
    return _ratio(total, number)

  return weighted


def _mean_area(logits, counted, label, cluster, area_fn) -> Weighted:
  """The mean over classes of an area under a curve of ranked items.

  Every call ranks again, a class at a time: orders kept are twice the logits.
  """
  lead = logits.shape[:-2]
  counted = np.broadcast_to(counted, logits.shape[:-1])
  size = np.bincount(cluster)

  def weighted(w):
    kind = _kind(w, size)
    items = np.ascontiguousarray(w.T, kind)[cluster]  # [item, r]
    found = np.full((len(w), *lead), np.nan)
    for at in np.ndindex(lead):
      present = items
      if not counted[at].all():
        present = items * counted[at].astype(kind)[:, None]
      bad = np.isnan(logits[at]).any(axis=-1)
      total, number = np.zeros(len(w)), np.zeros(len(w))
      for k, positive in enumerate(label.T):
        # Wrong in every class: what it has comes last, what it lacks first.
        wrong = np.where(positive, -np.inf, np.inf)
        order, last = _ranked(np.where(bad, wrong, logits[at][:, k]))
        area, some = area_fn(present[order], positive[order], last)
        total += area
        number += some
      found[(slice(None), *at)] = _ratio(total, number)
    return found

  return weighted


def _kind(weights, size) -> type:
  """float32 where sums of the weights, and their halves, are exact in it."""
  whole = np.all(weights == np.rint(weights)) and np.all(weights >= 0)
  return np.float32 if whole and (weights @ size).max() < 2**22 else np.float64


def _ranked(score):
  """(items from the highest down, for each place the last of its tie)."""
  order = np.argsort(-score, kind="stable")
  ranked = score[order]
  # Ties are one step: all of them are ranked as the last.
  ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
  return order, np.repeat(ends, np.diff(ends, prepend=-1))


def _roc_area(weight, positive, last):
  """AUROC of ranked items, ``[item, r]``, and where there is one.

  The chance that a positive is ranked above a negative, ties counting half;
  none in a replicate without either.
  """
  negative = np.where(positive[:, None], 0, weight)
  upto = np.cumsum(negative, axis=0)[last]
  # Ranked above a tie: up to the end of the one before.
  first = np.searchsorted(last, last, side="left")
  before = np.where((first > 0)[:, None], upto[np.maximum(first - 1, 0)], 0)
  below = upto[-1] - (before + upto) / 2
  own = np.where(positive[:, None], weight, 0)
  hits = own.sum(axis=0, dtype=np.float64)
  total = upto[-1].astype(np.float64)
  some = (hits > 0) & (total > 0)
  area = np.einsum("ir,ir->r", own, below, dtype=np.float64)
  return area / np.where(some, hits * total, 1) * some, some


def _precision_area(weight, positive, last):
  """Average precision of ranked items, ``[item, r]``, and where there is one.

  Zero in a replicate without a positive.
  """
  places = np.flatnonzero(positive)
  if not places.size:
    return 0.0, 0.0
  own = weight[places]
  hits = np.cumsum(own, axis=0)
  # The last positive that is not ranked below the end of a tie.
  upto = np.searchsorted(places, last[places], side="right") - 1
  # Sums between the ends of their ties: running along all items takes longer.
  ends, tie = np.unique(last[places], return_inverse=True)
  starts = np.append(0, ends[:-1] + 1)
  parts = np.add.reduceat(weight[: ends[-1] + 1], starts, axis=0)
  every = np.cumsum(parts, axis=0)[tie]
  # Where nothing was drawn up to here, the weight here is 0 too.
  precision = np.divide(
    hits[upto], np.where(every > 0, every, 1), dtype=np.float64
  )
  some = hits[-1] > 0
  area = np.einsum("ir,ir->r", own, precision, dtype=np.float64)
  return area / np.where(some, hits[-1], 1), some


def _sums(values: np.ndarray, cluster: np.ndarray) -> np.ndarray:
  """Sums over the items of each cluster, ``[*lead, cluster]``."""
  order = np.argsort(cluster, kind="stable")
  starts = np.flatnonzero(np.diff(cluster[order], prepend=-1))
  return np.add.reduceat(
    np.asarray(values, np.float64)[..., order], starts, axis=-1
  )


def _weigh(weights: np.ndarray, sums: np.ndarray) -> np.ndarray:
  return np.tensordot(weights, sums, axes=([1], [-1]))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
  above, below = np.broadcast_arrays(above, below)
  empty = np.full(above.shape, np.nan)
  return np.divide(above, below, out=empty, where=below > 0)
