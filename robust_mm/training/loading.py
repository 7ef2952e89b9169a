"""A finished run back from its folder."""

import pathlib

import jax
import ml_collections

from robust_mm import _validate
from robust_mm._types import Model
from robust_mm._types import PyTree
from robust_mm.training import checkpoints
from robust_mm.training import selection
from robust_mm.training import setup


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
    phase = [p["name"] for p in facts["phases"] if p["name"] in finished][-1]
  if phase not in finished:
    raise _validate.UserError(
      f"phase must be one of {', '.join(finished)}; got {phase!r}."
    )
  params, state = jax.eval_shape(model.init, jax.random.key(0))
  tree = {"params": params, "model_state": state}
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = checkpoints.abstract_like(tree, jax.tree.map(lambda _: here, tree))
  kept, _, _ = selection.read_model(workdir, finished[phase]["model"], abstract)
  return model, kept["params"], kept["model_state"], config
