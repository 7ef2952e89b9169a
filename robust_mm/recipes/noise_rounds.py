"""What the nullspace recipe does: rounds of search, and updates with noise."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from robust_mm import modalities
from robust_mm import nullspace
from robust_mm._types import Model
from robust_mm.nullspace import criteria
from robust_mm.nullspace import published
from robust_mm.nullspace import searching
from robust_mm.recipes import objectives
from robust_mm.recipes import restraints

CLEAN = ("clean", "twice_clean")
SINGLE = ("published", "corrected")
ARMS = (
  *CLEAN,
  "random",
  "random_at_criterion",
  "permuted",
  *SINGLE,
  "bank",
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
  """The arguments of ``recipes.nullspace``, checked.

  Attributes:
    noisy: modalities that get noise; empty in the clean arms.
  """

  model: Model
  noise: str
  noisy: tuple[str, ...]
  num_members: int
  convex_pairs: bool
  radius_factor: float
  consistency_weight: float
  label_smoothing: float
  restraint: restraints.Restraint | None
  permuted: str
  search: nullspace.Search
  published: published.Settings


def token_shapes(model: Model) -> dict[str, tuple[int, int]]:
  """``{m: (N, d)}`` of the modalities that have tokens."""

  def tokens(key):
    params, state = model.init(key)
    inputs = {
      name: jnp.zeros((1, *shape)) for name, shape in model.input_shapes.items()
    }
    present = {name: jnp.ones(1, bool) for name in inputs}
    return model.embed(params, state, inputs, present)

  found = jax.eval_shape(tokens, jax.random.key(0))
  return {name: value.shape[1:] for name, value in found.items()}


def make_extra(settings: Settings) -> Callable:
  """``extra(params, key)``: an empty bank for each noisy modality.

  ``shown`` is what training draws from: the bank itself, but for permuted
  noise, whose members ``bank`` keeps as they were found.
  """
  shapes = token_shapes(settings.model) if settings.noisy else {}

  def extra(params, key):
    del params, key
    banks = {
      name: _stored(nullspace.empty_bank(settings.num_members, shapes[name]))
      for name in settings.noisy
    }
    found = {"shown": banks} if banks else {}
    if settings.noise == "permuted":
      found["bank"] = jax.tree.map(jnp.array, banks)
    return found

  return extra


def _stored(bank: nullspace.NoiseBank) -> dict:
  """The bank as a plain dict, for checkpoints."""
  return {f.name: getattr(bank, f.name) for f in dataclasses.fields(bank)}


# ---- updates


def make_update(
  settings: Settings, tx: optax.GradientTransformation
) -> Callable:
  """One step on clean inputs and on those with noise, or a second view."""

  def update(state, batch, key):
    def loss_fn(params):
      return _loss(settings, params, state, batch, key)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (model_state, metrics)), grads = grad_fn(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    state = dataclasses.replace(
      state,
      params=optax.apply_updates(state.params, updates),
      model_state=model_state,
      opt_state=opt_state,
    )
    norm = optax.tree.norm(grads)
    return state, {"loss": loss, **metrics, "gradient_norm": norm}

  return update


def _loss(settings: Settings, params, state, batch, key):
  """(loss, (model state, metrics))."""
  model, present = settings.model, batch["present"]
  first_key, second_key, noise_key = jax.random.split(key, 3)

  embeddings, model_state = model.encode(
    params,
    state.model_state,
    batch["inputs"],
    present,
    train=True,
    key=first_key,
  )
  clean = model.fuse(params, embeddings, present)
  added, metrics = _restrained(settings, batch, clean)
  metrics["accuracy"] = objectives.accuracy(clean.logits, batch)
  if settings.noise == "clean":
    loss = objectives.classification(
      clean.logits, batch, label_smoothing=settings.label_smoothing
    )
    return loss + added, (model_state, metrics)
  if settings.noise == "twice_clean":
    second, _ = model.encode(
      params,
      state.model_state,
      batch.get("second_inputs", batch["inputs"]),
      present,
      train=True,
      key=second_key,
    )
  else:
    tokens = model.embed(params, state.model_state, batch["inputs"], present)
    noise = draw(settings, state.extra["shown"], noise_key, len(batch["label"]))
    changed = model.encode_tokens(
      params,
      state.model_state,
      nullspace.add_noise({name: tokens[name] for name in noise}, noise),
      present,
      train=True,
      key=second_key,
    )
    second = {**embeddings, **changed}
  noisy = model.fuse(params, second, present)
  added = added + _restrained(settings, batch, noisy)[0]
  terms = nullspace.paired_loss(
    clean.logits,
    noisy.logits,
    batch["label"],
    consistency_weight=settings.consistency_weight,
    label_smoothing=settings.label_smoothing,
    counted=jnp.any(modalities.stack(present), axis=0),
  )
  metrics["clean_loss"], metrics["noisy_loss"] = terms.clean, terms.noisy
  metrics["change"] = terms.change
  return terms.loss + added, (model_state, metrics)


def _restrained(settings: Settings, batch, outputs) -> tuple:
  """(what is added to one cross-entropy, metrics)."""
  if settings.restraint is None:
    return 0.0, {}
  return settings.restraint.term(outputs.logits, batch, outputs.scores)


def draw(settings: Settings, shown: dict, key, number: int) -> dict:
  """``{m: [number, N, d]}``, or ``[1, N, d]`` of one noise for all."""
  found = {}
  for index, name in enumerate(settings.noisy):
    bank = nullspace.NoiseBank(**shown[name])
    if settings.noise in SINGLE:
      noise = bank.noise  # zeros before the first round
    else:
      noise = bank.sample(
        jax.random.fold_in(key, index), number, pairs=settings.convex_pairs
      )
    found[name] = settings.radius_factor * noise
  return found


# ---- rounds


def make_round(settings: Settings) -> Callable:
  """A search for every noisy modality, its result added to the bank.

  Of the new member as training draws it (permuted, ``radius_factor`` times as
  large, at full scale) metrics say ``radius``, ``norm``, ``criterion``, the
  mean over the hold-out half, and ``held``, 1 where that is at most eps; all
  are 0 where none was found. ``stale`` is the share of the earlier members
  whose own criterion has come to exceed 2 eps.
  """

  def run(state, batch, key):
    extra, metrics = dict(state.extra), {}
    for index, name in enumerate(settings.noisy):
      own = jax.random.fold_in(key, index)
      extra, found = _round(settings, state, extra, batch, name, own)
      metrics |= {f"{word}_{name}": value for word, value in found.items()}
    return dataclasses.replace(state, extra=extra), metrics

  return run


def _round(settings: Settings, state, extra, batch, name, key):
  """(extra, metrics) after one modality's search."""
  items, encode = nullspace.items_of(
    settings.model, state.params, state.model_state, batch, name
  )
  half = len(items) // 2
  optimise, holdout = items.take(slice(half)), items.take(slice(half, None))
  search_key, random_key, permute_key = jax.random.split(key, 3)
  kept = "bank" if settings.noise == "permuted" else "shown"
  bank = nullspace.NoiseBank(**extra[kept][name])
  last = bank.radius[jnp.argmax(bank.born)]  # 0 before the first round
  found = _sought(
    settings,
    encode,
    state.params,
    (optimise, holdout),
    last / settings.search.growth,
    (search_key, random_key),
  )
  measured = _measure(encode, state.params, bank, holdout, settings)
  bank = dataclasses.replace(bank, criterion=measured)
  stale = jnp.mean(bank.filled & ~(measured <= 2 * settings.search.eps))
  # Random noise is not bounded by eps: of its members, too, the oldest goes, or
  # the control would be what is left of noise when the harmful one is removed.
  bound = jnp.inf if settings.noise == "random" else settings.search.eps
  size = nullspace.scale(optimise.tokens, optimise.counted)
  radius = nullspace.relative_radius(found, size)
  (criterion,) = _changes(encode, state.params, found[None], holdout, settings)
  added = bank.add(found, radius, criterion, eps=bound)
  # A search that finds nothing, or no number, ends with a radius of 0, or NaN;
  # without examples that have the modality it is infinite.
  new = (radius > 0) & jnp.isfinite(radius)
  bank = jax.tree.map(lambda a, b: jnp.where(new, a, b), added, bank)
  extra = {**extra, kept: {**extra[kept], name: _stored(bank)}}
  if settings.noise == "permuted":
    bank = bank.permute(permute_key, settings.permuted)
    measured = _measure(encode, state.params, bank, holdout, settings)
    shown = _stored(dataclasses.replace(bank, criterion=measured))
    extra["shown"] = {**extra["shown"], name: shown}
  # As training draws it: whatever was done to what was found.
  newest = bank.noise[jnp.argmax(bank.born)]
  drawn = settings.radius_factor * jnp.where(new, newest, 0)
  (criterion,) = _changes(encode, state.params, drawn[None], holdout, settings)
  held = new & (criterion <= settings.search.eps)
  return extra, {
    "radius": jnp.where(new, nullspace.relative_radius(drawn, size), 0),
    "criterion": criterion,
    "held": held.astype(jnp.float32),
    "norm": jnp.linalg.norm(drawn),
    "stale": stale,
  }


