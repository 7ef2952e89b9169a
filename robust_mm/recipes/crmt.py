r"""Certified robust multimodal training, and training for a radius alone.

Step 1 enlarges every modality's own margin; step 2 re-weights modalities by
how reliable they are, from cached scores, with the encoders frozen.

References:
  `Yang, Wei, Liang, Hu (2024) <https://arxiv.org/abs/2402.06244>`_.
"""

from collections.abc import Callable

import jax
import optax

from robust_mm import _validate
from robust_mm import attacks
from robust_mm import certification
from robust_mm import losses
from robust_mm._types import Model
from robust_mm.recipes import interventions
from robust_mm.recipes import objectives
from robust_mm.recipes import phases

VARIANTS = ("JT", "AT", "Mix")
FIDELITIES = ("corrected", "published")
INTEGRATION = "fusion/integration/"


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
  integration_steps: int = 500,
  integration_lr: float = 1e-2,
  clean_tolerance: float = 0.01,
  budget: float = 0.1,
  attack_steps: int = 5,
  mixup_alpha: float = 1.0,
  noise: float = 0.0,
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
    variant: ``JT`` clean inputs, ``AT`` inputs replaced by joint l2 PGD of
      radius ``budget``, ``Mix`` mixup.
    fidelity: ``corrected``, radii of all classes with the model's constants;
      ``published``, cross-entropy plus raw margins in step 1, the radius to
      the largest other logit in step 2.
    rho: weight of the per-modality term.
    r0: the radius aimed at, in ``units`` (corrected).
    temperature: smoothness of the radius loss; ``r0 / 6`` by default.
    floor: cap of the published margin term, or None.
    integration_steps: updates of step 2; 0 leaves it out.
    integration_lr: learning rate of step 2.
    clean_tolerance: how much validation accuracy step 2 may cost.
    budget: radius of the ``AT`` variant, in ``units``.
    attack_steps: its steps.
    mixup_alpha: parameter of the Beta distribution of ``Mix``.
    noise: standard deviation of white noise added to the inputs of step 1, in
      their own units.
    lipschitz: ``{modality: constant}`` for step 2 where the model states none
      (``published``: estimated from data, and never called certified).
    valid_range: ``{modality: (low, high)}`` for the attack.
    units: ``{modality: size of one unit}``.

  Raises:
    ValueError: naming the argument that is wrong.
  """
  _validate.one_of(VARIANTS, variant=variant)
  _validate.one_of(FIDELITIES, fidelity=fidelity)
  _validate.non_negative(rho=rho, r0=r0, clean_tolerance=clean_tolerance)
  _validate.at_least(0, integration_steps=integration_steps)
  if temperature is None:
    temperature = r0 / 6
  if fidelity == "corrected":
    _validate.positive(temperature=temperature)
  before = _interventions(
    model, variant, budget, attack_steps, mixup_alpha, valid_range, units
  )
  _validate.non_negative(noise=noise)
  if noise:
    before = (interventions.gaussian_noise(sigma=noise), *before)
  if fidelity == "published":
    loss = published_loss(model, rho=rho, floor=floor)
  else:
    loss = corrected_loss(
      model, rho=rho, r0=r0, temperature=temperature, units=units
    )
  step_1 = phases.Phase(
    name="margins",
    num_steps=num_steps,
    loss=loss,
    tx=tx,
    interventions=before,
  )
  steps = [step_1]
  if integration_steps:
    steps.append(
      integration_phase(
        model,
        num_steps=integration_steps,
        lr=integration_lr,
        fidelity=fidelity,
        r0=r0,
        temperature=temperature,
        tolerance=clean_tolerance,
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
  units=None,
) -> phases.Recipe:
  """Training for the joint certified radius alone (certification.md 6)."""
  recipe = crmt(
    model,
    num_steps=num_steps,
    tx=tx,
    rho=0.0,
    r0=r0,
    temperature=temperature,
    integration_steps=0,
    noise=noise,
    units=units,
  )
  return phases.Recipe(name="certified_radius", phases=recipe.phases)


def published_loss(
  model: Model, *, rho: float, floor: float | None
) -> Callable:
  """Cross-entropy plus ``rho`` times the raw uni-modal margin term."""
  _need_scores(model)

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
    }
    return fused + rho * margin, (state, metrics)

  return loss_fn


def corrected_loss(
  model: Model, *, rho: float, r0: float, temperature: float, units=None
) -> Callable:
  """The certified-radius loss plus ``rho`` times its per-modality companion.

  Raises:
    ValueError: an encoder states no Lipschitz constant.
  """
  _need_scores(model)
  _need_constants(model)

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
    )
    if not rho:
      return radius, 0.0
    constants = {
      name: value * (units[name] if units else 1.0)
      for name, value in geometry.lipschitz.items()
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
    }
    return radius + rho * companion, (state, metrics)

  return loss_fn


def integration_phase(
  model: Model,
  *,
  num_steps: int,
  lr: float,
  fidelity: str,
  r0: float,
  temperature: float,
  tolerance: float,
  lipschitz=None,
  units=None,
) -> phases.Phase:
  """Step 2: only the integration factors move, on cached scores.

  The encoders, the proxies, the bias and all statistics stay bit-identical.
  """
  _need_scores(model)

  def loss_fn(params, state, batch, *, key):
    del key
    geometry = model.geometry(params)
    loss = certification.integration_loss(
      geometry.factors,
      batch["scores"],
      batch["label"],
      batch["present"],
      batch["lipschitz"],
      bias=geometry.bias,
      r0=r0,
      temperature=temperature,
      fidelity=fidelity,
    )
    return loss, (state, {})

  def prepare(params, state, cached, reference):
    constants = _constants(model, params, state, reference, lipschitz, fidelity)
    scale = units or dict.fromkeys(constants, 1.0)
    return {
      "scores": cached["scores"],
      "label": cached["label"],
      "present": cached["present"],
      "lipschitz": {n: c * scale[n] for n, c in constants.items()},
    }

  def accept(before, after):
    gained = after["certified_accuracy"] > before["certified_accuracy"]
    kept = after["accuracy"] >= before["accuracy"] - tolerance
    sentence = (
      f"certified accuracy {before['certified_accuracy']:.4f} -> "
      f"{after['certified_accuracy']:.4f}, accuracy {before['accuracy']:.4f} "
      f"-> {after['accuracy']:.4f} on validation"
    )
    return gained and kept, sentence

  published = fidelity == "published"
  return phases.Phase(
    name="integration",
    num_steps=num_steps,
    loss=loss_fn,
    tx=certification.published_optimizer() if published else optax.adam(lr),
    trainable=INTEGRATION,
    prepare=prepare,
    accept=None if published else accept,
  )


def _constants(model, params, state, reference, given, fidelity):
  if given is not None:
    return dict(given)
  if fidelity == "published":
    return certification.empirical_lipschitz(
      model, params, reference, state=state
    )
  return model.geometry(params).lipschitz


def _interventions(
  model, variant, budget, attack_steps, mixup_alpha, valid_range, units
):
  if variant == "JT":
    return ()
  if variant == "Mix":
    return (interventions.mixup(alpha=mixup_alpha),)
  attack = attacks.pgd(
    norm=2,
    budget=budget,
    num_steps=attack_steps,
    num_restarts=1,
    valid_range=valid_range,
    units=units,
  )
  return (interventions.adversarial(model, attack),)


def _need_scores(model: Model) -> None:
  if model.geometry is None:
    raise ValueError(
      "crmt needs a model whose logits are a sum of per-modality scores "
      "(model.fusion='orthogonal'); this one mixes modalities before them."
    )


def _need_constants(model: Model) -> None:
  abstract = jax.eval_shape(lambda key: model.init(key)[0], jax.random.key(0))
  constants = jax.eval_shape(model.geometry, abstract).lipschitz
  for name, constant in constants.items():
    if constant is None:
      raise ValueError(
        f"the encoder of modality {name!r} states no Lipschitz constant, "
        f"which fidelity='corrected' needs: choose one of models.lipschitz "
        f"(such as lipschitz_mlp), or fidelity='published'."
      )
