"""Estimated constants: what they are, and that they say so."""

import certification_models as models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robust_mm as rmm
from robust_mm import certification

NAMES = ("audio", "image")


@pytest.fixture(scope="module")
def mlp():
  return models.mlp(), models.random_params(0)


@pytest.fixture(scope="module")
def batch():
  return models.random_batch(1, 64, absent=0.2)


def test_empirical_tables_equal_the_jacobian_and_say_so(mlp):
  model, params = mlp
  batch = models.random_batch(5, 23, absent=0.2)
  tables = certification.empirical_tables(model, params, batch, chunk=8)
  tau = certification.empirical_lipschitz(model, params, batch, chunk=8)
  assert not tables.sound
  assert tables.source == "empirical"

  for m in NAMES:

    def score(x, m=m):
      hidden = jax.nn.relu(x @ params["first"][m]) @ params["second"][m]
      return hidden @ params["head"][m].T

    jacobian = jax.vmap(jax.jacrev(score))(batch["inputs"][m])
    jacobian = np.asarray(jacobian, float)[np.asarray(batch["present"][m])]
    np.testing.assert_allclose(
      tau[m], np.linalg.norm(jacobian, axis=-1).max(0), rtol=1e-5
    )
    gap = jacobian[:, :, None] - jacobian[:, None]
    np.testing.assert_allclose(
      tables.tables[m],
      np.linalg.norm(gap, axis=-1).max(0),
      rtol=1e-5,
      atol=1e-6,
    )
    sound = certification.sensitivity_tables(model, params).tables[m]
    assert np.all(tables.tables[m] <= sound * (1 + 1e-5))
  found = rmm.certify(model, params, batch, tables=tables)
  assert not found.sound
  assert found.kind == "estimated"


def test_estimated_constants_ignore_the_factors_and_are_below_sound_ones():
  model = models.mlp()
  params = models.random_params(6)
  rows = params["head"]["audio"]
  params["head"] = {
    m: w / jnp.linalg.norm(w, axis=-1, keepdims=True)
    for m, w in params["head"].items()
  }
  del rows
  batch = models.random_batch(6, 40)
  found = []
  for scale in (1.0, 3.0):
    factors = {m: scale * jnp.arange(1.0, 5.0) for m in NAMES}
    given = {**params, "factors": factors}
    found.append(certification.empirical_lipschitz(model, given, batch))
  geometry = model.geometry(params)
  for m in NAMES:
    np.testing.assert_allclose(found[0][m], found[1][m], rtol=1e-6)
    assert np.all(found[0][m] > 0)
    assert np.all(found[0][m] <= geometry.lipschitz[m] * (1 + 1e-5))


def test_published_fidelity_is_the_split_form_at_the_runner_up():
  model = models.mlp()
  factors = {m: jnp.arange(1.0, 5.0) for m in NAMES}
  params = {**models.random_params(7), "factors": factors}
  batch = models.random_batch(7, 30)
  found = rmm.certify(model, params, batch, fidelity="published")
  assert not found.sound
  tau = certification.empirical_lipschitz(model, params, batch)
  outputs, _ = model.apply(params, {}, batch["inputs"], batch["present"])
  logits = np.asarray(outputs.logits, float)
  order = np.argsort(logits, -1)
  y, j = order[:, -1], order[:, -2]
  total = 0
  for m in NAMES:
    term = np.asarray(factors[m] * tau[m], float)
    total = total + (term[y] + term[j]) ** 2
  rows = np.arange(30)
  expected = (logits[rows, y] - logits[rows, j]) / np.sqrt(total)
  np.testing.assert_allclose(found.radius, expected, rtol=1e-3, atol=1e-4)
  np.testing.assert_array_equal(found.nearest_class, j)


def test_missing_constants_are_refused_with_two_ways_out(batch):
  model, params = models.mlp(constants=False), models.random_params(0)
  with pytest.raises(ValueError, match=r"'audio'.*empirical.*smoothing"):
    rmm.certify(model, params, batch)
  with pytest.raises(ValueError, match="'audio'"):
    certification.sensitivity_tables(model, params)
  assert rmm.certify(model, params, batch, source="empirical").sound is False
