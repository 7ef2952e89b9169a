"""The numbers of a question: of what is made, of controls, of real items."""

from typing import Any

import jax
import numpy as np

from robust_mm import _validate
from robust_mm import visualization
from robust_mm.evaluation import metrics
from robust_mm.visualize_job import asking

SYNTHESISED, REAL = "synthesised", "real items"
CONTROL = "none"
AGREEING, AGAINST = "class of the item", "other classes"
_SOME = 5  # classes that say something of others
_FEW = 2  # examples without which there is no distance between real ones


def of(opened: asking.Run, asked, labels, pictures, made) -> tuple[dict, list]:
  """``{modality: {row: {number: mean}}}``, and what is to be said of them.

  Args:
    opened: the run.
    asked: of ``asking.options``.
    labels: the classes.
    pictures: ``{row: {m: [class, seed, ...]}}``.
    made: ``{variant: Visualization}``; "" is the synthesis.
  """
  names = asked["names"]
  groups = _groups(labels, asked["items"])
  found: dict[str, dict] = {name: {} for name in names}
  rows = {}
  for row, x in pictures.items():
    whole = made.get("" if row == SYNTHESISED else row)
    rows[row] = shown = _shown(opened, asked, labels, x, whole)
    for name in names:
      values = {**shown, **_own(opened, asked, name, labels, x[name])}
      found[name][row] = _means(values, labels)
      for group, columns in groups.items():
        if row in (SYNTHESISED, REAL):
          found[name][f"{row}, {group}"] = _means(values, labels, columns)
  notes = _apart(rows, asked["held_out"])
  for name in names:
    scarce = [labels[i] for i in _scarce(opened, name, labels)]
    if scarce:
      notes.append(
        f"Class {', '.join(map(str, scarce))} has fewer than {_FEW} training "
        f"examples of {name}: no distance."
      )
  return found, notes


def margin_means(margins, labels, asked) -> dict[str, dict[str, float]]:
  """``{"": {m: mean}}``, and of the classes that agree with an item or not."""
  if not margins:
    return {}
  groups = {"": list(range(len(labels))), **_groups(labels, asked["items"])}
  return {
    group: {m: float(np.mean(np.asarray(v)[rows])) for m, v in margins.items()}
    for group, rows in groups.items()
  }


def _apart(rows, held_out) -> list[str]:
  """How much more often a class is kept than without transformation.

  The interval is over classes and starts, none where these are a handful.
  """
  found = []
  for what in held_out if CONTROL in rows else ():
    pairs = [np.asarray(rows[row][what]).T for row in (SYNTHESISED, CONTROL)]
    mean, low, high = metrics.paired_bootstrap(*pairs)
    starts, classes = pairs[0].shape
    apart = f"{mean:+.3f}"
    if classes >= _SOME:
      apart += f", 95 % interval {low:+.3f} to {high:+.3f}"
    plural = "class" if classes == 1 else "classes"
    found.append(
      f"Share kept under {what} transformations, less that of pictures made "
      f"with {CONTROL}: {apart} ({classes} {plural}, "
      f"{_validate.counted(starts, 'start')}, one network)."
    )
  return found


def _groups(labels, items) -> dict[str, list[int]]:
  """Rows of classes that a single item held fixed agrees with, or not."""
  if len(items) != 1:
    return {}
  agrees = [label == items[0]["class"] for label in labels]
  found = {
    AGREEING: [i for i, same in enumerate(agrees) if same],
    AGAINST: [i for i, same in enumerate(agrees) if not same],
  }
  return {group: rows for group, rows in found.items() if rows}


