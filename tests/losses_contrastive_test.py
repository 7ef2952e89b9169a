"""InfoNCE: closed forms, and rows that do not take part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import losses


def unit(seed, size=6, width=5):
  z = np.random.default_rng(seed).normal(size=(size, width))
  return jnp.asarray(z / np.linalg.norm(z, axis=1, keepdims=True), jnp.float32)


def in_numpy(first, second, scale):
  """Both cross-entropies, written out."""
  first, second = (np.asarray(z, np.float64) for z in (first, second))
  size, total = len(first), 0.0
  for a, b in ((first, second), (second, first)):
    for i in range(size):
      logits = [scale * np.dot(a[i], b[j]) for j in range(size)]
      total += np.log(np.sum(np.exp(logits))) - logits[i]
  return total / (2 * size)


def test_info_nce_is_both_cross_entropies():
  first, second = unit(0), unit(1)
  found = losses.info_nce(first, second, scale=3.0)
  np.testing.assert_allclose(found, in_numpy(first, second, 3.0), atol=1e-5)
  np.testing.assert_allclose(
    losses.info_nce(second, first, scale=3.0), found, atol=1e-6
  )


@pytest.mark.parametrize("poison", [0.0, 1e6, np.nan])
def test_masked_rows_leave_numerator_and_denominator(poison):
  first, second = unit(0), unit(1)
  present = jnp.array([True, False, True, True, False, True])
  rows = np.flatnonzero(present)

  def masked(first, second):
    return losses.info_nce(first, second, scale=9.0, present=present)

  def short(first, second):
    return losses.info_nce(first, second, scale=9.0)

  gone = ~present[:, None]
  filled = jnp.where(gone, poison, first)
  value, grads = jax.value_and_grad(masked, (0, 1))(filled, second)
  wanted, those = jax.value_and_grad(short, (0, 1))(first[rows], second[rows])
  np.testing.assert_allclose(value, wanted, atol=1e-5)
  # The test can fail: with the other rows as rivals it is another number.
  assert abs(short(first, second) - wanted) > 1e-2
  for grad, small in zip(grads, those):
    np.testing.assert_allclose(grad[rows], small, atol=1e-5)
    assert np.all(np.delete(np.asarray(grad), rows, axis=0) == 0)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_identical_embeddings_have_the_logarithm_of_the_rows(size):
  z = jnp.tile(unit(0, 1), (size + 2, 1))
  present = jnp.arange(size + 2) < size
  found = losses.info_nce(z, z, scale=14.3, present=present)
  np.testing.assert_allclose(found, np.log(size), atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_complete_rows_are_nothing(rows):
  present = jnp.arange(6) < rows
  grad_fn = jax.value_and_grad(
    lambda z: losses.info_nce(z, unit(1), scale=5.0, present=present)
  )
  value, grad = grad_fn(unit(0))
  assert value == 0
  assert np.all(np.asarray(grad) == 0)


def test_info_nce_refuses_by_name():
  with pytest.raises(ValueError, match="scale must be positive"):
    losses.info_nce(unit(0), unit(1), scale=0.0)
