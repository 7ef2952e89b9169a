"""What the values of a configuration may be; jax is not imported here."""

import re

import ml_collections

from robust_mm import _tasks
from robust_mm import _validate
from robust_mm.augmentations import options as augmentation_options

RECIPES = (
  "captioning",
  "joint",
  "crmt",
  "certified_radius",
  "modal_immune",
  "pretrain",
  "finetune",
  "masd",
  "nullspace",
)
FUSIONS = (
  "captioner",
  "concat",
  "masked",
  "orthogonal",
  "token",
  "transformer",
  "trunk",
)
ATTACKS = ("apgd", "auto", "fgm", "minimum_norm", "pgd", "square")
ATTACK_LOSSES = ("margin", "cross_entropy", "dlr")
MISSING_PROTOCOLS = ("per_sample", "one_kept", "per_batch", "frames")
CORRUPTIONS = ("none", "suite", "together", "correlated")
CERTIFICATES = (
  "auto",
  "global",
  "local",
  "relaxation",
  "best",
  "empirical",
  "smoothing",
  "none",
)
TRAIN_SPLITS = (("train",), ("train", "validation"))
SELECTION_METRICS = (
  "auto",
  "accuracy",
  "certified_accuracy",
  "exact_match",
  "mae",
  "correlation",
  "map",
  "mean_over_subsets",
  "loss",
  "last",
)

# What only one of the tasks has; not "loss", "last" and over subsets.
_METRICS = {
  _tasks.CLASSIFICATION: ("accuracy", "certified_accuracy", "exact_match"),
  _tasks.REGRESSION: ("mae", "correlation"),
  _tasks.MULTI_LABEL: ("map",),
}
# Of those that do not classify.
_OTHERS_TAKE = {
  "recipe.name": ("joint", "modal_immune", "pretrain", "finetune", "masd"),
  "model.fusion": ("concat", "masked", "token", "transformer"),
  "evaluation.certificate": ("auto", "none"),  # the same there
}


def selection_metric(config: ml_collections.ConfigDict, task: str) -> str:
  """``config.selection.metric`` as validation names it for the task.

  >>> config = ml_collections.ConfigDict(
  ...   {"selection": {"metric": "auto"}, "recipe": {"name": "joint"}})
  >>> selection_metric(config, "regression")
  'mae'
  """
  metric = config.selection.metric
  if metric == "auto":
    if config.recipe.name == "captioning":
      return "exact_match"
    return _tasks.MAIN[task]
  if metric == "mean_over_subsets" and task != _tasks.CLASSIFICATION:
    return f"{_tasks.MAIN[task]}_over_subsets"
  return metric


def mispairs(config: ml_collections.ConfigDict) -> bool:
  """Whether captions are of modalities in new pairs, as the recipe has it."""
  return config.recipe.options.get("mispair", True)


def check_task(config: ml_collections.ConfigDict, task: str) -> None:
  """Refuses, by key, what the task of the data does not have.

  Args:
    config: of the run.
    task: as ``Model.task`` says it.

  Raises:
    UserError: one sentence.
  """
  for other, wrong in _METRICS.items():
    if other != task and config.selection.metric in wrong:
      raise _other_task(config, "selection.metric", task)
  others = task != _tasks.CLASSIFICATION
  for key, known in _OTHERS_TAKE.items() if others else ():
    group, name = key.split(".")
    if config[group][name] not in known:
      raise _other_task(config, key, task, known)


def _other_task(config, key: str, task: str, known=()) -> Exception:
  group, name = key.split(".")
  labels = _tasks.LABELS[task]
  listed = f", which take {', '.join(map(repr, known))}" if known else ""
  return _validate.UserError(
    f"config.{key} must not be {config[group][name]!r} here: the labels of "
    f"{config.data.name} are {labels}{listed}."
  )


