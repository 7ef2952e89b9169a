"""Token substitutions against exhaustive search, and what they must not do."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import attacks

V, T, D = 5, 4, 3


def problem(seed=0, size=6):
  rng = np.random.default_rng(seed)
  table = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
  weight = jnp.asarray(rng.normal(size=(T, D)), jnp.float32)
  ids = jnp.asarray(rng.integers(0, V, (size, T)))

  def loss_fn(letters):
    linear = jnp.einsum("btd,td->b", letters, weight)
    return linear + 0.3 * jnp.sum(jnp.sin(2 * letters), axis=(1, 2))

  return table, ids, loss_fn


def loss_of(table, ids, loss_fn):
  return np.asarray(loss_fn(jnp.take(table, jnp.asarray(ids), axis=0)))


def best_of(table, ids, loss_fn, editable):
  """The best single substitution, by trying all."""
  best = loss_of(table, ids, loss_fn)
  for place, token in itertools.product(range(T), range(V)):
    tried = np.array(ids)
    tried[:, place] = np.where(editable[:, place], token, tried[:, place])
    best = np.maximum(best, loss_of(table, tried, loss_fn))
  return best


@pytest.mark.parametrize("number", [1, 2, 4])
def test_with_all_candidates_it_is_the_greedy_optimum(number):
  table, ids, loss_fn = problem()
  editable = np.ones((6, T), bool)
  editable[:, 0] = False
  found = attacks.substitute(
    loss_fn,
    ids,
    table,
    editable=editable,
    num_substitutions=number,
    num_candidates=V * T,
  )
  changed = np.asarray(found != ids)
  assert not changed[:, 0].any()
  assert changed.sum(axis=1).max() <= number
  assert np.all(loss_of(table, found, loss_fn) >= loss_of(table, ids, loss_fn))
  if number == 1:
    best = best_of(table, ids, loss_fn, editable)
    np.testing.assert_allclose(loss_of(table, found, loss_fn), best, rtol=1e-5)


def test_first_order_ranking_is_exact_for_a_linear_loss():
  table, ids, _ = problem()
  weight = jnp.asarray(np.random.default_rng(1).normal(size=(T, D)))
  linear = lambda e: jnp.einsum("btd,td->b", e, weight)  # noqa: E731
  editable = np.ones((6, T), bool)
  found = attacks.substitute(
    linear, ids, table, editable=editable, num_candidates=1
  )
  best = best_of(table, ids, linear, editable)
  np.testing.assert_allclose(loss_of(table, found, linear), best, rtol=1e-5)


def test_only_allowed_tokens_are_put_in():
  table, ids, loss_fn = problem(2)
  allowed = np.arange(V) > 2
  found = jax.jit(
    lambda ids: attacks.substitute(
      loss_fn,
      ids,
      table,
      editable=jnp.ones(ids.shape, bool),
      allowed=allowed,
      num_substitutions=3,
    )
  )(ids)
  changed = np.asarray(found != ids)
  assert changed.any()
  assert np.all(allowed[np.asarray(found)[changed]])


def test_bad_arguments_are_refused():
  table, ids, loss_fn = problem()
  with pytest.raises(ValueError, match="editable must be bool of shape"):
    attacks.substitute(loss_fn, ids, table, editable=np.ones(3, bool))
  with pytest.raises(ValueError, match="num_substitutions must be an integer"):
    attacks.substitute(
      loss_fn,
      ids,
      table,
      editable=np.ones(ids.shape, bool),
      num_substitutions=0,
    )
