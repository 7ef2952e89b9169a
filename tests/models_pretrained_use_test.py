"""Files of others: heads, resolutions, and encoders that begin with them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vision_transformers as reference
from models_pretrained_files import NET
from models_pretrained_files import SHAPE
from models_pretrained_files import load
from models_pretrained_files import random_params
from models_pretrained_files import same

from robust_mm import _validate
from robust_mm import config as config_lib
from robust_mm import models
from robust_mm import training
from robust_mm.models import encoders
from robust_mm.models import functional
from robust_mm.models import vit


@pytest.fixture(scope="module")
def params():
  return random_params()


# Heads and resolutions.


def test_a_head_is_kept_drawn_or_left_out(params, tmp_path):
  path = tmp_path / "model.safetensors"
  reference.save(path, reference.timm(NET, params))
  kept = load(path, num_classes=5)[1]
  same(kept["head"], params["head"])
  net, fresh = load(path, num_classes=3, key=jax.random.key(7))
  assert net.num_classes == 3
  assert fresh["head"]["kernel"].shape == (16, 3)
  other = load(path, num_classes=3, key=jax.random.key(8))[1]
  assert not np.array_equal(other["head"]["kernel"], fresh["head"]["kernel"])
  body = {name: value for name, value in params.items() if name != "head"}
  reference.save(path, reference.timm(NET, body))
  net, found = load(path)
  assert net.num_classes is None
  same(found, body)
  same(load(path, num_classes=3, key=jax.random.key(7))[1], fresh)
  with pytest.raises(ValueError, match="epsilon must be left out"):
    load(path, epsilon=1e-6)
  with pytest.raises(ValueError, match="must have the 3 channels"):
    load(path, image_shape=(8, 8, 1))


def test_positions_at_the_native_size_are_untouched(params, tmp_path):
  path = tmp_path / "model.safetensors"
  reference.save(path, reference.timm(NET, params))
  for shape in (None, (8, 8), (8, 8, 3)):
    same(load(path, image_shape=shape)[1], params)
  net, found = load(path, image_shape=(8, 14))
  assert found["position"].shape == (1 + 4 * 7, 16)
  np.testing.assert_array_equal(found["position"][0], params["position"][0])
  images = jnp.ones((2, 8, 14, 3))
  assert jax.eval_shape(net.apply, found, images).shape == (2, 5)
  with pytest.raises(ValueError, match="must divide the sides"):
    load(path, image_shape=(9, 8))


def keys_weight(x, a=-0.5):
  """Keys' cubic kernel."""
  x = abs(x)
  if x < 1:
    return (a + 2) * x**3 - (a + 3) * x**2 + 1
  return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def test_positions_of_a_larger_grid_are_those_of_keys():
  grid, new = (6, 5), (12, 15)
  rng = np.random.default_rng(0)
  position = rng.normal(size=(1 + 30, 3)).astype(np.float32)
  found = vit.resize_positions(jnp.asarray(position), grid, new)

  def matrix(size, target, a):
    centres = (np.arange(target) + 0.5) * size / target - 0.5
    weights = np.array(
      [[keys_weight(c - i, a) for i in range(size)] for c in centres]
    )
    return weights / weights.sum(axis=1, keepdims=True)

  def resized(a):
    rows, columns = (matrix(*pair, a) for pair in zip(grid, new))
    cube = position[1:].reshape(*grid, 3).astype(np.float64)
    return np.einsum("ir,jc,rcd->ijd", rows, columns, cube).reshape(-1, 3)

  np.testing.assert_allclose(found[1:], resized(-0.5), atol=1e-5)
  assert np.max(np.abs(found[1:] - resized(-0.75))) > 1e-2
  assert keys_weight(0.25) == pytest.approx(0.867, abs=1e-3)
  assert keys_weight(0.25, -0.75) == pytest.approx(0.879, abs=1e-3)
  with pytest.raises(ValueError, match=r"position must have shape \[26, d\]"):
    vit.resize_positions(jnp.asarray(position), (5, 5), new)


# Encoders and runs.


def options(path, **changes):
  return {
    **{"size": None, "width": 16, "depth": 2, "num_heads": 2},
    **{"patch_size": 2, "preprocess": vit.HALF, "weights": str(path)},
    **changes,
  }


