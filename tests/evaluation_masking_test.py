"""The masking report: honest models pass, each way of hiding is named."""

import evaluation_masked as masked
import evaluation_models as toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import evaluation
from robust_mm.evaluation import verdicts


@pytest.mark.parametrize("norm", [2, "inf"])
def test_an_honest_model_passes_every_check(norm):
  found = masked.report(toy.linear_model(), norm=norm, radius=0.3)
  assert {check["name"] for check in found["checks"]} == masked.CHECKS
  assert not masked.failed(found)
  assert found["passed"]
  # And the attack is the closed form: nothing is left out.
  params, _ = toy.linear_model().init(jax.random.key(0))
  batch = toy.make_batch(60)
  exact = toy.exact_radii if norm == 2 else toy.exact_linf_radii
  right = toy.logits(params, batch["inputs"]).argmax(-1) == batch["label"]
  robust = right & (exact(params, batch["inputs"]) > 0.3)
  assert found["accuracy"]["white box"] == pytest.approx(robust.mean())
  assert found["accuracy"]["clean"] == pytest.approx(right.mean())


def test_rounded_inputs_are_named():
  """No slope anywhere: PGD wanders, random search does not care."""
  found = masked.report(masked.changed(inputs=masked.rounded))
  failed = masked.failed(found)
  assert {"gradients_beat_queries", "gradients_exist"} <= failed
  assert not found["passed"]


@pytest.mark.parametrize(
  "given",
  [
    {"size": 60, "radius": 0.02},
    {"size": 60, "radius": 0.02, "thorough": True},
    {"size": 60, "max_examples": 1},
    {"size": 1},
  ],
  ids=str,
)
def test_no_slope_is_named_where_no_attack_can_tell(given):
  """Too small a size, or too few examples, for any attack to differ."""
  found = masked.report(masked.changed(inputs=masked.rounded), **given)
  assert max(found["statistics"]["model"]["gradient_norm"]) == 0
  assert "gradients_exist" in masked.failed(found)
  assert found["inconclusive"]


def test_only_right_examples_that_can_move_need_a_slope():
  clean, movable = np.array([[1, 1, 0], [1, 0, 1]], bool)
  check = verdicts.gradients_exist(clean, movable, np.array([1e-30, 0, 0]))
  assert check["passed"]
  for bad in (0.0, np.nan, np.inf):
    check = verdicts.gradients_exist(clean, movable, np.array([bad, 1, 1]))
    assert not check["passed"]
    assert "1 of 1 examples" in check["message"]


def test_a_slope_whose_square_is_zero_is_a_slope():
  """In float32 the square of 1e-25 is none."""
  found = masked.report(masked.changed(logits=lambda z: 1e-25 * z))
  norms = found["statistics"]["model"]["gradient_norm"]
  assert 0 < min(norms) <= max(norms) < 1e-23
  assert "gradients_exist" not in masked.failed(found)


@pytest.mark.parametrize(
  "given, message",
  [
    ({"size": 60, "max_examples": 19}, "19 examples are too few"),
    ({"size": 60, "radius": 1e-4}, "the size is too small to tell"),
  ],
  ids=str,
)
def test_an_honest_model_is_open_where_nothing_can_be_told(given, message):
  found = masked.report(toy.linear_model(), **given)
  assert masked.failed(found) == {"conclusive"}
  assert found["inconclusive"]
  assert not found["passed"]
  said = verdicts.summary(found)
  assert not said["passed"]
  assert said["message"].startswith("Whether gradients mislead")
  assert message in said["message"]


def test_examples_of_one_label_leave_the_report_open():
  """No copy breaks anything, so chance was never asked for."""
  model = toy.linear_model()
  params, _ = model.init(jax.random.key(0))
  batch = toy.make_batch(200)
  rows = np.flatnonzero(batch["label"] == 0)[:30]
  assert len(rows) == 30
  batch = jax.tree.map(lambda x: x[rows], batch)
  found = evaluation.masking_report(model, params, batch, radius=0.5)
  assert found["inconclusive"]
  assert not found["passed"]
  assert "No copy of an example" in verdicts.summary(found)["message"]


