"""Checkpoints of a run: the rolling state, and the model of every phase."""

import pathlib
from collections.abc import Mapping

import jax
from orbax.checkpoint import v1 as ocp

from robust_mm import _validate
from robust_mm._types import PyTree
from robust_mm.training import state as state_lib

FOLDER = "checkpoints"
_STATE = "state"
# Orbax makes the folders of a checkpoint side by side and trips over itself at
# times on a busy machine: FileExistsError, and once more from the next call.
_TRIES = 4


class Checkpoints:
  """A sequence of checkpoints in one folder.

  Every write is atomic: a killed save leaves nothing that is taken for a
  checkpoint.

  Args:
    folder: where they lie; made when missing.
    keep: how many of the newest are kept.
    reading: nothing will be saved: the folder must be there, and what a killed
      save has left is not cleaned up.
  """

  def __init__(
    self, folder: pathlib.Path, *, keep: int = 2, reading: bool = False
  ):
    if not reading:
      folder.mkdir(parents=True, exist_ok=True)
    policies = ocp.training.preservation_policies
    self._folder = folder.resolve()
    self._checkpointer = ocp.training.Checkpointer(
      self._folder,
      preservation_policy=policies.LatestN(keep),
      save_decision_policy=ocp.training.save_decision_policies.ContinuousCheckpointingPolicy(),
      # In a thread of its own, which a program that ends at once would kill.
      cleanup_tmp_directories=not reading and jax.process_index() == 0,
    )

  @property
  def latest_step(self) -> int | None:
    """The step of the newest checkpoint, or None."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  def save(
    self,
    step: int,
    tree: PyTree,
    *,
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Saves a tree of arrays and metrics; waits for it."""
    # Several processes have to save together: there nobody tries again alone.
    tries = _TRIES if jax.process_count() == 1 else 1
    for left in reversed(range(tries)):
      try:
        self._checkpointer.save_checkpointables(
          step,
          {_STATE: jax.tree.map(_plain, tree)},
          force=True,
          overwrite=True,
          metrics=dict(metrics or {}),
        )
        return
      except FileExistsError:
        if not left:
          raise

  def restore(self, abstract: PyTree, *, step: int | None = None) -> PyTree:
    """Arrays as ``abstract`` says: shape, dtype, sharding.

    Any number of processes and devices reads what another number wrote.

    Raises:
      UserError: the checkpoint is of another model, naming the leaf.
    """
    step = self.latest_step if step is None else step
    stored = jax.tree.map(_plain_abstract, abstract)
    self._compare(step, stored)
    found = self._checkpointer.load_checkpointables(step, {_STATE: stored})
    return jax.tree.map(_as_given, abstract, found[_STATE])

  def metrics(self, step: int | None = None) -> dict[str, float]:
    """What was said when that checkpoint was saved."""
    step = self.latest_step if step is None else step
    return dict(self._checkpointer.checkpointables_metadata(step).metrics or {})

  def close(self) -> None:
    """Waits for writes."""
    self._checkpointer.close()

  def misfits(self, abstract: PyTree) -> list[str]:
    """What differs between the newest checkpoint and a tree, leaf by leaf."""
    stored = self._stored_shapes(self.latest_step)
    wanted = _shapes(jax.tree.map(_plain_abstract, abstract))
    found = []
    for name in sorted(set(stored) | set(wanted)):
      if name not in wanted:
        found.append(f"{name} is only there")
      elif name not in stored:
        found.append(f"{name} is missing there")
      elif stored[name] != wanted[name]:
        found.append(
          f"{name} has shape {list(stored[name])} there and "
          f"{list(wanted[name])} here"
        )
    return found

  def _stored_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
    metadata = ocp.metadata(
      self._folder / str(step), checkpointable_name=_STATE
    ).metadata
    return _shapes(metadata)

  def _compare(self, step: int, abstract: PyTree) -> None:
    stored = self._stored_shapes(step)
    wanted = _shapes(abstract)
    for name in sorted(set(stored) ^ set(wanted)):
      where = "only in the checkpoint" if name in stored else "missing in it"
      raise _validate.UserError(
        f"{self._folder / str(step)} is a checkpoint of another model: "
        f"{name} is {where}."
      )
    for name, shape in wanted.items():
      if stored[name] != shape:
        raise _validate.UserError(
          f"{self._folder / str(step)} is a checkpoint of another model: "
          f"{name} has shape {list(stored[name])} there and {list(shape)} here."
        )


def _is_key(leaf) -> bool:
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


# On disk a typed key is its numbers: their shape is what metadata tell.
def _plain(leaf):
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _plain_abstract(leaf):
  if not _is_key(leaf):
    return leaf
  numbers = jax.eval_shape(jax.random.key_data, leaf)
  return jax.ShapeDtypeStruct(
    numbers.shape, numbers.dtype, sharding=leaf.sharding
  )


def _as_given(abstract, leaf):
  if not _is_key(abstract):
    return leaf
  wrap = jax.jit(jax.random.wrap_key_data, out_shardings=abstract.sharding)
  return wrap(leaf)


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
  # Metadata comes back as dicts and lists; a path by names is the same for a
  # tuple and a list, and for a dataclass and a dict.
  names = jax.tree.leaves(state_lib.paths(tree))
  return {n: tuple(x.shape) for n, x in zip(names, jax.tree.leaves(tree))}


def abstract_like(tree: PyTree, shardings: PyTree) -> PyTree:
  """``ShapeDtypeStruct`` with shardings, what ``restore`` wants."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )


def best(folder: pathlib.Path, phase: str) -> pathlib.Path:
  """Where the selected model of a phase lies."""
  return folder / FOLDER / phase
