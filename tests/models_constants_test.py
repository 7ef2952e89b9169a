"""What ordinary encoders state about their own Lipschitz constants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm.models import encoders
from robust_mm.models import functional

SHAPES = {
  "cnn": ((20, 18, 2), encoders.cnn(features=(4, 5), embedding_dim=6)),
  # A map that is pooled, and cropped by the pooling.
  "cnn pooled": ((19, 35, 1), encoders.cnn(features=(2,), embedding_dim=6)),
  "cnn of video": ((3, 7, 5, 1), encoders.cnn(features=(4,), embedding_dim=6)),
  "gelu": (
    (9,),
    encoders.mlp(hidden_sizes=(8, 8), embedding_dim=6, activation="gelu"),
  ),
  "mlp": ((9,), encoders.mlp(hidden_sizes=(8, 8), embedding_dim=6)),
  "temporal": (
    (13, 3),
    encoders.temporal_cnn(features=(4, 5), kernel_size=5, embedding_dim=6),
  ),
}


@functools.cache
def _encoder(name, seed):
  """``(functions, params, constant, embed)`` with weights of a seed."""
  shape, encoder = SHAPES[name]
  functions = functional.encoder_functions(encoder, shape)
  params, _ = jax.jit(functions.init)(jax.random.key(seed))
  constant = jax.jit(
    functools.partial(functional.encoder_constant, encoder, functions)
  )
  embed = jax.jit(lambda params, x: functions.apply(params, {}, x)[0])
  return functions, params, constant, embed


def _jacobian_norm(embed, params, x):
  jacobian = jax.jacrev(lambda x: embed(params, x[None])[0])(x)
  matrix = np.asarray(jacobian, np.float64).reshape(jacobian.shape[0], -1)
  return np.linalg.norm(matrix, 2)


@pytest.mark.parametrize("name", SHAPES)
def test_constant_bounds_every_jacobian(name):
  shape, _ = SHAPES[name]
  for seed in range(3):
    _, params, constant, embed = _encoder(name, seed)
    points = jax.random.normal(jax.random.key(seed + 9), (4, *shape))
    norms = [_jacobian_norm(embed, params, x) for x in points]
    assert max(norms) <= constant(params)


@pytest.mark.parametrize("name", ["cnn", "mlp", "temporal"])
def test_constant_is_attained_by_layers_that_agree(name):
  """Weights equal and positive: a constant input goes along every top
  direction, up to the borders that zero padding takes away."""
  shape, _ = SHAPES[name]
  _, params, constant, embed = _encoder(name, 0)

  def ones(leaf):
    return jnp.full_like(leaf, 0.1 if leaf.ndim > 1 else 0.0)

  params = jax.tree.map(ones, params)
  found = _jacobian_norm(embed, params, jnp.ones(shape))
  bound = constant(params)
  assert found <= bound * (1 + 1e-6)
  assert 1.2 * found > bound if name == "mlp" else 2 * found > bound


@pytest.mark.parametrize("name", SHAPES)
def test_matrices_of_the_penalty_bound_the_constant(name):
  functions, params, constant, _ = _encoder(name, 0)
  matrices = functional.encoder_linear(functions, params)
  product = np.prod([np.linalg.norm(matrix, 2) for matrix in matrices])
  # Pooling only lowers it; two slopes of gelu are 1.13.
  slopes = 1.13**2 if name == "gelu" else 1.0
  assert constant(params) <= product * slopes * (1 + 1e-4)


@pytest.mark.parametrize(
  "name", ["transformer", "resnet18", "temporal_resnet", "video_resnet"]
)
def test_no_constant_is_made_up_for_normalised_networks(name):
  encoder = encoders.make(name, embedding_dim=4, width=8)
  shapes = {"resnet18": (8, 8, 1), "video_resnet": (4, 8, 8, 1)}
  shape = shapes.get(name, (5, 3))
  functions = functional.encoder_functions(encoder, shape)
  params, _ = jax.eval_shape(functions.init, jax.random.key(0))
  assert functional.encoder_linear(functions, params) is None
  assert functional.encoder_constant(encoder, functions, params) is None
