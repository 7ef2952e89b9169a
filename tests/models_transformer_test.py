"""The token transformer: absence is absence, whatever the arrays hold."""

import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import data
from robust_mm import models
from robust_mm.models import encoders

SHAPES = {"a": (6,), "b": (9, 3), "ids": (7,), "image": (8, 4, 1)}
VOCABULARY = {"ids": 11}


def make(shapes=SHAPES, **options):
  sizes = {n: s for n, s in VOCABULARY.items() if n in shapes}
  options = {"width": 16, "num_layers": 2, "num_heads": 2, **options}
  return models.token_transformer(shapes, 3, vocabulary_sizes=sizes, **options)


@pytest.fixture(scope="module", params=["cls", "mean"])
def made(request):
  model = make(pooling=request.param)
  params, _ = jax.jit(model.init)(jax.random.key(0))
  # Larger vectors of position and modality than at the beginning, so that
  # tokens differ as trained ones do.
  params["fusion"]["cls"] *= 50
  for encoder in params["encoders"].values():
    encoder["position"] *= 30
    encoder["kind"] *= 30
  return model, params, request.param


def say(model, params, inputs, present):
  """Outputs of one compiled call, as ``model.apply`` gives them."""
  if model not in COMPILED:
    COMPILED[model] = jax.jit(lambda p, x, f: model.apply(p, {}, x, f)[0])
  return COMPILED[model](params, inputs, present)


COMPILED = {}


def make_inputs(seed=0, size=4, shapes=SHAPES):
  rng = np.random.default_rng(seed)
  return {
    name: jnp.asarray(rng.integers(1, 11, (size, *shape)), jnp.int32)
    if name in VOCABULARY
    else jnp.asarray(rng.normal(size=(size, *shape)), jnp.float32)
    for name, shape in shapes.items()
  }


def all_present(size=4, without=()):
  return {n: jnp.full(size, n not in without) for n in SHAPES}


@pytest.mark.parametrize("content", ["random", 1e6, np.nan])
def test_content_of_an_absent_modality_changes_no_bit(made, content):
  model, params, _ = made
  inputs, present = make_inputs(), all_present()
  present["image"] = jnp.array([True, False, True, False])
  gone = ~present["image"][:, None, None, None]
  other = make_inputs(1)["image"] if content == "random" else content
  changed = {**inputs, "image": jnp.where(gone, other, inputs["image"])}
  floats = ("a", "b", "image")

  def logits(params, values, rest):
    return model.apply(params, {}, {**rest, **values}, present)[0].logits

  def total(params, values, rest):
    return jnp.sum(jnp.square(logits(params, values, rest)))

  call = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
  predict = jax.jit(logits)
  found = []
  for given in (inputs, changed):
    values = {n: given[n] for n in floats}
    found.append((predict(params, values, given), call(params, values, given)))
  (before, _), (after, (_, (by_params, by_inputs))) = found
  np.testing.assert_array_equal(before, after)
  assert np.all(by_inputs["image"][1::2] == 0)
  assert np.all(np.any(by_inputs["image"][0::2] != 0, axis=(1, 2, 3)))
  for leaf in jax.tree.leaves(by_params):
    assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("left", [("a",), ("b", "ids"), ("a", "image")])
def test_masked_sequence_is_the_physically_shorter_one(made, left):
  model, params, pooling = made
  inputs = make_inputs()
  gone = [n for n in SHAPES if n not in left]
  masked = say(model, params, inputs, all_present(without=gone))
  shorter = numpy_logits(params, inputs, left, pooling)
  np.testing.assert_allclose(masked.logits, shorter, atol=1e-5)
  zeroed = {n: x * (n in left) for n, x in inputs.items()}
  zeros = say(model, params, zeroed, all_present())
  assert np.max(np.abs(zeros.logits - masked.logits)) > 1e-2


