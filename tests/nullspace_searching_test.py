"""What a search may claim: who counts, what is exact, what bounds a mean."""

import math

import jax
import jax.numpy as jnp
import nullspace_linear
import numpy as np
import pytest
from nullspace_linear import linear

from robust_mm import nullspace
from robust_mm.nullspace import criteria
from robust_mm.nullspace import published
from robust_mm.nullspace import searching

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def wide():
  return nullspace_linear.wide(400)


def settings(**options):
  given = {"eps": 0.03, "num_steps": 5, "batch_size": 32, "max_radius": 2.0}
  return searching.Search(**{**given, "num_bisections": 1, **options})


def search(params, tokens, counted, **options):
  return searching.search(
    linear,
    params,
    criteria.Items(tokens=tokens[:200]),
    criteria.Items(tokens=tokens[200:], counted=counted),
    settings(**options),
    KEY,
  )


# ---- who counts


@pytest.mark.parametrize("number", [0, 2, 63])
def test_fewer_than_64_items_that_count_decide_nothing(wide, number):
  params, tokens = wide
  found = search(params, tokens, jnp.arange(200) < number)
  assert searching.STATUSES[int(found.status)] == "infeasible"
  assert float(found.radius) == 0
  enough = search(params, tokens, jnp.arange(200) < 64)
  assert float(enough.radius) > 0


def descend(wide, counted, **options):
  params, tokens = wide
  return published.descend(
    linear,
    params,
    criteria.Items(tokens=tokens, counted=counted),
    published.Settings(batches=4, batch_size=16, **options),
    KEY,
  )


def test_published_noise_without_an_item_that_counts_reaches_nothing(wide):
  found = descend(wide, jnp.zeros(400, bool))
  assert not found.reached
  assert int(found.num_steps) == 12


def test_published_minibatches_are_of_items_that_count(wide):
  """Of few that count, too: what stops it is their criterion, not nothing."""
  params, tokens = wide
  counted = jnp.arange(400) % 40 == 0
  # Poison shows whether one that does not count is looked at.
  poisoned = jnp.where(counted[:, None, None], tokens, jnp.nan)
  for seed in range(10):
    found = published.descend(
      linear,
      params,
      criteria.Items(tokens=poisoned, counted=counted),
      published.Settings(batches=4, batch_size=16),
      jax.random.key(seed),
    )
    values = criteria.change(
      linear(params, tokens[counted]),
      linear(params, tokens[counted] + found.noise[None]),
      "criterion",
    )
    # Ten items, sixteen rows: every minibatch has every one of them.
    assert not found.reached or float(jnp.mean(values)) < 3 * 0.03
    assert np.all(np.isfinite(found.noise))


def test_random_noise_needs_an_item_that_counts(wide):
  params, tokens = wide
  items = criteria.Items(tokens=tokens, counted=jnp.zeros(400, bool))
  noise, reached = nullspace.random_at_criterion(
    linear, params, items, eps=0.03, key=KEY
  )
  assert not np.any(noise)
  assert reached == math.inf


# ---- the bound


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
def test_the_bound_is_the_mean_and_so_many_standard_errors(confidence):
  values = np.random.default_rng(0).uniform(size=100)
  counted = np.arange(100) % 3 != 0
  quantile = settings(confidence=confidence).quantile
  items = criteria.Items(
    tokens=jnp.zeros((100, 1, 2)), counted=jnp.asarray(counted)
  )
  mean, upper = criteria.upper_bound(
    jnp.asarray(values, jnp.float32), items, quantile
  )
  kept = values[counted]
  error = kept.std(ddof=1) / math.sqrt(len(kept))
  known = {0.5: 0.0, 0.9: 1.2816, 0.95: 1.6449}[confidence]
  assert float(mean) == pytest.approx(kept.mean(), rel=1e-5)
  assert float(upper) == pytest.approx(kept.mean() + known * error, rel=1e-5)


def test_a_larger_confidence_gives_a_smaller_radius(wide):
  params, tokens = wide
  everybody = jnp.ones(200, bool)
  mean, bound = (
    search(
      params[:3], tokens[:, :1, :3], everybody, confidence=c, num_bisections=6
    )
    for c in (0.5, 0.999)
  )
  assert float(bound.radius) < float(mean.radius)
  assert float(bound.mean) < float(bound.upper) <= 0.03


# ---- what is exact


def test_tokens_without_a_size_or_with_one_channel_are_refused(wide):
  params, _ = wide
  tokens = jax.random.normal(jax.random.key(2), (1600, 4, 16))
  flat = jnp.broadcast_to(tokens[..., :1], tokens.shape)
  with pytest.raises(ValueError, match="must differ over channels: s"):
    nullspace.encoder_noise(linear, params, flat, key=KEY)
  single = jnp.reshape(tokens, (1600, 64, 1))
  with pytest.raises(ValueError, match="at least 2 channels"):
    nullspace.encoder_noise(linear, params, single, key=KEY)


