"""Sensitivity tables: their forms, and what each is sound for."""

import certification_heads as heads
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import certification


def test_three_forms_agree_on_an_orthonormal_head():
  factors = {
    m: np.random.default_rng(i).uniform(-2, 2, 6)
    for i, m in enumerate(heads.NAMES)
  }
  rows = {
    m: factors[m][:, None] * heads.orthonormal(i)
    for i, m in enumerate(heads.NAMES)
  }
  geometry = heads.geometry(rows, np.zeros(6), 0.7, factors)
  general = certification.pairwise_sensitivity(geometry)
  closed = certification.pairwise_sensitivity(geometry, "orthonormal")
  none = dict.fromkeys(heads.NAMES, 0.0)
  defect = certification.pairwise_sensitivity(
    geometry, "orthonormal", defect=none
  )
  split = certification.pairwise_sensitivity(geometry, "split")
  for m in heads.NAMES:
    np.testing.assert_allclose(general[m], closed[m], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(defect[m], closed[m], rtol=1e-6)
    assert np.all(split[m] >= closed[m] * (1 - 1e-6))
    assert np.all(split[m] <= closed[m] * np.sqrt(2) * (1 + 1e-6))
    assert np.all(np.diag(closed[m]) == 0)


@pytest.mark.parametrize("seed", range(5))
def test_closed_form_is_never_below_the_general_one_for_contractions(seed):
  rng = np.random.default_rng(seed)
  weight = rng.normal(size=(6, 9))
  weight /= np.linalg.norm(weight, 2)
  factors = {"audio": rng.uniform(0.1, 2, 6)}
  rows = {"audio": factors["audio"][:, None] * weight}
  geometry = heads.geometry(rows, np.zeros(6), factors=factors)
  general = certification.pairwise_sensitivity(geometry)["audio"]
  closed = certification.pairwise_sensitivity(geometry, "orthonormal")["audio"]
  assert np.all(closed >= general * (1 - 1e-6))
  # With rows of norm above 1 the same form is no bound: the test can fail.
  rows = {"audio": rows["audio"] * 5}
  general = certification.pairwise_sensitivity(
    heads.geometry(rows, np.zeros(6), factors=factors)
  )["audio"]
  assert np.any(closed < general)


def test_defect_form_bounds_rows_that_are_nearly_orthonormal():
  rng = np.random.default_rng(3)
  weight = heads.orthonormal(3) + 0.03 * rng.normal(size=(6, 12))
  defect = np.abs(weight @ weight.T - np.eye(6)).max()
  factors = {"audio": rng.uniform(0.1, 2, 6)}
  rows = {"audio": factors["audio"][:, None] * weight}
  geometry = heads.geometry(rows, np.zeros(6), factors=factors)
  general = certification.pairwise_sensitivity(geometry)["audio"]
  bound = certification.pairwise_sensitivity(
    geometry, "orthonormal", defect={"audio": defect}
  )["audio"]
  assert np.all(bound >= general * (1 - 1e-6))


def test_near_equal_rows_keep_their_distance():
  row = np.random.default_rng(0).normal(size=64).astype(np.float32)
  other = row.copy()
  other[0] += 2.4e-3
  rows = {"audio": np.stack([row, other])}
  table = certification.pairwise_sensitivity(heads.geometry(rows, np.zeros(2)))
  exact = np.linalg.norm(row.astype(float) - other.astype(float))
  np.testing.assert_allclose(table["audio"][0, 1], exact, rtol=1e-5)


def test_batch_sensitivities_are_the_rows_of_the_tables():
  factors = {
    m: np.random.default_rng(i).uniform(0.1, 2, 6)
    for i, m in enumerate(heads.NAMES)
  }
  rows = {
    m: factors[m][:, None] * heads.orthonormal(i)
    for i, m in enumerate(heads.NAMES)
  }
  label = np.array([0, 3, 5, 2])
  present = {m: jnp.asarray([True, True, False, True]) for m in heads.NAMES}
  units = {"image": 3.0}
  closed = heads.geometry(rows, np.zeros(6), 0.7, factors)
  for geometry, form in (
    (closed, "orthonormal"),
    (heads.geometry(rows, np.zeros(6), 0.7), "general"),
  ):
    tables = certification.pairwise_sensitivity(geometry, form)
    found = certification.sensitivity(geometry, label, present, units)
    for m in heads.NAMES:
      expected = np.asarray(tables[m])[label] * units.get(m, 1.0)
      expected[2] = 0
      np.testing.assert_allclose(found[m], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_factors", [True, False])
def test_batch_sensitivities_have_finite_gradients(with_factors):
  factors = {"audio": np.array([0.0, 0.0, 1.0])}
  rows = {"audio": np.zeros((3, 4))}
  geometry = heads.geometry(
    rows, np.zeros(3), 1.0, factors if with_factors else None
  )
  present = {"audio": jnp.asarray([True, False])}

  def total(geometry):
    found = certification.sensitivity(geometry, np.array([0, 1]), present)
    return jnp.sum(found["audio"])

  grads = jax.grad(total)(geometry)
  assert all(jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads))
