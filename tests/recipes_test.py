"""Recipes and interventions: what they change, what they leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_mm import attacks
from robust_mm import models
from robust_mm import recipes
from robust_mm.models import encoders
from robust_mm.recipes import interventions
from robust_mm.recipes import objectives
from robust_mm.training import state as state_lib
from robust_mm.training import steps

SHAPES = {"a": (6,), "b": (3, 2)}


def lipschitz_model():
  return models.late_fusion(
    {
      name: encoders.lipschitz_mlp(width=16, num_blocks=1, embedding_dim=8)
      for name in SHAPES
    },
    num_classes=3,
    input_shapes=SHAPES,
  )


def ordinary_model():
  return models.late_fusion(
    {name: encoders.mlp(hidden_sizes=(8,), embedding_dim=8) for name in SHAPES},
    num_classes=3,
    input_shapes=SHAPES,
  )


def make_batch(seed=0, size=16):
  rng = np.random.default_rng(seed)
  return {
    "inputs": {
      name: jnp.asarray(rng.normal(size=(size, *shape)), jnp.float32)
      for name, shape in SHAPES.items()
    },
    "present": {name: jnp.ones(size, bool) for name in SHAPES},
    "label": jnp.asarray(rng.integers(0, 3, size)),
    "id": jnp.arange(size),
  }


def run(recipe, model, batch, num_steps):
  phase = recipe.phases[0]
  key = jax.random.key(0)
  state = state_lib.initializer(model, phase)(key)
  step = jax.jit(steps.make_train_step(phase))
  history = []
  for _ in range(num_steps):
    state, metrics = step(state, batch, key)
    history.append(float(metrics["loss"]))
  return state, history


TX = optax.adam(1e-2)


@pytest.mark.parametrize("variant", ["JT", "AT", "Mix"])
@pytest.mark.parametrize("fidelity", ["corrected", "published"])
def test_step_one_lowers_its_loss_on_a_batch(variant, fidelity):
  model = lipschitz_model() if fidelity == "corrected" else ordinary_model()
  recipe = recipes.crmt(
    model,
    num_steps=40,
    tx=TX,
    variant=variant,
    fidelity=fidelity,
    integration_steps=0,
  )
  _, history = run(recipe, model, make_batch(), 40)
  assert np.all(np.isfinite(history))
  assert np.mean(history[-5:]) < np.mean(history[:5])


def test_corrected_step_one_reaches_its_radius_by_overfitting():
  """crmt.md 13.14: class means of norm 2, noise .1, 300 Adam steps at 1e-3."""
  from robust_mm import certification

  rng = np.random.default_rng(0)
  means = rng.normal(size=(2, 4, 8))
  means *= 2 / np.linalg.norm(means, axis=-1, keepdims=True)
  label = np.arange(64) % 4
  batch = {
    "inputs": {
      name: jnp.asarray(
        means[i][label] + 0.1 * rng.normal(size=(64, 8)), jnp.float32
      )
      for i, name in enumerate("ab")
    },
    "present": {name: jnp.ones(64, bool) for name in "ab"},
    "label": jnp.asarray(label),
    "id": jnp.arange(64),
  }
  model = models.late_fusion(
    {n: encoders.lipschitz_mlp(width=32, embedding_dim=16) for n in "ab"},
    num_classes=4,
    input_shapes={"a": (8,), "b": (8,)},
  )
  recipe = recipes.crmt(
    model,
    num_steps=300,
    tx=optax.adam(1e-3),
    r0=0.3,
    temperature=0.05,
    integration_steps=0,
  )
  state, _ = run(recipe, model, batch, 300)
  certificate = certification.certify(model, state.params, batch)
  np.testing.assert_array_equal(certificate.prediction, label)
  assert np.min(certificate.radius) > 0.5


def test_corrected_crmt_refuses_encoders_without_constants():
  with pytest.raises(ValueError, match=r"'a' states no Lipschitz.*published"):
    recipes.crmt(ordinary_model(), num_steps=1, tx=TX)


def test_crmt_refuses_a_model_that_mixes_modalities():
  model = models.token_fusion(
    {name: encoders.mlp(hidden_sizes=(8,), embedding_dim=8) for name in SHAPES},
    num_classes=3,
    input_shapes=SHAPES,
  )
  with pytest.raises(ValueError, match="sum of per-modality scores"):
    recipes.crmt(model, num_steps=1, tx=TX, fidelity="published")


@pytest.mark.parametrize(
  "arguments, name",
  [
    ({"variant": "XX"}, "variant"),
    ({"fidelity": "XX"}, "fidelity"),
    ({"rho": -1.0}, "rho"),
    ({"r0": -1.0}, "r0"),
    ({"temperature": 0.0}, "temperature"),
    ({"integration_steps": -1}, "integration_steps"),
    ({"num_steps": 0}, "num_steps"),
  ],
)
def test_crmt_names_the_bad_argument(arguments, name):
  with pytest.raises(ValueError, match=name):
    recipes.crmt(lipschitz_model(), tx=TX, **{"num_steps": 1, **arguments})


def test_frozen_parameters_stay_bit_identical():
  model = lipschitz_model()
  phase = recipes.Phase(
    name="x",
    num_steps=1,
    loss=objectives.cross_entropy_loss(model),
    tx=TX,
    trainable="fusion/",
  )
  recipe = recipes.Recipe(name="x", phases=(phase,))
  params, _ = model.init(jax.random.key(0))
  state, _ = run(recipe, model, make_batch(), 3)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    after = state.params
    for part in name.split("/"):
      after = after[part]
    same = np.array_equal(leaf, after)
    assert same == (not name.startswith("fusion/")), name


def test_trainable_that_matches_nothing_is_refused():
  with pytest.raises(ValueError, match=r"'zzz' matches no parameter.*alpha"):
    state_lib.split({"alpha": 1.0}, "zzz")


def test_split_and_merge_are_inverse():
  params = {"a": {"x": 1.0, "y": 2.0}, "b": 3.0}
  chosen, frozen = state_lib.split(params, "a/x|b")
  assert chosen == {"a": {"x": 1.0, "y": None}, "b": 3.0}
  assert state_lib.merge(chosen, frozen) == params


def test_adversarial_batch_has_a_larger_loss_inside_the_budget():
  model = lipschitz_model()
  params, state = model.init(jax.random.key(0))
  batch = make_batch()
  attack = attacks.pgd(norm=2, budget=0.5, num_steps=5, num_restarts=1)
  out = interventions.adversarial(model, attack)(
    jax.random.key(1), params, state, batch
  )
  size = sum(
    jnp.sum((out["inputs"][n] - batch["inputs"][n]).reshape(16, -1) ** 2, -1)
    for n in SHAPES
  )
  assert np.all(np.sqrt(size) <= 0.5 * (1 + 1e-5))
  loss = objectives.cross_entropy_loss(model)
  clean, _ = loss(params, state, batch, key=None)
  attacked, _ = loss(params, state, out, key=None)
  assert attacked > clean


def test_mixup_is_linear_and_skips_what_either_lacks():
  batch = make_batch()
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
  batch = make_batch(size=512)
  none = interventions.modality_dropout(rate=0.0)
  out = none(jax.random.key(0), None, None, batch)
  for name in SHAPES:
    np.testing.assert_array_equal(out["present"][name], True)
  every = interventions.modality_dropout(rate=1.0)
  out = every(jax.random.key(0), None, None, batch)
  kept = out["present"]["a"].astype(int) + out["present"]["b"]
  assert np.min(kept) == 1
  # {a}, {b}, {a, b} are equally likely.
  assert abs(np.mean(kept == 2) - 1 / 3) < 0.08


def test_absent_examples_do_not_count_in_the_joint_loss():
  model = ordinary_model()
  params, state = model.init(jax.random.key(0))
  batch = make_batch()
  loss = objectives.cross_entropy_loss(model)
  whole, _ = loss(params, state, batch, key=None)
  gone = {
    name: flag.at[8:].set(False) for name, flag in batch["present"].items()
  }
  half, _ = loss(params, state, {**batch, "present": gone}, key=None)
  first = jax.tree.map(lambda x: x[:8], batch)
  alone, _ = loss(params, state, first, key=None)
  np.testing.assert_allclose(half, alone, rtol=1e-6)
  assert abs(half - whole) > 1e-6
