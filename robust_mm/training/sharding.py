"""The mesh, where parameters and batches live on it, and host to device."""

import re
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence

import jax
import numpy as np
import optax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from robust_mm import _validate
from robust_mm._types import PyTree
from robust_mm.recipes import Phase
from robust_mm.training import state as state_lib

DATA_AXIS = "data"
MODEL_AXIS = "model"
Rules = Sequence[tuple[str, Sequence[str | None]]]


def make_mesh(*, data: int = -1, model: int = 1, devices=None) -> Mesh:
  """A mesh over all devices with axes ``("data", "model")``.

  Args:
    data: size of the data axis; -1 for every device that is left.
    model: size of the model axis.
    devices: the devices; all of the job by default.

  Raises:
    ValueError: more devices than there are, or, with several processes, not
      all of them.
  """
  devices = jax.devices() if devices is None else devices
  _validate.at_least(1, **{"mesh.model": model})
  if data == -1:
    data = max(len(devices) // model, 1)
  _validate.at_least(1, **{"mesh.data": data})
  used = data * model
  if used > len(devices) or (used < len(devices) and jax.process_count() > 1):
    raise ValueError(
      f"mesh.data x mesh.model must be the number of devices "
      f"({len(devices)}), got {data} x {model}."
    )
  return jax.make_mesh(
    (data, model),
    (DATA_AXIS, MODEL_AXIS),
    axis_types=(AxisType.Auto, AxisType.Auto),
    devices=devices[:used],
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """The same array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis over the data axis."""
  return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def parameter_shardings(params: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
  """A sharding per parameter: the first rule whose regex matches its path.

  Args:
    params: arrays or ``ShapeDtypeStruct``.
    mesh: the mesh.
    rules: ``[(regex, [axis name or None, one per dimension])]``; a parameter
      without a rule is replicated. ``[(".*kernel", ["data", None])]`` shards
      in the manner of FSDP.

  Raises:
    ValueError: a rule's length is not the parameter's rank, an axis is
      unknown, or a dimension is not divisible, naming the parameter.
  """

  def choose(path, leaf):
    for pattern, axes in rules:
      if re.search(pattern, path):
        _check_rule(path, leaf.shape, axes, mesh)
        return NamedSharding(mesh, PartitionSpec(*axes))
    return replicated(mesh)

  return jax.tree.map(choose, state_lib.paths(params), params)


def _check_rule(path, shape, axes, mesh: Mesh) -> None:
  if len(axes) != len(shape):
    raise ValueError(
      f"mesh.rules: {path} has {len(shape)} dimensions, its rule has "
      f"{len(axes)}."
    )
  for size, axis in zip(shape, axes):
    if axis is None:
      continue
    _validate.one_of(mesh.axis_names, **{"mesh.rules axis": axis})
    if size % mesh.shape[axis]:
      raise ValueError(
        f"mesh.rules: a dimension of {path} has size {size}, which the mesh "
        f"axis {axis!r} of size {mesh.shape[axis]} does not divide."
      )


def state_shardings(
  state: state_lib.TrainState, mesh: Mesh, rules: Rules, phase: Phase
) -> state_lib.TrainState:
  """Shardings of a whole state: optimiser and average follow parameters.

  What a phase itself remembers is replicated.
  """
  params = parameter_shardings(state.params, mesh, rules)
  chosen, _ = state_lib.split(params, phase.trainable)
  everywhere = replicated(mesh)
  opt_state = optax.tree.map_params(
    phase.tx,
    lambda leaf, sharding: sharding,
    state.opt_state,
    chosen,
    transform_non_params=lambda leaf: everywhere,
  )
  average = {}
  if jax.tree.leaves(state.average):
    average, _ = state_lib.split(params, phase.trainable)
  return state_lib.TrainState(
    step=everywhere,
    params=params,
    model_state=jax.tree.map(lambda leaf: everywhere, state.model_state),
    opt_state=opt_state,
    extra=jax.tree.map(lambda leaf: everywhere, state.extra),
    average=average,
  )


def put_batch(batch: PyTree, sharding: NamedSharding) -> PyTree:
  """This process's rows of a global batch, onto its devices."""
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
    batch,
  )


def batch_part(mesh: Mesh) -> tuple[int, int]:
  """(index, count) of the part of a global batch that this process feeds.

  Processes between which only the model axis runs feed the same part.

  Raises:
    ValueError: the processes do not divide the data axis evenly.
  """
  owners = [[device.process_index for device in row] for row in mesh.devices]
  return part_of(owners, jax.process_index())


def part_of(owners: Sequence[Sequence[int]], process: int) -> tuple[int, int]:
  """:func:`batch_part` of a mesh whose devices ``[data][model]`` have owners.

  >>> part_of([[0, 0], [1, 1]], 1), part_of([[0, 1]], 1)
  ((1, 2), (0, 1))
  """
  positions = {}
  for position, row in enumerate(owners):
    for owner in row:
      positions.setdefault(owner, set()).add(position)
  held = {owner: tuple(sorted(value)) for owner, value in positions.items()}
  parts = sorted(set(held.values()))
  even = len({len(part) for part in parts}) == 1
  if not even or sum(map(len, parts)) != len(owners):
    raise ValueError(
      f"mesh.data={len(owners)} cannot be divided evenly over the processes; "
      f"choose mesh.model so that the devices of a process form whole rows or "
      f"equal parts of one."
    )
  return parts.index(held[process]), len(parts)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
  """The global batch must divide over the data axis, so over the processes."""
  shards = mesh.shape[DATA_AXIS]
  if batch_size % shards:
    raise ValueError(
      f"data.batch_size must be a multiple of {shards}, the data axis of the "
      f"mesh, got {batch_size}."
    )


def padded_size(batch_size: int, num_examples: int, mesh: Mesh) -> int:
  """No larger than the set needs, and divisible over the data axis."""
  shards = mesh.shape[DATA_AXIS]
  return -(-min(batch_size, num_examples) // shards) * shards


def gather(tree: PyTree) -> PyTree:
  """Host copies of global arrays, on every process."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  from jax.experimental import multihost_utils

  return multihost_utils.process_allgather(tree, tiled=True)


def map_batches(fn: Callable, batches, sharding: NamedSharding) -> PyTree:
  """The trees of :func:`each_batch`, joined over batches."""
  pieces = each_batch(fn, batches, sharding)
  return jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)


def each_batch(
  fn: Callable, batches, sharding: NamedSharding
) -> Iterator[PyTree]:
  """``fn`` of every padded batch, gathered and cut to its valid rows.

  Args:
    fn: jitted, ``batch -> tree of [b, ...]``.
    batches: pairs (global batch on this host, number of valid rows).
    sharding: of the batch axis.

  Yields:
    The tree of each batch as numpy arrays.
  """
  for batch, num_valid in batches:
    result = gather(fn(put_global(batch, sharding)))
    rows = slice(num_valid)
    yield jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], result)


def put_global(batch: PyTree, sharding: NamedSharding) -> PyTree:
  """A batch that every process holds whole, onto the mesh."""

  def put(x):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  return jax.tree.map(put, batch)
