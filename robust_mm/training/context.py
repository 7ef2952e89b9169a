"""What the parts of the training loop share; host-side bookkeeping only."""

import dataclasses
import pathlib
import threading
from typing import Any

import ml_collections

from robust_mm.recipes import Recipe
from robust_mm.training import checkpoints
from robust_mm.training import setup as setup_lib
from robust_mm.training import sharding


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
    return sharding.batch_sharding(self.mesh)

  @property
  def rules(self):
    return self.config.mesh.rules
