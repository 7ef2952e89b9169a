"""The recipe that a configuration asks for, and what goes around it."""

import contextlib
import dataclasses
import inspect
import re

import ml_collections
import numpy as np

from robust_mm import _validate
from robust_mm import augmentations
from robust_mm import corruptions
from robust_mm import data
from robust_mm import losses
from robust_mm import recipes
from robust_mm.recipes import interventions
from robust_mm.training import optimizers
from robust_mm.training import setup as setup_lib
from robust_mm.training import units

OPTIONS = "config.recipe.options."


def make(
  config: ml_collections.ConfigDict, setup: setup_lib.Setup
) -> recipes.Recipe:
  """The recipe of a configuration, its options checked by name."""
  facts, options = setup.facts, config.recipe.options.to_dict()
  epoch = data.pipelines.steps_per_epoch(setup.train, config.data.batch_size)
  num_steps = config.num_epochs * epoch or config.num_steps
  tx = optimizers.make(num_steps=num_steps, **config.optimizer.to_dict())
  factory = getattr(recipes, config.recipe.name)
  if config.recipe.name in ("joint", "crmt", "certified_radius"):  # have sizes
    options["units"] = units.resolve(
      options.get("units", "raw"), facts, "config.recipe.options.units"
    )
  if config.recipe.name in ("joint", "crmt"):  # they may attack
    options.setdefault("valid_range", setup_lib.value_range(facts))
  if config.recipe.name == "crmt":  # its published step 2 counts epochs
    options.setdefault("steps_per_epoch", epoch)
    options.setdefault("batch_size", config.data.batch_size)
  if config.recipe.name == "masd":
    options.setdefault("labelled", tuple(config.data.labelled))
    beside = config.data.unlabelled_ratio
    options.setdefault(
      "unlabelled_ratio", beside if config.data.unlabelled_splits else 0
    )
  if config.recipe.name == "modal_immune":
    options.setdefault("steps_per_epoch", epoch)
    options.setdefault("features", _features(facts, setup.reference))
    options.setdefault("noise_scale", corruptions.deviations(setup.reference))
  takes = inspect.signature(factory).parameters
  for name in options:
    if name not in takes:
      raise _validate.UserError(
        f"config.recipe.options has {name!r}, which recipe "
        f"{config.recipe.name!r} does not take."
        f"{_validate.suggestion(name, takes)}"
      )
  if config.penalty.name:
    if "restraint" not in takes:
      raise _validate.UserError(
        f"config.penalty.name must be empty for recipe {config.recipe.name!r}, "
        f"which does not take a penalty of wrong logits; got "
        f"{config.penalty.name!r}."
      )
    options["restraint"] = restraint(config)
  with _named(config.recipe.options):
    recipe = factory(setup.model, num_steps=num_steps, tx=tx, **options)
  if config.penalty.name:
    _check_parts(options["restraint"], recipe, config, len(setup.train))
  return _augmented(
    recipe,
    setup_lib.chosen_alone(config, config.augmentation),
    setup.train.spec,
  )


@contextlib.contextmanager
def _named(options: ml_collections.ConfigDict):
  """A refusal that begins with one of those names tells where it stands."""
  try:
    yield
  except ValueError as error:
    name = re.match(r"\w*", str(error))[0]
    if name not in options:
      raise
    raise _validate.UserError(f"{OPTIONS}{error}") from error


def restraint(config: ml_collections.ConfigDict) -> recipes.Restraint:
  """The penalty of wrong logits that ``config.penalty`` names.

  Raises:
    UserError: an unknown name, option or value.
  """
  settings = config.penalty
  try:
    return recipes.Restraint(
      penalty=losses.penalty(settings.name, **settings.options.to_dict()),
      weight=settings.weight,
      on=settings.on,
      ramp=settings.ramp,
      fidelity=settings.fidelity or None,
    )
  except ValueError as error:
    raise _validate.UserError(f"config.penalty: {error}") from error


def _check_parts(
  term: recipes.Restraint,
  recipe: recipes.Recipe,
  config: ml_collections.ConfigDict,
  num_examples: int,
) -> None:
  """Every batch has to fall into as many equal parts as are compared."""
  for phase in recipe.phases:
    name, size = "config.data.batch_size", config.data.batch_size
    if phase.prepare is not None:  # one batch of everything
      name, size = "the number of training examples", num_examples
    if size % term.penalty.parts:
      raise _validate.UserError(
        f"config.penalty.options.level_scope must divide {name}, {size} in "
        f"phase {phase.name!r}; got {term.penalty.parts}."
      )


def _augmented(recipe: recipes.Recipe, settings: dict, spec) -> recipes.Recipe:
  """Changes the inputs first, in every phase that streams batches."""
  if not settings:
    return recipe
  path = "config.augmentation"
  augmentations.check(settings, spec, path=path)
  augment = augmentations.make(settings, path=path)
  two = interventions.two_views(augment)
  phases = tuple(
    dataclasses.replace(
      phase,
      interventions=(
        augment if phase.views == 1 else two,
        *phase.interventions,
      ),
    )
    if phase.prepare is None
    else phase
    for phase in recipe.phases
  )
  return dataclasses.replace(recipe, phases=phases)


def _features(facts: dict, reference: dict) -> dict:
  """Statistics of what decoders are to tell, of modalities that are floats."""
  return {
    name: recipes.feature_statistics(value, reference["present"][name])
    for name, value in reference["inputs"].items()
    if facts["kinds"][name] == "float" and np.any(reference["present"][name])
  }
