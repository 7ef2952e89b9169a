"""Frozen models: the same logits, nothing left to compute from parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robust_mm as rmm
from robust_mm.models import encoders

SHAPES = {"a": (8, 6, 1), "b": (10, 3)}
ENCODERS = {
  "mlp-sll": {"a": encoders.lipschitz_mlp(width=8, embedding_dim=6)},
  "mlp-bjorck": {
    "a": encoders.lipschitz_mlp(
      width=8, embedding_dim=6, block="bjorck", stem=12
    )
  },
  "mlp-cayley": {
    "a": encoders.lipschitz_mlp(width=8, embedding_dim=6, block="cayley")
  },
  "mlp-aol": {
    "a": encoders.lipschitz_mlp(width=8, embedding_dim=6, block="aol")
  },
  "conv-sll": {
    "a": encoders.lipschitz_cnn(features=(4, 8), embedding_dim=6),
    "b": encoders.lipschitz_temporal_cnn(features=(6,), embedding_dim=6),
  },
  "conv-aol": {
    "a": encoders.lipschitz_cnn(features=(4, 8), embedding_dim=6, block="aol"),
    "b": encoders.bounded(
      encoders.lipschitz_temporal_cnn(
        features=(6,), embedding_dim=6, block="aol"
      ),
      radius=0.3,
    ),
  },
  "ordinary": {"a": encoders.mlp(embedding_dim=6)},
}


def moved(tree):
  """Parameters away from where they start: nothing is orthonormal there."""
  leaves, form = jax.tree.flatten(tree)
  keys = jax.random.split(jax.random.key(7), len(leaves))
  return jax.tree.unflatten(
    form,
    [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)],
  )


def inputs_of(model):
  inputs = {
    m: jax.random.normal(jax.random.key(i), (5, *SHAPES[m]))
    for i, m in enumerate(model.modalities)
  }
  present = {m: jnp.arange(5) != i for i, m in enumerate(model.modalities)}
  return inputs, present


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", ENCODERS)
def test_frozen_model_has_the_same_logits_and_gradients(name, reduction):
  parts = ENCODERS[name]
  model = rmm.models.late_fusion(
    parts,
    num_classes=4,
    input_shapes={m: SHAPES[m] for m in parts},
    reduction=reduction,
  )
  params = moved(jax.jit(model.init)(jax.random.key(0))[0])
  frozen, values = model.freeze(params)
  inputs, present = inputs_of(model)

  def of(model, params):
    @jax.jit
    def run(inputs):
      return model.apply(params, {}, inputs, present)[0].logits

    gradient = jax.jit(jax.grad(lambda x: jnp.sum(run(x)[:, 1])))
    return run(inputs), gradient(inputs)

  for one, other in zip(
    jax.tree.leaves(of(frozen, values)), jax.tree.leaves(of(model, params))
  ):
    np.testing.assert_allclose(one, other, atol=2e-5)
  assert frozen.geometry is None


def made(fusion):
  """A model, its parameters, both frozen, and a batch."""
  model = fusion(
    ENCODERS["mlp-bjorck"], num_classes=4, input_shapes={"a": SHAPES["a"]}
  )
  params, _ = jax.jit(model.init)(jax.random.key(0))
  return model, params, *model.freeze(params), *inputs_of(model)


def test_nothing_is_left_of_the_orthonormalisation():
  model, params, frozen, values, inputs, present = made(rmm.models.late_fusion)

  def program(model, params):
    run = jax.make_jaxpr(
      lambda p: model.apply(p, {}, inputs, present)[0].logits
    )
    return str(run(params))

  assert "while" in program(model, params)
  assert "while" not in program(frozen, values)


def test_token_fusion_is_frozen_up_to_its_transformer():
  model, params, frozen, values, inputs, present = made(rmm.models.token_fusion)
  one, other = (
    m.apply(p, {}, inputs, present)[0].logits
    for m, p in ((frozen, values), (model, params))
  )
  np.testing.assert_allclose(one, other, atol=2e-5)
