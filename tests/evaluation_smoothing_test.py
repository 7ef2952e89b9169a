"""evaluate with certificate="smoothing": entries apart from all others."""

import evaluation_models
import jax
import numpy as np
import pytest
from scipy import special

from robust_mm import evaluation
from robust_mm import smoothing
from robust_mm.evaluation import details
from robust_mm.evaluation import wording

SIGMA = 0.5
SETTINGS = {"sigma": SIGMA, "num_selection": 50, "num_estimation": 2000}


@pytest.fixture(scope="module")
def problem():
  """``(model, params, batch)``: 40 examples, labels the model's own but 4."""
  model = evaluation_models.linear_model(mixed=True)
  params, _ = model.init(jax.random.key(0))
  random = np.random.default_rng(0)
  inputs = {
    name: random.normal(size=(40, d)).astype(np.float32)
    for name, d in evaluation_models.DIMS.items()
  }
  logits = sum(
    inputs[n] @ np.asarray(params["head"][n]).T for n in inputs
  ) + np.asarray(params["bias"])
  label = np.argmax(logits, axis=-1)
  label[:4] = (label[:4] + 1) % 3
  return model, params, {"inputs": inputs, "label": label}


def run(problem, **options):
  model, params, batch = problem
  protocol = evaluation.standard(
    radii=(0.1, 0.3),
    attack=None,
    **{"certificate": "smoothing", "smoothing": SETTINGS, **options},
  )
  return evaluation.evaluate(model, params, batch, protocol=protocol)


@pytest.fixture(scope="module")
def report(problem):
  return run(problem)


def test_smoothed_numbers_stand_apart_and_are_those_of_the_library(
  problem, report
):
  model, params, batch = problem
  found = report.results["smoothed"]
  direct = smoothing.certify(
    model,
    batch,
    smoothing.gaussian(sigma=SIGMA),
    jax.random.fold_in(jax.random.key(0), 2),
    params=params,
    num_selection=50,
    num_estimation=2000,
  )
  right = direct.prediction == batch["label"]
  assert found["accuracy"] == pytest.approx(right.mean())
  assert found["abstained"] == pytest.approx(np.mean(direct.prediction < 0))
  assert report.results["clean"]["accuracy"] == pytest.approx(0.9)
  for row in found["rows"]:
    reach = (
      direct.radius
      if len(row["modalities"]) == 2
      else direct.modality_radius[row["modalities"][0]]
    )
    held = right & (reach > row["radius"])
    assert row["accuracy"] == pytest.approx(held.mean())
    assert row["norm"] == 2
  joint = [r for r in found["rows"] if len(r["modalities"]) == 2]
  assert [row["radius"] for row in joint] == [0.1, 0.3]
  assert 0 < joint[1]["accuracy"] < joint[0]["accuracy"] < 0.9
  # Never merged with certificates of the model itself.
  assert report.results["certified"] == []
  assert report.results["region"] is None
  assert report.results["settings"]["certificate"]["source"] is None
  np.testing.assert_array_equal(
    report.examples["smoothed_radius"], direct.radius
  )
  np.testing.assert_allclose(
    special.ndtri(direct.p_lower[right].astype(float)) * SIGMA,
    direct.radius[right],
    rtol=1e-6,
  )


def test_words_say_the_probability_and_never_certified_alone(report):
  rows = wording.table_rows([report.results])
  kinds = {row["kind"] for row in rows if row["group"] == "smoothed"}
  assert kinds == {
    "smoothed classifier",
    "certified with probability 0.999 (l2)",
  }
  assert not any(row["kind"].startswith("certified (") for row in rows)
  text = " ".join(wording.summary([report.results]))
  assert "certified with probability 0.999 for each example" in text
  tables = details.details(report.results)["tables"]
  assert "Smoothed" in [table["title"] for table in tables]
  assert set(report.results) == set(evaluation.SCHEMA)


def test_report_and_columns_are_explained(report, tmp_path):
  report.save(tmp_path)
  page = (tmp_path / "report.html").read_text()
  assert "certified with probability 0.999" in page
  assert "It answers with the class that the model gives most often" in page
  explained = report.results["examples"]["columns"]
  assert set(explained) == set(report.examples)
  assert "alpha" in explained["smoothed_radius/left"]


def test_sub_sampling_counts_elements(problem):
  settings = {"sigma": 0.0, "keep": {"left": 4, "right": 2}}
  found = run(problem, smoothing=settings).results["smoothed"]
  assert {row["norm"] for row in found["rows"]} == {0}
  assert all(float(row["radius"]).is_integer() for row in found["rows"])
  table = wording.table_rows([run(problem, smoothing=settings).results])
  assert "certified with probability 0.999 (l0)" in {r["kind"] for r in table}


def test_mixed_noise_has_curves_of_single_modalities_only(problem):
  settings = {"sigma": 0.5, "keep": {"left": 4}, "num_estimation": 300}
  report = run(problem, smoothing=settings)
  rows = report.results["smoothed"]["rows"]
  assert {tuple(row["modalities"]) for row in rows} == {("left",), ("right",)}
  assert {r["norm"] for r in rows if r["modalities"] == ["left"]} == {0}
  assert {r["norm"] for r in rows if r["modalities"] == ["right"]} == {2}
  assert "smoothed_radius" not in report.examples
  assert wording.summary([report.results])


def test_sigma_is_in_units(problem):
  units = {"left": 2.0, "right": 0.5}
  report = run(problem, units=units)
  model, params, batch = problem
  noise = smoothing.gaussian(sigma={"left": 2 * SIGMA, "right": 0.5 * SIGMA})
  direct = smoothing.certify(
    model,
    batch,
    noise,
    jax.random.fold_in(jax.random.key(0), 2),
    params=params,
    units=units,
    num_selection=50,
    num_estimation=2000,
  )
  np.testing.assert_array_equal(
    report.examples["smoothed_radius"], direct.radius
  )


@pytest.mark.parametrize(
  "options, words",
  [
    ({"smoothing": {"sigm": 1.0}}, "smoothing must be one of"),
    ({"smoothing": {"alpha": 2.0}}, r"smoothing\['alpha'\]"),
    ({"smoothing": {"num_estimation": 0}}, "num_estimation"),
    ({"norm": "inf"}, "norm must be 2"),
    ({"certificate": "global"}, "goes with certificate='smoothing'"),
    ({"smoothing": {"keep": {"up": 1}}}, "keep names .*'up'"),
    ({"smoothing": {"keep": {"left": 99}}}, r"keep\['left'\]"),
  ],
)
def test_bad_settings_are_named(problem, options, words):
  with pytest.raises(ValueError, match=words):
    run(problem, **options)
