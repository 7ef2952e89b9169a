r"""How much noise changes a network, item by item.

.. math:: crit_i(v) = \sum_k (\pi_k(u_i) - \pi_k(u_i + v))^2

with :math:`\pi` the softmax of the logits, in float32. It is an average that is
kept small: single items may change a lot.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from robust_mm import _validate

OBJECTIVES = ("criterion", "logit_l2", "logit_sq", "kl")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Items:
  """What noise is sought or scored on.

  Attributes:
    tokens: ``[n, N, d]``, of the network without noise.
    context: what else ``encode`` takes, a pytree of arrays ``[n, ...]`` such as
      other modalities and who is present; None for nothing:
      ``encode(params, tokens)``, else ``encode(params, tokens, context)``.
    counted: ``bool[n]``, those that count; None for all.
  """

  tokens: Any
  context: Any = None
  counted: Any = None

  def __len__(self) -> int:
    return self.tokens.shape[0]

  def take(self, index: Any) -> "Items":
    """The items of an index or a slice."""
    return jax.tree.map(lambda x: x[index], self)

  @property
  def weights(self) -> Float[Array, " n"]:
    """1 of items that count, 0 of others."""
    if self.counted is None:
      return jnp.ones(len(self), jnp.float32)
    return self.counted.astype(jnp.float32)

  def mean(self, values: Float[Array, " n"]) -> Float[Array, ""]:
    """Over the items that count; 0 without any."""
    weights = self.weights
    total = jnp.sum(jnp.where(weights > 0, values, 0))
    return total / jnp.maximum(jnp.sum(weights), 1)


def logits(encode: Callable, params: Any, items: Items, noise: Any = None):
  """``[n, k]`` float32, with ``noise`` [N, d] on the tokens of every item."""
  shown = items.tokens
  if noise is not None:
    shown = shown + noise[None].astype(shown.dtype)
  if items.context is None:
    said = encode(params, shown)
  else:
    said = encode(params, shown, items.context)
  return said.astype(jnp.float32)


def in_chunks(
  encode: Callable, params: Any, items: Items, noise: Any, size: int
) -> Float[Array, "n k"]:
  """:func:`logits` of many items, ``size`` of them at a time."""
  total = len(items)
  size = min(size, total)
  number = -(-total // size)
  # The last chunk is filled up with items again.
  index = jnp.arange(number * size) % total
  chunks = jnp.reshape(index, (number, size))
  found = jax.lax.map(
    lambda rows: logits(encode, params, items.take(rows), noise), chunks
  )
  return jnp.reshape(found, (number * size, -1))[:total]


def change(
  clean: Float[Array, "n k"], noisy: Float[Array, "n k"], objective: str
) -> Float[Array, " n"]:
  """What an objective says of each item; no gradient reaches ``clean``.

  ``criterion`` as above; ``logit_l2`` the norm of the difference of logits,
  with a gradient at 0; ``logit_sq`` its square; ``kl`` that of the softmax.
  """
  clean = jax.lax.stop_gradient(clean)
  if objective == "criterion":
    apart = jax.nn.softmax(clean) - jax.nn.softmax(noisy)
    return jnp.sum(jnp.square(apart), axis=-1)
  if objective == "kl":
    log_p, log_q = jax.nn.log_softmax(clean), jax.nn.log_softmax(noisy)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
  square = jnp.sum(jnp.square(clean - noisy), axis=-1)
  return square if objective == "logit_sq" else jnp.sqrt(square + 1e-12)


def upper_bound(
  values: Float[Array, " n"], items: Items, quantile: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """(mean, mean + ``quantile`` standard errors) over items that count.

  NaN where one of them is, which is above every eps.
  """
  weights = items.weights
  count = jnp.sum(weights)
  # A value that is not finite has to show, but for items that do not count.
  kept = jnp.where(weights > 0, values, 0.0)
  mean = jnp.sum(kept) / jnp.maximum(count, 1)
  square = jnp.where(weights > 0, jnp.square(kept - mean), 0.0)
  variance = jnp.sum(square) / jnp.maximum(count - 1, 1)
  error = jnp.sqrt(variance / jnp.maximum(count, 1))
  bound = mean + quantile * error
  # Too few to judge by: nothing is feasible.
  return mean, jnp.where(count > 1, bound, jnp.nan)


def criterion(
  encode: Callable,
  params: Any,
  tokens: Float[Array, "n N d"],
  noise: Float[Array, "..."],
  *,
  context: Any = None,
  batch_size: int = 256,
) -> Float[Array, " n"]:
  r"""crit of each item: :math:`\sum_k (\pi_k(u) - \pi_k(u + v))^2`.

  In [0, 2]. Noise is judged by its mean, whatever objective found it.

  Args:
    encode: ``encode(params, tokens[, context]) -> logits [n, k]``.
    params: pytree.
    tokens: ``[n, N, d]``.
    noise: ``[N, d]`` or ``[1, N, d]``.
    context: see :class:`Items`.
    batch_size: items in one pass.

  Raises:
    ValueError: ``noise`` of another shape, ``batch_size`` below 1, no items.
  """
  _validate.at_least(1, batch_size=batch_size)
  if tokens.shape[0] == 0:
    raise ValueError(f"tokens must have items, got shape {tokens.shape}.")
  if noise.ndim == 3 and noise.shape[0] == 1:
    noise = noise[0]
  if noise.shape != tokens.shape[1:]:
    raise ValueError(
      f"noise must be {tokens.shape[1:]}, of one item, got {noise.shape}."
    )
  items = Items(tokens=tokens, context=context)
  clean = in_chunks(encode, params, items, None, batch_size)
  noisy = in_chunks(encode, params, items, noise, batch_size)
  return change(clean, noisy, "criterion")
