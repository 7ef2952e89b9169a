"""Step 2 of CRMT as a phase: what it moves, how long, and how it is judged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes_models as helpers

from robust_mm import certification
from robust_mm import recipes
from robust_mm.training import state as state_lib


def cached_scores():
  """Scores of 13.10, correct and incorrect."""
  batch = helpers.make_batch(size=64)
  rng = np.random.default_rng(0)
  own = np.arange(3) == np.asarray(batch["label"])[:, None]
  scores = {
    name: np.where(own, 0.5, -0.15) + 0.2 * rng.normal(size=own.shape)
    for name in helpers.SHAPES
  }
  return {**batch, "scores": jax.tree.map(jnp.float32, scores)}


def integrate(recipe, model, num_steps):
  """Step 2 on ``cached_scores``: (before, after, loss)."""
  batch, cached = helpers.make_batch(size=64), cached_scores()
  phase = recipe.phases[1]
  state = jax.jit(state_lib.initializer(model, phase))(jax.random.key(0))
  before = state.params
  data = phase.prepare(before, {}, cached, batch)
  state, history = helpers.repeat(phase, state, data, num_steps)
  return before, state.params, history


@pytest.mark.parametrize("orthogonality", ["polar", "rowwise"])
def test_published_step_two_moves_the_factors_alone(orthogonality):
  model = helpers.ordinary_model(
    orthogonality=orthogonality, integration="softplus", use_bias=True
  )
  before, after, history = integrate(published(model), model, 5)
  alpha = [p["fusion"].pop("integration")["alpha"] for p in (before, after)]
  assert not np.array_equal(*alpha)
  jax.tree.map(np.testing.assert_array_equal, before, after)
  assert history[-1] < history[0]


def test_step_two_turns_to_the_less_exposed_modality():
  """crmt.md 13.11, with ``lipschitz`` for a changed threat."""
  model = helpers.lipschitz_model()
  recipe = recipes.crmt(
    model,
    num_steps=1,
    tx=helpers.TX,
    integration_lr=0.1,
    lipschitz={"a": 9, "b": 1},
  )
  _, after, history = integrate(recipe, model, 60)
  factors = model.geometry(after).integration
  assert jnp.mean(factors["b"]) > 2 * jnp.mean(factors["a"])
  assert history[-1] < history[0]


# (score of the label minus that of the rival) in a and in b, labels 0; radius
# with equal factors, and with all the weight on b:
#   EASY  (1, 1)     1.000  0.707
#   GAINS (-.1, .6)  0.250  0.424
#   LOST  (1, -.1)   0.450  wrong
EASY, GAINS, LOST = (1.0, 1.0), (-0.1, 0.6), (1.0, -0.1)


def judge(recipe, model, examples):
  """Step 2's judgement of a turn from equal factors to b alone."""
  phase = recipe.phases[1]
  difference = np.asarray(examples, np.float32)
  scores = {
    name: np.stack([value / 2, -value / 2, np.full_like(value, -10)], axis=-1)
    for name, value in zip("ab", difference.T)
  }
  size = len(examples)
  cached = {
    "scores": scores,
    "label": np.zeros(size, int),
    "present": {name: np.ones(size, bool) for name in "ab"},
  }
  params, _ = jax.jit(model.init)(jax.random.key(0))
  alpha = params["fusion"]["integration"]["alpha"]

  def weighted(a, b):
    change = jnp.broadcast_to(jnp.asarray([[a], [b]]), alpha.shape)
    fusion = {**params["fusion"], "integration": {"alpha": change}}
    return {**params, "fusion": fusion}

  return phase.judge(
    weighted(1.0, 1.0),
    weighted(-7.0, 1.0),
    {},
    jax.tree.map(jnp.asarray, cached),
    helpers.make_batch(),
  )


def corrected(model, **options):
  return recipes.crmt(model, num_steps=1, tx=helpers.TX, **options)


