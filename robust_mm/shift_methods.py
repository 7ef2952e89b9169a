"""The methods that ``robust-mm shift`` compares, as changes of one run.

Trained methods are fine-tuning with a few keys changed; derived ones are made
of what others left, without any training.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_collections

from robust_mm import _validate
from robust_mm import config as config_lib

# What the recipes take; there is no signature to read without jax.
_BOTH = (
  *("method", "label_smoothing"),
  *("probe_steps", "probe_lr", "probe_decay"),
)
OPTIONS = MappingProxyType(
  {
    "finetune": (*_BOTH, "trainable", "dropout_rate", "l2_sp"),
    "masd": (
      *_BOTH,
      *("weight", "temperature", "ramp"),
      *("teacher", "teacher_subset", "ema_decay"),
      *("distribution", "include_labelled"),
    ),
  }
)
PROBE_STEPS = 1000  # of both, where config.recipe.options does not say it
# Of config.data: what pretraining has of its own.
_OWN_DATA = {"batch_size", "labelled", "unlabelled_ratio", "unlabelled_splits"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
  """A run of its own for every T and seed.

  Attributes:
    about: what it is, for who reads the page.
    options: ``config.recipe.options`` that change.
    keys: other keys that change.
    changeable: which of these options a study may set otherwise, because they
      are no part of what the method is.
    oracle: whether labels of all modalities are used, which the setting does
      not have: an upper reference, trained once for all T.
  """

  about: str
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  keys: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  changeable: tuple[str, ...] = ()
  oracle: bool = False

  @property
  def recipe(self) -> str:
    """The name of the recipe."""
    return self.keys.get("recipe.name", "finetune")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Between:
  """The model between two phases of a trained method's run (WiSE-FT)."""

  about: str
  of: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ensemble:
  """Mean log-probability of the models of T's single modalities in E.

  The class prior of the training set where E has none of T.
  """

  about: str
  of: str = "finetune"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassMean:
  """The nearest class mean, by cosine, in the pretrained pooled features.

  Means of labelled x_T, queries x_E; no training.
  """

  about: str


_MASD = {
  "recipe.name": "masd",
  "data.unlabelled_splits": ("train",),
}
METHODS = MappingProxyType(
  {
    "finetune": Trained(
      about="plain fine-tuning on labels of T: a linear probe, then all "
      "parameters; what others are measured against"
    ),
    "probe": Trained(
      about="a linear head on frozen features", options={"method": "probe"}
    ),
    "dropout": Trained(
      about="fine-tuning that sees a random part of T at every step; the model "
      "of finetune where T is one modality",
      options={"dropout_rate": 1.0},
      changeable=("dropout_rate",),
    ),
    "masd": Trained(
      about="what the model says of T teaches it about other modalities, on "
      "examples without a label",
      keys=_MASD,
    ),
    "masd_supersets": Trained(
      about="masd, taught by the mean over T and all sets that contain it",
      options={"teacher_subset": "supersets"},
      keys=_MASD,
    ),
    "masd_ema": Trained(
      about="masd, taught by a moving average of its parameters",
      options={"teacher": "ema"},
      keys=_MASD,
    ),
    "masd_published": Trained(
      about="masd at its full weight from the first step on, as published",
      options={"ramp": 0.0},
      keys=_MASD,
    ),
    "masd_labelled": Trained(
      about="masd without other examples: what the model says of T teaches it "
      "about parts of T, on the labelled ones; nothing where T is one modality",
      keys={"recipe.name": "masd"},
    ),
    "masd_control": Trained(
      about="masd whose term is 0, as where examples without a label show "
      "T alone: the same passes, and nothing learnt from those examples",
      options={"weight": 0.0},
      keys=_MASD,
    ),
    "ema": Trained(
      about="fine-tuning; the model is a moving average of its parameters",
      keys={"training.average_decay": 0.999},
    ),
    "l2_sp": Trained(
      about="fine-tuning with a pull towards where it started",
      options={"l2_sp": 0.01},
      changeable=("l2_sp",),
    ),
    "oracle": Trained(
      about="one model for every T, with labels of all modalities and a random "
      "part of them shown at every step: what T does not have, so an upper "
      "reference; its matched score can lie below that of a model of T alone",
      options={"dropout_rate": 1.0},
      changeable=("dropout_rate",),
      oracle=True,
    ),
    "wise_ft": Between(
      about="the weights between the probe and the fine-tuned model of "
      "finetune",
      of="finetune",
    ),
    "masd_wise_ft": Between(
      about="the weights between the probe and the last model of masd",
      of="masd",
    ),
    "ensemble": Ensemble(
      about="the mean log-probability of finetune's models of the single "
      "modalities of T that E has; the class frequencies where it has none"
    ),
    "class_mean": ClassMean(
      about="the nearest class mean in pretrained features; trains nothing"
    ),
  }
)
REFERENCE = "finetune"
EQUAL_COST = ("epochs", "batch")