def test_a_search_in_tokens_without_a_size_finds_nothing(wide):
  params, tokens = wide
  flat = jnp.broadcast_to(tokens[..., :1], tokens.shape)
  found = search(params, flat, jnp.ones(200, bool))
  assert searching.STATUSES[int(found.status)] == "infeasible"
  assert float(found.radius) == 0


def saturating(params, tokens):
  """A norm, then little that depends on it: bounded, whatever the noise."""
  apart = tokens - jnp.mean(tokens, axis=-1, keepdims=True)
  size = jnp.sqrt(jnp.mean(jnp.square(apart), axis=-1, keepdims=True) + 1e-6)
  return 0.02 * linear(params, apart / size)


def test_a_search_that_saturates_is_not_called_a_nullspace_direction(wide):
  params, tokens = wide
  found = searching.search(
    saturating,
    params[:, :3],
    criteria.Items(tokens=tokens[:200]),
    criteria.Items(tokens=tokens[200:]),
    settings(max_radius=100.0),
    KEY,
  )
  assert float(found.radius) == pytest.approx(100)
  assert float(found.mean) > 1e-2 * 0.03
  assert searching.STATUSES[int(found.status)] == "saturated"


def test_published_noise_has_no_bracket(wide):
  params, tokens = wide
  result = nullspace.published_noise(
    linear, params, tokens, share=1.0, batch_size=50, key=KEY
  )
  assert np.all(np.isnan(result.bracket))


# ---- the safeguards of a stage


def improved(params, tokens, direction, radius, **options):
  """The direction after the steps of one stage."""
  items = criteria.Items(tokens=tokens)
  improve = searching._improve(
    linear, params, items, settings(**options), nullspace.scale(tokens)
  )
  return improve(KEY, direction, jnp.float32(radius))


def test_steps_that_make_it_worse_are_thrown_away(wide):
  params, tokens = wide
  # Of the kernel: nothing is better, and steps of this size are worse.
  apart = params - jnp.mean(params, axis=1, keepdims=True)
  rows = jnp.kron(jnp.eye(4), jnp.ones((1, 16)))
  seen = jnp.concatenate([apart, rows.T], axis=1)
  basis = jnp.linalg.svd(seen)[0][:, 6:]
  free = jnp.reshape(basis @ (basis.T @ jnp.ones(64).at[::3].set(-2)), (4, 16))
  free = free - jnp.mean(free, axis=1, keepdims=True)
  free = free / jnp.linalg.norm(free, axis=1, keepdims=True)
  start = improved(params, tokens, free, 1.0, lr=1e-3, num_steps=50)
  after = improved(params, tokens, start, 1.0, lr=5.0, num_steps=1)
  np.testing.assert_array_equal(after, start)


def test_steps_are_smaller_where_the_radius_is_larger(wide):
  params, tokens = wide
  start = nullspace.random_direction(KEY, (1, 3))
  moved = [
    float(
      jnp.max(
        jnp.abs(
          improved(
            params[:3], tokens[:, :1, :3], start, radius, num_steps=1, lr=0.02
          )
          - start
        )
      )
    )
    for radius in (1.0, 10.0)
  ]
  assert moved[0] > 0
  assert 0 < moved[1] < 0.2 * moved[0]


def test_what_is_feasible_at_once_keeps_its_direction(wide):
  params, tokens = wide
  tiny = {"start_radius": 1e-4, "max_radius": 1e-4}
  found = search(params, tokens, jnp.ones(200, bool), **tiny)
  start = nullspace.random_direction(jax.random.split(KEY)[0], (4, 16))
  np.testing.assert_array_equal(found.direction, start)
  assert not found.optimised[0]


# ---- bad input


@pytest.mark.parametrize("share", [-1.0, 0.0, 5.0, math.nan])
def test_published_noise_refuses_a_share_that_is_none(wide, share):
  params, tokens = wide
  with pytest.raises(ValueError, match="share must lie in"):
    nullspace.published_noise(linear, params, tokens, share=share, key=KEY)


def test_items_that_do_not_fit_are_refused_by_name(wide):
  params, tokens = wide
  for report in (tokens[0], tokens[:, :2]):
    with pytest.raises(ValueError, match="report must"):
      nullspace.published_noise(
        linear, params, tokens, report=report, share=1.0, key=KEY
      )
  with pytest.raises(ValueError, match="tokens must have items"):
    nullspace.criterion(linear, params, tokens[:0], tokens[0])
  with pytest.raises(ValueError, match="batch_size must be"):
    nullspace.criterion(linear, params, tokens, tokens[0], batch_size=0)