@pytest.mark.parametrize(
  "examples, expected",
  [
    (10 * [GAINS] + 89 * [EASY] + 1 * [LOST], True),
    (10 * [GAINS] + 88 * [EASY] + 2 * [LOST], False),
    (100 * [EASY], False),
  ],
)
def test_step_two_is_accepted_for_more_certified_and_kept_accuracy(
  examples, expected
):
  model = helpers.lipschitz_model()
  recipe = corrected(model, clean_tolerance=0.01)
  assert recipe.phases[1].binding
  accepted, sentence = judge(recipe, model, examples)
  assert accepted is expected
  assert "certified accuracy at radius 0.3 " in sentence


@pytest.mark.parametrize(
  "options, expected",
  [
    ({"r0": 0.3}, True),
    ({"r0": 0.8}, False),
    # Units of half the size double every radius.
    ({"r0": 0.6, "units": {"a": 0.5, "b": 0.5}}, True),
    ({"r0": 0.3, "units": {"a": 0.5, "b": 0.5}}, False),
    # EASY has 2 / sqrt(2 * 82) = .156 before where a is exposed.
    ({"r0": 0.5}, False),
    ({"r0": 0.5, "lipschitz": {"a": 9.0, "b": 1.0}}, True),
    ({"r0": 0.3, "lipschitz": {"a": 9.0, "b": 9.0}}, False),
  ],
)
def test_step_two_is_judged_at_r0_by_the_threat_it_was_fitted_to(
  options, expected
):
  model = helpers.lipschitz_model()
  accepted, _ = judge(corrected(model, **options), model, [GAINS, EASY, EASY])
  assert accepted is expected


@pytest.mark.parametrize("examples, kept", [([EASY], True), ([LOST], False)])
def test_published_step_two_is_judged_by_accuracy_and_not_bound_by_it(
  examples, kept
):
  model = helpers.ordinary_model(integration="softplus", use_bias=True)
  recipe = published(model)
  assert not recipe.phases[1].binding
  accepted, sentence = judge(recipe, model, examples)
  assert accepted is kept
  assert "estimated accuracy at radius 0.3 " in sentence
  assert "certified" not in sentence


def test_a_phase_that_is_judged_cannot_come_first():
  phase = corrected(helpers.lipschitz_model()).phases[1]
  with pytest.raises(ValueError, match="'integration' is judged against"):
    recipes.Recipe(name="x", phases=(phase,))


def published(model, **options):
  options = {"steps_per_epoch": 2, "batch_size": 64, **options}
  return recipes.crmt(
    model, num_steps=1, tx=helpers.TX, fidelity="published", **options
  )


def test_published_step_two_is_45_epochs_of_batches_drawn_from_the_set():
  recipe = published(helpers.ordinary_model(), steps_per_epoch=7, batch_size=4)
  phase = recipe.phases[1]
  assert phase.num_steps == 45 * 7
  rows = np.arange(30)
  batch = {
    "scores": {name: np.stack([rows, -rows], axis=-1) for name in "ab"},
    "label": rows,
    "present": {name: rows % 2 == 0 for name in "ab"},
    "lipschitz": {name: 1.0 for name in "ab"},
  }
  batch = jax.tree.map(jnp.asarray, batch)
  (draw,) = phase.interventions
  seen = set()
  for seed in range(20):
    out = draw(jax.random.key(seed), None, None, batch)
    label = np.asarray(out["label"])
    assert len(set(label)) == 4
    for name in "ab":
      np.testing.assert_array_equal(out["scores"][name][:, 0], label)
      np.testing.assert_array_equal(out["present"][name], label % 2 == 0)
    assert out["lipschitz"] == batch["lipschitz"]
    seen |= set(label)
  assert len(seen) > 20


@pytest.mark.parametrize(
  "options, message",
  [
    ({"steps_per_epoch": None}, "steps_per_epoch must be given"),
    ({"steps_per_epoch": 0}, "steps_per_epoch"),
    ({"batch_size": 0}, "batch_size"),
  ],
)
def test_published_step_two_names_what_it_lacks(options, message):
  with pytest.raises(ValueError, match=message):
    published(helpers.ordinary_model(), **options)
  published(helpers.ordinary_model(), integration_steps=0, **options)


