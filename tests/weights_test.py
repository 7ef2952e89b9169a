"""Averages of parameters, against a loop in NumPy."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_mm import weights


def follow(path, decay, dtype=jnp.float32):
  """The average after each of the parameters of a path [n + 1]."""
  params = jnp.asarray(path, dtype)
  step = jax.jit(
    lambda average, value, count: weights.moving_average(
      average, value, decay=decay, count=count
    )
  )
  average = weights.start_average({"a": params[0], "frozen": None})
  found = []
  for count, value in enumerate(params[1:], start=1):
    average = step(average, {"a": value, "frozen": None}, count)
    found.append(average["a"])
  assert average["frozen"] is None
  return jnp.stack(found)


def by_hand(path, decay):
  average, found = path[0], []
  for t, value in enumerate(path[1:], start=1):
    d = min(decay, (1 + t) / (10 + t))
    average = d * average + (1 - d) * value
    found.append(average)
  return np.array(found)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_the_average_is_the_closed_form(decay):
  path = np.random.default_rng(0).normal(size=30)
  np.testing.assert_allclose(follow(path, decay), by_hand(path, decay), 1e-5)


def test_early_averages_have_forgotten_where_training_began():
  """Without the early decays, 0.999^20 = 0.98 of the start were left."""
  found = follow(np.array([1.0] + 20 * [0.0]), 0.999)
  assert found[-1] < 1e-6


def test_narrow_parameters_are_averaged_in_float32_and_come_back():
  """In bfloat16 the last bit of 1 is 0.008: 1 + 0.0015 is 1 again."""
  path = np.array([1.0] * 50 + [1.01])
  path = np.asarray(jnp.asarray(path, jnp.bfloat16), np.float64)
  found = follow(path, 0.999, jnp.bfloat16)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found[-1], by_hand(path, 0.999)[-1], rtol=1e-6)
  assert 1.0005 < found[-1] < 1.003
  back = optax.tree.cast_like({"a": found}, {"a": jnp.zeros((), jnp.bfloat16)})
  assert back["a"].dtype == jnp.bfloat16


def test_the_example_holds():
  assert doctest.testmod(weights) == (0, 4)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_out_of_range_is_refused(decay):
  with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
    weights.moving_average(jnp.ones(2), jnp.ones(2), decay=decay, count=1)
