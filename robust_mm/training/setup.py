"""The door: a configuration becomes a data source, a model and a recipe."""

import dataclasses
import pathlib
from typing import Any

import ml_collections
import numpy as np

from robust_mm import _tasks
from robust_mm import _validate
from robust_mm import config_checks
from robust_mm import corruptions
from robust_mm import data
from robust_mm import missing as missing_lib
from robust_mm import models
from robust_mm import recipes
from robust_mm._types import Model
from robust_mm._types import Target
from robust_mm.training import labels as labels_lib
from robust_mm.training import runs
from robust_mm.training import starts
from robust_mm.training import units

REFERENCE_SIZE = 2048
# Facts about the inputs, {key of run.json: what it holds}.
INPUTS = {"input_shapes": "shapes", "kinds": "kinds", "value_range": "ranges"}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
  """What a run works with.

  Attributes:
    train: training source.
    validation: validation source.
    model: the model.
    facts: what ``run.json`` keeps so that the model can be made again without
      the data: shapes, classes, ranges, normalisation, relative units.
    reference: a class-balanced part of the training set, as host arrays.
  """

  train: Any
  validation: Any
  model: Model
  facts: dict
  reference: dict


def prepare(config: ml_collections.ConfigDict) -> Setup:
  """Data, then the model that fits it.

  Raises:
    UserError: one sentence naming the key, file or argument.
  """
  earlier = starts.check(config)
  train = open_split(config, "train")
  config_checks.check_task(config, train.task)
  check_missing(config, train)
  validation = open_split(config, "validation")
  reference = reference_batch(train)
  normalization = {
    name: models.fit_normalization(
      config.model.normalization, value, reference["present"][name]
    )
    for name, value in reference["inputs"].items()
  }
  facts = {
    "dataset": config.data.name,
    **labels_lib.describe(train),
    "num_train": len(train),
    "num_validation": len(validation),
    **_describe_inputs(train),
    "vocabulary": {
      name: int(train.select((name,)).batch()["inputs"][name].max()) + 1
      for name, value in reference["inputs"].items()
      if np.issubdtype(value.dtype, np.integer)
    },
    "normalization": {n: v.to_json() for n, v in normalization.items()},
    **{units.key(norm): units.typical(reference, norm) for norm in units.NORMS},
    "notes": [
      *train.notes,
      *labels_lib.notes(train),
      *split_notes(config, "validation"),
    ],
  }
  facts = starts.adopt(facts, earlier, config)
  model = make_model(config, facts, pretrained=not config.init_from)
  _check_target(config, model)
  # Facts are of all inputs, which need no labels; what is trained and selected
  # on is of the labelled modalities alone.
  train = starts.labelled(config, train)
  validation = starts.labelled(config, validation)
  return Setup(
    train=train,
    validation=validation,
    model=model,
    facts=facts,
    reference=reference_batch(train),
  )


def _check_target(config, model) -> None:
  """The sentence of an attack on captions, before anything is trained."""
  target = config.evaluation.captions.target
  if not target or model.captions is None:
    return
  try:
    model.captions.ids(target)
  except ValueError as error:
    key = "config.evaluation.captions.target"
    raise _validate.UserError(f"{key}: {error}") from error


def _describe_inputs(source) -> dict:
  """Shapes, kinds and ranges of the inputs of a split, for ``run.json``."""
  spec = source.spec
  return {
    "input_shapes": {n: list(shape) for n, (shape, _) in spec.items()},
    "kinds": {
      name: "tokens" if np.issubdtype(dtype, np.integer) else "float"
      for name, (_, dtype) in spec.items()
    },
    "value_range": {
      name: None if bounds is None else [float(b) for b in bounds]
      for name, bounds in source.value_range.items()
    },
  }


