"""Host arrays, cut into padded chunks of one size, to the device and back."""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from robust_mm import _compiling
from robust_mm import _tasks
from robust_mm import modalities
from robust_mm._types import Batch
from robust_mm._types import Model

PRECISION = "highest"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """A data set as NumPy arrays.

  Attributes:
    inputs: ``{m: [n, ...]}``.
    present: ``{m: bool[n]}``.
    label: ``int32[n]``; ``float32[n]`` of a regression, ``float32[n, k]`` of 0
      and 1 of several labels.
    id: ``int[n]``, the caller's.
    counted: ``bool[n]``, False where nothing is present; such an example is
      in no average.
  """

  inputs: Any
  present: Any
  label: Any
  id: Any
  counted: Any

  @property
  def size(self) -> int:
    """n."""
    return len(self.label)

  @property
  def names(self) -> tuple[str, ...]:
    """The modalities, sorted."""
    return modalities.names(self.inputs)

  def take(self, rows: np.ndarray) -> "Data":
    """Some of the rows."""
    return Data(
      inputs={name: x[rows] for name, x in self.inputs.items()},
      present={name: x[rows] for name, x in self.present.items()},
      label=self.label[rows],
      id=self.id[rows],
      counted=self.counted[rows],
    )

  def chunk(self, indices: np.ndarray) -> dict:
    """The rows ``indices`` as a batch; ``id`` is the row number."""
    return {
      "inputs": {name: x[indices] for name, x in self.inputs.items()},
      "present": {name: x[indices] for name, x in self.present.items()},
      "label": self.label[indices],
      "id": indices.astype(np.int32),
    }


def host_data(
  model: Model, batch: Batch, *, max_examples: int | None = None
) -> Data:
  """Checks a data set against a model and brings it to NumPy.

  Args:
    model: names the modalities and the number of classes.
    batch: host arrays; ``present`` may lack a modality (all present) and ``id``
      may be missing (row numbers).
    max_examples: keep so many rows, evenly spaced.

  Raises:
    ValueError: a modality is missing, rows differ in number, there are none,
      or a label is no integer in ``0..k-1``, of a regression no number, of
      several labels no row of k zeros and ones.
  """
  label = np.asarray(batch["label"])
  if model.task == _tasks.REGRESSION:
    _check_numbers(label)
  elif model.task == _tasks.MULTI_LABEL:
    _check_several(label, model.num_classes)
  elif label.ndim != 1 or not np.issubdtype(label.dtype, np.integer):
    raise ValueError(
      "batch['label'] must be one integer class per example, got shape "
      f"{label.shape} of {label.dtype}."
    )
  if not len(label):
    raise ValueError("batch has no examples.")
  rows = np.arange(len(label))
  if max_examples is not None and max_examples < len(rows):
    rows = np.linspace(0, len(rows) - 1, max_examples).round().astype(int)
  inputs, present = host_inputs(model, batch, size=len(label))
  inputs = {name: x[rows] for name, x in inputs.items()}
  present = {name: x[rows] for name, x in present.items()}
  counted = np.any(list(present.values()), axis=0)
  if model.classifies:
    _check_labels(label[rows][counted], model.num_classes)
  return Data(
    inputs=inputs,
    present=present,
    label=label[rows].astype(np.int32 if model.classifies else np.float32),
    id=np.asarray(batch.get("id", np.arange(len(label))))[rows],
    counted=counted,
  )


def host_inputs(
  model: Model, batch: Batch, *, size: int | None = None
) -> tuple[dict, dict]:
  """``(inputs, present)`` of the model's modalities as NumPy arrays.

  Raises:
    ValueError: a modality is missing, or has not ``size`` rows.
  """
  given = batch.get("present", {})
  inputs, present = {}, {}
  for name in modalities.names(model.modalities):
    if name not in batch["inputs"]:
      raise ValueError(
        f"batch['inputs'] lacks the modality {name!r}; the model reads "
        f"{', '.join(model.modalities)}."
      )
    x = np.asarray(batch["inputs"][name])
    size = len(x) if size is None else size
    flag = np.asarray(given.get(name, np.ones(size, bool))).astype(bool)
    if len(x) != size or flag.shape != (size,):
      raise ValueError(
        f"batch['inputs'][{name!r}] has {len(x)} rows and its present the "
        f"shape {flag.shape}, but there are {size} examples."
      )
    inputs[name], present[name] = x, flag
  return inputs, present


def _from_host(leaf):
  """A copy of what lies on a device of this process alone."""
  mine = isinstance(leaf, jax.Array) and leaf.is_fully_addressable
  is_key = mine and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return np.asarray(leaf) if mine and not is_key else leaf


