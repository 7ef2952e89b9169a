"""Margins, ratios and radii against NumPy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from robust_mm import margins


@pytest.fixture(autouse=True)
def _strict_dtypes():
  with jax.numpy_dtype_promotion("strict"):
    yield


def _sample(seed, batch=6, classes=5, names=("a", "b", "c")):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(batch, classes)).astype(np.float32)
  label = rng.integers(0, classes, batch)
  spread = {
    m: rng.uniform(0.1, 2, (batch, classes)).astype(np.float32) for m in names
  }
  for m in names:
    spread[m][np.arange(batch), label] = 0
  return jnp.asarray(logits), label, jax.tree.map(jnp.asarray, spread)


def test_pairwise_equals_numpy():
  logits, label, _ = _sample(0)
  expected = np.asarray(logits)[np.arange(6), label][:, None] - logits
  expected = np.array(expected)
  expected[np.arange(6), label] = np.inf
  np.testing.assert_array_equal(margins.pairwise(logits, label), expected)


def test_of_scores_is_pairwise_per_modality():
  logits, label, spread = _sample(1)
  found = margins.of_scores({"x": logits, **spread}, label)
  np.testing.assert_array_equal(found["x"], margins.pairwise(logits, label))
  assert sorted(found) == ["a", "b", "c", "x"]


def test_smooth_margin_is_between_its_bounds_and_tends_to_the_hard_one():
  logits, label, _ = _sample(2)
  margin = margins.pairwise(logits, label)
  hard = margins.smallest(margin)
  for temperature in (1.0, 0.1, 1e-3):
    smooth = margins.smooth_smallest(margin, temperature=temperature)
    assert jnp.all(smooth <= hard + 1e-6)
    assert jnp.all(smooth >= hard - temperature * np.log(4) - 1e-6)


@pytest.mark.parametrize(
  "margin, sensitivity, expected",
  [
    (2.0, 4.0, 0.5),
    (-2.0, 4.0, -0.5),
    (1.0, 0.0, np.inf),
    (0.0, 0.0, 0.0),
    (-3.0, 0.0, -3.0),
    (np.inf, 0.0, np.inf),
    (np.inf, 2.0, np.inf),
    (1.0, np.inf, 0.0),
  ],
)
def test_ratio_edge_cases_have_finite_gradients(margin, sensitivity, expected):
  args = jnp.float32(margin), jnp.float32(sensitivity)
  assert margins.ratio(*args) == expected
  for grad in jax.grad(margins.ratio, (0, 1))(*args):
    assert jnp.isfinite(grad)


def test_ratio_of_a_wrong_example_does_not_reward_a_larger_denominator():
  slope = jax.grad(margins.ratio, 1)
  assert slope(jnp.float32(-1.0), jnp.float32(2.0)) == 0
  assert slope(jnp.float32(1.0), jnp.float32(2.0)) == -0.25


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norm_neither_overflows_nor_underflows(scale):
  vector = jnp.asarray([3.0, 4.0], jnp.float32) * jnp.float32(scale)
  np.testing.assert_allclose(margins.norm(vector), 5 * scale, rtol=1e-6)
  np.testing.assert_allclose(
    jax.grad(margins.norm)(vector), [0.6, 0.8], rtol=1e-6
  )


def test_norm_at_zero_has_gradient_zero_and_keeps_nan_and_inf():
  zero = jnp.zeros(3, jnp.float32)
  assert margins.norm(zero) == 0
  assert jnp.all(jax.grad(margins.norm)(zero) == 0)
  assert jnp.isnan(margins.norm(zero.at[0].set(jnp.nan)))
  assert margins.norm(zero.at[0].set(jnp.inf)) == jnp.inf


@pytest.mark.parametrize(
  "ball, reduce",
  [
    ("l2", lambda s: np.sqrt((s**2).sum(-1))),
    ("linf", lambda s: s.sum(-1)),
    ("l1", lambda s: s.max(-1)),
  ],
)
def test_joint_ratios_equal_numpy(ball, reduce):
  logits, label, spread = _sample(3)
  margin = margins.pairwise(logits, label)
  stacked = np.stack([spread[m] for m in "abc"], -1)
  with np.errstate(divide="ignore", invalid="ignore"):
    expected = np.asarray(margin) / reduce(stacked)
  np.testing.assert_allclose(
    margins.joint_ratios(margin, spread, ball=ball), expected, rtol=1e-6
  )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_bracket_of_the_joint_radius(seed):
  logits, _, spread = _sample(seed)
  label = np.argmax(np.asarray(logits), -1)
  spread = {
    m: jnp.where(margins.one_hot(label, 5), 0, s + jnp.float32(0.05))
    for m, s in spread.items()
  }
  margin = margins.pairwise(logits, label)
  joint = margins.joint_ratios(margin, spread)
  single = margins.modality_ratios(margin, spread)
  rival = ~np.asarray(margins.one_hot(label, 5))
  per_class = sum(1 / np.asarray(r, np.float64) ** 2 for r in single.values())
  np.testing.assert_allclose(
    1 / np.asarray(joint, np.float64)[rival] ** 2, per_class[rival], rtol=1e-5
  )
  radius = np.asarray(margins.radii(joint), np.float64)
  alone = np.stack([margins.radii(r) for r in single.values()]).astype(float)
  lower = (1 / alone**2).sum(0) ** -0.5
  assert np.all(lower <= radius * (1 + 1e-6))
  assert np.all(radius <= alone.min(0) * (1 + 1e-6))


def test_budget_ratios_are_the_common_growth_factor():
  logits, label, spread = _sample(4)
  margin = margins.pairwise(logits, label)
  found = margins.budget_ratios(margin, spread, {"a": 0.5, "c": 0.25})
  cost = 0.5 * np.asarray(spread["a"]) + 0.25 * np.asarray(spread["c"])
  rival = ~np.asarray(margins.one_hot(label, 5))
  expected = np.asarray(margin)[rival] / cost[rival]
  np.testing.assert_allclose(np.asarray(found)[rival], expected, rtol=1e-6)
  with pytest.raises(ValueError, match="budgets names the unknown"):
    margins.budget_ratios(margin, spread, {"d": 0.5})


def test_shortfall_tends_to_the_hinge_and_ignores_masked_entries():
  ratios = jnp.asarray([[0.1, 0.5, jnp.inf], [2.0, 3.0, jnp.inf]], jnp.float32)
  hinge = margins.hard_shortfall(ratios, target=0.3)
  np.testing.assert_allclose(hinge, [0.2, 0.0], atol=1e-7)
  smooth = margins.shortfall(ratios, target=0.3, temperature=1e-3)
  np.testing.assert_allclose(smooth, hinge, atol=1e-3)
  everything = jnp.full((1, 3), jnp.inf)
  value, grad = jax.value_and_grad(
    lambda r: jnp.sum(margins.shortfall(r, target=0.3, temperature=0.1))
  )(everything)
  assert value == 0
  assert jnp.all(grad == 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_is_preserved(dtype):
  logits, label, spread = _sample(5)
  logits = logits.astype(dtype)
  spread = {m: s.astype(dtype) for m, s in spread.items()}
  margin = margins.pairwise(logits, label)
  ratios = margins.joint_ratios(margin, spread)
  assert margin.dtype == ratios.dtype == margins.radii(ratios).dtype == dtype


@pytest.mark.parametrize(
  "label", [[0, 5], [-1, 0], [0.0, 1.0], [[0, 1], [1, 0]], [0]]
)
def test_bad_labels_are_refused_by_name(label):
  with pytest.raises(ValueError, match="label"):
    margins.pairwise(jnp.zeros((2, 5)), np.asarray(label))


def test_one_class_is_refused():
  with pytest.raises(ValueError, match="two classes"):
    margins.pairwise(jnp.zeros((2, 1)), np.zeros(2, int))
