r"""ModalImmune: training that destroys one modality on purpose.

Each step draws a modality, trains the task with and without it, and collapses
its embeddings. None of it certifies robustness. What it has to beat is
``removal="every"`` alone, and with damaged inputs but nothing else: so far
(``benchmarks/results/immunity_*.txt``) damage buys accuracy under corruption,
and the rest of the method nothing that could be measured.

References:
  `Fu et al. (2026) <https://arxiv.org/abs/2602.16197>`_; the form is our
  reading of it.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from robust_mm import _validate
from robust_mm import controllers
from robust_mm import corruptions
from robust_mm._types import Model
from robust_mm.recipes import destruction
from robust_mm.recipes import immune_gates
from robust_mm.recipes import immune_jobs
from robust_mm.recipes import immunity
from robust_mm.recipes import objectives
from robust_mm.recipes import phases
from robust_mm.recipes import restraints

FIDELITIES = ("default", "published")
CONTROLLERS = ("hedge", "exp3", "exp3s", "uniform")
DAMAGE = ("additive", "channel_drop", "frame_drop", "token_drop")
GAINS = ("hinge", "squared")
_TARGETS = ("expected", "sampled")
# (default, published) of the arguments that fidelity decides.
_BY_FIDELITY = {
  "clean_weight": (1.0, 0.0),
  "controller": ("hedge", "exp3"),
  "gain": ("hinge", "squared"),
  "gate": ("hessian", "published"),
  "gaussian_target": ("expected", "sampled"),
}
_OUTER_STEPS = 30
_OUTER_PERIOD = 200  # each costs as much as some sixty gradients


def modal_immune(
  model: Model,
  *,
  num_steps: int,
  tx: optax.GradientTransformation,
  fidelity: str = "default",
  collapse_weight: float = 0.1,
  spectral_weight: float = 0.01,
  collapse_on: str = "arm",
  gaussian_target: str | None = None,
  adaptive: bool = False,
  attack_weight: float = 1.0,
  clean_weight: float | None = None,
  removal: str = "arm",
  consistency_weight: float = 0.0,
  temperature: float = 2.0,
  label_smoothing: float = 0.0,
  restraint: restraints.Restraint | None = None,
  reconstruction_weight: float | None = None,
  damage_rate: float = 0.0,
  damage_kinds: Sequence[str] = DAMAGE,
  noise_scale: Any = 1.0,
  features: Mapping[str, Any] | None = None,
  feedback_weight: float = 0.0,
  controller: str | controllers.Controller | None = None,
  controller_period: int = 20,
  gain: str | None = None,
  gate: str | None = None,
  gate_period: int | None = None,
  gate_options: Mapping[str, Any] | None = None,
  adapt: bool | None = None,
  outer_period: int | None = None,
  outer_solver: str | None = None,
  outer_steps: int | None = None,
  damping_ratio: float | None = None,
  warmup_steps: int | None = None,
  steps_per_epoch: int | None = None,
  guard_tolerance: float | None = 0.05,
  clip: float | None = 1.0,
  batch_size: int = 64,
) -> phases.Recipe:
  r"""Self-destructive training for missing modalities.

  .. math:: L = w_{clean} L(a) + w_{attack} L(a \setminus m) + \lambda
            L_{col}(Z_m) + w_{rec} L_{rec}(a \setminus m) + w_{con} D(a)
            - w_{fb} L_{probe}(Z_m)

  with the arm m drawn by the controller and L the cross-entropy, L1 in
  deviations of the target for a regression, or sigmoid cross-entropy averaged
  over classes for several labels. :math:`L(a \setminus m)` is that of
  random subsets with ``removal="subset"``, and the mean over all availability
  sets, m in some of them, with ``"every"``: then the task and the collapse pull
  at the same encoder. D is the divergence of ``consistency_weight``. Collapse
  and probe are descended through the curvature gates, on the encoder of m
  alone; :math:`\lambda` and the weight of the spectral ratio are adapted on
  validation data.

  Formal guarantees:
    - The loss without m has a gradient of exactly 0 in the encoder of m.
    - ``collapse_weight=0, controller="uniform", guard_tolerance=None`` without
      ``features`` is leave-one-out modality dropout beside the clean loss; no
      trace of the rest is left.
    - One trace for all arms, gates and meta-parameters.

  What is *not* covered: robustness, of any kind. Validation examples choose the
  arm and the weights: select nothing else on them that you mean to report.

  Args:
    model: its ``params["encoders"]`` has one entry a modality, and a removed
      modality has no value path (every fusion of ``models``). No LayerNorm on
      embeddings, and no projection on a ball: either pins their scale.
    num_steps: optimiser updates.
    tx: the optimiser; the curvature mask is put around it.
    fidelity: ``published``: squared gains, sampled targets, the gate that never
      closes, exp3, no clean term, and the published hyper-gradient; each where
      the argument of that part is not given.
    collapse_weight: lambda at the beginning, after the warm-up; 0: no collapse.
    spectral_weight: kappa at the beginning; 0: shrinkage alone, for good.
    collapse_on: ``arm``, or ``all`` embeddings at the same total weight.
    gaussian_target: ``expected`` or ``sampled``.
    adaptive: scale the collapse by how far the spectrum is from collapsed.
    attack_weight: of the loss of ``removal``.
    clean_weight: of the loss with everything present.
    removal: ``arm``, or ``subset``: a random subset of modalities per example
      in its place (every non-empty one is equally likely), or ``every``
      availability set in every step: the encoders run once all the same.
    consistency_weight: of the divergence of predictions from every availability
      set from the one of all modalities (of all that are intact, where one is
      damaged), which is the teacher; of a regression the squared difference, in
      deviations; of several labels the mean over classes of binary ones.
    temperature: of that divergence; nothing to a regression.
    label_smoothing: share of every label, in [0, 1), that the training losses
      spread over all classes alike; those on validation batches stay plain. 0
      for other tasks.
    restraint: a penalty of wrong logits (``recipes.Restraint``), or None: in
      all training losses, as ``label_smoothing`` is; without its ramp in the
      inner loss of the hyper-gradient.
    reconstruction_weight: of decoders that tell the features of every modality
      from what is left; 0 for none. 0.1 where ``features`` are given.
    damage_rate: share of the examples whose input of the arm is corrupted, by a
      kind that is drawn for the step, at a strength drawn for the example. The
      label stays; so does the target of reconstruction, which is of the intact
      input. Damaged rows do not count in the guard and the clean loss that is
      reported. Not part of the inner loss of the hyper-gradient.
    damage_kinds: of ``robust_mm.corruptions``, those to draw from; of a
      modality, those that make sense for it.
    noise_scale: of the kind ``additive``: a number or ``{m: array}``, such as
      ``corruptions.deviations`` of training data.
    features: ``{m: (mean, deviation)}`` of pooled training inputs
      (``recipes.feature_statistics``); those named get a decoder.
    feedback_weight: the encoder of the arm also climbs the loss, up to chance,
      of a probe that tells the label from its embeddings; through the gates,
      after the warm-up. 0 for other tasks.
    controller: ``hedge``, ``exp3``, ``exp3s``, ``uniform``, or a value of
      ``robust_mm.controllers``.
    controller_period: updates between two rounds of it.
    gain: ``hinge`` or ``squared``.
    gate: ``hessian``, ``directional``, ``fisher``, ``random`` (the control),
      ``published`` or ``none``: those of ``robust_mm.masking``.
    gate_period: updates between refreshes; that of the gate by default.
    gate_options: of the gate's factory in ``robust_mm.masking``, such as
      ``{"tau": 0.25}``.
    adapt: whether lambda and kappa are adapted; by default where there is any.
    outer_period: updates between two such steps, each of which costs some sixty
      gradients; by default a thirtieth of all, but at least 200, or a third of
      all where that is less.
    outer_solver: ``conjugate_gradient``, ``neumann`` or ``identity``; that of
      the fidelity by default.
    outer_steps: of that solver, 10 by default.
    damping_ratio: of ``hypergrad.damped``; the operator of the fidelity by
      default.
    warmup_steps: without collapse, arms alike; two epochs by default where
      ``steps_per_epoch`` says how long one is (a tenth of all at most), else a
      tenth.
    steps_per_epoch: updates in one pass over the training set.
    guard_tolerance: no arm is attacked while the running mean of the clean loss
      is worse than its best by this share; None for no such guard.
    clip: norm to which the gradient of every encoder, and of the rest, is
      clipped by itself, the destructive one likewise; None for none.
    batch_size: of the validation batches of the jobs.

  Raises:
    ValueError: naming the argument that is wrong.
  """
  _validate.one_of(FIDELITIES, fidelity=fidelity)
  chosen = _chosen(
    fidelity,
    clean_weight=clean_weight,
    controller=controller,
    gain=gain,
    gate=gate,
    gaussian_target=gaussian_target,
  )
  _check_model(model)
  _validate.at_least(
    1, controller_period=controller_period, batch_size=batch_size
  )
  _validate.one_of(GAINS, gain=chosen["gain"])
  _validate.one_of(_TARGETS, gaussian_target=chosen["gaussian_target"])
  _validate.one_of(immunity.REMOVALS, removal=removal)
  _validate.one_of(immunity.COLLAPSED, collapse_on=collapse_on)
  features = dict(features or {})
  _validate.known(model.modalities, features=features)
  if reconstruction_weight is None:
    reconstruction_weight = 0.1 if features else 0.0
  _validate.non_negative(
    collapse_weight=collapse_weight,
    spectral_weight=spectral_weight,
    attack_weight=attack_weight,
    clean_weight=chosen["clean_weight"],
    reconstruction_weight=reconstruction_weight,
    feedback_weight=feedback_weight,
    consistency_weight=consistency_weight,
  )
  _validate.positive(temperature=temperature)
  if damping_ratio is not None:
    _validate.positive(damping_ratio=damping_ratio)
  _validate.below_one(label_smoothing=label_smoothing)
  objectives.check_off(
    model, label_smoothing=label_smoothing, feedback_weight=feedback_weight
  )
  if restraint is not None:
    restraint.check(model, scores=False)
  if reconstruction_weight and not features:
    raise ValueError("reconstruction_weight must be 0 without features.")
  if guard_tolerance is not None:
    _validate.non_negative(guard_tolerance=guard_tolerance)
  if adapt and not collapse_weight:
    raise ValueError("adapt must be False where collapse_weight is 0.")
  warmup_steps = _warmup(warmup_steps, num_steps, steps_per_epoch)
  destroys = bool(collapse_weight or feedback_weight)
  damage = _damage(model, damage_rate, damage_kinds, noise_scale)
  settings = immunity.Settings(
    model=model,
    fidelity=fidelity,
    controller=_controller(
      chosen["controller"],
      len(model.modalities),
      max(1, (num_steps - warmup_steps) // controller_period),
    ),
    controller_period=controller_period,
    warmup_steps=warmup_steps,
    collapse_weight=collapse_weight,
    spectral_weight=spectral_weight,
    clean_weight=chosen["clean_weight"],
    attack_weight=attack_weight,
    reconstruction_weight=reconstruction_weight,
    feedback_weight=feedback_weight,
    damage=damage,
    damage_rate=damage_rate,
    features=features,
    removal=removal,
    consistency_weight=consistency_weight,
    temperature=temperature,
    label_smoothing=label_smoothing,
    restraint=restraint,
    collapse_on=collapse_on,
    gaussian_target=chosen["gaussian_target"],
    adaptive=adaptive,
    gain=chosen["gain"],
    gates=destroys and chosen["gate"] not in ("none", "published"),
    adapt=bool(collapse_weight) if adapt is None else adapt,
    outer_period=outer_period or _period(num_steps),
    outer_solver=immune_jobs.make_solver(outer_solver, outer_steps),
    damping_ratio=damping_ratio,
    guard_tolerance=guard_tolerance,
    batch_size=batch_size,
  )
  tx = immune_gates.masked(
    tx,
    model,
    chosen["gate"],
    gate_options or {},
    period=gate_period,
    clip=clip,
  )
  phase = phases.Phase(
    name="immune",
    num_steps=num_steps,
    tx=tx,
    extra=destruction.make_extra(settings),
    update=destruction.make_update(settings, tx),
    jobs=_jobs(settings),
    progress=restraint is not None,
  )
  suffix = "-published" if fidelity == "published" else ""
  return phases.Recipe(name=f"modal_immune{suffix}", phases=(phase,))


def _chosen(fidelity: str, **given) -> dict:
  position = FIDELITIES.index(fidelity)
  return {
    name: _BY_FIDELITY[name][position] if value is None else value
    for name, value in given.items()
  }


def _check_model(model: Model) -> None:
  if len(model.modalities) < 2:
    raise ValueError(
      f"modal_immune needs a model of at least two modalities (names), got "
      f"{', '.join(model.modalities)}."
    )
  if "rest" in model.modalities:
    raise ValueError("a modality must not be named 'rest' for modal_immune.")
  params, _ = jax.eval_shape(model.init, jax.random.key(0))
  encoders = params.get("encoders", {}) if isinstance(params, dict) else {}
  for name in model.modalities:
    if name not in encoders:
      raise ValueError(
        f"modal_immune needs a model with params['encoders'][{name!r}]: what "
        f"it destroys is the encoder of one modality."
      )


def _warmup(warmup_steps, num_steps: int, steps_per_epoch) -> int:
  if warmup_steps is None:
    warmup_steps = num_steps // 10
    if steps_per_epoch:
      warmup_steps = min(warmup_steps, 2 * steps_per_epoch)
  _validate.at_least(0, warmup_steps=warmup_steps)
  if warmup_steps >= num_steps:
    raise ValueError(
      f"warmup_steps must be below num_steps ({num_steps}), got {warmup_steps}."
    )
  return warmup_steps


def _damage(model: Model, rate: float, kinds, scale):
  """What damages the arm; None at a rate of 0."""
  _validate.in_unit_interval(damage_rate=rate)
  if not rate:
    return None
  try:
    damage = corruptions.mixture(kinds, scale=scale)
    fitting = []
    for name, shape in (model.input_shapes or {}).items():
      tokens = name in (model.tokens or ())
      dtype = jnp.int32 if tokens else jnp.float32
      for corruption in damage.fitting(name, shape, dtype):
        corruption.option(name)
        fitting.append(corruption)
    if model.input_shapes and not fitting:
      raise ValueError(f"none of {', '.join(kinds)} fits a modality.")
  except ValueError as error:
    raise ValueError(f"damage_kinds, noise_scale: {error}") from error
  return damage


def _period(num_steps: int) -> int:
  few = min(_OUTER_PERIOD, num_steps // 3)
  return max(1, num_steps // _OUTER_STEPS, few)


def _controller(value, num_arms: int, num_rounds: int):
  if isinstance(value, controllers.Controller):
    if value.num_arms != num_arms:
      raise ValueError(
        f"controller must have {num_arms} arms, one a modality, got "
        f"{value.num_arms}."
      )
    return value
  _validate.one_of(CONTROLLERS, controller=value)
  if value == "uniform":
    return controllers.uniform(num_arms)
  return getattr(controllers, value)(num_arms, num_rounds=num_rounds)


def _jobs(settings: immunity.Settings) -> tuple[phases.Job, ...]:
  def first(period):
    """The first multiple of the period after the warm-up."""
    return (settings.warmup_steps // period + 1) * period

  probe = phases.Job(
    name="probe",
    run=immune_jobs.make_probe(settings),
    period=settings.controller_period,
    start=first(settings.controller_period),
    batch_size=settings.batch_size,
  )
  if not settings.adapt:
    return (probe,)
  outer = phases.Job(
    name="outer",
    run=immune_jobs.make_outer(settings),
    period=settings.outer_period,
    start=first(settings.outer_period),
    batch_size=settings.batch_size,
    with_training=True,
  )
  return (probe, outer)
