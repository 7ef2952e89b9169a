"""The region of two budgets says what the certificate covers, cell by cell."""

import dataclasses
import functools

import evaluation_models as toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robust_mm as rmm
from robust_mm import evaluation
from robust_mm.evaluation import batches
from robust_mm.evaluation import bounds
from robust_mm.evaluation import summary
from robust_mm.models import functional

RADIUS = 1.2
CELLS = [(0, 0), (0, 30), (30, 0), (10, 5), (25, 30), (49, 3), (3, 49)]


def bounded_model():
  """``left`` may be replaced by anything: its embedding is in a ball."""
  plain = toy.linear_model()

  def encode(params, state, inputs, present, **kwargs):
    found, state = plain.encode(params, state, inputs, present, **kwargs)
    return {**found, "left": functional.project(found["left"], RADIUS)}, state

  def geometry(params):
    return dataclasses.replace(
      plain.geometry(params), embedding_radius={"left": RADIUS}
    )

  return dataclasses.replace(plain, encode=encode, geometry=geometry)


@functools.cache
def setup():
  model = bounded_model()
  params, _ = model.init(jax.random.key(0))
  # Little weight on what may be anything, so that many survive it.
  head = {**params["head"], "left": 0.4 * params["head"]["left"]}
  params = {**params, "head": head}
  rng = np.random.default_rng(0)
  batch = {
    "inputs": {
      name: rng.normal(size=(300, size)).astype(np.float32)
      for name, size in toy.DIMS.items()
    },
  }
  outputs, _ = model.apply(
    params, {}, batch["inputs"], {m: np.ones(300, bool) for m in toy.DIMS}
  )
  label = np.asarray(jnp.argmax(outputs.logits, axis=-1), np.int32)
  # One in ten is wrong.
  batch["label"] = np.where(rng.random(300) < 0.1, (label + 1) % 3, label)
  return model, params, batch


def check(region, certificate, label):
  """Accuracies of cells from ``covers``, which knows nothing of a grid."""
  seen = set()
  for i, j in CELLS:
    sizes = {"left": region["radii"][0][i], "right": region["radii"][1][j]}
    covered = certificate.covers(sizes)
    expected = np.mean(covered & (certificate.prediction == label))
    # One example may sit on a line of the grid.
    assert abs(region["accuracy"][i][j] - expected) <= 1.01 / len(label)
    seen.add(round(float(expected), 2))
  assert len(seen) > 4, "the cells tell nothing apart"


def test_region_of_a_bounded_modality_is_what_covers_says():
  model, params, batch = setup()
  protocol = evaluation.standard(radii=(0.2,), attack=None, subsets=False)
  found = evaluation.evaluate(model, params, batch, protocol=protocol)
  certificate = rmm.certify(model, params, batch)
  region = found.results["region"]
  check(region, certificate, batch["label"])
  # Far out on the axis, what is held bears any change of left.
  accuracy = np.asarray(region["accuracy"])
  right = certificate.prediction == batch["label"]
  anything = np.mean(certificate.covers({"left": np.inf}) & right)
  assert anything > 0.1
  np.testing.assert_allclose(accuracy[-1, 0], anything, atol=0.07)
  assert accuracy[0, 0] > anything + 0.1


@pytest.mark.parametrize("source", ["relaxation", "best"])
def test_region_of_balls_is_what_covers_says(source):
  model, params, batch = setup()
  if source == "relaxation":
    # No constants, so nothing but the balls.
    model = toy.linear_model(geometry=False)
  else:
    # A constant four times too large: the balls are far outside.
    model = toy.linear_model(lipschitz=4.0)
  found = rmm.certify(model, params, batch, source=source)
  values = bounds.Bounds(
    prediction=np.asarray(found.prediction),
    radius=np.asarray(found.radius),
    modality_radius=jax.tree.map(np.asarray, found.modality_radius),
    nearest_class=np.asarray(found.nearest_class),
    vulnerability=jax.tree.map(np.asarray, found.vulnerability),
    certificate=jax.tree.map(np.asarray, dataclasses.replace(found, units={})),
    source=source,
    sound=True,
    norm=2,
  )
  data = batches.host_data(model, batch)
  right = values.prediction == batch["label"]
  region = summary.region(values, right, data)
  check(region, found, batch["label"])
