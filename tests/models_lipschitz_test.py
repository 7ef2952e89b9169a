import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from robust_mm.models import functional
from robust_mm.models import lipschitz
from robust_mm.models import lipschitz_layers as layers


def _functions(build, seed=0, scale=1.0):
  """A module's apply with parameters far from their initial values."""
  functions = functional.from_module(build)
  params, state = jax.jit(functions.init)(jax.random.key(seed))
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  params = jax.tree.unflatten(
    structure,
    [
      a + scale * jax.random.normal(key, a.shape)
      for a, key in zip(leaves, keys)
    ],
  )
  return params, lambda params, x: functions.apply(params, state, x)[0]


def _largest_jacobian_norm(function, shape, count=100, scale=1.0):
  """Over random points; one point's Jacobian is linear algebra in float64."""
  points = scale * np.random.default_rng(0).normal(size=(count, *shape))
  one = lambda x: jnp.ravel(function(x[None]))  # noqa: E731
  jacobians = jax.jit(jax.vmap(jax.jacfwd(one)))(
    jnp.asarray(points, jnp.float32)
  )
  matrices = np.asarray(jacobians, np.float64)
  matrices = matrices.reshape(*matrices.shape[:2], -1)
  return np.max(np.linalg.norm(matrices, 2, axis=(1, 2)))


LAYERS = {
  "bjorck": ((6,), lambda r: layers.Dense(6, 4, rngs=r)),
  "bjorck, one step": (
    (6,),
    lambda r: layers.Dense(6, 9, num_iters=1, rngs=r),
  ),
  "bjorck, three layers": (
    (6,),
    lambda r: layers.Dense(6, 6, num_layers=3, rngs=r),
  ),
  "cayley": ((6,), lambda r: layers.Dense(6, 9, method="cayley", rngs=r)),
  "aol": ((6,), lambda r: layers.Dense(6, 4, method="aol", rngs=r)),
  "sll": ((6,), lambda r: layers.SLLDense(6, inner=9, num_layers=2, rngs=r)),
  "sll conv": ((4, 5, 3), lambda r: layers.SLLConv(3, (3, 3), rngs=r)),
  "sll temporal": (
    (7, 3),
    lambda r: layers.SLLConv(3, (5,), inner=6, rngs=r),
  ),
  "aol conv": ((4, 5, 3), lambda r: layers.AOLConv(3, 6, (3, 3), rngs=r)),
  "aol temporal": ((7, 3), lambda r: layers.AOLConv(3, 2, (5,), rngs=r)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_one_lipschitz_for_any_parameters(name):
  shape, build = LAYERS[name]
  for scale in (0.1, 3.0):
    params, apply = _functions(build, scale=scale)
    function = functools.partial(apply, params)
    norm = _largest_jacobian_norm(function, shape)
    assert norm <= 1 + 1e-5
    # A layer that contracted to nothing would pass the line above.
    assert norm > 0.1


def test_an_unscaled_convolution_fails_the_same_test():
  params, _ = _functions(lambda r: layers.AOLConv(3, 6, (3, 3), rngs=r))
  function = lambda x: layers._convolve(x, params["kernel"])  # noqa: E731
  assert _largest_jacobian_norm(function, (4, 5, 3), count=1) > 2


def test_sll_needs_slopes_within_the_unit_interval():
  """The block is an isometry where exactly the right units are active."""
  params, apply = _functions(lambda r: layers.SLLDense(5, inner=1, rngs=r))
  norms = _largest_jacobian_norm(lambda x: apply(params, x), (5,))
  np.testing.assert_allclose(norms, 1.0, atol=1e-5)
  w = np.asarray(params["weight"][0, :, 0])
  reflection = np.eye(5) - 2 * np.outer(w, w) / (w @ w)
  x = 100 * jnp.asarray(w)[None]
  np.testing.assert_allclose(
    jax.jacrev(lambda v: apply(params, v[None])[0])(x[0]),
    reflection,
    atol=1e-5,
  )


def test_aol_keeps_orthonormal_columns():
  W = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 6)))[0]
  scale = layers.aol_scale(jnp.asarray(np.abs(W.T @ W), jnp.float32))
  np.testing.assert_allclose(scale, 1.0, atol=1e-6)
  assert layers.aol_scale(jnp.zeros((3, 3))).tolist() == [0, 0, 0]


def test_zero_sll_units_do_nothing():
  gradient = jax.grad(
    lambda w: jnp.sum(layers.sll_scale(jnp.abs(w), jnp.zeros(3)))
  )
  assert layers.sll_scale(jnp.zeros((3, 3)), jnp.zeros(3)).tolist() == [0] * 3
  assert jnp.all(jnp.isfinite(gradient(jnp.zeros((3, 3)))))


@pytest.mark.parametrize("sizes", [(3, 3), (1, 5), (5,)])
def test_autocorrelation_equals_the_definition(sizes):
  kernel = np.random.default_rng(0).normal(size=(*sizes, 2, 4))
  expected = np.zeros((4, 4))
  for u in itertools.product(*(range(-(n - 1), n) for n in sizes)):
    correlation = np.zeros((4, 4))
    for v in itertools.product(*(range(n) for n in sizes)):
      w = tuple(a + b for a, b in zip(v, u))
      if all(0 <= a < n for a, n in zip(w, sizes)):
        correlation += kernel[v].T @ kernel[w]
    expected += np.abs(correlation)
  own = layers.absolute_autocorrelation(jnp.asarray(kernel, jnp.float32))
  np.testing.assert_allclose(own, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 5, 3), (7, 3)])