def test_published_crmt_on_a_dense_head_has_no_step_two():
  model = helpers.concat_model(lipschitz=None)
  with pytest.raises(ValueError, match="integration_steps must be 0"):
    published(model)
  recipe = published(model, integration_steps=0)
  _, _, metrics = helpers.evaluate(
    recipe.phases[0].loss, model, helpers.make_batch()
  )
  assert "orthogonality_defect" not in metrics


def mean_factor(model, params):
  factors = model.geometry(params).integration.values()
  return float(jnp.mean(jnp.stack(list(factors))))


@pytest.mark.parametrize("form", ["simplex", "softplus"])
@pytest.mark.parametrize("use_bias", [False, True])
def test_step_two_moves_the_direction_of_the_factors_and_not_their_mean(
  form, use_bias
):
  model = helpers.lipschitz_model(
    integration=form, use_bias=use_bias, integration_init=1.0
  )
  recipe = recipes.crmt(
    model,
    num_steps=1,
    tx=helpers.TX,
    integration_lr=0.1,
    integration_steps=60,
    lipschitz={"a": 9, "b": 1},
  )
  before, after, history = integrate(recipe, model, 60)
  assert mean_factor(model, before) == pytest.approx(1.0, rel=1e-6)
  assert mean_factor(model, after) == pytest.approx(1.0, rel=2e-6)
  factors = model.geometry(after).integration
  assert jnp.mean(factors["b"]) > 2 * jnp.mean(factors["a"])
  assert history[-1] < history[0]


@pytest.mark.parametrize("form", ["simplex", "softplus"])
def test_step_two_ends_at_the_best_factors_it_saw(form):
  """At this rate the loss rises, by steps that leave the optimum."""
  model = helpers.lipschitz_model(integration=form)
  recipe = recipes.crmt(
    model,
    num_steps=1,
    tx=helpers.TX,
    integration_lr=3.0,
    integration_steps=20,
  )
  phase = recipe.phases[1]
  _, after, history = integrate(recipe, model, 20)
  assert history[-1] > history[0]
  batch = phase.prepare(after, {}, cached_scores(), helpers.make_batch(size=64))
  loss, _ = phase.loss(after, {}, batch, key=None)
  np.testing.assert_allclose(loss, np.min(history), rtol=1e-5)


def test_step_two_and_fit_integration_are_one_method():
  """The same factors from the phase, step by step, and from the one call."""
  model = helpers.lipschitz_model()
  threat = {"a": 9.0, "b": 1.0}
  recipe = recipes.crmt(
    model,
    num_steps=1,
    tx=helpers.TX,
    integration_lr=0.05,
    integration_steps=31,
    lipschitz=threat,
  )
  before, after, _ = integrate(recipe, model, 31)
  cached = cached_scores()
  _, _, history = certification.fit_integration(
    *(cached[name] for name in ("scores", "label", "present")),
    threat,
    model.geometry(before).integration,
    r0=0.3,
    temperature=0.05,
    learning_rate=0.05,
    num_steps=30,
  )
  for name, factor in model.geometry(after).integration.items():
    np.testing.assert_allclose(factor, history["candidate"][name], rtol=1e-3)


def test_corrected_step_two_needs_to_know_how_factors_are_made():
  model = helpers.lipschitz_model()

  def geometry(params):
    return dataclasses.replace(model.geometry(params), positivity=None)

  silent = dataclasses.replace(model, geometry=geometry)
  with pytest.raises(ValueError, match=r"geometry\.positivity"):
    corrected(silent)
  corrected(silent, integration_steps=0)


def test_threat_and_judgement_are_computed_at_full_precision():
  model = helpers.lipschitz_model()
  seen = []

  def geometry(params):
    seen.append(jax.config.jax_default_matmul_precision)
    return model.geometry(params)

  watched = dataclasses.replace(model, geometry=geometry)
  phase = corrected(watched).phases[1]
  params, _ = jax.jit(model.init)(jax.random.key(0))
  cached, reference = cached_scores(), helpers.make_batch(size=64)
  seen.clear()
  phase.prepare(params, {}, cached, reference)
  phase.judge(params, params, {}, cached, reference)
  # Traced once for the constants, and for the factors before and after.
  assert len(seen) == 3
  assert set(seen) == {"highest"}
