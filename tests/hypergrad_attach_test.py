"""``attach`` makes plain ``jax.grad`` the hyper-gradient."""

import hypergrad_problems as problems
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import hypergrad

KEY = jax.random.key(3)
BOUNDS = hypergrad.known_bounds(lower=0.0, upper=6.0)


def _values(solver):
  return {
    "solver": solver,
    "operator": hypergrad.damped(0.1),
    "bounds": BOUNDS,
  }


@pytest.mark.parametrize(
  "solver", [hypergrad.neumann(7), hypergrad.conjugate_gradient(5)]
)
def test_grad_through_attach_equals_hypergradient(solver):
  with jax.enable_x64(True):
    inner, outer, solve, phi = problems.weighted_ridge(dtype=jnp.float64)
    theta = solve(phi)
    gradient = hypergrad.hypergradient(
      inner, outer, acceptance=None, max_explicit=64, **_values(solver)
    )
    expected, _ = jax.jit(gradient)(theta, phi, key=KEY)
    minimum = hypergrad.attach(inner, **_values(solver))

    def loss(theta, phi):
      return outer(minimum(theta, phi, key=KEY), phi)

    none, found = jax.jit(jax.grad(loss, argnums=(0, 1)))(theta, phi)
    assert problems.relative_error(found, expected) < 1e-10
    for leaf in jax.tree.leaves(none):
      np.testing.assert_array_equal(leaf, jnp.zeros_like(leaf))
    assert loss(theta, phi) == outer(theta, phi)


def test_the_random_bounds_are_those_of_the_key():
  inner, outer, theta, phi = problems.small_quadratic(size=40)
  expected, _ = jax.jit(
    hypergrad.hypergradient(
      inner, outer, solver=hypergrad.neumann(9), on_reject="keep"
    )
  )(theta, phi, key=KEY)
  minimum = hypergrad.attach(inner, solver=hypergrad.neumann(9))
  loss = lambda f, key: outer(minimum(theta, f, key=key), f)  # noqa: E731
  run = jax.jit(jax.grad(loss))
  np.testing.assert_allclose(run(phi, KEY), expected, rtol=1e-5)
  assert np.any(run(phi, jax.random.key(8)) != run(phi, KEY))


def test_batches_and_whole_jacobians_go_through():
  rng = np.random.default_rng(0)
  X = jnp.asarray(rng.normal(size=(20, 4)), jnp.float32)
  y = jnp.asarray(rng.normal(size=20), jnp.float32)

  def inner(theta, phi, batch):
    residual = batch["x"] @ theta - batch["y"]
    return 0.5 * jnp.mean(residual**2) + 0.5 * jnp.exp(phi) @ theta**2

  def solve(phi):
    return jnp.linalg.solve(X.T @ X / 20 + jnp.diag(jnp.exp(phi)), X.T @ y / 20)

  phi = jnp.zeros(4)
  batch = {"x": X, "y": y, "id": jnp.arange(20)}
  minimum = hypergrad.attach(
    inner, solver=hypergrad.neumann(300), operator=hypergrad.ift()
  )
  found = jax.jit(jax.jacrev(lambda f: minimum(solve(phi), f, batch)))(phi)
  np.testing.assert_allclose(found, jax.jacfwd(solve)(phi), atol=1e-4)


@pytest.mark.parametrize(
  "solver", [hypergrad.neumann(9), hypergrad.conjugate_gradient(5)]
)
def test_vmap_over_phi_is_a_loop(solver):
  inner, outer, theta, _ = problems.small_quadratic()
  gradient = hypergrad.hypergradient(
    lambda t, f: inner(t, f) + jnp.sum(jnp.exp(f)) * jnp.sum(t**2),
    lambda t, f: outer(t, f) + jnp.sum(t**4),
    solver=solver,
    on_reject="keep",
  )
  many = jax.random.normal(KEY, (3, 2))
  theta = theta + 0.3
  together, info = jax.jit(jax.vmap(lambda f: gradient(theta, f, key=KEY)))(
    many
  )
  run = jax.jit(gradient)
  alone = jnp.stack([run(theta, phi, key=KEY)[0] for phi in many])
  np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
  assert np.all(together != 0)
  assert info.accepted.shape == (3,)
