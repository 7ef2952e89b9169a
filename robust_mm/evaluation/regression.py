"""What is measured of a model that predicts a number: errors."""

import functools
import math

import numpy as np

from robust_mm import _tasks
from robust_mm.evaluation import batches
from robust_mm.evaluation import metrics
from robust_mm.evaluation import unattacked

# Of sentiment, which is what labels in [-3, 3] are taken for.
AFFECT = {
  "accuracy_7": metrics.accuracy_7,
  **{
    f"{fn.__name__}_{variant}": functools.partial(fn, variant=variant)
    for variant in metrics.VARIANTS
    for fn in (metrics.accuracy_2, metrics.f1_2)
  },
}


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


def _chance(label: np.ndarray) -> dict[str, float]:
  """The MAE of the best constant, the median of these very labels."""
  label = label.astype(np.float64)
  mae = float(np.mean(np.abs(label - np.median(label))))
  return {"best_constant_mae": mae}


def _columns(data: batches.Data, prediction) -> dict:
  return {
    "label": data.label,
    "prediction": prediction,
    "error": prediction - data.label,
  }


TASK = unattacked.Task(
  name=_tasks.REGRESSION,
  why="A number has no class whose prediction could be certified.",
  make_measure=make_measure,
  chance=_chance,
  columns=_columns,
  meanings={
    "label": "the true number",
    "prediction": "the predicted number, in the same units",
    "error": "prediction less label",
  },
)
