"""What the parts of the training loop share; host-side bookkeeping only."""

import dataclasses
import pathlib
import threading
from typing import Any

import jax
import ml_collections

from robust_mm._types import Model
from robust_mm.recipes import Phase
from robust_mm.recipes import Recipe
from robust_mm.training import checkpoints
from robust_mm.training import setup as setup_lib
from robust_mm.training import sharding
from robust_mm.training import state as state_lib


@dataclasses.dataclass(kw_only=True)
class Run:
  """One run, from its configuration to its open files."""

  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  setup: setup_lib.Setup
  recipe: Recipe
  mesh: Any
  validator: Any
  rolling: checkpoints.Checkpoints
  writer: Any
  say: Any
  timing: dict
  stop: threading.Event
  facts: dict

  @property
  def batch_sharding(self):
    """Where batches live."""
    return sharding.batch_sharding(self.mesh)

  def average_decay(self, phase: Phase) -> float:
    """Of the average of parameters in a phase; 0 for none."""
    return self.config.training.average_decay if phase.averaged else 0.0

  def abstract(self, phase: Phase) -> state_lib.TrainState:
    """Shapes and types of the state in a phase."""
    average = self.average_decay(phase) > 0
    return abstract_state(self.setup.model, phase, average=average)

  def shardings(self, phase: Phase) -> state_lib.TrainState:
    """Where the state of a phase lives."""
    return sharding.state_shardings(
      self.abstract(phase), self.mesh, self.config.mesh.rules, phase
    )


def abstract_state(
  model: Model, phase: Phase, *, average: bool = False
) -> state_lib.TrainState:
  """Shapes and types of the state in a phase."""
  initialize = state_lib.initializer(model, phase, average=average)
  return jax.eval_shape(initialize, jax.random.key(0))
