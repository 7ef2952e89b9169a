"""L1 in recipes against closed forms; parts of ModalImmune; refusals."""

import jax
import jax.numpy as jnp
import models_regression_test as made
import numpy as np
import optax
import pytest
import recipes_models as helpers

from robust_mm import models
from robust_mm import recipes
from robust_mm.recipes import immunity
from robust_mm.recipes import objectives

TX = optax.adam(1e-2)
TARGET = made.TARGET


@pytest.fixture(scope="module")
def model():
  return made.make()


def full_batch(size=32, seed=0):
  """A label that is linear in both modalities, nothing missing."""
  batch = made.make_batch(size, seed)
  a, b = batch["inputs"]["a"], batch["inputs"]["b"]
  batch["label"] = (150 + 40 * a[:, 0] - 30 * b[:, 1]).astype(np.float32)
  batch["present"] = {m: np.ones(size, bool) for m in made.SHAPES}
  batch["id"] = np.arange(size)
  return jax.tree.map(jnp.asarray, batch)


def test_loss_and_gradient_are_those_of_l1_in_deviations():
  model = made.make("concat")
  batch = full_batch()
  gone = jnp.arange(32) < 4  # examples without anything count nothing
  present = {m: flag & ~gone for m, flag in batch["present"].items()}
  batch = {**batch, "present": present}
  params, state = model.init(jax.random.key(0))
  loss_fn = objectives.cross_entropy_loss(model)
  (loss, (_, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
    params, state, batch, key=jax.random.key(1)
  )
  outputs, _ = model.apply(params, state, batch["inputs"], present)
  off = np.asarray(outputs.logits[:, 0] - batch["label"])[4:]
  np.testing.assert_allclose(metrics["mae"], np.mean(np.abs(off)), rtol=1e-5)
  np.testing.assert_allclose(loss, np.mean(np.abs(off)) / 70, rtol=1e-5)
  # d|p - y| / 70 with p = 150 + 70 (V z + c).
  sign = np.sign(off)
  assert 0 < np.mean(sign > 0) < 1
  np.testing.assert_allclose(
    grads["fusion"]["bias"], [np.mean(sign)], rtol=1e-4
  )
  for name in made.SHAPES:
    z = np.asarray(outputs.embeddings[name])[4:]
    np.testing.assert_allclose(
      grads["fusion"]["head"][name][0], sign @ z / 28, rtol=1e-3, atol=1e-6
    )


def test_loss_and_gradient_do_not_depend_on_the_unit_of_the_label(model):
  other = made.make(target=models.Target(1.5 + 0.01 * 150, 0.7))
  batch = full_batch()
  scaled = {**batch, "label": 1.5 + 0.01 * batch["label"]}
  params, state = model.init(jax.random.key(0))
  found = [
    jax.value_and_grad(
      lambda p, m=m, b=b: objectives.cross_entropy_loss(m)(
        p, state, b, key=jax.random.key(1)
      )[0]
    )(params)
    for m, b in ((model, batch), (other, scaled))
  ]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *found
  )


@pytest.mark.parametrize("head", made.HEADS)
def test_a_removed_modality_has_a_gradient_of_exactly_zero(head):
  model = made.make(head)
  batch = full_batch()
  params, state = model.init(jax.random.key(0))
  left = {**batch["present"], "b": jnp.zeros(32, bool)}

  def loss(params):
    embeddings, _ = model.encode(
      params, state, batch["inputs"], batch["present"], train=True
    )
    said = immunity.logits_of(model, params, embeddings, left)
    return objectives.task_loss(model, said, {**batch, "present": left})

  grads = jax.grad(loss)(params)["encoders"]
  for leaf in jax.tree.leaves(grads["b"]):
    np.testing.assert_array_equal(leaf, 0)
  assert optax.tree.norm(grads["a"]) > 1e-3


def test_consistency_is_the_squared_difference_from_a_fixed_teacher(model):
  batch = full_batch()
  params, state = model.init(jax.random.key(0))
  embeddings, _ = model.encode(params, state, batch["inputs"], batch["present"])
  said, left = immunity.over_sets(model, params, embeddings, batch["present"])
  full = immunity.logits_of(model, params, embeddings, batch["present"])
  found = immunity.disagreement(model, said, left, full, 3.0)
  expected = np.mean(((np.asarray(said) - np.asarray(full)) / 70) ** 2)
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  slope = jax.grad(
    lambda full: immunity.disagreement(model, said, left, full, 3.0)
  )(full)
  np.testing.assert_array_equal(slope, 0)


VARIANTS = {
  "plain": {},
  "dropout": {},
  "noise": {"sigma": 0.1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_joint_learns_a_number(model, variant):
  recipe = recipes.joint(
    model, num_steps=150, tx=TX, variant=variant, **VARIANTS[variant]
  )
  _, losses = helpers.run(recipe, model, full_batch(), 150)
  # A constant is 0.5 off (40 and 30 root-mean-squared over 70, times 0.8).
  end = {"plain": 0.2, "dropout": 0.5, "noise": 0.25}[variant]
  assert np.mean(losses[-10:]) < end < 0.55 < losses[0] + 0.1


@pytest.mark.parametrize("removal", immunity.REMOVALS)
def test_modal_immune_learns_with_every_removal(model, removal):
  batch = full_batch()
  features = {
    name: recipes.feature_statistics(
      np.asarray(value), np.asarray(batch["present"][name])
    )
    for name, value in batch["inputs"].items()
  }
  recipe = recipes.modal_immune(
    model,
    num_steps=100,
    tx=TX,
    removal=removal,
    consistency_weight=0.1,
    features=features,
    gate="directional",
    guard_tolerance=None,
  )
  phase = recipe.phases[0]
  state, losses = helpers.run(recipe, model, batch, 100)
  assert np.isfinite(losses).all()
  assert losses[-1] < 0.8 * losses[0]
  for job in phase.jobs:  # the controller's round, and the hyper-gradient
    given = (batch, batch) if job.with_training else batch
    state, metrics = jax.jit(job.run)(state, given, jax.random.key(2))
    assert all(np.isfinite(v) for v in metrics.values()), metrics
  assert [job.name for job in phase.jobs] == ["probe", "outer"]


@pytest.mark.parametrize(
  "make",
  [
    lambda m: recipes.joint(m, num_steps=1, tx=TX, variant="adversarial"),
    lambda m: recipes.joint(m, num_steps=1, tx=TX, variant="mixup"),
    lambda m: recipes.joint(m, num_steps=1, tx=TX, spectral_penalty=0.1),
    lambda m: recipes.crmt(m, num_steps=1, tx=TX),
    lambda m: recipes.certified_radius(m, num_steps=1, tx=TX),
  ],
)
def test_what_is_about_classes_is_refused_in_one_sentence(model, make):
  with pytest.raises(ValueError, match="predicts classes") as caught:
    make(model)
  assert "\n" not in str(caught.value)
