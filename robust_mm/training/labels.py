"""What the training labels are of: the task, its scale, classes without any."""

import math

import numpy as np

from robust_mm import _tasks
from robust_mm import _validate
from robust_mm._types import Target


def describe(train) -> dict:
  """The task, for ``run.json``; of a regression the scale of its target."""
  found = {"task": train.task, "num_classes": int(train.num_classes)}
  if train.task == _tasks.REGRESSION:
    labels = np.asarray(train.labels, np.float64)
    if np.ptp(labels) == 0:
      raise _validate.UserError(
        f"the {len(labels)} training labels are all {labels[0]:g}: there is "
        "nothing to predict."
      )
    # Exactly rounded: the same on whatever machine a run is resumed.
    mean = math.fsum(labels) / len(labels)
    variance = math.fsum((labels - mean) ** 2) / len(labels)
    target = Target(mean, math.sqrt(variance))
    found["target"] = target._asdict()
  return found


def notes(train) -> list[str]:
  """What a label column that counts from 1, say, should make one wonder."""
  if train.task == _tasks.MULTI_LABEL:
    empty = np.flatnonzero(~np.any(train.labels, axis=0))
    hint = "its average precision is then by chance"
  else:
    empty = sorted(set(range(train.num_classes)) - set(map(int, train.labels)))
    hint = "labels count from 0"
  if not len(empty):
    return []
  shown = ", ".join(map(str, empty[:5])) + (" ..." if len(empty) > 5 else "")
  return [
    f"class {shown} has no training example; {hint}, and {train.num_classes} "
    "classes are trained."
  ]