def build(path, **changes):
  return models.build(
    fusion="concat",
    encoders={"image": {"name": "vit", **options(path, **changes)}},
    num_classes=3,
    input_shapes={"image": SHAPE},
  )


def test_an_encoder_begins_with_its_weights(params, tmp_path):
  path = reference.save(
    tmp_path / "model.safetensors", reference.timm(NET, params)
  )
  body = {name: value for name, value in params.items() if name != "head"}
  begun, _ = jax.jit(build(path).init)(jax.random.key(0))
  same(begun["encoders"]["image"], body)
  begun, _ = jax.jit(build(path, embedding_dim=7).init)(jax.random.key(0))
  assert begun["encoders"]["image"]["head"]["kernel"].shape == (16, 7)
  for changes, message in (
    ({"depth": 3}, "depth must be 2 for the weights of"),
    ({"width": 32}, "width must be 16 for the weights of"),
    ({"epsilon": 1e-12}, "epsilon must be 1e-06 for the weights of"),
    ({"patch_size": 4}, r"patch_size must be \(2, 2\) for the weights of"),
    ({"weights": str(tmp_path / "none")}, "none is no file"),
    ({"preprocess": None}, "preprocess must be given with weights"),
  ):
    with pytest.raises(_validate.UserError, match=message):
      build(path, **changes)


def test_tokens_of_an_encoder_begin_with_weights_too(params, tmp_path):
  path = reference.save(
    tmp_path / "model.safetensors", reference.timm(NET, params)
  )
  options = {"size": None, "width": 16, "depth": 2, "num_heads": 2}
  options |= {"patch_size": 2, "weights": str(path), "embedding_dim": 4}
  with pytest.raises(ValueError, match="preprocess must be given with weights"):
    encoders.make("vit_tokens", **options)
  made = encoders.make("vit_tokens", preprocess=vit.HALF, **options)
  functions = functional.encoder_functions(made, SHAPE)
  begun, state = jax.jit(functions.init)(jax.random.key(0))
  same(
    begun["trunk"], {name: x for name, x in params.items() if name != "head"}
  )
  images = jax.random.uniform(jax.random.key(1), (3, *SHAPE))
  tokens, _ = functions.apply(begun, state, images)
  sequence = NET.sequence(params, NET.embed(params, images))
  leave = begun["leave"]
  expected = sequence @ leave["kernel"] + leave["bias"][None, None]
  np.testing.assert_allclose(tokens, expected, atol=1e-5)
  other = encoders.make(
    "vit_tokens", preprocess=vit.HALF, **{**options, "depth": 3}
  )
  with pytest.raises(ValueError, match="depth must be 2"):
    functional.encoder_functions(other, SHAPE).init(jax.random.key(0))


def test_a_run_begins_with_weights_and_then_needs_their_file_no_more(
  tmp_path, monkeypatch
):
  shape = (8, 4, 1)
  net = dataclasses.replace(NET, preprocess=None, num_classes=None)
  weights = reference.random_params(net, shape, seed=3)
  # Positions of a grid that is not square are in config.json.
  path = reference.save(
    tmp_path / "model.safetensors", reference.timm(net, weights)
  )
  (tmp_path / "config.json").write_text(json.dumps({"img_size": [8, 4]}))
  config = config_lib.load(
    "configs/joint.py:digits,vit,smoke",
    [
      "--config.mesh.data=1",
      "--config.num_steps=2",
      "--config.optimizer.lr=1e-12",
      *(
        f"--config.model.encoders.default.{name}={value}"
        for name, value in options(path, preprocess="(0.5,0.5)").items()
        if name != "size"
      ),
    ],
  )
  result = training.train(config, tmp_path / "run", say=lambda line: None)
  assert result.finished
  path.unlink()
  _, trained, _, _ = training.load(tmp_path / "run")
  for encoder in trained["encoders"].values():
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
      encoder,
      weights,
    )


def test_an_encoder_of_a_loaded_network(params):
  encoder = encoders.from_vit(NET)
  assert encoder.embedding_dim == 5
  images = jax.random.uniform(jax.random.key(0), (2, *SHAPE))

  @jax.jit
  def parts(params, images):
    tokens = encoder.embed(params, {}, images)
    return encoder.encode_tokens(params, {}, tokens, None)[0]

  np.testing.assert_allclose(
    parts(params, images), jax.jit(NET.apply)(params, images), atol=1e-6
  )
