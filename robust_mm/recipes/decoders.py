r"""Decoders: what is left when a modality is gone should tell what it said.

One perceptron a modality from the fused representation (all available
embeddings and which they are) to features of the raw input, which are frozen:
a target made of embeddings would be won by collapsing it.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import modalities
from robust_mm.models import masked

WIDTH = 64
MOST_FEATURES = 256
_SMALLEST = 1e-6
# Targets end here, in deviations: what hardly varies in the training set (the
# border of a picture) varies by hundreds of them once inputs are augmented.
LARGEST = 3.0


def pooled(x):
  """``[b, d]`` features of inputs ``[b, ...]``: means over leading axes.

  Until no more than ``MOST_FEATURES`` numbers are left, or one axis.
  """
  while x.ndim > 2 and x.size // max(len(x), 1) > MOST_FEATURES:
    x = x.mean(axis=1)
  return x.reshape(len(x), -1)


def statistics(inputs, present) -> tuple[np.ndarray, np.ndarray]:
  """(mean, deviation) of the features of training inputs, on the host."""
  features = pooled(np.asarray(inputs, np.float64)[np.asarray(present)])
  deviation = features.std(axis=0)
  # A constant feature would make noise in it decisive.
  deviation = np.where(deviation > _SMALLEST, deviation, 1)
  return (
    features.mean(axis=0).astype(np.float32),
    deviation.astype(np.float32),
  )


def init(key, features: Mapping, embedding_dims: Mapping[str, int]) -> dict:
  """``{m: {"hidden", "last"}}`` for the modalities that have statistics."""
  size = sum(embedding_dims.values()) + len(embedding_dims)
  made = {}
  for index, name in enumerate(modalities.names(features)):
    first, second = jax.random.split(jax.random.fold_in(key, index))
    made[name] = {
      "hidden": masked.dense(first, size, WIDTH),
      "last": masked.dense(second, WIDTH, len(features[name][0])),
    }
  return made


def loss(decoders, features: Mapping, embeddings, present, batch):
  r"""How far the features are from what the available embeddings say.

  .. math:: \frac1M \sum_m \operatorname{mean}_{i, d} (D_m(u) - h_m)_{id}^2

  over rows that have m in the data, standardised features cut to three
  deviations, removed modalities too. Per feature (the sum over features would
  grow with their number).
  """
  ordered = modalities.names(embeddings)
  kept = modalities.mask(embeddings, present)
  flags = modalities.stack(present, axis=-1)
  parts = [kept[name] for name in ordered]
  u = jnp.concatenate([*parts, flags.astype(parts[0].dtype)], axis=-1)
  inputs = modalities.mask(batch["inputs"], batch["present"])
  terms = []
  for name, decoder in decoders.items():
    mean, deviation = (jnp.asarray(a)[None] for a in features[name])
    target = (pooled(inputs[name].astype(u.dtype)) - mean) / deviation
    target = jnp.clip(target, -LARGEST, LARGEST)
    hidden = jax.nn.gelu(masked.apply(decoder["hidden"], u))
    error = jnp.mean(
      jnp.square(masked.apply(decoder["last"], hidden) - target), axis=-1
    )
    rows = batch["present"][name]
    total = jnp.sum(jnp.where(rows, error, 0))
    terms.append(total / jnp.maximum(jnp.sum(rows), 1))
  return sum(terms) / len(terms)
