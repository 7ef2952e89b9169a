"""mAP against scikit-learn; what is refused; the page."""

import math

import jax
import jax.numpy as jnp
import models_multi_label_test as made
import models_regression_test
import numpy as np
import pytest
import sklearn.metrics

from robust_mm import evaluation
from robust_mm.corruptions import donors
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


def setting(size=40, seed=1):
  model = made.make()
  params, _ = model.init(jax.random.key(seed))
  return model, params, made.make_batch(size, seed)


@pytest.fixture(scope="module")
def found():
  model, params, batch = setting()
  report = evaluation.evaluate(
    model, params, batch, protocol=PROTOCOL, recipe="joint", dataset="made"
  )
  return model, params, batch, report


def peer(label, score):
  """scikit-learn's mean over the classes that have a positive."""
  there = label.any(axis=0)
  return sklearn.metrics.average_precision_score(
    label[:, there], score[:, there], average="macro"
  )


def test_mean_average_precision_is_sklearn_s_with_ties_and_empty_classes():
  rng = np.random.default_rng(0)
  label = rng.random((60, 8)) < 0.2
  label[:, 3] = False
  score = rng.integers(0, 12, (60, 8)).astype(float)
  found = metrics.mean_average_precision(label, score)
  assert found == pytest.approx(peer(label, score), rel=1e-12)
  assert metrics.mean_average_precision(label, -score) != pytest.approx(found)
  score[5, 5] = math.nan
  assert math.isnan(metrics.mean_average_precision(label, score))


def test_rows_are_mean_average_precisions(found):
  model, params, batch, report = found
  for subset, names in (("a", ["a"]), ("b", ["b"]), ("a+b", ["a", "b"])):
    present = {m: flag & (m in names) for m, flag in batch["present"].items()}
    counted = present["a"] | present["b"]
    outputs, _ = model.apply(params, {}, batch["inputs"], present)
    label, said = batch["label"][counted], np.asarray(outputs.logits)[counted]
    row = report.results["subsets"][subset]
    assert row["map"] == pytest.approx(peer(label > 0, said), rel=1e-3)
    assert row["num_examples"] == counted.sum()
    assert row["num_classes"] == label.any(axis=0).sum()
    hits = label[np.arange(len(label)), said.argmax(axis=1)]
    assert row["hit_at_1"] == pytest.approx(hits.mean())
  clean = report.results["clean"]
  assert clean["map"] == report.results["subsets"]["a+b"]["map"]
  constant = peer(label > 0, np.zeros_like(label))
  assert clean["constant_map"] == pytest.approx(constant)


def test_results_have_the_documented_keys_and_nothing_about_one_class(found):
  results = found[3].results
  assert set(results) == set(evaluation.SCHEMA)
  assert results["task"] == "multi_label"
  assert not results["attacked"]
  assert not results["certified"]
  (row,) = results["missing"]["rows"]
  assert row["map"] == pytest.approx(np.mean(row["by_seed"]))
  assert len(set(row["by_seed"])) == 2
  kinds = {row["kind"]: row["map"] for row in results["corrupted"]["rows"]}
  assert set(kinds) == {"zeros", "swap"}
  every = [row["map"] for row in results["corrupted"]["rows"]]
  assert min(every) <= results["corrupted"]["score"] <= max(every)


def test_page_and_table_are_of_map_alone(found, tmp_path):
  report = found[3]
  report.save(tmp_path)
  page = (tmp_path / "report.html").read_text()
  for word in ("certif", "attack", "accurac", "interval of", " off by"):
    assert word not in page.lower(), word
  shown = f"{report.results['clean']['map']:.4g}"
  assert f"has a mean average precision of {shown} on" in page
  assert {p.stem for p in (tmp_path / "plots").iterdir()} == {
    "subsets",
    "missing",
  }
  lines = str(report).splitlines()
  assert lines[0].split() == ["mAP", "joint"]
  assert lines[2].split() == ["mAP,", "all", "present", shown]
  header, first = (tmp_path / "examples.csv").read_text().splitlines()[:2]
  assert header.split(",")[:4] == ["id", "num_labels", "top", "hit"]
  assert first.split(",")[1] == str(int(found[2]["label"][0].sum()))


def test_predictions_that_are_not_finite_are_no_map():
  model, params, batch = setting()
  bad = jax.tree.map(lambda x: x * jnp.nan, params)
  report = evaluation.evaluate(model, bad, batch)
  assert report.results["clean"]["map"] == "nan"  # JSON has no NaN
  assert not report.results["checks"][0]["passed"]


def test_protocols_with_attacks_and_bad_labels_are_refused():
  model, params, batch = setting()
  with pytest.raises(ValueError, match="attack=None and certificate=None"):
    evaluation.evaluate(model, params, batch, protocol=evaluation.standard())
  for label in (batch["label"][:, :3], 0.5 * batch["label"], np.zeros(40)):
    with pytest.raises(ValueError, match=r"must be \[n, 5\] of 0 and 1"):
      evaluation.evaluate(model, params, {**batch, "label": label})


def test_numbers_and_several_labels_have_no_common_page(found, tmp_path):
  model = models_regression_test.make()
  params, _ = model.init(jax.random.key(0))
  other = evaluation.evaluate(
    model, params, models_regression_test.make_batch(20)
  )
  mixed = [found[3].results, other.results]
  with pytest.raises(ValueError, match="of one task") as caught:
    evaluation.render(mixed, path=tmp_path / "page.html")
  assert "a number (regression)" in str(caught.value)


def test_a_swap_looks_for_another_set_of_labels():
  label = jnp.array([[1, 0], [1, 0], [1, 1]], jnp.float32)
  values = jnp.arange(3.0)[:, None]
  given = {
    "inputs": {"a": values},
    "present": {"a": jnp.ones(3, bool)},
    "label": label,
    "id": jnp.arange(3),
  }
  keys = {"a": jax.random.split(jax.random.key(0), 3)}
  ids = jnp.arange(3, dtype=jnp.uint32)
  chosen, there = donors.swapped(keys, ids, label, given)["a"]
  assert there.all()
  np.testing.assert_array_equal(chosen[:2, 0], 2)
  assert chosen[2, 0] in (0, 1)


def test_larger_map_is_selected_and_nan_never():
  score = validation.score
  for name in ("map", "map_over_subsets"):
    assert score({name: 0.5}, name) > score({name: 0.4}, name)
    assert score({name: math.nan}, name) < score({name: 0.0}, name)