def test_a_gradient_lost_in_half_precision_is_named_by_divided_logits():
  """Small logits of float16: a thousandth of their slope rounds to zero."""

  def halved(z):
    return (z.astype(jnp.float16) * jnp.float16(1e-5)).astype(jnp.float32)

  found = masked.report(masked.changed(logits=halved), radius=0.3)
  assert "margin_ignores_scale" in masked.failed(found)
  assert "gradients_exist" not in masked.failed(found)
  divisors = [divisor for divisor, _ in found["scales"]["margin"]]
  assert divisors == [1, 10, 100, 1000]


def test_half_a_point_of_difference_is_named_under_divided_logits():
  found = [(1, 0.5), (10, 0.5), (100, 0.493)]
  assert not verdicts.scale("margin", found, 1000)["passed"]
  found[-1] = (100, 0.496)
  assert verdicts.scale("margin", found, 1000)["passed"]


def test_large_logits_are_named_on_the_cross_entropy_only():
  model = masked.changed(logits=lambda z: 1e4 * z)
  found = masked.report(model, loss="cross_entropy")
  assert "cross_entropy_unsaturated" in masked.failed(found)
  assert "margin_ignores_scale" not in masked.failed(found)
  margin = masked.report(model, loss="margin")
  assert masked.failed(margin) == {"cross_entropy_unsaturated"}
  honest = masked.report(toy.linear_model(), loss="cross_entropy")
  assert "cross_entropy_unsaturated" not in masked.failed(honest)


def test_a_gradient_that_points_the_wrong_way_is_named():
  def flipped(x):
    return x + 2 * (jax.lax.stop_gradient(x) - x)

  failed = masked.failed(masked.report(masked.changed(inputs=flipped)))
  assert {"reaches_chance", "gradients_beat_queries"} <= failed


def test_logits_times_a_thousand_saturate_cross_entropy_alone():
  model = masked.changed(logits=lambda z: 1000 * z)
  found = masked.report(model, loss="cross_entropy")
  failed = masked.failed(found)
  assert "cross_entropy_unsaturated" in failed
  assert "margin_ignores_scale" not in failed


def _evaluated(model, **options):
  params, state = model.init(jax.random.key(0))
  attack = {"name": "pgd", "num_steps": 5, "num_restarts": 1, **options}
  protocol = evaluation.standard(
    radii=(masked.RADIUS,), modality_radii=(), attack=attack, tightness=()
  )
  return evaluation.evaluate(
    model, params, toy.make_batch(60), state=state, protocol=protocol
  )


def test_every_report_has_the_line(tmp_path):
  report = _evaluated(toy.linear_model())
  check = report.results["checks"][-1]
  assert check["name"] == "gradients_do_not_mislead"
  assert check["passed"]
  assert report.results["masking"]["radius"] == masked.RADIUS
  assert report.results["timing"]["masking_seconds"] > 0
  report.save(tmp_path)
  page = (tmp_path / "report.html").read_text()
  assert "No sign that gradients mislead the attacks" in page
  assert "gradients beat queries" in page


def test_a_report_says_when_gradients_mislead():
  report = _evaluated(masked.changed(inputs=masked.rounded))
  check = report.results["checks"][-1]
  assert not check["passed"]
  assert not check["required"]
  assert "random search" in check["message"]
  saturated = _evaluated(
    masked.changed(logits=lambda z: 1e4 * z), loss="cross_entropy"
  )
  assert "cross-entropy" in saturated.results["checks"][-1]["message"]


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"radius": 0.0}, "radius must be positive"),
    ({"norm": 3}, "norm must be one of"),
    ({"loss": "hinge"}, "loss must be one of"),
    ({"max_examples": 0}, "max_examples must be an integer of at least 1"),
    ({"units": "relative"}, "units must map modalities to sizes"),
    ({"units": {"up": 1.0}}, "unknown modality 'up'"),
  ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
  with pytest.raises(ValueError, match=message):
    masked.report(toy.linear_model(), **arguments)
