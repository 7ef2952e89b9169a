"""Captions under attack: what is scored, what moves, what must not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import evaluation
from robust_mm import models
from robust_mm.evaluation import caption_scores
from robust_mm.models import encoders

SHAPES = {"image": (3,), "sound": (3,)}
WORDS = ("one", "two", "six")


@pytest.fixture(scope="module")
def model():
  return models.captioner(
    {m: encoders.mlp(hidden_sizes=(8,), embedding_dim=8) for m in SHAPES},
    3,
    input_shapes=SHAPES,
    words=WORDS,
    width=8,
    num_layers=1,
    num_heads=2,
  )


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(0)
  label = np.arange(12) % 3
  inputs = {
    m: (0.8 * np.eye(3)[label] + 0.1 * rng.uniform(size=(12, 3))).astype(
      np.float32
    )
    for m in SHAPES
  }
  return {"inputs": inputs, "label": label}


def scored(model, said, classes, present, **options):
  captions = model.captions
  ids = np.stack([captions.ids(text) for text in said])
  return caption_scores.scores(captions, ids, classes, present, **options)


def test_scores_of_known_captions(model):
  classes = {"image": np.array([0, 1, 2, 0]), "sound": np.array([1, 1, 0, 0])}
  present = {"image": np.ones(4, bool), "sound": np.array([1, 1, 1, 0], bool)}
  said = ["one two", "one two", "six one", "one none"]
  found = scored(model, said, classes, present)
  assert found["slots"] == {"image": 0.75, "sound": 1.0}
  assert found["exact_match"] == 0.75
  assert found["distinct_1"] == pytest.approx(4 / 8)
  assert found["distinct_2"] == pytest.approx(3 / 4)
  assert found["entropy"] == pytest.approx(1.5)
  one = scored(model, said, classes, present, slots=("sound",))
  assert one["exact_match"] == 1.0
  assert one["slots"] == {"sound": 1.0}
  # Two, two, one, none: the words that were given do not count.
  assert one["distinct_1"] == pytest.approx(3 / 4)
  assert one["distinct_2"] == 0


def test_a_model_that_says_one_thing_is_not_diverse(model):
  classes = {m: np.zeros(5, int) for m in SHAPES}
  present = {m: np.ones(5, bool) for m in SHAPES}
  found = scored(model, ["one one"] * 5, classes, present)
  assert found["exact_match"] == 1.0
  assert found["entropy"] == 0.0
  assert found["distinct_2"] == pytest.approx(1 / 5)


@pytest.fixture(scope="module")
def found(model, batch):
  params, _ = jax.jit(model.init)(jax.random.key(0))
  # Louder letters: an untrained decoder says the same of everything.
  params = {
    **params,
    "fusion": jax.tree.map(lambda x: 3.0 * x, params["fusion"]),
  }
  return evaluation.caption_report(
    model,
    params,
    batch,
    radii=(0.05, 0.3),
    num_steps=5,
    num_restarts=2,
    target="six six",
  )


def test_a_report_has_every_attack_of_the_protocol(found):
  rows = [(r["attack"], r["modalities"], r["radius"]) for r in found["rows"]]
  assert (
    rows
    == [
      ("clean", "", None),
      ("input", "image", 0.05),
      ("input", "image", 0.3),
      ("input", "sound", 0.05),
      ("input", "sound", 0.3),
      ("input", "image+sound", 0.05),
      ("input", "image+sound", 0.3),
      ("targeted", "image+sound", 0.3),
      ("prompt, clean", "", None),
      ("text", "", None),
      ("joint", "image+sound", 0.3),
      ("embedding (diagnostic)", "", None),
    ][: len(rows)]
  )
  assert len(rows) == 12
  assert found["num_examples"] == 12
  for row in found["rows"]:
    assert 0 <= row["exact_match"] <= 1
    assert row["entropy"] >= 0
    assert (row["success"] is not None) == (row["attack"] == "targeted")
  assert set(found["rows"][0]["slots"]) == set(SHAPES)
  assert set(found["rows"][-2]["slots"]) == {"sound"}


@pytest.mark.parametrize(
  "given, message",
  [
    ({"radii": (0.0,)}, "radii must be positive"),
    ({"threshold": 2.0}, "threshold must lie in"),
    ({"target": "zebra"}, "text must be of the letters"),
    ({"max_examples": 0}, "max_examples must be an integer"),
  ],
)
def test_bad_arguments_are_refused(model, batch, given, message):
  with pytest.raises(ValueError, match=message):
    evaluation.caption_report(model, {}, batch, **given)


def test_other_models_have_no_captions(batch):
  plain = models.concat_fusion(
    {m: encoders.mlp(hidden_sizes=(4,), embedding_dim=4) for m in SHAPES},
    3,
    input_shapes=SHAPES,
  )
  with pytest.raises(ValueError, match="caption_report needs a model"):
    evaluation.caption_report(plain, {}, batch)
  assert jnp.ndim(plain.num_classes) == 0
