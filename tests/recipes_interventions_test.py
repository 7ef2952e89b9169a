"""Interventions: what they change in a batch, what they leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes_models as helpers

from robust_mm import attacks
from robust_mm import recipes
from robust_mm import smoothing
from robust_mm.recipes import interventions
from robust_mm.recipes import objectives


def test_adversarial_batch_has_a_larger_loss_inside_the_budget():
  model = helpers.lipschitz_model()
  params, state = jax.jit(model.init)(jax.random.key(0))
  batch = helpers.make_batch()
  attack = attacks.pgd(norm=2, budget=0.5, num_steps=5, num_restarts=1)
  out = jax.jit(interventions.adversarial(model, attack))(
    jax.random.key(1), params, state, batch
  )
  size = sum(
    jnp.sum((out["inputs"][n] - batch["inputs"][n]).reshape(16, -1) ** 2, -1)
    for n in helpers.SHAPES
  )
  assert np.all(np.sqrt(size) <= 0.5 * (1 + 1e-5))
  loss = objectives.cross_entropy_loss(model)
  loss = jax.jit(loss)
  clean, _ = loss(params, state, batch, key=None)
  attacked, _ = loss(params, state, out, key=None)
  assert attacked > clean


def test_mixup_is_linear_and_skips_what_either_lacks():
  batch = helpers.make_batch()
  batch["present"]["a"] = batch["present"]["a"].at[:5].set(False)
  out = interventions.mixup(alpha=1.0)(jax.random.key(0), None, None, batch)
  mix = out["mix"]
  assert 0 <= mix <= 1
  order = np.array(
    [
      next(
        j
        for j in range(16)
        if np.allclose(
          out["inputs"]["b"][i],
          mix * batch["inputs"]["b"][i] + (1 - mix) * batch["inputs"]["b"][j],
          atol=1e-5,
        )
      )
      for i in range(16)
    ]
  )
  assert sorted(order) == list(range(16))
  np.testing.assert_array_equal(out["other_label"], batch["label"][order])
  expected = batch["present"]["a"] & batch["present"]["a"][order]
  np.testing.assert_array_equal(out["present"]["a"], expected)
  assert not np.any(out["inputs"]["a"][~expected])


def test_mixup_refuses_tokens_by_name():
  batch = {
    "inputs": {"words": jnp.zeros((2, 3), jnp.int32)},
    "present": {"words": jnp.ones(2, bool)},
    "label": jnp.zeros(2, jnp.int32),
  }
  with pytest.raises(ValueError, match="integer modality 'words'"):
    interventions.mixup()(jax.random.key(0), None, None, batch)


def test_dropout_rate_zero_changes_nothing_and_one_keeps_a_modality():
  batch = helpers.make_batch(size=512)
  none = interventions.modality_dropout(rate=0.0)
  out = none(jax.random.key(0), None, None, batch)
  for name in helpers.SHAPES:
    np.testing.assert_array_equal(out["present"][name], True)
  every = interventions.modality_dropout(rate=1.0)
  out = every(jax.random.key(0), None, None, batch)
  kept = out["present"]["a"].astype(int) + out["present"]["b"]
  assert np.min(kept) == 1
  # {a}, {b}, {a, b} are equally likely.
  assert abs(np.mean(kept == 2) - 1 / 3) < 0.08


def test_smoothing_noise_is_that_of_the_certificate():
  batch = helpers.make_batch(size=512)
  batch["present"]["b"] = batch["present"]["b"].at[:100].set(False)
  noise = smoothing.mixed(sigma={"b": 0.5}, keep={"a": 2})
  out = interventions.smoothing_noise(noise)(
    jax.random.key(0), None, None, batch
  )
  change = np.asarray(out["inputs"]["b"] - batch["inputs"]["b"])[100:]
  assert abs(np.std(change) - 0.5) < 0.02
  # Every example has noise of its own.
  assert abs(np.mean(change[:-1] * change[1:])) < 0.02
  assert not np.any(out["inputs"]["b"][:100])
  assert np.all(np.sum(out["inputs"]["a"] != 0, axis=-1) == 2)


def test_smoothing_noise_that_does_not_fit_is_named():
  batch = helpers.make_batch()
  noise = smoothing.subsample(keep={"a": 99})
  with pytest.raises(ValueError, match=r"keep\['a'\]"):
    interventions.smoothing_noise(noise)(jax.random.key(0), None, None, batch)


@pytest.mark.parametrize(
  "options, words",
  [
    ({"sigma": -1.0}, "sigma"),
    ({"sigma": {"c": 1.0}}, "sigma names the unknown modality 'c'"),
    ({"sigma": 0.0}, "sigma or keep"),
    ({"keep": {"c": 1}}, "keep names the unknown modality 'c'"),
  ],
)
def test_bad_noise_of_the_joint_recipe_is_named(options, words):
  with pytest.raises(ValueError, match=words):
    recipes.joint(
      helpers.concat_model(),
      num_steps=1,
      tx=helpers.TX,
      variant="noise",
      **options,
    )
