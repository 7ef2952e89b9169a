"""Solvers against dense algebra, unrolled descent and another library."""

import hypergrad_problems as problems
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest

from robust_mm import hypergrad


def _spd(seed=0, size=20, condition=124.0):
  rng = np.random.default_rng(seed)
  values = np.geomspace(1 / condition, 1, size)
  matrix, _ = problems.symmetric(rng, values)
  return matrix, rng.normal(size=size), values


def _counting(matrix):
  """A product that counts how often it really runs."""
  calls = []
  matrix = jnp.asarray(matrix, jnp.float32)

  def matvec(x):
    jax.debug.callback(lambda: calls.append(1))
    return matrix @ x

  return matvec, calls


@pytest.mark.parametrize("num_steps", [0, 1, 7, 1000])
def test_neumann_is_the_dense_series_and_its_residual_the_next_term(num_steps):
  A, v, values = _spd()
  alpha = 1 / values[-1]
  with jax.enable_x64(True):
    bounds = hypergrad.Interval(jnp.array(values[0]), jnp.array(1.0), alpha)
    found = hypergrad.neumann(num_steps)(
      lambda x: jnp.asarray(A) @ x, jnp.asarray(v), bounds
    )
    step = np.eye(20) - alpha * A
    powers = [np.linalg.matrix_power(step, k) @ v for k in range(num_steps + 2)]
    np.testing.assert_allclose(found.x, alpha * sum(powers[:-1]), atol=1e-12)
    np.testing.assert_allclose(found.residual, powers[-1], atol=1e-12)
    assert not found.refuted
    if num_steps == 0:
      np.testing.assert_array_equal(found.x, alpha * v)
    if num_steps == 1000:
      exact = np.linalg.solve(A, v)
      assert problems.relative_error(found.x, exact) < 1e-3
    assert found.num_matvecs == num_steps + 1


def test_leaving_the_step_size_out_rescales():
  A, v, _ = _spd()
  matvec = lambda x: jnp.asarray(A, jnp.float32) @ x  # noqa: E731
  found = hypergrad.neumann(5, step_size=0.25)(matvec, jnp.asarray(v))
  total, term = v, v
  for _ in range(5):
    term = term - 0.25 * A @ term
    total = total + term
  np.testing.assert_allclose(found.x, 0.25 * total, rtol=1e-5, atol=1e-6)
  assert problems.relative_error(found.x, total) > 0.7


def test_a_truncated_series_is_unrolled_gradient_descent():
  with jax.enable_x64(True):
    inner, outer, solve, phi = problems.weighted_ridge(dtype=jnp.float64)
    theta, alpha, steps = solve(phi), 0.05, 9

    def unrolled(phi):
      def descend(t, _):
        gradient = jax.grad(inner)(t, phi)
        return jax.tree.map(lambda a, g: a - alpha * g, t, gradient), None

      return outer(jax.lax.scan(descend, theta, length=steps + 1)[0], phi)

    gradient = hypergrad.hypergradient(
      inner,
      outer,
      solver=hypergrad.neumann(steps, step_size=alpha),
      operator=hypergrad.ift(),
      bounds=None,
      max_explicit=64,
    )
    found, info = jax.jit(gradient)(theta, phi, key=jax.random.key(0))
    assert info.accepted
    assert not info.certified
    expected = jax.jit(jax.grad(unrolled))(phi)
    assert problems.relative_error(found, expected) < 1e-10


def test_conjugate_gradients_agree_with_lineax():
  A, v, _ = _spd(3)
  A, v = jnp.asarray(A, jnp.float32), jnp.asarray(v, jnp.float32)
  operator = lineax.MatrixLinearOperator(A, lineax.positive_semidefinite_tag)
  solver = lineax.CG(rtol=1e-7, atol=1e-7)
  expected = lineax.linear_solve(operator, v, solver, throw=False).value
  found = hypergrad.conjugate_gradient(60)(lambda x: A @ x, v)
  assert problems.relative_error(found.x, expected) < 1e-5
  # And a few steps are not enough for that.
  early = hypergrad.conjugate_gradient(5)(lambda x: A @ x, v)
  assert problems.relative_error(early.x, expected) > 1e-2


def test_conjugate_gradients_stay_where_they_converged():
  A, v = jnp.diag(jnp.array([1.0, 4.0, 9.0])), jnp.ones(3)
  long, short = (
    hypergrad.conjugate_gradient(k)(lambda x: A @ x, v) for k in (50, 3)
  )
  np.testing.assert_allclose(long.x, short.x, rtol=1e-5)
  np.testing.assert_allclose(long.x, [1, 1 / 4, 1 / 9], rtol=1e-5)


