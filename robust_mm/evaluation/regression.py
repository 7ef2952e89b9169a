"""``evaluate`` of a model that predicts a number: errors, no attacks."""

import functools
import math
import time
from typing import Any

import jax
import numpy as np

from robust_mm import modalities
from robust_mm.evaluation import batches
from robust_mm.evaluation import circumstances
from robust_mm.evaluation import matrix
from robust_mm.evaluation import metrics
from robust_mm.evaluation import progress as progress_lib
from robust_mm.evaluation import protocol as protocol_lib
from robust_mm.evaluation import report as report_lib
from robust_mm.evaluation import shifts as shifts_lib

# Of sentiment, which is what labels in [-3, 3] are taken for.
AFFECT = {
  "accuracy_7": metrics.accuracy_7,
  **{
    f"{fn.__name__}_{variant}": functools.partial(fn, variant=variant)
    for variant in metrics.VARIANTS
    for fn in (metrics.accuracy_2, metrics.f1_2)
  },
}
_ABOUT_CLASSES = {
  "contributions": None,
  "attacked": [],
  "certified": [],
  "region": None,
  "vulnerability": None,
  "smoothed": None,
  "tightness": None,
  "masking": None,
}
_REASON = "A number has no class whose prediction could be certified."
_COLUMNS = {
  "id": "the example's id in the data set, or its row number",
  "label": "the true number",
  "prediction": "the predicted number, in the same units",
  "error": "prediction less label",
  "counted": "1 if at least one modality is present; 0 is in no average",
}


def evaluate(
  model,
  params,
  batch,
  *,
  state,
  protocol: protocol_lib.Protocol | None,
  seed: int,
  key,
  reference,
  name: str | None,
  recipe: str | None,
  dataset: str | None,
  progress,
  sharding,
) -> report_lib.Report:
  """Errors clean, with missing and with corrupted modalities.

  Arguments as of :func:`evaluation.evaluate`.

  Raises:
    ValueError: bad data, or a protocol with attacks or certificates.
  """
  started = time.perf_counter()
  protocol = _protocol(protocol)
  state = {} if state is None else state
  data = batches.host_data(model, batch, max_examples=protocol.max_examples)
  if not data.counted.any():
    raise ValueError("batch has no example with a modality present.")
  shifts_lib.check(protocol, data)
  if reference is not None:
    inputs, present = batches.host_inputs(model, reference)
    reference = {"inputs": inputs, "present": present}
  suite = shifts_lib.suite(protocol, data, reference)
  device = batches.Device(params, state, sharding=sharding)
  size = device.chunk_size(min(protocol.batch_size, data.size))
  forward = matrix.Forward(model, device, size=size)
  bench = shifts_lib.Bench(forward, device, data, size, make_measure(data))
  subsets = protocol.subset_names(data.names)
  key = jax.random.key(seed) if key is None else key
  timing = {}
  total = 1 + len(protocol.missing_rates) + len(suite)
  with progress_lib.Ticker(progress, total) as tick:
    every = data.names
    said = matrix.predictions(forward, data, dict.fromkeys([*subsets, every]))
    tick("clean and missing modalities")
    timing["predict_seconds"] = time.perf_counter() - started
    shifted = {
      "missing": shifts_lib.missing(bench, protocol, tick),
      "corrupted": shifts_lib.corrupted(
        bench, suite, key=jax.random.fold_in(key, 3), tick=tick
      ),
    }
  timing["total_seconds"] = time.perf_counter() - started
  timing["peak_memory_mib"] = circumstances.peak_memory()
  prediction = said[every][0]
  columns = _columns(data, prediction)
  results = {
    "schema_version": report_lib.SCHEMA_VERSION,
    "task": "regression",
    "name": name or recipe or "model",
    "dataset": dataset,
    "recipe": recipe,
    "seed": seed,
    "settings": {
      **protocol.settings,
      "attacks": {},
      "certificate": circumstances.certificate_settings(
        protocol, None, _REASON
      ),
      **circumstances.settings(model, data, reference, sharding),
    },
    "clean": {
      **bench.measure(data, prediction, data.counted),
      "best_constant_mae": _constant(data.label[data.counted]),
    },
    "subsets": {
      modalities.subset_name(subset): bench.measure(data, *said[subset])
      for subset in subsets
    },
    **shifted,
    **_ABOUT_CLASSES,
    "units": dict.fromkeys(data.names, 1.0),
    "checks": [_finite(prediction[data.counted])],
    "examples": {
      "num_examples": data.size,
      "num_left_out": int((~data.counted).sum()),
      "columns": {
        column: _COLUMNS.get(column, "1 if this modality is present")
        for column in columns
      },
    },
    "timing": timing,
  }
  return report_lib.Report(
    results=protocol_lib.jsonable(results), examples=columns
  )


def _protocol(protocol) -> protocol_lib.Protocol:
  if protocol is None:
    return protocol_lib.standard(attack=None, certificate=None, tightness=())
  if protocol.attacks or protocol.certificate not in (None, "auto"):
    raise ValueError(
      "protocol must have attack=None and certificate=None for a model that "
      "predicts a number (regression)."
    )
  return protocol


def make_measure(data: batches.Data):
  """``measure(data, prediction, counted)``, the numbers of one row.

  ``{"mae", "interval", "correlation", "num_examples"}``, and of labels that all
  lie in [-3, 3] those of ``AFFECT``. The interval is of the MAE, 95 %, normal.
  NaN where a prediction is not finite, None where nothing counts.
  """
  label = data.label[data.counted]
  affect = AFFECT if np.all(np.abs(label) <= 3) else {}
  fns = {"correlation": metrics.correlation, **affect}

  def measure(data, prediction, counted) -> dict:
    label, said = (
      x[counted].astype(np.float64) for x in (data.label, prediction)
    )
    if not len(label):
      empty = dict.fromkeys(("mae", "interval", *fns))
      return {**empty, "num_examples": 0}
    if not np.isfinite(said).all():
      bad = dict.fromkeys(("mae", *fns), math.nan)
      return {**bad, "interval": None, "num_examples": len(label)}
    return {
      "mae": metrics.mean_absolute_error(label, said),
      "interval": _interval(np.abs(label - said)),
      **{name: fn(label, said) for name, fn in fns.items()},
      "num_examples": len(label),
    }

  return measure


def _interval(errors: np.ndarray) -> list[float] | None:
  """Of the mean, 95 %, by its standard error."""
  if len(errors) < 2:
    return None
  mean = errors.mean()
  half = 1.96 * errors.std(ddof=1) / math.sqrt(len(errors))
  return [float(max(mean - half, 0.0)), float(mean + half)]


def _constant(label: np.ndarray) -> float:
  """The MAE of the best constant, the median of these very labels."""
  label = label.astype(np.float64)
  return float(np.mean(np.abs(label - np.median(label))))


def _columns(data: batches.Data, prediction) -> dict[str, Any]:
  columns = {
    "id": data.id,
    "label": data.label,
    "prediction": prediction,
    "error": prediction - data.label,
    "counted": data.counted,
  }
  for name in data.names:
    columns[f"present/{name}"] = data.present[name]
  return columns


def _finite(prediction: np.ndarray) -> dict:
  bad = int((~np.isfinite(prediction)).sum())
  return {
    "name": "finite_predictions",
    "passed": bad == 0,
    "required": True,
    "message": f"{bad} of {len(prediction)} predictions are not finite.",
  }
