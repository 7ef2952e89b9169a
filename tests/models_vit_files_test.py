"""Arguments of vision transformers and of their files that contradict."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vision_transformers as reference

from robust_mm import _validate
from robust_mm.models import encoders
from robust_mm.models import pretrained
from robust_mm.models import vit
from robust_mm.models import vit_namings

SIZES = {"width": 16, "depth": 2, "num_heads": 2, "patch_size": 2}
NET = vit.vision_transformer(**SIZES, num_classes=5, preprocess=vit.HALF)


@pytest.fixture(scope="module")
def params():
  return reference.random_params(NET, (8, 8, 3))


@pytest.fixture
def path(params, tmp_path):
  return reference.save(
    tmp_path / "model.safetensors", reference.timm(NET, params)
  )


def load(path, **options):
  return vit.load_safetensors(
    path, **{"preprocess": vit.HALF, "num_heads": 2, **options}
  )


CFG = {"pretrained_cfg": {"mean": [0.485, 0.456, 0.406]}}
CFG["pretrained_cfg"]["std"] = [0.229, 0.224, 0.225]


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("config.json", CFG),
    ("config.json", CFG["pretrained_cfg"]),
    (
      "preprocessor_config.json",
      {"image_mean": vit.IMAGENET[0], "image_std": vit.IMAGENET[1]},
    ),
  ],
)
def test_another_preprocess_than_the_files_state_is_refused(path, name, said):
  (path.parent / name).write_text(json.dumps(said))
  with pytest.raises(ValueError, match=r"preprocess must be \(\(0\.485, "):
    load(path)
  net = vit.vision_transformer(
    **SIZES, num_classes=5, preprocess=vit.HALF, epsilon=1e-6
  )
  with pytest.raises(ValueError, match=r"preprocess must be \(\(0\.485, "):
    vit.pretrained_params(net, path, (8, 8, 3))
  assert load(path, preprocess=vit.IMAGENET)[0].preprocess == vit.IMAGENET
  # Images that come normalised are nobody's business.
  assert load(path, preprocess=None)[0].preprocess is None


def test_a_preprocess_that_is_not_applied_or_not_stated_refuses_nothing(path):
  there = path.parent / "preprocessor_config.json"
  half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
  for said in (half, {**half, "do_normalize": False}, {}):
    there.write_text(json.dumps(said))
    assert load(path)[0].preprocess == ((0.5,), (0.5,))
  there.write_text(json.dumps({"image_mean": [], "image_std": []}))
  with pytest.raises(ValueError, match=r"preprocessor_config\.json: preproc"):
    load(path)


def test_another_pool_than_the_head_is_for_is_refused(path):
  (path.parent / "config.json").write_text(json.dumps({"global_pool": "avg"}))
  with pytest.raises(ValueError, match="pool must be 'mean' for the head of"):
    load(path)
  assert load(path, pool="mean")[0].pool == "mean"
  assert load(path, num_classes=7)[0].pool == "cls"  # a fresh head


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_checkpoint_knows_what_it_was_stored_in(dtype, params, tmp_path):
  narrow = jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), params)
  path = reference.save(tmp_path / "x.safetensors", reference.timm(NET, narrow))
  found = pretrained.read(path, num_heads=2)
  assert found.dtype == dtype
  assert found.params["cls"].dtype == np.float32


def test_a_far_number_of_a_block_is_answered_at_once(path, params):
  tensors = reference.timm(NET, params)
  tensors["blocks.99999999.norm1.bias"] = np.zeros(16, np.float32)
  reference.save(path, tensors)
  with pytest.raises(ValueError, match=r"missing blocks\.2\..*surplus blocks"):
    load(path)
  naming = vit_namings.recognise(path, tensors)
  assert vit_namings.depth(naming, tensors) == 4
  reference.save(path, reference.timm(NET, params))
  (path.parent / "config.json").write_text('{"depth": 999999999}')
  with pytest.raises(ValueError, match=r"missing blocks\.2\."):
    load(path)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_heads": 0}, "num_heads must be an integer"),
    ({"num_heads": -2}, "num_heads must be an integer"),
    ({"image_shape": 8}, "image_shape must be"),
    ({"width": 8}, "width must be left out"),
    ({"patch_size": 8}, "patch_size must be left out"),
    ({"preprocess": 0.5}, "preprocess must be"),
  ],
)
def test_loading_refuses_by_name(path, options, message):
  with pytest.raises(ValueError, match=message):
    load(path, **options)


def test_no_path_is_refused_by_name():
  with pytest.raises(ValueError, match="path must be"):
    load(None)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"preprocess": 0.5}, "preprocess must be"),
    ({"preprocess": "ab"}, "preprocess must be"),
    ({"preprocess": ((), ())}, "preprocess must be"),
    ({"patch_size": 4.0}, "patch_size must be"),
    ({"patch_size": (2, 4.0)}, "patch_size must be"),
    ({"implementation": "cudnn"}, "dtype must be 'bfloat16'"),
    (
      {"implementation": "cudnn", "dtype": "float32"},
      "dtype must be 'bfloat16'",
    ),
  ],
)
def test_networks_refuse_by_name(options, message):
  with pytest.raises(ValueError, match=message):
    vit.vision_transformer(**{**SIZES, **options})
  with pytest.raises(ValueError, match=message):
    encoders.make("vit", size="tiny", **options)


@pytest.mark.parametrize(("width", "num_heads"), [(20, 1), (320, 1), (24, 2)])
def test_flash_attention_refuses_heads_it_has_not(width, num_heads):
  with pytest.raises(ValueError, match="num_heads must leave a multiple of 8"):
    vit.vision_transformer(
      width=width,
      depth=1,
      num_heads=num_heads,
      implementation="cudnn",
      dtype="bfloat16",
    )


def test_flash_attention_is_refused_where_there_is_no_gpu():
  if jax.default_backend() == "gpu":
    pytest.skip("there is one")
  net = vit.vision_transformer(
    **SIZES, implementation="cudnn", dtype="bfloat16"
  )
  params = net.init(jax.random.key(0), (8, 8, 3))
  with pytest.raises(_validate.UserError, match="implementation must be 'xla'"):
    jax.jit(net.apply)(params, jnp.zeros((1, 8, 8, 3)))
