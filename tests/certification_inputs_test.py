"""What ``certify`` says to batches of a wrong shape: one clear sentence."""

import dataclasses
import re

import certification_models as hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from flax import nnx

import robust_mm as rmm
from robust_mm import certification
from robust_mm import models
from robust_mm.models import encoders


@pytest.fixture(scope="module")
def built():
  part = encoders.lipschitz_mlp(width=4, num_blocks=0, embedding_dim=4)
  model = models.late_fusion(
    {"audio": part, "image": part},
    3,
    input_shapes={"audio": (6,), "image": (4, 2)},
  )
  return model, model.init(jax.random.key(0))[0]


def _batch(audio=(5, 6), image=(5, 4, 2)):
  return {"inputs": {"audio": jnp.zeros(audio), "image": jnp.zeros(image)}}


def _sentence(model, params, batch):
  """The message, the same inside and outside of jit, on one line."""
  texts = []
  for certify in (rmm.certify, jax.jit(rmm.certify, static_argnums=0)):
    with pytest.raises(ValueError) as caught:
      certify(model, params, batch)
    texts.append(str(caught.value))
  assert texts[0] == texts[1]
  assert "\n" not in texts[0]
  return texts[0]


@pytest.mark.parametrize(
  "batch, sentence",
  [
    (
      _batch(image=(5, 3, 2)),
      "batch['inputs']['image'] has shape (5, 3, 2), but the model was made "
      "for (b, 4, 2).",
    ),
    # As many numbers, but in another order: no error of JAX's at all.
    (
      _batch(image=(5, 2, 4)),
      "batch['inputs']['image'] has shape (5, 2, 4), but the model was made "
      "for (b, 4, 2).",
    ),
    (
      _batch(audio=(6,)),
      "batch['inputs']['audio'] has shape (6,), but the model was made for "
      "(b, 6).",
    ),
    (
      _batch(audio=(4, 6)),
      "batch['inputs'] must have as many examples of every modality, got "
      "audio 4, image 5.",
    ),
    (
      _batch(audio=()),
      "batch['inputs']['audio'] must have a first axis of examples, got one "
      "number.",
    ),
  ],
)
def test_inputs_of_a_wrong_shape_are_named_with_the_right_one(
  built, batch, sentence
):
  model, params = built
  assert _sentence(model, params, batch) == sentence
  assert rmm.certify(model, params, _batch()).radius.shape == (5,)


@pytest.mark.parametrize("shape", [(4,), (5, 1), ()])
def test_presence_of_a_wrong_shape_is_named(built, shape):
  model, params = built
  batch = _batch()
  batch["present"] = {"audio": np.ones(5, bool), "image": np.ones(shape, bool)}
  assert _sentence(model, params, batch) == (
    "batch['present']['image'] must be bool of shape (5,), one for each "
    f"example, got shape {shape}."
  )
  with pytest.raises(ValueError, match=re.escape("present['image'] must be")):
    certification.margin_certificate(
      {m: jnp.zeros((5, 3)) for m in ("audio", "image")},
      certification.SensitivityTables(
        tables={m: jnp.zeros((3, 3)) for m in ("audio", "image")},
        source="global",
        sound=True,
      ),
      batch["present"],
    )


def test_hand_written_models_give_the_shapes_and_the_whole_reason():
  model, params = hand.mlp(), hand.random_params(0)
  batch = hand.random_batch(0, 6)
  batch["inputs"]["image"] = jnp.zeros((6, 8))
  text = _sentence(model, params, batch)
  assert text.startswith(
    "the encoders of the model refuse batch['inputs'] with shapes audio "
    "(6, 5), image (6, 8): "
  )
  assert "(8,)" in text
  assert "(7,)" in text


def test_hand_written_models_that_map_over_inputs_give_all_shapes():
  model, params = hand.mlp(), hand.random_params(0)

  def encode(params, state, inputs, present, **kwargs):
    halved = jax.tree.map(lambda x: x / 2, inputs)
    return model.encode(params, state, halved, present, **kwargs)

  batch = hand.random_batch(0, 6)
  batch["inputs"]["image"] = jnp.zeros((6, 8))
  text = _sentence(dataclasses.replace(model, encode=encode), params, batch)
  assert "batch['inputs'] with shapes audio (6, 5), image (6, 8): " in text
  assert "(7,)" in text


