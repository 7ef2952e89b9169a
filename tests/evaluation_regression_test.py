"""Errors of a regression against NumPy; what is refused; the page."""

import math

import jax
import jax.numpy as jnp
import models_regression_test as made
import numpy as np
import pytest

from robust_mm import evaluation
from robust_mm import models
from robust_mm.evaluation import metrics
from robust_mm.training import validation

PROTOCOL = evaluation.standard(
  attack=None,
  certificate=None,
  tightness=(),
  missing_rates=(0.4,),
  missing_seeds=2,
  corruptions={"kinds": ("zeros", "swap"), "severities": (5,)},
)


def setting(target=made.TARGET, size=40, seed=1):
  model = made.make(target=target)
  params, _ = model.init(jax.random.key(seed))
  batch = made.make_batch(size, seed)
  return model, params, batch


@pytest.fixture(scope="module")
def found():
  model, params, batch = setting()
  report = evaluation.evaluate(
    model, params, batch, protocol=PROTOCOL, recipe="joint", dataset="made"
  )
  return model, params, batch, report


def said(model, params, batch, present):
  outputs, _ = model.apply(params, {}, batch["inputs"], present)
  return np.asarray(outputs.logits[:, 0])


def test_rows_are_errors_in_units_of_the_label(found):
  model, params, batch, report = found
  for subset, names in (("a", ["a"]), ("b", ["b"]), ("a+b", ["a", "b"])):
    present = {m: flag & (m in names) for m, flag in batch["present"].items()}
    counted = present["a"] | present["b"]
    label = batch["label"][counted].astype(float)
    predicted = said(model, params, batch, present)[counted].astype(float)
    row = report.results["subsets"][subset]
    error = np.abs(predicted - label)
    assert row["num_examples"] == counted.sum()
    assert row["mae"] == pytest.approx(error.mean(), rel=1e-4)
    r = np.corrcoef(predicted, label)[0, 1]
    assert row["correlation"] == pytest.approx(r, abs=1e-3)
    assert row["interval"][0] < row["mae"] < row["interval"][1]
  clean = report.results["clean"]
  assert clean["mae"] == report.results["subsets"]["a+b"]["mae"]
  label = batch["label"][batch["present"]["a"] | batch["present"]["b"]]
  constant = np.mean(np.abs(label - np.median(label)))
  assert clean["best_constant_mae"] == pytest.approx(constant, rel=1e-5)


def test_results_have_the_documented_keys_and_nothing_about_classes(found):
  results = found[3].results
  assert set(results) == set(evaluation.SCHEMA)
  assert results["task"] == "regression"
  assert not results["attacked"]
  assert not results["certified"]
  (row,) = results["missing"]["rows"]
  assert row["mae"] == pytest.approx(np.mean(row["by_seed"]))
  assert len(set(row["by_seed"])) == 2
  kinds = {row["kind"]: row for row in results["corrupted"]["rows"]}
  assert set(kinds) == {"zeros", "swap"}
  every = [row["mae"] for row in results["corrupted"]["rows"]]
  assert min(every) <= results["corrupted"]["score"] <= max(every)


def test_page_and_table_are_of_errors_alone(found, tmp_path):
  report = found[3]
  report.save(tmp_path)
  page = (tmp_path / "report.html").read_text()
  for word in ("certif", "attack", "accurac", "cross-entropy"):
    assert word not in page.lower(), word
  mae = f"{report.results['clean']['mae']:#.4g}"
  assert f"is off by {mae} on average" in page
  assert {p.stem for p in (tmp_path / "plots").iterdir()} == {
    "subsets",
    "missing",
  }
  lines = str(report).splitlines()
  assert lines[0].split() == ["error", "joint"]
  assert lines[2].split() == ["MAE,", "all", "present", mae]
  header = (tmp_path / "examples.csv").read_text().splitlines()[0]
  assert header.split(",")[:4] == ["id", "label", "prediction", "error"]


def test_sentiment_metrics_are_there_for_labels_in_three_and_only_there(found):
  model, params, batch = setting(models.Target(0.0, 1.0))
  label = np.clip(np.random.default_rng(0).normal(size=40), -3, 3)
  batch["label"] = np.where(np.arange(40) < 9, 0, label).astype(np.float32)
  clean = evaluation.evaluate(model, params, batch).results["clean"]
  rows = batch["present"]["a"] | batch["present"]["b"]
  predicted = said(model, params, batch, batch["present"])[rows]
  label = batch["label"][rows]
  assert clean["accuracy_7"] == metrics.accuracy_7(label, predicted)
  for variant in metrics.VARIANTS:
    for fn in (metrics.accuracy_2, metrics.f1_2):
      name = f"{fn.__name__}_{variant}"
      assert clean[name] == fn(label, predicted, variant=variant)
  assert clean["accuracy_2_nonzero"] != clean["accuracy_2_has_zero"]
  assert "accuracy_7" not in found[3].results["clean"]


def test_predictions_that_are_not_finite_are_no_error_of_zero(tmp_path):
  model, params, batch = setting()
  bad = jax.tree.map(lambda x: x * jnp.nan, params)
  report = evaluation.evaluate(model, bad, batch)
  assert report.results["clean"]["mae"] == "nan"  # JSON has no NaN
  (check,) = report.results["checks"]
  assert not check["passed"]
  report.save(tmp_path)
  assert "predictions are not finite" in (tmp_path / "report.html").read_text()


def test_a_constant_prediction_has_no_correlation():
  model, params, batch = setting()
  zero = jax.tree.map(jnp.zeros_like, params)
  clean = evaluation.evaluate(model, zero, batch).results["clean"]
  assert clean["correlation"] == "nan"
  counted = batch["present"]["a"] | batch["present"]["b"]
  error = np.abs(batch["label"][counted] - 150)
  assert clean["mae"] == pytest.approx(error.mean(), rel=1e-5)


def test_protocols_with_attacks_and_bad_labels_are_refused():
  model, params, batch = setting()
  for protocol in (
    evaluation.standard(),
    evaluation.standard(attack=None, certificate="global"),
  ):
    with pytest.raises(ValueError, match="attack=None and certificate=None"):
      evaluation.evaluate(model, params, batch, protocol=protocol)
  label = np.where(np.arange(40) == 5, np.nan, batch["label"])
  with pytest.raises(ValueError, match="one finite number per example"):
    evaluation.evaluate(model, params, {**batch, "label": label})


def test_numbers_and_classes_have_no_common_page(found, tmp_path):
  import evaluation_results

  mixed = [found[3].results, evaluation_results.make_result("joint")]
  with pytest.raises(ValueError, match="of one task"):
    evaluation.render(mixed, path=tmp_path / "page.html")
  with pytest.raises(ValueError, match="of one task"):
    evaluation.table(mixed)


def test_smaller_errors_are_selected_and_nan_never():
  score = validation.score
  assert score({"mae": 40.0}, "mae") > score({"mae": 41.0}, "mae")
  over = "mae_over_subsets"
  assert score({over: 1.0}, over) > score({over: 2.0}, over)
  name = "correlation"
  assert score({name: 0.6}, name) > score({name: 0.5}, name)
  assert score({name: math.nan}, name) < score({name: -1.0}, name)
