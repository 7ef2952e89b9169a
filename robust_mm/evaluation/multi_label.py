"""What is measured of a model of several labels: mean average precision."""

import math

import numpy as np

from robust_mm import _tasks
from robust_mm.evaluation import batches
from robust_mm.evaluation import metrics
from robust_mm.evaluation import unattacked


def make_measure(data: batches.Data):
  """``measure(data, prediction, counted)``, the numbers of one row.

  ``{"map", "interval", "hit_at_1", "num_classes", "num_examples"}``: the mean
  average precision over the ``num_classes`` classes that a counted example has,
  and the share of examples whose class of the largest logit is one they have.
  There is no interval. NaN where a prediction is not finite or no counted
  example has a label, None where nothing counts.
  """
  del data

  def measure(data, prediction, counted) -> dict:
    label, said = data.label[counted] > 0, prediction[counted]
    num_classes = int(label.any(axis=0).sum())
    sizes = {"num_classes": num_classes, "num_examples": len(label)}
    if not len(label):
      return {"map": None, "interval": None, "hit_at_1": None, **sizes}
    if not np.isfinite(said).all():
      bad = {"map": math.nan, "interval": None, "hit_at_1": math.nan}
      return {**bad, **sizes}
    return {
      "map": metrics.mean_average_precision(label, said.astype(np.float64)),
      "interval": None,
      "hit_at_1": float(np.mean(_hits(label, said))),
      **sizes,
    }

  return measure


def _hits(label: np.ndarray, said: np.ndarray) -> np.ndarray:
  return label[np.arange(len(label)), said.argmax(axis=1)]


def _chance(label: np.ndarray) -> dict[str, float | None]:
  """The mAP of scores that are all the same: the share of a class, averaged."""
  share = (label > 0).mean(axis=0)
  there = share[share > 0]
  return {"constant_map": float(there.mean()) if there.size else None}


def _columns(data: batches.Data, prediction) -> dict:
  label = data.label > 0
  return {
    "num_labels": label.sum(axis=1),
    "top": prediction.argmax(axis=1),
    "hit": _hits(label, prediction).astype(int),
  }


TASK = unattacked.Task(
  name=_tasks.MULTI_LABEL,
  why="An example of several classes has no one prediction to be certified.",
  make_measure=make_measure,
  chance=_chance,
  columns=_columns,
  meanings={
    "num_labels": "how many classes the example has",
    "top": "the class of the largest logit",
    "hit": "1 if that is one of them",
  },
)
