"""The update and the jobs of ModalImmune, over ``state.extra``."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from robust_mm import controllers
from robust_mm import modalities
from robust_mm.recipes import decoders as decoders_lib
from robust_mm.recipes import immune_jobs
from robust_mm.recipes import immunity
from robust_mm.recipes import objectives
from robust_mm.recipes import probes as probes_lib

_MEMORY = 0.99  # of the running mean of the clean loss


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


def side_optimizer() -> optax.GradientTransformation:
  """Of decoders and probes: they are no part of the model that is kept."""
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
    decoder_key, probe_key = jax.random.split(key)
    if settings.adapt:
      found["outer"] = immune_jobs.outer_step(settings).init(settings.phi())
    if settings.reconstruction_weight:
      made = decoders_lib.init(
        decoder_key, settings.features, embedding_dims(settings, params)
      )
      found["decoders"] = made
      found["decoder_optimizer"] = side_optimizer().init(made)
    if settings.feedback_weight:
      made = probes_lib.init(
        probe_key,
        embedding_dims(settings, params),
        settings.model.num_classes,
      )
      found["probes"] = made
      found["probe_optimizer"] = side_optimizer().init(made)
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
    draw_key, model_key, noise_key, subset_key, damage_key = jax.random.split(
      key, 5
    )
    extra, present = state.extra, batch["present"]
    weights = settings.weights(meta_parameters(settings, extra))
    warm = extra["count"] < settings.warmup_steps
    arm = draw(settings, draw_key, extra, warm)
    available = left(settings, subset_key, present, arm)
    inputs, intact = damaged(
      settings, damage_key, batch["inputs"], present, arm
    )

    def encode(params):
      return model.encode(
        params,
        state.model_state,
        inputs,
        present,
        train=True,
        key=model_key,
      )

    embeddings, pull, model_state = jax.vjp(encode, state.params, has_aux=True)
    task = jax.value_and_grad(loss_fn, argnums=(0, 1, 2), has_aux=True)
    (loss, parts), (by_params, by_embeddings, by_decoders) = task(
      state.params,
      embeddings,
      extra.get("decoders", {}),
      available,
      intact,
      batch,
    )
    grads = jax.tree.map(jnp.add, by_params, pull(by_embeddings)[0])
    options, found = {"value": loss}, jnp.zeros(())
    if settings.collapse_weight or settings.feedback_weight:
      active = (jnp.where(warm, 0, weights[0]), weights[1])
      added, found, pushed = _destroy(
        settings, embeddings, batch, arm, active, noise_key, extra, warm
      )
      # Not finite: the mask leaves it out of its block, and counts that.
      loss = loss + jnp.where(jnp.isfinite(added), added, 0)
      options["destructive"] = pull(pushed)[0]
      options["value_fn"] = lambda params: _separable(
        settings, params, state.model_state, batch, weights, extra
      )
      options["fisher_batch"] = task_examples(batch, state.model_state)
    updates, opt_state = tx.update(
      grads, state.opt_state, state.params, **options
    )
    extra = {**extra, "count": extra["count"] + 1, "arm": arm}
    seen = jnp.any(undamaged(present, intact))
    extra = watch(settings, extra, parts["clean_loss"], warm, seen)
    extra = _train(extra, "decoder", by_decoders)
    if settings.feedback_weight:
      by_probes = jax.grad(
        lambda probes: jnp.sum(
          probes_lib.losses(probes, embeddings, present, batch["label"])
        )
      )(extra["probes"])
      extra = _train(extra, "probe", by_probes)
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


def damaged(settings: immunity.Settings, key, inputs, present, arm):
  """(inputs with those of the arm corrupted in some rows, what is intact).

  The second is ``present`` without what was corrupted.
  """
  if settings.damage is None:
    return inputs, present
  hit_key, key = jax.random.split(key)
  changed, intact = {}, {}
  for index, name in enumerate(modalities.names(inputs)):
    x, there = inputs[name], present[name]
    changed[name], intact[name] = x, there
    if not settings.damage.fitting(name, x.shape[1:], x.dtype):
      continue
    hit = jax.random.bernoulli(hit_key, settings.damage_rate, there.shape)
    hit = hit & there & (arm == index)
    own = jax.random.fold_in(key, index)
    changed[name] = jax.lax.cond(
      arm == index,
      lambda x, name=name, own=own, hit=hit: settings.damage(own, name, x, hit),
      lambda x: x,
      x,
    )
    intact[name] = there & ~hit
  return changed, intact


def _destroy(settings, embeddings, batch, arm, weights, key, extra, warm):
  """(weighted loss, collapse, gradient in the embeddings): what destroys."""
  present = batch["present"]

  def weighted(embeddings):
    loss = jnp.zeros(())
    if settings.collapse_weight:
      loss = immunity.collapse(
        settings, embeddings, present, arm, weights[1], key
      )
    total = weights[0] * loss
    if settings.feedback_weight:
      climbed = probes_lib.feedback(
        extra["probes"], embeddings, present, batch["label"], arm
      )
      total = total + jnp.where(warm, 0, settings.feedback_weight) * climbed
    return total, loss

  grad_fn = jax.value_and_grad(weighted, has_aux=True)
  (added, loss), pushed = grad_fn(embeddings)
  return added, loss, pushed


def _separable(settings, params, state, batch, weights, extra):
  """All that destroys, of every modality at once: what gates look at."""
  present = batch["present"]
  embeddings, _ = settings.model.encode(
    params, state, batch["inputs"], present, train=False
  )
  total = immunity.separable_collapse(settings, embeddings, present, weights)
  if settings.feedback_weight:
    climbed = probes_lib.bounded(
      extra["probes"], embeddings, present, batch["label"]
    )
    total = total - settings.feedback_weight * jnp.sum(climbed)
  return total


def task_examples(batch, state):
  """What a Fisher mask looks at; its loss is of one row, the state with it."""
  size = batch["label"].shape[0]
  return {
    "batch": {key: batch[key] for key in ("inputs", "present", "label")},
    "state": jax.tree.map(
      lambda leaf: jnp.broadcast_to(leaf, (size, *jnp.shape(leaf))), state
    ),
  }


def make_task(settings: immunity.Settings) -> Callable:
  """``loss(params, embeddings, decoders, available, intact, batch)``.

  No collapse. Rows with a damaged modality are trained on; what teaches them is
  the prediction from what is intact, and they do not count as clean.
  """

  def loss_fn(params, embeddings, decoders, available, intact, batch):
    model, present, label = settings.model, batch["present"], batch["label"]
    smoothing, restraint = settings.label_smoothing, settings.restraint
    if restraint is not None:
      restraint = restraint.at(batch)

    def predict(present):
      return immunity.logits_of(model, params, embeddings, present)

    def task_loss(batch):
      return objectives.task_loss(
        model,
        logits,
        batch,
        label_smoothing=smoothing,
        restraint=restraint,
      )

    logits = teacher = predict(present)
    clean = batch
    if settings.damage is not None:
      teacher = predict(intact)
      whole = undamaged(present, intact)
      clean = {**batch, "present": {n: f & whole for n, f in present.items()}}
    if settings.removal == "every" or settings.consistency_weight:
      every = immunity.over_sets(model, params, embeddings, present)
    if settings.removal == "every":
      said, left = every
    else:
      said, left = jax.tree.map(
        lambda x: x[None], (predict(available), available)
      )
    attacked = immunity.loss_over_sets(
      model, said, left, label, smoothing, restraint
    )
    total = settings.attack_weight * attacked
    total = total + settings.clean_weight * task_loss(batch)
    metric = objectives.score_name(model)
    parts = {
      metric: objectives.score(model, logits, clean),
      f"attacked_{metric}": immunity.score_over_sets(model, said, left, label),
      "clean_loss": task_loss(clean),
      "attacked_loss": attacked,
    }
    if restraint is not None:
      parts.update(restraint.term(logits, clean)[1])
    if settings.consistency_weight:
      said, left = every
      taught = jnp.any(modalities.stack(intact), axis=0)
      left = {name: flag & taught[None] for name, flag in left.items()}
      apart = immunity.disagreement(
        model, said, left, teacher, settings.temperature
      )
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


def undamaged(present, intact):
  """``bool[b]``: rows of which nothing has been corrupted."""
  same = [present[name] == intact[name] for name in present]
  return jnp.all(jnp.stack(same), axis=0)


def _train(extra, name: str, grads):
  """A step of the decoders, or of the probes, where there are any."""
  parts, optimizer = f"{name}s", f"{name}_optimizer"
  if parts not in extra:
    return extra
  updates, after = side_optimizer().update(grads, extra[optimizer])
  moved = optax.apply_updates(extra[parts], updates)
  return {**extra, parts: moved, optimizer: after}


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


def watch(settings: immunity.Settings, extra, clean, warm, seen=True):
  """The running mean of the clean loss, and its best since the warm-up.

  It stays where nothing clean has been ``seen`` in a step.
  """
  first = extra["count"] == 1
  mean = _MEMORY * extra["clean_loss"] + (1 - _MEMORY) * clean
  mean = jnp.where(first, clean, jnp.where(seen, mean, extra["clean_loss"]))
  best = jnp.where(warm, mean, jnp.minimum(extra["best_clean_loss"], mean))
  if not settings.warmup_steps:
    best = jnp.where(first, mean, best)
  return {**extra, "clean_loss": mean, "best_clean_loss": best}
