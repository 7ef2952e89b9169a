"""Files of others: the same numbers, or one sentence that says why not."""

import dataclasses
import json
import struct

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

from robust_mm.models import pretrained
from robust_mm.models import safetensors
from robust_mm.models import vit

CONFIG = {"num_heads": 2}
NAMINGS = {
  "timm": reference.timm,
  "file": reference.hugging_face,
  "memory": lambda n, p: reference.hugging_face(n, p, newer=True),
  "base": lambda n, p: reference.hugging_face(n, p, prefix=""),
  "base in memory": lambda n, p: reference.hugging_face(
    n, p, newer=True, prefix=""
  ),
}


@pytest.fixture(scope="module")
def params():
  return random_params()


# The stored models.


@pytest.fixture(scope="module", params=["hf_vit_tiny", "timm_vit_tiny"])
def stored(request, shared_path):
  folder = shared_path / "reference" / "vit" / request.param
  outputs = dict(np.load(folder / "outputs.npz", allow_pickle=False))
  return (*vit.load_safetensors(folder, preprocess=vit.HALF), outputs)


def test_logits_are_those_of_the_stored_model(stored):
  net, params, outputs = stored
  images = jnp.asarray(outputs["images"])
  logits = jax.jit(net.apply)(params, images)
  np.testing.assert_allclose(logits, outputs["logits"], atol=5e-5)
  pooled = jax.jit(net.features)(params, net.embed(params, images))
  np.testing.assert_allclose(pooled, outputs["pooled_cls"], atol=5e-5)
  wrong = dataclasses.replace(net, preprocess=vit.IMAGENET)
  assert np.max(np.abs(wrong.apply(params, images) - logits)) > 1e-2


def test_in_float64_even_the_epsilon_shows(stored):
  net, params, outputs = stored
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
    # What the models were fed: the preprocessing was rounded to float32.
    pixels = jnp.asarray(outputs["pixel_values"], jnp.float64)
    pixels = jnp.transpose(pixels, (0, 2, 3, 1))
    epsilons = (net.epsilon, 1e-6 if net.epsilon < 1e-9 else 1e-12)
    errors = [
      np.max(
        np.abs(
          jax.jit(
            dataclasses.replace(net, preprocess=None, epsilon=epsilon).apply
          )(wide, pixels)
          - outputs["logits_float64"]
        )
      )
      for epsilon in epsilons
    ]
  assert errors[0] < 1e-10
  assert errors[1] > 1e-6


def test_both_namings_have_the_same_parameters(shared_path):
  folder = shared_path / "reference" / "vit"
  one, two = (
    vit.load_safetensors(folder / name, preprocess=vit.HALF)
    for name in ("hf_vit_tiny", "timm_vit_tiny")
  )
  same(one[1], two[1])
  assert (one[0].epsilon, two[0].epsilon) == (1e-12, 1e-6)
  assert dataclasses.replace(one[0], epsilon=1e-6) == two[0]


# Files of our own.


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_loads_bit_for_bit(naming, params, tmp_path):
  path = tmp_path / "model.safetensors"
  reference.save(path, NAMINGS[naming](NET, params))
  net, found = load(path)
  same(found, params)
  assert net == dataclasses.replace(
    NET, epsilon=1e-6 if naming == "timm" else 1e-12
  )
  # A folder is its file; the pooler of a base model is not looked at.
  tensors = NAMINGS[naming](NET, params)
  prefix = "vit." if any(n.startswith("vit.") for n in tensors) else ""
  tensors[f"{prefix}pooler.dense.weight"] = np.zeros((3, 3), np.float32)
  reference.save(path, tensors)
  same(load(tmp_path)[1], params)


def test_loaded_logits_are_those_of_one_head_after_another(params, tmp_path):
  path = tmp_path / "model.safetensors"
  images = jax.random.uniform(jax.random.key(0), (3, *SHAPE))
  for naming in ("timm", "file"):
    net, found = load(reference.save(path, NAMINGS[naming](NET, params)))
    logits = jax.jit(net.apply)(found, images)
    wanted = reference.logits(net, params, images)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
  # Query and key swapped in the file are another model.
  tensors = reference.timm(NET, params)
  name = "blocks.0.attn.qkv.weight"
  tensors[name] = np.concatenate(
    [tensors[name][16:32], tensors[name][:16], tensors[name][32:]]
  )
  net, found = load(reference.save(path, tensors))
  other = jax.jit(net.apply)(found, images)
  assert np.max(np.abs(other - reference.logits(net, params, images))) > 1e-3


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_narrow_files_load_to_float32(dtype, params, tmp_path):
  narrow = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), params)
  path = tmp_path / "model.safetensors"
  reference.save(path, reference.timm(NET, narrow))
  _, found = load(path)
  same(found, jax.tree.map(lambda leaf: leaf.astype(np.float32), narrow))