def is_derived(name: str) -> bool:
  """Whether a method is made of what others left."""
  return not isinstance(METHODS[name], Trained)


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses a study by key: unknown methods, and what they are not made of.

  Raises:
    UserError: naming the key.
  """
  study = config.study
  with _validate.user_errors():
    _validate.at_least(1, **{"config.study.seeds": study.seeds})
    # One replicate has no spread.
    _validate.at_least(2, **{"config.study.num_samples": study.num_samples})
    _validate.in_unit_interval(**{"config.study.alpha": study.alpha})
    _validate.one_of(
      EQUAL_COST, **{"config.study.equal_cost": study.equal_cost}
    )
  names = tuple(study.methods)
  for place, name in enumerate(names):
    if name not in METHODS:
      raise _validate.UserError(
        f"config.study.methods: {name!r} is none of {', '.join(METHODS)}."
        f"{_validate.suggestion(name, METHODS)}"
      )
    if name in names[:place]:
      raise _validate.UserError(f"config.study.methods names {name!r} twice.")
  _check_options(config)
  for name in names:
    _check_made_of(config, name)
  if REFERENCE not in names:
    raise _validate.UserError(
      f"config.study.methods must have {REFERENCE!r}: it is what others are "
      "measured against."
    )


def _check_made_of(config: ml_collections.ConfigDict, name: str) -> None:
  method, study = METHODS[name], config.study
  needed = getattr(method, "of", None)
  if needed is not None and needed not in study.methods:
    raise _validate.UserError(
      f"config.study.methods must have {needed!r} beside {name!r}, which is "
      "made of its runs."
    )
  if isinstance(method, Between):
    way = options(config, needed).get("method", "lp_ft")
    if way != "lp_ft":
      raise _validate.UserError(
        f"config.recipe.options.method (config.study.options.{needed}.method) "
        f"must be 'lp_ft' for {name!r}, which lies between a probe and what "
        f"follows it; got {way!r}."
      )
  if isinstance(method, ClassMean) and not study.pretraining:
    raise _validate.UserError(
      f"config.study.pretraining must be set for {name!r}, which works in "
      "pretrained features."
    )


def _check_options(config: ml_collections.ConfigDict) -> None:
  """Refuses options that a method of the study has no use for, by name."""
  for name, group in config.study.options.items():
    _check_group(config, name, group)
  for name in config.study.methods:
    method = METHODS[name]
    if is_derived(name):
      continue
    for key in config.recipe.options:
      if key not in OPTIONS[method.recipe]:
        raise _validate.UserError(
          f"config.recipe.options.{key} goes to every method of the study, and "
          f"{name!r} takes no such option; config.study.options.METHOD.{key} "
          "goes to one."
          f"{_validate.suggestion(key, OPTIONS[method.recipe])}"
        )


def _check_group(config, name: str, group) -> None:
  path = f"config.study.options.{name}"
  trained = [m for m in config.study.methods if not is_derived(m)]
  if name not in trained:
    why = "trains nothing" if name in METHODS and is_derived(name) else ""
    raise _validate.UserError(
      f"{path}: {name!r} {why or 'is no method of the study'}; those that "
      f"train are {', '.join(trained)}.{_validate.suggestion(name, trained)}"
    )
  if not isinstance(group, ml_collections.ConfigDict):
    raise _validate.UserError(
      f"{path} must be a group of options, as in {path}.probe_lr=0.01; got "
      f"{group!r}."
    )
  method = METHODS[name]
  takes = OPTIONS[method.recipe]
  for key in group:
    if key not in takes:
      raise _validate.UserError(
        f"{path}.{key}: {name!r} takes no such option; it takes "
        f"{', '.join(takes)}.{_validate.suggestion(key, takes)}"
      )
    if key in method.options and key not in method.changeable:
      raise _validate.UserError(
        f"{path}.{key} must be left out: {method.options[key]!r} is what makes "
        f"it {name!r}."
      )


def options(config: ml_collections.ConfigDict, name: str) -> dict[str, Any]:
  """``config.recipe.options`` of a trained method of a study."""
  own = config.study.options.get(name, {})
  return {**config.recipe.options, **METHODS[name].options, **own}


def configured(
  config: ml_collections.ConfigDict,
  name: str,
  labelled: tuple[str, ...],
  modalities: tuple[str, ...],
) -> ml_collections.ConfigDict:
  """The configuration of one run of a trained method.

  Args:
    config: of the study.
    name: of the method.
    labelled: T.
    modalities: all of the data, P.
  """
  method = METHODS[name]
  made = config.copy_and_resolve_references()
  asked = options(config, name)
  if len(labelled) == 1 and not method.oracle:
    # A random part of one modality is that modality: plain fine-tuning.
    asked.pop("dropout_rate", None)
  with made.unlocked():
    del made["study"]
    made.recipe.options = asked
  made.data.labelled = () if method.oracle else labelled
  for key, value in method.keys.items():
    parent = made
    *path, last = key.split(".")
    for part in path:
      parent = parent[part]
    parent[last] = value
  if made.data.unlabelled_splits:
    with made.unlocked():
      made.recipe.options.unlabelled_ratio = made.data.unlabelled_ratio
  share = 3 / passes(made, len(modalities))
  made.num_epochs = _at_least_one(share, made.num_epochs)
  if config.study.equal_cost == "batch":
    # As many updates, each of which costs what one of fine-tuning does.
    made.data.batch_size = _at_least_one(share, made.data.batch_size)
  else:
    made.num_steps = _at_least_one(share, made.num_steps)
  return made


def passes(config: ml_collections.ConfigDict, number: int) -> int:
  """What an update costs, a labelled row of its batch; 3 in fine-tuning.

  A pass of one row forward and backward is 3, one without gradient 1.

  Args:
    config: of one run, :func:`configured`.
    number: of modalities.
  """
  if config.recipe.name != "masd":
    return 3
  asked = config.recipe.options
  beside = config.data.unlabelled_ratio if config.data.unlabelled_splits else 0
  taught = 1  # passes of the teacher over every row it teaches on
  if asked.get("teacher_subset") == "supersets":
    taught = 2 ** (number - (len(config.data.labelled) or number))
  # The teacher that is then frozen is fine-tuned for as many updates.
  before = 3 if asked.get("teacher") == "frozen" else 0
  if (
    not beside
  ):  # labelled rows pass once for their label and once to be taught
    return before + 3 + 3 + taught
  return before + 3 * (1 + beside) + taught * beside


def pretraining(
  config: ml_collections.ConfigDict, seed: int = 0
) -> ml_collections.ConfigDict:
  """The configuration that ``config.study.pretraining`` names, on one's data.

  Data set, splits, modalities and limits are those of the study, so that no
  example is pretrained on that the study does not train on.

  Raises:
    UserError: naming that key.
  """
  try:
    found = config_lib.load(config.study.pretraining, [f"--config.seed={seed}"])
  except _validate.UserError as error:
    said = str(error).removeprefix("--config").lstrip(": ")
    raise _validate.UserError(f"config.study.pretraining: {said}") from error
  with found.unlocked():
    for key in set(config.data) - _OWN_DATA:
      found.data[key] = config.data[key]
    if "validation" in config.data.train_splits:
      found.selection.metric = "last"  # nothing is left to select on
  config_lib.check(found)
  return found


def _at_least_one(share: float, number: int) -> int:
  return number and max(1, round(share * number))
