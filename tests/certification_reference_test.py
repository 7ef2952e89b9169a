"""Certificates against independent float64 reference values."""

import dataclasses

import certification_models as models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robust_mm as rmm
from robust_mm import certification
from robust_mm import losses
from robust_mm._types import Geometry

NETS = (
  "digits_plain",
  "digits_penalty0p03",
  "digits_penalty0p1",
  "mfeat_plain",
  "mfeat_penalty0p01",
  "mfeat_penalty0p03",
)
NO_SLACK = certification.NO_SLACK


def _network(stored, dtype):
  """The reference network, its constants products of exact norms."""
  names = tuple(sorted(str(m) for m in stored["modalities"]))
  order = [str(m) for m in stored["modalities"]]

  def array(key):
    return jnp.asarray(stored[key], dtype)

  params = {
    "head": {m: array(f"params/head/{m}/kernel").T for m in names},
    "bias": array("params/head/bias"),
    "layers": {
      m: [
        (array(f"params/{m}/{d}/kernel"), array(f"params/{m}/{d}/bias"))
        for d in ("dense_0", "dense_1")
      ]
      for m in names
    },
  }

  def encode_one(params, m, x):
    for kernel, bias in params["layers"][m]:
      x = jax.nn.relu(x @ kernel + bias[None])
    return x

  def lipschitz(params):
    del params
    norms = stored["spectral_norms"]
    return {m: float(np.prod(norms[order.index(m), :2])) for m in names}

  model = models.late_fusion(
    encode_one, lipschitz, modalities=names, num_classes=10
  )
  batch = {"inputs": {m: array(f"inputs/{m}") for m in names}}
  return model, params, batch


@pytest.fixture(params=NETS)
def stored(request, shared_path):
  path = shared_path / "reference" / "certificates" / f"{request.param}.npz"
  with np.load(path, allow_pickle=False) as file:
    return dict(file)


def test_product_tables_and_radii_equal_the_reference(stored):
  with jax.enable_x64(True):
    model, params, batch = _network(stored, np.float64)
    tables = certification.sensitivity_tables(model, params)
    found = jax.jit(lambda p, b: rmm.certify(model, p, b, slack=NO_SLACK))(
      params, batch
    )
    found = jax.device_get(found)
  for m in model.modalities:
    np.testing.assert_allclose(
      tables.tables[m], stored[f"sensitivity/product/{m}"], rtol=1e-8
    )
    np.testing.assert_allclose(
      found.modality_radius[m], stored[f"radius/product/{m}"], rtol=1e-8
    )
  np.testing.assert_array_equal(found.prediction, stored["prediction"])
  np.testing.assert_allclose(
    found.radius, stored["radius/product/joint"], rtol=1e-8
  )


def test_float32_radii_are_below_every_attack_and_confirmed_in_float64(stored):
  model, params, batch = _network(stored, np.float32)
  found = jax.jit(lambda p, b: rmm.certify(model, p, b))(params, batch)
  same = np.asarray(found.prediction) == stored["prediction"]
  assert same.all()
  np.testing.assert_allclose(
    found.radius, stored["radius/product/joint"], rtol=1e-3, atol=1e-3
  )
  assert np.all(np.asarray(found.radius) <= stored["upper/joint"])
  for m in model.modalities:
    assert np.all(np.asarray(found.modality_radius[m]) <= stored[f"upper/{m}"])
  assert certification.recheck_fp64(model, params, batch, found) == 0
  # The same bound scaled up is refuted somewhere: the test can fail.
  assert np.any(3 * np.asarray(found.radius) > stored["upper/joint"])


def test_chain_radii_equal_the_reference_in_float64(stored):
  """Tables of ``lipschitz.dense_chain``, all nets, all items."""
  with jax.enable_x64(True):
    model, params, batch = _network(stored, np.float64)
    geometry = model.geometry(params)
    chained = dataclasses.replace(
      geometry,
      chain={
        m: (*(kernel.T for kernel, _ in params["layers"][m]), jnp.eye(32))
        for m in model.modalities
      },
    )
    model = dataclasses.replace(model, geometry=lambda params: chained)
    found = rmm.certify(model, params, batch, slack=NO_SLACK)
    found = jax.device_get(found)
  np.testing.assert_allclose(
    found.radius, stored["radius/eclipse_fast/joint"], rtol=1e-8
  )
  for m in model.modalities:
    np.testing.assert_allclose(
      found.modality_radius[m], stored[f"radius/eclipse_fast/{m}"], rtol=1e-8
    )
    assert np.all(found.modality_radius[m] <= stored[f"upper/{m}"])
  assert np.all(found.radius <= stored["upper/joint"])


def test_stored_witnesses_lie_outside_of_what_is_covered(stored):
  model, params, batch = _network(stored, np.float32)
  found = rmm.certify(model, params, batch)
  distance = {
    m: np.linalg.norm(
      stored[f"witness/joint/{m}"].astype(float)
      - stored[f"inputs/{m}"].astype(float),
      axis=-1,
    )
    for m in model.modalities
  }
  budgets = {m: jnp.asarray(d, jnp.float32) for m, d in distance.items()}
  assert not np.any(found.covers(budgets))


