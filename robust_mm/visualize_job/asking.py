"""What is asked of a run, and what of its data that needs."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from robust_mm import _validate
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
_CHANNELS = 4  # an image has no more
TUNING = (
  *("num_transforms", "learning_rate", "step_size", "every", "tv_weight"),
  *("l2_weight", "annealing", "blur_every", "num_held_out"),
)
_COUNTS = ("num_transforms", "every", "blur_every", "num_held_out")


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
    ranges: ``((option, value), ...)`` of the transformation of the modality.
    tuning: ``((option, value), ...)`` of ``class_visualization``.
    transfer: folders of other runs that judge what is made.
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
  ranges: tuple[tuple[str, Any], ...] = ()
  tuning: tuple[tuple[str, Any], ...] = ()
  transfer: tuple[str, ...] = ()
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
    others: ``(model, params, state)`` of the runs that judge.
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
  others: tuple = ()


def kind(facts: Mapping, dataset: str, name: str) -> str | None:
  """The kind of a modality's transformations; None where nothing says."""
  found = _stated(dataset, name)
  if found is not None:
    return found
  shape = facts["input_shapes"][name]
  if len(shape) == 3 and shape[-1] > _CHANNELS:
    return None  # frames of depth, say
  return _BY_RANK.get(len(shape))


def _stated(dataset: str, name: str) -> str | None:
  """What the data set says, or the name of a sequence."""
  known = data.registry.get(dataset).modalities.get(name)
  if known is not None and known.kind in KINDS:
    return KINDS[known.kind]
  return name if name in _SEQUENCES else None


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


def open_others(question: Question, opened: Run, own: Any) -> tuple:
  """``(model, params, state)`` of the runs that judge what is made.

  Raises:
    UserError: the run itself, or one of other classes or modalities.
  """
  found = []
  for folder in question.transfer:
    if pathlib.Path(folder).resolve() == pathlib.Path(own).resolve():
      raise _validate.UserError(
        f"--transfer={folder} is the run itself; name another."
      )
    model, params, state, _ = training.load(folder)
    if model.num_classes != opened.model.num_classes:
      raise _validate.UserError(
        f"--transfer={folder} has {model.num_classes} classes, not "
        f"{opened.model.num_classes}."
      )
    if question.modality not in model.modalities:
      raise _validate.UserError(
        f"--transfer={folder} has no modality {question.modality!r}."
      )
    found.append((model, params, state))
  return tuple(found)


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
    chosen[name] = _transform(opened, question, name)
  shapes = {m: tuple(s) for m, s in facts["input_shapes"].items()}
  photo = chosen[names[0]].kind in ("image", "lucid") and _photo(
    shapes[names[0]]
  )
  others, items = _others(opened, question, names)
  published = question.fidelity == "published"
  auto = question.objective_scale == "auto" and not published
  options = {
    "shape": {name: shapes[name] for name in names},
    "mode": question.mode,
    "objective": question.objective,
    "others": others,
    "parameterization": question.parameterization,
    "fidelity": question.fidelity,
    # What was published knows no scale.
    "objective_scale": "auto" if auto else _number(question.objective_scale),
    "items": opened.train,
    "value_range": ranges,
    "reference": references,
    "num_steps": question.num_steps or (512 if photo else 256),
  }
  if photo:
    options |= {"num_transforms": 8, "l2_weight": 0.1 if auto else 1.0}
    if question.mode == "in_place":
      options |= {"every": 16, "step_size": 0.01}
  return {
    "names": names,
    "transforms": chosen,
    "held_out": _held_out(chosen, shapes, references),
    "items": items,
    "options": options | _tuned(question.tuning),
  }


def _number(scale: float | str) -> float:
  return 1.0 if isinstance(scale, str) else scale


def _tuned(tuning) -> dict:
  """Options of the ascent; whole numbers where they count something."""
  found = {}
  for name, value in tuning:
    if name not in TUNING:
      raise ValueError(
        f"--tuning must be of {', '.join(TUNING)}; got {name!r}."
        f"{_validate.suggestion(name, TUNING)}"
      )
    whole = name in _COUNTS and float(value).is_integer()
    found[name] = int(value) if whole else value
  return found


