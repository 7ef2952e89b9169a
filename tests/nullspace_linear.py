"""A linear softmax model with a kernel: 4 tokens of 16, 3 classes."""

import jax
import jax.numpy as jnp


def linear(params, tokens):
  return jnp.reshape(tokens, (len(tokens), -1)) @ params


def wide(number):
  """(params, tokens of so many items): noise in the kernel is free."""
  params = jax.random.normal(jax.random.key(0), (64, 3))
  return params, jax.random.normal(jax.random.key(1), (number, 4, 16))
