"""Scores on the validation set, and passes over the whole training set."""

import functools
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import _compiling
from robust_mm import _tasks
from robust_mm import _validate
from robust_mm import certification
from robust_mm import config_checks
from robust_mm import data
from robust_mm import modalities
from robust_mm._types import PyTree
from robust_mm.recipes import Phase
from robust_mm.training import setup as setup_lib
from robust_mm.training import sharding
from robust_mm.training import steps
from robust_mm.training import units as units_lib

_SMALLER_IS_BETTER = ("loss", "mae", "mae_over_subsets")
Validator = Callable[[PyTree, PyTree], dict[str, float]]


def make(config, setup: setup_lib.Setup, mesh) -> Validator:
  """``validate(params, state) -> {accuracy, loss, ...}``.

  Of a regression ``{mae, correlation, loss}``, the first in units of the label;
  of a multi-label model ``{map, loss}``, the mean average precision over the
  classes that some example has.

  Also ``certified_accuracy`` of models with constants and, where models are
  selected by it, ``mean_over_subsets``: accuracy with each availability set
  (``modalities.availability_sets``) in turn, averaged; it is
  ``mae_over_subsets`` or ``map_over_subsets`` of the other tasks.

  ``exact_match`` of models that spell captions: the share that are right in
  every letter, greedily decoded, of modalities in new pairs where the recipe
  makes some (``mispair``).

  Examples without any modality are left out of every mean.

  Raises:
    ValueError: certified accuracy is asked of a model without constants.
  """
  model = setup.model
  certified = model.geometry is not None and not (
    certification.missing_constants(certification.abstract_geometry(model))
  )
  if config.selection.metric == "certified_accuracy" and not certified:
    raise ValueError(
      "config.selection.metric='certified_accuracy' needs encoders with sound "
      "Lipschitz constants (such as lipschitz_mlp) and a late-fusion head; "
      "choose 'accuracy', or other encoders."
    )
  axis = sharding.batch_sharding(mesh)
  predict = jax.jit(
    steps.make_predict(
      model,
      units=units_lib.of_evaluation(config, setup.facts),
      certified=certified,
      subsets=config.selection.metric == "mean_over_subsets",
    ),
    out_shardings=axis,
  )
  batch_size = sharding.padded_size(
    config.evaluation.batch_size, len(setup.validation), mesh
  )
  radius = config.selection.radius
  spelled = _spelled(config, setup, axis, batch_size)

  def validate(params, model_state):
    rows = sharding.map_batches(
      lambda batch: predict(params, model_state, batch),
      data.evaluation_batches(setup.validation, batch_size),
      axis,
    )
    counted = rows["counted"]
    loss = float(np.mean(rows["loss"][counted]))
    if not model.classifies:
      return {**_MEASURES[model.task](rows), "loss": loss}
    metrics = {
      "accuracy": float(np.mean(rows["correct"][counted])),
      "loss": loss,
    }
    if certified:
      sure = rows["correct"] & (rows["radius"] > radius)
      metrics["certified_accuracy"] = float(np.mean(sure[counted]))
    if "subset_correct" in rows:
      metrics["mean_over_subsets"] = _over_subsets(rows, "subset_correct")
    if spelled is not None:
      metrics["exact_match"] = spelled(params, model_state)
    return metrics

  return validate


def _spelled(config, setup, axis, batch_size) -> Callable | None:
  """``share(params, model_state)`` of whole captions right, of captioners.

  Of all examples: their accuracy, which spells every class, costs as much.
  """
  if setup.model.captions is None:
    return None
  spell = jax.jit(steps.make_spell(setup.model), out_shardings=axis)
  step = int(config_checks.mispairs(config))
  pair = functools.partial(modalities.stagger, step=step)

  def share(params, model_state):
    rows = sharding.map_batches(
      lambda batch: spell(params, model_state, batch),
      data.evaluation_batches(setup.validation, batch_size, transforms=(pair,)),
      axis,
    )
    return float(np.mean(rows["whole"][rows["counted"]]))

  return share


