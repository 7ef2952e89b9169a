"""What ModalImmune does now and then: controller rounds, meta-parameters."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import optax

from robust_mm import _validate
from robust_mm import controllers
from robust_mm import hypergrad
from robust_mm import masking
from robust_mm import modalities
from robust_mm import spectrum
from robust_mm.recipes import immunity
from robust_mm.recipes import objectives

SOLVERS = ("conjugate_gradient", "identity", "neumann")
_OUTER_LR = 0.05
_OUTER_CLIP = 0.1


def make_probe(settings: immunity.Settings) -> Callable:
  """What each modality is worth on held-out examples: one controller round."""
  model = settings.model

  def probe(state, batch, key):
    del key
    extra = state.extra
    embeddings, _ = model.encode(
      state.params,
      state.model_state,
      batch["inputs"],
      batch["present"],
      train=False,
    )

    def loss_fn(params, batch):
      logits = immunity.logits_of(
        model, params, batch["inputs"], batch["present"]
      )
      return objectives.task_loss(model, logits, batch)

    full, left = modalities.leave_one_out(
      loss_fn, state.params, {**batch, "inputs": embeddings}
    )
    gains = modalities.information_gain(full, left, mode=settings.gain)
    scaled = controllers.scale_gains(
      extra["gain_scale"], modalities.stack(gains)
    )
    # Before the update: the p of the step whose arm this is.
    p = settings.controller.probabilities(extra["controller"])
    controller = settings.controller.update(
      extra["controller"], scaled.rewards, extra["arm"]
    )
    metrics = {"loss": full, "finite": scaled.finite.astype(jnp.float32)}
    for index, name in enumerate(model.modalities):
      metrics[f"gain_{name}"] = gains[name]
      metrics[f"p_{name}"] = p[index]
      metrics[f"rank_{name}"] = _relative_rank(
        embeddings[name], batch["present"][name]
      )
    if settings.gates:
      for name, line in masking.gate_report(state.opt_state).items():
        metrics[f"closed_{name}"] = line["rate"]
        metrics[f"verdict_{name}"] = line["verdict"].astype(jnp.float32)
        # Of the destructive part, left out of its block: counted, not hidden.
        metrics[f"nonfinite_{name}"] = line["nonfinite"].astype(jnp.float32)
        for word in ("rho_min", "rho_max", "cosine", "zero_share"):
          if word in line:
            metrics[f"{word}_{name}"] = line[word]
    extra = {**extra, "controller": controller, "gain_scale": scaled.scale}
    return dataclasses.replace(state, extra=extra), metrics

  return probe


def _relative_rank(embeddings, present):
  """R over that of isotropic embeddings of the same number of rows."""
  rank = spectrum.stable_rank(embeddings, weights=present)
  alike = spectrum.isotropic_stable_rank(jnp.sum(present), embeddings.shape[-1])
  return rank / jnp.maximum(alike, 1e-6)


def make_solver(name: str | None, num_steps: int | None) -> Callable | None:
  """The solver of a configuration; None for that of the fidelity.

  Raises:
    ValueError: naming ``outer_solver`` or ``outer_steps``.
  """
  if name is None:
    if num_steps is not None:
      raise ValueError("outer_steps goes with an outer_solver.")
    return None
  _validate.one_of(SOLVERS, outer_solver=name)
  if name == "identity":
    if num_steps is not None:
      raise ValueError("outer_steps must be left out: 'identity' takes none.")
    return hypergrad.identity()
  num_steps = 10 if num_steps is None else num_steps
  _validate.at_least(1, outer_steps=num_steps)
  return getattr(hypergrad, name)(num_steps)


def outer_step(settings: immunity.Settings) -> hypergrad.OuterStep:
  """The step on the meta-parameters; skipped where it is not accepted."""
  given = {}
  if settings.outer_solver is not None:
    given["solver"] = settings.outer_solver
  if settings.damping_ratio is not None:
    given["operator"] = hypergrad.damped(ratio=settings.damping_ratio)
  fn = hypergrad.hypergradient(
    lambda theta, phi, batch: immunity.expected_loss(
      settings, theta, phi, batch
    ),
    lambda theta, phi, batch: immunity.outer_loss(settings, theta, phi, batch),
    fidelity=settings.fidelity,
    **given,
  )
  return hypergrad.outer_step(fn, optax.adam(_OUTER_LR), step_clip=_OUTER_CLIP)


def make_outer(settings: immunity.Settings) -> Callable:
  """Adapts lambda and kappa: inner on training, outer on validation."""
  step = outer_step(settings)

  def adapt(state, batch, key):
    fresh, used = batch
    extra = state.extra
    inner = {
      "batch": used,
      "state": state.model_state,
      "p": settings.controller.probabilities(extra["controller"]),
      "decoders": extra.get("decoders", {}),
      "probes": extra.get("probes", {}),
    }
    outer, info = step.update(
      extra["outer"],
      state.params,
      inner,
      {"batch": fresh, "state": state.model_state},
      key=key,
    )
    weights = settings.weights(outer.phi)
    done = outer.num_accepted + outer.num_rejected
    state = dataclasses.replace(state, extra={**extra, "outer": outer})
    return state, {
      "accepted": info.accepted.astype(jnp.float32),
      "acceptance_rate": outer.num_accepted / done,
      "collapse_weight": weights[0],
      "spectral_weight": weights[1],
      "relative_residual": info.relative_residual,
      "inner_gradient_norm": info.inner_gradient_norm,
      "lower": info.lower,
      "upper": info.upper,
    }

  return adapt