def test_other_errors_of_a_hand_written_model_stay_what_they_are():
  model = hand.mlp()
  batch = hand.random_batch(0, 6)
  params = hand.random_params(0)
  params["head"]["audio"] = jnp.zeros((4, 9))
  with pytest.raises(TypeError):
    rmm.certify(model, params, batch)


def test_labels_of_a_wrong_shape_are_named(built):
  model, params = built
  found = rmm.certify(model, params, _batch())
  for label in (np.zeros(4, int), np.zeros((5, 1), int), np.zeros(5)):
    with pytest.raises(
      ValueError, match=r"^label must be .* shape \(5,\), got"
    ):
      certification.certified_accuracy(found, label, 0.1)


def test_every_line_of_the_reason_is_kept():
  model, params = hand.mlp(), hand.random_params(0)

  def encode(params, state, inputs, present, **kwargs):
    raise ValueError("no such thing:\n  audio needs 5\n")

  batch = hand.random_batch(0, 6)
  with pytest.raises(ValueError, match=r"no such thing:\n  audio needs 5$"):
    rmm.certify(dataclasses.replace(model, encode=encode), params, batch)


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.uint8])
def test_presence_must_be_bool(built, dtype):
  model, params = built
  batch = _batch()
  here = {m: np.ones(5, bool) for m in ("audio", "image")}
  kept = rmm.certify(model, params, {**batch, "present": here})
  assert np.all(kept.valid)
  batch["present"] = {**here, "image": np.full(5, 2, dtype)}
  assert _sentence(model, params, batch) == (
    "batch['present']['image'] must be bool of shape (5,), one for each "
    f"example, got {np.dtype(dtype)}."
  )
  with pytest.raises(ValueError, match=re.escape("present['image'] must be")):
    certification.margin_certificate(
      {m: jnp.zeros((5, 3)) for m in here},
      certification.SensitivityTables(
        tables={m: jnp.zeros((3, 3)) for m in here},
        source="global",
        sound=True,
      ),
      batch["present"],
    )


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_logits_that_are_no_sum_of_the_contributions_are_not_certified(
  reduction,
):
  rng = np.random.default_rng(0)
  terms = {m: jnp.asarray(rng.normal(size=(9, 3)), jnp.float32) for m in "ab"}
  bias = jnp.asarray([0.1, 0.0, -0.1])
  share = 0.5 if reduction == "mean" else 1.0
  logits = share * (terms["a"] + terms["b"]) + bias[None]
  tables = certification.SensitivityTables(
    tables={m: 1.0 - jnp.eye(3) for m in "ab"}, source="global", sound=True
  )

  def build(logits):
    return certification.margin_certificate(
      terms, tables, bias=bias, logits=logits, reduction=reduction
    )

  assert np.all(build(logits).radius > 0)
  wrong = logits.at[4, 1].add(1e-3)
  with pytest.raises(ValueError, match=f"logits must be the {reduction} of"):
    build(wrong)
  found = jax.jit(build)(wrong)
  np.testing.assert_array_equal(np.asarray(found.radius) > 0, np.arange(9) != 4)
  assert not found.covers({})[4]


# Without the type checks of these tests, as users call it.
CERTIFY = rmm.certify.__wrapped__


@pytest.mark.parametrize(
  "norm, name",
  [
    (1, "l1"),
    (2, "l2"),
    (jnp.inf, "linf"),
    ("inf", "linf"),
    ({"audio": np.inf, "image": 1}, None),
  ],
)
def test_numbers_name_norms(built, norm, name):
  model, params = built
  found = rmm.certify(model, params, _batch(), norm=norm)
  assert dict(found.norm) == (
    {"audio": "linf", "image": "l1"}
    if name is None
    else dict.fromkeys(("audio", "image"), name)
  )
  if name is not None:
    batch = {"inputs": {"x": np.random.default_rng(0).normal(size=(5, 3))}}
    assert certification.relative_units(
      batch, norm
    ) == certification.relative_units(batch, name)