def _held_out(chosen, shapes, references) -> dict:
  """``{what: transform}``, or ``{what: {m: transform}}`` of several."""
  tests = {
    name: transforms_lib.held_out(
      transform, shapes[name], fill=float(np.mean(references[name]))
    )
    for name, transform in chosen.items()
  }
  if len(tests) == 1:
    return next(iter(tests.values()))
  return {
    what: {name: test[what] for name, test in tests.items()}
    for what in ("near", "far")
    if all(what in test for test in tests.values())
  }


def _range(opened: Run, name: str):
  """(low, high) and the reference value: what is stated, or of the data."""
  bounds = opened.facts["value_range"].get(name)
  shape = opened.facts["input_shapes"][name]
  if bounds:
    middle = (bounds[0] + bounds[1]) / 2
    return tuple(bounds), middle if _photo(shape) else float(bounds[0])
  values = _present(opened.train, name)
  axes = tuple(range(values.ndim - 1))
  low, high = np.percentile(values, PERCENTILES, axis=axes)
  return (low, high), np.clip(values.mean(axis=axes), low, high)


def _photo(shape) -> bool:
  return len(shape) == 3 and min(shape[:2]) >= PHOTO


def _present(batch, name) -> np.ndarray:
  values = batch["inputs"][name][batch["present"][name]]
  if not len(values):
    raise ValueError(f"--modality: no training example has {name!r}.")
  return values


def _transform(opened: Run, question: Question, name: str):
  """What keeps a class of a modality, in ranges that fit its size."""
  own = name == question.modality
  asked = question.transforms if own else None
  chosen = asked or kind(opened.facts, opened.dataset, name)
  if chosen is None:
    raise ValueError(
      f"--transforms must say what {name!r} is: depth, image, inertial, "
      "log_mel or skeleton."
    )
  stated = _stated(opened.dataset, name)
  if stated is not None and chosen not in _fitting(stated):
    raise ValueError(
      f"--transforms: {chosen} is for other inputs; {name!r} takes "
      f"{' or '.join(_fitting(stated))}."
    )
  shape = tuple(opened.facts["input_shapes"][name])
  photo = chosen == "image" and _photo(shape)
  if photo and asked is None and question.fidelity == "corrected":
    chosen = "lucid"
  options = {}
  if chosen == "identity":
    options["of"] = kind(opened.facts, opened.dataset, name)
  if chosen == "image" and len(shape) == 3:
    options["jitter"] = 2 * min(shape[:2]) / 28  # as held-out tests are
    if question.mode == "in_place":
      options |= {"rotation": 10.0, "scale": (0.9, 1.1)}
  if chosen == "vector":
    std = _present(opened.train, name).std(axis=0)
    options["std"] = tuple(float(value) for value in std.ravel())
  found = transforms_lib.FACTORIES[chosen](**options)
  found.check(shape, name=name)
  ranges = dict(question.ranges) if own else {}
  known = [option for option, _ in found.options if option != "of"]
  for option in ranges:
    if option not in known:
      raise ValueError(
        f"--ranges: {chosen} has {', '.join(known) or 'none'}; got {option!r}."
      )
  return found.replace(**ranges)


def _fitting(stated: str) -> tuple[str, ...]:
  """Kinds that inputs of a stated one may be taken for."""
  photos = ("lucid",) if stated == "image" else ()
  return (stated, *photos, "identity")


def _others(opened: Run, question: Question, names) -> tuple[Any, list]:
  """``others`` of ``class_visualization``, and what items those are."""
  rest = [m for m in opened.model.modalities if m not in names]
  if question.others in ("absent", "joint"):
    return question.others, []
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
  others = {
    "inputs": {m: opened.test["inputs"][m][rows] for m in rest},
    "present": {m: opened.test["present"][m][rows] for m in rest},
  }
  items = [
    {
      "item": int(row),
      "id": opened.test["id"][row].item(),
      "class": int(opened.test["label"][row]),
    }
    for row in rows
  ]
  return others, items
