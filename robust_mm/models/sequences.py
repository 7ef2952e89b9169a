"""What a model of tokens offers beside encode and fuse, from its parts."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from robust_mm import modalities
from robust_mm._types import TokenParts
from robust_mm.models import captioning
from robust_mm.models import transformer
from robust_mm.models.functional import Encoder


def check(encoders: Mapping[str, Encoder], fusion: Any) -> None:
  """Encoders that give tokens go with a head that takes them.

  Raises:
    ValueError: naming the modality.
  """
  if isinstance(fusion, captioning.CaptionFusion):
    return  # takes embeddings and tokens alike
  takes = isinstance(_inner(fusion), transformer.TransformerFusion)
  for name, encoder in encoders.items():
    if takes and encoder.tokenizer is None:
      raise ValueError(
        f"fusion 'transformer' needs the encoder 'patches', which gives "
        f"tokens; modality {name!r} has {encoder.name!r}."
      )
    if encoder.tokenizer is not None and not takes:
      raise ValueError(
        f"the encoder 'patches' of modality {name!r} gives tokens, which the "
        f"fusion 'transformer' alone takes."
      )


def functions(fusion, encoders, normalizers, shapes) -> dict[str, Any]:
  """``features``, ``token_parts`` or ``captions`` of a model that has them."""
  head = _inner(fusion)
  if isinstance(head, captioning.CaptionFusion):
    return {"captions": head.captions(shapes)}
  if not isinstance(head, transformer.TransformerFusion):
    return {}
  layouts = {
    name: encoders[name].tokenizer.layout(shapes[name]) for name in shapes
  }

  def patches(inputs, present):
    kept = modalities.mask(
      {name: inputs[name] for name in shapes},
      {name: present[name] for name in shapes},
    )
    found = {}
    for name, x in kept.items():
      if not encoders[name].tokens:
        x = normalizers[name](x)
        # The mean of the data is no zero: absent again, after it.
        x = modalities.mask({name: x}, present)[name]
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
      found[name] = encoders[name].tokenizer.cut(x, shapes[name])
    return found

  parts = TokenParts(
    num_tokens={name: number for name, (number, _) in layouts.items()},
    sizes={name: size for name, (_, size) in layouts.items()},
    width=next(iter(encoders.values())).embedding_dim,
    ids=tuple(name for name in shapes if encoders[name].tokens),
    patches=patches,
    attend=lambda params, tokens, keep: head.attend(
      params["fusion"], tokens, keep
    ),
    real=transformer.real,
  )
  return {
    "features": lambda params, embeddings, present: head.features(
      params["fusion"], embeddings, present
    ),
    "token_parts": parts,
  }


def _inner(fusion):
  """The head itself, where a regression has scaled it."""
  return getattr(fusion, "fusion", fusion)
