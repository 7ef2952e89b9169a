"""One grid of a question: pictures, controls, real items, and numbers."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from robust_mm import visualization
from robust_mm.visualization import transforms as transforms_lib
from robust_mm.visualize_job import asking
from robust_mm.visualize_job import measures

MOST_CLASSES = 10  # of a grid nobody has asked for in detail
FOURIER = "Fourier, none"
_WHITE = 255


def make(
  opened: asking.Run, question: asking.Question, progress: Callable[..., None]
) -> dict[str, tuple[Any, dict, dict]]:
  """``{modality: (uint8, what is told of it, arrays)}``."""
  labels = _labels(opened, question)
  asked = asking.options(opened, question)
  names, chosen = asked["names"], asked["transforms"]
  several = len(names) > 1
  variants = {"": (chosen, {})}
  if question.controls:
    variants |= _controls(chosen, asked["options"]["shape"])
  made = {}
  for done, (variant, (transform, changed)) in enumerate(variants.items()):
    progress(done, len(variants), variant or "synthesis")
    given = {"held_out": asked["held_out"], **asked["options"], **changed}
    if variant and question.fidelity == "published":
      # What it forbids is switched off by hand; identities are no images.
      given |= {"fidelity": "corrected", "objective": "logit"}
      given |= {"tv_weight": 0.0, "annealing": 0.0}
    made[variant] = visualization.class_visualization(
      opened.model,
      opened.params,
      names if several else names[0],
      labels,
      transforms=transform if several else transform[names[0]],
      seeds=question.seeds,
      state=opened.state,
      key=jax.random.key(question.seed),
      **given,
    )
  progress(len(variants), len(variants), "drawing")
  pictures = {
    variant or measures.SYNTHESISED: found.inputs
    if several
    else {names[0]: found.inputs}
    for variant, found in made.items()
  }
  real = _real(opened, names, labels, question.seeds)
  pictures[measures.REAL] = real
  numbers, notes = measures.of(opened, asked, labels, pictures, made)
  return {
    name: _grid(
      opened, question, asked, name, labels, made, pictures, numbers, notes
    )
    for name in names
  }


def _labels(opened, question) -> tuple[int, ...]:
  labels = question.labels
  if labels is None:
    labels = tuple(range(min(opened.model.num_classes, MOST_CLASSES)))
  twice = sorted({label for label in labels if labels.count(label) > 1})
  if twice:
    raise ValueError(f"--label names class {twice[0]} more than once.")
  return tuple(labels)


def _controls(chosen, shapes) -> dict[str, tuple[dict, dict]]:
  """``{control: (transforms, options)}``; of several, of each its own."""
  every = {m: transforms_lib.controls(t) for m, t in chosen.items()}
  found = {}
  for control in ("none", "shifts only", "sub-pixel shifts"):
    if not any(control in own for own in every.values()):
      continue
    # What has no such control, such as a vector, is left as it is.
    transforms = {m: own.get(control, own["none"]) for m, own in every.items()}
    if transforms != chosen:
      found[control] = (transforms, {})
  if len(chosen) == 1:
    ((name, own),) = every.items()
    if own["none"].has_frequencies(len(shapes[name])):
      changed = {"parameterization": "fourier", "mode": "expectation"}
      changed |= {"fidelity": "corrected", "blur_every": 0}
      found[FOURIER] = ({name: own["none"]}, changed)
  return found


def _grid(
  opened, question, asked, name, labels, made, pictures, numbers, notes
):
  """One grid: starts, controls, real items, class means."""
  transform = asked["transforms"][name]
  low, high = asked["options"]["value_range"][name]
  value_range = (float(np.min(low)), float(np.max(high)))
  of = {what: np.asarray(x[name]) for what, x in pictures.items()}
  starts, real = of[measures.SYNTHESISED], of.pop(measures.REAL)
  means, lacking = _means(opened, name, labels)
  rows = {f"start {i}": starts[:, i] for i in range(question.seeds)}
  rows |= {variant: of[variant][:, 0] for variant in made if variant}
  rows |= {"real item": real[:, 0], "class mean": means}
  colormap = "perceptual" if transform.kind == "log_mel" else "grey"
  small = [
    visualization.drawing.draw(x, transform.kind, (low, high), colormap)
    for row in rows.values()
    for x in row
  ]
  for column in lacking:
    at = len(labels) * (len(rows) - 1) + column
    small[at] = np.full_like(small[at], _WHITE)
  upscale = max(1, 84 // max(small[0].shape[:2]))
  array = visualization.tile(small, len(labels), upscale)
  first = made[""]
  told = {
    "title": f"{name}: {_words(question, asked['items'])}{_place(opened)}",
    "rows": list(rows),
    "columns": list(labels),
    "value_range": value_range,
    "numbers": numbers[name],
    "margins": {
      m: np.asarray(v).tolist() for m, v in (first.margins or {}).items()
    },
    "margin_means": measures.margin_means(first.margins, labels, asked),
    "items": asked["items"],
    "first_bad_step": np.asarray(first.first_bad_step).tolist(),
    "notes": notes + _notes(question, asked, first, labels, lacking),
    "settings": {**first.settings, "transfer": list(question.transfer)},
  }
  if transform.kind in visualization.drawing.LINES:
    told["channel_range"] = [np.ravel(bound).tolist() for bound in (low, high)]
  arrays = {_slug(what): x for what, x in of.items()}
  return array, told, arrays


def _notes(question, asked, first, labels, lacking) -> list[str]:
  bad = int(np.sum(np.asarray(first.first_bad_step) >= 0))
  notes = (
    [f"{bad} inputs stopped at a value that was not finite."] if bad else []
  )
  if first.settings["reconstruction"]:
    notes.append("Our reconstruction of what was published.")
  if lacking:
    classes = ", ".join(str(labels[column]) for column in lacking)
    notes.append(f"No training example shows class {classes}: no class mean.")
  if len(asked["names"]) > 1:
    notes.append(
      "Near, far and probability are of all modalities together; alone: of "
      "this one with the others absent."
    )
    if question.controls:
      notes.append("Of several modalities there is no control by Fourier.")
  return notes


def _real(opened: asking.Run, names, labels, count) -> dict[str, np.ndarray]:
  """Items ``{m: [class, count, ...]}`` of the split, with all the names."""
  rows = []
  for label in labels:
    here = opened.test["label"] == label
    for name in names:
      here = here & opened.test["present"][name]
    found = np.flatnonzero(here)
    if not len(found):
      told = " and ".join(map(repr, names))
      raise ValueError(
        f"--label: no item of the split has class {label} and {told}."
      )
    rows.append(np.resize(found, count))
  return {name: opened.test["inputs"][name][np.array(rows)] for name in names}


def _means(opened: asking.Run, name, labels) -> tuple[np.ndarray, list[int]]:
  """Training means of classes, and the columns of those without an example."""
  train, means, lacking = opened.train, [], []
  for column, label in enumerate(labels):
    here = (train["label"] == label) & train["present"][name]
    if not here.any():
      lacking.append(column)
      here = train["present"][name]  # drawn over
    means.append(train["inputs"][name][here].mean(axis=0))
  return np.stack(means), lacking


def _words(question: asking.Question, items: list[dict]) -> str:
  others = {
    "absent": "the other modalities absent",
    "joint": "all modalities together",
    "average": f"on average over {asking.AVERAGED} items of the others",
  }
  told = others.get(question.others)
  if told is None:
    (item,) = items
    told = f"the others of item {item['item']}, of class {item['class']}"
  place = ", transformed in place" if question.mode == "in_place" else ""
  published = ", as published" if question.fidelity == "published" else ""
  return told + place + published


def _place(opened: asking.Run) -> str:
  split = "" if opened.split == "test" else f", {opened.split} items"
  return split + (f", phase {opened.phase}" if opened.phase else "")


def _slug(text: str) -> str:
  return "".join(c if c.isalnum() else "_" for c in text)
