r"""Certified robust multimodal training, and training for a radius alone.

Step 1 enlarges every modality's own margin; step 2 re-weights modalities by
how reliable they are, from cached scores, with the encoders frozen.

References:
  `Yang, Wei, Liang, Hu (2024) <https://arxiv.org/abs/2402.06244>`_.
"""

import functools
from collections.abc import Callable
from collections.abc import Mapping

import jax.numpy as jnp
import optax

from robust_mm import _validate
from robust_mm import attacks
from robust_mm import certification
from robust_mm import losses
from robust_mm import models
from robust_mm._types import Geometry
from robust_mm._types import Model
from robust_mm.certification import tables
from robust_mm.recipes import integration
from robust_mm.recipes import interventions
from robust_mm.recipes import objectives
from robust_mm.recipes import phases
from robust_mm.recipes import restraints

VARIANTS = ("JT", "AT", "Mix")
FIDELITIES = ("corrected", "published")


def crmt(
  model: Model,
  *,
  num_steps: int,
  tx: optax.GradientTransformation,
  variant: str = "JT",
  fidelity: str = "corrected",
  rho: float = 1.0,
  r0: float = 0.3,
  temperature: float | None = None,
  floor: float | None = 1e-5,
  integration_steps: int | None = None,
  integration_lr: float = 1e-2,
  clean_tolerance: float = 0.01,
  steps_per_epoch: int | None = None,
  batch_size: int = 64,
  budget: float | Mapping = 0.1,
  attack_steps: int = 5,
  attack_loss: str | None = None,
  clean_weight: float = 0.0,
  mixup_alpha: float = 1.0,
  noise: float = 0.0,
  spectral_penalty: float = 0.0,
  restraint: restraints.Restraint | None = None,
  lipschitz=None,
  valid_range=None,
  units=None,
) -> phases.Recipe:
  """Both steps of CRMT.

  Args:
    model: a late-fusion model; one with sound Lipschitz bounds unless
      ``fidelity="published"``.
    num_steps: updates of step 1.
    tx: optimiser of step 1.
    variant: ``JT`` clean inputs, ``AT`` inputs replaced by l2 PGD within
      ``budget``, ``Mix`` mixup.
    fidelity: ``corrected``, radii of all classes with the model's constants,
      which needs an orthonormal head; ``published``, cross-entropy plus raw
      margins in step 1, the radius to the largest other logit in step 2.
    rho: weight of the per-modality term.
    r0: the radius aimed at (corrected) and at which step 2 is judged, in
      ``units``.
    temperature: smoothness of the radius loss; ``r0 / 6`` by default.
    floor: cap of the published margin term, or None.
    integration_steps: updates of step 2; 0 leaves it out; by default 500,
      published 45 epochs.
    integration_lr: learning rate of step 2 (corrected; published: 3e-5).
    clean_tolerance: how much validation accuracy step 2 may cost.
    steps_per_epoch: updates in one pass over the training set, at each of which
      the momentum of the published step 2 starts anew; it needs them.
    batch_size: examples in each of those updates.
    budget: radius of the ``AT`` variant, in ``units``; a mapping (corrected
      only) gives each modality it names a ball of its own.
    attack_steps: its steps. Corrected: a random start, lengths that fall from
      the whole budget to zero. Published: the clean start, all of length
      ``budget / attack_steps``. Either keeps the best point it saw.
    attack_loss: what it makes large, of ``attacks``; by default ``margin``,
      published ``cross_entropy``.
    clean_weight: share in [0, 1] of the same loss on inputs not attacked
      (``AT`` only; published: 0).
    mixup_alpha: parameter of the Beta distribution of ``Mix``.
    noise: standard deviation of white noise added to the inputs of step 1, in
      their own units.
    spectral_penalty: weight of the sum of all layers' spectral norms in step 1,
      for ordinary encoders; 0 for none.
    restraint: a penalty of wrong logits beside the cross-entropy of step 1
      (``fidelity="published"`` only: the corrected one has none), or None.
    lipschitz: ``{modality: constant}`` that step 2 fits to, and is judged by,
      instead of the model's own, for a changed threat. None where
      ``published``: estimated from data, and never called certified.
    valid_range: ``{modality: (low, high)}`` for the attack.
    units: ``{modality: size of one unit}``, 1 where not named.

  Raises:
    ValueError: naming the argument that is wrong.
  """
  model.need_classes("crmt")
  _validate.one_of(VARIANTS, variant=variant)
  _validate.one_of(FIDELITIES, fidelity=fidelity)
  _validate.non_negative(rho=rho, r0=r0, clean_tolerance=clean_tolerance)
  if integration_steps is not None:
    _validate.at_least(0, integration_steps=integration_steps)
  _validate.non_negative(noise=noise)
  _validate.in_unit_interval(clean_weight=clean_weight)
  if clean_weight and variant != "AT":
    raise ValueError("clean_weight must be 0 unless variant is 'AT'.")
  units = tables.check_units(units, model.modalities)
  if temperature is None:
    temperature = r0 / 6
  attack = None
  if variant == "AT":
    attack = _attack(
      fidelity, budget, attack_steps, attack_loss, valid_range, units
    )
  if fidelity == "published":
    loss = published_loss(model, rho=rho, floor=floor, restraint=restraint)
  else:
    if restraint is not None:
      raise ValueError(
        "penalty must be left out of recipe 'crmt' unless fidelity is "
        "'published': it trains for radii, not on cross-entropy."
      )
    _validate.positive(temperature=temperature)
    loss = corrected_loss(
      model, rho=rho, r0=r0, temperature=temperature, units=units
    )
  loss = objectives.with_clean_term(loss, clean_weight)
  step_1 = phases.Phase(
    name="margins",
    num_steps=num_steps,
    loss=objectives.with_spectral_penalty(loss, model, spectral_penalty),
    tx=tx,
    interventions=_before(
      model, variant, attack, clean_weight, mixup_alpha, noise
    ),
    progress=restraint is not None,
  )
  steps = [step_1]
  if integration_steps != 0:
    steps.append(
      integration.integration_phase(
        model,
        num_steps=integration_steps,
        lr=integration_lr,
        fidelity=fidelity,
        r0=r0,
        temperature=temperature,
        tolerance=clean_tolerance,
        steps_per_epoch=steps_per_epoch,
        batch_size=batch_size,
        lipschitz=lipschitz,
        units=units,
      )
    )
  name = f"crmt-{variant}" + ("-published" if fidelity == "published" else "")
  return phases.Recipe(name=name, phases=tuple(steps))


