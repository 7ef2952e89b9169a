"""Cross-entropy with a penalty: padding, strength, vocabularies, aux."""

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


@pytest.mark.parametrize("name", helpers.every_penalty())
def test_padding_changes_nothing(name):
  rng = np.random.default_rng(4)
  logits = rng.normal(size=(2, 4, C))
  label = rng.integers(0, C, (2, 4))
  valid = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
  # Two more columns of padding, whatever they hold, the label too.
  longer = np.concatenate([logits, np.full((2, 2, C), np.nan)], axis=1)
  labels = np.concatenate([label, np.full((2, 2), -1)], axis=1)
  mask = np.concatenate([valid, np.zeros((2, 2), bool)], axis=1)
  loss_fn = helpers.loss_of(name, 0.3)
  grad_fn = helpers.jit(jax.value_and_grad(loss_fn, has_aux=True))
  out, more_out = (helpers.leaving_out(name, x) for x in (valid, mask))
  (loss, aux), grad = grad_fn(jnp.asarray(logits), label, **out)
  (padded, more), grad_padded = grad_fn(jnp.asarray(longer), labels, **more_out)
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


def test_the_published_mode_leaves_out_what_has_no_weight():
  """Padding counts; an example that is not there does not, nor its label."""
  logits, label = helpers.sample()
  counted = np.arange(N) < 4
  poisoned = np.where(counted[:, None], logits, np.inf)
  strange = np.where(counted, label, -1)
  for name in ("topk_level", "wrong_class_dispersion"):
    loss_fn = losses.restrained_softmax(
      losses.penalty(name), 0.1, fidelity="published"
    )
    expected, aux = loss_fn(jnp.asarray(logits[:4]), label[:4])
    loss, found = loss_fn(
      jnp.asarray(poisoned), strange, valid_weights=counted.astype(float)
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(found["penalty"], aux["penalty"], rtol=1e-12)
    assert found["num_valid"] == 4
    assert abs(loss_fn(jnp.asarray(logits), label)[0] - loss) > 1e-2


def test_labels_of_padding_are_classes_in_the_published_mode():
  logits, label = helpers.sample()
  valid = np.arange(N) < 4
  strange = np.where(valid, label, -1)
  loss_fn = losses.restrained_softmax(
    losses.topk_level(), 0.1, fidelity="published"
  )
  with pytest.raises(ValueError, match="labels must lie in 0"):
    loss_fn(jnp.asarray(logits), strange, valid)
  assert np.isnan(helpers.jit(loss_fn)(logits, strange, valid)[0])
  corrected = losses.restrained_softmax(losses.topk_level(), 0.1)
  for run in (corrected, helpers.jit(corrected)):
    assert np.isfinite(run(jnp.asarray(logits), strange, valid)[0])


@pytest.mark.parametrize("name", helpers.every_penalty())
def test_infinite_padding_is_not_looked_at(name):
  logits, label = helpers.sample()
  counted = np.arange(N) < 4
  poisoned = jnp.where(counted[:, None], logits, jnp.inf)
  loss_fn = helpers.loss_of(name, 0.3)
  out = helpers.leaving_out(name, counted)
  expected, _ = loss_fn(jnp.asarray(logits), label, **out)
  for run in (loss_fn, helpers.jit(loss_fn)):
    np.testing.assert_allclose(
      run(poisoned, label, **out)[0], expected, rtol=1e-12
    )


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
  logits, label = helpers.sample()
  none = np.zeros(N, bool)
  for name in helpers.every_penalty():
    loss_fn = helpers.loss_of(name, 1.0)
    with pytest.raises(ValueError, match="valid must be True somewhere"):
      loss_fn(jnp.asarray(logits), label, **helpers.leaving_out(name, none))
    grad_fn = helpers.jit(jax.value_and_grad(loss_fn, has_aux=True))
    out = helpers.leaving_out(name, none)
    (loss, aux), grad = grad_fn(jnp.asarray(logits), label, **out)
    assert loss == 0, name
    assert aux["num_valid"] == 0
    assert np.all(np.asarray(grad) == 0), name


def test_weights_convert_between_sum_and_mean():
  logits, label = helpers.sample()
  b = 0.003
  summed = helpers.value(
    losses.wrong_class_dispersion(reduction="sum_as_published"), logits, label
  )
  mean = helpers.value(losses.wrong_class_dispersion(), logits, label)
  weight = losses.mean_weight(losses.wrong_class_dispersion(), b, N, C)
  np.testing.assert_allclose(b * summed, weight * mean, rtol=1e-10)
  assert weight == pytest.approx(b * N * (C - 1))
  options = {"window": (0, 3), "space": "logit"}
  summed = helpers.value(
    losses.topk_level(**options, reduction="sum_as_published"), logits, label
  )
  mean = helpers.value(losses.topk_level(**options), logits, label)
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


def test_top_k_equals_a_full_sort_of_a_thousand_classes():
  logits, label = helpers.sample(items=5, classes=1000)
  wrong, _ = helpers.wrong_of(logits, label)
  ordered = -np.sort(-wrong, axis=1)
  for start, stop in ((0, 4), (4, 13), (0, 100)):
    levels = losses.topk_level(window=(start, stop), space="logit").items
    found = jax.jit(levels)(jnp.asarray(logits), label)
    part = jnp.asarray(ordered[:, start:stop])
    assert np.array_equal(found, jnp.sum(part, axis=1) / (stop - start))


def test_large_vocabularies_are_never_sorted():
  logits = jax.ShapeDtypeStruct((2, 50_257), jnp.float32)
  label = jax.ShapeDtypeStruct((2,), jnp.int32)
  for name in helpers.every_penalty():
    loss_fn = helpers.loss_of(name, 1.0)
    grad_fn = jax.grad(lambda z, y, fn=loss_fn: fn(z, y)[0])
    text = str(jax.make_jaxpr(grad_fn)(logits, label))
    assert " sort[" not in text, name
    for number in (part.split("]")[0] for part in text.split("top_k[")[1:]):
      assert "50" not in number.split("k=")[1].split()[0], name


def test_changing_labels_do_not_compile_again(caplog):
  loss_fn = jax.jit(losses.restrained_softmax(losses.topk_level(), 1.0))
  logits, label = helpers.sample()
  loss_fn(logits, label)
  with jax.log_compiles():
    loss_fn(logits, (label + 1) % C)
  assert not [r for r in caplog.records if "Compiling" in r.getMessage()]


def test_bfloat16_logits_give_a_float32_loss():
  logits, label = helpers.sample()
  low = jnp.asarray(logits, jnp.bfloat16)
  for name in helpers.every_penalty():
    loss_fn = helpers.loss_of(name, 1.0)
    loss, aux = helpers.jit(loss_fn)(low, label)
    assert loss.dtype == aux["penalty"].dtype == jnp.float32
    exact, _ = helpers.jit(loss_fn)(low.astype(jnp.float32), label)
    np.testing.assert_allclose(loss, exact, rtol=1e-6)


def test_aux_is_what_it_says():
  logits, label = helpers.sample()
  loss_fn = losses.restrained_softmax(losses.topk_level(window=(0, 3)), 0.7)
  loss, aux = loss_fn(jnp.asarray(logits), label)
  wrong, _ = helpers.wrong_of(logits, label)
  own = logits[np.arange(N), label]
  ce = np.mean(scipy.special.logsumexp(logits, axis=1) - own)
  expected = {
    "ce": ce,
    "penalty": helpers.value(losses.topk_level(window=(0, 3)), logits, label),
    "level_spread": np.std(helpers.levels_of(logits, label, (0, 3), True)),
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
  logits, label = helpers.sample()
  for name in helpers.every_penalty():
    loss_fn = helpers.loss_of(name, 1.0)
    bad = np.array(logits)
    bad[0, (label[0] + 1) % C] = np.nan
    assert np.isnan(loss_fn(jnp.asarray(bad), label)[0]), name
    bad[0, (label[0] + 1) % C] = -np.inf
    with pytest.raises(ValueError, match="logits must be finite"):
      loss_fn(jnp.asarray(bad), label)
    assert np.isnan(jax.jit(loss_fn)(bad, label)[0]), name


def test_soft_labels_go_with_penalties_without_a_label():
  logits, label = helpers.sample()
  soft = np.full((N, C), 0.1 / C)
  soft[np.arange(N), label] += 0.9
  smoothed = jnp.mean(
    losses.cross_entropy(jnp.asarray(logits), label, label_smoothing=0.1)
  )
  for name in helpers.every_penalty():
    loss_fn = helpers.loss_of(name, 0.1)
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
