"""What the matrix iterations share: products, bounds of a Gram matrix."""

import jax.numpy as jnp
from jaxtyping import Array

# A Newton-Schulz step maps singular values in [0, sqrt(3)] into [0, 1]; 1.5
# keeps clear of sqrt(3), which it would map to 0.
FIRST_LIMIT = 1.5


def norm_bound(gram: Array) -> Array:
  """Upper bound of the norm of symmetric matrices, ``[..., 1, 1]``."""
  rows = jnp.max(jnp.sum(jnp.abs(gram), axis=-1), axis=-1)
  return jnp.minimum(rows[..., None, None], frobenius(gram))


def shrink(gram: Array) -> Array:
  """The factor on ``X X^T`` that makes a Newton-Schulz step end below 1.

  It does so from singular values in [0, sqrt(3)] only.
  """
  return FIRST_LIMIT**2 / jnp.maximum(norm_bound(gram), FIRST_LIMIT**2)


def frobenius(matrix: Array) -> Array:
  """Frobenius norms, ``[..., 1, 1]``."""
  return jnp.sqrt(jnp.sum(jnp.square(matrix), axis=(-2, -1), keepdims=True))


def dot(left: Array, right: Array) -> Array:
  """The product in full precision, whatever the accelerator's default."""
  return jnp.matmul(left, right, precision="highest")


def transpose(matrix: Array) -> Array:
  """The last two axes swapped."""
  return jnp.swapaxes(matrix, -2, -1)


def eye(like: Array) -> Array:
  """Identities of the row count, batch and dtype of ``like``."""
  n = like.shape[-2]
  identity = jnp.eye(n, dtype=like.dtype)
  return jnp.broadcast_to(identity, (*like.shape[:-2], n, n))
