"""The front door: closed forms, precision, refusals, bad input."""

import logging

import hypergrad_problems as problems
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from robust_mm import hypergrad

KEY = jax.random.key(0)
EXACT = hypergrad.conjugate_gradient(40)


@pytest.mark.parametrize("dtype, rtol", [("float64", 1e-8), ("float32", 1e-3)])
def test_penalties_and_data_weights_have_the_closed_form_gradient(dtype, rtol):
  with jax.enable_x64(dtype == "float64"):
    inner, outer, solve, phi = problems.weighted_ridge(dtype=jnp.dtype(dtype))
    theta = solve(phi)
    gradient = hypergrad.hypergradient(
      inner,
      outer,
      solver=EXACT,
      operator=hypergrad.ift(),
      bounds=None,
      max_explicit=64,
    )
    found, info = jax.jit(gradient)(theta, phi, key=KEY)
    exact = problems.closed_form(outer, solve, phi)
    assert problems.relative_error(found, exact) < rtol
    assert info.inner_gradient_norm < (1e-12 if dtype == "float64" else 1e-4)
    if dtype == "float64":
      _check_finite_differences(outer, solve, phi, found)


def _check_finite_differences(outer, solve, phi, found):
  flat, restore = ravel_pytree(phi)
  gradient = ravel_pytree(found)[0]
  value = jax.jit(lambda flat: outer(solve(restore(flat)), restore(flat)))
  for seed in range(5):
    direction = jax.random.normal(jax.random.key(seed), flat.shape)
    direction = direction / jnp.linalg.norm(direction)
    ahead, behind = (
      value(flat + 1e-4 * direction),
      value(flat - 1e-4 * direction),
    )
    slope = (ahead - behind) / 2e-4
    np.testing.assert_allclose(gradient @ direction, slope, rtol=1e-6)


def test_damping_is_exact_for_the_proximal_problem():
  with jax.enable_x64(True):
    inner, outer, solve, phi = problems.weighted_ridge(dtype=jnp.float64)
    theta = solve(phi)

    def gradient(operator, solver=EXACT):
      fn = hypergrad.hypergradient(
        inner,
        outer,
        solver=solver,
        operator=operator,
        bounds=None,
        max_explicit=64,
      )
      return jax.jit(fn)(theta, phi, key=KEY)[0]

    delta = 0.3
    flat, restore = ravel_pytree(theta)

    def proximal(phi):
      # One Newton step from theta solves a quadratic problem.
      def loss(t):
        return inner(restore(t), phi) + 0.5 * delta * jnp.sum((t - flat) ** 2)

      step = jnp.linalg.solve(jax.hessian(loss)(flat), jax.grad(loss)(flat))
      return outer(restore(flat - step), phi)

    found = gradient(hypergrad.damped(delta))
    exact = jax.jit(jax.grad(proximal))(phi)
    assert problems.relative_error(found, exact) < 1e-10
    limit = gradient(hypergrad.ift())
    assert problems.relative_error(found, limit) > 1e-2
    near = gradient(hypergrad.damped(1e-7))
    assert problems.relative_error(near, limit) < 1e-5
    # The direct term does not scale with 1 / delta: without it.
    d = jax.grad(outer, argnums=1)(theta, phi)
    far, greedy = (
      jax.tree.map(lambda a, b: a - b, g, d)
      for g in (
        gradient(hypergrad.damped(1e5)),
        gradient(hypergrad.ift(), hypergrad.identity(scale=1.0)),
      )
    )
    assert problems.cosine(far, greedy) > 1 - 1e-6


def test_batches_are_passed_on():
  def inner(theta, phi, batch):
    return 0.5 * jnp.mean((theta - phi * batch["x"]) ** 2)

  def outer(theta, phi, batch):
    return jnp.sum(theta * batch)

  gradient = jax.jit(
    hypergrad.hypergradient(inner, outer, operator=hypergrad.ift())
  )
  batch = {"x": jnp.array([1.0, 3.0]), "id": jnp.array([7, 8])}
  found, info = gradient(
    jnp.array(4.0), jnp.array(2.0), batch, jnp.array(10.0), key=KEY
  )
  # theta* = 2 phi.
  np.testing.assert_allclose(found, 20, rtol=1e-4)
  assert info.accepted


