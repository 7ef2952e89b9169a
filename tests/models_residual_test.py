import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from robust_mm.models import encoders
from robust_mm.models import functional
from robust_mm.models import residual

VIDEO = (5, 8, 8, 1)


def _built(encoder, shape):
  functions = functional.encoder_functions(encoder, shape)
  params, state = functions.init(jax.random.key(0))
  return params, lambda x, **options: functions.apply(
    params, state, x, **options
  )[0]


def _video(seed=0):
  return jax.random.uniform(jax.random.key(seed), (3, *VIDEO))


@pytest.mark.parametrize("appearance", [False, True])
def test_without_appearance_only_changes_are_seen(appearance):
  encoder = encoders.video_resnet(
    features=(8,), width=16, appearance=appearance, embedding_dim=6
  )
  _, apply = _built(encoder, VIDEO)
  video = _video()
  background = jax.random.uniform(jax.random.key(9), (3, 1, *VIDEO[1:]))
  same = np.allclose(apply(video), apply(video + background), atol=1e-5)
  assert same is (not appearance)
  assert not np.allclose(apply(video), apply(video[:, ::-1]), atol=1e-3)


def test_no_change_at_all_is_a_constant():
  encoder = encoders.video_resnet(
    features=(8,), width=16, appearance=False, embedding_dim=6
  )
  _, apply = _built(encoder, VIDEO)
  still = jnp.broadcast_to(_video()[:, :1], (3, *VIDEO))
  found = apply(still)
  np.testing.assert_allclose(found, apply(jnp.zeros((3, *VIDEO))), atol=1e-6)


def test_differences_by_hand():
  x = jnp.asarray([[[1.0], [4.0], [2.0]]])
  np.testing.assert_array_equal(
    residual.differences(x), [[[0.0], [3.0], [-2.0]]]
  )


@pytest.mark.parametrize("name", ["temporal_resnet", "video_resnet"])
def test_dropout_is_of_training_and_of_the_key(name):
  shape = (8, 3) if name == "temporal_resnet" else VIDEO
  encoder = encoders.make(name, width=8, dropout=0.5, embedding_dim=6)
  _, apply = _built(encoder, shape)
  x = jax.random.normal(jax.random.key(1), (2, *shape))
  keys = jax.random.key(2), jax.random.key(3)
  plain = apply(x)
  np.testing.assert_array_equal(plain, apply(x, key=keys[0]))
  np.testing.assert_array_equal(plain, apply(x, train=True))
  first, again, other = (
    apply(x, train=True, key=key) for key in (keys[0], keys[0], keys[1])
  )
  np.testing.assert_array_equal(first, again)
  assert not np.allclose(first, other, atol=1e-3)
  assert not np.allclose(first, plain, atol=1e-3)


def test_dropout_keeps_the_mean():
  kept = residual.dropped(jnp.ones((400, 400)), 0.3, jax.random.key(0))
  assert abs(float(jnp.mean(kept)) - 1) < 5e-3  # standard error 1.6e-3
  assert abs(float(jnp.mean(kept == 0)) - 0.3) < 5e-3


def test_the_scale_of_embeddings_is_free():
  # No normalisation after the last layer: what collapse needs.
  encoder = encoders.temporal_resnet(width=8, embedding_dim=6)
  params, _ = _built(encoder, (8, 3))
  functions = functional.encoder_functions(encoder, (8, 3))
  x = jax.random.normal(jax.random.key(1), (2, 8, 3))
  smaller = {**params, "last": jax.tree.map(lambda a: a / 10, params["last"])}
  np.testing.assert_allclose(
    10 * functions.apply(smaller, {}, x)[0],
    functions.apply(params, {}, x)[0],
    rtol=1e-4,
    atol=1e-6,
  )


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"dropout": 1.0}, "dropout"),
    ({"velocity": -1.0}, "velocity"),
    ({"velocity": 0.0, "appearance": False}, "velocity"),
    ({"pooling": 0}, "pooling"),
  ],
)
def test_bad_options_are_named(options, named):
  with pytest.raises(ValueError, match=named):
    encoders.video_resnet(**options)


@pytest.mark.parametrize(
  ("shape", "named"), [((8, 8, 1), "input_shape"), ((4, 9, 8, 1), "pooling")]
)
def test_videos_that_do_not_fit_are_refused(shape, named):
  encoder = encoders.video_resnet(pooling=2)
  with pytest.raises(ValueError, match=named):
    functional.encoder_functions(encoder, shape)


@pytest.mark.parametrize("length", [7, 8])
def test_the_skip_of_a_block_keeps_constants(length):
  block = residual._Block(4, 3, 0.0, nnx.Rngs(0))
  block.second.kernel[...] = jnp.zeros_like(block.second.kernel[...])
  found = block(jnp.ones((2, length, 4)), None)
  np.testing.assert_array_equal(found, jnp.ones((2, 4, 4)))
