"""The decoder of a masked autoencoder: thrown away once training is done."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm import modalities
from robust_mm._types import Params
from robust_mm.models import functional
from robust_mm.models import transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenDecoder:
  """Transformer blocks from what was visible to what every token held.

  At visible places it sees what the encoder says, at the others a learnt mask
  token; all get vectors of position and modality of its own.

  Attributes:
    num_tokens: ``((m, N_m), ...)`` in sorted order.
    sizes: ``((m, p_m), ...)``, values told a token.
    encoder_width: d of the encoder's tokens.
    width: of the decoder.
    num_layers: blocks.
    num_heads: attention heads; divides ``width``.
  """

  num_tokens: tuple[tuple[str, int], ...]
  sizes: tuple[tuple[str, int], ...]
  encoder_width: int
  width: int = 64
  num_layers: int = 1
  num_heads: int = 4

  def __post_init__(self):
    _validate.at_least(
      1,
      decoder_width=self.width,
      decoder_layers=self.num_layers,
      decoder_heads=self.num_heads,
    )
    if self.width % self.num_heads:
      raise ValueError(
        f"decoder_heads must divide decoder_width {self.width}, got "
        f"{self.num_heads}."
      )

  def init(self, key: PRNGKeyArray) -> dict[str, Any]:
    """Parameters."""
    return _functions(self).init(key)[0]

  def __call__(
    self,
    params: Params,
    pooled: Array,
    encoded: Mapping[str, Array],
    visible: Mapping[str, Array],
    real: Mapping[str, Array],
  ) -> dict[str, Array]:
    """``{m: [b, N_m, p_m]}``.

    Args:
      params: of this decoder.
      pooled: ``[b, d]``, its class token.
      encoded: ``{m: [b, N_m, d]}`` of the encoder; read where visible alone.
      visible: ``{m: bool[b, N_m]}``.
      real: ``{m: bool[b, N_m]}``: tokens that exist, visible or not.
    """
    return _functions(self).apply(params, {}, pooled, encoded, visible, real)[0]


class _Network(nnx.Module):
  def __init__(self, decoder: TokenDecoder, rngs: nnx.Rngs):
    width = decoder.width
    draw = lambda shape: nnx.Param(  # noqa: E731
      0.02 * jax.random.normal(rngs.params(), shape)
    )
    self.names = tuple(name for name, _ in decoder.num_tokens)
    self.enter = nnx.Linear(decoder.encoder_width, width, rngs=rngs)
    self.hidden = draw((width,))
    self.position = nnx.Dict(
      {name: draw((number, width)) for name, number in decoder.num_tokens}
    )
    self.kind = nnx.Dict({name: draw((width,)) for name in self.names})
    self.blocks = nnx.List(
      [
        transformer.Block(width, decoder.num_heads, rngs=rngs)
        for _ in range(decoder.num_layers)
      ]
    )
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.last = nnx.Dict(
      {name: nnx.Linear(width, size, rngs=rngs) for name, size in decoder.sizes}
    )

  def __call__(self, pooled, encoded, visible, real):
    parts, keep = [], [jnp.ones((pooled.shape[0], 1), bool)]
    for name in self.names:
      # Selected before the layer: what is said at other places means nothing.
      seen = visible[name][..., None]
      token = self.enter(
        jnp.where(seen, encoded[name], jnp.zeros_like(encoded[name]))
      )
      hidden = self.hidden[...][None, None].astype(token.dtype)
      place = self.position[name][...][None] + self.kind[name][...][None, None]
      parts.append(jnp.where(seen, token, hidden) + place)
      keep.append(real[name])
    x = jnp.concatenate([self.enter(pooled)[:, None], *parts], axis=1)
    keep = jnp.concatenate(keep, axis=1)
    for block in self.blocks:
      x = block(x, keep)
    x = self.norm(x)[:, 1:]
    found, start = {}, 0
    for name, part in zip(self.names, parts):
      found[name] = self.last[name](x[:, start : start + part.shape[1]])
      start += part.shape[1]
    return found


@functools.lru_cache(maxsize=64)
def _functions(decoder: TokenDecoder) -> functional.Functions:
  return functional.from_module(lambda rngs: _Network(decoder, rngs))


def for_model(model, **options) -> TokenDecoder:
  """The decoder that fits a model with ``token_parts``."""
  parts = model.token_parts
  names = modalities.names(parts.num_tokens)
  return TokenDecoder(
    num_tokens=tuple((name, parts.num_tokens[name]) for name in names),
    sizes=tuple((name, parts.sizes[name]) for name in names),
    encoder_width=parts.width,
    **options,
  )
