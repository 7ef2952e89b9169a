import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from robust_mm import _validate
from robust_mm import models
from robust_mm.models import encoders

# One model of every encoder: a fusion is compiled once for all of them.
ENCODERS = {
  "cnn": ((9, 8, 1), encoders.cnn(features=(4, 4), embedding_dim=8)),
  "cnn_video": ((3, 8, 8, 1), encoders.cnn(features=(4,), embedding_dim=8)),
  "lipschitz_cnn": (
    (5, 6, 1),
    encoders.lipschitz_cnn(features=(4,), embedding_dim=8),
  ),
  "lipschitz_mlp": ((3, 4), encoders.lipschitz_mlp(width=8, embedding_dim=8)),
  "lipschitz_temporal_cnn": (
    (8, 3),
    encoders.lipschitz_temporal_cnn(features=(4,), embedding_dim=8),
  ),
  "mlp": ((5,), encoders.mlp(hidden_sizes=(6, 6), embedding_dim=8)),
  "resnet18": (
    (2, 8, 8, 1),
    encoders.resnet18(embedding_dim=8, width=4),
  ),
  "temporal_cnn": (
    (9, 4),
    encoders.temporal_cnn(features=(4,), kernel_size=3, embedding_dim=8),
  ),
  "temporal_resnet": (
    (9, 4),
    encoders.temporal_resnet(
      width=8, num_blocks=1, kernel_size=3, velocity=2.0, embedding_dim=8
    ),
  ),
  "tokens": (
    (6,),
    encoders.transformer(
      width=8, num_layers=1, num_heads=2, embedding_dim=8, vocabulary_size=11
    ),
  ),
  "transformer": (
    (5, 3),
    encoders.transformer(width=8, num_layers=1, num_heads=2, embedding_dim=8),
  ),
  "video_resnet": (
    (4, 8, 8, 1),
    encoders.video_resnet(
      features=(4,), pooling=2, width=8, num_blocks=1, embedding_dim=8
    ),
  ),
}
SHAPES = {name: shape for name, (shape, _) in ENCODERS.items()}
PLAIN = ("cnn", "cnn_video", "mlp", "temporal_cnn")
ONE_LIPSCHITZ = ("lipschitz_cnn", "lipschitz_mlp", "lipschitz_temporal_cnn")
FUSIONS = {
  "orthogonal": models.OrthogonalFusion(3),
  "concat": models.ConcatFusion(3),
  "token": models.TokenFusion(3, width=8, num_layers=1, num_heads=2),
}


def _inputs(seed=0, size=4):
  rng = np.random.default_rng(seed)
  inputs = {
    name: jnp.asarray(rng.normal(size=(size, *shape)), jnp.float32)
    for name, shape in SHAPES.items()
  }
  inputs["tokens"] = jnp.asarray(rng.integers(0, 11, (size, 6)), jnp.int32)
  return inputs


@functools.cache
def _model(fusion):
  return models.from_parts(
    {name: encoder for name, (_, encoder) in ENCODERS.items()},
    FUSIONS[fusion],
    input_shapes=SHAPES,
  )


@functools.cache
def _params(fusion):
  if fusion == "orthogonal":
    return _model(fusion).init(jax.random.key(0))
  params, state = _params("orthogonal")
  head = FUSIONS[fusion].init(jax.random.key(1), dict.fromkeys(SHAPES, 8))
  return {**params, "fusion": head}, state


@functools.cache
def _encode():
  """The encoders and their transpose: compiled once for all fusions."""
  model = _model("orthogonal")
  _, state = _params("orthogonal")

  @jax.jit
  def encode(params, inputs, present, cotangent):
    embeddings, pullback = jax.vjp(
      lambda params: model.encode(params, state, inputs, present)[0], params
    )
    return embeddings, pullback(cotangent)[0]["encoders"]

  return encode


@functools.cache
def _fuse(fusion):
  def loss(params, embeddings, present):
    outputs = _model(fusion).fuse(params, embeddings, present)
    return jnp.sum(jnp.sin(outputs.logits)), outputs

  return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


