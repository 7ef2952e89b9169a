"""A split of a data set as columns: gather any rows as one batch of arrays."""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np

from robust_mm import _tasks
from robust_mm import _validate
from robust_mm.data import registry


class Spec(NamedTuple):
  """Shape of one example and dtype, as a batch holds them."""

  shape: tuple[int, ...]
  dtype: np.dtype


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Column:
  """One value per example: ``array[index] / divisor`` as ``dtype``.

  Attributes:
    array: stored rows, in memory or memory-mapped.
    index: row of every example, or None for the identity. Examples may share
      rows (one recording in many pairs), and a subset copies nothing.
    divisor: stored integers are divided by it.
    dtype: of the values given out.
  """

  array: Any
  index: Any = None
  divisor: float = 1.0
  dtype: str = "float32"

  def __len__(self) -> int:
    return len(self.array) if self.index is None else len(self.index)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of one value."""
    return self.array.shape[1:]

  def take(self, indices: np.ndarray) -> np.ndarray:
    """The values of these examples, a fresh array."""
    rows = indices if self.index is None else self.index[indices]
    # A mapped array gives its own kind, though the rows are in memory.
    values = np.asarray(self.array[rows]).astype(self.dtype, copy=False)
    if self.divisor != 1.0:
      values /= np.float32(self.divisor)
    return values

  def subset(self, indices: np.ndarray) -> "Column":
    """The column of these examples; shares the stored rows."""
    rows = indices if self.index is None else self.index[indices]
    return dataclasses.replace(self, index=rows)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source:
  """One split of a data set.

  Attributes:
    name: of the data set.
    split: ``"train"``, ``"validation"``, ``"test"``, or several joined by +.
    columns: ``{m: Column}``.
    present: ``{m: bool[n] | None}``; None where nothing is missing.
    labels: ``int32[n]``; ``float32[n]`` of a regression, ``bool[n, k]`` of
      several classes at once. Batches have 0 and 1 in float32 of these.
    ids: ``int32[n]``, unique over all splits of a named data set.
    num_classes: k; 0 of a regression.
    value_range: ``{m: (low, high) | None}``.
    metadata: ``{name: [n]}``, such as the subject of a recording.
    notes: sentences a user has to be told.
    transforms: applied in order to every batch taken.
  """

  name: str
  split: str
  columns: Mapping[str, Column]
  present: Mapping[str, Any]
  labels: Any
  ids: Any
  num_classes: int
  value_range: Mapping[str, tuple[float, float] | None]
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()
  transforms: tuple[Callable[[dict], dict], ...] = ()

  def __len__(self) -> int:
    return len(self.labels)

  @property
  def task(self) -> str:
    """What the labels are of, as ``Model.task`` says it."""
    return _tasks.of_labels(self.labels, self.num_classes)

  @property
  def modalities(self) -> tuple[str, ...]:
    """Names, sorted."""
    return tuple(sorted(self.columns))

  @property
  def spec(self) -> dict[str, Spec]:
    """``{m: (shape, dtype)}`` of one example."""
    return {
      name: Spec(self.columns[name].shape, np.dtype(self.columns[name].dtype))
      for name in self.modalities
    }

  def take(self, indices: Any) -> dict:
    """The examples at ``indices`` as one batch of fresh numpy arrays.

    Absent inputs are zeros. One gather per modality, no work per example.
    """
    indices = np.asarray(indices, np.int64)
    inputs = {}
    present = {}
    for name in self.modalities:
      values = self.columns[name].take(indices)
      flags = self.present[name]
      if flags is None:
        present[name] = np.ones(len(indices), bool)
      else:
        present[name] = flags[indices]
        values[~present[name]] = 0
      inputs[name] = values
    label = self.labels[indices]
    if self.task == _tasks.MULTI_LABEL:
      label = label.astype(np.float32)
    batch = {
      "inputs": inputs,
      "present": present,
      "label": label,
      "id": self.ids[indices],
    }
    for transform in self.transforms:
      batch = transform(batch)
    return batch

  def batch(self) -> dict:
    """The whole split as one batch."""
    return self.take(np.arange(len(self)))

  def select(self, modalities: Sequence[str] | str) -> "Source":
    """The source with these modalities only; UserError for an unknown name."""
    chosen = registry.choose_modalities(
      self.name, self.modalities, self.modalities, modalities
    )
    return dataclasses.replace(
      self,
      columns={name: self.columns[name] for name in chosen},
      present={name: self.present[name] for name in chosen},
      value_range={name: self.value_range[name] for name in chosen},
    )

  def with_transforms(
    self, transforms: Sequence[Callable[[dict], dict]]
  ) -> "Source":
    """The source whose batches also pass through these batch transforms."""
    return dataclasses.replace(self, transforms=(*self.transforms, *transforms))

  def subset(self, indices: Any) -> "Source":
    """The source of these examples, in this order; copies no inputs."""
    indices = np.asarray(indices, np.int64)
    return dataclasses.replace(
      self,
      columns={name: c.subset(indices) for name, c in self.columns.items()},
      present={
        name: None if flags is None else flags[indices]
        for name, flags in self.present.items()
      },
      labels=self.labels[indices],
      ids=self.ids[indices],
      metadata={
        name: values[indices] for name, values in self.metadata.items()
      },
    )

  def limit(self, size: int | None) -> "Source":
    """A fixed subset of at most ``size`` examples, class-balanced or random.

    Subsets are nested: the examples of ``limit(10)`` are the first ten of
    ``limit(20)``. None, or a size beyond the split, changes nothing.
    """
    if size is None:
      return self
    if isinstance(size, bool) or int(size) != size or size < 1:
      raise _validate.UserError(
        f"limit must be an integer of at least 1, got {size}."
      )
    if size >= len(self):
      return self
    return self.subset(fixed_order(self.labels)[: int(size)])


def label_dtype(task: str) -> str:
  """How a source keeps the labels of a task."""
  return {
    _tasks.CLASSIFICATION: "int32",
    _tasks.REGRESSION: "float32",
    _tasks.MULTI_LABEL: "bool",
  }[task]


def fixed_order(labels: np.ndarray) -> np.ndarray:
  """The order subsets are prefixes of: class-balanced, else random."""
  if labels.ndim == 2 or np.issubdtype(labels.dtype, np.floating):
    return np.random.default_rng(0).permutation(len(labels))
  return balanced_order(labels, seed=0)


def concatenate(parts: Sequence[Source]) -> Source:
  """The examples of several splits of one data set, in order, as one source.

  Rows that no example uses are left out; the others are copied.

  Args:
    parts: sources that differ in their examples alone.

  Returns:
    The joined source. Ids stay as they are where no two parts share one;
    otherwise those of a later part are moved beyond all before it.

  Raises:
    ValueError: no source, or sources that differ in something else, naming it.

  >>> parts = [digits(split) for split in ("train", "validation")]
  >>> joined = concatenate(parts)
  >>> joined.split, len(joined)
  ('train+validation', 1437)
  """
  parts = tuple(parts)
  if not parts:
    raise ValueError("concatenate needs at least one source.")
  first = parts[0]
  if len(parts) == 1:
    return first
  for part in parts[1:]:
    _check_alike(first, part)
  return dataclasses.replace(
    first,
    split="+".join(part.split for part in parts),
    columns={
      name: _join_columns([part.columns[name] for part in parts])
      for name in first.columns
    },
    present={
      name: _join_present([(part.present[name], len(part)) for part in parts])
      for name in first.columns
    },
    labels=np.concatenate([part.labels for part in parts]),
    ids=_join_ids([part.ids for part in parts]),
    metadata={
      name: np.concatenate([part.metadata[name] for part in parts])
      for name in first.metadata
    },
    notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
  )


def _check_alike(first: Source, other: Source) -> None:
  facts = ("name", "spec", "num_classes", "task", "value_range", "transforms")
  for fact in (*facts, "metadata"):
    mine, its = getattr(first, fact), getattr(other, fact)
    if fact == "metadata":
      mine, its = sorted(mine), sorted(its)
    if mine != its:
      raise ValueError(
        f"sources must have the same {fact} to be joined, got {mine} and {its}."
      )


def _join_columns(columns: Sequence[Column]) -> Column:
  if len({c.divisor for c in columns}) > 1:
    # Pixels of 8 and of 16 bits have no stored form in common.
    columns = [
      Column(array=c.take(np.arange(len(c))), dtype=c.dtype) for c in columns
    ]
  arrays, index, size = [], [], 0
  for column in columns:
    rows = column.index
    rows = np.arange(len(column)) if rows is None else rows
    used, places = np.unique(rows, return_inverse=True)
    arrays.append(column.array[used])
    index.append(size + places)
    size += len(used)
  return dataclasses.replace(
    columns[0], array=np.concatenate(arrays), index=np.concatenate(index)
  )


def _join_present(parts) -> np.ndarray | None:
  if all(flags is None for flags, _ in parts):
    return None
  return np.concatenate(
    [np.ones(size, bool) if flags is None else flags for flags, size in parts]
  )


def _join_ids(parts: Sequence[np.ndarray]) -> np.ndarray:
  joined = parts[0]
  for ids in parts[1:]:
    if np.intersect1d(joined, ids).size:
      ids = ids + (int(joined.max()) + 1)
    joined = np.concatenate([joined, ids])
  return joined


def balanced_order(labels: np.ndarray, *, seed: int) -> np.ndarray:
  """A random order in which every prefix is as class-balanced as possible.

  The first examples of all classes come first, then the second ones, and so
  on; within a class the order is random, fixed by ``seed``.
  """
  shuffled = np.random.default_rng(seed).permutation(len(labels))
  by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
  counts = np.unique(labels, return_counts=True)[1]
  rank = np.concatenate([np.arange(count) for count in counts])
  return by_class[np.argsort(rank, kind="stable")]


def digits(split: str) -> Source:
  """scikit-learn's 8x8 digits, left and right half, each ``[8, 4, 1]``.

  Test: ``train_test_split(test_size=360, random_state=0, stratify=y)``;
  validation: a stratified tenth of the rest, drawn the same way.
  """
  import sklearn.datasets
  import sklearn.model_selection

  raw = sklearn.datasets.load_digits()
  scans = (raw.images / 16.0).astype(np.float32)[..., None]
  labels = raw.target.astype(np.int32)

  def divide(rows, size):
    return sklearn.model_selection.train_test_split(
      rows, test_size=size, random_state=0, stratify=labels[rows]
    )

  halves = {"left": scans[:, :, :4], "right": scans[:, :, 4:]}
  return _embedded("digits", split, halves, labels, divide, (360, 0.1))


def diabetes(split: str) -> Source:
  """scikit-learn's diabetes patients, ``vitals`` [4] and ``serum`` [6].

  Raw values and a float label. Test: ``train_test_split(test_size=88,
  random_state=0)``; validation: 44 of the rest, drawn the same way.
  """
  import sklearn.datasets
  import sklearn.model_selection

  raw = sklearn.datasets.load_diabetes(scaled=False)
  values = raw.data.astype(np.float32)
  labels = raw.target.astype(np.float32)

  def divide(rows, size):
    return sklearn.model_selection.train_test_split(
      rows, test_size=size, random_state=0
    )

  columns = {"serum": values[:, 4:], "vitals": values[:, :4]}
  return _embedded("diabetes", split, columns, labels, divide, (88, 44))


def _embedded(name, split, columns, labels, divide, sizes) -> Source:
  """A split of a set that comes with a library.

  Args:
    name: in the registry.
    split: its name.
    columns: ``{m: [n, ...]}``.
    labels: ``[n]``.
    divide: ``divide(rows, size) -> (rest, drawn)``.
    sizes: of the test set, and of the validation set drawn from the rest.
  """
  registry.check_split(split)
  info = registry.get(name)
  rest, test = divide(np.arange(len(labels)), sizes[0])
  train, validation = divide(rest, sizes[1])
  rows = {"train": train, "validation": validation, "test": test}[split]
  return Source(
    name=name,
    split=split,
    columns={
      m: Column(array=np.ascontiguousarray(column[rows]))
      for m, column in columns.items()
    },
    present=dict.fromkeys(columns),
    labels=labels[rows],
    ids=rows.astype(np.int32),
    num_classes=info.num_classes,
    value_range={m: found.value_range for m, found in info.modalities.items()},
    notes=info.notes,
  )


EMBEDDED = {"diabetes": diabetes, "digits": digits}
