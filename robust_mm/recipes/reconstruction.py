r"""The masked autoencoder: which tokens are hidden, and how well they are told.

A modality an item does not have is neither input nor target.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import PRNGKeyArray

from robust_mm import modalities
from robust_mm._types import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masking:
  """How much is hidden.

  Attributes:
    mask_ratio: share of the tokens of a modality, in (0, 1).
    hide_rate: chance of a whole modality, in [0, 1).
  """

  mask_ratio: float
  hide_rate: float

  def num_visible(self, number: int) -> int:
    """Of the tokens of a modality: one at least, and all but one at most.

    >>> masking = Masking(mask_ratio=0.75, hide_rate=0.0)
    >>> [masking.num_visible(n) for n in (1, 2, 16)]
    [1, 1, 4]
    """
    wanted = round(number * (1 - self.mask_ratio))
    return max(1, min(wanted, number - 1))

  def draw(
    self, key: PRNGKeyArray, real: Mapping[str, Array]
  ) -> dict[str, Array]:
    """``{m: bool[b, N_m]}``: what the encoder sees.

    Ranks of uniform draws against a fixed count: shapes do not depend on what
    is drawn. Tokens that do not exist come last, so that padding takes no
    place of what does.

    Args:
      key: of the draw.
      real: ``{m: bool[b, N_m]}``, tokens that exist.
    """
    hide_key, key = jax.random.split(key)
    shown = self._shown(hide_key, real)
    visible = {}
    for index, name in enumerate(modalities.names(real)):
      there = real[name]
      drawn = jax.random.uniform(jax.random.fold_in(key, index), there.shape)
      order = jnp.argsort(jnp.where(there, drawn, 2.0), axis=-1)
      rank = jnp.argsort(order, axis=-1)
      seen = rank < self.num_visible(there.shape[-1])
      visible[name] = seen & there & shown[name][:, None]
    return visible

  def _shown(self, key, real) -> dict[str, Array]:
    """``{m: bool[b]}``: not hidden as a whole; one of those there at least."""
    names = modalities.names(real)
    there = jnp.stack([jnp.any(real[n], axis=-1) for n in names], axis=-1)
    draws = jax.random.uniform(key, there.shape)
    shown = there & (draws >= self.hide_rate)
    # The largest draw among those that are there: each is equally likely.
    last = jnp.argmax(jnp.where(there, draws, -1.0), axis=-1)
    only = jax.nn.one_hot(last, len(names), dtype=bool) & there
    none = ~jnp.any(shown, axis=-1, keepdims=True)
    shown = shown | (none & only)
    return {name: shown[:, i] for i, name in enumerate(names)}


def normalised(patches: Array, variance_floor: float) -> Array:
  r"""``[b, N, p]``: :math:`(x - mean) / \sqrt{var + floor}` of each patch."""
  mean = jnp.mean(patches, axis=-1, keepdims=True)
  variance = jnp.var(patches, axis=-1, keepdims=True)
  return (patches - mean) * jax.lax.rsqrt(variance + variance_floor)


def loss(
  model: Model,
  params,
  decoder,
  decoder_params,
  tokens: Mapping[str, Array],
  targets: Mapping[str, Array],
  present: Mapping[str, Array],
  key: PRNGKeyArray,
  *,
  masking: Masking,
  variance_floor: float,
) -> Array:
  """Encoder on what is visible, decoder, error of what is not.

  Args:
    model: of tokens.
    params: of the model.
    decoder: ``models.decoding.TokenDecoder``.
    decoder_params: of the decoder.
    tokens: ``{m: [b, N_m, d]}`` of the encoders.
    targets: ``{m: [b, N_m, p_m]}``, or ids ``[b, N_m]``, of
      ``token_parts.patches``.
    present: ``{m: bool[b]}``.
    key: of what is hidden.
    masking: how much is hidden.
    variance_floor: of the targets.

  Returns:
    A scalar, see :func:`error`.
  """
  parts = model.token_parts
  real = parts.real(tokens, present)
  visible = masking.draw(key, real)
  pooled, encoded = parts.attend(params, tokens, visible)
  told = decoder(decoder_params, pooled, encoded, visible, real)
  hidden = {name: real[name] & ~visible[name] for name in real}
  return error(told, targets, hidden, variance_floor=variance_floor)


def error(
  told: Mapping[str, Array],
  targets: Mapping[str, Array],
  hidden: Mapping[str, Array],
  *,
  variance_floor: float,
) -> Array:
  r"""How far off the hidden tokens are: 0 when perfect, 1 knowing nothing.

  .. math:: \operatorname{mean}_m \operatorname{mean}_{hidden\ n}
            \|\hat r_{mn} - r_{mn}\|^2 / p_m

  First inside a modality, over the hidden tokens of the batch, then over
  modalities that have any: else the one with most tokens would own it. Of
  integer ids it is the cross-entropy, in units of that of the uniform guess.

  Args:
    told: ``{m: [b, N_m, p_m]}``; of ids logits.
    targets: ``{m: [b, N_m, p_m]}`` patches, not normalised yet, or ids.
    hidden: ``{m: bool[b, N_m]}``: the targets that count.
    variance_floor: of the patches.
  """
  terms, counted = [], []
  for name in modalities.names(told):
    target, said, there = targets[name], told[name], hidden[name]
    if target.ndim == 2:
      logs = jax.nn.log_softmax(said, axis=-1)
      chosen = jnp.take_along_axis(logs, target[..., None], axis=-1)
      off = -chosen[..., 0] / np.log(said.shape[-1]).astype(np.float32)
    else:
      wanted = normalised(target, variance_floor)
      off = jnp.mean(jnp.square(said - wanted), axis=-1)
    # Selected, not multiplied: a NaN of what is visible stays out.
    number = jnp.sum(there)
    terms.append(jnp.sum(jnp.where(there, off, 0)) / jnp.maximum(number, 1))
    counted.append(number > 0)
  total = jnp.sum(jnp.stack(counted))
  return sum(terms) / jnp.maximum(total, 1)
