"""evaluate with a certificate from bounds inside balls."""

import evaluation_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import certification
from robust_mm import config
from robust_mm import evaluation
from robust_mm import models
from robust_mm.evaluation import protocol

RADII = (0.1, 0.4, 1.0)


def _report(source, size=70, **model):
  model = evaluation_models.linear_model(**model)
  params, state = model.init(jax.random.key(0))
  return evaluation.evaluate(
    model,
    params,
    evaluation_models.make_batch(size),
    state=state,
    protocol=evaluation.standard(
      radii=RADII, attack=None, certificate=source, tightness=(), subsets=False
    ),
  )


def _accuracies(report):
  return {
    (*row["modalities"], row["radius"]): row["accuracy"]
    for row in report.results["certified"]
  }


@pytest.mark.parametrize("source", ["local", "relaxation", "best"])
def test_linear_models_are_certified_exactly(source):
  """Identity encoders: the constants are exact, so no source beats another."""
  exact = _accuracies(_report("global"))
  # More than one batch of bounds; constants that are 3 times too large.
  loose = _report(source, lipschitz=3.0)
  found = _accuracies(loose)
  assert found.keys() == exact.keys()
  np.testing.assert_allclose(
    list(found.values()), list(exact.values()), atol=1 / 70 + 1e-9
  )
  certificate = loose.results["settings"]["certificate"]
  assert certificate["source"] == source
  assert certificate["sound"]
  assert _accuracies(_report("global", lipschitz=3.0)) != exact


def test_models_without_a_geometry_are_certified_where_they_are_known():
  exact = _accuracies(_report("global"))
  for model in ({"geometry": False}, {"mixed": True}, {"lipschitz": None}):
    found = _accuracies(_report("relaxation", **model))
    np.testing.assert_allclose(
      list(found.values()), list(exact.values()), atol=1 / 70 + 1e-9
    )


def test_a_model_there_is_no_relaxation_for_is_refused_by_its_operation():
  model = models.from_function(
    lambda w, x: jnp.sin(x["left"]) @ w,
    jnp.ones((5, 3)),
    num_classes=3,
    input_shapes={"left": (5,)},
  )
  params, state = model.init(jax.random.key(0))
  with pytest.raises(ValueError, match="sin"):
    evaluation.evaluate(
      model,
      params,
      evaluation_models.make_batch(10),
      state=state,
      protocol=evaluation.standard(
        radii=RADII, attack=None, certificate="relaxation", tightness=()
      ),
    )


def test_configurations_know_every_certificate():
  known = ("none" if c is None else c for c in protocol.CERTIFICATES)
  assert tuple(known) == config.CERTIFICATES
  assert set(certification.SOURCES) < set(config.CERTIFICATES)