def test_a_checkpoint_in_several_files(params, tmp_path):
  tensors = reference.hugging_face(NET, params)
  names = sorted(tensors)
  places = {}
  for index, part in enumerate((names[:9], names[9:])):
    file = f"model-{index}.safetensors"
    reference.save(tmp_path / file, {name: tensors[name] for name in part})
    places |= dict.fromkeys(part, file)
  index = tmp_path / "model.safetensors.index.json"

  def write(places):
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))

  write(places)
  same(load(index)[1], params)
  same(load(tmp_path)[1], params)
  write({**places, names[0]: "model-1.safetensors"})
  with pytest.raises(ValueError, match=f"surplus {names[0]}"):
    load(tmp_path)
  write({**places, names[0]: "model-2.safetensors"})
  with pytest.raises(ValueError, match=r"model-2\.safetensors, which is not"):
    load(tmp_path)
  write({**places, names[0]: "../model-0.safetensors"})
  with pytest.raises(ValueError, match="which is not a file beside it"):
    load(tmp_path)
  write([])
  with pytest.raises(ValueError, match="has no weight_map"):
    load(tmp_path)
  index.write_text("{")
  with pytest.raises(ValueError, match="is no JSON object"):
    load(tmp_path)


def test_config_json_is_heeded(params, tmp_path):
  path = reference.save(
    tmp_path / "model.safetensors", reference.timm(NET, params)
  )

  def say(**config):
    (tmp_path / "config.json").write_text(json.dumps(config))

  with pytest.raises(ValueError, match="num_heads must be given"):
    load(path, num_heads=None)
  say(num_attention_heads=4, layer_norm_eps=1e-3)
  net, _ = load(path, num_heads=None)
  assert (net.num_heads, net.epsilon) == (4, 1e-3)
  with pytest.raises(ValueError, match="num_heads must be 4 as in"):
    load(path)
  say(model_args={"num_heads": 8, "norm_eps": 1e-5})
  net, _ = load(path, num_heads=None)
  assert (net.num_heads, net.epsilon) == (8, 1e-5)
  for config, message in (
    ({"num_heads": 3}, "num_heads must divide width 16"),
    ({"num_heads": 0}, r"config\.json: num_heads must be an integer"),
    ({"norm_eps": -1}, r"config\.json: epsilon must be positive"),
    ({"hidden_act": "gelu_new"}, "must be gelu, by the error function"),
    ({"img_size": 10}, r"16 positions .* no grid of \(5, 5\)"),
    # Without it a file that lacks its last block would be a shallower model.
    ({"num_hidden_layers": 3}, r"missing blocks\.2\.attn\.proj\.bias"),
    ({"depth": 1}, r"surplus blocks\.1\.attn\.proj\.bias"),
  ):
    say(**config)
    with pytest.raises(ValueError, match=message):
      load(path, num_heads=None if "num_heads" in config else 2)
  (tmp_path / "config.json").write_text("[1]")
  with pytest.raises(ValueError, match="is no JSON object: it is a list"):
    load(path)


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_heads_without_config_json_are_those_of_the_width(size, tmp_path):
  net = vit.vision_transformer(size, depth=1, mlp_dim=4, patch_size=4)
  tensors = reference.timm(net, reference.random_params(net, (8, 8, 1)))
  path = reference.save(tmp_path / "model.safetensors", tensors)
  assert (
    load(path, num_heads=None)[0].num_heads == {"tiny": 3, "small": 6}[size]
  )
  assert load(path, num_heads=2)[0].num_heads == 2


def changed(name, value):
  return lambda tensors: tensors.update({name: value(tensors[name])})