def _step(fusion, inputs, present):
  """Outputs, and the gradient of a loss of them in all parameters."""
  params, _ = _params(fusion)
  body = _params("orthogonal")[0]
  zeros = {name: jnp.zeros((4, 8)) for name in SHAPES}
  embeddings, _ = _encode()(body, inputs, present, zeros)
  (head, cotangent), outputs = _fuse(fusion)(params, embeddings, present)
  _, encoders = _encode()(body, inputs, present, cotangent)
  return {"encoders": encoders, "fusion": head["fusion"]}, outputs


def _poison(x, flag):
  """NaN (or a token out of the vocabulary) where the modality is absent."""
  bad = jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 10**6
  flag = jnp.reshape(flag, flag.shape + (1,) * (x.ndim - 1))
  return jnp.where(flag, x, jnp.full_like(x, bad))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_absent_inputs_reach_neither_logits_nor_gradients(fusion):
  inputs = _inputs()
  # Example 0 has everything, 3 nothing; the others half each.
  present = {
    name: jnp.array([True, index % 2 == 0, index % 2 == 1, False])
    for index, name in enumerate(SHAPES)
  }
  poisoned = {n: _poison(x, present[n]) for n, x in inputs.items()}
  gradient, outputs = _step(fusion, poisoned, present)
  clean_gradient, clean = _step(fusion, inputs, present)
  np.testing.assert_array_equal(outputs.logits, clean.logits)
  jax.tree.map(np.testing.assert_array_equal, gradient, clean_gradient)
  for leaf in jax.tree.leaves((gradient, outputs)):
    assert jnp.all(jnp.isfinite(leaf))
  for name, embedding in outputs.embeddings.items():
    assert embedding.shape == (4, 8)
    assert jnp.all((embedding == 0) == ~present[name][:, None])
  assert outputs.logits.shape == (4, 3)
  assert set(gradient["encoders"]) == set(_model(fusion).modalities)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_an_encoder_nobody_feeds_gets_exactly_no_gradient(fusion):
  present = {name: jnp.ones(4, bool) for name in SHAPES}
  for name in ("cnn", "tokens"):
    present[name] = jnp.zeros(4, bool)
  gradient, _ = _step(fusion, _inputs(), present)
  for name, tree in gradient["encoders"].items():
    sizes = [float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree)]
    assert (max(sizes) == 0) == (name in ("cnn", "tokens"))


def test_geometry_states_the_constants_that_are_known():
  for fusion in ("orthogonal", "concat"):
    geometry = jax.jit(_model(fusion).geometry)(_params(fusion)[0])
    for name, constant in geometry.lipschitz.items():
      assert (geometry.chain[name] is not None) == (name == "mlp")
      assert (geometry.linear[name] is not None) == (name in PLAIN)
      if name in PLAIN:
        assert np.isfinite(constant)
        assert constant > 0
        continue
      assert constant == (1 if name in ONE_LIPSCHITZ else None)
  assert _model("token").geometry is None


def test_padding_tokens_change_nothing():
  encoder = encoders.transformer(
    width=8, num_layers=1, num_heads=2, embedding_dim=8, vocabulary_size=11
  )
  functions = models.functional.encoder_functions(encoder, (6,))
  params, state = jax.jit(functions.init)(jax.random.key(0))
  tokens = jnp.array([[3, 4, 0, 0, 0, 0], [3, 4, 5, 0, 0, 0]])
  embed = jax.jit(lambda p, x: functions.apply(p, state, x)[0])
  moved = jax.tree.map(lambda a: a, params)
  moved["embed"]["embedding"] = params["embed"]["embedding"].at[0].add(9.0)
  np.testing.assert_allclose(
    embed(params, tokens)[0], embed(moved, tokens)[0], atol=1e-6
  )
  assert not jnp.allclose(embed(params, tokens)[0], embed(params, tokens)[1])