def _sought(settings, encode, params, halves, start_radius, keys):
  """The noise ``[N, d]`` of an arm; 0, or NaN, where it found none."""
  optimise, holdout = halves
  key, random_key = keys
  search, shape = settings.search, optimise.tokens.shape[1:]

  if settings.noise == "published":
    found = published.descend(encode, params, optimise, settings.published, key)
    return found.noise
  if settings.noise == "random_at_criterion":
    noise, _ = nullspace.random_at_criterion(
      encode, params, holdout, eps=search.eps, key=random_key
    )
    # As many decide as of any other noise.
    enough = jnp.sum(holdout.weights) >= searching.MIN_HOLDOUT
    return jnp.where(enough, noise, 0)
  found = searching.search(
    encode,
    params,
    optimise,
    holdout,
    search,
    key,
    start_radius=start_radius,
  )
  if settings.noise == "random":
    direction = nullspace.random_direction(random_key, shape, search.profile)
    return found.radius * found.size * direction
  return found.noise


def _measure(encode, params, bank, items, settings):
  """``[K]``: the mean criterion of every member on the network as it is."""
  changes = _changes(encode, params, bank.noise, items, settings)
  return jnp.where(bank.filled, changes, 0.0)


def _changes(encode, params, noises, items, settings):
  """``[K]``: the mean criterion of each of ``noises`` [K, N, d]."""
  chunk = settings.search.chunk_size
  clean = criteria.in_chunks(encode, params, items, None, chunk)

  def one(noise):
    noisy = criteria.in_chunks(encode, params, items, noise, chunk)
    return items.mean(criteria.change(clean, noisy, "criterion"))

  return jax.lax.map(one, noises)
