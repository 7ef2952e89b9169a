"""Interpolation of weights: bit-identical ends, float32 between, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import weights

HARD = np.array([-0.0, 0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38], "float32")


def _trees(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  start = {
    "layer": [jnp.asarray(HARD, dtype), jnp.asarray(rng.normal(size=7), dtype)],
    "none": None,
    "count": jnp.array(3),
    "key": jax.random.key(1),
  }
  end = {
    "layer": [
      jnp.asarray(rng.normal(size=7), dtype),
      jnp.asarray(HARD[::-1].copy(), dtype),
    ],
    "none": None,
    "count": jnp.array(9),
    "key": jax.random.key(2),
  }
  return start, end


def _bits(leaf):
  return np.asarray(leaf).tobytes()


def _same_floats(found, expected):
  for one, other in zip(found["layer"], expected["layer"]):
    assert one.dtype == other.dtype
    assert _bits(one) == _bits(other)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("traced", [False, True])
def test_the_ends_are_bit_identical(dtype, traced):
  start, end = _trees(dtype)
  between = jax.jit(weights.interpolate) if traced else weights.interpolate
  for alpha, expected in ((0, start), (1, end), (0.0, start), (1.0, end)):
    found = between(start, end, alpha)
    _same_floats(found, expected)
    assert found["none"] is None
  # The formula alone would not have done it.
  naive = 0.0 * np.float32(1.0) + 1.0 * HARD[:1] * np.float32(1.0)
  assert _bits(naive) != _bits(HARD[:1])
  with np.errstate(invalid="ignore"):
    assert np.isnan(0 * HARD[2] + 1.0)


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("traced", [False, True])
def test_leaves_that_are_no_floats_are_those_of_end(alpha, traced):
  start, end = _trees()
  between = jax.jit(weights.interpolate) if traced else weights.interpolate
  found = between(start, end, alpha)
  assert int(found["count"]) == 9
  assert jax.random.key_data(found["key"]).tolist() == [0, 2]


def test_half_of_integers_is_exact():
  rng = np.random.default_rng(1)
  first, last = rng.integers(-(2**20), 2**20, (2, 500))
  found = weights.interpolate(
    jnp.asarray(first, jnp.float32), jnp.asarray(last, jnp.float32), 0.5
  )
  assert np.array_equal(np.asarray(found, np.float64), (first + last) / 2)


@pytest.mark.parametrize("traced", [False, True])
def test_between_is_the_formula_in_double_precision(traced):
  rng = np.random.default_rng(2)
  first, last = rng.normal(size=(2, 1000)).astype(np.float32)
  between = jax.jit(weights.interpolate) if traced else weights.interpolate
  for alpha in np.arange(1, 10) / 10:
    expected = (1 - alpha) * first.astype(float) + alpha * last.astype(float)
    found = between(first, last, float(alpha))
    np.testing.assert_allclose(found, expected, atol=3e-7)


def test_narrow_leaves_are_mixed_in_float32():
  """In bfloat16 0.9 is 0.8984, and 0.9 * 1 + 0.1 * 1 would not be 1."""
  ones = jnp.ones(3, jnp.bfloat16)
  found = weights.interpolate(ones, ones, 0.1)
  assert found.dtype == jnp.bfloat16
  assert found.tolist() == [1.0] * 3
  rng = np.random.default_rng(3)
  first, last = jnp.asarray(rng.normal(size=(2, 500)), jnp.bfloat16)
  expected = 0.9 * np.asarray(first, float) + 0.1 * np.asarray(last, float)
  found = np.asarray(weights.interpolate(first, last, 0.1), float)
  # Half a unit in the last place of 8 bits, and nothing on top.
  assert np.all(np.abs(found - expected) <= np.abs(expected) * 2**-8 + 1e-7)


def test_beyond_the_ends_only_when_asked():
  start, end = jnp.array([1.0]), jnp.array([3.0])
  found = weights.interpolate(start, end, 1.5, extrapolate=True)
  assert found.tolist() == [4.0]
  found = weights.interpolate(start, end, -1, extrapolate=True)
  assert found.tolist() == [-1.0]
  for alpha in (1.5, -0.1, float("nan"), float("inf")):
    with pytest.raises(ValueError, match="alpha must lie"):
      weights.interpolate(start, end, alpha)
  for alpha in (float("nan"), float("inf")):
    with pytest.raises(ValueError, match="alpha must be finite"):
      weights.interpolate(start, end, alpha, extrapolate=True)
  with pytest.raises(ValueError, match="alpha must be one number"):
    weights.interpolate(start, end, jnp.array([0.5]))
  with pytest.raises(ValueError, match="alpha must be a number"):
    weights.interpolate(start, end, "0.5")


def test_a_path_of_models_in_one_vmap():
  alphas = jnp.linspace(0, 1, 11)
  start, end = {"w": jnp.array([0.0, -0.0])}, {"w": jnp.array([10.0, -0.0])}
  path = jax.vmap(weights.interpolate, (None, None, 0))(start, end, alphas)
  np.testing.assert_allclose(path["w"][:, 0], np.arange(11), rtol=1e-6)
  assert np.signbit(path["w"][[0, -1], 1]).all()


@pytest.mark.parametrize(
  "start, end, message",
  [
    ({"a": {"w": 1.0}}, {"a": {}}, "end has no leaf 'a/w'"),
    ({"a": {}}, {"a": {"w": 1.0}}, "start has no leaf 'a/w'"),
    ({"a": None}, {"a": 1.0}, "start has no leaf 'a'"),
    (
      {"a": {"w": np.zeros(2)}},
      {"a": {"w": np.zeros(3)}},
      r"same shape at 'a/w', got \(2,\) and \(3,\)",
    ),
    (
      {"w": np.zeros(2, "float32")},
      {"w": np.zeros(2, "int32")},
      "same dtype at 'w', got float32 and int32",
    ),
    ((1.0, 2.0), [1.0, 2.0], "same structure"),
  ],
)
def test_trees_that_differ_are_refused_by_path(start, end, message):
  with pytest.raises(ValueError, match=message):
    weights.interpolate(start, end, 0.5)
