"""The outer loop: certified steps are taken, others change nothing."""

import hypergrad_problems as problems
import jax
import jax.numpy as jnp
import numpy as np
import optax

from robust_mm import hypergrad
from robust_mm import linalg

EXACT = hypergrad.conjugate_gradient(30)


def _ridge_step(**arguments):
  inner, outer, solve, phi = problems.weighted_ridge()
  gradient = hypergrad.hypergradient(
    inner, outer, solver=EXACT, max_explicit=64
  )
  step = hypergrad.outer_step(gradient, optax.adam(0.05), **arguments)
  return step, outer, solve, phi


def test_descent_lowers_the_outer_loss_of_the_solved_problem():
  step, outer, solve, phi = _ridge_step()
  state = step.init(phi)

  @jax.jit
  def run(state, key):
    return step.update(state, solve(state.phi), key=key)

  for i in range(25):
    state, info = run(state, jax.random.key(i))
    assert info.accepted
    assert info.bounds_age == 0
  assert outer(solve(state.phi), state.phi) < 0.8 * outer(solve(phi), phi)
  assert (state.num_accepted, state.num_rejected) == (25, 0)
  # A plain pytree of arrays, which comes back from its leaves.
  leaves, structure = jax.tree.flatten(state)
  assert all(isinstance(leaf, jax.Array) for leaf in leaves)
  again, _ = run(jax.tree.unflatten(structure, leaves), jax.random.key(99))
  after, _ = run(state, jax.random.key(99))
  jax.tree.map(np.testing.assert_array_equal, again, after)


def test_a_refused_step_changes_nothing_but_the_count():
  inner, outer, theta, phi = problems.small_quadratic(low=0.001)
  gradient = hypergrad.hypergradient(
    inner,
    outer,
    solver=hypergrad.identity(),
    operator=hypergrad.damped(0.1),
    on_reject="keep",
  )
  step = hypergrad.outer_step(gradient, optax.adam(0.05))
  state = step.init(phi)
  after, info = jax.jit(step.update)(state, theta, key=jax.random.key(0))
  assert not info.accepted
  assert (after.num_accepted, after.num_rejected) == (0, 1)
  jax.tree.map(
    np.testing.assert_array_equal,
    (after.phi, after.opt_state),
    (state.phi, state.opt_state),
  )


def test_no_coordinate_moves_by_more_than_the_clip():
  inner, outer, theta, phi = problems.small_quadratic()
  gradient = hypergrad.hypergradient(inner, outer, solver=EXACT)
  moved = {}
  for clip in (0.1, None):
    step = hypergrad.outer_step(gradient, optax.sgd(10.0), step_clip=clip)
    state = step.init(phi)
    after, _ = jax.jit(step.update)(state, theta, key=jax.random.key(0))
    moved[clip] = np.abs(after.phi - phi)
  assert np.max(moved[0.1]) <= 0.1 + 1e-6
  assert np.max(moved[None]) > 0.2


def test_bounds_are_kept_for_a_while_and_measured_anew_when_refuted():
  step, _, solve, phi = _ridge_step(refresh_every=3)
  state, theta = step.init(phi), solve(phi)
  update = jax.jit(step.update)
  ages, spent = [], []
  for i in range(7):
    state, info = update(state, theta, key=jax.random.key(i))
    ages.append(int(info.bounds_age))
    spent.append(int(info.num_matvecs))
    assert (info.failure_probability == 1) == (ages[-1] > 0)
  assert ages == [0, 1, 2, 0, 1, 2, 0]
  assert [n - 31 for n in spent] == [12, 0, 0, 12, 0, 0, 12]
  # Stale bounds of a far flatter problem: seen, refused, and not kept.
  stale = linalg.SpectralBounds(*[0.1 * a for a in state.spectrum])
  spoiled, info = update(
    state._replace(spectrum=stale, bounds_age=jnp.array(1, jnp.int32)),
    theta,
    key=jax.random.key(9),
  )
  assert not info.certified
  assert not info.accepted
  jax.tree.map(np.testing.assert_array_equal, spoiled.phi, state.phi)
  healed, info = update(spoiled, theta, key=jax.random.key(10))
  assert info.bounds_age == 0
  assert info.accepted
  assert healed.num_accepted == spoiled.num_accepted + 1
