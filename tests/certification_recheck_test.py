"""The release check refutes every inflated part of a certificate."""

import dataclasses

import certification_models as hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robust_mm as rmm
from robust_mm import certification
from robust_mm.models import functional

RADIUS = 1.5


def projected():
  """Identity encoders, embeddings in a ball of RADIUS: all is exact."""
  plain = hand.late_fusion(
    lambda params, m, x: functional.project(x, RADIUS),
    lambda params: dict.fromkeys(("audio", "image"), 1.0),
    modalities=("audio", "image"),
    num_classes=4,
  )

  def geometry(params):
    bounds = dict.fromkeys(plain.modalities, RADIUS)
    return dataclasses.replace(plain.geometry(params), embedding_radius=bounds)

  return dataclasses.replace(plain, geometry=geometry)


MODELS = {
  "dense": (hand.mlp, 6),
  "identity": (hand.identity, None),
  "projected": (projected, None),
}


@pytest.fixture(scope="module")
def found():
  """``found(name, source)``: (model, parameters, batch, certificate)."""
  kept = {}

  def find(name, source="global"):
    if (name, source) not in kept:
      make, width = MODELS[name]
      model, params = make(), hand.random_params(1, width=width)
      batch = hand.random_batch(2, 40, absent=0.1)
      certificate = rmm.certify(model, params, batch, source=source)
      kept[name, source] = model, params, batch, certificate
    return kept[name, source]

  return find


def scaled(tree, factor):
  return jax.tree.map(lambda x: factor * x, tree)


@pytest.mark.parametrize(
  "name, part, factor",
  [
    ("dense", "margins", 10.0),
    ("dense", "sensitivity", 0.1),
    ("dense", "radius", 1.01),
    ("dense", "modality_radius", 1.01),
    ("dense", "contributions", -1.0),
    ("projected", "margins", 10.0),
    ("projected", "sensitivity", 0.1),
    ("projected", "drops", 0.1),
  ],
)
def test_every_part_is_confirmed_and_its_inflation_refuted(
  found, name, part, factor
):
  model, params, batch, certificate = found(name)
  assert certification.recheck_fp64(model, params, batch, certificate) == 0
  wrong = dataclasses.replace(
    certificate, **{part: scaled(getattr(certificate, part), factor)}
  )
  count = certification.recheck_fp64(model, params, batch, wrong)
  assert count > 0.8 * np.sum(certificate.valid & (certificate.radius > 0))


def test_a_drop_of_what_is_not_bounded_is_refuted(found):
  model, params, batch, certificate = found("dense")
  wrong = dataclasses.replace(certificate, drops=certificate.sensitivity)
  assert certification.recheck_fp64(model, params, batch, wrong) > 20


@pytest.mark.parametrize("source", ["local", "relaxation", "best"])
@pytest.mark.parametrize("name", ["dense", "identity"])
def test_balls_are_confirmed_as_they_are_stated(found, name, source):
  model, params, batch, certificate = found(name, source)
  assert certificate.balls is not None
  assert certification.recheck_fp64(model, params, batch, certificate) == 0


@pytest.mark.parametrize("source", ["local", "relaxation", "best"])
@pytest.mark.parametrize("part", ["joint", "audio", "image"])
def test_larger_balls_are_refuted_where_they_are_tight(found, source, part):
  """Of a linear model every ball is the largest one there is."""
  model, params, batch, certificate = found("identity", source)
  balls = certificate.balls
  wrong = {"joint": balls.joint, **balls.alone}
  wrong[part] = 1.2 * wrong[part]
  joint = wrong.pop("joint")
  cheat = dataclasses.replace(
    certificate, balls=balls._replace(joint=joint, alone=wrong)
  )
  size = joint if part == "joint" else wrong[part]
  claims = np.sum(np.isfinite(size) & (np.asarray(size) > 0))
  assert claims > 20
  count = certification.recheck_fp64(model, params, batch, cheat)
  assert count >= 0.9 * claims


@pytest.mark.parametrize("part", ["radius", "modality_radius"])
def test_a_radius_of_neither_balls_nor_polytope_is_refuted(found, part):
  model, params, batch, certificate = found("dense", "best")
  wrong = dataclasses.replace(
    certificate, **{part: scaled(getattr(certificate, part), 1.01)}
  )
  assert certification.recheck_fp64(model, params, batch, wrong) > 20


def test_best_of_all_inside_jit_certifies_no_false_geometry(found):
  """A geometry with other rows has no balls either: its slopes are wrong."""
  model, params, batch, certificate = found("identity", "best")
  assert np.all(np.asarray(certificate.radius)[certificate.valid] > 0)

  def geometry(params):
    true = model.geometry(params)
    return dataclasses.replace(true, bias=true.bias + jnp.arange(4.0))

  false = dataclasses.replace(model, geometry=geometry)
  for source in ("global", "best"):
    cheat = jax.jit(
      lambda params, batch: rmm.certify(
        false,
        params,
        batch,
        source=source,  # noqa: B023
      )
    )(params, batch)
    assert np.all(np.asarray(cheat.radius)[cheat.valid] == 0)
    assert not np.any(np.asarray(cheat.covers({"audio": 1e-6}))[cheat.valid])
