"""The joint baseline and its relatives: dropout, adversarial, mixup."""

import optax

from robust_mm import _validate
from robust_mm import attacks
from robust_mm._types import Model
from robust_mm.recipes import interventions
from robust_mm.recipes import objectives
from robust_mm.recipes import phases

VARIANTS = ("plain", "dropout", "adversarial", "mixup")


def joint(
  model: Model,
  *,
  num_steps: int,
  tx: optax.GradientTransformation,
  variant: str = "plain",
  budget: float = 0.1,
  attack_steps: int = 5,
  clean_weight: float = 0.0,
  dropout_rate: float = 1.0,
  mixup_alpha: float = 1.0,
  valid_range=None,
  units=None,
) -> phases.Recipe:
  """Cross-entropy on the fused logits.

  Args:
    model: any model.
    num_steps: optimiser updates.
    tx: the optimiser.
    variant: ``plain``; ``dropout``, a random subset of the modalities per
      example; ``adversarial``, inputs replaced by l2 PGD within one joint
      ball; ``mixup``.
    budget: joint l2 radius of the adversarial variant, in ``units``.
    attack_steps: steps of that attack, each of size ``2.5 budget / steps``.
    clean_weight: share of the clean loss in the adversarial variant, in [0, 1].
    dropout_rate: share of examples touched by the dropout variant.
    mixup_alpha: parameter of the Beta distribution of the mixup variant.
    valid_range: ``{modality: (low, high)}`` the attack stays in.
    units: ``{modality: size of one unit}`` of the budget.

  Raises:
    ValueError: an unknown variant or a number out of range, naming it.
  """
  _validate.one_of(VARIANTS, variant=variant)
  _validate.in_unit_interval(clean_weight=clean_weight)
  if variant == "adversarial":
    attack = attacks.pgd(
      norm=2,
      budget=budget,
      num_steps=attack_steps,
      num_restarts=1,
      valid_range=valid_range,
      units=units,
    )
    before = (
      interventions.with_clean(interventions.adversarial(model, attack)),
    )
  elif variant == "dropout":
    before = (interventions.modality_dropout(rate=dropout_rate),)
  elif variant == "mixup":
    before = (interventions.mixup(alpha=mixup_alpha),)
  else:
    before = ()
  phase = phases.Phase(
    name="joint",
    num_steps=num_steps,
    loss=objectives.cross_entropy_loss(model, clean_weight=clean_weight),
    tx=tx,
    interventions=before,
  )
  suffix = "" if variant == "plain" else f"-{variant}"
  return phases.Recipe(name=f"joint{suffix}", phases=(phase,))
