r"""Noise on tokens: its size, its shape, and what it is compared with.

With :math:`w` mean-free and of unit norm in every token, noise is
:math:`v = r s w`: :math:`s` is how long tokens typically are without their mean
(what a LayerNorm sees of them) and :math:`r` the relative radius.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import PRNGKeyArray

from robust_mm import _validate

PROFILES = ("token", "global")
AXES = ("entries", "tokens", "channels")
_FLOOR = 1e-12
_ROUNDING = 1e-6  # of a token's length: what is left of its mean
_LONGEST = 3.0  # a token of the global profile
_ROUNDS = 8  # of capping tokens and lengthening the rest


def center(tokens: Float[Array, "*b n d"]) -> Float[Array, "*b n d"]:
  """Tokens less their mean over channels: what a LayerNorm sees of them."""
  return tokens - jnp.mean(tokens, axis=-1, keepdims=True)


def scale(
  tokens: Float[Array, "b n d"], counted: Bool[Array, " b"] | None = None
) -> Float[Array, ""]:
  """s, the median length of centred tokens, over items and tokens.

  Of the items that count, where ``counted`` is given; 0 without any. What
  rounding leaves of a token with the same value in all channels is no length.
  """
  tokens = tokens.astype(jnp.float32)
  lengths = _lengths(center(tokens))
  lengths = jnp.where(lengths <= _ROUNDING * _lengths(tokens), 0.0, lengths)
  if counted is None:
    return jnp.median(lengths)
  kept = jnp.where(counted[:, None, None], lengths, jnp.nan)
  return jnp.nan_to_num(jnp.nanmedian(kept))


def check_channels(tokens: Any) -> None:
  """ValueError where tokens [..., d] have nothing but their mean."""
  if tokens.shape[-1] < 2:
    raise ValueError(
      f"tokens must have at least 2 channels: noise is mean-free over them; "
      f"got shape {tokens.shape}."
    )


def relative_radius(
  noise: Float[Array, "... n d"], size: Float[Array, ""]
) -> Float[Array, "..."]:
  """r: the mean length of centred noise tokens over ``size``, that is s."""
  return jnp.mean(_lengths(center(noise))[..., 0], axis=-1) / size


def normalize(
  direction: Float[Array, "n d"], profile: str = "token"
) -> Float[Array, "n d"]:
  r"""The nearest direction of a profile: mean-free, and of a stated size.

  ``token``: every token has norm 1. ``global``: :math:`\|w\|^2 = N` and no
  token is longer than 3, so that N tokens share what there is.

  Raises:
    ValueError: unknown ``profile``.
  """
  _validate.one_of(PROFILES, profile=profile)
  direction = center(direction)
  if profile == "token":
    return direction / jnp.maximum(_lengths(direction), _FLOOR)
  lengths = _lengths(direction)
  total = direction.shape[0]
  capped = jnp.zeros_like(lengths, bool)
  for _ in range(_ROUNDS):
    left = total - _LONGEST**2 * jnp.sum(capped)
    rest = jnp.sum(jnp.where(capped, 0, jnp.square(lengths)))
    factor = jnp.sqrt(left / jnp.maximum(rest, _FLOOR**2))
    capped = capped | (factor * lengths > _LONGEST)
  wanted = jnp.where(capped, _LONGEST, factor * lengths)
  # Of a round that capped once more, the rest is a little too short.
  wanted = jnp.minimum(wanted, _LONGEST)
  return direction * wanted / jnp.maximum(lengths, _FLOOR)


def random_direction(
  key: PRNGKeyArray, shape: tuple[int, int], profile: str = "token"
) -> Float[Array, "n d"]:
  """Gaussian, mean-free, of the profile: the control of the direction."""
  return normalize(jax.random.normal(key, shape), profile)


def permute(
  noise: Float[Array, "... n d"], key: PRNGKeyArray, axis: str = "entries"
) -> Float[Array, "... n d"]:
  """The same entries in another order: the control of the direction.

  Args:
    noise: ``[N, d]``, or ``[1, N, d]``, or several; all are permuted alike.
    key: typed.
    axis: ``entries``, any entry anywhere; ``tokens``, whole rows; or
      ``channels``, whole columns, which leaves noise mean-free.

  Raises:
    ValueError: unknown ``axis``.
  """
  _validate.one_of(AXES, axis=axis)
  if axis != "entries":
    which = -2 if axis == "tokens" else -1
    order = jax.random.permutation(key, noise.shape[which])
    return jnp.take(noise, order, axis=which)
  flat = jnp.reshape(noise, (*noise.shape[:-2], -1))
  order = jax.random.permutation(key, flat.shape[-1])
  return jnp.reshape(jnp.take(flat, order, axis=-1), noise.shape)


def add(tokens: Any, noise: Any) -> Any:
  """``tokens + noise``, constant in the noise: no gradient reaches it.

  Args:
    tokens: ``[b, N, d]``, or ``{m: [b, N_m, d]}``.
    noise: ``[1, N, d]`` or ``[b, N, d]``; or such for some modalities.

  Raises:
    ValueError: ``noise`` of another shape, or of a modality without tokens.
  """
  if not isinstance(tokens, dict):
    return _added(tokens, noise, "noise")
  _validate.known(tokens, noise=noise)
  return {
    name: _added(value, noise[name], f"noise[{name!r}]")
    if name in noise
    else value
    for name, value in tokens.items()
  }


def _added(tokens, noise, name: str):
  fits = noise.ndim == 3 and noise.shape[1:] == tokens.shape[1:]
  if not fits or noise.shape[0] not in (1, tokens.shape[0]):
    raise ValueError(
      f"{name} must be [1 or {tokens.shape[0]}, *{tokens.shape[1:]}], got "
      f"{noise.shape}."
    )
  return tokens + jax.lax.stop_gradient(noise).astype(tokens.dtype)


def _lengths(x):
  return jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
