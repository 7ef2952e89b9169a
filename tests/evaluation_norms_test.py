"""evaluate in linf: certificates follow the norm of the attacks."""

import math

import evaluation_models as toy
import jax
import numpy as np
import pytest

from robust_mm import evaluation

RADII = (0.1, 0.3)
UNITS = {"left": 3.0, "right": 0.5}
ATTACK = {"name": "pgd", "loss": "margin", "num_steps": 20, "num_restarts": 2}
NAMES = [("left",), ("right",), ("left", "right")]


def run(*, lipschitz=1.0, norm=math.inf, units=None):
  model = toy.linear_model(lipschitz=lipschitz)
  params, state = model.init(jax.random.key(0))
  batch = toy.make_batch(200)
  protocol = evaluation.standard(
    radii=RADII, attack=ATTACK, norm=norm, units=units
  )
  report = evaluation.evaluate(
    model, params, batch, state=state, protocol=protocol, recipe="toy"
  )
  return report, params, batch


@pytest.fixture(scope="module", params=[None, UNITS], ids=["raw", "units"])
def full(request):
  return *run(units=request.param), request.param


@pytest.fixture(scope="module")
def euclidean():
  return run(norm=2)[0]


def rows_of(results, kind, names):
  return [r for r in results[kind] if r["modalities"] == list(names)]


@pytest.mark.parametrize("names", NAMES, ids="+".join)
def test_linf_radii_are_the_closed_form_of_l2_constants(full, names):
  report, params, batch, units = full
  column = "certified_radius" + ("" if len(names) > 1 else f"/{names[0]}")
  expected = toy.certified_linf_radii(params, batch["inputs"], units, names)
  np.testing.assert_allclose(
    report.examples[column], expected, rtol=1e-3, atol=1e-4
  )
  exact = toy.exact_linf_radii(params, batch["inputs"], units, names)
  assert np.all(report.examples[column] <= exact)
  # Not vacuous: the root of the size costs a factor, not an order.
  assert np.median(report.examples[column] / exact) > 0.6


@pytest.mark.parametrize("names", NAMES, ids="+".join)
def test_linf_attacks_find_the_boundary_and_never_cross_the_bound(full, names):
  report, params, batch, units = full
  exact = toy.exact_linf_radii(params, batch["inputs"], units, names)
  certified = {
    row["radius"]: row["accuracy"]
    for row in rows_of(report.results, "certified", names)
  }
  attacked = rows_of(report.results, "attacked", names)
  assert [row["radius"] for row in attacked] == list(RADII)
  for row in attacked:
    held = report.examples["correct"] & (exact > row["radius"] / 1.05)
    assert certified[row["radius"]] <= row["accuracy"] <= held.mean() + 1e-9


def test_no_linf_attack_inside_flips_and_shrunk_sensitivities_are_refuted(full):
  honest, *_, units = full
  assert [check["passed"] for check in honest.results["checks"]] == [True] * 4
  assert honest.results["tightness"]["factors"][0] == 1.0
  assert honest.results["tightness"]["flipped"][0] == 0.0
  lie, *_ = run(lipschitz=0.4, units=units)
  assert lie.results["tightness"]["flipped"][0] > 0.5
  failed = {c["name"] for c in lie.results["checks"] if not c["passed"]}
  assert failed == {
    "certified_at_most_attacked",
    "nothing_flips_inside_the_radius",
  }


def test_nearest_class_and_shares_are_those_of_the_linf_ball(full):
  report, params, batch, units = full
  slopes = toy.pair_slopes(params, batch["inputs"], units)
  values = toy.logits(params, batch["inputs"])
  top = values.argmax(axis=-1)
  rows = np.arange(len(values))
  scaled = [n**0.5 * s for n, s in zip(toy.DIMS.values(), slopes)]
  with np.errstate(invalid="ignore", divide="ignore"):
    ratios = (values[rows, top][:, None] - values) / sum(scaled)
  ratios[rows, top] = np.inf
  nearest = ratios.argmin(axis=-1)
  np.testing.assert_array_equal(report.examples["nearest_class"], nearest)
  left, right = (s[rows, nearest] ** 2 for s in scaled)
  np.testing.assert_allclose(
    report.examples["vulnerability/left"], left / (left + right), rtol=1e-4
  )


def test_region_is_the_polytope_of_linf_budgets(full):
  report, params, batch, units = full
  region = report.results["region"]
  slopes = toy.pair_slopes(params, batch["inputs"], units)
  values = toy.logits(params, batch["inputs"])
  rows, top = np.arange(len(values)), values.argmax(axis=-1)
  for i, j in ((0, 0), (10, 5), (25, 30), (3, 40)):
    sizes = region["radii"][0][i], region["radii"][1][j]
    left = values[rows, top][:, None] - values
    for n, slope, size in zip(toy.DIMS.values(), slopes, sizes):
      left = left - n**0.5 * slope * size
    left[rows, top] = 1.0
    expected = np.mean(report.examples["correct"] & np.all(left > 0, axis=-1))
    assert abs(region["accuracy"][i][j] - expected) <= 1.01 / len(values)


def test_every_number_says_its_norm(full, euclidean):
  for report, norm in ((full[0], "inf"), (euclidean, 2)):
    results = report.results
    assert {r["norm"] for r in results["certified"]} == {norm}
    assert {r["norm"] for r in results["attacked"]} == {norm}
    assert results["settings"]["certificate"]["norm"] == norm
    assert results["region"]["norm"] == norm
    assert results["tightness"]["norm"] == norm


def test_report_says_linf_and_draws_bound_and_attack_together(full, tmp_path):
  report = full[0]
  page = report.save(tmp_path / "r.html").read_text()
  assert "Norm linf." in page
  assert "every entry of every modality" in page
  assert "l2" not in evaluation.table([report.results])
  (axes,) = evaluation.plots.figures([report.results])["radius_joint"].axes
  labels = axes.get_legend_handles_labels()[1]
  assert labels == ["toy: attacked (pgd)", "toy: certified"]
  assert "linf" in axes.get_xlabel()


def test_runs_in_two_norms_share_no_row_and_no_axis(full, euclidean, tmp_path):
  results = [euclidean.results, full[0].results]
  for line in evaluation.table(results).splitlines():
    if line.startswith(("certified", "attacked")):
      assert ("l2)" in line) != ("linf)" in line)
      assert "-" in line.split()[-2:]
  figure = evaluation.plots.figures(results)["radius_joint"]
  assert len(figure.axes) == 2
  for axes in figure.axes:
    assert len(axes.get_legend_handles_labels()[1]) == 2
  page = evaluation.render(results, path=tmp_path / "r.html").read_text()
  assert "measured in different norms" in page