def check(config: ml_collections.ConfigDict) -> None:
  """Refuses values by the name of their key; the keys are known to be there.

  Raises:
    ValueError: one sentence.
  """
  _validate.one_of(RECIPES, **{"config.recipe.name": config.recipe.name})
  _validate.one_of(FUSIONS, **{"config.model.fusion": config.model.fusion})
  _validate.one_of(
    SELECTION_METRICS, **{"config.selection.metric": config.selection.metric}
  )
  _validate.one_of(
    ("raw", "relative"), **{"config.evaluation.units": config.evaluation.units}
  )
  _validate.one_of(
    ("l2", "linf"), **{"config.evaluation.norm": config.evaluation.norm}
  )
  settings = config.evaluation
  _validate.one_of(ATTACKS, **{"config.evaluation.attack": settings.attack})
  _validate.one_of(ATTACK_LOSSES, **{"config.evaluation.loss": settings.loss})
  _validate.one_of(
    CERTIFICATES, **{"config.evaluation.certificate": settings.certificate}
  )
  _validate.at_least(
    1,
    **{
      "config.evaluation.num_steps": settings.num_steps,
      "config.evaluation.num_restarts": settings.num_restarts,
      "config.evaluation.num_queries": settings.num_queries,
      "config.evaluation.strength": settings.strength,
      "config.evaluation.batch_size": settings.batch_size,
      "config.data.batch_size": config.data.batch_size,
      "config.training.log_every": config.training.log_every,
      "config.training.eval_every": config.training.eval_every,
      "config.training.checkpoint_every": config.training.checkpoint_every,
      "config.training.keep_checkpoints": config.training.keep_checkpoints,
    },
  )
  _validate.at_least(
    0, **{"config.evaluation.masking_examples": settings.masking_examples}
  )
  augmentation_options.check(
    config.augmentation.to_dict(), "config.augmentation"
  )
  _check_length(config)
  _check_train_splits(config)
  _check_unlabelled(config)
  _check_pretraining(config)
  _check_captions(config)
  _check_spelling(settings.captions)
  _check_smoothing(settings.smoothing)
  _check_penalty(config)
  _validate.positive(**{"config.optimizer.lr": config.optimizer.lr})
  _validate.non_negative(
    **{
      "config.selection.radius": config.selection.radius,
      "config.optimizer.weight_decay": config.optimizer.weight_decay,
      "config.optimizer.clip_norm": config.optimizer.clip_norm,
    },
  )
  _validate.in_unit_interval(
    **{"config.data.missing_rate": config.data.missing_rate}
  )
  _validate.below_one(
    **{"config.training.average_decay": config.training.average_decay}
  )
  for key in ("radii", "tightness"):
    for value in config.evaluation[key]:
      if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _validate.UserError(
          f"config.evaluation.{key} must be numbers such as 0.1,0.5; got "
          f"{value!r}."
        )
      _validate.positive(**{f"config.evaluation.{key}": value})
  _check_shifts(settings)
  _check_rules(config.mesh.rules)


def _check_length(config: ml_collections.ConfigDict) -> None:
  _validate.at_least(0, **{"config.num_epochs": config.num_epochs})
  if not config.num_epochs:
    _validate.at_least(1, **{"config.num_steps": config.num_steps})
  elif config.num_steps:
    raise _validate.UserError(
      f"config.num_steps ({config.num_steps}) and config.num_epochs "
      f"({config.num_epochs}) both set the length of training; set the other "
      f"one to 0."
    )


def _check_unlabelled(config: ml_collections.ConfigDict) -> None:
  splits = tuple(config.data.unlabelled_splits)
  for split in splits:
    _validate.one_of(
      ("train", "validation"), **{"config.data.unlabelled_splits": split}
    )
  if (
    "train" in splits
    and splits.count("validation")
    and ("validation" in config.data.train_splits)
  ):
    raise _validate.UserError(
      "config.data.unlabelled_splits must not name validation beside train "
      "where config.data.train_splits has it already."
    )
  _validate.at_least(
    1, **{"config.data.unlabelled_ratio": config.data.unlabelled_ratio}
  )
  if splits and config.recipe.name != "masd":
    raise _validate.UserError(
      "config.data.unlabelled_splits must name nothing but for recipe 'masd'; "
      f"got {splits!r} for {config.recipe.name!r}."
    )


def _check_train_splits(config: ml_collections.ConfigDict) -> None:
  splits = config.data.train_splits
  if splits not in TRAIN_SPLITS:
    raise _validate.UserError(
      f"config.data.train_splits must be one of "
      f"{' and '.join(map(repr, TRAIN_SPLITS))}; got {splits!r}."
    )
  metric = config.selection.metric
  if "validation" in splits and metric != "last":
    raise _validate.UserError(
      f"config.selection.metric must be 'last' where config.data.train_splits "
      f"has validation, which leaves no examples to select on; got {metric!r}."
    )


