"""Hyper-gradients against independent float64 values, every operator and K."""

import hypergrad_problems as problems
import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from robust_mm import hypergrad

CASES = [
  ("ridge", "", "ift"),
  ("ridge", "", "damped_0.01"),
  ("ridge", "", "damped_0.1"),
  ("ridge", "", "damped_1"),
  ("ridge", "", "published_0.9"),
  ("ridge", "off/", "ift"),
  ("ridge", "off/", "damped_0.1"),
  ("mlp", "", "ift"),
  ("mlp", "", "damped_0.01"),
  ("mlp", "", "damped_0.1"),
  ("mlp", "", "published_0.9"),
  ("mlp", "off/", "damped"),
  ("mlp", "off/", "published_0.9"),
]
IDS = ["".join(case) for case in CASES]


def _problem(stored, name, prefix, dtype):
  if name == "mlp":
    return problems.stored_mlp(stored, dtype, prefix)
  inner, outer, theta, phi = problems.stored_ridge(stored, dtype)
  if prefix:
    theta = jax.numpy.asarray(stored[f"{prefix}theta"], dtype)
  return inner, outer, theta, phi


def _values(stored, prefix, kind):
  """Operator and bounds that give the stored step and damping."""
  eigenvalues = stored[f"{prefix}hessian_eigenvalues"]
  bounds = hypergrad.known_bounds(
    lower=eigenvalues.min(), upper=eigenvalues.max()
  )
  if kind == "ift":
    return hypergrad.ift(), bounds
  if kind.startswith("published"):
    return hypergrad.published(0.9), bounds
  return hypergrad.damped(float(stored[f"{prefix}{kind}/delta"])), bounds


def _all_steps(stored, name, prefix, kind, dtype):
  """Gradients and infos of every stored K, and of conjugate gradients."""
  inner, outer, theta, phi = _problem(stored, name, prefix, dtype)
  operator, bounds = _values(stored, prefix, kind)

  def run(theta, phi, key):
    solvers = [hypergrad.neumann(int(k)) for k in stored["num_steps"]]
    solvers.append(hypergrad.conjugate_gradient(2 * stored["hessian"].shape[0]))
    return [
      hypergrad.hypergradient(
        inner,
        outer,
        solver=solver,
        operator=operator,
        bounds=bounds,
        acceptance=None,
        max_explicit=32,
      )(theta, phi, key=key)
      for solver in solvers
    ]

  return jax.jit(run)(theta, phi, jax.random.key(0))


@pytest.mark.parametrize("name, prefix, kind", CASES, ids=IDS)
def test_truncated_and_exact_values_equal_the_reference(
  shared_path, name, prefix, kind
):
  stored = problems.load(shared_path, name)
  at = f"{prefix}{kind}/"
  with jax.enable_x64(True):
    found = _all_steps(stored, name, prefix, kind, np.float64)
    size = np.linalg.norm(stored[f"{prefix}outer_grad_theta"])
    for i, (gradient, info) in enumerate(found[:-1]):
      gradient = ravel_pytree(gradient)[0]
      assert gradient.dtype == np.float64
      np.testing.assert_allclose(
        gradient, stored[f"{at}neumann_hypergradient"][i], rtol=1e-8, atol=1e-12
      )
      np.testing.assert_allclose(
        info.relative_residual * size,
        stored[f"{at}neumann_residual_norm"][i],
        rtol=1e-8,
        atol=1e-13,
      )
      np.testing.assert_allclose(info.step_size, stored[f"{at}step"], rtol=1e-8)
      assert info.certified
      error = stored[f"{at}neumann_vector"][i] - stored[f"{at}inverse_vector"]
      assert np.linalg.norm(error) <= info.solve_error_bound * (1 + 1e-9)
    exact = ravel_pytree(found[-1][0])[0]
    np.testing.assert_allclose(
      exact, stored[f"{at}hypergradient_exact"], rtol=1e-8, atol=1e-12
    )


@pytest.mark.parametrize(
  "name, prefix, kind",
  [CASES[0], CASES[4], CASES[9], CASES[11]],
  ids=[IDS[0], IDS[4], IDS[9], IDS[11]],
)
def test_float32_agrees_to_four_digits(shared_path, name, prefix, kind):
  stored = problems.load(shared_path, name)
  found = _all_steps(stored, name, prefix, kind, np.float32)
  for i, (gradient, _) in enumerate(found[:-1]):
    expected = stored[f"{prefix}{kind}/neumann_hypergradient"][i]
    gradient = ravel_pytree(gradient)[0]
    assert gradient.dtype == np.float32
    assert problems.relative_error(gradient, expected) < 1e-4


@pytest.mark.parametrize("name", ["ridge", "mlp"])
def test_the_exact_value_is_the_finite_difference_of_the_solved_problem(
  shared_path, name
):
  stored = problems.load(shared_path, name)
  with jax.enable_x64(True):
    gradient, info = _all_steps(stored, name, "", "ift", np.float64)[-1]
    expected = stored["hypergradient_finite_difference"]
    np.testing.assert_allclose(ravel_pytree(gradient)[0], expected, atol=1e-9)
    assert info.inner_gradient_norm < 1e-12


def test_100_steps_point_the_right_way_and_the_published_operator_does_not(
  shared_path,
):
  stored = problems.load(shared_path, "ridge")
  inner, outer, theta, phi = problems.stored_ridge(stored, np.float32)
  exact = stored["ift/hypergradient_exact"]
  _, bounds = _values(stored, "", "ift")

  def along(solver, operator):
    gradient = hypergrad.hypergradient(
      inner,
      outer,
      solver=solver,
      operator=operator,
      bounds=bounds,
      acceptance=None,
    )
    found, _ = jax.jit(gradient)(theta, phi, key=jax.random.key(0))
    error = problems.relative_error(found, exact)
    return problems.cosine(found, exact), error

  series = along(hypergrad.neumann(100), hypergrad.ift())
  identity = along(hypergrad.identity(), hypergrad.ift())
  published = along(hypergrad.neumann(100), hypergrad.published(0.9))
  assert series[0] > 0.9999
  assert series[1] < 0.01 < 0.5 < identity[1]
  assert published[0] < identity[0] < series[0]
