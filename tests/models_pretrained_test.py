"""Files of others: the same numbers, or one sentence that says why not."""

import dataclasses
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vision_transformers as reference

from robust_mm import _validate
from robust_mm import config as config_lib
from robust_mm import models
from robust_mm import training
from robust_mm.models import encoders
from robust_mm.models import functional
from robust_mm.models import pretrained
from robust_mm.models import safetensors
from robust_mm.models import vit

SHAPE = (8, 8, 3)
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
NET = vit.vision_transformer(
  width=16,
  depth=2,
  num_heads=2,
  patch_size=2,
  num_classes=5,
  preprocess=vit.HALF,
)


@pytest.fixture(scope="module")
def params():
  return reference.random_params(NET, SHAPE)


def load(path, **options):
  return vit.load_safetensors(
    path, **{"preprocess": vit.HALF, "num_heads": 2, **options}
  )


def same(one, two):
  assert jax.tree.structure(one) == jax.tree.structure(two)
  jax.tree.map(np.testing.assert_array_equal, one, two)


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
