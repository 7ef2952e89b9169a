import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from flax import nnx

from robust_mm import models
from robust_mm.models import encoders
from robust_mm.models import functional


class _Network(nnx.Module):
  """Lists, batch statistics and a random stream of its own."""

  def __init__(self, input_shape, rngs):
    size = input_shape[0]
    self.layers = nnx.List(
      [nnx.Linear(size, size, rngs=rngs) for _ in range(2)]
    )
    self.norm = nnx.BatchNorm(size, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    for layer in self.layers:
      x = layer(x)
    return self.dropout(self.norm(x))


@pytest.fixture(scope="module")
def network():
  functions = functional.from_module(lambda rngs: _Network((4,), rngs))
  params, state = jax.jit(functions.init)(jax.random.key(0))
  return functions, params, state


def test_params_and_state_are_plain_dicts_with_string_keys(network):
  _, params, state = network
  assert set(params["layers"]) == {"0", "1"}
  assert set(state) == {"norm"}

  def check(tree):
    if isinstance(tree, jax.Array):
      return
    assert type(tree) is dict
    for name, value in tree.items():
      assert isinstance(name, str)
      check(value)

  check(params)
  check(state)


def test_apply_equals_the_module_itself(network):
  functions, params, state = network
  module = _Network((4,), nnx.Rngs(jax.random.key(0)))
  module.eval()
  x = jax.random.normal(jax.random.key(1), (5, 4))
  own, same = functions.apply(params, state, x)
  np.testing.assert_allclose(own, module(x), rtol=1e-5, atol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, state, same)


def test_training_updates_statistics_under_grad_and_reads_only_the_key(network):
  functions, params, state = network
  x = 2 + jax.random.normal(jax.random.key(1), (64, 4))

  @jax.jit
  def step(params, state, key):
    def loss(params):
      y, new = functions.apply(params, state, x, train=True, key=key)
      return jnp.sum(y**2), (y, new)

    return jax.grad(loss, has_aux=True)(params)

  gradient, (y, new) = step(params, state, jax.random.key(2))
  _, (again, _) = step(params, state, jax.random.key(2))
  _, (other, _) = step(params, state, jax.random.key(3))
  np.testing.assert_array_equal(y, again)
  assert jnp.any(y != other)
  assert 0.2 < jnp.mean(y == 0) < 0.8
  assert jnp.any(new["norm"]["mean"] != state["norm"]["mean"])
  assert jnp.any(gradient["layers"]["1"]["kernel"] != 0)
  assert jax.tree.structure(new) == jax.tree.structure(state)


def test_vmap_over_parameters(network):
  functions, params, state = network
  x = jax.random.normal(jax.random.key(1), (5, 4))
  both = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), params)
  stacked = jax.vmap(lambda p: functions.apply(p, state, x)[0])(both)
  doubled = jax.tree.map(lambda a: 2 * a, params)
  np.testing.assert_allclose(
    stacked[1], functions.apply(doubled, state, x)[0], rtol=1e-5, atol=1e-5
  )


class _Scaled(nnx.Module):
  def __init__(self, input_shape, rngs):
    self.scale = nnx.Param(jnp.full(input_shape, -2.0))

  def __call__(self, x, *, train):
    return x * self.scale[...][None] + train

  def lipschitz(self):
    return jnp.max(jnp.abs(self.scale[...]))


def _late_fusion(encoder, size=4):
  model = models.late_fusion({"x": encoder}, 2, input_shapes={"x": (size,)})
  params, state = jax.jit(model.init)(jax.random.key(0))
  return model, params, state


def test_own_modules_bring_their_own_constant():
  model, params, state = _late_fusion(encoders.custom(_Scaled, 4))
  assert model.geometry(params).lipschitz["x"] == 2
  present = {"x": jnp.ones(1, bool)}
  inputs = {"x": jnp.ones((1, 4))}
  embeddings, _ = model.encode(params, state, inputs, present)
  np.testing.assert_array_equal(embeddings["x"], -2 * jnp.ones((1, 4)))
  embeddings, _ = model.encode(params, state, inputs, present, train=True)
  np.testing.assert_array_equal(embeddings["x"], -jnp.ones((1, 4)))


def test_a_constant_can_be_stated_for_a_module():
  for constant in (3.0, lambda module: 3.0):
    encoder = encoders.custom(_Scaled, 4, lipschitz=constant)
    model, params, _ = _late_fusion(encoder)
    assert model.geometry(params).lipschitz["x"] == 3
  with pytest.raises(ValueError, match="lipschitz"):
    encoders.custom(_Scaled, 4, lipschitz=0.0)


def test_a_module_with_batch_statistics_has_no_constant_from_parameters():
  encoder = encoders.custom(_Network, 4, lipschitz=lambda module: jnp.ones(()))
  model, params, _ = _late_fusion(encoder)
  assert model.geometry(params).lipschitz["x"] is None


class _Linen(linen.Module):
  @linen.compact
  def __call__(self, x):
    return linen.Dense(5)(x)


def test_own_linen_modules_are_encoders_too():
  model, params, state = _late_fusion(encoders.from_linen(_Linen(), 5))
  x = jax.random.normal(jax.random.key(1), (3, 4))
  dense = params["encoders"]["x"]["Dense_0"]
  embeddings, _ = model.encode(
    params, state, {"x": x}, {"x": jnp.ones(3, bool)}
  )
  expected = x @ dense["kernel"] + dense["bias"][None]
  np.testing.assert_allclose(embeddings["x"], expected, rtol=1e-5, atol=1e-6)


def test_importing_the_package_does_not_import_flax():
  import subprocess
  import sys

  code = "import sys, robust_mm; assert 'flax' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True)