class Device:
  """Maps jitted functions over a data set, chunk by chunk.

  The last chunk is padded with copies of its last row, which are cut off
  again, so that a function compiles once for each chunk size.

  Args:
    params: passed to every function; replicated over the mesh of ``sharding``.
    state: likewise.
    sharding: of the leading axis of a chunk; None for the default device.
  """

  def __init__(self, params, state, *, sharding=None):
    self._sharding = sharding
    self._params, self._state = self.replicate((params, state))
    self._frozen = {}

  def frozen(self, model: Model) -> tuple[Model, Any]:
    """``(model, params)`` with the same logits, cheap to call many times."""
    if model.freeze is None:
      return model, self._params
    if model not in self._frozen:
      cheap, params = model.freeze(self._params)
      self._frozen[model] = cheap, self.replicate(params)
    return self._frozen[model]

  def replicate(self, tree: Any) -> Any:
    """The same arrays on every device of the mesh, where there is one."""
    if not isinstance(self._sharding, NamedSharding):
      return tree
    if jax.process_count() > 1:
      tree = jax.tree.map(_from_host, tree)
    mesh = self._sharding.mesh
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))

  def compile(
    self, function: Callable, *, moved: bool = False, once: bool = False
  ) -> Callable:
    """``jax.jit``; results are replicated so that any host can read them.

    Args:
      function: ``function(params, state, chunk, *extra)``.
      moved: its result is a pair, and the first is a batch that stays sharded.
      once: it is called a few times on little data, so that on a CPU optimising
        it would cost more than it saves.
    """
    options = _compiling.options_for_once() if once else None

    def run(*arguments):
      # A certificate is about full precision; so is what is held against it.
      with jax.default_matmul_precision(PRECISION):
        return function(*arguments)

    if not isinstance(self._sharding, NamedSharding):
      return jax.jit(run, compiler_options=options)
    replicated = NamedSharding(self._sharding.mesh, PartitionSpec())
    out = (self._sharding, replicated) if moved else replicated
    return jax.jit(run, out_shardings=out, compiler_options=options)

  def chunk_size(self, wanted: int) -> int:
    """``wanted``, rounded up to a multiple of the number of devices."""
    if self._sharding is None:
      return wanted
    devices = len(self._sharding.device_set)
    return -(-wanted // devices) * devices

  def map(
    self,
    compiled: Callable,
    data: Data,
    indices: np.ndarray,
    size: int,
    *,
    extra: Callable[[int], tuple] = lambda number: (),
    aligned: Mapping[str, Any] | None = None,
  ) -> Any:
    """``compiled(params, state, chunk, *extra(number))`` over the rows.

    Args:
      compiled: from :meth:`compile`; returns arrays with leading axis ``size``.
      data: the data set.
      indices: rows to visit, at least one.
      size: rows a call, from :meth:`chunk_size`.
      extra: further arguments of chunk ``number``.
      aligned: arrays, or trees of them, along ``indices`` that join the chunk
        by their name.

    Returns:
      The tree of results as NumPy arrays with leading axis ``len(indices)``.
    """
    results = []
    for number, start in enumerate(range(0, len(indices), size)):
      # Clipping repeats the last row.
      where = np.arange(start, start + size).clip(max=len(indices) - 1)
      chunk = data.chunk(indices[where])
      for name, values in (aligned or {}).items():
        chunk[name] = jax.tree.map(lambda x, where=where: x[where], values)
      if self._sharding is not None:
        chunk = jax.device_put(chunk, self._sharding)
      result = compiled(self._params, self._state, chunk, *extra(number))
      results.append(jax.tree.map(np.asarray, result))
    # Only the last chunk is padded.
    return jax.tree.map(
      lambda *leaves: np.concatenate(leaves)[: len(indices)], *results
    )


def _check_numbers(label):
  finite = label.dtype.kind in "iuf" and np.isfinite(label).all()
  if label.ndim != 1 or not finite:
    raise ValueError(
      "batch['label'] must be one finite number per example, got shape "
      f"{label.shape} of {label.dtype}."
    )


def _check_several(label, num_classes: int):
  fits = label.ndim == 2 and label.shape[1] == num_classes
  if not fits or label.dtype.kind not in "biuf" or not _zeros_and_ones(label):
    raise ValueError(
      f"batch['label'] must be [n, {num_classes}] of 0 and 1, got shape "
      f"{label.shape} of {label.dtype}."
    )


def _zeros_and_ones(label) -> bool:
  return bool(np.all((label == 0) | (label == 1)))


def _check_labels(label, num_classes: int):
  if label.size and (label.min() < 0 or label.max() >= num_classes):
    raise ValueError(
      f"batch['label'] must lie in 0..{num_classes - 1}, got values from "
      f"{label.min()} to {label.max()}."
    )
