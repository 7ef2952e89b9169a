"""Dispersions: closed forms, limits, the margin they leave."""

import jax
import jax.numpy as jnp
import losses_penalties as helpers
import numpy as np
import pytest
import scipy.special

from robust_mm import attacks
from robust_mm import losses

N, C = helpers.N, helpers.C


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def test_gradient_of_the_dispersion_is_twice_the_distance_from_the_mean():
  logits, label = helpers.sample()
  penalty = losses.wrong_class_dispersion(reduction="sum_as_published")
  grad = jax.grad(lambda z: penalty(z, label))(jnp.asarray(logits))
  wrong, mask = helpers.wrong_of(logits, label)
  centred = logits - wrong.mean(axis=1, keepdims=True)
  np.testing.assert_allclose(grad, np.where(mask, 2 * centred, 0), atol=1e-12)
  uncentred = np.where(mask, 2 * logits, 0)
  assert np.max(np.abs(grad - uncentred)) > 0.1


def test_dispersion_ignores_a_shift_of_an_item():
  logits, label = helpers.sample()
  shift = np.random.default_rng(1).normal(size=(N, 1)) * 10
  penalty = losses.wrong_class_dispersion()
  np.testing.assert_allclose(
    helpers.value(penalty, logits + shift, label),
    helpers.value(penalty, logits, label),
    atol=1e-10,
  )
  wrong, _ = helpers.wrong_of(logits, label)
  log_softmaxed = wrong - scipy.special.logsumexp(wrong, axis=1)[:, None]
  np.testing.assert_allclose(
    helpers.value(penalty, logits, label),
    np.mean(np.var(log_softmaxed, axis=1)),
  )


def test_published_centre_adds_its_identity():
  logits, label = helpers.sample()
  plain = losses.wrong_class_dispersion(reduction="sum_as_published")
  published = losses.wrong_class_dispersion(
    center="published", reduction="sum_as_published"
  )
  mu = helpers.wrong_of(logits, label)[0].mean(axis=1)
  extra = np.sum((C - 1) * mu**2 / C**2)
  np.testing.assert_allclose(
    helpers.value(published, logits, label),
    helpers.value(plain, logits, label) + extra,
    rtol=1e-12,
  )
  assert extra > 1e-3
  assert (
    abs(
      helpers.value(published, logits + 1, label)
      - helpers.value(published, logits, label)
    )
    > 1e-2
  )  # no longer free of shifts


def test_complement_kl_is_the_divergence_from_uniform():
  logits, label = helpers.sample()
  wrong, mask = helpers.wrong_of(logits, label)
  q = scipy.special.softmax(wrong, axis=1)
  u = 1 / (C - 1)
  direct = np.sum(u * (np.log(u) - np.log(q)), axis=1)
  penalty = losses.complement_kl()
  np.testing.assert_allclose(
    helpers.value(penalty, logits, label), direct.mean(), rtol=1e-12
  )
  grad = jax.grad(lambda z: penalty(z, label))(jnp.asarray(logits))
  expected = np.zeros_like(logits)
  expected[mask] = ((q - u) / N).ravel()
  np.testing.assert_allclose(grad, expected, atol=1e-14)


def test_complement_kl_is_finite_where_the_dispersion_explodes():
  logits = jnp.asarray([[0.0, 1e6, -1e6, 3e5]], jnp.float32)
  label = np.array([0])
  found, grad = jax.value_and_grad(losses.complement_kl())(logits, label)
  assert jnp.isfinite(found)
  assert jnp.max(jnp.abs(grad)) <= 1
  assert jnp.max(jnp.abs(grad)) > 0.5
  steep = jax.grad(losses.wrong_class_dispersion())(logits, label)
  assert jnp.max(jnp.abs(steep)) > 1e5


def test_dispersion_is_twice_complement_kl_for_small_logits():
  logits, label = helpers.sample()

  def ratio(scale):
    return helpers.value(
      losses.wrong_class_dispersion(), scale * logits, label
    ) / (2 * helpers.value(losses.complement_kl(), scale * logits, label))

  assert abs(ratio(0.01) - 1) < 1e-3
  assert abs(ratio(1.0) - 1) > 1e-2


