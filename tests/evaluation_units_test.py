"""Relative units are typical sizes in the norm that sizes are measured in."""

import evaluation_models as toy
import jax
import numpy as np
import pytest

from robust_mm import _validate
from robust_mm import certification
from robust_mm import evaluation
from robust_mm.training import units as units_lib

ORDERS = {"l2": 2, "linf": np.inf, "l1": 1}


def data(size=60, seed=0):
  rng = np.random.default_rng(seed)
  inputs = {
    name: rng.normal(3, 2, (size, width)).astype(np.float32)
    for name, width in toy.DIMS.items()
  }
  return {"inputs": inputs, "label": rng.integers(0, 3, size)}


def typical(values, norm):
  moved = values - values.mean(axis=0)
  return np.median([np.linalg.norm(row, ORDERS[norm]) for row in moved])


@pytest.mark.parametrize("norm", ORDERS)
def test_relative_units_are_medians_in_the_norm(norm):
  batch = data()
  found = certification.relative_units(batch, norm)
  for name, values in batch["inputs"].items():
    assert found[name] == pytest.approx(typical(values, norm), rel=1e-5)


def test_relative_units_of_an_unknown_norm_are_refused():
  with pytest.raises(ValueError, match="norm must be one of"):
    certification.relative_units(data(), "l3")


@pytest.mark.parametrize("norm, name", [(2, "l2"), ("inf", "linf")])
def test_evaluation_in_relative_units_measures_them_in_its_norm(norm, name):
  model = toy.linear_model()
  params, _ = model.init(jax.random.key(0))
  reference = data(seed=1)
  protocol = evaluation.standard(
    norm=norm, units="relative", attack=None, subsets=False
  )
  results = evaluation.evaluate(
    model, params, data(), protocol=protocol, reference=reference
  ).results
  for m, values in reference["inputs"].items():
    assert results["units"][m] == pytest.approx(typical(values, name), rel=1e-5)
  assert max(r["radius"] for r in results["certified"]) == max(protocol.radii)


def test_default_radii_follow_the_norm():
  assert max(evaluation.standard().radii) == 1.5
  assert max(evaluation.standard(norm="inf").radii) == 0.2
  assert evaluation.standard(norm="inf", radii=()).radii == ()


def test_units_of_a_run_follow_the_norm_or_are_refused():
  facts = {
    "kinds": {"a": "float"},
    "relative_units": {"a": 4.0},
    "relative_units_linf": {"a": 1.5},
  }
  for norm, size in (("l2", 4.0), ("linf", 1.5)):
    assert units_lib.resolve("relative", facts, "x", norm) == {"a": size}
  del facts["relative_units_linf"]
  with pytest.raises(_validate.UserError, match=r"norm linf.*before"):
    units_lib.resolve("relative", facts, "x", "linf")
  assert units_lib.resolve("raw", facts, "x", "linf") is None