def test_every_product_is_counted_and_nothing_compiles_twice(caplog):
  calls = []

  def counted(matvec):
    def product(vector):
      jax.debug.callback(lambda: calls.append(1))
      return matvec(vector)

    return product

  def operator(matvec, bounds):
    return hypergrad.damped()(counted(matvec), bounds)

  def bounds(matvec, like, key):
    return hypergrad.lanczos_bounds()(counted(matvec), like, key)

  bounds.num_matvecs = hypergrad.lanczos_bounds().num_matvecs
  inner, outer, theta, phi = problems.small_quadratic(size=64)
  run = jax.jit(
    hypergrad.hypergradient(
      inner,
      outer,
      solver=hypergrad.neumann(10),
      operator=operator,
      bounds=bounds,
      correction=True,
    )
  )
  _, info = run(theta, phi, key=KEY)
  jax.effects_barrier()
  assert len(calls) == info.num_matvecs == 20 + 11 + 2 * 11
  others = [(theta + 1, phi, KEY), (theta, phi - 1, jax.random.key(1))]
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    for *arguments, key in others:
      run(*arguments, key=key)
  assert not [r for r in caplog.records if "Compiling" in r.getMessage()]


def test_half_precision_is_solved_in_float32():
  inner, outer, theta, phi = problems.small_quadratic()
  theta = theta + 0.5
  phi = phi + 0.25
  seen = set()

  def spy(theta, phi):
    seen.update({theta.dtype, phi.dtype})
    return inner(theta, phi)

  half = [a.astype(jnp.bfloat16) for a in (theta, phi)]
  run = jax.jit(hypergrad.hypergradient(spy, outer))
  found, info = run(*half, key=KEY)
  assert seen == {jnp.dtype(jnp.float32)}
  assert found.dtype == jnp.bfloat16
  assert info.relative_residual.dtype == jnp.float32
  exact, _ = jax.jit(hypergrad.hypergradient(inner, outer))(
    *(a.astype(jnp.float32) for a in half), key=KEY
  )
  np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_refusals_are_zeros_or_kept_and_flagged():
  inner, outer, theta, phi = problems.small_quadratic(low=0.001)
  poor = {"solver": hypergrad.identity(), "operator": hypergrad.damped(0.1)}
  run = {
    how: jax.jit(hypergrad.hypergradient(inner, outer, on_reject=how, **poor))(
      theta, phi, key=KEY
    )
    for how in ("zero", "keep")
  }
  assert not run["zero"][1].accepted
  assert not run["keep"][1].accepted
  np.testing.assert_array_equal(run["zero"][0], jnp.zeros(2))
  assert np.all(run["keep"][0] != 0)
  more = hypergrad.neumann(1, max_steps=640)
  found, info = jax.jit(
    hypergrad.hypergradient(
      inner, outer, solver=more, operator=hypergrad.damped(0.1)
    )
  )(theta, phi, key=KEY)
  assert info.accepted
  assert 8 + 2 < info.num_matvecs < 8 + 641
  assert info.gradient_error_bound <= 0.5 * jnp.linalg.norm(found)


@pytest.mark.parametrize("on_reject", ["zero", "keep"])
@pytest.mark.parametrize("where", ["v", "H", "bounds", "inf"])
def test_what_is_not_finite_gives_zeros_and_no_exception(on_reject, where):
  inner, outer, theta, phi = problems.small_quadratic()
  bad = jnp.inf if where == "inf" else jnp.nan

  def spoiled_inner(theta, phi):
    extra = bad * jnp.sum(theta**2) if where in ("H", "inf") else 0.0
    return inner(theta, phi) + extra

  def spoiled_outer(theta, phi):
    return outer(theta, phi) + (bad * jnp.sum(theta) if where == "v" else 0.0)

  def spoiled_bounds(matvec, like, key):
    found = hypergrad.lanczos_bounds()(matvec, like, key)
    return found._replace(upper=bad) if where == "bounds" else found

  spoiled_bounds.num_matvecs = lambda like: 8
  for acceptance in (0.5, None):
    gradient = hypergrad.hypergradient(
      spoiled_inner,
      spoiled_outer,
      bounds=spoiled_bounds,
      on_reject=on_reject,
      acceptance=acceptance,
    )
    found, info = jax.jit(gradient)(theta + 1, phi, key=KEY)
    np.testing.assert_array_equal(found, jnp.zeros(2))
    assert not info.accepted
    assert not info.certified


