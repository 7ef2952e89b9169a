"""Sigmoid cross-entropy in recipes against closed forms; refusals."""

import jax
import jax.numpy as jnp
import models_multi_label_test as made
import numpy as np
import optax
import pytest
import recipes_models as helpers
import sklearn.metrics

from robust_mm import losses
from robust_mm import recipes
from robust_mm.recipes import immunity
from robust_mm.recipes import interventions
from robust_mm.recipes import objectives

TX = optax.adam(1e-2)


@pytest.fixture(scope="module")
def model():
  return made.make()


def full_batch(size=32, seed=0):
  """Labels that the signs of both modalities tell, nothing missing."""
  batch = made.make_batch(size, seed)
  a, b = batch["inputs"]["a"], batch["inputs"]["b"]
  label = np.concatenate([a[:, :3] > 0, b[:, :2] > 0], axis=1)
  batch["label"] = label.astype(np.float32)
  batch["present"] = {m: np.ones(size, bool) for m in made.SHAPES}
  batch["id"] = np.arange(size)
  return jax.tree.map(jnp.asarray, batch)


def chance(logits):
  return 1 / (1 + np.exp(-np.asarray(logits, np.float64)))


def test_binary_cross_entropy_is_sklearn_s_log_loss_and_stays_finite():
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 3, (7, 4)).astype(np.float32)
  label = rng.integers(0, 2, (7, 4))
  found = losses.binary_cross_entropy(jnp.asarray(logits), jnp.asarray(label))
  expected = [
    sklearn.metrics.log_loss(y, chance(z), labels=[0, 1])
    for y, z in zip(label, logits)
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  far = losses.binary_cross_entropy(jnp.array([1e4, -1e4]), jnp.array([0, 1]))
  assert far == 1e4
  with pytest.raises(ValueError, match=r"label must have the shape \(7, 4\)"):
    losses.binary_cross_entropy(jnp.asarray(logits), jnp.zeros(7))


def test_loss_score_and_gradient_are_the_closed_forms():
  model = made.make(made.models.ConcatFusion(5))
  batch = full_batch()
  gone = jnp.arange(32) < 4  # examples without anything count nothing
  present = {m: flag & ~gone for m, flag in batch["present"].items()}
  batch = {**batch, "present": present}
  params, state = model.init(jax.random.key(0))
  loss_fn = objectives.cross_entropy_loss(model)
  (loss, (_, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
    params, state, batch, key=jax.random.key(1)
  )
  logits = model.apply(params, state, batch["inputs"], present)[0].logits[4:]
  label, p = np.asarray(batch["label"])[4:], chance(logits)
  expected = sklearn.metrics.log_loss(label.ravel(), p.ravel())
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  hits = label[np.arange(28), p.argmax(axis=1)]
  assert 0 < hits.mean() < 1
  np.testing.assert_allclose(metrics["hit_at_1"], hits.mean(), rtol=1e-6)
  # d/dz of the mean over 5 classes and 28 examples.
  np.testing.assert_allclose(
    grads["fusion"]["bias"], (p - label).mean(axis=0) / 5, atol=1e-6
  )


def test_labels_may_be_booleans(model):
  batch = full_batch()
  params, state = model.init(jax.random.key(0))
  loss_fn = objectives.cross_entropy_loss(model)
  key = jax.random.key(1)
  floats, _ = loss_fn(params, state, batch, key=key)
  as_flags = {**batch, "label": batch["label"] > 0}
  flags, _ = loss_fn(params, state, as_flags, key=key)
  np.testing.assert_array_equal(floats, flags)


def test_consistency_is_the_divergence_of_coins_from_a_fixed_teacher(model):
  batch = full_batch()
  params, state = model.init(jax.random.key(0))
  embeddings, _ = model.encode(params, state, batch["inputs"], batch["present"])
  said, left = immunity.over_sets(model, params, embeddings, batch["present"])
  full = immunity.logits_of(model, params, embeddings, batch["present"])
  found = immunity.disagreement(model, said, left, full, 2.0)
  p, q = chance(np.asarray(full) / 2)[None], chance(np.asarray(said) / 2)
  each = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
  np.testing.assert_allclose(found, 4 * each.mean(), rtol=1e-4)
  slope = jax.grad(
    lambda full: immunity.disagreement(model, said, left, full, 2.0)
  )(full)
  np.testing.assert_array_equal(slope, 0)


def test_dropout_draws_for_examples_not_for_classes():
  batch = full_batch()
  drop = interventions.modality_dropout(rate=1.0)
  changed = drop(jax.random.key(0), None, None, batch)
  for name, flag in changed["present"].items():
    assert flag.shape == (32,)
    assert changed["inputs"][name].shape == batch["inputs"][name].shape


@pytest.mark.parametrize("variant", ["plain", "dropout"])
def test_joint_learns_several_labels(model, variant):
  recipe = recipes.joint(model, num_steps=200, tx=TX, variant=variant)
  _, found = helpers.run(recipe, model, full_batch(), 200)
  # Without one of the modalities its labels stay at log 2.
  end = {"plain": 0.15, "dropout": 0.5}[variant]
  assert np.mean(found[-10:]) < end < 0.6 < found[0]


def test_modal_immune_learns_several_labels_and_its_jobs_run(model):
  batch = full_batch()
  recipe = recipes.modal_immune(
    model,
    num_steps=100,
    tx=TX,
    removal="every",
    consistency_weight=0.1,
    gate="none",
    guard_tolerance=None,
  )
  state, found = helpers.run(recipe, model, batch, 100)
  assert np.isfinite(found).all()
  assert found[-1] < 0.8 * found[0]
  for job in recipe.phases[0].jobs:
    given = (batch, batch) if job.with_training else batch
    if job.name == "outer":  # a minute to compile: traced alone
      jax.eval_shape(job.run, state, given, jax.random.key(2))
      continue
    state, metrics = jax.jit(job.run)(state, given, jax.random.key(2))
    assert all(np.isfinite(v) for v in metrics.values()), metrics


@pytest.mark.parametrize(
  "make",
  [
    lambda m: recipes.joint(m, num_steps=1, tx=TX, variant="adversarial"),
    lambda m: recipes.joint(m, num_steps=1, tx=TX, variant="mixup"),
    lambda m: recipes.joint(m, num_steps=1, tx=TX, spectral_penalty=0.1),
    lambda m: recipes.joint(m, num_steps=1, tx=TX, label_smoothing=0.1),
    lambda m: recipes.modal_immune(m, num_steps=9, tx=TX, label_smoothing=0.1),
    lambda m: recipes.modal_immune(m, num_steps=9, tx=TX, feedback_weight=0.1),
    lambda m: recipes.crmt(m, num_steps=1, tx=TX),
    lambda m: recipes.certified_radius(m, num_steps=1, tx=TX),
  ],
)
def test_what_is_about_one_class_is_refused_in_one_sentence(model, make):
  with pytest.raises(ValueError, match=r"\(multi-label\)") as caught:
    make(model)
  assert "\n" not in str(caught.value)