def _check_pretraining(config: ml_collections.ConfigDict) -> None:
  """What is trained without labels is selected without them."""
  metric = config.selection.metric
  if config.recipe.name == "pretrain" and metric not in ("loss", "last"):
    raise _validate.UserError(
      f"config.selection.metric must be 'loss' or 'last' where "
      f"config.recipe.name is 'pretrain', which trains no classifier; got "
      f"{metric!r}."
    )
  if config.init_phase and not config.init_from:
    raise _validate.UserError(
      f"config.init_phase ({config.init_phase!r}) needs config.init_from."
    )


def _check_captions(config: ml_collections.ConfigDict) -> None:
  if config.selection.metric != "exact_match":
    return
  if config.model.fusion != "captioner":
    raise _validate.UserError(
      f"config.selection.metric must not be 'exact_match' where "
      f"config.model.fusion is {config.model.fusion!r}: only a 'captioner' "
      f"spells captions."
    )


def _check_spelling(settings: ml_collections.ConfigDict) -> None:
  path = "config.evaluation.captions"
  _validate.in_unit_interval(**{f"{path}.threshold": settings.threshold})
  names = ("num_substitutions", "num_steps", "num_restarts", "num_queries")
  _validate.at_least(1, **{f"{path}.{name}": settings[name] for name in names})


def _check_penalty(config: ml_collections.ConfigDict) -> None:
  settings = config.penalty
  _validate.non_negative(**{"config.penalty.weight": settings.weight})
  ramp = settings.ramp
  if ramp is not None:
    if isinstance(ramp, bool) or not isinstance(ramp, (int, float)):
      raise _validate.UserError(
        f"config.penalty.ramp must be a number such as 0.05, or none; got "
        f"{ramp!r}."
      )
    _validate.in_unit_interval(**{"config.penalty.ramp": ramp})
  _validate.one_of(("fused", "scores"), **{"config.penalty.on": settings.on})
  _validate.one_of(
    ("", "published"), **{"config.penalty.fidelity": settings.fidelity}
  )
  clip = config.optimizer.clip_norm
  if settings.name and settings.fidelity and clip:
    raise _validate.UserError(
      f"config.optimizer.clip_norm must be 0 where config.penalty.fidelity is "
      f"'published': its sums grow with the batch, and with them what is "
      f"clipped away; got {clip}."
    )


def _check_smoothing(settings: ml_collections.ConfigDict) -> None:
  path = "config.evaluation.smoothing"
  _validate.non_negative(**{f"{path}.sigma": settings.sigma})
  _validate.at_least(
    1,
    **{
      f"{path}.num_selection": settings.num_selection,
      f"{path}.num_estimation": settings.num_estimation,
      f"{path}.chunk_size": settings.chunk_size,
      **{f"{path}.keep.{name}": k for name, k in settings.keep.items()},
    },
  )
  if not 0 < settings.alpha < 1:
    raise _validate.UserError(
      f"{path}.alpha must lie in (0, 1), got {settings.alpha}."
    )


def _check_rules(rules) -> None:
  for rule in rules:
    if (
      not isinstance(rule, (tuple, list))
      or len(rule) != 2
      or not isinstance(rule[0], str)
      or not isinstance(rule[1], (tuple, list))
    ):
      raise _validate.UserError(
        f"config.mesh.rules must look like (('.*kernel', ('data', None)),), "
        f"got the rule {rule!r}."
      )
    try:
      re.compile(rule[0])
    except re.error as error:
      raise _validate.UserError(
        f"config.mesh.rules: {rule[0]!r} is no regular expression: {error}."
      ) from error


def _check_shifts(settings: ml_collections.ConfigDict) -> None:
  path = "config.evaluation"
  for rate in settings.missing_rates:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
      raise _validate.UserError(
        f"{path}.missing_rates must be numbers such as 0.1,0.5; got {rate!r}."
      )
    _validate.in_unit_interval(**{f"{path}.missing_rates": rate})
  _validate.one_of(
    MISSING_PROTOCOLS, **{f"{path}.missing_protocol": settings.missing_protocol}
  )
  _validate.one_of(CORRUPTIONS, **{f"{path}.corruptions": settings.corruptions})