def own(config, setup: setup_lib.Setup, mesh, phase: Phase) -> Callable | None:
  """``validate(state) -> {"loss", ...}`` of ``Phase.evaluate``, or None.

  Means over validation batches, weighted by their examples.
  """
  if phase.evaluate is None:
    return None
  axis = sharding.batch_sharding(mesh)
  size = sharding.padded_size(
    config.evaluation.batch_size, len(setup.validation), mesh
  )

  def rows(state, batch):
    found = phase.evaluate(state, batch)
    return {n: jnp.broadcast_to(x, (size,)) for n, x in found.items()}

  evaluate = jax.jit(rows, out_shardings=axis)

  def validate(state):
    found = sharding.map_batches(
      lambda batch: evaluate(state, batch),
      data.evaluation_batches(setup.validation, size),
      axis,
    )
    return {n: float(np.mean(x, dtype=np.float64)) for n, x in found.items()}

  return validate


def _errors(rows) -> dict[str, float]:
  counted = rows["counted"]
  said = rows["prediction"][counted].astype(np.float64)
  label = rows["label"][counted].astype(np.float64)
  # The correlation of what is constant does not exist.
  constant = np.ptp(said) == 0 or np.ptp(label) == 0
  found = {
    "mae": float(np.mean(np.abs(said - label))),
    "correlation": np.nan
    if constant
    else float(np.corrcoef(said, label)[0, 1]),
  }
  if "subset_error" in rows:
    found["mae_over_subsets"] = _over_subsets(rows, "subset_error")
  return found


def _ranks(rows) -> dict[str, float]:
  # It brings the plots of evaluation, which other tasks do without.
  from robust_mm.evaluation import metrics

  def measure(said, counted):
    return metrics.mean_average_precision(
      rows["label"][counted], said[counted].astype(np.float64)
    )

  found = {"map": measure(rows["prediction"], rows["counted"])}
  if "subset_prediction" in rows:
    every = zip(
      np.moveaxis(rows["subset_prediction"], 1, 0), rows["subset_counted"].T
    )
    found["map_over_subsets"] = float(np.mean([measure(*s) for s in every]))
  return found


_MEASURES = {_tasks.REGRESSION: _errors, _tasks.MULTI_LABEL: _ranks}


def _over_subsets(rows, name: str) -> float:
  """Mean over sets of the mean over those who have something left."""
  left = rows["subset_counted"]
  total = np.sum(rows[name] * left, axis=0, dtype=np.float64)
  return float(np.mean(total / np.maximum(np.sum(left, axis=0), 1)))


def metric(config, setup: setup_lib.Setup) -> str:
  """The metric of ``config.selection.metric``, by its name in validation."""
  return config_checks.selection_metric(config, setup.train.task)


def score(metrics: dict[str, float], name: str) -> float:
  """Larger is better; NaN is worst."""
  _validate.one_of(metrics, **{"config.selection.metric": name})
  if np.isnan(metrics[name]):
    return -np.inf
  return -metrics[name] if name in _SMALLER_IS_BETTER else metrics[name]


def whole_set(setup: setup_lib.Setup, config, mesh, phase: Phase, state) -> Any:
  """The one batch of a phase that works on cached outputs, replicated."""
  model = {"params": state.params, "model_state": state.model_state}
  cached = cached_outputs(setup, config, mesh, setup.train, model)
  batch = phase.prepare(
    state.params, state.model_state, cached, setup.reference
  )
  return sharding.put_global(batch, sharding.replicated(mesh))


@functools.lru_cache(maxsize=2)
def _encoder(model, axis):
  # One object, so that a second source of the same size compiles nothing.
  return jax.jit(
    steps.make_encode(model),
    out_shardings=axis,
    compiler_options=_compiling.options_for_once(),
  )


def cached_outputs(
  setup: setup_lib.Setup, config, mesh, source, model: Mapping[str, PyTree]
) -> PyTree:
  """What ``steps.make_encode`` says of a whole source, as host arrays.

  Args:
    setup: of the run.
    config: of the run.
    mesh: where it is computed.
    source: a data source.
    model: its ``params`` and ``model_state``.
  """
  axis = sharding.batch_sharding(mesh)
  encode = _encoder(setup.model, axis)
  size = config.evaluation.batch_size
  return sharding.map_batches(
    lambda batch: encode(model["params"], model["model_state"], batch),
    data.evaluation_batches(
      source, sharding.padded_size(size, len(source), mesh)
    ),
    axis,
  )
