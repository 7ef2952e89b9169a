"""Certificates hold, are refuted where they are wrong, and can be wrong."""

import functools

import hypergrad_problems as problems
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import hypergrad
from robust_mm import linalg

SIZE = 24
DELTA = 0.05
RELAXED = 1 + 1e-4


def _batch(seed, count, low, high):
  """Matrices with their smallest and largest eigenvalues, and sides."""
  rng = np.random.default_rng(seed)
  matrices, ends = [], []
  for _ in range(count):
    values = rng.uniform(low, high, SIZE)
    matrices.append(problems.symmetric(rng, values)[0])
    ends.append((values.min(), values.max()))
  sides = rng.normal(size=(count, SIZE))
  return (jnp.asarray(a, jnp.float32) for a in (matrices, ends, sides))


def _solve(solver, matrix, side, lower, upper, step_size=None):
  step_size = 1 / upper if step_size is None else step_size
  bounds = hypergrad.Interval(lower, upper, step_size)
  matvec = lambda x: jnp.matmul(matrix, x, precision="highest")  # noqa: E731
  return solver(matvec, side, bounds)


SOLVERS = [
  hypergrad.neumann(20),
  hypergrad.conjugate_gradient(5),
  hypergrad.identity(),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=["neumann", "cg", "identity"])
@pytest.mark.parametrize("kind", ["positive", "indefinite"])
def test_no_solve_misses_by_more_than_its_bound(solver, kind):
  low = 0.05 if kind == "positive" else -1.0
  matrices, ends, sides = _batch(1, 100, low, 2.0)

  @jax.jit
  @jax.vmap
  def run(matrix, ends, side):
    delta = 0.0 if kind == "positive" else 0.1 - ends[0]
    lower, upper = ends + delta
    shifted = matrix + delta * jnp.eye(SIZE)
    found = _solve(solver, shifted, side, lower, upper)
    bound = hypergrad.a_posteriori_error(jnp.linalg.norm(found.residual), lower)
    prior = hypergrad.a_priori_error(
      20, jnp.linalg.norm(side), lower, 1 / upper
    )
    return shifted, found, bound, prior

  shifted, found, bound, prior = jax.device_get(run(matrices, ends, sides))
  exact = np.linalg.solve(
    shifted.astype(np.float64), np.asarray(sides, np.float64)[..., None]
  )[..., 0]
  error = np.linalg.norm(exact - found.x, axis=-1)
  assert np.all(error <= bound * RELAXED + 1e-5)
  assert not np.any(found.refuted)
  if solver == hypergrad.neumann(20):
    assert np.all(bound <= prior * RELAXED + 1e-5)
  # Not vacuous: a tenth of it is refuted.
  assert np.any(error > 0.1 * bound)


def test_sufficient_steps_suffice_and_one_less_does_not():
  lower, alpha, size, wanted = 0.05, 0.5, 3.0, 0.01
  steps = hypergrad.sufficient_steps(wanted, size, lower, alpha)
  bound = functools.partial(
    hypergrad.a_priori_error,
    rhs_norm=jnp.array(size),
    lower=jnp.array(lower),
    step_size=jnp.array(alpha),
  )
  assert bound(steps) <= wanted * (1 + 1e-5)
  assert bound(steps - 1) > wanted
  assert hypergrad.sufficient_steps(1.0, 1.0, 1.0, 1.0) == 0
  with pytest.raises(ValueError, match="lower must be positive"):
    hypergrad.sufficient_steps(1.0, 1.0, 0.0, 1.0)
  # The number of the article: q^{K+1} / (1 - q) ||v||.
  found = hypergrad.a_priori_error(
    4, jnp.array(2.0), jnp.array(0.25), jnp.array(1.0)
  )
  np.testing.assert_allclose(found, 0.75**5 / 0.25 * 2, rtol=1e-6)
  nothing = hypergrad.a_posteriori_error(jnp.array(1.0), jnp.array(-0.1))
  assert nothing == np.inf


@pytest.mark.parametrize(
  "solver", [hypergrad.neumann(10), hypergrad.conjugate_gradient(1)]
)
def test_a_lower_end_overstated_tenfold_voids_the_bound(solver):
  """On one eigenvector a solve sees it; hidden among others it does not."""
  rng = np.random.default_rng(0)
  values = np.linspace(0.05, 1, SIZE)
  matrix, Q = problems.symmetric(rng, values)
  matrix = jnp.asarray(matrix, jnp.float32)
  seen = hidden = 0
  for share in (1.0, 0.5):
    # The rest on the largest eigenvalue, which one step solves.
    v = share * Q[:, 0] + np.sqrt(1 - share**2) * Q[:, -1]
    v = jnp.asarray(v, jnp.float32)
    found = _solve(
      hypergrad.identity() if share < 1 else solver,
      matrix,
      v,
      jnp.array(0.5),
      jnp.array(1.0),
    )
    exact = np.linalg.solve(matrix, v)
    error = np.linalg.norm(exact - found.x)
    bound = hypergrad.a_posteriori_error(
      jnp.linalg.norm(found.residual), jnp.array(0.5)
    )
    if share < 1:
      assert error > 2 * bound
      assert not found.refuted
      hidden += 1
    else:
      assert found.refuted
      assert error > 2 * bound or error < 1e-4  # CG solves it in one step.
      seen += 1
  assert (seen, hidden) == (1, 1)