VARIANTS = ("uncentred", "row_centred", "uncentred_signed", "rowwise")


def _head(stored, variant):
  names = ("first", "second")
  rows = "uncentred" if variant == "uncentred_signed" else variant
  kind = "factors_signed" if variant == "uncentred_signed" else "factors"
  factors = {m: jnp.asarray(stored[f"{kind}/{m}"]) for m in names}
  weight = {m: jnp.asarray(stored[f"rows/{rows}/{m}"]) for m in names}
  geometry = Geometry(
    head={m: factors[m][:, None] * weight[m] for m in names},
    bias=jnp.asarray(stored["bias"]),
    lipschitz={m: jnp.asarray(stored[f"lipschitz/{m}"]) for m in names},
    factors=factors,
  )
  scores = {
    m: jnp.asarray(stored[f"embeddings/{m}"]) @ weight[m].T for m in names
  }
  return geometry, scores


@pytest.fixture(scope="module")
def head(shared_path):
  path = shared_path / "reference" / "crmt_head" / "head.npz"
  with np.load(path, allow_pickle=False) as file:
    return dict(file)


@pytest.mark.parametrize("variant", VARIANTS)
def test_head_radii_equal_the_reference_in_every_form(head, variant):
  forms = {"orthonormal": "orthonormal", "general": "general"}
  forms["published"] = "split"
  if variant == "rowwise":
    del forms["orthonormal"]
  with jax.enable_x64(True):
    geometry, scores = _head(head, variant)
    terms = {m: geometry.factors[m][None] * scores[m] for m in scores}
    for stored_form, form in forms.items():
      tables = certification.SensitivityTables(
        tables=certification.pairwise_sensitivity(geometry, form),
        source="global",
        sound=True,
      )
      found, rival = jax.device_get(
        [
          certification.margin_certificate(
            terms,
            tables,
            bias=geometry.bias,
            slack=NO_SLACK,
            fidelity=fidelity,
          )
          for fidelity in ("corrected", "published")
        ]
      )
      prefix = f"{variant}/"
      for m in scores:
        np.testing.assert_allclose(
          tables.tables[m],
          head[f"{prefix}sensitivity/{stored_form}/{m}"],
          rtol=1e-10,
          atol=1e-14,
        )
        np.testing.assert_allclose(
          found.modality_radius[m],
          head[f"{prefix}radius/{stored_form}/{m}"],
          rtol=1e-10,
        )
      np.testing.assert_allclose(
        found.radius, head[f"{prefix}radius/{stored_form}/joint"], rtol=1e-10
      )
      np.testing.assert_array_equal(
        found.nearest_class, head[f"{prefix}nearest_class/{stored_form}"]
      )
      np.testing.assert_allclose(
        rival.radius,
        head[f"{prefix}radius_runner_up/{stored_form}/joint"],
        rtol=1e-10,
      )
      np.testing.assert_array_equal(found.runner_up, head[f"{prefix}runner_up"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_margin_loss_equals_the_reference(head, variant):
  with jax.enable_x64(True):
    _, scores = _head(head, variant)
    present = {m: jnp.ones(1, bool) for m in scores}
    for key, floor in (("margin_loss", None), ("margin_loss_floored", 1e-5)):
      found = jax.vmap(
        lambda s, y, floor=floor: losses.unimodal_margin(
          {m: v[None] for m, v in s.items()}, y[None], present, floor=floor
        )
      )(scores, jnp.asarray(head["labels"]))
      np.testing.assert_allclose(found, head[f"{variant}/{key}"], rtol=1e-10)


@pytest.mark.parametrize("variant", ["uncentred", "row_centred", "rowwise"])
def test_published_objective_equals_the_reference(head, variant):
  with jax.enable_x64(True):
    geometry, scores = _head(head, variant)
    present = {m: jnp.ones(256, bool) for m in scores}
    found = certification.integration_loss(
      geometry.factors,
      scores,
      head["labels"],
      present,
      geometry.lipschitz,
      r0=0.3,
      temperature=0.05,
      bias=geometry.bias,
      fidelity="published",
    )
    expected = -head[f"{variant}/published_objective_per_example"].mean()
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_vulnerability_ratio_equals_the_reference(head):
  with jax.enable_x64(True):
    geometry, scores = _head(head, "uncentred")
    terms = {m: geometry.factors[m][None] * scores[m] for m in scores}
    tables = certification.SensitivityTables(
      tables=certification.pairwise_sensitivity(geometry, "orthonormal"),
      source="global",
      sound=True,
    )
    found = certification.margin_certificate(
      terms, tables, bias=geometry.bias, slack=NO_SLACK
    )
    eta = np.asarray(found.vulnerability_ratio("first", "second"))
    nearest = head["uncentred/nearest_class/general"]
    np.testing.assert_allclose(
      eta[np.arange(256), nearest],
      head["uncentred/vulnerability_ratio"],
      rtol=1e-10,
    )