@pytest.mark.parametrize(
  "model, got",
  [
    (lambda params, inputs: inputs, "the function <lambda>"),
    ({"encoders": {}}, "a dict"),
    (nnx.Linear(2, 3, rngs=nnx.Rngs(0)), "a Linear"),
    (linen.Dense(3), "a Dense"),
    (nnx.Linear, "the class Linear"),
  ],
)
def test_what_is_no_model_points_to_what_makes_one(built, model, got):
  words = rf"^model must be .* models.from_function .*; got {got}\.$"
  with pytest.raises(ValueError, match=words):
    CERTIFY(model, built[1], _batch())


@pytest.mark.parametrize("source", ["global", "best"])
def test_params_that_init_did_not_give_are_named(built, source):
  model, params = built
  for wrong, got in (({}, "{}"), ((params, {}), "a pair"), (None, "None")):
    with pytest.raises(ValueError, match=f"^params must be .* got {got}: "):
      rmm.certify(model, wrong, _batch(), source=source)


def test_parameters_that_are_a_pair_or_nothing_are_taken():
  for params in ((jnp.eye(3), jnp.zeros(3)), ()):
    model = models.from_function(
      lambda p, inputs: inputs["x"] @ (p[0] if p else jnp.eye(3)),
      params,
      num_classes=3,
      input_shapes={"x": (3,)},
    )
    batch = {"inputs": {"x": jnp.eye(3)}}
    found = rmm.certify(model, params, batch, source="relaxation")
    assert np.all(found.radius > 0.7)


def test_bare_inputs_are_no_batch(built):
  for batch, got in (
    (_batch()["inputs"], "a dict of 'audio', 'image'"),
    (np.zeros((5, 6)), "a ndarray"),
  ):
    with pytest.raises(ValueError, match=f"^batch needs inputs: .* got {got}"):
      CERTIFY(*built, batch)
  with pytest.raises(ValueError, match=r"^batch\['inputs'\] must map"):
    rmm.certify(*built, {"inputs": np.zeros((5, 6))})


def test_integers_are_certified_with_a_warning_that_units_answer(built):
  model, params = built
  batch = _batch()
  batch["inputs"]["audio"] = np.ones((5, 6), np.uint8)
  with pytest.warns(UserWarning, match=r"'audio' \(uint8\): .* grey levels"):
    found = rmm.certify(model, params, batch)
  # In units of 255 grey levels the numbers are 255 times smaller.
  scaled = rmm.certify(model, params, batch, units={"audio": 255.0})
  np.testing.assert_allclose(
    found.modality_radius["audio"],
    255 * scaled.modality_radius["audio"],
    rtol=1e-5,
  )


def test_tokens_are_certified_without_a_warning():
  def embedding(input_shape, rngs):
    return nnx.Embed(5, 4, rngs=rngs)

  model = models.late_fusion(
    {"words": encoders.bounded(_first(embedding), radius=1.0)},
    3,
    input_shapes={"words": (2,)},
  )
  params = model.init(jax.random.key(0))[0]
  assert model.tokens == ("words",)
  rmm.certify(model, params, {"inputs": {"words": np.ones((5, 2), np.int32)}})


def _first(build):
  """An encoder of tokens that embeds the first one."""

  class First(nnx.Module):
    def __init__(self, input_shape, rngs):
      self.embed = build(input_shape, rngs)

    def __call__(self, x):
      return self.embed(x[:, 0])

  return models.custom(First, 4, tokens=True)


def test_number_of_classes_that_the_function_does_not_return_is_named():
  for fn, got in (
    (lambda p, inputs: inputs["x"] @ p, r"returns logits of shape \(4, 7\)"),
    (lambda p, inputs: (inputs["x"] @ p,), "returns a tuple"),
  ):
    model = models.from_function(
      fn, jnp.ones((3, 7)), num_classes=10, input_shapes={"x": (3,)}
    )
    with pytest.raises(ValueError, match=f"^num_classes=10 must .*{got}"):
      rmm.certify(
        model,
        jnp.ones((3, 7)),
        {"inputs": {"x": jnp.zeros((4, 3))}},
        source="relaxation",
      )