def numpy_logits(params, inputs, names, pooling):
  """Of these modalities alone, in float64: no mask, the others unheard of."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  tokens = [numpy_tokens(params["encoders"][n], inputs[n], n) for n in names]
  body = params["fusion"]
  first = np.tile(body["cls"], (len(tokens[0]), 1, 1))
  x = np.concatenate([first, *tokens], axis=1)
  for index in range(2):
    x = numpy_block(body["blocks"][str(index)], x, num_heads=2)
  x = numpy_norm(body["norm"], x)
  pooled = x[:, 0] if pooling == "cls" else x.mean(axis=1)
  return numpy_dense(body["last"], pooled)


def numpy_dense(layer, x):
  return np.asarray(x) @ layer["kernel"] + layer["bias"]


def numpy_norm(layer, x):
  apart = x - x.mean(-1, keepdims=True)
  variance = np.mean(apart**2, -1, keepdims=True)
  return apart / np.sqrt(variance + 1e-6) * layer["scale"] + layer["bias"]


def numpy_gelu(x):
  return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def numpy_tokens(encoder, x, name):
  x = np.asarray(x)
  if name in VOCABULARY:
    tokens = encoder["embed"]["embedding"][x]
  else:
    tokens = numpy_dense(encoder["embed"], numpy_pieces(x, name))
  if "stem" in encoder:
    tokens = numpy_dense(encoder["stem"], numpy_gelu(tokens))
  return tokens + encoder["position"] + encoder["kind"]


def numpy_pieces(x, name):
  if name == "a":
    return x[:, None]
  if name == "b":  # 9 frames, 4 to a token: three zeros at the end
    x = np.concatenate([x, np.zeros((len(x), 3, 3))], axis=1)
    return np.stack([x[:, i : i + 4].reshape(len(x), -1) for i in (0, 4, 8)], 1)
  pieces = [
    x[:, i : i + 4, j : j + 2].reshape(len(x), -1)
    for i in (0, 4)
    for j in (0, 2)
  ]
  return np.stack(pieces, 1)


def numpy_block(block, x, num_heads):
  size, number, width = x.shape
  parts = np.split(
    numpy_dense(block["qkv"], numpy_norm(block["norm_attention"], x)), 3, -1
  )
  q, k, v = (p.reshape(size, number, num_heads, -1) for p in parts)
  scores = np.einsum("bqhc,bkhc->bhqk", q, k) / math.sqrt(width // num_heads)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  mixed = np.einsum("bhqk,bkhc->bqhc", weights, v).reshape(x.shape)
  x = x + numpy_dense(block["out"], mixed)
  hidden = numpy_gelu(
    numpy_dense(block["expand"], numpy_norm(block["norm_mlp"], x))
  )
  return x + numpy_dense(block["contract"], hidden)


def test_no_modality_at_all_is_the_class_token_alone(made):
  model, params, _ = made
  present = all_present(without=SHAPES)
  inputs = jax.tree.map(lambda x: (x * jnp.nan).astype(x.dtype), make_inputs())
  found = say(model, params, inputs, present)
  body = jax.tree.map(np.asarray, params["fusion"])
  x = np.tile(body["cls"], (4, 1, 1))
  for index in range(2):
    x = numpy_block(body["blocks"][str(index)], x, num_heads=2)
  x = numpy_norm(body["norm"], x)[:, 0]
  np.testing.assert_allclose(
    found.logits, numpy_dense(body["last"], x), atol=1e-5
  )


def test_a_nan_that_is_present_stays_in_its_row(made):
  model, params, _ = made
  inputs = make_inputs()
  before = say(model, params, inputs, all_present()).logits
  inputs["b"] = inputs["b"].at[2, 0, 0].set(jnp.nan)
  after = say(model, params, inputs, all_present()).logits
  assert np.all(np.isnan(after[2]))
  others = np.array([0, 1, 3])
  np.testing.assert_array_equal(after[others], before[others])


def test_padding_of_ids_is_the_shorter_sequence(made):
  model, params, pooling = made
  inputs = make_inputs()
  inputs["ids"] = inputs["ids"].at[:, 4:].set(0)
  padded = say(model, params, inputs, all_present())
  encoder = dict(params["encoders"]["ids"])
  encoder["position"] = encoder["position"][:4]
  cut = {**params, "encoders": {**params["encoders"], "ids": encoder}}
  shorter = numpy_logits(
    cut, {**inputs, "ids": inputs["ids"][:, :4]}, tuple(SHAPES), pooling
  )
  np.testing.assert_allclose(padded.logits, shorter, atol=1e-5)


def test_bfloat16_keeps_absence_exact():
  model = make({"a": (6,), "b": (9, 3)}, num_layers=1)
  params, _ = jax.jit(model.init)(jax.random.key(0))
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  shapes = {"a": (6,), "b": (9, 3)}
  inputs = {
    n: x.astype(jnp.bfloat16) for n, x in make_inputs(shapes=shapes).items()
  }
  present = {"a": jnp.ones(4, bool), "b": jnp.zeros(4, bool)}
  before = say(model, params, inputs, present).logits
  inputs["b"] = jnp.full_like(inputs["b"], jnp.nan)
  after = say(model, params, inputs, present).logits
  assert after.dtype == jnp.bfloat16
  np.testing.assert_array_equal(before, after)
  assert np.all(np.isfinite(after.astype(jnp.float32)))


def test_all_patterns_of_presence_compile_once(made, caplog):
  model, params, _ = made
  inputs = make_inputs(seed=5)

  @jax.jit
  def only_here(params, inputs, present):
    return model.apply(params, {}, inputs, present)[0].logits

  patterns = [all_present(without=gone) for gone in ((), ("a",), tuple(SHAPES))]
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    found = [only_here(params, inputs, present) for present in patterns]
  compiled = [r for r in caplog.records if "Compiling jit(only_here)" in r.msg]
  compiled = compiled or [
    r
    for r in caplog.records
    if r.getMessage().startswith("Compiling") and "only_here" in r.getMessage()
  ]
  assert len(compiled) == 1
  assert np.all(np.asarray(found[0]) != np.asarray(found[1]))


def test_features_are_what_the_head_sees_and_frozen_models_agree(made):
  model, params, _ = made
  inputs, present = make_inputs(), all_present(without=("b",))
  outputs = say(model, params, inputs, present)
  features = jax.jit(model.features)(params, outputs.embeddings, present)
  assert features.shape == (4, 16)
  np.testing.assert_allclose(
    numpy_dense(jax.tree.map(np.asarray, params["fusion"]["last"]), features),
    outputs.logits,
    atol=1e-5,
  )
  assert outputs.embeddings["image"].shape == (4, 4, 16)
  assert np.all(outputs.embeddings["b"] == 0)
  frozen, fixed = model.freeze(params)
  again = jax.jit(frozen.apply)(fixed, {}, inputs, present)[0]
  np.testing.assert_array_equal(again.logits, outputs.logits)
  np.testing.assert_array_equal(
    jax.jit(frozen.features)(fixed, outputs.embeddings, present), features
  )


def test_a_regression_is_in_units_of_its_label():
  shapes = {"a": (6,)}
  options = {"width": 8, "num_heads": 2, "num_layers": 1}
  target = models.Target(mean=100.0, deviation=7.0)
  number = models.token_transformer(shapes, 1, target=target, **options)
  params, state = jax.jit(number.init)(jax.random.key(0))
  inputs, present = make_inputs(shapes=shapes), {"a": jnp.ones(4, bool)}
  outputs, _ = jax.jit(number.apply)(params, state, inputs, present)
  features = jax.jit(number.features)(params, outputs.embeddings, present)
  head = jax.tree.map(np.asarray, params["fusion"]["last"])
  np.testing.assert_allclose(
    outputs.logits, 100 + 7 * numpy_dense(head, features), rtol=1e-5
  )


# method note, section 11: what a token covers, and how many there are.
LAYOUTS = {
  "av_digits": {"image": (16, 49), "audio": (40, 64)},
  "utd_mhad": {"inertial": (16, 48), "skeleton": (8, 240), "depth": (64, 576)},
  "mfeat": {"pix": (1, 240), "mor": (1, 6)},
  "mosi": {"text": (1, 100), "audio": (1, 73), "words": (1, 1003)},
  "digits": {"left": (4, 8), "right": (4, 8)},
  "diabetes": {"serum": (1, 6)},
}


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_every_data_set_has_tokens(name):
  info = data.registry.get(name)
  shapes = {n: m.shape for n, m in info.modalities.items()}
  ids = {n: 1003 for n, m in info.modalities.items() if m.kind == "tokens"}
  model = models.token_transformer(
    shapes,
    info.num_classes or 1,
    width=8,
    num_heads=2,
    num_layers=1,
    vocabulary_sizes=ids,
    target=None if info.num_classes else models.Target(0.0, 1.0),
  )
  parts = model.token_parts
  for modality, (number, size) in LAYOUTS[name].items():
    assert parts.num_tokens[modality] == number
    assert parts.sizes[modality] == size
  params, state = jax.eval_shape(model.init, jax.random.key(0))
  inputs = {
    n: jax.ShapeDtypeStruct((2, *s), jnp.int32 if n in ids else jnp.float32)
    for n, s in shapes.items()
  }
  present = {n: jax.ShapeDtypeStruct((2,), bool) for n in shapes}
  outputs, _ = jax.eval_shape(model.apply, params, state, inputs, present)
  assert outputs.logits.shape == (2, info.num_classes or 1)
  assert parts.ids == tuple(ids)


def test_video_is_cut_into_boxes_that_do_not_overlap():
  tokenizer = models.patches.Tokenizer(patch=(2, 3, 2))
  x = np.arange(2 * 4 * 7 * 4 * 3, dtype=np.float32).reshape(2, 4, 7, 4, 3)
  found = np.asarray(tokenizer.cut(jnp.asarray(x), x.shape[1:]))
  assert tokenizer.layout(x.shape[1:]) == (2 * 3 * 2, 2 * 3 * 2 * 3)
  full = np.concatenate([x, np.zeros((2, 4, 2, 4, 3), np.float32)], axis=2)
  index = 0
  for t in (0, 2):
    for h in (0, 3, 6):
      for w in (0, 2):
        box = full[:, t : t + 2, h : h + 3, w : w + 2].reshape(2, -1)
        np.testing.assert_array_equal(found[:, index], box)
        index += 1


def test_patches_are_normalised_and_zero_where_absent():
  shape = {"a": (2, 2, 1)}
  model = models.token_transformer(
    shape,
    2,
    width=8,
    num_heads=2,
    normalization={"a": models.Normalization(np.array(3.0), np.array(2.0))},
  )
  inputs = {"a": jnp.full((2, 2, 2, 1), 7.0)}
  present = {"a": jnp.array([True, False])}
  found = model.token_parts.patches(inputs, present)["a"]
  np.testing.assert_array_equal(found[0], np.full((4, 1), 2.0))
  np.testing.assert_array_equal(found[1], np.zeros((4, 1)))


@pytest.mark.parametrize(
  "options,message",
  [
    ({"num_heads": 3}, "num_heads must divide embedding_dim 16, got 3"),
    ({"num_layers": 0}, "num_layers must be an integer of at least 1"),
    ({"pooling": "max"}, "pooling must be one of 'cls', 'mean'"),
    ({"width": 0}, "embedding_dim must be an integer of at least 1"),
    ({"patch": {"a": (2,)}}, "patch must be left out for vectors"),
    ({"patch": {"b": (10,)}}, "patch must not exceed input_shape"),
    ({"patch": {"image": (2,)}}, "patch must have 2 entries"),
    ({"patch": {"ids": (2,)}}, "patch must be left out where there are integ"),
    ({"patch": {"b": (0,)}}, "patch must be an integer of at least 1"),
    ({"patch": {"c": (2,)}}, "patch names the unknown modality 'c'"),
    ({"shapes": {}}, "encoders must name at least one modality"),
    ({"shapes": {"a": (1, 2, 3, 4, 5)}}, "input_shape must have 1 to 4 axes"),
    ({"shapes": {"ids": (3, 3)}}, r"input_shape must be \(t,\)"),
  ],
)
def test_bad_arguments_are_refused_by_name(options, message):
  with pytest.raises(ValueError, match=message):
    make(**options)


def test_parts_that_do_not_go_together_are_refused():
  shapes = {"a": (6,), "b": (9, 3)}
  tokens, plain = encoders.patches(embedding_dim=8), encoders.mlp()
  head = models.TransformerFusion(3)
  with pytest.raises(ValueError, match="modality 'b' has 'mlp'"):
    models.from_parts({"a": tokens, "b": plain}, head, input_shapes=shapes)
  with pytest.raises(ValueError, match="'patches' of modality 'a' gives"):
    models.concat_fusion({"a": tokens, "b": plain}, 3, input_shapes=shapes)
  wide = {"a": tokens, "b": encoders.patches(embedding_dim=16)}
  model = models.from_parts(wide, head, input_shapes=shapes)
  with pytest.raises(ValueError, match="embedding_dim must be the same"):
    model.init(jax.random.key(0))
  with pytest.raises(ValueError, match="embedding_radius must be None"):
    encoders.make("patches", embedding_radius=1.0)