def test_video_embedding_is_the_mean_over_frames():
  inputs = _inputs()
  first, second = inputs["resnet18"][0]
  inputs["resnet18"] = jnp.stack(
    [
      jnp.stack(pair)
      for pair in (
        (first, second),
        (second, first),
        (first, first),
        (second, second),
      )
    ]
  )
  present = {name: jnp.ones(4, bool) for name in SHAPES}
  zeros = {name: jnp.zeros((4, 8)) for name in SHAPES}
  params, _ = _params("orthogonal")
  embeddings, _ = _encode()(params, inputs, present, zeros)
  both, swapped, one, other = embeddings["resnet18"]
  np.testing.assert_allclose(both, swapped, atol=1e-5)
  np.testing.assert_allclose(both, (one + other) / 2, atol=1e-5)
  assert not jnp.allclose(one, other, atol=1e-3)


def _two_views(**options):
  return {
    "fusion": "orthogonal",
    "encoders": {
      name: {"name": "lipschitz_mlp", "width": 8, "embedding_dim": 6}
      for name in ("left", "right")
    },
    "num_classes": 4,
    "input_shapes": {"left": (3, 2), "right": (5,)},
    **options,
  }


def test_normalisation_is_inside_and_counted():
  rng = np.random.default_rng(0)
  inputs = {
    "left": 5 + 3 * rng.normal(size=(50, 3, 2)),
    "right": 0.1 * rng.normal(size=(50, 5)),
  }
  present = {"left": np.arange(50) < 40, "right": np.ones(50, bool)}
  normalization = models.fit_normalization("scale", inputs, present)
  model = models.build(**_two_views(normalization=normalization))
  params, state = jax.jit(model.init)(jax.random.key(0))
  constants = model.geometry(params).lipschitz
  for name, value in inputs.items():
    kept = value[present[name]]
    unit = np.median(
      np.linalg.norm((kept - kept.mean(0)).reshape(len(kept), -1), axis=1)
    )
    np.testing.assert_allclose(constants[name], 1 / unit, rtol=1e-5)
  encode = jax.jit(
    lambda left: model.encode(
      params,
      state,
      {"left": left, "right": jnp.zeros((2, 5))},
      {"left": jnp.ones(2, bool), "right": jnp.ones(2, bool)},
    )[0]["left"]
  )
  x = jnp.asarray(rng.normal(size=(2, 3, 2)), jnp.float32)
  jacobian = jax.jacrev(lambda x: encode(x)[0])(x)[:, 0].reshape(6, 6)
  norm = np.linalg.norm(np.asarray(jacobian, np.float64), 2)
  assert norm <= constants["left"] * (1 + 1e-5)
  # The claim is about raw units: without the scale it is refuted.
  assert norm < 1 < norm * 4 / constants["left"]


@pytest.mark.parametrize("kind", ["none", "centre", "scale", "standardize"])
def test_normalisation_survives_json_bit_for_bit(kind):
  rng = np.random.default_rng(0)
  x = 3 + rng.normal(size=(20, 4, 3)).astype(np.float32)
  fitted = models.fit_normalization(kind, x, np.arange(20) < 15)
  loaded = models.Normalization.from_json(
    json.loads(json.dumps(fitted.to_json()))
  )
  np.testing.assert_array_equal(fitted(jnp.asarray(x)), loaded(jnp.asarray(x)))
  assert fitted.constant == loaded.constant


def test_normalisation_kinds_do_what_they_say():
  rng = np.random.default_rng(0)
  x = 3 + 2 * rng.normal(size=(200, 4, 3))
  x[..., 2] = 7.0
  centred = np.asarray(models.fit_normalization("centre", x)(jnp.asarray(x)))
  np.testing.assert_allclose(centred.mean(0), 0, atol=1e-6)
  np.testing.assert_allclose(centred, x - x.mean(0), atol=1e-5)
  scaled = np.asarray(models.fit_normalization("scale", x)(jnp.asarray(x)))
  norms = np.linalg.norm(scaled.reshape(200, -1), axis=1)
  np.testing.assert_allclose(np.median(norms), 1.0, rtol=1e-5)
  standard = models.fit_normalization("standardize", x)
  y = np.asarray(standard(jnp.asarray(x)))
  np.testing.assert_allclose(y[..., :2].std((0, 1)), 1.0, rtol=1e-5)
  np.testing.assert_allclose(y[..., 2], 0.0, atol=1e-6)
  assert standard.constant <= 1
  tokens = rng.integers(0, 9, (5, 4)).astype(np.int16)
  assert models.fit_normalization("standardize", tokens).mean is None
  pixels = rng.integers(0, 255, (5, 4, 4, 1)).astype(np.uint8)
  image = models.fit_normalization("centre", pixels)(jnp.asarray(pixels))
  assert image.dtype == jnp.float32
  nobody = models.fit_normalization("scale", x, np.zeros(200, bool))
  assert nobody.mean is None


