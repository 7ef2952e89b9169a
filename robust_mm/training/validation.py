"""Scores on the validation set, and passes over the whole training set."""

import functools
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from robust_mm import _compiling
from robust_mm import _validate
from robust_mm import certification
from robust_mm import data
from robust_mm._types import PyTree
from robust_mm.recipes import Phase
from robust_mm.training import setup as setup_lib
from robust_mm.training import sharding
from robust_mm.training import steps

Validator = Callable[[PyTree, PyTree], dict[str, float]]


def make(config, setup: setup_lib.Setup, mesh) -> Validator:
  """``validate(params, state) -> {accuracy, loss, ...}``.

  Also ``certified_accuracy`` of models with constants and, where models are
  selected by it, ``mean_over_subsets``: accuracy with each availability set
  (``modalities.availability_sets``) in turn, averaged.

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
      units=setup_lib.units(config, setup.facts),
      certified=certified,
      subsets=config.selection.metric == "mean_over_subsets",
    ),
    out_shardings=axis,
  )
  batch_size = sharding.padded_size(
    config.evaluation.batch_size, len(setup.validation), mesh
  )
  radius = config.selection.radius

  def validate(params, model_state):
    rows = sharding.map_batches(
      lambda batch: predict(params, model_state, batch),
      data.evaluation_batches(setup.validation, batch_size),
      axis,
    )
    counted = rows["counted"]
    metrics = {
      "accuracy": float(np.mean(rows["correct"][counted])),
      "loss": float(np.mean(rows["loss"][counted])),
    }
    if certified:
      sure = rows["correct"] & (rows["radius"] > radius)
      metrics["certified_accuracy"] = float(np.mean(sure[counted]))
    if "subset_correct" in rows:
      left = rows["subset_counted"]
      right = np.sum(rows["subset_correct"] & left, axis=0)
      metrics["mean_over_subsets"] = float(
        np.mean(right / np.maximum(np.sum(left, axis=0), 1))
      )
    return metrics

  return validate


def score(metrics: dict[str, float], name: str) -> float:
  """Larger is better; ties go to the earlier model."""
  _validate.one_of(metrics, **{"config.selection.metric": name})
  return -metrics[name] if name == "loss" else metrics[name]


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
