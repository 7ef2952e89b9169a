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

# An update of MASD passes 2 rows for one of fine-tuning, forward and backward
# (3 units each), and both once more without gradient (1 unit).
_MASD_SHARE = 3 / 8

# Of config.data: what pretraining has of its own.
_OWN_DATA = {"batch_size", "labelled", "unlabelled_ratio", "unlabelled_splits"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
  """A run of its own for every T and seed.

  Attributes:
    about: what it is, for who reads the page.
    options: ``config.recipe.options`` that change.
    keys: other keys that change.
    share: of the epochs, for an equal number of passes.
    oracle: whether labels of all modalities are used, which the setting does
      not have: an upper reference, trained once for all T.
  """

  about: str
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  keys: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  share: float = 1.0
  oracle: bool = False

  def configure(
    self, config: ml_collections.ConfigDict, labelled: tuple[str, ...]
  ) -> ml_collections.ConfigDict:
    """The configuration of the run with labels on ``labelled``."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
      del config["study"]
      config.recipe.options.update(self.options)
    config.data.labelled = () if self.oracle else labelled
    for key, value in self.keys.items():
      parent = config
      *path, last = key.split(".")
      for name in path:
        parent = parent[name]
      parent[last] = value
    for name in ("num_epochs", "num_steps"):
      config[name] = _at_least_one(self.share, config[name])
    return config


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
      about="fine-tuning that sees a random part of T at every step",
      options={"dropout_rate": 1.0},
    ),
    "masd": Trained(
      about="what the model says of T teaches it about other modalities, on "
      "examples without a label",
      keys=_MASD,
      share=_MASD_SHARE,
    ),
    "masd_supersets": Trained(
      about="masd, taught by the mean over T and all sets that contain it",
      options={"teacher_subset": "supersets"},
      keys=_MASD,
      share=_MASD_SHARE,
    ),
    "masd_ema": Trained(
      about="masd, taught by a moving average of its parameters",
      options={"teacher": "ema"},
      keys=_MASD,
      share=_MASD_SHARE,
    ),
    "masd_published": Trained(
      about="masd at its full weight from the first step on, as published",
      options={"ramp": 0.0},
      keys=_MASD,
      share=_MASD_SHARE,
    ),
    "ema": Trained(
      about="fine-tuning; the model is a moving average of its parameters",
      keys={"training.average_decay": 0.999},
    ),
    "l2_sp": Trained(
      about="fine-tuning with a pull towards where it started",
      options={"l2_sp": 0.01},
    ),
    "oracle": Trained(
      about="one model for every T, with labels of all modalities and a random "
      "part of them shown at every step: what T does not have, so an upper "
      "reference; its matched score can lie below that of a model of T alone",
      options={"dropout_rate": 1.0},
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
  names = tuple(study.methods)
  for place, name in enumerate(names):
    if name not in METHODS:
      raise _validate.UserError(
        f"config.study.methods: {name!r} is none of {', '.join(METHODS)}."
        f"{_validate.suggestion(name, METHODS)}"
      )
    if name in names[:place]:
      raise _validate.UserError(f"config.study.methods names {name!r} twice.")
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
  probed = config.recipe.options.get("method", "lp_ft") == "lp_ft"
  if isinstance(method, Between) and not probed:
    raise _validate.UserError(
      f"config.recipe.options.method must be 'lp_ft' for {name!r}, which lies "
      "between a probe and what follows it."
    )
  if isinstance(method, ClassMean) and not study.pretraining:
    raise _validate.UserError(
      f"config.study.pretraining must be set for {name!r}, which works in "
      "pretrained features."
    )


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


def budgets(config: ml_collections.ConfigDict) -> dict[str, dict[str, float]]:
  """What training every method of a study costs.

  Returns:
    ``{method: {"epochs", "steps", "relative_cost"}}``: how long it trains (one
    of the two is 0), and how many times the passes of plain fine-tuning an
    epoch, or a step, takes. A pass forward and backward is 3, one without
    gradient 1.
  """
  found = {}
  for name in config.study.methods:
    method = METHODS[name]
    if isinstance(method, Trained):
      made = method.configure(config, ())
      found[name] = {
        "epochs": made.num_epochs,
        "steps": made.num_steps,
        "relative_cost": 1 / method.share,
      }
  return found


def budget_lines(config: ml_collections.ConfigDict) -> list[str]:
  """The same as sentences."""
  found = []
  for name, cost in budgets(config).items():
    unit = "epoch" if cost["epochs"] else "step"
    number = cost["epochs"] or cost["steps"]
    line = f"{name}: {number} {unit}{'' if number == 1 else 's'}"
    times = cost["relative_cost"]
    if times != 1:
      line += f"; each costs {times:.2f} times one of {REFERENCE}"
    found.append(f"{line}.")
  return found


def _at_least_one(share: float, number: int) -> int:
  return number and max(1, round(share * number))
