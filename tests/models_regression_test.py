"""Models of one number: its units, and who refuses them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robust_mm as rmm
from robust_mm import _validate
from robust_mm import evaluation
from robust_mm import models
from robust_mm import smoothing
from robust_mm.models import encoders

SHAPES = {"a": (6,), "b": (3,)}
TARGET = models.Target(mean=150.0, deviation=70.0)
HEADS = {
  "concat": models.ConcatFusion(1),
  "masked": models.MaskedFusion(1, width=8),
  "token": models.TokenFusion(1, width=8, num_layers=1, num_heads=2),
}


def make(head="masked", target=TARGET):
  encoder = encoders.mlp(hidden_sizes=(8,), embedding_dim=4)
  return models.from_parts(
    dict.fromkeys(SHAPES, encoder),
    HEADS[head] if isinstance(head, str) else head,
    input_shapes=SHAPES,
    target=target,
  )


def make_batch(size=8, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "inputs": {
      m: rng.normal(size=(size, *shape)).astype(np.float32)
      for m, shape in SHAPES.items()
    },
    "present": {m: rng.random(size) > 0.3 for m in SHAPES},
    "label": rng.normal(150, 70, size).astype(np.float32),
  }


@pytest.mark.parametrize("head", HEADS)
def test_prediction_is_the_head_in_units_of_the_label(head):
  model, batch = make(head), make_batch()
  params, state = model.init(jax.random.key(0))
  inputs = jax.tree.map(jnp.asarray, (batch["inputs"], batch["present"]))
  said = model.apply(params, state, *inputs)[0]
  embeddings, _ = model.encode(params, state, *inputs)
  raw = HEADS[head](params["fusion"], embeddings, inputs[1]).logits
  assert said.logits.shape == (8, 1)
  np.testing.assert_allclose(said.logits, 150 + 70 * raw, rtol=1e-5)
  assert said.scores is None
  assert model.geometry is None
  frozen, fixed = model.freeze(params)
  assert frozen.target == TARGET
  np.testing.assert_allclose(
    frozen.apply(fixed, {}, *inputs)[0].logits, said.logits, rtol=1e-5
  )


def built(fusion):
  return models.build(
    fusion=fusion,
    encoders={m: {"name": "mlp", "embedding_dim": 4} for m in SHAPES},
    num_classes=1,
    input_shapes=SHAPES,
    target=TARGET,
  )


@pytest.mark.parametrize("fusion", ["concat", "masked", "token"])
def test_configurations_build_them(fusion):
  assert built(fusion).target == TARGET


@pytest.mark.parametrize("fusion", ["orthogonal", "trunk"])
def test_heads_of_certificates_refuse_one_number(fusion):
  with pytest.raises(_validate.UserError, match="num_classes") as caught:
    built(fusion)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "head, target, words",
  [
    ("concat", None, "num_classes must be an integer of at least 2, got 1"),
    (models.ConcatFusion(3), TARGET, "num_classes must be 1 with a target"),
    ("concat", models.Target(0.0, 0.0), "deviation must be positive"),
  ],
)
def test_one_number_and_classes_are_not_mixed_up(head, target, words):
  with pytest.raises(ValueError, match=words):
    make(head, target)


@pytest.mark.parametrize("source", ["global", "relaxation", "empirical"])
def test_certify_refuses_a_number(source):
  model, batch = make("concat"), make_batch()
  params, state = model.init(jax.random.key(0))
  with pytest.raises(ValueError, match="certify needs a model that predicts"):
    rmm.certify(model, params, batch, state=state, source=source)


def test_smoothing_and_masking_refuse_a_number():
  model, batch = make(), make_batch()
  params, _ = model.init(jax.random.key(0))
  with pytest.raises(ValueError, match="needs a model that predicts classes"):
    smoothing.certify(
      model,
      batch,
      smoothing.gaussian(sigma=0.1),
      jax.random.key(1),
      params=params,
    )
  with pytest.raises(ValueError, match="needs a model that predicts classes"):
    evaluation.masking_report(model, params, batch, radius=0.1)