def test_negative_curvature_is_seen_and_stops_conjugate_gradients():
  A = jnp.diag(jnp.array([1.0, 1.0, -2.0]))
  found = hypergrad.conjugate_gradient(5)(lambda x: A @ x, jnp.ones(3))
  assert found.negative_curvature
  np.testing.assert_array_equal(found.x, jnp.zeros(3))
  clean = hypergrad.conjugate_gradient(5)(lambda x: jnp.abs(A) @ x, jnp.ones(3))
  assert not clean.negative_curvature


@pytest.mark.parametrize(
  "solver, products",
  [
    (hypergrad.neumann(7), 8),
    (hypergrad.neumann(0), 1),
    (hypergrad.identity(), 1),
    (hypergrad.conjugate_gradient(7), 8),
  ],
)
def test_products_are_counted(solver, products):
  A, v, _ = _spd()
  matvec, calls = _counting(A)
  bounds = hypergrad.Interval(jnp.array(0.008), jnp.array(1.0), jnp.array(1.0))
  found = solver(matvec, jnp.asarray(v, jnp.float32), bounds)
  jax.effects_barrier()
  assert len(calls) == products == found.num_matvecs


@pytest.mark.parametrize(
  "make, start, rounds",
  [(hypergrad.neumann, 10, 0), (hypergrad.conjugate_gradient, 4, 1)],
)
def test_doubling_stops_at_what_is_good_enough(make, start, rounds):
  """The series wastes no product; conjugate gradients one a round."""
  A, v, _ = _spd(1, condition=30)
  matvec, calls = _counting(A)
  v = jnp.asarray(v, jnp.float32)
  bounds = hypergrad.Interval(jnp.array(1 / 30), jnp.array(1.0), jnp.array(1.0))

  def small(x, residual):
    del x
    return jnp.linalg.norm(residual) < 0.1 * jnp.linalg.norm(v)

  found = make(start, max_steps=16 * start)(matvec, v, bounds, accept=small)
  jax.effects_barrier()
  assert len(calls) == found.num_matvecs
  taken = start
  while not small(None, make(taken)(matvec, v, bounds).residual):
    taken *= 2
  assert start < taken < 16 * start
  doublings = int(np.log2(taken // start))
  assert found.num_matvecs == taken + 1 + rounds * doublings
  whole = make(taken)(matvec, v, bounds)
  np.testing.assert_allclose(found.x, whole.x, rtol=1e-3, atol=1e-4)
  never = make(3, max_steps=10)(matvec, v, bounds, accept=lambda x, r: r[0] > 9)
  assert never.num_matvecs == 11 + 2 * rounds


def test_solvers_are_values():
  assert hypergrad.neumann(3) == hypergrad.neumann(3)
  assert hash(hypergrad.neumann(3)) == hash(hypergrad.neumann(3))
  assert hypergrad.identity(scale=0.1) == hypergrad.neumann(0, step_size=0.1)
  assert hypergrad.neumann(3) != hypergrad.conjugate_gradient(3)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: hypergrad.neumann(-1), "num_steps"),
    (lambda: hypergrad.neumann(5, max_steps=4), "max_steps"),
    (lambda: hypergrad.neumann(5, step_size=0.0), "step_size"),
    (lambda: hypergrad.conjugate_gradient(0), "num_steps"),
    (lambda: hypergrad.conjugate_gradient(5, max_steps=2), "max_steps"),
    (lambda: hypergrad.identity(scale=-1.0), "scale"),
    (lambda: hypergrad.damped(0.0), "delta"),
    (lambda: hypergrad.damped(-1.0), "delta"),
    (lambda: hypergrad.damped(ratio=0.0), "ratio"),
    (lambda: hypergrad.published(1.0), "q must be between 0 and 1"),
    (lambda: hypergrad.published(0.0), "q must be between 0 and 1"),
    (lambda: hypergrad.lanczos_bounds(0), "num_steps"),
    (
      lambda: hypergrad.lanczos_bounds(failure_probability=1.0),
      "failure_probability",
    ),
    (lambda: hypergrad.known_bounds(lower=2.0, upper=1.0), "lower"),
    (lambda: hypergrad.known_bounds(lower=0.0, upper=np.inf), "upper"),
    (
      lambda: hypergrad.neumann(3)(lambda x: x, jnp.ones(2)),
      "neumann needs bounds",
    ),
    (
      lambda: hypergrad.identity()(lambda x: x, jnp.ones(2)),
      "needs bounds, or a step_size",
    ),
  ],
)
def test_bad_values_are_refused_by_name(call, message):
  with pytest.raises(ValueError, match=message):
    call()
