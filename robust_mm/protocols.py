"""How the configuration of a run asks for its model to be evaluated."""

import math
import pathlib

from robust_mm import _tasks
from robust_mm import attacks
from robust_mm import config_checks
from robust_mm import evaluation
from robust_mm import training
from robust_mm.training import runs
from robust_mm.training import setup as setup_lib
from robust_mm.training import units as units_lib


def surrogate(folder: str) -> evaluation.Surrogate | None:
  """The model of another finished run, to borrow adversarial points from."""
  if not folder:
    return None
  model, params, state, _ = training.load(pathlib.Path(folder))
  return evaluation.Surrogate(model=model, params=params, state=state)


def of_run(config, facts: dict, radii=None, attack=None) -> evaluation.Protocol:
  """The evaluation protocol a configuration asks for.

  Args:
    config: of the run.
    facts: of the run, as ``runs.describe`` gives them.
    radii: in place of those of the configuration.
    attack: the name of one, likewise.
  """
  settings = config.evaluation
  corruptions = settings.get("corruptions", "none")
  shifts = {
    "batch_size": settings.batch_size,
    # Runs of earlier versions do not state it.
    "missing_rates": tuple(settings.get("missing_rates", ())),
    "missing_protocol": settings.get("missing_protocol", "per_sample"),
    "corruptions": None if corruptions == "none" else corruptions,
  }
  if runs.task(facts) != _tasks.CLASSIFICATION:
    return evaluation.standard(
      radii=(), attack=None, certificate=None, tightness=(), **shifts
    )
  return evaluation.standard(
    radii=radii or tuple(settings.radii),
    norm=2 if settings.norm == "l2" else math.inf,
    attack=_attack(attack or settings.attack, settings),
    units=units_lib.of_evaluation(config, facts, settings.norm),
    certificate=None
    if settings.certificate == "none"
    else settings.certificate,
    smoothing=settings.smoothing.to_dict()
    if settings.certificate == "smoothing"
    else None,
    valid_range=setup_lib.value_range(facts),
    tightness=tuple(settings.tightness),
    # Runs of earlier versions do not state it.
    masking_examples=settings.get("masking_examples", 64),
    masking_thorough=settings.get("masking_thorough", False),
    mispair=config_checks.mispairs(config),
    captions=settings.captions.to_dict() if "captions" in settings else None,
    **shifts,
  )


def _attack(name: str, settings) -> dict:
  takes = attacks.arguments(name)
  # A run of an earlier version does not state all of them.
  options = ("loss", "num_steps", "num_restarts", "num_queries", "strength")
  chosen = [key for key in options if key in takes and key in settings]
  return {"name": name, **{key: settings[key] for key in chosen}}