def test_the_flipped_kernel_is_the_adjoint(shape):
  kernel = jax.random.normal(
    jax.random.key(0), (3,) * (len(shape) - 1) + (3, 4)
  )
  x = jax.random.normal(jax.random.key(1), (1, *shape))
  forward = lambda x: layers._convolve(x, kernel)  # noqa: E731
  y = forward(x)
  (expected,) = jax.linear_transpose(forward, x)(y)
  axes = tuple(range(len(shape) - 1))
  flipped = jnp.swapaxes(jnp.flip(kernel, axes), -2, -1)
  np.testing.assert_allclose(
    layers._convolve(y, flipped), expected, rtol=1e-4, atol=1e-4
  )


def test_space_to_depth_widen_and_max_min_keep_norms():
  x = jax.random.normal(jax.random.key(0), (2, 5, 7, 3))
  small = layers.space_to_depth(x, 2)
  assert small.shape == (2, 3, 4, 12)
  for y in (small, layers.widen(x, 8), layers.max_min(small)):
    np.testing.assert_allclose(
      jnp.linalg.norm(y), jnp.linalg.norm(x), rtol=1e-6
    )
  patch = small[0, 1, 2].reshape(2, 2, 3)
  np.testing.assert_array_equal(patch, x[0, 2:4, 4:6])
  with pytest.raises(ValueError, match="even width"):
    layers.max_min(x)


ENCODERS = {
  **{
    f"mlp {block}": (
      (3, 2),
      lipschitz.lipschitz_mlp(width=8, embedding_dim=5, block=block),
    )
    for block in lipschitz.DENSE_BLOCKS
    if block != "projected"  # see models_projection_test
  },
  **{
    f"mlp {block} stem": (
      (3, 2),
      lipschitz.lipschitz_mlp(width=8, embedding_dim=5, block=block, stem=10),
    )
    for block in ("sll", "aol")
  },
  **{
    f"cnn {block} {pool}": (
      (5, 4, 1),
      lipschitz.lipschitz_cnn(
        features=(4, 6), embedding_dim=5, block=block, pool=pool
      ),
    )
    for block, pool in (("sll", "flatten"), ("aol", "mean"))
  },
  "cnn video": (
    (3, 4, 4, 1),
    lipschitz.lipschitz_cnn(features=(4,), embedding_dim=5),
  ),
  "temporal sll": (
    (9, 3),
    lipschitz.lipschitz_temporal_cnn(features=(4, 6), embedding_dim=5),
  ),
  "temporal aol": (
    (9, 3),
    lipschitz.lipschitz_temporal_cnn(
      features=(4,), embedding_dim=5, block="aol", pool="flatten"
    ),
  ),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_one_lipschitz_and_say_so(name):
  shape, encoder = ENCODERS[name]
  params, apply = _functions(lambda rngs: encoder.build(shape, rngs), scale=0.5)
  norm = _largest_jacobian_norm(lambda x: apply(params, x), shape)
  assert 0.05 < norm <= 1 + 1e-5
  functions = functional.encoder_functions(encoder, shape)
  assert functional.encoder_constant(encoder, functions, params) == 1
  assert encoder.one_lipschitz


def test_temporal_encoders_keep_time_of_images_in_order():
  """Frames ``t h w c`` mean what the flattened sequence ``t d`` means."""
  encoder = lipschitz.lipschitz_temporal_cnn(
    features=(4, 6), embedding_dim=5, block="aol"
  )
  params, video = _functions(lambda rngs: encoder.build((6, 2, 3, 2), rngs))
  _, sequence = _functions(lambda rngs: encoder.build((6, 12), rngs))
  x = jax.random.normal(jax.random.key(0), (3, 6, 2, 3, 2))
  flat = x.reshape(3, 6, 12)
  np.testing.assert_allclose(
    video(params, x), sequence(params, flat), rtol=1e-5, atol=1e-6
  )
  # The order of frames matters to it, so a scrambled one would show.
  wrong = sequence(params, jnp.moveaxis(x, 1, -2).reshape(3, 6, 12))
  assert jnp.max(jnp.abs(wrong - sequence(params, flat))) > 1e-2


def test_mlp_blocks_start_as_near_isometries():
  """Embeddings that shrink at the start would leave nothing to certify."""
  for block in ("sll", "bjorck", "cayley"):
    encoder = lipschitz.lipschitz_mlp(width=64, block=block)
    functions = functional.encoder_functions(encoder, (32,))
    params, state = jax.jit(functions.init)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 32))
    y, _ = jax.jit(functions.apply)(params, state, x)
    ratio = jnp.linalg.norm(y - y[:1]) / jnp.linalg.norm(x - x[:1])
    assert ratio > 0.4


@pytest.mark.parametrize(
  "factory,options,message",
  [
    (lipschitz.lipschitz_mlp, {"block": "ssl"}, "Did you mean 'sll'"),
    (lipschitz.lipschitz_mlp, {"block": "aol", "width": 7}, "even"),
    (lipschitz.lipschitz_mlp, {"stem": 7}, "stem must be even"),
    (lipschitz.lipschitz_cnn, {"features": ()}, "features"),
    (lipschitz.lipschitz_cnn, {"block": "bjorck"}, "block must be one of"),
    (lipschitz.lipschitz_temporal_cnn, {"pool": "max"}, "pool"),
  ],
)
def test_bad_arguments_are_named(factory, options, message):
  with pytest.raises(ValueError, match=message):
    factory(**options)


def test_bad_shapes_are_named():
  rngs = nnx.Rngs(0)
  with pytest.raises(ValueError, match="input_shape"):
    lipschitz.lipschitz_cnn().build((3,), rngs)
  with pytest.raises(ValueError, match="input_shape"):
    lipschitz.lipschitz_temporal_cnn().build((3,), rngs)
  with pytest.raises(ValueError, match="kernel_size"):
    lipschitz.lipschitz_cnn(kernel_size=2).build((4, 4, 1), rngs)
