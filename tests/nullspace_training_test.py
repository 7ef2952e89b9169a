"""Losses and banks of nullspace noise: nullspace.md 15, lines 11 and 14."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from robust_mm import nullspace


def linear(params, tokens):
  return jnp.reshape(tokens, (len(tokens), -1)) @ params


@pytest.fixture(scope="module")
def problem():
  """(params, tokens, labels, noise)."""
  keys = jax.random.split(jax.random.key(0), 4)
  return (
    jax.random.normal(keys[0], (64, 3)),
    jax.random.normal(keys[1], (20, 4, 16)),
    jax.random.randint(keys[2], (20,), 0, 3),
    jax.random.normal(keys[3], (1, 4, 16)),
  )


def entropy(params, tokens, labels):
  return jnp.mean(
    optax.losses.softmax_cross_entropy_with_integer_labels(
      linear(params, tokens), labels
    )
  )


def test_without_noise_the_loss_is_twice_the_cross_entropy(problem):
  params, tokens, labels, noise = problem
  terms = nullspace.augmented_loss(
    linear, params, tokens, labels, 0 * noise, consistency_weight=3.0
  )
  once = entropy(params, tokens, labels)
  np.testing.assert_allclose(terms.loss, 2 * once, rtol=1e-6)
  np.testing.assert_allclose(terms.consistency, 0, atol=1e-7)
  with_noise = nullspace.augmented_loss(linear, params, tokens, labels, noise)
  both = once + entropy(params, tokens + noise, labels)
  np.testing.assert_allclose(with_noise.loss, both, rtol=1e-6)


def test_no_gradient_reaches_the_noise(problem):
  params, tokens, labels, noise = problem

  def loss(params, noise):
    return nullspace.augmented_loss(
      linear, params, tokens, labels, noise, consistency_weight=1.0
    ).loss

  of_params, of_noise = jax.grad(loss, argnums=(0, 1))(params, noise)
  assert not np.any(of_noise)
  assert jnp.max(jnp.abs(of_params)) > 1e-3


def test_consistency_pulls_the_noisy_prediction_to_the_clean_one(problem):
  params, tokens, labels, noise = problem
  weight = 0.7
  terms = nullspace.augmented_loss(
    linear, params, tokens, labels, noise, consistency_weight=weight
  )
  p = jax.nn.log_softmax(linear(params, tokens))
  q = jax.nn.log_softmax(linear(params, tokens + noise))
  kl = jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))
  np.testing.assert_allclose(terms.consistency, kl, rtol=1e-5)
  np.testing.assert_allclose(
    terms.loss, terms.clean + terms.noisy + weight * kl, rtol=1e-5
  )


def test_noise_on_an_absent_modality_changes_no_bit(problem):
  params, tokens, labels, noise = problem
  present = jnp.arange(20) % 2 == 0

  def encode(params, tokens):
    kept = jnp.where(present[:, None, None], tokens["b"], 0)
    return linear(params, tokens["a"]) + linear(params, kept)

  both = {"a": tokens, "b": tokens[::-1]}

  def loss(noise):
    per_item = jnp.broadcast_to(noise, tokens.shape)
    hidden = jnp.where(present[:, None, None], 0, per_item)
    return nullspace.augmented_loss(
      encode, params, both, labels, {"b": hidden}
    ).loss

  assert float(loss(0 * noise)) == float(loss(100 * noise))
  seen = nullspace.augmented_loss(encode, params, both, labels, {"b": noise})
  assert float(seen.loss) != float(loss(noise))


def test_items_that_do_not_count_are_left_out(problem):
  params, tokens, labels, noise = problem
  counted = jnp.arange(20) < 15
  poisoned = jnp.where(counted[:, None, None], tokens, jnp.nan)
  terms = nullspace.augmented_loss(
    linear, params, poisoned, labels, noise, counted=counted
  )
  fewer = nullspace.augmented_loss(
    linear, params, tokens[:15], labels[:15], noise
  )
  np.testing.assert_allclose(terms.loss, fewer.loss, rtol=1e-6)


def test_noise_of_another_shape_is_refused(problem):
  params, tokens, labels, noise = problem
  for wrong in (noise[:, :3], noise[0], jnp.tile(noise, (3, 1, 1))):
    with pytest.raises(ValueError, match="noise must be"):
      nullspace.augmented_loss(linear, params, tokens, labels, wrong)
  with pytest.raises(ValueError, match="noise names the unknown modality 'c'"):
    nullspace.add_noise({"a": tokens}, {"c": noise})
  with pytest.raises(ValueError, match="consistency_weight"):
    nullspace.augmented_loss(
      linear, params, tokens, labels, noise, consistency_weight=-1.0
    )


# ---- permutations


@pytest.mark.parametrize("axis", ["entries", "tokens", "channels"])
def test_permuting_keeps_the_entries(axis):
  noise = nullspace.random_direction(jax.random.key(0), (6, 8))[None]
  found = nullspace.permute(noise, jax.random.key(1), axis)
  np.testing.assert_array_equal(
    np.sort(found, axis=None), np.sort(noise, axis=None)
  )
  assert not np.array_equal(found, noise)
  mean_free = float(jnp.max(jnp.abs(jnp.mean(found, axis=-1)))) < 1e-6
  assert mean_free == (axis != "entries")
  if axis == "tokens":
    rows = {row.tobytes() for row in np.asarray(noise[0])}
    assert {row.tobytes() for row in np.asarray(found[0])} == rows


# ---- banks


def bank_of(*values, size=None):
  bank = nullspace.empty_bank(size or len(values), (2, 3))
  for value in values:
    bank = bank.add(jnp.full((2, 3), value), value, 0.01, eps=0.03)
  return bank


def test_members_are_alike_and_scales_are_in_the_unit_interval():
  bank = bank_of(1.0, 2.0, 3.0, 4.0, size=6)
  drawn = bank.sample(jax.random.key(0), 4000, scaled=False)[:, 0, 0]
  counts = [int(jnp.sum(drawn == v)) for v in (1.0, 2.0, 3.0, 4.0)]
  assert sum(counts) == 4000  # places without a member are never drawn
  assert scipy.stats.chisquare(counts).pvalue > 1e-3
  scaled = bank.sample(jax.random.key(1), 4000)[:, 0, 0]
  single = bank_of(1.0).sample(jax.random.key(2), 4000)[:, 0, 0]
  assert jnp.all((single > 0) & (single <= 1))
  assert scipy.stats.kstest(np.asarray(single), "uniform").pvalue > 1e-3
  assert jnp.all((scaled > 0) & (scaled <= 4))


def test_an_empty_bank_gives_no_noise():
  assert not np.any(
    nullspace.empty_bank(4, (2, 3)).sample(jax.random.key(0), 5)
  )


def test_pairs_are_convex_combinations():
  bank = bank_of(1.0, 3.0)
  drawn = bank.sample(jax.random.key(0), 500, scaled=False, pairs=True)
  drawn = drawn[:, 0, 0]
  assert jnp.all((drawn >= 1 - 1e-6) & (drawn <= 3 + 1e-6))
  assert jnp.mean((drawn > 1.01) & (drawn < 2.99)) > 0.3


def test_the_oldest_goes_unless_another_is_stale():
  bank = bank_of(1.0, 2.0, 3.0)
  assert set(bank_of(1.0, 2.0, 3.0, 4.0, size=3).radius.tolist()) == {2, 3, 4}
  stale = nullspace.NoiseBank(
    noise=bank.noise,
    radius=bank.radius,
    criterion=jnp.array([0.05, 0.061, 0.02]),  # 2 eps is 0.06
    born=bank.born,
  )
  after = stale.add(jnp.full((2, 3), 9.0), 9.0, 0.01, eps=0.03)
  assert after.radius.tolist() == [1, 9, 3]
  broken = nullspace.NoiseBank(
    noise=bank.noise,
    radius=bank.radius,
    criterion=jnp.array([0.05, 0.01, jnp.nan]),
    born=bank.born,
  )
  after = broken.add(jnp.full((2, 3), 9.0), 9.0, 0.01, eps=0.03)
  assert after.radius.tolist() == [1, 2, 9]
  # A free place comes before either.
  free = bank_of(1.0, 2.0, size=3).add(jnp.ones((2, 3)), 5.0, 0.0, eps=0.03)
  assert free.radius.tolist() == [1, 2, 5]


def test_a_bank_permutes_every_member_in_its_own_way():
  noise = jax.random.normal(jax.random.key(0), (2, 3))
  bank = nullspace.empty_bank(2, (2, 3))
  for _ in range(2):
    bank = bank.add(noise, 1.0, 0.01, eps=0.03)
  found = bank.permute(jax.random.key(1)).noise
  assert not np.array_equal(found[0], found[1])
  for member in found:
    np.testing.assert_array_equal(
      np.sort(member, axis=None), np.sort(noise, axis=None)
    )


def test_a_bank_needs_a_member():
  with pytest.raises(ValueError, match="num_members must be"):
    nullspace.empty_bank(0, (2, 3))