@pytest.mark.parametrize(
  "solver", [hypergrad.neumann(400), hypergrad.conjugate_gradient(24)]
)
def test_an_indefinite_map_is_found_out(solver):
  rng = np.random.default_rng(0)
  values = np.r_[-0.05, np.linspace(0.05, 1, SIZE - 1)]
  matrix, _ = problems.symmetric(rng, values)
  matrix = jnp.asarray(matrix, jnp.float32)
  v = jnp.asarray(rng.normal(size=SIZE), jnp.float32)
  claim, top = jnp.array(0.05), jnp.array(1.0)
  found = _solve(solver, matrix, v, claim, top)
  assert found.refuted | found.negative_curvature
  honest = _solve(
    solver, matrix + 0.1 * jnp.eye(SIZE), v, claim - 1e-3, top + 0.1
  )
  assert not (honest.refuted | honest.negative_curvature)


def test_an_upper_end_that_is_too_low_is_found_out():
  A = jnp.diag(jnp.linspace(0.1, 3, SIZE))
  for solver in (hypergrad.neumann(30), hypergrad.conjugate_gradient(10)):
    low, top = jnp.array(0.1), jnp.array(1.0)
    assert _solve(solver, A, jnp.ones(SIZE), low, top).refuted
    assert not _solve(solver, A, jnp.ones(SIZE), low, 3 * top).refuted


def test_convergence_to_rounding_is_no_refutation():
  rng = np.random.default_rng(1)
  matrix, _ = problems.symmetric(rng, np.linspace(0.3, 1, SIZE))
  matrix = jnp.asarray(matrix, jnp.float32)
  v = jnp.asarray(rng.normal(size=SIZE), jnp.float32)
  for solver in (hypergrad.neumann(2000), hypergrad.conjugate_gradient(200)):
    found = _solve(solver, matrix, v, jnp.array(0.3), jnp.array(1.0))
    assert not found.refuted
    assert jnp.linalg.norm(found.residual) < 1e-5 * jnp.linalg.norm(v)


def _random_problems(seed, count, condition, num_phi=3):
  """Quadratic bilevel problems: dense H, B, v, d and the exact gradient."""
  rng = np.random.default_rng(seed)
  for _ in range(count):
    values = np.geomspace(1 / condition, 1, SIZE)
    H, _ = problems.symmetric(rng, values)
    B = rng.normal(size=(SIZE, num_phi)) * np.exp(rng.normal(size=num_phi))
    yield H, B, rng.normal(size=SIZE), 3 * rng.normal(size=num_phi)


def _stack(iterator):
  return tuple(jnp.asarray(np.stack(a), jnp.float32) for a in zip(*iterator))


def _gradients(arrays, low, **arguments):
  """Gradients, infos and exact gradients of many problems at once."""
  ends = [jnp.array(low), jnp.array(1.0)]
  spectrum = linalg.SpectralBounds(*ends, *ends, jnp.array(0.0))
  fn = functools.partial(
    hypergrad.hypergradient,
    operator=hypergrad.damped(DELTA),
    on_reject="keep",
    **arguments,
  )

  def run(H, B, v, d, key):
    inner, outer, theta, phi = problems.quadratic(H, B, v, d)
    return fn(inner, outer)(theta, phi, key=key, spectrum=spectrum)

  keys = jax.random.split(jax.random.key(0), len(arrays[0]))
  found, info = jax.device_get(jax.jit(jax.vmap(run))(*arrays, keys))
  H, B, v, d = (np.asarray(a, np.float64) for a in arrays)
  x = np.linalg.solve(H + DELTA * np.eye(SIZE), v[..., None])[..., 0]
  return found, info, d - np.einsum("bpn,bp->bn", B, x)


def test_what_is_accepted_points_along_the_exact_gradient():
  arrays = _stack(_random_problems(0, 200, condition=100))
  found, info, exact = _gradients(arrays, 0.01, solver=hypergrad.neumann(30))
  error = np.linalg.norm(found - exact, axis=-1)
  assert np.all(info.certified)
  assert np.all(error <= info.gradient_error_bound * RELAXED)
  along, square = np.sum(found * exact, -1), np.sum(found**2, -1)
  assert np.all(along[info.accepted] >= 0.5 * square[info.accepted])
  assert 0.1 < np.mean(info.accepted) < 0.9
  # What is refused may well point away, which is why it is.
  hard = _stack(_random_problems(1, 50, condition=1e4))
  found, info, exact = _gradients(hard, 1e-4, solver=hypergrad.neumann(0))
  assert not np.all(info.accepted)
  along, square = np.sum(found * exact, -1), np.sum(found**2, -1)
  assert np.any(along < 0.5 * square)