def train_splits(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """The splits that are trained on."""
  # Runs of earlier versions do not state them.
  return tuple(config.data.get("train_splits", ("train",)))


def split_notes(config: ml_collections.ConfigDict, split: str) -> list[str]:
  """What has to be said before numbers of a split are shown."""
  if split == "train" or split not in train_splits(config):
    return []
  return [
    f"{split} examples are trained on (config.data.train_splits): what is "
    f"measured on them says nothing about new ones."
  ]


def recipe_notes(
  config: ml_collections.ConfigDict, recipe: recipes.Recipe
) -> list[str]:
  """What a recipe cannot do, or does with validation examples trained on."""
  notes = []
  if config.recipe.name == "masd" and not config.data.unlabelled_splits:
    notes.append(
      "config.data.unlabelled_splits names no split: masd teaches parts of the "
      "labelled modalities alone."
    )
  if config.recipe.name == "masd" and not config.data.labelled:
    notes.append(
      "config.data.labelled names no modality, so all have labels: masd "
      "teaches sets of them, and no modality that is new."
    )
  if "validation" not in train_splits(config):
    return notes
  for phase in recipe.phases:
    work = [
      f"the {job.name} job" for job in phase.jobs if job.source == "validation"
    ]
    work += ["acceptance"] if phase.judge is not None else []
    if work:
      notes.append(
        f"phase {phase.name} uses validation examples, which are trained on "
        f"here, for {' and '.join(work)}."
      )
  return notes


def reference_batch(train) -> dict:
  """A class-balanced part of the training set, the same in every process."""
  return train.limit(REFERENCE_SIZE).batch()


def open_split(
  config: ml_collections.ConfigDict, split: str, *, limit: int | None = None
):
  """The data source of one split, as the configuration says.

  ``train`` is all that is trained on, which may include the validation split.
  """
  is_train = split == "train"
  limit = limit or (
    config.data.max_train_examples
    if is_train
    else config.data.max_eval_examples
  )
  parts = [
    data.open_source(
      config.data.name,
      part,
      path=config.data.path or None,
      modalities=tuple(config.data.modalities) or None,
    )
    for part in (train_splits(config) if is_train else (split,))
  ]
  source = data.concatenate(parts).limit(limit or None)
  if config.data.missing_rate and is_train:
    missing = data.transforms.missing_at_random(
      config.data.missing_rate, seed=config.seed
    )
    source = source.with_transforms((missing,))
  return source


def check_missing(config: ml_collections.ConfigDict, source) -> None:
  """UserError where the data have not what is to be lost in an evaluation."""
  settings = config.evaluation
  if settings.missing_rates:
    lengths = corruptions.lengths(source.spec)
    try:
      missing_lib.check_protocol(
        settings.missing_protocol, source.spec, lengths
      )
    except ValueError as error:
      raise _validate.UserError(f"config.evaluation.{error}") from error


def check_same_data(source, facts: dict) -> None:
  """UserError where a split has other inputs or classes than the run had.

  Ranges count: pixels that were floats when the run was trained and are uint8
  now, or the other way round, may have another scale.
  """
  found = _describe_inputs(source)
  for key, what in INPUTS.items():
    if found[key] != facts[key]:
      raise _validate.UserError(
        f"the data has inputs of {what} {found[key]}, the run was trained on "
        f"{facts[key]}."
      )
  if source.task != runs.task(facts):
    raise _validate.UserError(
      f"the data has labels for {source.task}, the run was trained for "
      f"{runs.task(facts)}."
    )
  # Of classes, one an example, those of the highest numbers may be lacking.
  differs = source.num_classes != facts["num_classes"]
  lacking = source.task != _tasks.MULTI_LABEL
  if differs and not (lacking and source.num_classes < facts["num_classes"]):
    raise _validate.UserError(
      f"the data has {source.num_classes} classes, the run was trained on "
      f"{facts['num_classes']}."
    )


def chosen_alone(config: ml_collections.ConfigDict, group) -> dict:
  """What a group says by modality, without those that were not chosen.

  A configuration names all modalities of its data set; who takes some of them
  need not take the others out of it.
  """
  found = group.to_dict()
  if config.data.modalities:
    known = set(data.registry.get(config.data.name).modalities)
    for name in known - set(config.data.modalities):
      found.pop(name, None)
  return found


def make_model(
  config: ml_collections.ConfigDict, facts: dict, *, pretrained: bool = True
) -> Model:
  """The model of a configuration for data with the given facts.

  Args:
    config: of a run.
    facts: of its data.
    pretrained: whether ``init`` reads the files that encoders name as their
      ``weights``. A run that has parameters of its own needs them no longer.
  """
  encoders = chosen_alone(config, config.model.encoders)
  default = encoders.pop("default", None)
  names = tuple(facts["input_shapes"])
  for name in encoders:
    if name not in names:
      raise _validate.UserError(
        f"config.model.encoders names the modality {name!r}; the data has "
        f"{', '.join(names)}.{_validate.suggestion(name, names)}"
      )
  chosen = {name: encoders.get(name, default) for name in names}
  for name, value in chosen.items():
    if value is None:
      raise _validate.UserError(
        f"config.model.encoders has no entry for modality {name!r} and no "
        f"'default'."
      )
  chosen = {
    name: automatic(
      value,
      facts["input_shapes"][name],
      facts["kinds"][name],
      facts["vocabulary"].get(name),
    )
    for name, value in chosen.items()
  }
  for name, encoder in chosen.items():
    tokens = facts["kinds"][name] == "tokens"
    if tokens and encoder["name"] not in ("transformer", "patches"):
      raise _validate.UserError(
        f"config.model.encoders.{name}: integer tokens need the encoder "
        f"'transformer' (or 'patches', with the fusion 'transformer'), got "
        f"{encoder['name']!r}."
      )
  if not pretrained:
    for encoder in chosen.values():
      encoder.pop("weights", None)
  target = None
  if runs.task(facts) == _tasks.REGRESSION:
    target = Target(**facts["target"])
  model = models.build(
    fusion=config.model.fusion,
    encoders=chosen,
    num_classes=1 if target else facts["num_classes"],
    input_shapes={n: tuple(s) for n, s in facts["input_shapes"].items()},
    normalization={
      name: models.Normalization.from_json(value)
      for name, value in facts["normalization"].items()
    },
    fusion_options=config.model.fusion_options.to_dict(),
    target=target,
  )
  if runs.task(facts) == _tasks.MULTI_LABEL:
    return models.multi_label(model)
  return model


_BY_RANK = {1: "mlp", 2: "temporal_cnn", 3: "cnn", 4: "cnn"}


def automatic(
  encoder: dict, shape: list[int], kind: str, vocabulary: int | None = None
) -> dict:
  """An encoder named ``auto`` or ``lipschitz_auto``, chosen by the input.

  Vectors get an MLP, ``[t, d]`` a temporal CNN, ``[h, w, c]`` and
  ``[t, h, w, c]`` a CNN, integer tokens a transformer. ``patches`` stays, and
  is told the vocabulary of integer tokens.
  """
  if encoder["name"] == "patches" and kind == "tokens":
    return {"vocabulary_size": vocabulary, **encoder}
  if encoder["name"] not in ("auto", "lipschitz_auto"):
    return encoder
  lipschitz = encoder["name"] == "lipschitz_auto"
  if kind == "tokens":
    if lipschitz:
      raise _validate.UserError(
        f"lipschitz_auto: signed integers of shape {shape} are read as tokens, "
        f"which have no 1-Lipschitz encoder; save pixels as uint8 or uint16, "
        f"or leave that modality out of config.data.modalities."
      )
    return {"vocabulary_size": vocabulary, **encoder, "name": "transformer"}
  if len(shape) not in _BY_RANK:
    raise _validate.UserError(
      f"auto: an input of shape {shape} has no encoder; name one in "
      f"config.model.encoders."
    )
  prefix = "lipschitz_" if lipschitz else ""
  return {**encoder, "name": prefix + _BY_RANK[len(shape)]}


def value_range(facts: dict) -> dict | None:
  """``{modality: (low, high)}`` of those with bounds, or None."""
  bounded = {n: tuple(b) for n, b in facts["value_range"].items() if b}
  return bounded or None


def restore_model(workdir: pathlib.Path):
  """(model, config, facts) of a run, from its folder alone."""
  config = runs.read_config(workdir)
  facts = runs.describe(workdir)
  return make_model(config, facts, pretrained=False), config, facts
