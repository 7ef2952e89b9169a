"""Maxima whose gradient survives a compiler that computes them twice."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def largest(x: Array, axis: int = -1) -> Array:
  """``jnp.max(x, axis)``; its gradient is that of the first largest entry.

  That of ``jnp.max`` compares the entries with the maximum and divides by the
  number of equal ones. Where XLA computes the entries anew for that and rounds
  them differently (a product and a sum fused in one place and not in the
  other), none is equal, and the gradient is NaN.
  """
  first = jnp.argmax(x, axis=axis)
  chosen = jax.nn.one_hot(first, x.shape[axis], axis=axis, dtype=bool)
  return jnp.sum(jnp.where(chosen, x, jnp.zeros_like(x)), axis=axis)


def smallest(x: Array, axis: int = -1) -> Array:
  """``jnp.min(x, axis)``, see :func:`largest`."""
  return -largest(-x, axis)