@pytest.mark.parametrize("steps", [0, 4, 25])
@pytest.mark.parametrize(
  "make", [hypergrad.neumann, hypergrad.conjugate_gradient]
)
def test_the_bound_before_a_solve_covers_it_and_is_not_far_off(make, steps):
  arrays = _stack(_random_problems(5, 60, condition=100))
  solver = make(max(steps, int(make is hypergrad.conjugate_gradient)))
  _, info, _ = _gradients(arrays, 0.01, solver=solver)
  v = np.linalg.norm(arrays[2], axis=-1)
  lower, upper = 0.01 + DELTA, 1 + DELTA
  if make is hypergrad.neumann:
    rate = 1 - lower / upper
    wanted = rate ** (steps + 1) * v / lower
    # The residual is one: after the solve nothing is known that is worse.
    assert np.all(info.solve_error_bound <= info.prior_error_bound * RELAXED)
  else:
    root = np.sqrt(upper / lower)
    rate = (root - 1) / (root + 1)
    wanted = 2 * rate**solver.num_steps * v / lower
  np.testing.assert_allclose(info.contraction, rate, rtol=1e-4)
  np.testing.assert_allclose(info.prior_error_bound, wanted, rtol=1e-3)
  H, _, side, _ = (np.asarray(a, np.float64) for a in arrays)
  shifted = H + DELTA * np.eye(SIZE)
  for matrix, b, said in zip(shifted, side, info.prior_error_bound):
    found = _solve(
      solver,
      jnp.asarray(matrix, jnp.float32),
      jnp.asarray(b, jnp.float32),
      jnp.array(lower),
      jnp.array(upper),
    )
    error = np.linalg.norm(np.linalg.solve(matrix, b) - found.x)
    assert error <= said * RELAXED + 1e-5
    assert error > said / 1e3 or steps == 25


def test_nothing_known_before_a_solve_is_infinite():
  inner, outer, theta, phi = problems.small_quadratic(low=-1.0)
  for options in (
    {"bounds": None, "solver": hypergrad.conjugate_gradient(5)},
    {"solver": hypergrad.neumann(5)},
    {"solver": lambda *a: hypergrad.conjugate_gradient(5)(*a)},
  ):
    fn = hypergrad.hypergradient(
      inner, outer, operator=hypergrad.ift(), acceptance=None, **options
    )
    _, info = jax.jit(fn)(theta, phi, key=jax.random.key(0))
    assert info.prior_error_bound == np.inf
    assert not info.contraction < 1


def test_certified_signs_are_right_and_some_are_not_certified():
  arrays = _stack(_random_problems(2, 100, condition=100))
  for steps in (2, 40):
    solver = hypergrad.neumann(steps)
    found, info, exact = _gradients(arrays, 0.01, solver=solver)
    sure = info.sign_certified
    assert np.all(np.sign(found[sure]) == np.sign(exact[sure]))
    assert not np.all(sure)
  assert np.any(sure)
  # The sign rule can fail: with few steps some signs are wrong.
  found, info, exact = _gradients(arrays, 0.01, solver=hypergrad.neumann(0))
  assert np.any(np.sign(found) != np.sign(exact))


def test_two_sided_correction_is_quadratic_in_the_residual():
  arrays = _stack(_random_problems(3, 50, condition=100))
  solver = hypergrad.neumann(20)
  plain, one, exact = _gradients(arrays, 0.01, solver=solver)
  better, two, _ = _gradients(arrays, 0.01, solver=solver, correction=True)
  errors = [np.linalg.norm(g - exact, axis=-1) for g in (plain, better)]
  assert np.all(errors[1] <= two.gradient_error_bound * RELAXED + 1e-5)
  assert np.all(two.gradient_error_bound < one.gradient_error_bound)
  assert np.median(errors[1]) < 0.5 * np.median(errors[0])
  assert np.all(two.num_matvecs == 4 * 21)


def test_bounds_of_many_columns_cover_them_all():
  arrays = _stack(_random_problems(4, 30, condition=100, num_phi=6))
  solver = hypergrad.neumann(30)
  found, few, exact = _gradients(arrays, 0.01, solver=solver, max_explicit=5)
  _, many, _ = _gradients(arrays, 0.01, solver=solver)
  error = np.linalg.norm(found - exact, axis=-1)
  assert np.all(error <= few.gradient_error_bound * RELAXED)
  assert np.all(few.failure_probability > many.failure_probability)
  # A bound for all columns certifies no sign that one for each does not.
  assert np.sum(few.sign_certified) < np.sum(many.sign_certified)
  norms = np.linalg.norm(arrays[1], ord=2, axis=(-2, -1))
  H, B, v, d = (a[0] for a in arrays)
  inner, _, theta, phi = problems.quadratic(H, B, v, d)
  found = hypergrad.mixed_norm(inner, theta, phi, jax.random.key(0))
  assert norms[0] <= found <= 1.01 * norms[0]