NAME = "blocks.1.mlp.fc1.weight"
DEFECTS = {
  "missing": (
    lambda tensors: tensors.pop(NAME),
    rf"not a whole timm VisionTransformer: missing {NAME}\.$",
  ),
  "surplus": (
    lambda tensors: tensors.update(extra=np.zeros(1, np.float32)),
    r"surplus extra\.$",
  ),
  "both": (
    lambda tensors: tensors.update(extra=tensors.pop(NAME)),
    rf"missing {NAME}; surplus extra\.$",
  ),
  "eleven": (
    lambda tensors: tensors.update(
      {f"x{i:02}": np.zeros(1, np.float32) for i in range(12)}
    ),
    r"surplus x00, .*x09 and 2 more\.$",
  ),
  "half a head": (
    lambda tensors: tensors.pop("head.bias"),
    r"missing head\.bias\.$",
  ),
  "shape": (
    changed(NAME, lambda x: x[:, 1:]),
    rf"tensor {NAME} must have shape \(64, 16\), got \(64, 15\)",
  ),
  "rank": (
    changed("patch_embed.proj.weight", lambda x: x[0]),
    r"patch_embed\.proj\.weight must have 4 axes",
  ),
  "class token": (
    changed("cls_token", lambda x: x[0]),
    r"cls_token must have shape \(1, 1, 16\)",
  ),
  "no grid": (
    changed("pos_embed", lambda x: x[:, :-1]),
    "pos_embed has 15 positions beside the class token's, which is no square",
  ),
  "not finite": (
    changed(NAME, lambda x: np.where(x > 0, np.nan, x).astype(np.float32)),
    f"tensor {NAME} is not finite",
  ),
  "nothing known": (
    lambda tensors: tensors.clear(),
    "no vision transformer in the naming of Hugging Face or timm: it has no",
  ),
  **{
    name: (
      lambda tensors, name=name: tensors.update({name: np.ones(2, "f4")}),
      f"a model with {part}, which is not read: {name}",
    )
    for name, part in (
      ("dist_token", "a distillation token"),
      ("reg_token", "register tokens"),
      ("blocks.0.ls1.gamma", "scales of its blocks"),
      ("blocks.0.attn.q_norm.weight", "norms of queries and keys"),
      ("fc_norm.weight", "a norm behind its pooling"),
      ("norm_pre.weight", "a norm before its blocks"),
      ("blocks.0.attn.relative_position_bias_table", "relative positions"),
      ("deit.embeddings.cls_token", "the layout of DeiT"),
    )
  },
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_wrong_model_is_refused_by_name(defect, params, tmp_path):
  change, message = DEFECTS[defect]
  tensors = reference.timm(NET, params)
  change(tensors)
  path = reference.save(tmp_path / "model.safetensors", tensors)
  with pytest.raises(ValueError, match=message) as raised:
    load(path)
  assert "\n" not in str(raised.value)


def entry(name, **fields):
  return lambda header: header[name].update(fields)


HEADERS = {
  "dtype": (entry("norm.bias", dtype="I64"), "norm.bias has dtype I64"),
  "size": (entry("norm.bias", shape=[15]), "needs 60 bytes and has 64"),
  "negative": (entry("norm.bias", shape=[-16]), "must have dtype, shape and"),
  "boolean": (entry("norm.bias", shape=[True]), "must have dtype, shape and"),
  "no offsets": (
    lambda header: header["norm.bias"].pop("data_offsets"),
    "must have dtype, shape and",
  ),
  "overlap": (
    entry("norm.bias", data_offsets=[0, 64]),
    "the one before it ends at|begins at",
  ),
  "gap": (
    lambda header: header.pop("norm.bias"),
    "begins at",
  ),
}


@pytest.mark.parametrize("defect", HEADERS)
def test_a_wrong_header_is_refused_by_name(defect, params, tmp_path):
  change, message = HEADERS[defect]
  path = tmp_path / "model.safetensors"
  reference.save(path, reference.timm(NET, params), change)
  with pytest.raises(ValueError, match=message) as raised:
    load(path)
  assert str(path) in str(raised.value)


def test_a_file_that_is_none_is_refused(params, tmp_path):
  path = tmp_path / "model.safetensors"
  whole = reference.save(path, reference.timm(NET, params)).read_bytes()
  (size,) = struct.unpack("<Q", whole[:8])
  for content, message in (
    (b"", "is cut off: it has 0 bytes"),
    (whole[: 8 + size // 2], "is cut off: its header ends"),
    (whole[:-1], "is cut off: tensor"),
    (whole + b"\0", "has 1 bytes after its last tensor"),
    (b"\xff" * 16, "its header would have"),
    (struct.pack("<Q", 2) + b"[]", "no readable header: it is a list"),
    (struct.pack("<Q", 3) + b"{x}", "no readable header"),
    (struct.pack("<Q", 13) + b'{"a":1,"a":2}', "it names a twice"),
  ):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
      load(path)
  for other, message in (
    (tmp_path / "none", "is no file"),
    (tmp_path / "model.bin", "other formats are not read"),
  ):
    if other.suffix:
      other.write_bytes(whole)
    with pytest.raises(ValueError, match=message):
      load(other)
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
    load(tmp_path / "empty")


def test_reading_loads_nothing_and_writes_nothing(params, tmp_path):
  path = reference.save(
    tmp_path / "model.safetensors", reference.timm(NET, params)
  )
  tensors = safetensors.read(path)
  array = tensors["norm.bias"]
  assert isinstance(array, np.memmap)
  assert not array.flags.writeable
  assert pretrained.read(path, num_heads=2).params["norm"]["bias"].base is None
