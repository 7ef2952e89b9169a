"""Levels and margins of the largest wrong logits; reductions; controls."""

import jax
import jax.numpy as jnp
import losses_penalties as helpers
import numpy as np
import pytest
import scipy.special

from robust_mm import losses

N, C = helpers.N, helpers.C


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize("space", ["logit", "log_prob"])
@pytest.mark.parametrize("window", [(0, 1), (0, 4), (2, 5), (0, C - 1)])
def test_topk_level_is_the_divergence_of_levels_from_uniform(space, window):
  logits, label = helpers.sample()
  m = helpers.levels_of(logits, label, window, space == "log_prob")
  q = scipy.special.softmax(m)
  direct = np.mean(np.log(1 / N) - np.log(q))
  penalty = losses.topk_level(window=window, space=space)
  np.testing.assert_allclose(
    helpers.value(penalty, logits, label), direct, rtol=1e-10
  )
  summed = losses.topk_level(
    window=window, space=space, reduction="sum_as_published"
  )
  np.testing.assert_allclose(
    helpers.value(summed, logits, label), -np.sum(np.log(q)), rtol=1e-10
  )


def with_levels(m, classes=5):
  """Logits whose wrong ones, of label 0, are all the level."""
  m = jnp.asarray(m)
  return jnp.repeat(m[:, None], classes, axis=1).at[:, 0].set(3.0)


def test_equal_levels_are_the_minimum():
  label = np.zeros(N, int)
  same = with_levels(np.full(N, 1.7))
  mean = losses.topk_level(window=(0, 2), space="logit")
  summed = losses.topk_level(
    window=(0, 2), space="logit", reduction="sum_as_published"
  )
  np.testing.assert_allclose(helpers.value(mean, same, label), 0, atol=1e-10)
  np.testing.assert_allclose(
    helpers.value(summed, same, label), N * np.log(N), atol=1e-10
  )
  apart = with_levels(np.linspace(0, 1, N))
  assert helpers.value(mean, apart, label) > 1e-2
  assert helpers.value(summed, apart, label) > N * np.log(N) + 1e-2


def test_gradient_in_levels_is_their_softmax_minus_uniform():
  label = np.zeros(N, int)
  m = np.random.default_rng(2).normal(size=N)
  summed = losses.topk_level(
    window=(0, 2), space="logit", reduction="sum_as_published"
  )
  grad = jax.grad(lambda m: summed(with_levels(m), label))(jnp.asarray(m))
  np.testing.assert_allclose(grad, N * scipy.special.softmax(m) - 1, atol=1e-10)
  np.testing.assert_allclose(
    helpers.value(summed, with_levels(m + 5), label),
    helpers.value(summed, with_levels(m), label),
    rtol=1e-12,
  )


def test_one_item_has_no_level_to_differ_from():
  logits, label = helpers.sample(items=1)
  for space in ("logit", "log_prob"):
    penalty = losses.topk_level(window=(0, 3), space=space)
    found, grad = jax.value_and_grad(penalty)(jnp.asarray(logits), label)
    np.testing.assert_allclose(found, 0, atol=1e-10)
    np.testing.assert_allclose(grad, 0, atol=1e-10)


def test_level_scope_compares_parts_of_the_batch():
  logits, label = helpers.sample()
  penalty = losses.topk_level(window=(0, 3), level_scope=2)
  plain = losses.topk_level(window=(0, 3))
  halves = [
    helpers.value(plain, logits[i : i + 3], label[i : i + 3]) for i in (0, 3)
  ]
  np.testing.assert_allclose(
    helpers.value(penalty, logits, label), np.mean(halves), rtol=1e-12
  )
  assert abs(np.mean(halves) - helpers.value(plain, logits, label)) > 1e-3
  with pytest.raises(ValueError, match="level_scope must divide the 6 items"):
    helpers.value(losses.topk_level(level_scope=4), logits, label)


@pytest.mark.parametrize("space, blind", [("logit", False), ("log_prob", True)])
def test_a_shift_of_every_item_moves_levels_in_logit_space_only(space, blind):
  logits, label = helpers.sample()
  shift = np.random.default_rng(3).normal(size=(N, 1))
  np.testing.assert_allclose(
    scipy.special.softmax(logits + shift, axis=1),
    scipy.special.softmax(logits, axis=1),
    atol=1e-12,
  )
  penalty = losses.topk_level(window=(0, 3), space=space)
  moved = abs(
    helpers.value(penalty, logits + shift, label)
    - helpers.value(penalty, logits, label)
  )
  assert moved < 1e-10 if blind else moved > 1e-2


