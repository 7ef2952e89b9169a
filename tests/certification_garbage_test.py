"""Bounded encoders of real models: no garbage flips a covered digit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import robust_mm as rmm
from robust_mm import certification
from robust_mm import losses
from robust_mm import margins
from robust_mm import models
from robust_mm.models import encoders
from robust_mm.models import functional


@pytest.mark.parametrize("radius", [0.01, 1.0, 100.0])
def test_projection_stays_in_the_ball_and_is_one_lipschitz(radius):
  rng = np.random.default_rng(0)
  sizes = np.exp(rng.uniform(-4, 6, (400, 1)))
  one, two = (
    jnp.asarray(rng.normal(size=(400, 9)) * sizes, jnp.float32)
    for _ in range(2)
  )
  near = one + 1e-2 * two
  a, b, c = (functional.project(z, radius) for z in (one, two, near))
  assert np.all(jnp.linalg.norm(a, axis=-1) <= radius * (1 + 1e-6))
  inside = np.asarray(jnp.linalg.norm(one, axis=-1) <= radius)
  np.testing.assert_array_equal(a[inside], one[inside])
  for z, w, p, q in ((one, two, a, b), (one, near, a, c)):
    moved = np.linalg.norm(np.asarray(p - q, float), axis=-1)
    given_distance = np.linalg.norm(np.asarray(z - w, float), axis=-1)
    assert np.all(moved <= given_distance * (1 + 1e-5) + 1e-6 * radius)
  gradient = jax.grad(lambda z: jnp.sum(functional.project(z, radius)))
  assert np.all(np.isfinite(gradient(one.at[0].set(0.0))))


def test_bad_values_are_zero_in_evaluation_and_seen_in_training():
  encoder = encoders.bounded(encoders.mlp(embedding_dim=4), radius=1.0)
  functions = functional.encoder_functions(encoder, (3,))
  plain = functional.encoder_functions(encoders.mlp(embedding_dim=4), (3,))
  params, state = functions.init(jax.random.key(0))
  assert jax.tree.structure(params) == jax.tree.structure(
    plain.init(jax.random.key(0))[0]
  )
  x = jnp.asarray([[jnp.nan] * 3, [jnp.inf] * 3, [3e38] * 3, [1.0] * 3])
  found, _ = functions.apply(params, state, x)
  assert np.all(jnp.linalg.norm(found, axis=-1) <= 1 + 1e-6)
  assert np.all(found[0] == 0)
  kept, _ = functions.apply(params, state, x, train=True)
  assert np.all(np.isnan(kept[0]))


def _digits_model(radius):
  left = {"name": "lipschitz_mlp", "width": 32, "embedding_dim": 16}
  return models.build(
    fusion="orthogonal",
    encoders={
      "left": {**left, "embedding_radius": radius},
      "right": {**left},
    },
    num_classes=10,
    input_shapes={"left": (8, 4, 1), "right": (8, 4, 1)},
    fusion_options={"integration_init": 4.0},
  )


@pytest.fixture(scope="module")
def trained():
  """A small model on digits whose left half has little to say."""
  model = _digits_model(0.4)
  batch = rmm.data.load("digits", split="train", limit=600)
  batch = jax.tree.map(jnp.asarray, batch)
  params, state = model.init(jax.random.key(0))
  tx = optax.adam(2e-2)

  def loss_fn(params):
    outputs, _ = model.apply(
      params, state, batch["inputs"], batch["present"], train=True
    )
    return jnp.mean(losses.cross_entropy(outputs.logits, batch["label"]))

  def step(carry, _):
    params, opt_state = carry
    updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state)
    return (optax.apply_updates(params, updates), opt_state), None

  run = jax.jit(lambda c: jax.lax.scan(step, c, length=150)[0][0])
  test = rmm.data.load("digits", split="test", limit=128)
  return model, run((params, tx.init(params))), jax.tree.map(jnp.asarray, test)


def _garbage_flips(model, params, batch, found):
  """Which predictions some optimised or arbitrary left half changes."""
  chosen = margins.one_hot(found.prediction, 10)

  def margin(left):
    inputs = {**batch["inputs"], "left": left}
    outputs, _ = model.apply(params, {}, inputs, batch["present"])
    logits = outputs.logits
    own = margins.pick(logits, chosen)
    return own - jnp.where(chosen, -jnp.inf, logits), logits

  def flipped(left):
    return jnp.argmax(margin(left)[1], axis=-1) != found.prediction

  @jax.jit
  def attack(left, rival):
    selected = margins.one_hot(rival, 10)

    def one(left):
      return jnp.sum(
        margins.pick(jnp.where(chosen, 0, margin(left)[0]), selected)
      )

    def step(carry, _):
      left, ever = carry
      slope = jax.grad(one)(left)
      length = jnp.sqrt(jnp.sum(slope**2, (1, 2, 3), keepdims=True))
      size = 0.1 * jnp.sqrt(jnp.sum(left**2, (1, 2, 3), keepdims=True))
      left = left - size * slope / jnp.maximum(length, 1e-12)
      return (left, ever | flipped(left)), None

    return jax.lax.scan(step, (left, flipped(left)), length=40)[0][1]

  shape = batch["inputs"]["left"].shape
  ever = np.zeros(shape[0], bool)
  for value in (np.nan, np.inf, -np.inf, 3e38, 1e20, 0.0):
    ever |= np.asarray(flipped(jnp.full(shape, value)))
  order = np.argsort(np.asarray(found.margins), axis=-1)
  for index, size in itertools.product(range(4), (0.3, 30.0)):
    noise = size * jax.random.normal(jax.random.key(index), shape)
    ever |= np.asarray(attack(noise, jnp.asarray(order[:, index])))
  return ever


def test_no_garbage_in_one_modality_flips_a_covered_digit(trained):
  model, params, batch = trained
  found = rmm.certify(model, params, batch)
  assert np.mean(found.prediction == batch["label"]) > 0.7
  covered = np.asarray(found.covers({"left": np.inf}))
  np.testing.assert_array_equal(
    covered, np.isinf(found.modality_radius["left"])
  )
  assert 0.1 < covered.mean() < 0.95
  assert not np.any(found.covers({"right": np.inf}))
  flipped = _garbage_flips(model, params, batch, found)
  assert not np.any(flipped & covered)
  assert np.any(flipped)
  # A smaller ball than the true one is refuted by the same garbage.
  tables = certification.sensitivity_tables(model, params)
  wrong = certification.SensitivityTables(
    tables=tables.tables,
    reach={m: 0.3 * t for m, t in tables.reach.items()},
    source="global",
    sound=True,
  )
  cheat = rmm.certify(model, params, batch, tables=wrong)
  claimed = np.asarray(cheat.covers({"left": np.inf}))
  assert np.any(claimed & flipped)


def test_bounded_model_is_certified_the_same_with_tables_jit_and_float64(
  trained,
):
  model, params, batch = trained
  found = rmm.certify(model, params, batch)
  tables = certification.sensitivity_tables(model, params)
  assert sorted(tables.reach) == ["left"]
  cached = rmm.certify(model, params, batch, tables=tables)
  jitted = jax.jit(lambda p, b: rmm.certify(model, p, b))(params, batch)
  for other in (cached, jitted):
    assert jax.tree.structure(other) == jax.tree.structure(found)
    np.testing.assert_allclose(other.radius, found.radius, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
      other.drops["left"], found.drops["left"], rtol=1e-4, atol=1e-4
    )
  assert certification.recheck_fp64(model, params, batch, found) == 0
