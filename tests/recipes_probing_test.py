"""Linear probe and fine-tuning: what moves, from where, by which statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recipes_models as helpers

from robust_mm import _compiling
from robust_mm import models
from robust_mm import recipes
from robust_mm.recipes import probing
from robust_mm.training import state as state_lib
from robust_mm.training import steps

SHAPES = {"a": (6,), "b": (12, 3)}
TX = optax.adam(1e-3)
OPTIONS = {"width": 8, "num_layers": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def model():
  return models.token_transformer(SHAPES, 3, **OPTIONS)


def make_batch(size=40, seed=0):
  rng = np.random.default_rng(seed)
  inputs = {n: rng.normal(size=(size, *s)) for n, s in SHAPES.items()}
  label = np.argmax(inputs["a"][:, :3], axis=1)
  return {
    "inputs": {n: jnp.asarray(x, jnp.float32) for n, x in inputs.items()},
    "present": {"a": jnp.ones(size, bool), "b": jnp.arange(size) % 2 == 0},
    "label": jnp.asarray(label),
    "id": jnp.arange(size),
  }


def probe_run(model, batch, num_steps=300, **options):
  """(the state before, the prepared batch, the state after)."""
  recipe = recipes.finetune(
    model,
    num_steps=1,
    tx=TX,
    method="probe",
    probe_steps=num_steps,
    **options,
  )
  phase = recipe.phases[0]
  once = _compiling.options_for_once()
  create = state_lib.initializer(model, phase)
  state = jax.jit(create, compiler_options=once)(jax.random.key(0))
  encode = jax.jit(steps.make_encode(model), compiler_options=once)
  cached = jax.device_get(encode(state.params, state.model_state, batch))
  prepared = phase.prepare(state.params, state.model_state, cached, None)
  prepared = jax.tree.map(jnp.asarray, prepared)
  after, losses = helpers.repeat(phase, state, prepared, num_steps)
  return state, prepared, after, losses


def test_the_probe_trains_the_head_alone_and_folds_its_statistics(model):
  batch = make_batch()
  before, prepared, after, losses = probe_run(model, batch)
  for group in ("encoders", "fusion"):
    kept = {n: p for n, p in after.params[group].items() if n != "last"}
    was = {n: p for n, p in before.params[group].items() if n != "last"}
    jax.tree.map(np.testing.assert_array_equal, kept, was)
  np.testing.assert_allclose(losses[0], np.log(3), rtol=1e-5)
  assert losses[-1] < 0.8 * losses[0]
  # Standardised by the statistics of the training set...
  found = np.asarray(prepared["features"])
  np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-5)
  np.testing.assert_allclose(found.std(axis=0), 1, atol=1e-4)
  # ... and the same ones on whatever else there is: here without b.
  present = {"a": jnp.ones(40, bool), "b": jnp.zeros(40, bool)}
  outputs, _ = jax.jit(model.apply)(after.params, {}, batch["inputs"], present)
  features = jax.jit(model.features)(after.params, outputs.embeddings, present)
  mean, deviation = (np.asarray(prepared[n]) for n in ("mean", "deviation"))
  head = jax.tree.map(np.asarray, after.extra["head"])
  wanted = (np.asarray(features) - mean) / deviation @ head["kernel"]
  np.testing.assert_allclose(outputs.logits, wanted + head["bias"], atol=1e-4)


def test_statistics_leave_out_who_has_nothing():
  rng = np.random.default_rng(0)
  features = rng.normal(3, 2, size=(50, 4)).astype(np.float32)
  features[:, 2] = 5.0
  cached = {
    "features": np.concatenate([features, np.full((9, 4), 1e3, np.float32)]),
    "present": {"a": np.arange(59) < 30, "b": (np.arange(59) + 25) % 59 < 25},
    "label": np.zeros(59, int),
  }
  cached["present"]["b"] = (np.arange(59) >= 30) & (np.arange(59) < 50)
  found = probing.prepare(None, None, cached, None)
  np.testing.assert_allclose(found["mean"], features.mean(axis=0), rtol=1e-5)
  wanted = features.std(axis=0)
  wanted[2] = 1.0
  np.testing.assert_allclose(found["deviation"], wanted, rtol=1e-5)


def test_the_probe_reaches_the_least_squares_of_a_regression():
  """Without decay, L1 on a linear target: the best head is known."""
  target = models.Target(mean=50.0, deviation=4.0)
  model = models.token_transformer(SHAPES, 1, target=target, **OPTIONS)
  batch = make_batch()
  params, _ = jax.jit(model.init)(jax.random.key(0))
  outputs, _ = jax.jit(model.apply)(
    params, {}, batch["inputs"], batch["present"]
  )
  features = jax.jit(model.features)(
    params, outputs.embeddings, batch["present"]
  )
  weights = np.random.default_rng(1).normal(size=8)
  label = 50 + 4 * np.asarray(features) @ weights
  batch["label"] = jnp.asarray(label, jnp.float32)
  _, _, after, losses = probe_run(model, batch, 1500, probe_decay=0.0)
  assert losses[-1] < 0.02 * losses[0]
  found, _ = jax.jit(model.apply)(
    after.params, {}, batch["inputs"], batch["present"]
  )
  assert np.mean(np.abs(found.logits[:, 0] - batch["label"])) < 0.2


def test_methods_are_the_phases_they_say(model):
  def names(**options):
    recipe = recipes.finetune(model, num_steps=7, tx=TX, **options)
    return recipe.name, [(p.name, p.num_steps) for p in recipe.phases]

  assert names() == ("lp_ft", [("probe", 1000), ("finetune", 7)])
  assert names(method="probe", probe_steps=5) == ("probe", [("probe", 5)])
  assert names(method="finetune") == ("finetune", [("finetune", 7)])


def test_fine_tuning_moves_what_it_may(model):
  recipe = recipes.finetune(
    model,
    num_steps=2,
    tx=TX,
    method="finetune",
    trainable="^fusion/",
    dropout_rate=0.5,
  )
  phase = recipe.phases[0]
  before = jax.jit(state_lib.initializer(model, phase))(jax.random.key(0))
  after, _ = helpers.repeat(phase, before, make_batch(), 2)
  jax.tree.map(
    np.testing.assert_array_equal,
    after.params["encoders"],
    before.params["encoders"],
  )
  moved = jax.tree.map(
    lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))),
    after.params["fusion"]["blocks"],
    before.params["fusion"]["blocks"],
  )
  assert all(jax.tree.leaves(moved))


def test_dropout_of_one_modality_is_plain_fine_tuning(model):
  """Why a study trains the two once."""

  def trained(present, rate):
    recipe = recipes.finetune(
      model,
      num_steps=3,
      tx=optax.sgd(0.1),
      method="finetune",
      dropout_rate=rate,
    )
    phase = recipe.phases[0]
    before = jax.jit(state_lib.initializer(model, phase))(jax.random.key(0))
    batch = {**make_batch(), "present": present}
    return helpers.repeat(phase, before, batch, 3)[0].params

  alone = {"a": jnp.arange(40) > 3, "b": jnp.zeros(40, bool)}
  plain, dropped = trained(alone, 0.0), trained(alone, 1.0)
  jax.tree.map(  # they are compiled apart, so up to rounding
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, dropped
  )
  both = {"a": alone["a"], "b": jnp.ones(40, bool)}
  plain, dropped = trained(both, 0.0), trained(both, 1.0)
  last = (found["fusion"]["last"]["kernel"] for found in (plain, dropped))
  assert np.max(np.abs(np.subtract(*last))) > 1e-4


@pytest.mark.parametrize(
  "options,message",
  [
    ({"method": "knn"}, "method must be one of 'lp_ft', 'probe', 'finetune'"),
    ({"dropout_rate": 1.5}, r"dropout_rate must lie in \[0, 1\]"),
    ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\)"),
    ({"probe_steps": 0}, "probe_steps must be an integer of at least 1"),
    ({"probe_lr": 0.0}, "probe_lr must be positive"),
    ({"probe_decay": -1.0}, "probe_decay must be non-negative"),
  ],
)
def test_bad_arguments_are_refused_by_name(model, options, message):
  with pytest.raises(ValueError, match=message):
    recipes.finetune(model, num_steps=3, tx=TX, **options)


def test_a_model_without_pooled_features_is_refused():
  with pytest.raises(ValueError, match="finetune needs a model with pooled"):
    recipes.finetune(helpers.concat_model(), num_steps=3, tx=TX)


def test_l2_sp_is_the_gradient_of_half_the_squared_distance_to_the_start():
  start = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}
  tx = optax.chain(probing.pull_to_start(0.5), optax.sgd(0.1))
  state, params = tx.init(start), start
  grads = {"a": jnp.array([1.0, 0.0]), "b": jnp.array(-1.0)}
  expected = {"a": np.array([1.0, -2.0]), "b": np.array(3.0)}
  for _ in range(3):
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    expected = {
      n: x - 0.1 * (np.asarray(grads[n]) + 0.5 * (x - np.asarray(start[n])))
      for n, x in expected.items()
    }
  for name, leaf in params.items():
    np.testing.assert_allclose(leaf, expected[name], rtol=1e-6)
  with pytest.raises(ValueError, match="needs params"):
    tx.update(grads, state)