def certified_radius(
  model: Model,
  *,
  num_steps: int,
  tx: optax.GradientTransformation,
  r0: float = 0.3,
  temperature: float | None = None,
  noise: float = 0.0,
  spectral_penalty: float = 0.0,
  units=None,
) -> phases.Recipe:
  """Training for the joint certified radius alone (certification.md 6).

  Of Lipschitz encoders, or of ordinary dense ones (``mlp``), whose radius
  comes from their chain bound; with a late-fusion head or a Lipschitz trunk.
  Arguments as in :func:`crmt`.
  """
  recipe = crmt(
    model,
    num_steps=num_steps,
    tx=tx,
    rho=0.0,
    r0=r0,
    temperature=temperature,
    integration_steps=0,
    noise=noise,
    spectral_penalty=spectral_penalty,
    units=units,
  )
  return phases.Recipe(name="certified_radius", phases=recipe.phases)


def published_loss(
  model: Model,
  *,
  rho: float,
  floor: float | None,
  restraint: restraints.Restraint | None = None,
) -> Callable:
  """Cross-entropy plus ``rho`` times the raw uni-modal margin term.

  Mixed batches have one ``mix`` [] for all of their examples.
  """
  integration.need_scores(integration.abstract_geometry(model))
  if restraint is not None:
    restraint.check(model)

  def loss_fn(params, state, batch, *, key):
    outputs, state = model.apply(
      params, state, batch["inputs"], batch["present"], train=True, key=key
    )
    fused = objectives.classification(outputs.logits, batch)
    if "mix" in batch:
      margin = losses.mixup_margin(
        outputs.scores,
        batch["label"],
        batch["other_label"],
        batch["mix"],
        batch["present"],
        floor=floor,
      )
    else:
      margin = losses.unimodal_margin(
        outputs.scores, batch["label"], batch["present"], floor=floor
      )
    metrics = {
      "accuracy": objectives.accuracy(outputs.logits, batch),
      "cross_entropy": fused,
      "unimodal_margin": margin,
      **_head_metrics(model.geometry(params)),
    }
    loss = fused + rho * margin
    if restraint is not None:
      added, seen = restraint.term(outputs.logits, batch, outputs.scores)
      loss, metrics = loss + added, {**metrics, **seen}
    return loss, (state, metrics)

  return loss_fn


