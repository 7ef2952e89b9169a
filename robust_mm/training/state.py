"""A run's state, and the split of parameters into trainable and frozen."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from robust_mm import weights
from robust_mm._types import Model
from robust_mm._types import PyTree
from robust_mm.recipes import Phase

# Folded into a run's key: far from the small numbers that others fold in.
_EXTRA = 0x65787472


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """Everything a run needs to go on: one pytree, one checkpoint.

  Attributes:
    step: ``[]`` int32, updates done since the start of the run.
    params: parameters, nested dict.
    model_state: state of the model (statistics), nested dict.
    opt_state: state of the current phase's optimiser, over its trainable
      parameters only.
    extra: what the current phase itself remembers (``Phase.extra``).
    average: moving average of the trainable parameters since the phase began,
      None in place of the others; empty where nothing is averaged.
  """

  step: Any
  params: PyTree
  model_state: PyTree
  opt_state: PyTree
  extra: PyTree = dataclasses.field(default_factory=dict)
  average: PyTree = dataclasses.field(default_factory=dict)


def stored(state: TrainState) -> dict[str, PyTree]:
  """What a checkpoint holds; ``TrainState(**tree)`` is the inverse.

  Without an empty ``extra`` or ``average``, as in runs from before there was
  any.
  """
  tree = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
  for name in ("extra", "average"):
    if not jax.tree.leaves(tree[name]):
      del tree[name]
  return tree


def paths(tree: PyTree, separator: str = "/") -> PyTree:
  """A tree of the same form whose leaves are their paths, ``a/b/kernel``."""

  def name(path, leaf):
    del leaf
    return jax.tree_util.keystr(path, simple=True, separator=separator)

  return jax.tree_util.tree_map_with_path(name, tree)


def split(params: PyTree, trainable: str) -> tuple[PyTree, PyTree]:
  """(trainable, frozen): both of the form of ``params``, None elsewhere.

  Args:
    params: nested dict.
    trainable: regex searched for in parameter paths.

  Raises:
    ValueError: nothing matches.
  """
  matches = jax.tree.map(
    lambda path: bool(re.search(trainable, path)), paths(params)
  )
  if not any(jax.tree.leaves(matches)):
    raise ValueError(
      f"trainable={trainable!r} matches no parameter; there are "
      f"{', '.join(jax.tree.leaves(paths(params)))}."
    )
  chosen = jax.tree.map(lambda m, p: p if m else None, matches, params)
  frozen = jax.tree.map(lambda m, p: None if m else p, matches, params)
  return chosen, frozen


def merge(trainable: PyTree, frozen: PyTree) -> PyTree:
  """The inverse of :func:`split`."""
  return jax.tree.map(
    lambda a, b: b if a is None else a,
    trainable,
    frozen,
    is_leaf=lambda leaf: leaf is None,
  )


def averaged(params: PyTree, average: PyTree, phase: Phase) -> PyTree:
  """``params`` with the averages of those that ``phase`` trains in place."""
  chosen, frozen = split(params, phase.trainable)
  return merge(optax.tree.cast_like(average, chosen), frozen)


def create(
  step,
  params: PyTree,
  model_state: PyTree,
  phase: Phase,
  key,
  *,
  average: bool = False,
) -> TrainState:
  """The state at the beginning of a phase: a fresh optimiser.

  Args:
    step: updates done so far.
    params: parameters.
    model_state: state of the model.
    phase: that begins.
    key: of the run.
    average: whether parameters are averaged.
  """
  chosen, _ = split(params, phase.trainable)
  extra = {}
  if phase.extra is not None:
    key = jax.random.fold_in(jax.random.fold_in(key, _EXTRA), step)
    extra = phase.extra(params, key)
  return TrainState(
    step=step,
    params=params,
    model_state=model_state,
    opt_state=phase.tx.init(chosen),
    extra=extra,
    average=weights.start_average(chosen) if average else {},
  )


def initializer(
  model: Model, phase: Phase, *, average: bool = False
) -> Callable[..., TrainState]:
  """``key -> state`` of a run that begins with ``phase``."""

  def initialize(key):
    params, model_state = model.init(key)
    step = jnp.zeros((), jnp.int32)
    return create(step, params, model_state, phase, key, average=average)

  return initialize