def test_nothing_to_solve_is_the_direct_term_and_accepted():
  inner, _, theta, phi = problems.small_quadratic(low=-1.0)
  for operator in (hypergrad.damped(), hypergrad.ift(), hypergrad.published()):
    gradient = hypergrad.hypergradient(
      inner, lambda t, f: jnp.sum(3 * f), operator=operator
    )
    found, info = jax.jit(gradient)(theta, phi, key=KEY)
    np.testing.assert_array_equal(found, jnp.full(2, 3.0))
    assert info.accepted
    assert info.relative_residual == 0
    assert info.solve_error_bound == 0


def test_an_indefinite_hessian_is_damped_and_certified_only_then():
  inner, outer, theta, phi = problems.small_quadratic(size=30, low=-0.5)
  found, info = jax.jit(hypergrad.hypergradient(inner, outer, solver=EXACT))(
    theta, phi, key=KEY
  )
  assert info.certified
  assert info.accepted
  assert info.lower <= -0.5
  assert info.upper >= 2
  np.testing.assert_allclose(
    info.damping, 0.05 * info.upper - info.lower, rtol=1e-6
  )
  plain = hypergrad.hypergradient(
    inner, outer, solver=EXACT, operator=hypergrad.ift()
  )
  found, info = jax.jit(plain)(theta, phi, key=KEY)
  assert not info.accepted
  assert not info.certified
  assert info.solve_error_bound == np.inf
  np.testing.assert_array_equal(found, jnp.zeros(2))


def test_published_fidelity_is_the_published_operator_without_a_skip_rule():
  inner, outer, theta, phi = problems.small_quadratic()
  named = hypergrad.hypergradient(inner, outer, fidelity="published")
  assert named.operator == hypergrad.published(0.9)
  assert named.solver == hypergrad.neumann(10)
  assert named.acceptance is None
  found, info = jax.jit(named)(theta, phi, key=KEY)
  assert info.accepted
  H, v = jax.hessian(inner)(theta, phi), jax.grad(outer)(theta, phi)
  B = jax.jacfwd(jax.grad(inner), argnums=1)(theta, phi)
  alpha = 0.9 / jnp.maximum(jnp.abs(info.lower), info.upper)
  x = sum(jnp.linalg.matrix_power(alpha * H, k) @ v for k in range(11))
  d = jax.grad(outer, argnums=1)(theta, phi)
  np.testing.assert_allclose(found, d - B.T @ x, rtol=1e-4)


def test_symmetry_is_measured():
  inner, _, theta, phi = problems.small_quadratic()
  assert hypergrad.asymmetry(inner, theta, phi, KEY) < 1e-4

  @jax.custom_vjp
  def false(x):
    return jnp.sum(x**2)

  skew = jnp.triu(jnp.ones((8, 8)))
  false.defvjp(lambda x: (false(x), x), lambda x, g: (g * (skew @ x),))
  gap = hypergrad.asymmetry(lambda t, f: false(t) + f[0], theta, phi, KEY)
  assert gap > 1e-2


def test_the_outputs_are_not_differentiated():
  inner, outer, theta, phi = problems.small_quadratic()
  gradient = hypergrad.hypergradient(
    inner, outer, solver=hypergrad.neumann(1, max_steps=8)
  )
  slope = jax.grad(lambda f: jnp.sum(gradient(theta, f, key=KEY)[0]))(phi)
  np.testing.assert_array_equal(slope, jnp.zeros(2))


def test_gelu_network_gradient_is_accepted_with_the_defaults():
  """Every default at once, on something that is no quadratic."""
  keys = jax.random.split(KEY, 4)
  theta = {
    "w": jax.random.normal(keys[0], (5, 9)) / 2,
    "u": jax.random.normal(keys[1], (9, 3)) / 3,
  }
  x, label = jax.random.normal(keys[2], (40, 5)), jnp.arange(40) % 3
  phi = jnp.array([-2.0, -3.0])

  def loss(theta):
    logits = jax.nn.gelu(x @ theta["w"]) @ theta["u"]
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, label)
    )

  def inner(theta, phi):
    penalty = jnp.stack([jnp.sum(theta[k] ** 2) for k in ("u", "w")])
    return loss(theta) + 0.5 * jnp.exp(phi) @ penalty

  gradient = hypergrad.hypergradient(inner, lambda t, f: loss(t))
  found, info = jax.jit(gradient)(theta, phi, key=KEY)
  assert info.accepted
  assert info.certified
  assert info.failure_probability <= 2e-3
  assert np.all(np.isfinite(found))
