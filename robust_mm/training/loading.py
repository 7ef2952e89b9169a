"""A finished run back from its folder, to be used or to go on from."""

import pathlib

import jax
import jax.numpy as jnp
import ml_collections

from robust_mm import _validate
from robust_mm._types import Model
from robust_mm._types import PyTree
from robust_mm.recipes import Phase
from robust_mm.training import checkpoints
from robust_mm.training import context
from robust_mm.training import runs
from robust_mm.training import selection
from robust_mm.training import setup
from robust_mm.training import sharding
from robust_mm.training import state as state_lib

_SHOWN = 3  # leaves that do not fit, of many


def load(
  workdir, *, phase: str | None = None
) -> tuple[Model, PyTree, PyTree, ml_collections.ConfigDict]:
  """Gives a run back: ``model, params, state, config = robust_mm.load(dir)``.

  Args:
    workdir: the folder given to ``robust-mm train``.
    phase: the phase whose selected model to take, such as ``margins`` or
      ``integration``; the last one that ended by default.

  Returns:
    The model, its parameters and state on the default device, and the run's
    configuration.

  Raises:
    UserError: no such folder or phase, or a checkpoint of another model.
  """
  workdir = pathlib.Path(workdir).resolve()
  model, config, facts = setup.restore_model(workdir)
  finished = facts["finished"]
  if not finished:
    raise _validate.UserError(
      f"no phase of the run in {workdir} has ended yet; run the same "
      f"robust-mm train command again to go on."
    )
  if phase is None:
    phase = _last_phase(facts)
  if phase not in finished:
    raise _validate.UserError(
      f"phase must be one of {', '.join(finished)}; got {phase!r}."
      f"{_validate.suggestion(phase, finished)}"
    )
  params, state = jax.eval_shape(model.init, jax.random.key(0))
  tree = {"params": params, "model_state": state}
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = checkpoints.abstract_like(tree, jax.tree.map(lambda _: here, tree))
  kept, _, _ = selection.read_model(workdir, finished[phase]["model"], abstract)
  return model, kept["params"], kept["model_state"], config


def check_start(config: ml_collections.ConfigDict, model: Model) -> None:
  """Refuses ``config.init_from`` where its leaves do not fit the model.

  Raises:
    UserError: naming the key, and the leaves.
  """
  if not config.init_from:
    return
  folder, phase = _start(config)
  abstract = jax.eval_shape(model.init, jax.random.key(0))
  wanted = dict(zip(("params", "model_state"), abstract))
  wrong = selection.misfits(folder, phase, wanted)
  if wrong:
    more = "" if len(wrong) <= _SHOWN else f" and {len(wrong) - _SHOWN} more"
    raise _validate.UserError(
      f"config.init_from: the model of the run in {folder} does not fit: "
      f"{'; '.join(wrong[:_SHOWN])}{more}."
    )


def start(run: context.Run, phase: Phase) -> state_lib.TrainState:
  """The model of ``config.init_from`` at step 0, every array where it lives."""
  parts = ("params", "model_state")
  shapes, places = (
    {name: getattr(tree, name) for name in parts}
    for tree in (run.abstract(phase), run.shardings(phase))
  )
  folder, kept = _start(run.config)
  abstract = checkpoints.abstract_like(shapes, places)
  model, _, _ = selection.read_model(folder, kept, abstract)
  step = jax.jit(
    lambda: jnp.zeros((), jnp.int32),
    out_shardings=sharding.replicated(run.mesh),
  )()
  return state_lib.TrainState(step=step, opt_state={}, **model)


def _start(config) -> tuple[pathlib.Path, str]:
  """The folder, and under which phase's name its chosen model lies."""
  folder = pathlib.Path(config.init_from).resolve()
  facts = runs.describe(folder)
  finished = facts["finished"]
  phase = config.init_phase or _last_phase(facts)
  return folder, finished[phase]["model"]


def _last_phase(facts: dict) -> str:
  ended = [p["name"] for p in facts["phases"] if p["name"] in facts["finished"]]
  return ended[-1]
