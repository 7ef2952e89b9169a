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

# An update of MASD passes 2 rows for one of fine-tuning, forward and backward
# (3 units each), and both once more without gradient (1 unit).
_MASD_SHARE = 3 / 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
  """A run of its own for every T and seed.

  Attributes:
    options: ``config.recipe.options`` that change.
    keys: other keys that change.
    share: of the epochs, for an equal number of passes.
    oracle: whether labels of all modalities are used, which the setting does
      not have: an upper reference, trained once for all T.
  """

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


@dataclasses.dataclass(frozen=True)
class Between:
  """The model between two phases of a trained method's run (WiSE-FT)."""

  of: str


@dataclasses.dataclass(frozen=True)
class Ensemble:
  """Mean log-probability of the models of T's single modalities in E.

  The class prior of the training set where E has none of T.
  """

  of: str = "finetune"


@dataclasses.dataclass(frozen=True)
class ClassMean:
  """The nearest class mean, by cosine, in the pretrained pooled features.

  Means of labelled x_T, queries x_E; no training.
  """


_MASD = {
  "recipe.name": "masd",
  "data.unlabelled_splits": ("train",),
}
METHODS = MappingProxyType(
  {
    "finetune": Trained(),
    "probe": Trained(options={"method": "probe"}),
    "dropout": Trained(options={"dropout_rate": 1.0}),
    "masd": Trained(keys=_MASD, share=_MASD_SHARE),
    "masd_supersets": Trained(
      options={"teacher_subset": "supersets"}, keys=_MASD, share=_MASD_SHARE
    ),
    "masd_ema": Trained(
      options={"teacher": "ema"}, keys=_MASD, share=_MASD_SHARE
    ),
    "masd_published": Trained(
      options={"ramp": 0.0}, keys=_MASD, share=_MASD_SHARE
    ),
    "ema": Trained(keys={"training.average_decay": 0.999}),
    "l2_sp": Trained(options={"l2_sp": 0.01}),
    "oracle": Trained(options={"dropout_rate": 1.0}, oracle=True),
    "wise_ft": Between("finetune"),
    "masd_wise_ft": Between("masd"),
    "ensemble": Ensemble(),
    "class_mean": ClassMean(),
  }
)
REFERENCE = "finetune"


def check(names: tuple[str, ...], *, pretrained: bool) -> None:
  """Refuses unknown methods, and those that lack what they are made of.

  Raises:
    UserError: naming the key.
  """
  for name in names:
    if name not in METHODS:
      raise _validate.UserError(
        f"config.study.methods: {name!r} is none of {', '.join(METHODS)}."
        f"{_validate.suggestion(name, METHODS)}"
      )
    method = METHODS[name]
    needed = getattr(method, "of", None)
    if needed is not None and needed not in names:
      raise _validate.UserError(
        f"config.study.methods must have {needed!r} beside {name!r}, which is "
        "made of its runs."
      )
    if isinstance(method, ClassMean) and not pretrained:
      raise _validate.UserError(
        f"config.study.pretraining must be set for {name!r}, which works in "
        "pretrained features."
      )
  if REFERENCE not in names:
    raise _validate.UserError(
      f"config.study.methods must have {REFERENCE!r}: it is what others are "
      "measured against."
    )


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
  return [
    f"{name}: {cost['epochs'] or cost['steps']} "
    f"{'epochs' if cost['epochs'] else 'steps'} of {cost['relative_cost']:.2f} "
    "times the passes of fine-tuning"
    for name, cost in budgets(config).items()
  ]


def _at_least_one(share: float, number: int) -> int:
  return number and max(1, round(share * number))
