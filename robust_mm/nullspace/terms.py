"""Losses of training with noise that should not matter."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from robust_mm import _validate
from robust_mm import losses
from robust_mm.nullspace import criteria
from robust_mm.nullspace import tokens as tokens_lib


class Terms(NamedTuple):
  """Of :func:`paired_loss`; scalars, means over items that count.

  Attributes:
    loss: what is minimised.
    clean: cross-entropy without noise.
    noisy: with noise.
    consistency: KL of the noisy from the clean prediction.
    change: the criterion of the noise on this batch.
  """

  loss: Any
  clean: Any
  noisy: Any
  consistency: Any
  change: Any


def augmented_loss(
  encode: Callable[..., Any],
  params: Any,
  tokens: Any,
  labels: Int[Array, " b"],
  noise: Any,
  *,
  consistency_weight: float = 0.0,
  label_smoothing: float = 0.0,
  counted: Bool[Array, " b"] | None = None,
) -> Terms:
  r"""Cross-entropy without and with noise on the tokens.

  .. math:: L = CE(f(u), y) + CE(f(u + v), y)
            + \lambda\, KL(sg\, \pi(u) \,\|\, \pi(u + v))

  Formal guarantees:
    - v is a constant: its gradient is exactly 0.
    - At v = 0 it is 2 CE(f(u), y).
    - Where ``encode`` gives absent modalities no path, noise on one of them
      changes no bit of it.

  Args:
    encode: ``encode(params, tokens) -> logits [b, k]``.
    params: pytree.
    tokens: ``[b, N, d]``, or ``{m: [b, N_m, d]}``.
    labels: classes.
    noise: ``[1, N, d]`` or ``[b, N, d]``, or such for some modalities.
    consistency_weight: lambda; published: 0.
    label_smoothing: share of every label spread over all classes, in [0, 1).
    counted: items that count; all by default.

  Raises:
    ValueError: naming ``noise`` (shape), ``consistency_weight``, ``labels`` or
      ``label_smoothing``.
  """
  noisy = encode(params, tokens_lib.add(tokens, noise))
  return paired_loss(
    encode(params, tokens),
    noisy,
    labels,
    consistency_weight=consistency_weight,
    label_smoothing=label_smoothing,
    counted=counted,
  )


def paired_loss(
  clean: Float[Array, "b k"],
  noisy: Float[Array, "b k"],
  labels: Int[Array, " b"],
  *,
  consistency_weight: float = 0.0,
  label_smoothing: float = 0.0,
  counted: Bool[Array, " b"] | None = None,
) -> Terms:
  """:func:`augmented_loss` of logits that are there."""
  _validate.non_negative(consistency_weight=consistency_weight)
  clean, noisy = clean.astype(jnp.float32), noisy.astype(jnp.float32)
  if counted is None:
    counted = jnp.ones(clean.shape[:1], bool)
  count = jnp.maximum(jnp.sum(counted), 1)

  def mean(values):
    return jnp.sum(jnp.where(counted, values, 0)) / count

  def entropy(logits):
    return mean(
      losses.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    )

  without, with_noise = entropy(clean), entropy(noisy)
  apart = mean(criteria.change(clean, noisy, "kl"))
  loss = without + with_noise
  if consistency_weight:
    loss = loss + consistency_weight * apart
  change = jax.lax.stop_gradient(criteria.change(clean, noisy, "criterion"))
  return Terms(loss, without, with_noise, apart, mean(change))
