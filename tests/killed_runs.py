"""Runs of small configurations, and runs that are killed on the way."""

from robust_mm import config as config_lib
from robust_mm import training


def load(spec, *overrides):
  """On one device, whatever there is."""
  return config_lib.load(
    spec, ["--config.mesh.data=1", *(f"--config.{o}" for o in overrides)]
  )


class Killed(Exception):
  """Stands for kill -9 at a point of the test's choosing."""


def train(config, workdir, kill_at=None):
  """Quietly; ``Killed`` is raised once ``kill_at`` updates are reported."""

  def progress(done, total, text):
    if done == kill_at:
      raise Killed

  return training.train(
    config, workdir, say=lambda line: None, progress=progress
  )