def test_normalisation_refuses_what_has_no_inverse():
  with pytest.raises(ValueError, match="scale"):
    models.Normalization(np.zeros(2), np.array([1.0, 0.0]))
  with pytest.raises(ValueError, match="finite"):
    models.Normalization(np.array([np.nan]), np.ones(1))
  with pytest.raises(ValueError, match="Did you mean 'standardize'"):
    models.fit_normalization("standardise", np.zeros((3, 2)))


@pytest.mark.parametrize(
  "change,message",
  [
    ({"fusion": "orthogonall"}, "Did you mean 'orthogonal'"),
    ({"fusion_options": {"num_iter": 3}}, "Did you mean 'num_iters'"),
    ({"fusion": "concat", "fusion_options": {"a": 1}}, "it has reduction"),
    ({"fusion_options": {"integration": "sum"}}, "integration must be one"),
    ({"num_classes": 7}, "embedding_dim of modality 'left'"),
    ({"encoders": {"left": {"name": "lipschitz_mpl"}}}, "'lipschitz_mlp'"),
    ({"encoders": {"left": {"name": "mlp", "width": 3}}}, "no option 'width'"),
    ({"encoders": {"left": {"width": 3}}}, "has no 'name'"),
    ({"encoders": {}}, "at least one modality"),
    ({"input_shapes": {"left": (3, 2)}}, "no entry for modality 'right'"),
    ({"normalization": {"up": models.Normalization()}}, "unknown modality"),
    (
      {"input_shapes": {"left": (3, 2), "right": (5,), "up": (1,)}},
      "unknown modality 'up'",
    ),
    (
      {
        "encoders": {"left": {"name": "cnn"}},
        "input_shapes": {"left": (3,)},
      },
      "input_shape must be",
    ),
  ],
)
def test_configuration_mistakes_are_user_errors(change, message):
  with pytest.raises(_validate.UserError, match=message):
    models.build(**_two_views(**change))


@pytest.mark.parametrize(
  "wrong, words",
  [
    (encoders.mlp, r"the function mlp: call it, as in encoders.mlp\(\)\."),
    (nnx.Linear, "the class Linear: models.custom makes one"),
  ],
)
def test_what_is_no_encoder_is_named_with_its_modality(wrong, words):
  # Without the type checks of these tests, as users call it.
  with pytest.raises(ValueError, match=rf"^encoders\['right'\] must .*{words}"):
    models.from_parts.__wrapped__(
      {"left": encoders.mlp(), "right": wrong},
      models.ConcatFusion(3),
      input_shapes={"left": (4,), "right": (4,)},
    )


def test_a_batch_without_a_modality_is_refused_by_name():
  model = models.build(**_two_views())
  params, state = jax.jit(model.init)(jax.random.key(0))
  inputs = {"left": jnp.zeros((2, 3, 2))}
  present = {"left": jnp.ones(2, bool)}
  with pytest.raises(ValueError, match="inputs has no modality 'right'"):
    model.apply(params, state, inputs, present)


def test_parameter_paths_are_those_the_recipes_match():
  model = models.build(**_two_views())
  params, _ = jax.eval_shape(model.init, jax.random.key(0))
  paths = {
    "/".join(entry.key for entry in path)
    for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
  }
  assert {"fusion/integration/alpha", "fusion/proxy/left"} <= paths
  assert any(path.startswith("encoders/right/") for path in paths)