def test_probability_space_vanishes_with_confidence():
  logits, label = helpers.sample()
  wrong, _ = helpers.wrong_of(logits, label)
  p = scipy.special.softmax(logits, axis=1)
  q = scipy.special.softmax(wrong, axis=1)
  left = 1 - p[np.arange(N), label]
  expected = left**2 * np.sum((q - 1 / (C - 1)) ** 2, axis=1)
  penalty = losses.wrong_class_dispersion(space="prob")
  np.testing.assert_allclose(
    (C - 1) * helpers.value(penalty, logits, label), expected.mean(), rtol=1e-12
  )


@pytest.mark.parametrize("kind", ["drsl1", "drsl2"])
def test_sorted_slices_are_those_of_the_release(kind):
  logits, label = helpers.sample()
  rows = logits if kind == "drsl1" else helpers.wrong_of(logits, label)[0]
  part = np.sort(rows, axis=1)[:, -4:-1]  # as the release slices
  expected = np.sum((part - part.mean(axis=1, keepdims=True)) ** 2)
  penalty = losses.sorted_slice_dispersion(top_n=4, kind=kind)
  loss_fn = losses.restrained_softmax(penalty, 0.1, fidelity="published")
  _, aux = loss_fn(jnp.asarray(logits), label)
  np.testing.assert_allclose(aux["penalty"], expected, rtol=1e-12)


def test_the_margin_lies_in_the_samuelson_sandwich():
  rng = np.random.default_rng(7)
  z = rng.normal(size=(10_000, C)) * rng.uniform(0.1, 5, (10_000, 1))
  label = rng.integers(0, C, 10_000)
  wrong, _ = helpers.wrong_of(z, label)
  own = z[np.arange(10_000), label]
  mu = wrong.mean(axis=1)
  each = losses.wrong_class_dispersion(reduction="sum_as_published").items
  d = np.asarray(each(jnp.asarray(z), label))
  margin = own - wrong.max(axis=1)
  below = own - mu - np.sqrt(d * (C - 2) / (C - 1))
  assert np.all(below <= margin + 1e-9)
  assert np.all(margin <= own - mu + 1e-9)
  tighter = own - mu - 0.8 * np.sqrt(d * (C - 2) / (C - 1))
  assert np.any(tighter > margin)


def test_the_sandwich_is_tight_at_one_large_wrong_logit():
  z = np.zeros((1, C))
  z[0, 3], label = 2.5, np.array([0])
  each = losses.wrong_class_dispersion(reduction="sum_as_published").items
  d = float(each(jnp.asarray(z), label)[0])
  mu = 2.5 / (C - 1)
  below = 0 - mu - np.sqrt(d * (C - 2) / (C - 1))
  np.testing.assert_allclose(below, -2.5, atol=1e-9)
  flat = np.zeros((1, C))
  assert float(each(jnp.asarray(flat), label)[0]) == 0


# ---- 10: the logit ratio is masked


def test_the_slope_of_the_logit_ratio_vanishes_at_a_tie():
  def slope(z):
    grad = jax.grad(lambda z: jnp.sum(attacks.losses.dlr(z, jnp.array([0]))))
    return float(grad(jnp.asarray([z]))[0, 0])

  rng = np.random.default_rng(8)
  for _ in range(20):
    n = -np.sort(-rng.normal(size=C - 1))
    own = n[0] + rng.uniform(0.1, 3)
    expected = -(n[0] - n[1]) / (own - n[1]) ** 2
    np.testing.assert_allclose(slope([own, *n]), expected, rtol=1e-9)
  np.testing.assert_allclose(slope([5.0, 1.0, 0.0, 0.0, 0.0]), -0.04, rtol=1e-9)
  np.testing.assert_allclose(slope([5.0, 1.0, 1.0, 0.0, 0.0]), 0, atol=1e-10)


def test_complement_kl_of_equal_large_logits_is_zero_in_float32():
  """A divergence is not negative, however large the logits are."""
  for size in (1e4, 1e5, 1e6, -1e6):
    logits = jnp.full((3, 18), size, jnp.float32)
    found = losses.complement_kl()(logits, np.array([0, 1, 2]))
    np.testing.assert_allclose(found, 0, atol=1e-6, err_msg=str(size))
  apart = jnp.full((1, 18), 1e6, jnp.float32).at[0, 3].add(2.0)
  wrong = np.zeros(17)
  wrong[0] = 2.0
  expected = scipy.special.logsumexp(wrong) - wrong.mean() - np.log(17)
  found = losses.complement_kl()(apart, np.array([0]))
  np.testing.assert_allclose(found, expected, rtol=1e-5)
