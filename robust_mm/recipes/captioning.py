"""Captions by teacher forcing: the next letter, given those before it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from robust_mm import _validate
from robust_mm import losses
from robust_mm import modalities
from robust_mm._types import Model
from robust_mm.recipes import interventions
from robust_mm.recipes import objectives
from robust_mm.recipes import phases
from robust_mm.recipes import restraints


def captioning(
  model: Model,
  *,
  num_steps: int,
  tx: optax.GradientTransformation,
  mispair: bool = True,
  dropout_rate: float = 0.2,
  restraint: restraints.Restraint | None = None,
) -> phases.Recipe:
  """Cross-entropy of every letter of a caption; padding does not count.

  Args:
    model: with ``captions`` (``fusion="captioner"``).
    num_steps: optimiser updates.
    tx: the optimiser.
    mispair: shuffle every modality but the first over the batch, its class with
      it: what is written and what is said differ, and each word of a caption
      has to be read from its own modality. For data whose modalities agree in
      nothing but the class.
    dropout_rate: share of examples of which a random non-empty subset of the
      modalities is seen; the others are captioned "none". 0 for none.
    restraint: a penalty of wrong letters (``recipes.Restraint``), or None; an
      item is a token.

  Raises:
    ValueError: naming the argument that is wrong.
  """
  if model.captions is None:
    raise ValueError(
      "captioning needs a model that spells captions: "
      "config.model.fusion='captioner', or models.captioner."
    )
  _validate.in_unit_interval(dropout_rate=dropout_rate)
  if restraint is not None:
    restraint.check(model, scores=False, letters=len(model.captions.vocabulary))
  before = ()
  if dropout_rate:
    before = (interventions.modality_dropout(rate=dropout_rate),)
  if mispair:
    before = (*before, shuffle)
  phase = phases.Phase(
    name="captioning",
    num_steps=num_steps,
    loss=caption_loss(model, restraint),
    tx=tx,
    interventions=before,
    progress=restraint is not None,
  )
  return phases.Recipe(name="captioning", phases=(phase,))


def shuffle(key, params, state, batch):
  """An intervention: new pairs, and ``classes`` {m: int[b]} of what each is."""
  del params, state
  rows = {}
  for index, name in enumerate(modalities.names(batch["inputs"])):
    rows[name] = jnp.arange(batch["label"].shape[0])
    if index:
      own = jax.random.fold_in(key, index)
      rows[name] = jax.random.permutation(own, rows[name])
  return modalities.recombine(batch, rows)


def caption_loss(
  model: Model, restraint: restraints.Restraint | None = None
) -> Callable:
  """``loss(params, state, batch, *, key)`` of a phase."""
  captions = model.captions

  def loss_fn(params, state, batch, *, key):
    present = batch["present"]
    classes = batch.get("classes")
    if classes is None:
      classes = dict.fromkeys(captions.slots, batch["label"])
    embeddings, state = model.encode(
      params, state, batch["inputs"], present, train=True, key=key
    )
    ids = captions.spell(classes, present)
    counted = jnp.any(modalities.stack(present), axis=0)
    valid = (ids != captions.pad) & counted[:, None]
    logits = captions.logits(params, embeddings, present, ids)
    if restraint is None:
      each = losses.cross_entropy(logits, ids)
      loss = _mean_over(valid, each)
      seen = {"ce": loss, "num_valid": jnp.sum(valid)}
    else:
      added, seen = restraint.tokens(logits, ids, valid, batch)
      loss = seen["ce"] + added
    right = (jnp.argmax(logits, axis=-1) == ids) | ~valid
    whole = jnp.all(right, axis=-1).astype(loss.dtype)
    metrics = {
      "accuracy": objectives.counted_mean(whole, present),
      "letters_right": _mean_over(valid, right.astype(loss.dtype)),
      **seen,
    }
    return loss, (state, metrics)

  return loss_fn


def _mean_over(valid, values):
  """Of the letters that are no padding; 0 without any."""
  total = jnp.sum(jnp.where(valid, values, 0))
  return total / jnp.maximum(jnp.sum(valid), 1)
