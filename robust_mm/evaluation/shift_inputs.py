"""What a report of modality shift is made of, read and refused by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from robust_mm import _validate
from robust_mm import modalities
from robust_mm.evaluation import shift_scores
from robust_mm.evaluation import shift_statistics

Subset = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Study:
  """Results that fit each other.

  Attributes:
    names: of the modalities.
    train_sets: T.
    test_sets: E.
    categories: kinds of shift that are reported, "shifted" among them.
    kinds: ``[T, E]``.
    reference: a method or "own".
    score: what is measured.
    results: ``{method: [seed, T, E, item]}`` or logits.
    matched: ``{method: {E: [seed, item]}}`` or logits.
    label: of the items, or None.
    cluster: ``int[item]``, from 0.
    empty: ``bool[E, item]``, items that have nothing of E.
    skip_empty: whether they are left out.
  """

  names: Subset
  train_sets: tuple[Subset, ...]
  test_sets: tuple[Subset, ...]
  categories: tuple[str, ...]
  kinds: np.ndarray
  reference: str
  score: str
  results: Mapping[str, np.ndarray]
  matched: Mapping[str, Mapping[Subset, np.ndarray]]
  label: np.ndarray | None
  cluster: np.ndarray
  empty: np.ndarray
  skip_empty: bool

  @property
  def num_clusters(self) -> int:
    """How many there are."""
    return int(self.cluster.max()) + 1

  @property
  def num_seeds(self) -> int:
    """Of every method."""
    return len(next(iter(self.results.values())))

  @property
  def counted(self) -> np.ndarray:
    """``bool[E, item]``, the items that count."""
    return ~(self.empty & self.skip_empty)

  def pairs(self, kind: str) -> np.ndarray:
    """``bool[T, E]``, the pairs of a kind, or of those that are pooled."""
    if kind == shift_statistics.SHIFTED:
      return np.isin(self.kinds, shift_statistics.SHIFTED_KINDS)
    return self.kinds == kind

  def facts(self) -> dict[str, Any]:
    """The fields of a report that need no score."""
    return {
      "names": self.names,
      "train_sets": self.train_sets,
      "test_sets": self.test_sets,
      "categories": self.categories,
      "kinds": self.kinds,
      "score": self.score,
      "reference": self.reference,
      "results": self.results,
      "num_pairs": {k: int(self.pairs(k).sum()) for k in self.categories},
      "num_items": len(self.cluster),
      "num_clusters": self.num_clusters,
      "num_seeds": self.num_seeds,
      "num_nan": {method: self._num_nan(method) for method in self.results},
      "num_empty": {
        modalities.subset_name(subset): int(row.sum())
        for subset, row in zip(self.test_sets, self.empty)
        if row.any()
      },
      "skipped_empty": self.skip_empty,
    }

  def _num_nan(self, method: str) -> int:
    """Predictions with NaN, of items that have something of E."""
    if self.label is None:
      return 0
    parts = [(self.results[method], self.empty)]
    for subset, logits in self.matched.get(method, {}).items():
      parts.append((logits, self.empty[self.test_sets.index(subset)]))
    return sum(
      int(np.sum((shift_scores.predictions(logits) < 0) & ~empty))
      for logits, empty in parts
    )


def read(
  results: Mapping[str, Any],
  names: Any,
  *,
  reference: str,
  train_sets: Any,
  test_sets: Any,
  matched: Mapping[str, Mapping[Any, Any]],
  score: str,
  label: Any,
  clusters: Any,
  present: Mapping[str, Any] | None,
  skip_empty: bool,
  categories: tuple[str, ...],
) -> Study:
  """Arrays of one study; the arguments are those of ``shift_report``.

  Raises:
    ValueError: naming the argument.
  """
  names = modalities.as_subset(list(names), argument="names")
  train_sets = _sets("train_sets", train_sets, names)
  test_sets = _sets("test_sets", test_sets, names)
  for subset in train_sets:
    if subset not in test_sets:
      raise ValueError(
        f"test_sets lacks {modalities.subset_name(subset)!r}, which is a train "
        "set: matched scores are needed."
      )
  _validate.one_of(shift_scores.SCORES, score=score)
  if label is None and score != "accuracy":
    raise ValueError(f"label is None; the score {score!r} needs it.")
  if label is not None:
    label = shift_scores.check_label(label, score)
  shape = len(train_sets), len(test_sets)
  arrays = _results(results, shape, score, label)
  num_items = next(iter(arrays.values())).shape[3]
  if label is not None and len(label) != num_items:
    raise ValueError(f"label has {len(label)} items, results have {num_items}.")
  _validate.one_of(["own", *arrays], reference=reference)
  kinds = np.array(
    [[modalities.shift(t, e) for e in test_sets] for t in train_sets]
  )
  return Study(
    names=names,
    train_sets=train_sets,
    test_sets=test_sets,
    categories=categories,
    kinds=kinds,
    reference=reference,
    score=score,
    results=arrays,
    matched=_matched(
      matched, arrays, reference, train_sets, test_sets, kinds, categories
    ),
    label=label,
    cluster=_clusters(clusters, num_items),
    empty=_empty(present, names, test_sets, num_items),
    skip_empty=skip_empty,
  )


def _sets(argument, given, names) -> tuple[Subset, ...]:
  if given is None:
    return modalities.subsets(names)
  found = []
  for subset in given:
    subset = modalities.as_subset(subset, argument=argument)
    _validate.known(names, **{argument: subset})
    if subset in found:
      raise ValueError(
        f"{argument} has {modalities.subset_name(subset)!r} twice."
      )
    found.append(subset)
  if not found:
    raise ValueError(f"{argument} must hold at least one set, got none.")
  return tuple(found)


def _results(results, shape, score, label) -> dict[str, np.ndarray]:
  if not isinstance(results, Mapping) or not results:
    raise ValueError("results must map methods to arrays, at least one.")
  if "own" in results:
    raise ValueError("results may not name a method 'own'.")
  arrays = {method: np.asarray(value) for method, value in results.items()}
  first = next(iter(arrays.values())).shape
  form = "[seed, T, E, item]" if label is None else "[seed, T, E, item, k]"
  for method, value in arrays.items():
    argument = f"results[{method!r}]"
    if value.ndim != form.count(",") + 1 or value.shape[1:3] != shape:
      raise ValueError(
        f"{argument} must be {form} with {shape[0]} train sets and {shape[1]} "
        f"test sets, got the shape {value.shape}."
      )
    if value.shape != first or not value.size:
      raise ValueError(
        f"{argument} must have seeds and items, as many as every method, got "
        f"the shapes {value.shape} and {first}."
      )
    _check_values(argument, value, score, label)
  return arrays


def _check_values(argument, value, score, label) -> None:
  if label is None:
    # NaN fails both comparisons.
    if not np.all((value >= 0) & (value <= 1)):
      raise ValueError(
        f"{argument} must be right or not, in [0, 1]; without NaN (which is "
        "wrong)."
      )
    return
  num_classes = value.shape[-1]
  if score in shift_scores.MULTI_LABEL:
    if label.shape[1] != num_classes:
      raise ValueError(
        f"label has {label.shape[1]} classes, {argument} has {num_classes}."
      )
  elif not np.all((label >= 0) & (label < num_classes)):
    raise ValueError(
      f"label must lie in 0..{num_classes - 1}, the classes of {argument}."
    )


def _matched(matched, arrays, reference, trains, tests, kinds, categories):
  """Matched results beyond the rows; refuses a reference that lacks any."""
  found = {}
  for method, given in matched.items():
    _validate.one_of(arrays, matched=method)
    value = arrays[method]
    shape = value.shape[:1] + value.shape[3:]
    found[method] = {}
    for subset, extra in given.items():
      argument = f"matched[{method!r}][{subset!r}]"
      subset = modalities.as_subset(subset, argument=argument)
      extra = np.asarray(extra)
      if subset not in tests or extra.shape != shape:
        raise ValueError(
          f"{argument} must be of a test set and have the shape {shape}, got "
          f"{extra.shape}."
        )
      found[method][subset] = extra
  needed = [
    subset
    for column, subset in enumerate(tests)
    if np.isin(kinds[:, column], categories).any()
  ]
  for method in arrays if reference == "own" else [reference]:
    known = {*trains, *found.get(method, {})}
    lacking = [s for s in needed if s not in known]
    if lacking:
      listed = ", ".join(modalities.subset_name(s) for s in lacking[:5])
      raise ValueError(
        f"reference has no matched score of {method!r} on {listed}"
        f"{' and others' if len(lacking) > 5 else ''}: give it in matched, or "
        "leave the set out of test_sets."
      )
  return found


def _clusters(clusters, num_items) -> np.ndarray:
  if clusters is None:
    return np.arange(num_items)
  clusters = np.asarray(clusters)
  if clusters.shape != (num_items,):
    raise ValueError(
      f"clusters must be [{num_items}], got the shape {clusters.shape}."
    )
  return np.unique(clusters, return_inverse=True)[1]


def _empty(present, names, test_sets, num_items) -> np.ndarray:
  if present is None:
    return np.zeros((len(test_sets), num_items), bool)
  _validate.known(names, present=present)
  there = {}
  for name in names:
    if name not in present:
      raise ValueError(f"present lacks the modality {name!r}.")
    there[name] = np.asarray(present[name], bool)
    if there[name].shape != (num_items,):
      raise ValueError(
        f"present[{name!r}] must be [{num_items}], got the shape "
        f"{there[name].shape}."
      )
  return np.stack(
    [~np.any([there[m] for m in subset], axis=0) for subset in test_sets]
  )