def corrected_loss(
  model: Model, *, rho: float, r0: float, temperature: float, units=None
) -> Callable:
  """The certified-radius loss plus ``rho`` times its per-modality companion.

  Mixed batches have one ``mix`` [] for all of their examples; their loss is
  mixed from those of the two labels, as cross-entropy is.

  Raises:
    ValueError: an encoder states no Lipschitz constant, or (``rho > 0``) the
      head no orthonormal rows.
  """
  stated = integration.abstract_geometry(model)
  _need_constants(stated)
  if rho:
    integration.need_orthonormal(stated)
  units = tables.check_units(units, model.modalities)

  def one_label(outputs, geometry, label, batch):
    sensitivity = certification.sensitivity(
      geometry, label, batch["present"], units=units
    )
    radius = losses.certified_radius(
      outputs.logits,
      sensitivity,
      label,
      r0=r0,
      temperature=temperature,
      present=batch["present"],
      fusion=geometry.fusion,
    )
    if not rho:
      return radius, 0.0
    constants = {
      name: tables.training_constant(geometry, name) * units[name]
      for name in geometry.lipschitz
    }
    companion = losses.unimodal_radius(
      outputs.scores,
      label,
      batch["present"],
      constants,
      r0=r0,
      temperature=temperature,
    )
    return radius, companion

  def loss_fn(params, state, batch, *, key):
    outputs, state = model.apply(
      params, state, batch["inputs"], batch["present"], train=True, key=key
    )
    geometry = model.geometry(params)
    radius, companion = one_label(outputs, geometry, batch["label"], batch)
    if "mix" in batch:
      other = one_label(outputs, geometry, batch["other_label"], batch)
      mix = batch["mix"]
      radius = mix * radius + (1 - mix) * other[0]
      companion = mix * companion + (1 - mix) * other[1]
    metrics = {
      "accuracy": objectives.accuracy(outputs.logits, batch),
      "radius_loss": radius,
      "unimodal_radius": companion,
      **_head_metrics(geometry),
    }
    return radius + rho * companion, (state, metrics)

  return loss_fn


def _before(model, variant, attack, clean_weight, mixup_alpha, noise) -> tuple:
  before = (interventions.gaussian_noise(sigma=noise),) if noise else ()
  if variant == "Mix":
    return (*before, interventions.mixup(alpha=mixup_alpha))
  if variant == "AT":
    attacked = interventions.adversarial(model, attack)
    if clean_weight:
      attacked = interventions.with_clean(attacked)
    return (*before, attacked)
  return before


def _attack(
  fidelity, budget, attack_steps, attack_loss, valid_range, units
) -> attacks.Attack:
  """Published: from the clean input, equal steps up cross-entropy."""
  _validate.at_least(1, attack_steps=attack_steps)
  published = fidelity == "published"
  options = {}
  if published:
    if isinstance(budget, Mapping):
      raise ValueError(
        "budget must be one number, a joint one, with fidelity='published'."
      )
    # None where there is no budget to step through.
    options = {
      "random_start": False,
      "step_size": budget / attack_steps or None,
    }
  return attacks.pgd(
    norm=2,
    budget=budget,
    num_steps=attack_steps,
    num_restarts=1,
    loss=attack_loss or ("cross_entropy" if published else "margin"),
    valid_range=valid_range,
    units=units,
    **options,
  )


def _head_metrics(geometry: Geometry) -> dict:
  """The worst defect of the rows, and each modality's mean factor."""
  factors = integration.stated_factors(geometry)
  if factors is None:
    return {}
  worst = functools.reduce(jnp.maximum, models.head_defect(geometry).values())
  means = {f"mean_factor_{n}": jnp.mean(a) for n, a in factors.items()}
  return {"orthogonality_defect": worst, **means}


def _need_constants(geometry: Geometry) -> None:
  missing = certification.missing_constants(geometry)
  if missing:
    raise ValueError(
      f"the encoder of modality {missing[0]!r} states no Lipschitz constant, "
      f"which fidelity='corrected' needs: choose one of models.lipschitz "
      f"(such as lipschitz_mlp), or fidelity='published'."
    )
