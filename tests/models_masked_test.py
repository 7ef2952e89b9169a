"""Masked fusion: null vectors in place of what is missing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import models
from robust_mm.models import encoders

SHAPES = {"a": (5,), "b": (3, 2)}


@pytest.fixture(scope="module")
def model():
  encoder = encoders.mlp(hidden_sizes=(6,), embedding_dim=4, activation="gelu")
  return models.masked_fusion(
    dict.fromkeys(SHAPES, encoder), 3, input_shapes=SHAPES, width=8
  )


def make(seed=0, size=7):
  keys = jax.random.split(jax.random.key(seed), len(SHAPES))
  inputs = {
    name: jax.random.normal(key, (size, *shape))
    for key, (name, shape) in zip(keys, SHAPES.items())
  }
  present = {"a": jnp.ones(size, bool), "b": jnp.arange(size) % 2 == 0}
  return inputs, present


def test_absent_values_reach_neither_logits_nor_gradients(model):
  params, state = model.init(jax.random.key(0))
  inputs, present = make()
  gone = ~present["b"][:, None, None]
  poisoned = {**inputs, "b": jnp.where(gone, jnp.nan, inputs["b"])}

  def total(params, inputs):
    outputs, _ = model.apply(params, state, inputs, present)
    return jnp.sum(jnp.square(outputs.logits))

  value, grads = jax.value_and_grad(total)(params, inputs)
  same, finite = jax.value_and_grad(total)(params, poisoned)
  assert value == same
  jax.tree.map(np.testing.assert_array_equal, finite, grads)
  # The null vector of b is learnt from the rows without it.
  assert np.all(np.asarray(grads["fusion"]["null"]["b"]) != 0)
  assert np.all(np.asarray(grads["fusion"]["null"]["a"]) == 0)


def test_a_null_vector_is_what_the_head_sees(model):
  params, _ = model.init(jax.random.key(0))
  embeddings = {n: jnp.ones((2, 4)) for n in SHAPES}
  here = {n: jnp.ones(2, bool) for n in SHAPES}
  gone = {**here, "b": jnp.zeros(2, bool)}
  null = {**params["fusion"]["null"], "b": jnp.ones(4)}
  params = {**params, "fusion": {**params["fusion"], "null": null}}
  np.testing.assert_array_equal(
    model.fuse(params, embeddings, here).logits,
    model.fuse(params, embeddings, gone).logits,
  )


def test_masked_fusion_refuses_by_name():
  with pytest.raises(ValueError, match="width must be an integer"):
    models.MaskedFusion(3, width=0)
