"""The joint baseline and its relatives: dropout, adversarial, mixup, noise."""

from collections.abc import Mapping

import optax

from robust_mm import _validate
from robust_mm import attacks
from robust_mm import smoothing
from robust_mm._types import Model
from robust_mm.certification import tables
from robust_mm.recipes import interventions
from robust_mm.recipes import objectives
from robust_mm.recipes import phases
from robust_mm.recipes import restraints

VARIANTS = ("plain", "dropout", "adversarial", "mixup", "noise")


def joint(
  model: Model,
  *,
  num_steps: int,
  tx: optax.GradientTransformation,
  variant: str = "plain",
  budget: float | Mapping = 0.1,
  attack_steps: int = 5,
  attack_loss: str = "margin",
  clean_weight: float = 0.0,
  dropout_rate: float = 1.0,
  mixup_alpha: float = 1.0,
  sigma: float | Mapping = 0.25,
  keep: Mapping | None = None,
  label_smoothing: float = 0.0,
  restraint: restraints.Restraint | None = None,
  spectral_penalty: float = 0.0,
  valid_range=None,
  units=None,
) -> phases.Recipe:
  """Cross-entropy on the fused logits; L1 of a regression.

  Of a multi-label model sigmoid cross-entropy, averaged over classes.

  Args:
    model: any model; one that does not predict classes, one an example, takes
      ``plain``, ``dropout`` and ``noise``.
    num_steps: optimiser updates.
    tx: the optimiser.
    variant: ``plain``; ``dropout``, a random subset of the modalities per
      example; ``adversarial``, inputs replaced by l2 PGD; ``mixup``;
      ``noise``, the base classifier of randomised smoothing.
    budget: joint l2 radius of the adversarial variant, in ``units``; a mapping
      gives each modality it names a ball of its own.
    attack_steps: steps of that attack, ``attacks.pgd`` with one restart: from a
      random point, lengths that fall along a cosine from the whole budget to
      zero, the best point seen.
    attack_loss: what it makes large: ``margin``, ``cross_entropy`` or ``dlr``.
    clean_weight: share of the clean loss in the adversarial variant, in [0, 1].
    dropout_rate: share of examples touched by the dropout variant.
    mixup_alpha: parameter of the Beta distribution of the mixup variant.
    sigma: standard deviation of the Gaussian noise of the noise variant, in
      ``units``: a number for every modality that ``keep`` does not name, or a
      mapping; 0 for none. Certify with the same.
    keep: ``{modality: number of elements kept}`` of the noise variant; the rest
      is dropped at random (``smoothing.subsample``).
    label_smoothing: share of every label, in [0, 1), that the loss spreads over
      all classes alike; 0 for other tasks.
    restraint: a penalty of wrong logits (``recipes.Restraint``), or None.
    spectral_penalty: weight of the sum of all layers' spectral norms, which
      makes ordinary encoders certifiable; 0 for none.
    valid_range: ``{modality: (low, high)}`` the attack stays in.
    units: ``{modality: size of one unit}`` of the budget and of sigma, 1
      where not named.

  Raises:
    ValueError: an unknown variant or a number out of range, naming it; a
      variant that is about classes, for another task.
  """
  _validate.one_of(VARIANTS, variant=variant)
  if variant in ("adversarial", "mixup"):
    model.need_classes(f"variant={variant!r}")
  _validate.in_unit_interval(clean_weight=clean_weight)
  if clean_weight and variant != "adversarial":
    raise ValueError("clean_weight must be 0 unless variant is 'adversarial'.")
  units = tables.check_units(units, model.modalities)
  if variant == "adversarial":
    attack = attacks.pgd(
      norm=2,
      budget=budget,
      num_steps=attack_steps,
      num_restarts=1,
      loss=attack_loss,
      valid_range=valid_range,
      units=units,
    )
    attacked = interventions.adversarial(model, attack)
    if clean_weight:
      attacked = interventions.with_clean(attacked)
    before = (attacked,)
  elif variant == "dropout":
    before = (interventions.modality_dropout(rate=dropout_rate),)
  elif variant == "mixup":
    before = (interventions.mixup(alpha=mixup_alpha),)
  elif variant == "noise":
    noise = smoothing.from_settings(
      model.modalities, sigma=sigma, keep=keep, units=units
    )
    before = (interventions.smoothing_noise(noise),)
  else:
    before = ()
  loss = objectives.cross_entropy_loss(
    model,
    clean_weight=clean_weight,
    label_smoothing=label_smoothing,
    restraint=restraint,
  )
  phase = phases.Phase(
    name="joint",
    num_steps=num_steps,
    loss=objectives.with_spectral_penalty(loss, model, spectral_penalty),
    tx=tx,
    interventions=before,
    progress=restraint is not None,
  )
  suffix = "" if variant == "plain" else f"-{variant}"
  return phases.Recipe(name=f"joint{suffix}", phases=(phase,))
