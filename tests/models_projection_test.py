"""Layers that are orthonormal because somebody projects their weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import robust_mm as rmm
from robust_mm import certification
from robust_mm import config as config_lib
from robust_mm import models
from robust_mm import training
from robust_mm.models import encoders
from robust_mm.models import lipschitz_layers
from robust_mm.training import state as state_lib
from robust_mm.training import steps

SHAPES = {"a": (4, 3), "b": (5,)}


def _model(**options):
  options = {"width": 8, "embedding_dim": 6, "block": "projected", **options}
  return rmm.models.late_fusion(
    {
      "a": encoders.lipschitz_mlp(**options),
      "b": encoders.lipschitz_mlp(width=8, embedding_dim=6),
    },
    num_classes=3,
    input_shapes=SHAPES,
  )


@functools.cache
def _start(stem=None):
  """A model, and parameters that nobody has projected."""
  model = _model(stem=stem)
  return model, _moved(jax.jit(model.init)(jax.random.key(0))[0])


def _moved(params, scale=0.3):
  leaves, form = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(3), len(leaves))
  return jax.tree.unflatten(
    form,
    [x + scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)],
  )


def _weights(params):
  """The dense maps of an encoder, float64."""
  return [
    np.asarray(matrix, np.float64)
    for part in params["encoders"]["a"].values()
    if "weight" in part
    for matrix in part["weight"]
  ]


def _norms(params):
  return np.array([np.linalg.norm(w, 2) for w in _weights(params)])


@pytest.mark.parametrize("stem", [None, 10])
def test_projection_makes_the_maps_orthonormal(stem):
  model, params = _start(stem)
  assert np.max(_norms(params)) > 1.2
  projected = jax.jit(model.project)(params)
  assert np.max(np.abs(_norms(projected) - 1)) < 1e-5
  for matrix in _weights(projected):
    short = matrix if len(matrix) <= len(matrix.T) else matrix.T
    np.testing.assert_allclose(short @ short.T, np.eye(len(short)), atol=1e-5)
  # Nothing else moves.
  for one, other in (
    (projected["encoders"]["b"], params["encoders"]["b"]),
    (projected["fusion"], params["fusion"]),
  ):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_constant_is_that_of_the_weights_as_they_stand():
  model, params = _start()
  # Nobody has projected, and the certificate's tables know.
  tables = jax.jit(lambda p: certification.sensitivity_tables(model, p))
  before, after = tables(params), tables(jax.jit(model.project)(params))
  product = np.prod(_norms(params))
  assert product <= before.lipschitz["a"] <= 1.001 * product
  assert after.lipschitz["a"] == pytest.approx(1, abs=1e-4)
  np.testing.assert_allclose(
    before.tables["a"], after.tables["a"] * product, rtol=2e-3
  )


def test_losses_count_with_the_constant_after_projection():
  model, params = _start()
  label = jnp.array([0, 2])
  present = {m: jnp.ones(2, bool) for m in SHAPES}

  @jax.jit
  def sensitivity(params):
    return certification.sensitivity(model.geometry(params), label, present)

  seen = sensitivity(params)
  want = sensitivity(jax.jit(model.project)(params))
  np.testing.assert_allclose(seen["a"], want["a"], rtol=1e-4)


def test_models_without_such_layers_project_nothing():
  assert _model(block="bjorck").project is None


def _state(model, phase):
  return jax.jit(state_lib.initializer(model, phase))(jax.random.key(0))


def _phases(model):
  tx = optax.sgd(0.5)
  return rmm.recipes.crmt(model, num_steps=6, tx=tx, integration_steps=3).phases


def test_training_projects_every_few_updates():
  model, _ = _start()
  phase, _ = _phases(model)
  project = steps.projection(model, phase)
  step = jax.jit(steps.make_train_step(phase, project))
  state = _state(model, phase)
  rng = np.random.default_rng(0)
  batch = {
    "inputs": {
      m: jnp.asarray(rng.normal(size=(8, *shape)), jnp.float32)
      for m, shape in SHAPES.items()
    },
    "present": {m: jnp.ones(8, bool) for m in SHAPES},
    "label": jnp.arange(8) % 3,
    "id": jnp.arange(8),
  }
  largest = []
  every = steps.PROJECT_EVERY
  for _ in range(2 * every):
    state, _ = step(state, batch, jax.random.key(1))
    largest.append(np.max(np.abs(_norms(state.params) - 1)))
  ends = [every - 1, 2 * every - 1]
  away, back = np.delete(largest, ends), np.array(largest)[ends]
  assert np.min(away) > 1e-4
  assert np.max(back) < 1e-5


def test_what_a_phase_freezes_stays_bit_identical():
  model, params = _start()
  first, second = _phases(model)
  moved = jax.jit(steps.projection(model, first))(params)
  assert np.max(np.abs(_norms(moved) - 1)) < 1e-5
  kept = jax.jit(steps.projection(model, second))(params)
  jax.tree.map(np.testing.assert_array_equal, kept, params)


class Doubled(nnx.Module):
  """A projected layer, times 2: constant 2, which only its author knows."""

  def __init__(self, input_shape, rngs):
    del input_shape
    self.inner = lipschitz_layers.Dense(5, 6, method="projected", rngs=rngs)

  def __call__(self, x):
    return 2 * self.inner(x)


def test_nominal_constants_are_those_of_one_lipschitz_encoders_alone():
  parts = {
    "a": encoders.lipschitz_mlp(width=8, embedding_dim=6, block="projected"),
    "b": models.custom(Doubled, 6, lipschitz=2.0),
  }
  model = models.late_fusion(parts, num_classes=3, input_shapes=SHAPES)
  params = jax.jit(model.init)(jax.random.key(0))[0]
  geometry = jax.jit(model.geometry)(params)
  assert geometry.nominal["a"] == 1
  assert geometry.nominal["b"] is None
  seen = certification.sensitivity(
    geometry, jnp.array([0]), {m: jnp.ones(1, bool) for m in SHAPES}
  )
  np.testing.assert_allclose(seen["b"], 2 * seen["a"], rtol=1e-5)


def test_a_run_keeps_projected_weights(tmp_path):
  """5 updates, none of them the sixteenth."""
  settings = (
    "model.encoders.default.block=projected",
    "num_steps=5",
    "optimizer.lr=0.1",
    "optimizer.warmup_steps=0",
    "data.max_train_examples=64",
    "data.batch_size=16",
    "training.checkpoint_every=5",
    "recipe.options.integration_steps=0",
  )
  config = config_lib.load(
    "configs/crmt.py:digits", [f"--config.{item}" for item in settings]
  )
  training.train(config, tmp_path, say=lambda line: None)
  _, params, _, _ = rmm.load(tmp_path)
  for part in params["encoders"]["left"].values():
    for matrix in np.asarray(part["weight"], np.float64):
      assert abs(np.linalg.norm(matrix, 2) - 1) < 1e-5
