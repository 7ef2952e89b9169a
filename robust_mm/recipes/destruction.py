"""The update and the jobs of ModalImmune, over ``state.extra``."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from robust_mm import controllers
from robust_mm import hypergrad
from robust_mm import masking
from robust_mm import modalities
from robust_mm import spectrum
from robust_mm.recipes import decoders as decoders_lib
from robust_mm.recipes import immunity
from robust_mm.recipes import objectives

_MEMORY = 0.99  # of the running mean of the clean loss
_OUTER_LR = 0.05
_OUTER_CLIP = 0.1


def block_labels(params):
  """The block of every parameter: its modality, or "rest" in the head."""

  def label(group, part):
    if group != "encoders":
      return jax.tree.map(lambda _: "rest", part)
    return {n: jax.tree.map(lambda _, n=n: n, part[n]) for n in part}

  return {group: label(group, part) for group, part in params.items()}


def clip_by_block(max_norm: float) -> optax.GradientTransformation:
  """Each adapter's gradient, and that of the rest, to a norm of its own."""

  def update(updates, state, params=None):
    del params
    labels = jax.tree.leaves(block_labels(updates))
    leaves, structure = jax.tree.flatten(updates)
    factors = {}
    for name in set(labels):
      norm = optax.tree.norm([a for a, b in zip(leaves, labels) if b == name])
      factors[name] = jnp.where(norm > max_norm, max_norm / norm, 1)
    scaled = [a * factors[b].astype(a.dtype) for a, b in zip(leaves, labels)]
    return jax.tree.unflatten(structure, scaled), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decoder_optimizer() -> optax.GradientTransformation:
  """Of the decoders alone: they are no part of the model that is kept."""
  return optax.adam(1e-3)


def make_extra(settings: immunity.Settings) -> Callable:
  """``extra(params, key)``: all that the recipe remembers beside the model.

  Decoders live here and not among the parameters, so that the model that is
  selected, saved and loaded is the one that will be used.
  """

  def extra(params, key):
    found = {
      "count": jnp.zeros((), jnp.int32),
      "arm": jnp.full((), settings.num_arms, jnp.int32),
      "controller": settings.controller.init(),
      "gain_scale": controllers.initial_scale(),
      "clean_loss": jnp.zeros(()),
      "best_clean_loss": jnp.zeros(()),
    }
    if settings.adapt:
      found["outer"] = outer_step(settings).init(settings.phi())
    if settings.reconstruction_weight:
      made = decoders_lib.init(
        key, settings.features, embedding_dims(settings, params)
      )
      found["decoders"] = made
      found["decoder_optimizer"] = decoder_optimizer().init(made)
    return found

  return extra


def embedding_dims(settings: immunity.Settings, params) -> dict[str, int]:
  """``{m: d_m}``."""
  model = settings.model

  def encode(params):
    _, state = model.init(jax.random.key(0))
    # Those without features may be tokens; other encoders take integers too.
    inputs = {
      name: jnp.zeros(
        (1, *shape), jnp.float32 if name in settings.features else jnp.int32
      )
      for name, shape in model.input_shapes.items()
    }
    present = {n: jnp.ones(1, bool) for n in inputs}
    return model.encode(params, state, inputs, present, train=False)[0]

  shapes = jax.eval_shape(encode, params)
  return {name: value.shape[-1] for name, value in shapes.items()}


def make_update(
  settings: immunity.Settings, tx: optax.GradientTransformation
) -> Callable:
  """One step: the task with and without the drawn arm, and its collapse."""
  model = settings.model
  loss_fn = make_task(settings)

  def update(state, batch, key):
    draw_key, model_key, noise_key, subset_key = jax.random.split(key, 4)
    extra, present = state.extra, batch["present"]
    weights = settings.weights(meta_parameters(settings, extra))
    warm = extra["count"] < settings.warmup_steps
    arm = draw(settings, draw_key, extra, warm)
    available = left(settings, subset_key, present, arm)

    def encode(params):
      return model.encode(
        params,
        state.model_state,
        batch["inputs"],
        present,
        train=True,
        key=model_key,
      )

    embeddings, pull, model_state = jax.vjp(encode, state.params, has_aux=True)
    task = jax.value_and_grad(loss_fn, argnums=(0, 1, 2), has_aux=True)
    (loss, parts), (by_params, by_embeddings, by_decoders) = task(
      state.params, embeddings, extra.get("decoders", {}), available, batch
    )
    grads = jax.tree.map(jnp.add, by_params, pull(by_embeddings)[0])
    options, found = {"value": loss}, jnp.zeros(())
    if settings.collapse_weight:
      active = (jnp.where(warm, 0, weights[0]), weights[1])
      added, found, pushed = _destroy(
        settings, embeddings, present, arm, active, noise_key
      )
      # Not finite: the mask leaves it out of its block, and counts that.
      loss = loss + jnp.where(jnp.isfinite(added), added, 0)
      options["destructive"] = pull(pushed)[0]
      options["value_fn"] = lambda params: immunity.separable_collapse(
        settings, params, state.model_state, batch, weights
      )
    updates, opt_state = tx.update(
      grads, state.opt_state, state.params, **options
    )
    extra = {**extra, "count": extra["count"] + 1, "arm": arm}
    extra = watch(settings, extra, parts["clean_loss"], warm)
    extra = _train_decoders(extra, by_decoders)
    state = dataclasses.replace(
      state,
      params=optax.apply_updates(state.params, updates),
      model_state=model_state,
      opt_state=opt_state,
      extra=extra,
    )
    return state, {
      "loss": loss,
      **parts,
      "collapse_loss": found,
      "collapse_weight": jnp.where(warm, 0, weights[0]),
      "spectral_weight": weights[1],
      "attacked": (arm < settings.num_arms).astype(jnp.float32),
      "gradient_norm": optax.tree.norm(grads),
    }

  return update


