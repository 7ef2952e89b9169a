"""Small models and batches that tests of recipes share."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from robust_mm import models
from robust_mm.training import state as state_lib
from robust_mm.training import steps

SHAPES = {"a": (6,), "b": (3, 2)}
TX = optax.adam(1e-2)


class Linear(nnx.Module):
  """1-Lipschitz by its Frobenius norm: compiles in no time."""

  def __init__(self, input_shape, rngs):
    size = math.prod(input_shape)
    self.kernel = nnx.Param(jax.random.normal(rngs.params(), (size, 8)))

  def __call__(self, x):
    kernel = self.kernel[...]
    return x.reshape(len(x), -1) @ kernel / jnp.linalg.norm(kernel)


def lipschitz_model(**options):
  encoder = models.custom(Linear, 8, lipschitz=1.0)
  return models.late_fusion(
    dict.fromkeys(SHAPES, encoder),
    num_classes=3,
    input_shapes=SHAPES,
    num_iters=3,
    **options,
  )


def ordinary_model(**options):
  return models.late_fusion(
    dict.fromkeys(SHAPES, models.custom(Linear, 8)),
    num_classes=3,
    input_shapes=SHAPES,
    num_iters=3,
    **options,
  )


def concat_model(lipschitz=1.0):
  return models.concat_fusion(
    dict.fromkeys(SHAPES, models.custom(Linear, 8, lipschitz=lipschitz)),
    num_classes=3,
    input_shapes=SHAPES,
  )


def make_batch(seed=0, size=16):
  rng = np.random.default_rng(seed)
  return {
    "inputs": {
      name: jnp.asarray(rng.normal(size=(size, *shape)), jnp.float32)
      for name, shape in SHAPES.items()
    },
    "present": {name: jnp.ones(size, bool) for name in SHAPES},
    "label": jnp.asarray(rng.integers(0, 3, size)),
    "id": jnp.arange(size),
  }


def run(recipe, model, batch, num_steps):
  phase = recipe.phases[0]
  key = jax.random.key(0)
  state = jax.jit(state_lib.initializer(model, phase))(key)
  return repeat(phase, state, batch, num_steps)


def repeat(phase, state, batch, num_steps):
  """(the last state, losses [num_steps]), all steps in one call."""
  step = steps.make_train_step(phase)

  @jax.jit
  def all_steps(state):
    return jax.lax.scan(
      lambda state, _: step(state, batch, jax.random.key(0)),
      state,
      length=num_steps,
    )

  state, metrics = all_steps(state)
  return state, metrics["loss"]


def evaluate(loss, model, batch):
  params, state = jax.jit(model.init)(jax.random.key(0))
  value, (_, metrics) = jax.jit(
    lambda params, batch: loss(params, state, batch, key=jax.random.key(1))
  )(params, batch)
  return params, value, metrics
