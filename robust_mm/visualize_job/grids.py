"""One grid of a question: pictures, controls, real items, and numbers."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from robust_mm import visualization
from robust_mm.visualization import transforms as transforms_lib
from robust_mm.visualize_job import asking

MOST_CLASSES = 10  # of a grid nobody has asked for in detail


def make(
  opened: asking.Run, question: asking.Question, progress: Callable[..., None]
) -> dict[str, tuple[Any, dict, dict]]:
  """``{modality: (uint8, what is told of it, arrays)}``."""
  asked = asking.options(opened, question)
  names = asked.pop("names")
  labels = question.labels
  if labels is None:
    labels = tuple(range(min(opened.model.num_classes, MOST_CLASSES)))
  chosen = asked.pop("transforms")
  several = len(names) > 1
  variants = {"": (chosen, {})}
  if question.controls and not several:
    (name,) = names
    for control, transform in transforms_lib.controls(chosen[name]).items():
      if transform != chosen[name]:
        variants[control] = ({name: transform}, {})
    if len(opened.facts["input_shapes"][name]) == 3:
      fourier = {"parameterization": "fourier", "mode": "expectation"}
      variants["Fourier, none"] = (
        {name: transforms_lib.identity()},
        {**fourier, "fidelity": "corrected"},
      )
  made = {}
  for done, (variant, (transform, changed)) in enumerate(variants.items()):
    progress(done, len(variants), variant or "synthesis")
    given = {**asked["options"], **changed}
    if variant and given["fidelity"] == "published":
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
      held_out={} if several else asked["held_out"],
      **given,
    )
  progress(len(variants), len(variants), "drawing")
  return {
    name: _grid(opened, question, asked, name, labels, made, chosen[name])
    for name in names
  }


def _grid(opened, question, asked, name, labels, made, transform):
  """One grid: starts, controls, real items, class means."""
  low, high = asked["options"]["value_range"][name]
  value_range = (float(np.min(low)), float(np.max(high)))
  of = {
    variant: np.asarray(
      found.inputs[name] if isinstance(found.inputs, dict) else found.inputs
    )
    for variant, found in made.items()
  }
  real, means = _real(opened, name, labels, question.seeds)
  rows = {f"start {i}": of[""][:, i] for i in range(question.seeds)}
  rows |= {variant: x[:, 0] for variant, x in of.items() if variant}
  rows |= {"real item": real[:, 0], "class mean": means}
  colormap = "perceptual" if transform.kind == "log_mel" else "grey"
  small = [
    visualization.drawing.draw(x, transform.kind, (low, high), colormap)
    for row in rows.values()
    for x in row
  ]
  upscale = max(1, 84 // max(small[0].shape[:2]))
  array = visualization.tile(small, len(labels), upscale)
  numbers = {}
  for variant, x in {**of, "real items": real}.items():
    numbers[variant or "synthesised"] = _numbers(
      opened, asked, name, labels, x, made.get(variant), transform
    )
  first = made[""]
  bad = int(np.sum(np.asarray(first.first_bad_step) >= 0))
  notes = (
    [f"{bad} inputs stopped at a value that was not finite."] if bad else []
  )
  if first.settings["reconstruction"]:
    notes.append("Our reconstruction of what was published.")
  told = {
    "title": f"{name}: {_words(question)}{_place(opened)}",
    "rows": list(rows),
    "columns": list(labels),
    "value_range": value_range,
    "numbers": numbers,
    "margins": {
      m: np.asarray(v).tolist() for m, v in (first.margins or {}).items()
    },
    "first_bad_step": np.asarray(first.first_bad_step).tolist(),
    "notes": notes,
    "settings": first.settings,
  }
  if transform.kind in visualization.drawing.LINES:
    told["channel_range"] = [np.ravel(bound).tolist() for bound in (low, high)]
  arrays = {_slug(v or "synthesised"): x for v, x in of.items()}
  return array, told, arrays


def _real(opened: asking.Run, name, labels, count):
  """Items ``[class, count, ...]`` of the split and training class means."""
  rows = []
  for label in labels:
    here = opened.test["label"] == label
    found = np.flatnonzero(here & opened.test["present"][name])
    if not len(found):
      raise ValueError(
        f"--label: no item of the split has class {label} and {name!r}."
      )
    rows.append(np.resize(found, count))
  train = opened.train
  means = [
    train["inputs"][name][
      (train["label"] == label) & train["present"][name]
    ].mean(axis=0)
    for label in labels
  ]
  return opened.test["inputs"][name][np.array(rows)], np.stack(means)


def _numbers(opened, asked, name, labels, x, made, transform) -> dict:
  """Means over classes and starts."""
  others = asked["options"]["others"]
  shared = {
    "modality": name,
    "state": opened.state,
    "others": "absent" if others == "joint" else others,
  }
  subject = opened.model, opened.params, x
  accuracy = {} if made is None else made.transforms_accuracy
  if not accuracy:
    shape = tuple(x.shape[2:])
    accuracy = {
      what: visualization.transformation_accuracy(
        *subject, labels, test, key=jax.random.key(1), **shared
      )
      for what, test in transforms_lib.held_out(transform, shape).items()
    }
  found = {
    **accuracy,
    "probability": visualization.class_probability(*subject, labels, **shared),
    **_natural(opened, subject, labels, transform, shared),
    "diversity": visualization.diversity(*subject, **shared),
  }
  means = {what: float(np.mean(value)) for what, value in found.items()}
  return {n: v if np.isfinite(v) else None for n, v in means.items()}


def _natural(opened, subject, labels, transform, shared) -> dict:
  axes = transform.smooth_axes(subject[2].shape[2:])
  try:
    found = visualization.naturalness(
      *subject, labels, opened.train, smooth_axes=axes, **shared
    )
  except ValueError:  # a class with a single training item
    return {}
  if transform.kind not in ("image", "lucid"):
    found.pop("spectral_slope", None)
  return found


def _words(question: asking.Question) -> str:
  others = {
    "absent": "the other modalities absent",
    "joint": "all modalities together",
    "average": f"on average over {asking.AVERAGED} items of the others",
  }
  told = others.get(question.others, f"the others of item {question.others}")
  place = ", transformed in place" if question.mode == "in_place" else ""
  published = ", as published" if question.fidelity == "published" else ""
  return told + place + published


def _place(opened: asking.Run) -> str:
  split = "" if opened.split == "test" else f", {opened.split} items"
  return split + (f", phase {opened.phase}" if opened.phase else "")


def _slug(text: str) -> str:
  return "".join(c if c.isalnum() else "_" for c in text)