def test_a_bias_of_every_item_satisfies_the_published_penalty():
  logits, label = helpers.sample()
  m = helpers.levels_of(logits, label, (0, 4), False)
  loss_fn = losses.restrained_softmax(
    losses.topk_level(), 1.0, fidelity="published"
  )
  before, old = loss_fn(jnp.asarray(logits), label)
  after, new = loss_fn(jnp.asarray(logits - m[:, None]), label)
  np.testing.assert_allclose(new["ce"], old["ce"], rtol=1e-12)
  np.testing.assert_allclose(new["penalty"], N * np.log(N), rtol=1e-12)
  assert before - after > 0.1


def test_windows_reduce_to_what_they_restrict():
  logits, label = helpers.sample()
  full = (0, C - 1)
  wrong, _ = helpers.wrong_of(logits, label)
  np.testing.assert_allclose(
    helpers.value(losses.topk_dispersion(window=full), logits, label),
    helpers.value(losses.wrong_class_dispersion(), logits, label),
    atol=1e-10,
  )
  levels = losses.topk_level(window=full, space="logit").items
  np.testing.assert_allclose(
    levels(jnp.asarray(logits), label), wrong.mean(axis=1), atol=1e-10
  )
  largest = losses.topk_level(window=(0, 1), space="logit").items
  np.testing.assert_allclose(
    largest(jnp.asarray(logits), label), wrong.max(axis=1), atol=1e-10
  )
  some = -np.sort(-wrong, axis=1)[:, 1:4]
  np.testing.assert_allclose(
    helpers.value(losses.topk_dispersion(window=(1, 4)), logits, label),
    np.mean(np.var(some, axis=1)),
    atol=1e-10,
  )


def test_topk_margin_grows_with_the_window_up_to_cross_entropy():
  logits, label = helpers.sample()
  found = [
    helpers.value(losses.topk_margin(window=(0, stop)), logits, label)
    for stop in range(1, C)
  ]
  assert np.all(np.diff(found) > 0)
  entropy = np.mean(losses.cross_entropy(jnp.asarray(logits), label))
  np.testing.assert_allclose(found[-1], entropy, rtol=1e-10)


def test_relu_margin_is_zero_where_the_label_leads_by_gamma():
  logits, label = helpers.sample()
  wrong, _ = helpers.wrong_of(logits, label)
  m = -np.sort(-wrong, axis=1)[:, :2].mean(axis=1)
  own = logits[np.arange(N), label]
  penalty = losses.topk_margin(window=(0, 2), form="relu", gamma=0.5)
  expected = np.maximum(m - own + 0.5, 0)
  np.testing.assert_allclose(
    helpers.value(penalty, logits, label), expected.mean()
  )
  assert np.any(expected == 0)
  assert np.any(expected > 0)


def test_controls_are_their_formulas():
  logits, label = helpers.sample()
  log_p = scipy.special.log_softmax(logits, axis=1)
  for name, expected in (
    ("label_smoothing", -log_p.mean()),
    ("confidence_penalty", np.mean(np.sum(np.exp(log_p) * log_p, axis=1))),
    ("logit_norm", np.mean(np.sum(logits**2, axis=1) / C)),
  ):
    found = helpers.value(losses.penalty(name), logits, label)
    np.testing.assert_allclose(found, expected, rtol=1e-12, err_msg=name)


def test_label_smoothing_is_a_smoothed_label():
  logits, label = (jnp.asarray(x) for x in helpers.sample())
  loss_fn = losses.restrained_softmax(losses.label_smoothing(), 0.25)
  loss, _ = loss_fn(logits, label)
  smoothed = losses.cross_entropy(logits, label, label_smoothing=0.2)
  np.testing.assert_allclose(loss / 1.25, jnp.mean(smoothed), rtol=1e-12)


def test_level_scope_keeps_the_tokens_of_an_example_together():
  """[6, 4, k] in two parts are three examples each; four parts cut some."""
  rng = np.random.default_rng(10)
  logits = jnp.asarray(rng.normal(size=(6, 4, C)))
  label = rng.integers(0, C, (6, 4))

  def penalty(logits, label, **given):
    loss_fn = losses.restrained_softmax(
      losses.topk_level(window=(0, 3), **given), 1.0
    )
    return loss_fn(logits, label)[1]["penalty"]

  halves = [penalty(logits[i : i + 3], label[i : i + 3]) for i in (0, 3)]
  found = penalty(logits, label, level_scope=2)
  np.testing.assert_allclose(found, np.mean(halves), rtol=1e-12)
  with pytest.raises(ValueError, match="level_scope must divide the 6 items"):
    penalty(logits, label, level_scope=4)
