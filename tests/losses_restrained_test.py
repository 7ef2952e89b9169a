"""Penalties of wrong logits: closed forms, limits, reductions, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from robust_mm import _compiling
from robust_mm import attacks
from robust_mm import losses

N, C = 6, 7
# Compiled once each, and used once.
jit = functools.partial(jax.jit, compiler_options=_compiling.options_for_once())


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def sample(seed=0, items=N, classes=C, scale=2.0):
  rng = np.random.default_rng(seed)
  logits = scale * rng.normal(size=(items, classes))
  return logits, rng.integers(0, classes, items)


def wrong_of(logits, label):
  """[n, C - 1] wrong logits, and where they were."""
  mask = np.arange(logits.shape[1])[None] != np.asarray(label)[:, None]
  return logits[mask].reshape(len(logits), -1), mask


def value(penalty, logits, label, weights=None):
  found = jit(lambda z: penalty(z, label, weights))(jnp.asarray(logits))
  return float(found)


# ---- 1: dispersion


def test_gradient_of_the_dispersion_is_twice_the_distance_from_the_mean():
  logits, label = sample()
  penalty = losses.wrong_class_dispersion(reduction="sum_as_published")
  grad = jax.grad(lambda z: penalty(z, label))(jnp.asarray(logits))
  wrong, mask = wrong_of(logits, label)
  centred = logits - wrong.mean(axis=1, keepdims=True)
  np.testing.assert_allclose(grad, np.where(mask, 2 * centred, 0), atol=1e-12)
  uncentred = np.where(mask, 2 * logits, 0)
  assert np.max(np.abs(grad - uncentred)) > 0.1


def test_dispersion_ignores_a_shift_of_an_item():
  logits, label = sample()
  shift = np.random.default_rng(1).normal(size=(N, 1)) * 10
  penalty = losses.wrong_class_dispersion()
  np.testing.assert_allclose(
    value(penalty, logits + shift, label),
    value(penalty, logits, label),
    atol=1e-10,
  )
  wrong, _ = wrong_of(logits, label)
  log_softmaxed = wrong - scipy.special.logsumexp(wrong, axis=1)[:, None]
  np.testing.assert_allclose(
    value(penalty, logits, label), np.mean(np.var(log_softmaxed, axis=1))
  )


def test_published_centre_adds_its_identity():
  logits, label = sample()
  plain = losses.wrong_class_dispersion(reduction="sum_as_published")
  published = losses.wrong_class_dispersion(
    center="published", reduction="sum_as_published"
  )
  mu = wrong_of(logits, label)[0].mean(axis=1)
  extra = np.sum((C - 1) * mu**2 / C**2)
  np.testing.assert_allclose(
    value(published, logits, label),
    value(plain, logits, label) + extra,
    rtol=1e-12,
  )
  assert extra > 1e-3
  assert (
    abs(value(published, logits + 1, label) - value(published, logits, label))
    > 1e-2
  )  # no longer free of shifts


# ---- 2: complement KL


def test_complement_kl_is_the_divergence_from_uniform():
  logits, label = sample()
  wrong, mask = wrong_of(logits, label)
  q = scipy.special.softmax(wrong, axis=1)
  u = 1 / (C - 1)
  direct = np.sum(u * (np.log(u) - np.log(q)), axis=1)
  penalty = losses.complement_kl()
  np.testing.assert_allclose(
    value(penalty, logits, label), direct.mean(), rtol=1e-12
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
  logits, label = sample()

  def ratio(scale):
    return value(losses.wrong_class_dispersion(), scale * logits, label) / (
      2 * value(losses.complement_kl(), scale * logits, label)
    )

  assert abs(ratio(0.01) - 1) < 1e-3
  assert abs(ratio(1.0) - 1) > 1e-2


# ---- 3: probabilities


def test_probability_space_vanishes_with_confidence():
  logits, label = sample()
  wrong, _ = wrong_of(logits, label)
  p = scipy.special.softmax(logits, axis=1)
  q = scipy.special.softmax(wrong, axis=1)
  left = 1 - p[np.arange(N), label]
  expected = left**2 * np.sum((q - 1 / (C - 1)) ** 2, axis=1)
  penalty = losses.wrong_class_dispersion(space="prob")
  np.testing.assert_allclose(
    (C - 1) * value(penalty, logits, label), expected.mean(), rtol=1e-12
  )


# ---- 4: levels


def levels_of(logits, label, window, log_prob):
  if log_prob:
    logits = scipy.special.log_softmax(logits, axis=1)
  wrong, _ = wrong_of(logits, label)
  return -np.sort(-wrong, axis=1)[:, window[0] : window[1]].mean(axis=1)


@pytest.mark.parametrize("space", ["logit", "log_prob"])
@pytest.mark.parametrize("window", [(0, 1), (0, 4), (2, 5), (0, C - 1)])
def test_topk_level_is_the_divergence_of_levels_from_uniform(space, window):
  logits, label = sample()
  m = levels_of(logits, label, window, space == "log_prob")
  q = scipy.special.softmax(m)
  direct = np.mean(np.log(1 / N) - np.log(q))
  penalty = losses.topk_level(window=window, space=space)
  np.testing.assert_allclose(value(penalty, logits, label), direct, rtol=1e-10)
  summed = losses.topk_level(
    window=window, space=space, reduction="sum_as_published"
  )
  np.testing.assert_allclose(
    value(summed, logits, label), -np.sum(np.log(q)), rtol=1e-10
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
  np.testing.assert_allclose(value(mean, same, label), 0, atol=1e-10)
  np.testing.assert_allclose(
    value(summed, same, label), N * np.log(N), atol=1e-10
  )
  apart = with_levels(np.linspace(0, 1, N))
  assert value(mean, apart, label) > 1e-2
  assert value(summed, apart, label) > N * np.log(N) + 1e-2


def test_gradient_in_levels_is_their_softmax_minus_uniform():
  label = np.zeros(N, int)
  m = np.random.default_rng(2).normal(size=N)
  summed = losses.topk_level(
    window=(0, 2), space="logit", reduction="sum_as_published"
  )
  grad = jax.grad(lambda m: summed(with_levels(m), label))(jnp.asarray(m))
  np.testing.assert_allclose(grad, N * scipy.special.softmax(m) - 1, atol=1e-10)
  np.testing.assert_allclose(
    value(summed, with_levels(m + 5), label),
    value(summed, with_levels(m), label),
    rtol=1e-12,
  )


def test_one_item_has_no_level_to_differ_from():
  logits, label = sample(items=1)
  for space in ("logit", "log_prob"):
    penalty = losses.topk_level(window=(0, 3), space=space)
    found, grad = jax.value_and_grad(penalty)(jnp.asarray(logits), label)
    np.testing.assert_allclose(found, 0, atol=1e-10)
    np.testing.assert_allclose(grad, 0, atol=1e-10)


def test_level_scope_compares_parts_of_the_batch():
  logits, label = sample()
  penalty = losses.topk_level(window=(0, 3), level_scope=2)
  plain = losses.topk_level(window=(0, 3))
  halves = [value(plain, logits[i : i + 3], label[i : i + 3]) for i in (0, 3)]
  np.testing.assert_allclose(
    value(penalty, logits, label), np.mean(halves), rtol=1e-12
  )
  assert abs(np.mean(halves) - value(plain, logits, label)) > 1e-3
  with pytest.raises(ValueError, match="level_scope must divide the 6 items"):
    value(losses.topk_level(level_scope=4), logits, label)


# ---- 5: the vacuous direction


@pytest.mark.parametrize("space, blind", [("logit", False), ("log_prob", True)])
def test_a_shift_of_every_item_moves_levels_in_logit_space_only(space, blind):
  logits, label = sample()
  shift = np.random.default_rng(3).normal(size=(N, 1))
  np.testing.assert_allclose(
    scipy.special.softmax(logits + shift, axis=1),
    scipy.special.softmax(logits, axis=1),
    atol=1e-12,
  )
  penalty = losses.topk_level(window=(0, 3), space=space)
  moved = abs(
    value(penalty, logits + shift, label) - value(penalty, logits, label)
  )
  assert moved < 1e-10 if blind else moved > 1e-2


def test_a_bias_of_every_item_satisfies_the_published_penalty():
  logits, label = sample()
  m = levels_of(logits, label, (0, 4), False)
  loss_fn = losses.restrained_softmax(
    losses.topk_level(), 1.0, fidelity="published"
  )
  before, old = loss_fn(jnp.asarray(logits), label)
  after, new = loss_fn(jnp.asarray(logits - m[:, None]), label)
  np.testing.assert_allclose(new["ce"], old["ce"], rtol=1e-12)
  np.testing.assert_allclose(new["penalty"], N * np.log(N), rtol=1e-12)
  assert before - after > 0.1


# ---- 6: reductions


def test_windows_reduce_to_what_they_restrict():
  logits, label = sample()
  full = (0, C - 1)
  wrong, _ = wrong_of(logits, label)
  np.testing.assert_allclose(
    value(losses.topk_dispersion(window=full), logits, label),
    value(losses.wrong_class_dispersion(), logits, label),
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
    value(losses.topk_dispersion(window=(1, 4)), logits, label),
    np.mean(np.var(some, axis=1)),
    atol=1e-10,
  )


def test_topk_margin_grows_with_the_window_up_to_cross_entropy():
  logits, label = sample()
  found = [
    value(losses.topk_margin(window=(0, stop)), logits, label)
    for stop in range(1, C)
  ]
  assert np.all(np.diff(found) > 0)
  entropy = np.mean(losses.cross_entropy(jnp.asarray(logits), label))
  np.testing.assert_allclose(found[-1], entropy, rtol=1e-10)


def test_relu_margin_is_zero_where_the_label_leads_by_gamma():
  logits, label = sample()
  wrong, _ = wrong_of(logits, label)
  m = -np.sort(-wrong, axis=1)[:, :2].mean(axis=1)
  own = logits[np.arange(N), label]
  penalty = losses.topk_margin(window=(0, 2), form="relu", gamma=0.5)
  expected = np.maximum(m - own + 0.5, 0)
  np.testing.assert_allclose(value(penalty, logits, label), expected.mean())
  assert np.any(expected == 0)
  assert np.any(expected > 0)


def test_controls_are_their_formulas():
  logits, label = sample()
  log_p = scipy.special.log_softmax(logits, axis=1)
  for name, expected in (
    ("label_smoothing", -log_p.mean()),
    ("confidence_penalty", np.mean(np.sum(np.exp(log_p) * log_p, axis=1))),
    ("logit_norm", np.mean(np.sum(logits**2, axis=1) / C)),
  ):
    found = value(losses.penalty(name), logits, label)
    np.testing.assert_allclose(found, expected, rtol=1e-12, err_msg=name)


def test_label_smoothing_is_a_smoothed_label():
  logits, label = (jnp.asarray(x) for x in sample())
  loss_fn = losses.restrained_softmax(losses.label_smoothing(), 0.25)
  loss, _ = loss_fn(logits, label)
  smoothed = losses.cross_entropy(logits, label, label_smoothing=0.2)
  np.testing.assert_allclose(loss / 1.25, jnp.mean(smoothed), rtol=1e-12)


@pytest.mark.parametrize("kind", ["drsl1", "drsl2"])
def test_sorted_slices_are_those_of_the_release(kind):
  logits, label = sample()
  rows = logits if kind == "drsl1" else wrong_of(logits, label)[0]
  part = np.sort(rows, axis=1)[:, -4:-1]  # as the release slices
  expected = np.sum((part - part.mean(axis=1, keepdims=True)) ** 2)
  penalty = losses.sorted_slice_dispersion(top_n=4, kind=kind)
  loss_fn = losses.restrained_softmax(penalty, 0.1, fidelity="published")
  _, aux = loss_fn(jnp.asarray(logits), label)
  np.testing.assert_allclose(aux["penalty"], expected, rtol=1e-12)


# ---- 7: padding


def every_penalty():
  return {
    "wrong_class_dispersion": {},
    "complement_kl": {},
    "topk_level": {"window": (0, 3)},
    "topk_dispersion": {"window": (0, 3)},
    "topk_margin": {"window": (0, 3)},
    "label_smoothing": {},
    "confidence_penalty": {},
    "logit_norm": {},
  }


@pytest.mark.parametrize("name", every_penalty())
def test_padding_changes_nothing(name):
  rng = np.random.default_rng(4)
  logits = rng.normal(size=(2, 4, C))
  label = rng.integers(0, C, (2, 4))
  valid = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
  # Two more columns of padding, whatever they hold, the label too.
  longer = np.concatenate([logits, np.full((2, 2, C), np.nan)], axis=1)
  labels = np.concatenate([label, np.full((2, 2), -1)], axis=1)
  mask = np.concatenate([valid, np.zeros((2, 2), bool)], axis=1)
  penalty = losses.penalty(name, **every_penalty()[name])
  loss_fn = losses.restrained_softmax(penalty, 0.3)
  grad_fn = jit(jax.value_and_grad(loss_fn, has_aux=True))
  (loss, aux), grad = grad_fn(jnp.asarray(logits), label, valid)
  (padded, more), grad_padded = grad_fn(jnp.asarray(longer), labels, mask)
  assert float(loss) == float(padded)
  for key in aux:
    assert float(aux[key]) == float(more[key]), key
  assert np.array_equal(grad, grad_padded[:, :4])
  assert np.all(np.asarray(grad_padded)[:, 4:] == 0)
  assert np.all(np.asarray(grad)[1, 3] == 0)
  assert more["num_valid"] == 7


def test_the_published_mode_counts_padding():
  rng = np.random.default_rng(5)
  logits = jnp.asarray(rng.normal(size=(2, 4, C)))
  label = rng.integers(0, C, (2, 4))
  valid = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
  for penalty in (losses.topk_level(), losses.wrong_class_dispersion()):
    published = losses.restrained_softmax(penalty, 0.1, fidelity="published")
    loss, aux = published(logits, label, valid)
    whole, _ = published(logits, label)
    assert loss == whole
    assert aux["num_valid"] == 8
    cut, _ = published(logits[:, :2], label[:, :2], valid[:, :2])
    assert abs(loss - cut) > 1e-2
    corrected = losses.restrained_softmax(penalty, 0.1)
    assert abs(corrected(logits, label, valid)[0] - loss) > 1e-2


def test_weights_let_every_example_count_alike():
  rng = np.random.default_rng(6)
  logits = jnp.asarray(rng.normal(size=(2, 4, C)))
  label = rng.integers(0, C, (2, 4))
  valid = np.array([[1, 1, 1, 1], [1, 0, 0, 0]], bool)
  loss_fn = losses.restrained_softmax(losses.complement_kl(), 0.5)
  found, _ = loss_fn(
    logits, label, valid, valid_weights=losses.weights_per_example(valid)
  )
  each = [
    loss_fn(logits[i : i + 1], label[i : i + 1], valid[i : i + 1])[0]
    for i in range(2)
  ]
  np.testing.assert_allclose(found, np.mean(each), rtol=1e-12)
  assert abs(found - loss_fn(logits, label, valid)[0]) > 1e-3


def test_no_valid_item_is_refused_or_zero():
  logits, label = sample()
  none = np.zeros(N, bool)
  for name, options in every_penalty().items():
    loss_fn = losses.restrained_softmax(losses.penalty(name, **options), 1.0)
    with pytest.raises(ValueError, match="valid must be True somewhere"):
      loss_fn(jnp.asarray(logits), label, none)
    grad_fn = jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, aux), grad = grad_fn(jnp.asarray(logits), label, none)
    assert loss == 0, name
    assert aux["num_valid"] == 0
    assert np.all(np.asarray(grad) == 0), name


# ---- 8: strength


def test_weights_convert_between_sum_and_mean():
  logits, label = sample()
  b = 0.003
  summed = value(
    losses.wrong_class_dispersion(reduction="sum_as_published"), logits, label
  )
  mean = value(losses.wrong_class_dispersion(), logits, label)
  weight = losses.mean_weight(losses.wrong_class_dispersion(), b, N, C)
  np.testing.assert_allclose(b * summed, weight * mean, rtol=1e-10)
  assert weight == pytest.approx(b * N * (C - 1))
  options = {"window": (0, 3), "space": "logit"}
  summed = value(
    losses.topk_level(**options, reduction="sum_as_published"), logits, label
  )
  mean = value(losses.topk_level(**options), logits, label)
  weight = losses.mean_weight(losses.topk_level(**options), b, N, C)
  np.testing.assert_allclose(
    b * (summed - N * np.log(N)), weight * mean, rtol=1e-10
  )
  # The figures of the publications.
  assert losses.mean_weight(
    losses.wrong_class_dispersion(), 1e-3, 128, 10
  ) == pytest.approx(1.152)
  assert losses.mean_weight(
    losses.topk_level(), 1e-5, 8 * 128, 50257
  ) == pytest.approx(0.010, abs=5e-4)


# ---- 9: what a flat complement does to margins


def test_the_margin_lies_in_the_samuelson_sandwich():
  rng = np.random.default_rng(7)
  z = rng.normal(size=(10_000, C)) * rng.uniform(0.1, 5, (10_000, 1))
  label = rng.integers(0, C, 10_000)
  wrong, _ = wrong_of(z, label)
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


# ---- 13: vocabularies, jit, types


def test_top_k_equals_a_full_sort_of_a_thousand_classes():
  logits, label = sample(items=5, classes=1000)
  wrong, _ = wrong_of(logits, label)
  ordered = -np.sort(-wrong, axis=1)
  for start, stop in ((0, 4), (4, 13), (0, 100)):
    levels = losses.topk_level(window=(start, stop), space="logit").items
    found = jax.jit(levels)(jnp.asarray(logits), label)
    part = jnp.asarray(ordered[:, start:stop])
    assert np.array_equal(found, jnp.sum(part, axis=1) / (stop - start))


def test_large_vocabularies_are_never_sorted():
  logits = jax.ShapeDtypeStruct((2, 50_257), jnp.float32)
  label = jax.ShapeDtypeStruct((2,), jnp.int32)
  for name, options in every_penalty().items():
    loss_fn = losses.restrained_softmax(losses.penalty(name, **options), 1.0)
    grad_fn = jax.grad(lambda z, y, fn=loss_fn: fn(z, y)[0])
    text = str(jax.make_jaxpr(grad_fn)(logits, label))
    assert " sort[" not in text, name
    for number in (part.split("]")[0] for part in text.split("top_k[")[1:]):
      assert "50" not in number.split("k=")[1].split()[0], name


def test_changing_labels_do_not_compile_again(caplog):
  loss_fn = jax.jit(losses.restrained_softmax(losses.topk_level(), 1.0))
  logits, label = sample()
  loss_fn(logits, label)
  with jax.log_compiles():
    loss_fn(logits, (label + 1) % C)
  assert not [r for r in caplog.records if "Compiling" in r.getMessage()]


def test_bfloat16_logits_give_a_float32_loss():
  logits, label = sample()
  low = jnp.asarray(logits, jnp.bfloat16)
  for name, options in every_penalty().items():
    loss_fn = losses.restrained_softmax(losses.penalty(name, **options), 1.0)
    loss, aux = jit(loss_fn)(low, label)
    assert loss.dtype == aux["penalty"].dtype == jnp.float32
    exact, _ = jit(loss_fn)(low.astype(jnp.float32), label)
    np.testing.assert_allclose(loss, exact, rtol=1e-6)


# ---- aux, NaN, soft labels, scores


def test_aux_is_what_it_says():
  logits, label = sample()
  loss_fn = losses.restrained_softmax(losses.topk_level(window=(0, 3)), 0.7)
  loss, aux = loss_fn(jnp.asarray(logits), label)
  wrong, _ = wrong_of(logits, label)
  own = logits[np.arange(N), label]
  ce = np.mean(scipy.special.logsumexp(logits, axis=1) - own)
  expected = {
    "ce": ce,
    "penalty": value(losses.topk_level(window=(0, 3)), logits, label),
    "level_spread": np.std(levels_of(logits, label, (0, 3), True)),
    "wrong_dispersion": np.mean(np.var(wrong, axis=1)),
    "margin_mean": np.mean(own - wrong.max(axis=1)),
    "logit_norm": np.mean(logits**2),
    "num_valid": N,
  }
  assert aux.keys() == expected.keys()
  for name, number in expected.items():
    np.testing.assert_allclose(aux[name], number, rtol=1e-10, err_msg=name)
  np.testing.assert_allclose(loss, ce + 0.7 * expected["penalty"], rtol=1e-10)


def test_nan_is_passed_on_and_infinity_is_refused_or_nan():
  logits, label = sample()
  for name, options in every_penalty().items():
    loss_fn = losses.restrained_softmax(losses.penalty(name, **options), 1.0)
    bad = np.array(logits)
    bad[0, (label[0] + 1) % C] = np.nan
    assert np.isnan(loss_fn(jnp.asarray(bad), label)[0]), name
    bad[0, (label[0] + 1) % C] = -np.inf
    with pytest.raises(ValueError, match="logits must be finite"):
      loss_fn(jnp.asarray(bad), label)
    assert np.isnan(jax.jit(loss_fn)(bad, label)[0]), name


def test_soft_labels_go_with_penalties_without_a_label():
  logits, label = sample()
  soft = np.full((N, C), 0.1 / C)
  soft[np.arange(N), label] += 0.9
  smoothed = jnp.mean(
    losses.cross_entropy(jnp.asarray(logits), label, label_smoothing=0.1)
  )
  for name, options in every_penalty().items():
    loss_fn = losses.restrained_softmax(losses.penalty(name, **options), 0.1)
    if name in ("logit_norm", "confidence_penalty"):
      _, aux = loss_fn(jnp.asarray(logits), soft)
      np.testing.assert_allclose(aux["ce"], smoothed, rtol=1e-10)
      assert set(aux) == {"ce", "penalty", "logit_norm", "num_valid"}
    else:
      with pytest.raises(ValueError, match="labels must be integer classes"):
        loss_fn(jnp.asarray(logits), soft)


def test_penalty_of_scores_is_the_mean_over_present_modalities():
  rng = np.random.default_rng(9)
  scores = {m: jnp.asarray(rng.normal(size=(4, C))) for m in "ab"}
  label = rng.integers(0, C, 4)
  present = {
    "a": np.array([1, 1, 0, 0], bool),
    "b": np.array([1, 0, 1, 0], bool),
  }
  poisoned = {
    m: jnp.where(present[m][:, None], s, jnp.nan) for m, s in scores.items()
  }
  penalty = losses.wrong_class_dispersion()
  found = losses.score_penalty(penalty, poisoned, label, present)
  each = {m: np.asarray(penalty.items(s, label)) for m, s in scores.items()}
  expected = (each["a"][0] + each["b"][0]) / 2 + each["a"][1] + each["b"][2]
  np.testing.assert_allclose(found, expected / 3, rtol=1e-12)
  summed = losses.wrong_class_dispersion(reduction="sum_as_published")
  with pytest.raises(ValueError, match="is a sum here"):
    losses.score_penalty(summed, scores, label, present)


# ---- refusals


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: losses.topk_level(window=(2, 2)), "window must be two integers"),
    (lambda: losses.topk_level(window=(-1, 2)), "window must be two integers"),
    (
      lambda: losses.topk_level(window=(0, 1, 2)),
      "window must be two integers",
    ),
    (lambda: losses.topk_dispersion(window=(0, 1)), "at least 2 ranks"),
    (lambda: losses.topk_level(space="prob"), "space must be one of"),
    (lambda: losses.topk_level(level_scope="local"), "level_scope must be"),
    (
      lambda: losses.wrong_class_dispersion(space="log_prob"),
      "space must be 'logit' or 'prob'",
    ),
    (
      lambda: losses.wrong_class_dispersion(space="prob", center="published"),
      "center must be 'mean'",
    ),
    (lambda: losses.topk_margin(form="none"), "form must be one of"),
    (lambda: losses.topk_margin(gamma=np.inf), "gamma must be finite"),
    (lambda: losses.sorted_slice_dispersion(top_n=2), "top_n"),
    (lambda: losses.penalty("drsl"), "name must be one of"),
    (lambda: losses.penalty("topk_level", top=3), "options of the penalty"),
    (
      lambda: losses.restrained_softmax(losses.topk_level(), -1.0),
      "weight must be non-negative",
    ),
    (
      lambda: losses.restrained_softmax(
        losses.topk_level(), 1.0, fidelity="exact"
      ),
      "fidelity must be one of",
    ),
    (
      lambda: losses.restrained_softmax(
        losses.complement_kl(), 1.0, fidelity="published"
      ),
      "was never published",
    ),
    (
      lambda: losses.restrained_softmax(
        losses.sorted_slice_dispersion(top_n=3), 1.0
      ),
      "needs fidelity='published'",
    ),
    (
      lambda: losses.mean_weight(losses.complement_kl(), 1.0, 1, 3),
      "penalty must be one of",
    ),
  ],
)
def test_bad_arguments_are_refused_by_name(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize(
  "penalty, change, message",
  [
    (losses.topk_level(window=(0, C)), {}, "window must end at 6 at most"),
    (losses.wrong_class_dispersion(), {"classes": 2}, "at least three classes"),
    (losses.complement_kl(), {"classes": 2}, "at least three classes"),
    (losses.topk_level(), {"label": np.full(N, C)}, "labels must lie in 0..6"),
    (losses.topk_level(), {"label": np.zeros(N)}, "labels must be integer"),
    (losses.topk_level(), {"valid": np.ones(N)}, "valid must be bool"),
    (losses.topk_level(), {"valid": np.ones(3, bool)}, "valid must be bool"),
    (
      losses.topk_level(),
      {"valid_weights": -np.ones(N)},
      "valid_weights must be non-negative",
    ),
    (
      losses.topk_level(),
      {"valid_weights": np.ones(3)},
      "valid_weights must have shape",
    ),
  ],
)
def test_bad_batches_are_refused_by_name(penalty, change, message):
  change = dict(change)
  logits, label = sample(classes=change.pop("classes", C))
  label = change.pop("label", label)
  loss_fn = losses.restrained_softmax(penalty, 1.0)
  with pytest.raises(ValueError, match=message):
    loss_fn(jnp.asarray(logits), label, **change)


@pytest.mark.parametrize(
  "given",
  [
    *({"name": name} for name in ("wrong_class_dispersion", "complement_kl")),
    {"name": "wrong_class_dispersion", "space": "prob"},
    {"name": "sorted_slice_dispersion", "top_n": 5, "kind": "drsl2"},
    {"name": "topk_level", "window": (0, 2), "level_scope": 4},
    {"name": "topk_dispersion", "window": (1, 3)},
    {"name": "topk_margin", "form": "relu", "gamma": 0.5},
    *({"name": name} for name in ("label_smoothing", "logit_norm")),
    {"name": "confidence_penalty"},
  ],
  ids=str,
)
def test_a_penalty_is_shown_as_the_call_that_makes_it(given):
  made = losses.penalty(**given)
  again = eval(repr(made), vars(losses))
  assert (again.name, again.options) == (made.name, made.options)
  for option, value in given.items():
    assert option == "name" or again.options[option] == value
  assert repr(again) == repr(made)


def test_a_window_beyond_two_classes_leaves_one_rank():
  """C = 2: one wrong class; a level and a margin exist, a dispersion not."""
  logits, label = sample(classes=2)
  for make in (losses.topk_level, losses.topk_margin):
    loss, aux = losses.restrained_softmax(make(window=(0, 1)), 1.0)(
      jnp.asarray(logits), label
    )
    assert np.isfinite(loss)
    assert aux["wrong_dispersion"] == 0
