"""Vision transformers: equal to a NumPy forward, and split at their tokens."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import vision_transformers as reference

from robust_mm import _validate
from robust_mm import models
from robust_mm.models import encoders
from robust_mm.models import functional
from robust_mm.models import vit
from robust_mm.models import vit_blocks

SHAPE = (8, 12, 3)
PREPROCESS = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))


def make(**options):
  return vit.vision_transformer(
    **{
      "width": 16,
      "depth": 2,
      "num_heads": 2,
      "patch_size": 4,
      "num_classes": 5,
      "preprocess": PREPROCESS,
      **options,
    }
  )


@pytest.fixture(scope="module")
def params():
  return reference.random_params(make(), SHAPE)


@pytest.fixture(scope="module")
def images():
  return jax.random.uniform(jax.random.key(1), (4, *SHAPE))


@pytest.fixture(scope="module")
def tokens(params, images):
  return make().embed(params, images)


COMPILED = {}


def encode(net, *args, **options):
  """One compiled function for each network."""
  if net not in COMPILED:
    COMPILED[net] = jax.jit(net.encode, static_argnames="train")
  return COMPILED[net](*args, **options)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_logits_are_those_of_one_head_after_another(pool, params, images):
  net = make(pool=pool)
  found = jax.jit(net.apply)(params, images)
  wanted = reference.logits(net, params, images)
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  # What a wrong port would do is far outside of that.
  for wrong in (
    {"epsilon": 1e-2},
    {"preprocess": vit.HALF},
    {"pool": "mean" if pool == "cls" else "cls"},
  ):
    other = reference.logits(dataclasses.replace(net, **wrong), params, images)
    assert np.max(np.abs(other - wanted)) > 1e-3
  swapped = jax.tree.map(lambda leaf: leaf, params)
  for block in swapped["blocks"].values():
    block["qkv"] = jax.tree.map(lambda x: jnp.flip(x, -3), block["qkv"])
  other = reference.logits(net, swapped, images)
  assert np.max(np.abs(other - wanted)) > 1e-2


def test_gelu_is_the_exact_one(params, images):
  net = make()
  wanted = reference.logits(net, params, images)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("robust_mm.models.vit_blocks.gelu", jax.nn.gelu)
    tanh = net.apply(params, images)
  assert np.max(np.abs(tanh - wanted)) > 1e-4


def test_apply_is_encode_after_embed(params, images, tokens):
  net = make()
  two = encode(net, params, tokens)
  np.testing.assert_allclose(jax.jit(net.apply)(params, images), two, atol=2e-6)
  np.testing.assert_array_equal(
    net.apply(params, images), net.encode(params, net.embed(params, images))
  )
  assert tokens.shape == (4, net.num_tokens(SHAPE), 16)


def test_embedding_is_the_patch_weight_on_flattened_patches(params, images):
  net = make()
  weight = np.asarray(net.patch_weight(params))
  assert weight.shape == (4 * 4 * 3, 16)
  delta = np.random.default_rng(0).normal(size=(4, *SHAPE)).astype(np.float32)
  moved = net.embed(params, images + delta) - net.embed(params, images)
  # Row 0, column 1 of the patches; pixels are divided by the deviations.
  patch = (delta[:, :4, 4:8] / np.asarray(PREPROCESS[1])).reshape(4, -1)
  np.testing.assert_allclose(moved[:, 1], patch @ weight, atol=1e-4)
  wrong = delta[:, :4, 4:8].transpose(0, 3, 1, 2).reshape(4, -1) @ weight
  assert np.max(np.abs(moved[:, 1] - wrong)) > 1e-1


def test_grey_images_need_no_channel_axis():
  net = make(preprocess=(0.5, 0.5))
  params = reference.random_params(net, (8, 12))
  images = jax.random.uniform(jax.random.key(1), (2, 8, 12))
  np.testing.assert_array_equal(
    net.embed(params, images), net.embed(params, images[..., None])
  )


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_absent_tokens_are_not_in_the_sequence(pool, params, images, tokens):
  net = make(pool=pool)
  keep = np.random.default_rng(0).random((4, 6)) < 0.6
  found = encode(net, params, tokens, jnp.asarray(keep))
  wanted = reference.logits(net, params, images, keep)
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  assert np.max(np.abs(found - encode(net, params, tokens))) > 1e-2


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_no_value_of_an_absent_image_reaches_the_output(pool, params, tokens):
  net = make(pool=pool)
  present = jnp.array([True, False, True, False])
  poisoned = tokens.at[1].set(jnp.nan).at[3].add(7.0)
  one, two = (encode(net, params, t, present) for t in (tokens, poisoned))
  np.testing.assert_array_equal(one, two)
  assert np.all(np.isfinite(one))
  # Present ones are what they are without a mask.
  np.testing.assert_allclose(
    one[0], encode(net, params, tokens)[0], rtol=1e-5, atol=1e-5
  )
  slope = jax.jit(jax.grad(lambda t: net.encode(params, t, present).sum()))(
    tokens
  )
  moved = np.asarray(jnp.any(slope != 0, axis=(1, 2)))
  np.testing.assert_array_equal(moved, present)


def test_bfloat16_is_close_and_softmax_is_wide(params, tokens):
  net = make(dtype=jnp.bfloat16)
  assert net == make(dtype="bfloat16")
  exact, rough = (encode(n, params, tokens) for n in (make(), net))
  assert rough.dtype == jnp.float32
  error = np.max(np.abs(rough - exact)) / np.std(exact)
  assert 1e-4 < error < 0.1
  jaxpr = str(jax.make_jaxpr(net.encode)(params, tokens))
  exponents = [line for line in jaxpr.splitlines() if "= exp " in line]
  products = [line for line in jaxpr.splitlines() if "dot_general" in line]
  assert exponents
  assert all(":f32[" in line for line in exponents)
  assert sum(":bf16[" in line for line in products) >= 4 * net.depth


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_both_attentions_are_the_same(dtype, params, tokens):
  keep = jnp.asarray(np.random.default_rng(0).random((4, 6)) < 0.6)
  one, two = (
    encode(make(implementation=name, dtype=dtype), params, tokens, keep)
    for name in ("xla", "plain")
  )
  np.testing.assert_allclose(one, two, atol=5e-2 if dtype else 1e-5)
  poisoned = jnp.where(keep[..., None], tokens, jnp.nan)
  net = make(implementation="plain", dtype=dtype)
  np.testing.assert_array_equal(encode(net, params, poisoned, keep), two)


def test_gelu_and_its_slope_are_exact_in_either_width():
  x = np.linspace(-6, 6, 97)
  phi = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
  cdf = scipy.special.ndtr(x)
  slope = jax.jit(jax.vmap(jax.grad(vit_blocks.gelu)))
  for dtype, limit in ((jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)):
    given = jnp.asarray(x, dtype)
    found = jax.jit(vit_blocks.gelu)(given).astype(jnp.float32)
    scale = 1 + np.abs(x)
    assert np.max(np.abs(found - x * cdf) / scale) < limit
    assert np.max(np.abs(slope(given) - (cdf + x * phi)) / scale) < 2 * limit


@pytest.mark.parametrize("remat", ["blocks", "dots"])
def test_remat_changes_memory_and_nothing_else(remat, params, tokens):
  def loss(net, p):
    return jnp.sum(net.encode(p, tokens) ** 2)

  plain, net = make(), make(remat=remat)
  wanted, found = (
    jax.jit(jax.grad(lambda p, n=n: loss(n, p)))(params) for n in (plain, net)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    wanted,
    found,
  )

  def kept(net):
    backward = jax.eval_shape(
      lambda p: jax.vjp(lambda p: loss(net, p), p)[1], params
    )
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(backward))

  assert kept(net) < 0.8 * kept(plain)


def test_dropout_is_of_training_and_of_its_key(params, tokens):
  net = make(dropout=0.3)
  still = encode(net, params, tokens)
  np.testing.assert_allclose(still, encode(make(), params, tokens), atol=1e-6)
  key = jax.random.key(0)
  np.testing.assert_array_equal(still, encode(net, params, tokens, key=key))
  one, again, other = (
    encode(net, params, tokens, train=True, key=k)
    for k in (key, key, jax.random.key(1))
  )
  np.testing.assert_array_equal(one, again)
  assert np.max(np.abs(one - other)) > 1e-2
  assert np.max(np.abs(one - still)) > 1e-2


@pytest.mark.parametrize(
  ("size", "patch", "count"),
  # As published and as torch counts them, with 1000 classes at 224 x 224.
  [
    ("tiny", 16, 5_717_416),
    ("small", 16, 22_050_664),
    ("small", 32, 22_878_952),
    ("base", 16, 86_567_656),
    ("base", 32, 88_224_232),
    ("large", 16, 304_326_632),
  ],
)
def test_sizes_have_the_known_numbers_of_parameters(size, patch, count):
  net = vit.vision_transformer(size, patch_size=patch, num_classes=1000)
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), (224, 224, 3)))
  leaves = jax.tree.leaves(shapes)
  assert sum(math.prod(leaf.shape) for leaf in leaves) == count


def test_a_fresh_network_begins_with_outputs_of_size_one():
  net = make()
  init = jax.jit(lambda key: net.init(key, SHAPE))
  params, other = init(jax.random.key(0)), init(jax.random.key(1))
  images = jax.random.uniform(jax.random.key(1), (64, *SHAPE))
  assert 0.2 < float(jnp.std(jax.jit(net.apply)(params, images))) < 3
  assert not np.array_equal(other["position"], params["position"])
  bound = math.sqrt(6 / 32)
  kernel = params["blocks"]["0"]["qkv"]["kernel"]
  assert bound * 0.95 < float(jnp.max(jnp.abs(kernel))) <= bound


def test_sides_that_patches_do_not_divide_are_padded_on_request(params):
  images = jax.random.uniform(jax.random.key(1), (2, 7, 10, 3))
  with pytest.raises(ValueError, match=r"patch_size .* must divide the sides"):
    make().embed(params, images)
  net = make(pad=True)
  # At the mean colour, which is zero after preprocessing.
  full = jnp.broadcast_to(jnp.asarray(PREPROCESS[0]), (2, *SHAPE))
  full = full.at[:, :7, :10].set(images)
  np.testing.assert_allclose(
    net.embed(params, images), make().embed(params, full), atol=1e-5
  )


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"width": 15}, "num_heads must divide width 15, got 2"),
    ({"depth": 0}, "depth must be an integer of at least 1"),
    ({"width": None}, "width must be given"),
    ({"size": "huge"}, "size must be one of 'tiny'"),
    ({"patch_size": (4, 4, 4)}, r"patch_size must be one number or \(rows"),
    ({"patch_size": 0}, "patch_size must be an integer of at least 1"),
    ({"num_classes": 0}, "num_classes must be"),
    ({"pool": "max"}, "pool must be one of 'cls', 'mean'"),
    ({"preprocess": (0.5,)}, r"preprocess must be \(mean, std\)"),
    ({"preprocess": (0.5, 0.0)}, "preprocess: std must be positive"),
    ({"preprocess": (math.nan, 1.0)}, "preprocess: mean must be finite"),
    ({"dtype": "float8"}, "dtype must be one of 'bfloat16'"),
    ({"remat": "all"}, "remat must be one of"),
    ({"dropout": 1.0}, "dropout must lie in"),
    ({"epsilon": 0.0}, "epsilon must be positive"),
    ({"implementation": "flash"}, "implementation must be one of"),
  ],
)
def test_a_wrong_argument_is_named(options, message):
  with pytest.raises(ValueError, match=message):
    make(**options)


def test_a_wrong_array_is_named(params, tokens):
  net = make()
  with pytest.raises(ValueError, match=r"images must be floats in \[0, 1\]"):
    net.embed(params, jnp.zeros((1, *SHAPE), jnp.uint8))
  with pytest.raises(ValueError, match=r"image_shape must be \(h, w\)"):
    net.embed(params, jnp.zeros((1, 4)))
  with pytest.raises(ValueError, match=r"patch_size .* must not exceed"):
    net.embed(params, jnp.zeros((1, 2, 12, 3)))
  with pytest.raises(ValueError, match="params have a patch projection"):
    net.embed(params, jnp.zeros((1, 8, 12, 1)))
  with pytest.raises(ValueError, match="preprocess must have one number"):
    net.init(jax.random.key(0), (8, 12, 2))
  with pytest.raises(ValueError, match=r"tokens must have shape \[b, 6, 16\]"):
    net.encode(params, tokens[:, 1:])
  with pytest.raises(ValueError, match="present must be bool of shape"):
    net.encode(params, tokens, jnp.ones(3, bool))
  with pytest.raises(ValueError, match="present must be bool"):
    net.encode(params, tokens, jnp.ones(4))


# As an encoder.

SMALL = {
  "size": None,
  "width": 16,
  "depth": 1,
  "num_heads": 2,
  "patch_size": 4,
}


@pytest.mark.parametrize(
  "options",
  [{}, {"embedding_dim": 7, "dropout": 0.2}, {"embedding_radius": 0.5}],
  ids=str,
)
def test_an_encoder_is_its_two_parts_bit_for_bit(options, images):
  encoder = encoders.make("vit", **SMALL, **options)
  functions = functional.encoder_functions(encoder, SHAPE)
  params, state = jax.jit(functions.init)(jax.random.key(0))
  key = jax.random.key(1)
  for train in (False, True):
    whole, _ = functions.apply(params, state, images, train=train, key=key)
    tokens = encoder.embed(params, state, images)
    parts, left = encoder.encode_tokens(
      params, state, tokens, None, train=train, key=key
    )
    np.testing.assert_array_equal(whole, parts)
    assert left == state == {}
  assert whole.shape == (4, encoder.embedding_dim)
  if "embedding_radius" in options:
    assert np.max(np.linalg.norm(whole, axis=-1)) <= 0.5 * (1 + 1e-6)
    wider = encoders.bounded(encoder, radius=100.0)
    free, _ = wider.encode_tokens(params, state, tokens, None)
    assert np.min(np.linalg.norm(free, axis=-1)) > 0.5


def test_a_model_of_images_and_more():
  shapes = {"image": (8, 12, 3), "audio": (6,)}
  given = {
    "image": {"name": "vit", "embedding_dim": 8, **SMALL},
    "audio": {"name": "mlp", "embedding_dim": 8},
  }
  model = models.build(
    fusion="concat", encoders=given, num_classes=3, input_shapes=shapes
  )
  params, state = jax.jit(model.init)(jax.random.key(0))
  assert {"embed", "cls", "position", "blocks", "norm", "head"} == set(
    params["encoders"]["image"]
  )
  inputs = {
    "image": jax.random.uniform(jax.random.key(1), (2, 8, 12, 3)),
    "audio": jnp.ones((2, 6)),
  }
  present = {"image": jnp.array([True, False]), "audio": jnp.ones(2, bool)}
  apply = jax.jit(lambda x: model.apply(params, state, x, present)[0].logits)
  poisoned = {**inputs, "image": inputs["image"].at[1].set(jnp.nan)}
  np.testing.assert_array_equal(apply(inputs), apply(poisoned))


def test_what_it_normalises_itself_the_model_leaves_alone(images):
  constants = {"image": models.Normalization(np.array(0.3), np.array(0.1))}
  made = {}
  for name, preprocess in (("own", PREPROCESS), ("none", None)):
    encoder = encoders.vit(**SMALL, preprocess=preprocess)
    for normalization in (None, constants):
      model = models.concat_fusion(
        {"image": encoder},
        3,
        input_shapes={"image": SHAPE},
        normalization=normalization,
      )
      params, state = jax.jit(model.init)(jax.random.key(0))
      present = {"image": jnp.ones(4, bool)}
      outputs, _ = jax.jit(model.apply)(
        params, state, {"image": images}, present
      )
      made[name, normalization is None] = outputs.logits
  np.testing.assert_array_equal(made["own", True], made["own", False])
  assert np.max(np.abs(made["none", True] - made["none", False])) > 1e-2


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"patch": 4}, "encoder vit has no option 'patch'"),
    ({"patch_size": 5}, "must divide the sides of the image"),
    ({"num_heads": 3}, "num_heads must divide width 16"),
  ],
)
def test_a_wrong_option_of_a_configuration_is_named(options, message):
  with pytest.raises(_validate.UserError, match=message):
    models.build(
      fusion="concat",
      encoders={"image": {"name": "vit", **SMALL, **options}},
      num_classes=3,
      input_shapes={"image": SHAPE},
    )