def left(settings: immunity.Settings, key, present, arm):
  """What is available without the arm, or a random subset in its place."""
  if settings.removal != "subset":
    return modalities.removed(present, arm)
  chosen = modalities.random_presence(key, present)
  attacked = arm < settings.num_arms
  return {n: jnp.where(attacked, chosen[n], present[n]) for n in chosen}


def _destroy(settings, embeddings, present, arm, weights, key):
  """(weighted loss, loss, gradient in the embeddings) of the collapse."""

  def weighted(embeddings):
    loss = immunity.collapse(
      settings, embeddings, present, arm, weights[1], key
    )
    return weights[0] * loss, loss

  grad_fn = jax.value_and_grad(weighted, has_aux=True)
  (added, loss), pushed = grad_fn(embeddings)
  return added, loss, pushed


def make_task(settings: immunity.Settings) -> Callable:
  """``loss(params, embeddings, decoders, available, batch)``: no collapse."""

  def loss_fn(params, embeddings, decoders, available, batch):
    model = settings.model
    logits = immunity.logits_of(model, params, embeddings, batch["present"])
    if settings.removal == "every" or settings.consistency_weight:
      every = immunity.over_sets(model, params, embeddings, batch["present"])
    if settings.removal == "every":
      said, left = every
    else:
      one = immunity.logits_of(model, params, embeddings, available)
      said, left = jax.tree.map(lambda x: x[None], (one, available))
    clean = objectives.task_loss(model, logits, batch)
    attacked = immunity.loss_over_sets(model, said, left, batch["label"])
    total = settings.clean_weight * clean + settings.attack_weight * attacked
    metric = objectives.score_name(model)
    parts = {
      metric: objectives.score(model, logits, batch),
      f"attacked_{metric}": immunity.score_over_sets(
        model, said, left, batch["label"]
      ),
      "clean_loss": clean,
      "attacked_loss": attacked,
    }
    if settings.consistency_weight:
      apart = immunity.disagreement(model, *every, logits, settings.temperature)
      total = total + settings.consistency_weight * apart
      parts["disagreement"] = apart
    if settings.reconstruction_weight:
      rebuilt = decoders_lib.loss(
        decoders, settings.features, embeddings, available, batch
      )
      total = total + settings.reconstruction_weight * rebuilt
      parts["reconstruction_loss"] = rebuilt
    return total, parts

  return loss_fn


def _train_decoders(extra, grads):
  if "decoders" not in extra:
    return extra
  updates, after = decoder_optimizer().update(grads, extra["decoder_optimizer"])
  moved = optax.apply_updates(extra["decoders"], updates)
  return {**extra, "decoders": moved, "decoder_optimizer": after}


def meta_parameters(settings: immunity.Settings, extra):
  """As they stand: learnt, or what they began with."""
  return extra["outer"].phi if settings.adapt else settings.phi()


def draw(settings: immunity.Settings, key, extra, warm):
  """The arm; none (M) while the clean loss is worse than it has been."""
  alike = controllers.uniform(settings.num_arms).init()
  log_weights = jnp.where(
    warm, alike.log_weights, extra["controller"].log_weights
  )
  arm = settings.controller.draw(
    key, extra["controller"]._replace(log_weights=log_weights)
  )
  if settings.guard_tolerance is None:
    return arm
  worst = (1 + settings.guard_tolerance) * extra["best_clean_loss"]
  harmed = ~warm & (extra["clean_loss"] > worst)
  return jnp.where(harmed, settings.num_arms, arm)


def watch(settings: immunity.Settings, extra, clean, warm):
  """The running mean of the clean loss, and its best since the warm-up."""
  first = extra["count"] == 1
  mean = _MEMORY * extra["clean_loss"] + (1 - _MEMORY) * clean
  mean = jnp.where(first, clean, mean)
  best = jnp.where(warm, mean, jnp.minimum(extra["best_clean_loss"], mean))
  if not settings.warmup_steps:
    best = jnp.where(first, mean, best)
  return {**extra, "clean_loss": mean, "best_clean_loss": best}


def make_probe(settings: immunity.Settings) -> Callable:
  """What each modality is worth on held-out examples: one controller round."""
  model = settings.model

  def probe(state, batch, key):
    del key
    extra = state.extra

    def loss_fn(params, batch):
      outputs, _ = model.apply(
        params, state.model_state, batch["inputs"], batch["present"]
      )
      return objectives.task_loss(model, outputs.logits, batch)

    full, left = modalities.leave_one_out(loss_fn, state.params, batch)
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
    embeddings, _ = model.encode(
      state.params,
      state.model_state,
      batch["inputs"],
      batch["present"],
      train=False,
    )
    for index, name in enumerate(model.modalities):
      metrics[f"gain_{name}"] = gains[name]
      metrics[f"p_{name}"] = p[index]
      metrics[f"rank_{name}"] = _relative_rank(
        embeddings[name], batch["present"][name]
      )
    if settings.gates:
      for name, line in masking.gate_report(state.opt_state).items():
        metrics[f"closed_{name}"] = line["rate"]
        for word in ("rho_min", "rho_max", "cosine"):
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


def outer_step(settings: immunity.Settings) -> hypergrad.OuterStep:
  """The step on the meta-parameters; skipped where it is not accepted."""
  fn = hypergrad.hypergradient(
    lambda theta, phi, batch: immunity.expected_loss(
      settings, theta, phi, batch
    ),
    lambda theta, phi, batch: immunity.outer_loss(settings, theta, phi, batch),
    fidelity=settings.fidelity,
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
