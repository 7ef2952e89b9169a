"""Linear base classifiers with closed-form answers, for smoothing tests."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

SIZES = {"left": 4, "right": 3}


def weights(seed=0):
  """``{m: w_m}`` of the logit difference of two classes."""
  random = np.random.default_rng(seed)
  return {
    name: random.normal(size=size).astype(np.float32)
    for name, size in SIZES.items()
  }


def linear(vectors):
  """Logits ``(z, 0)`` with z the sum of ``w_m . x_m`` over present inputs."""
  return jax.tree_util.Partial(_logits, vectors)


def _logits(vectors, inputs, present):
  del present
  z = sum(
    jnp.einsum("sd,d->s", inputs[name], vector, precision="highest")
    for name, vector in vectors.items()
  )
  return jnp.stack([z, jnp.zeros_like(z)], axis=-1)


def score(vectors, inputs):
  """z ``[b]`` in float64."""
  return sum(
    np.asarray(inputs[n], np.float64) @ np.asarray(v, np.float64)
    for n, v in vectors.items()
  )


def spread(vectors, sigma):
  """The standard deviation of z under the noise."""
  return np.sqrt(
    sum(sigma[n] ** 2 * np.sum(np.square(v)) for n, v in vectors.items())
  )


def exact_chance(vectors, inputs, sigma):
  """The chance of the more likely class."""
  return special.ndtr(np.abs(score(vectors, inputs)) / spread(vectors, sigma))


def batch(size=12, seed=1):
  random = np.random.default_rng(seed)
  return {
    "inputs": {
      name: random.normal(size=(size, d)).astype(np.float32)
      for name, d in SIZES.items()
    },
    "present": {name: np.ones(size, bool) for name in SIZES},
    "id": np.arange(size) + 100,
  }