def _shown(opened, asked, labels, x, made) -> dict[str, Any]:
  """Of all that is synthesised, shown at once, as it was in synthesis."""
  names, others = asked["names"], asked["options"]["others"]
  subject = opened.model, opened.params, x, labels
  shared = {"modality": names, "state": opened.state, "others": others}
  if made is None:
    accuracy = _accuracy(subject, asked["held_out"], shared)
  else:
    accuracy = made.transforms_accuracy
  found = {
    **accuracy,
    "probability": visualization.class_probability(*subject, **shared),
  }
  judged = [_judged(other, asked, labels, x) for other in opened.others]
  for what in judged[0] if judged else ():
    found[what] = np.mean([values[what] for values in judged], axis=0)
  return found


def _accuracy(subject, tests, shared) -> dict:
  return {
    what: visualization.transformation_accuracy(
      *subject, test, key=jax.random.key(1), **shared
    )
    for what, test in tests.items()
  }


def _judged(other, asked, labels, x) -> dict[str, Any]:
  """What another network says: not the one that made the picture."""
  model, params, state = other
  for name in asked["names"]:
    if name not in model.modalities:
      raise ValueError(f"--transfer: a run there has no modality {name!r}.")
  others = asked["options"]["others"]
  if not isinstance(others, str):
    known = {
      part: {m: v for m, v in given.items() if m in model.modalities}
      for part, given in others.items()
    }
    others = known if known["inputs"] else "absent"
  if others == "joint" and set(model.modalities) != set(asked["names"]):
    others = "absent"
  shared = {"modality": asked["names"], "state": state, "others": others}
  subject = model, params, x, labels
  near = {n: t for n, t in asked["held_out"].items() if n == "near"}
  found = {f"other {n}": v for n, v in _accuracy(subject, near, shared).items()}
  sure = visualization.class_probability(*subject, **shared)
  return {"other probability": sure, **found}


def _own(opened, asked, name, labels, x) -> dict[str, Any]:
  """Of one modality alone."""
  others = asked["options"]["others"]
  alone = others == "joint"
  shared = {
    "modality": name,
    "state": opened.state,
    "others": "absent" if alone else others,
  }
  subject = opened.model, opened.params, x
  found = {
    **_natural(opened, asked, name, labels, x, shared),
    "diversity": visualization.diversity(*subject, **shared),
  }
  if alone and len(asked["names"]) > 1:
    tests = {what: test[name] for what, test in asked["held_out"].items()}
    accuracy = _accuracy((*subject, labels), tests, shared)
    accuracy["probability"] = visualization.class_probability(
      *subject, labels, **shared
    )
    found |= {f"{what} alone": value for what, value in accuracy.items()}
  return found


def _scarce(opened, name, labels) -> list[int]:
  """Rows of classes that have no two training examples with the modality."""
  train = opened.train
  label = np.asarray(train["label"])[np.asarray(train["present"][name])]
  return [i for i, c in enumerate(labels) if np.sum(label == c) < _FEW]


def _natural(opened, asked, name, labels, x, shared) -> dict[str, np.ndarray]:
  """NaN for classes that have too few training examples."""
  transform = asked["transforms"][name]
  scarce = _scarce(opened, name, labels)
  rows = [i for i in range(len(labels)) if i not in scarce]
  if not rows:
    return {}
  measured = visualization.naturalness(
    opened.model,
    opened.params,
    np.asarray(x)[rows],
    [labels[i] for i in rows],
    opened.train,
    smooth_axes=transform.smooth_axes(x.shape[2:]),
    **shared,
  )
  if transform.kind not in ("image", "lucid"):
    measured.pop("spectral_slope", None)
  found = {}
  for what, value in measured.items():
    found[what] = np.full(x.shape[:2], np.nan)
    found[what][rows] = value
  return found


def _means(values, labels, rows=None) -> dict[str, float | None]:
  """Over classes and starts; None where there is nothing."""
  rows = list(range(len(labels))) if rows is None else rows
  found = {}
  for what, value in values.items():
    chosen = np.asarray(value, float)[rows]
    chosen = chosen[np.isfinite(chosen)]
    found[what] = float(chosen.mean()) if chosen.size else None
  return found
