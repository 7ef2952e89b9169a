"""A model split at the tokens of its encoders, where these can be split."""

from collections.abc import Mapping
from typing import Any

import jax

from robust_mm import modalities
from robust_mm.models.functional import Encoder


def functions(
  encoders: Mapping[str, Encoder], normalizers: Mapping[str, Any]
) -> dict[str, Any]:
  """``embed`` and ``encode_tokens`` of a model; empty without such encoders.

  ``encode_tokens`` after ``embed`` is what ``encode`` computes of these
  modalities, bit for bit, random streams included.
  """
  order = tuple(normalizers)
  names = tuple(n for n in order if encoders[n].encode_tokens is not None)
  if not names:
    return {}

  def embed(params, state, inputs, present):
    del state  # encoders that can be split keep none
    masked = modalities.mask(
      {name: inputs[name] for name in names},
      {name: present[name] for name in names},
    )
    return {
      name: encoders[name].embed(
        params["encoders"][name], {}, normalizers[name](value)
      )
      for name, value in masked.items()
    }

  def encode_tokens(params, state, tokens, present, *, train=False, key=None):
    del state
    found = {}
    for name, value in tokens.items():
      own = None
      if key is not None:
        own = jax.random.fold_in(key, order.index(name))
      found[name], _ = encoders[name].encode_tokens(
        params["encoders"][name], {}, value, None, train=train, key=own
      )
    return modalities.mask(found, {name: present[name] for name in found})

  return {"embed": embed, "encode_tokens": encode_tokens}
