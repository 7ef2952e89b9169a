"""The costly checks of the masking report, and points of another model."""

import dataclasses

import evaluation_masked as masked
import evaluation_models as toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import evaluation
from robust_mm.evaluation import probes
from robust_mm.evaluation import thorough

THOROUGH = {
  "more_effort_finds_no_more",
  "no_objective_is_stronger",
  "white_box_beats_transfer",
}


def test_an_honest_model_passes_the_costly_checks_as_well():
  found = masked.report(
    toy.linear_model(), radius=0.3, thorough=True, surrogate=masked.surrogate()
  )
  assert {
    check["name"] for check in found["checks"]
  } == masked.CHECKS | THOROUGH
  assert found["passed"], masked.failed(found)
  white = found["accuracy"]["white box"]
  # Of a linear model every effort and every objective is exact but the ones
  # that follow a sum of classes; points made for itself are its own.
  assert found["objectives"]["margin of every class"] == pytest.approx(white)
  assert found["transfer"] == pytest.approx(white, abs=0.02)
  last = found["effort"][-1]
  assert last[:2] == [50, 20]
  assert last[2] == pytest.approx(white)
  # Statistics against the closed form of a linear model.
  params, _ = toy.linear_model().init(jax.random.key(0))
  batch = toy.make_batch(60)
  logits = np.asarray(toy.logits(params, batch["inputs"]), np.float64)
  own = logits[np.arange(60), batch["label"]]
  rival = np.where(
    np.arange(logits.shape[1]) == batch["label"][:, None], -np.inf, logits
  ).max(axis=1)
  stated = found["statistics"]["model"]
  np.testing.assert_allclose(
    stated["margin"], np.quantile(own - rival, stated["quantiles"]), rtol=1e-4
  )
  np.testing.assert_allclose(
    stated["logit_norm"],
    np.quantile(np.linalg.norm(logits, axis=1), stated["quantiles"]),
    rtol=1e-4,
  )
  assert found["statistics"]["surrogate"] == stated


def test_points_made_for_another_model_unmask_rounded_inputs():
  """No slope to follow, but the honest twin has the same weak directions."""
  found = masked.report(
    masked.changed(inputs=masked.rounded),
    thorough=True,
    surrogate=masked.surrogate(),
  )
  failed = masked.failed(found)
  assert {"white_box_beats_transfer", "gradients_exist"} <= failed
  assert found["transfer"] < found["accuracy"]["white box"] - 0.1
  assert max(found["statistics"]["model"]["gradient_norm"]) == 0


def test_a_stronger_objective_and_unfinished_efforts_are_named():
  """Logits so large that the cross-entropy has no slope left."""
  found = masked.report(
    masked.changed(logits=lambda z: 1e4 * z),
    loss="cross_entropy",
    thorough=True,
  )
  assert "no_objective_is_stronger" in masked.failed(found)
  assert "transfer" not in found

  class Slow(probes.Probe):
    num_classes = 3

    def __init__(self):
      pass

    def left(self, radius, **given):
      return 1 - given["num_steps"] / 400 if "num_restarts" in given else 0.5

  _, checks = thorough.measure(
    Slow(), loss="margin", radius=0.3, white=0.5, least=0.02, surrogate=None
  )
  assert {name: passed for name, passed, _ in checks} == {
    "more_effort_finds_no_more": False,
    "no_objective_is_stronger": True,
  }


@pytest.mark.parametrize(
  "change", [{"modalities": ("left",)}, {"num_classes": 2}], ids=str
)
def test_a_surrogate_of_another_task_is_refused(change):
  """Its points would be no attack, and the check would pass for nothing."""
  other = masked.surrogate()
  model = dataclasses.replace(other.model, **change)
  other = dataclasses.replace(other, model=model)
  with pytest.raises(
    ValueError, match=f"surrogate must have the {next(iter(change))}"
  ):
    masked.report(toy.linear_model(), thorough=True, surrogate=other)


def test_a_surrogate_of_other_input_shapes_is_refused():
  """Where both models state them; of another one nothing is known."""
  shapes = {"left": (4,), "right": (3,)}

  def having(found):
    return dataclasses.replace(toy.linear_model(), input_shapes=found)

  def checked(mine, other):
    other = dataclasses.replace(masked.surrogate(), model=having(other))
    thorough.check_surrogate(having(mine), other)

  checked(shapes, dict(reversed(shapes.items())))
  checked(shapes, None)
  checked(None, shapes)
  message = r"the model, \(3,\), for 'right'; got \(5,\)\."
  with pytest.raises(ValueError, match=message):
    checked(shapes, {**shapes, "right": (5,)})


def test_surrogate_goes_with_thorough():
  with pytest.raises(ValueError, match="surrogate goes with thorough=True"):
    masked.report(toy.linear_model(), surrogate=masked.surrogate())
  model = toy.linear_model()
  params, _ = model.init(jax.random.key(0))
  for given in ({}, {"masking_thorough": True, "attack": None}):
    with pytest.raises(ValueError, match="surrogate needs a protocol with"):
      evaluation.evaluate(
        model,
        params,
        toy.make_batch(20),
        protocol=evaluation.standard(radii=(masked.RADIUS,), **given),
        surrogate=masked.surrogate(),
      )


def test_rounded_logits_fail_against_transfer_and_queries():
  """No gradient at all: PGD wanders, others do not need one."""
  found = masked.report(
    masked.changed(
      logits=lambda z: jnp.round(4 * z) / 4 + 1e-3 * jnp.arange(3)[None]
    ),
    thorough=True,
    surrogate=masked.surrogate(),
  )
  assert {
    "gradients_beat_queries",
    "white_box_beats_transfer",
  } <= masked.failed(found)
  # The worst case is no better than the best attack of all.
  shares = [*found["objectives"].values(), found["transfer"]]
  shares += [found["accuracy"][name] for name in ("white box", "queries")]
  assert found["worst_case"] <= min(shares) + 1e-9
  assert found["worst_case"] < found["accuracy"]["white box"] - 0.05
