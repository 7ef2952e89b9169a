"""What is asked of a run, and what of its data that needs."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from robust_mm import data
from robust_mm import training
from robust_mm.training import runs
from robust_mm.training import setup as setup_lib
from robust_mm.visualization import transforms as transforms_lib

PERCENTILES = (0.5, 99.5)
AVERAGED = 8  # items of --others=average
PHOTO = 96  # pixels from which an image is one
# Of the kinds that data sets state; a sequence may be either of two.
KINDS = {"image": "image", "spectrogram": "log_mel", "video": "depth"}
_BY_RANK = {1: "vector", 3: "image", 4: "depth"}
_SEQUENCES = ("inertial", "skeleton")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """What is asked of a run.

  Attributes:
    modality: its name.
    labels: classes; None for the first ten.
    others: ``"absent"``, ``"joint"``, ``"average"`` (over a few items), or the
      number of an item of the split.
    mode: of ``class_visualization``.
    objective: likewise; None for its default.
    objective_scale: likewise.
    parameterization: likewise.
    fidelity: likewise.
    transforms: the kind; None for that of the modality.
    seeds: pictures of every class.
    num_steps: of the ascent; None for 256, of photos 512.
    controls: whether they are made as well.
    seed: of everything random.
  """

  modality: str
  labels: tuple[int, ...] | None = None
  others: str | int = "absent"
  mode: str = "expectation"
  objective: str | None = None
  objective_scale: float | str = "auto"
  parameterization: str = "pixels"
  fidelity: str = "corrected"
  transforms: str | None = None
  seeds: int = 3
  num_steps: int | None = None
  controls: bool = True
  seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
  """What of a run is needed.

  Attributes:
    model: of it.
    params: of it.
    state: of it.
    facts: of ``run.json``.
    dataset: its name.
    train: reference examples of the training split.
    test: examples of the split that real items are taken of.
    split: its name.
    phase: whose model; None for the last.
  """

  model: Any
  params: Any
  state: Any
  facts: dict
  dataset: str
  train: dict
  test: dict
  split: str = "test"
  phase: str | None = None


def kind(facts: Mapping, dataset: str, name: str) -> str | None:
  """The kind of a modality's transformations; None where nothing says."""
  known = data.registry.get(dataset).modalities.get(name)
  if known is not None and known.kind in KINDS:
    return KINDS[known.kind]
  if name in _SEQUENCES:
    return name
  return _BY_RANK.get(len(facts["input_shapes"][name]))


def open_run(folder: pathlib.Path, split: str, phase: str | None) -> Run:
  """The model and data of a run."""
  model, params, state, config = training.load(folder, phase=phase)
  facts = runs.describe(folder)
  source = setup_lib.open_split(config, split)
  setup_lib.check_same_data(source, facts)
  limited = source.limit(setup_lib.REFERENCE_SIZE)
  train = setup_lib.open_split(config, "train")
  return Run(
    model=model,
    params=params,
    state=state,
    facts=facts,
    dataset=config.data.name,
    train=setup_lib.reference_batch(train),
    test=limited.batch(),
    split=split,
    phase=phase,
  )


def options(opened: Run, question: Question) -> dict:
  """Names, transformations and options of ``class_visualization``.

  Raises:
    ValueError: what the run does not have, by the option that asks for it.
  """
  facts = opened.facts
  names = (question.modality,)
  if question.others == "joint":
    names = tuple(sorted(facts["input_shapes"]))
  ranges, references, chosen = {}, {}, {}
  for name in names:
    ranges[name], references[name] = _range(opened, name)
    own = question.transforms if name == question.modality else None
    chosen[name] = _transform(opened, name, own)
  first = names[0]
  shapes = {m: tuple(s) for m, s in facts["input_shapes"].items()}
  photo = chosen[first].kind == "lucid"
  options = {
    "shape": {name: shapes[name] for name in names},
    "mode": question.mode,
    "objective": question.objective,
    "others": _others(opened, question, names),
    "parameterization": question.parameterization,
    "fidelity": question.fidelity,
    "objective_scale": question.objective_scale,
    "items": opened.train,
    "value_range": ranges,
    "reference": references,
    "num_steps": question.num_steps or (512 if photo else 256),
  }
  if photo:
    auto = question.objective_scale == "auto"
    options |= {"num_transforms": 8, "l2_weight": 0.1 if auto else 1.0}
    if question.mode == "in_place":
      options |= {"every": 16, "step_size": 0.01}
  return {
    "names": names,
    "transforms": chosen,
    "held_out": transforms_lib.held_out(chosen[first], shapes[first]),
    "options": options,
  }


def _range(opened: Run, name: str):
  """(low, high) and the reference value: what is stated, or of the data."""
  bounds = opened.facts["value_range"].get(name)
  shape = opened.facts["input_shapes"][name]
  if bounds:
    photo = len(shape) == 3 and min(shape[:2]) >= PHOTO
    middle = (bounds[0] + bounds[1]) / 2
    return tuple(bounds), middle if photo else float(bounds[0])
  values = _present(opened.train, name)
  axes = tuple(range(values.ndim - 1))
  low, high = np.percentile(values, PERCENTILES, axis=axes)
  return (low, high), np.clip(values.mean(axis=axes), low, high)


def _present(batch, name) -> np.ndarray:
  values = batch["inputs"][name][batch["present"][name]]
  if not len(values):
    raise ValueError(f"--modality: no training example has {name!r}.")
  return values


def _transform(opened: Run, name: str, asked: str | None):
  usual = kind(opened.facts, opened.dataset, name)
  chosen = asked or usual
  if chosen is None:
    raise ValueError(
      f"--transforms must say what {name!r} is: log_mel, inertial or skeleton."
    )
  shape = tuple(opened.facts["input_shapes"][name])
  if chosen == "image" and min(shape[:2]) >= PHOTO:
    chosen = "lucid"
  options = {}
  if chosen == "vector":
    std = _present(opened.train, name).std(axis=0)
    options["std"] = tuple(float(value) for value in std.ravel())
  found = transforms_lib.FACTORIES[chosen](**options)
  found.check(shape, name=name)
  return found


def _others(opened: Run, question: Question, names) -> Any:
  rest = [m for m in opened.model.modalities if m not in names]
  if question.others in ("absent", "joint"):
    return question.others if question.others == "absent" or rest else "absent"
  if not rest:
    raise ValueError(
      f"--others: the run has no modality but {question.modality!r}."
    )
  count = len(opened.test["label"])
  if question.others == "average":
    rows = np.linspace(0, count - 1, AVERAGED).round().astype(int)
  else:
    rows = np.array([int(question.others)])
    if rows[0] >= count:
      raise ValueError(
        f"--others must be an item in 0..{count - 1}, got {rows[0]}."
      )
  return {
    "inputs": {m: opened.test["inputs"][m][rows] for m in rest},
    "present": {m: opened.test["present"][m][rows] for m in rest},
  }
