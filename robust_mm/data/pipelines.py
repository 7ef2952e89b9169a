"""Resumable streams of batches: grain chains over batches of indices.

A batch is one permutation slice and one gather per modality; Python does no
work per example.
"""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from robust_mm import _validate
from robust_mm.data import sources

_OTHER_ORDER = 2**32  # far from every seed that is given


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Gather:
  """Step number -> this process's part of the step's batch."""

  source: sources.Source
  batch_size: int
  steps_per_epoch: int
  seed: int
  shuffle: bool
  process_index: int
  process_count: int

  def __call__(self, step: int, _) -> dict:
    return self.source.take(self.indices(step))

  def indices(self, step: int) -> np.ndarray:
    epoch, position = divmod(step, self.steps_per_epoch)
    order = self._order(epoch)
    start = position * self.batch_size
    whole = order[start : start + self.batch_size]
    # array_split also divides a last, smaller batch.
    return np.array_split(whole, self.process_count)[self.process_index]

  def _order(self, epoch: int) -> np.ndarray:
    size = len(self.source)
    return (
      _permutation(size, self.seed, epoch) if self.shuffle else _range(size)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Beside:
  """Labelled rows, each followed by ``ratio`` rows without a label."""

  labelled: _Gather
  unlabelled: _Gather
  ratio: int

  def __call__(self, step: int, _) -> dict:
    parts = self.labelled(step, None), self.unlabelled(step, None)
    # A label that is not to be read is 0.
    parts[1]["label"] = np.zeros_like(parts[1]["label"])
    for part, flag in zip(parts, (True, False)):
      part["labelled"] = np.full(len(part["id"]), flag)
    return _zip_map(self._interleaved, *parts)

  def _interleaved(self, first, second):
    first = first[:, None]
    second = second.reshape(len(first), self.ratio, *second.shape[1:])
    both = np.concatenate([first, second], axis=1)
    return both.reshape(-1, *both.shape[2:])


def _zip_map(fn: Callable, first, second):
  """``fn`` of the leaves of two nested dicts of the same keys."""
  if isinstance(first, dict):
    return {k: _zip_map(fn, first[k], second[k]) for k in first}
  return fn(first, second)


# Batches of an epoch share its order; the next epoch may be prefetched.
@functools.lru_cache(maxsize=8)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(size)


@functools.lru_cache(maxsize=8)
def _range(size: int) -> np.ndarray:
  return np.arange(size)


def pipeline(
  source: sources.Source,
  *,
  batch_size: int,
  seed: int,
  num_epochs: int | None = None,
  shuffle: bool = True,
  drop_remainder: bool = True,
  start: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  transforms: Sequence[Callable[[dict], dict]] = (),
  unlabelled: sources.Source | None = None,
  ratio: int = 1,
) -> grain.IterDataset:
  """Batches of a source, shuffled anew every epoch.

  Formal guarantees:
    - Batch ``i`` depends on the arguments alone; with ``start=i`` the stream
      goes on as if ``i`` batches had been drawn, and an iterator restored from
      ``get_state()`` gives exactly the remaining batches.
    - The parts of all processes, put together in order of ``process_index``,
      are the batch of a single process: the stream is the same, row by row,
      for every ``process_count``. So ``start`` resumes what another number of
      processes began; a ``get_state()`` holds for one process and one
      ``start``.

  Args:
    source: where examples come from.
    batch_size: of the global batch, over all processes.
    seed: of the order; epochs have different orders.
    num_epochs: None goes on for ever.
    shuffle: False keeps the source's order in every epoch.
    drop_remainder: leaves out the last, smaller batch of an epoch (other
      examples every epoch when shuffled).
    start: number of batches, over all epochs, to leave out at the beginning.
    process_index: which part of each batch to give; of processes that hold
      the same rows, the same.
    process_count: number of parts; must divide ``batch_size``.
    transforms: applied to each batch, in order.
    unlabelled: a second source of the same inputs, whose labels are not read:
      every row of a batch is followed by ``ratio`` of its rows, in an order of
      their own, and the batch has ``labelled`` bool[(1 + ratio) * batch_size].
    ratio: of rows without a label to rows with one.

  Returns:
    A grain dataset; ``iter(dataset)`` has ``get_state``, ``set_state`` and
    ``close``.

  Raises:
    UserError: the batch is larger than the source (with ``drop_remainder``)
      or not divisible by the number of processes.
  """
  _check_shards(batch_size, process_index, process_count)
  if num_epochs is not None:
    _validate.at_least(1, num_epochs=num_epochs)
  _validate.at_least(0, start=start)
  steps = steps_per_epoch(source, batch_size, drop_remainder=drop_remainder)
  gather = _Gather(
    source=source,
    batch_size=batch_size,
    steps_per_epoch=steps,
    seed=seed,
    shuffle=shuffle,
    process_index=process_index,
    process_count=process_count,
  )
  if unlabelled is not None:
    _validate.at_least(1, ratio=ratio)
    if not drop_remainder:
      raise ValueError("drop_remainder must be True with unlabelled rows.")
    number = ratio * batch_size
    beside = dataclasses.replace(
      gather,
      source=unlabelled,
      batch_size=number,
      steps_per_epoch=steps_per_epoch(unlabelled, number),
      seed=seed + _OTHER_ORDER,
    )
    gather = _Beside(labelled=gather, unlabelled=beside, ratio=ratio)
  dataset = grain.MapDataset.range(steps).repeat(num_epochs)
  dataset = dataset.map_with_index(gather).slice(slice(start, None))
  for transform in transforms:
    dataset = dataset.map(transform)
  # A batch is cheap to make: one thread and two batches ahead are enough, and
  # grain's default of 500 would hold gigabytes.
  return dataset.to_iter_dataset(
    grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
  )


def steps_per_epoch(
  source: sources.Source, batch_size: int, *, drop_remainder: bool = True
) -> int:
  """Batches that one pass of :func:`pipeline` over a source has.

  Raises:
    UserError: the batch is larger than the source (with ``drop_remainder``).
  """
  size = len(source)
  steps = size // batch_size if drop_remainder else -(-size // batch_size)
  if steps == 0:
    raise _validate.UserError(
      f"batch_size {batch_size} exceeds the {size} examples of "
      f"{source.name} {source.split}."
    )
  return steps


def evaluation_batches(
  source: sources.Source,
  batch_size: int,
  *,
  start: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  transforms: Sequence[Callable[[dict], dict]] = (),
) -> Iterator[tuple[dict[str, Any], int]]:
  """Every example once, in order, in batches that all have the same shape.

  The last batch is filled up with repetitions of the last example, whose
  ``id`` is -1; only the first ``num_valid`` examples count.

  Args:
    source: where examples come from.
    batch_size: of the global batch, over all processes.
    start: the first example; those before it are left out.
    process_index: which part of each batch to give.
    process_count: must divide ``batch_size``; all processes get the same
      number of batches, possibly with none valid in the last.
    transforms: applied to each batch before filling up is marked.

  Returns:
    An iterator of ``(batch, num_valid)``.
  """
  _check_shards(batch_size, process_index, process_count)
  size = batch_size // process_count
  # All processes have as many as the first one.
  firsts = [
    first + process_index * size
    for first in range(start, len(source), batch_size)
  ]
  return _evaluation_batches(source, size, firsts, transforms)


def _evaluation_batches(source, size, firsts, transforms):
  for first in firsts:
    rows = np.arange(first, first + size)
    num_valid = int(np.clip(len(source) - first, 0, size))
    batch = source.take(np.minimum(rows, len(source) - 1))
    for transform in transforms:
      batch = transform(batch)
    valid = np.arange(size) < num_valid
    yield {**batch, "id": np.where(valid, batch["id"], -1)}, num_valid


def _check_shards(batch_size, process_index, process_count) -> None:
  _validate.at_least(1, batch_size=batch_size, process_count=process_count)
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index must lie in [0, {process_count}), got {process_index}."
    )
  if batch_size % process_count:
    raise _validate.UserError(
      f"batch_size {batch_size} must be divisible by the {process_count} "
      "processes."
    )
