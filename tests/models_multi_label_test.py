"""Models of several labels: the same logits, and who refuses them."""

import jax
import jax.numpy as jnp
import models_regression_test
import numpy as np
import pytest

import robust_mm as rmm
from robust_mm import attacks
from robust_mm import evaluation
from robust_mm import models
from robust_mm import smoothing
from robust_mm.models import encoders

SHAPES = {"a": (6,), "b": (3,)}
NUM_CLASSES = 5


def plain(head=None):
  encoder = encoders.mlp(hidden_sizes=(8,), embedding_dim=4)
  return models.from_parts(
    dict.fromkeys(SHAPES, encoder),
    head or models.MaskedFusion(NUM_CLASSES, width=8),
    input_shapes=SHAPES,
  )


def make(head=None):
  return models.multi_label(plain(head))


def make_batch(size=8, seed=0):
  rng = np.random.default_rng(seed)
  batch = models_regression_test.make_batch(size, seed)
  rates = np.array([0.5, 0.1, 0.3, 0.05, 0.8])
  label = rng.random((size, NUM_CLASSES)) < rates
  return {**batch, "label": label.astype(np.float32)}


def test_logits_and_parameters_are_those_of_the_classifier():
  base = plain(models.ConcatFusion(NUM_CLASSES))
  model, batch = models.multi_label(base), make_batch()
  assert (base.task, model.task) == ("classification", "multi_label")
  assert base.geometry is not None
  assert model.geometry is None
  params, state = model.init(jax.random.key(0))
  inputs = jax.tree.map(jnp.asarray, (batch["inputs"], batch["present"]))
  said = model.apply(params, state, *inputs)[0].logits
  np.testing.assert_array_equal(
    said, base.apply(params, state, *inputs)[0].logits
  )
  np.testing.assert_array_equal(model.said(said), said)
  frozen, fixed = model.freeze(params)
  assert frozen.task == "multi_label"
  np.testing.assert_allclose(
    frozen.apply(fixed, {}, *inputs)[0].logits, said, rtol=1e-5
  )
  assert models.multi_label(model) is model


def test_a_number_has_no_several_labels():
  with pytest.raises(ValueError, match="multi_label needs a model that"):
    models.multi_label(models_regression_test.make())


def test_what_is_about_one_class_is_refused():
  model, batch = make(), make_batch()
  params, state = model.init(jax.random.key(0))
  words = r"predicts classes, one an example; .*\(multi-label\)"
  with pytest.raises(ValueError, match=words):
    rmm.certify(model, params, batch, state=state, source="relaxation")
  with pytest.raises(ValueError, match=words):
    smoothing.certify(
      model,
      batch,
      smoothing.gaussian(sigma=0.1),
      jax.random.key(1),
      params=params,
    )
  with pytest.raises(ValueError, match=words):
    evaluation.masking_report(model, params, batch, radius=0.1)
  fn = attacks.logits_fn(model, params, state, batch["present"])
  attack = attacks.pgd(norm=2, budget=0.1, num_steps=1)
  with pytest.raises(ValueError, match="label"):
    attack(jax.random.key(0), fn, batch["inputs"], batch["label"])
