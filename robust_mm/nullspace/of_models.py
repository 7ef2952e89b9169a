"""What noise is sought on, of a model of several modalities."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from robust_mm import _validate
from robust_mm._types import Batch
from robust_mm._types import Model
from robust_mm.nullspace.criteria import Items


def items_of(
  model: Model, params: Any, state: Any, batch: Batch, modality: str
) -> tuple[Items, Callable[..., Any]]:
  """``(items, encode)`` of one modality's tokens, the others as they are.

  >>> items, encode = nullspace.items_of(                 # doctest: +SKIP
  ...   model, params, state, batch, "image")
  >>> half = len(items) // 2                              # doctest: +SKIP
  >>> nullspace.search(                                   # doctest: +SKIP
  ...   encode, params, items.take(slice(half)), items.take(slice(half, None)),
  ...   nullspace.Search(), key)

  Of a model of one modality ``items.tokens`` and ``encode`` are what
  :func:`encoder_noise` takes as well.

  Args:
    model: whose encoder of ``modality`` can be split at its tokens (``vit``).
    params: its parameters.
    state: the model's state.
    batch: ``{"inputs", "present", ...}`` of n examples.
    modality: gets the noise.

  Returns:
    Items that count where ``modality`` is present, and ``encode(params, tokens,
    context) -> logits [n, k]``, in evaluation mode. Their context holds the
    embeddings of the other modalities, by ``params``.

  Raises:
    ValueError: ``modality`` is none, or its encoder cannot be split.
  """
  present = batch["present"]
  if model.embed is None:
    raise ValueError(
      "model has no encoder that can be split at its tokens, as 'vit' can."
    )
  tokens = model.embed(params, state, batch["inputs"], present)
  _validate.one_of(tuple(tokens), modality=modality)
  context = None
  if len(model.modalities) > 1:
    embeddings, _ = model.encode(params, state, batch["inputs"], present)
    others = {n: value for n, value in embeddings.items() if n != modality}
    context = {"embeddings": others, "present": present}

  def encode(params, tokens, context=None):
    if context is None:
      context = {
        "embeddings": {},
        "present": {modality: jnp.ones(tokens.shape[0], bool)},
      }
    changed = model.encode_tokens(
      params, state, {modality: tokens}, context["present"]
    )
    embeddings = {**context["embeddings"], **changed}
    return model.fuse(params, embeddings, context["present"]).logits

  items = Items(
    tokens=tokens[modality], context=context, counted=present[modality]
  )
  return items, encode
