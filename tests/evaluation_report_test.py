"""Report: files that appear whole, pages that say what was measured."""

import base64
import csv
import json
import re

import evaluation_models as toy
import jax
import numpy as np
import pytest

from robust_mm import evaluation

ATTACK = {"name": "pgd", "loss": "margin", "num_steps": 10, "num_restarts": 1}
PNG = b"\x89PNG\r\n\x1a\n"
HISTORY = [
  {"step": step, "phase": phase, "loss": 1 / step, "validation/accuracy": 0.5}
  for step, phase in ((10, "one"), (20, "one"), (30, "two"))
]
DOCUMENTED = {
  "dataset",
  "recipe",
  "seed",
  "settings",
  "clean",
  "subsets",
  "attacked",
  "certified",
  "timing",
  "examples",
  "checks",
  "units",
  "vulnerability",
}


def make_report(name, seed):
  model = toy.linear_model()
  params, _ = model.init(jax.random.key(seed))
  return evaluation.evaluate(
    model,
    params,
    toy.make_batch(),
    protocol=evaluation.standard(radii=(0.2, 0.6), attack=ATTACK),
    recipe=name,
    dataset="random points",
    seed=seed,
  )


@pytest.fixture(scope="module")
def report():
  return make_report("joint", 0)


@pytest.fixture(scope="module")
def other():
  return make_report("crmt", 1)


@pytest.fixture(scope="module")
def folder(report, tmp_path_factory):
  path = tmp_path_factory.mktemp("report")
  assert report.save(path, history=HISTORY) == path
  return path


def embedded(page):
  """The PNG files inside a page."""
  found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
  return [base64.b64decode(text) for text in found]


def test_results_hold_exactly_what_the_schema_says(report):
  assert set(report.results) == set(evaluation.SCHEMA)
  assert set(report.results) >= DOCUMENTED
  for row in report.results["attacked"]:
    assert {"attack", "norm", "radius", "modalities", "accuracy"} <= set(row)
  for row in report.results["certified"]:
    keys = {"radius", "modalities", "accuracy", "source", "sound"}
    assert keys <= set(row)
  assert report.results["dataset"] == "random points"
  assert report.results["recipe"] == "joint"
  settings = report.results["settings"]["attacks"]["pgd"]
  assert settings["num_steps"] == 10
  assert settings["loss"] == "margin"


def test_results_json_is_strict_and_equals_the_results(report, folder):
  def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")

  text = (folder / "results.json").read_text()
  assert json.loads(text, parse_constant=refuse) == report.results


def test_folder_holds_every_promised_file_and_nothing_else(folder):
  names = {p.relative_to(folder).as_posix() for p in folder.rglob("*.*")}
  plots = {n for n in names if n.startswith("plots/")}
  assert names - plots == {"results.json", "report.html", "examples.csv"}
  assert plots == {
    f"plots/{name}.png"
    for name in (
      "radius_joint",
      "radius_modalities",
      "subsets",
      "contributions",
      "vulnerability",
      "region",
      "tightness",
      "training",
    )
  }


def test_page_is_self_contained_and_holds_the_plots(folder):
  page = (folder / "report.html").read_text()
  pictures = embedded(page)
  assert len(pictures) == 8
  stored = {path.read_bytes() for path in (folder / "plots").iterdir()}
  assert set(pictures) == stored
  assert all(picture.startswith(PNG) for picture in pictures)
  assert not re.search(r"(src|href)=\"(?!data:|#)", page)
  assert "<script" not in page


def test_page_holds_the_numbers_and_their_settings(report, folder):
  page = (folder / "report.html").read_text()
  results = report.results
  assert f"{results['clean']['accuracy']:.4f}" in page
  for row in results["attacked"]:
    assert f"{row['accuracy']:.4f}" in page
  for name in ("left", "right"):
    assert f"only {name} present" in page
    assert f"{results['subsets'][name]['accuracy']:.4f}" in page
  for setting in ("num_steps 10", "loss margin", "source: global"):
    assert setting in page
  for word in ("certified accuracy", "attacked accuracy", "random points"):
    assert word in page


def test_examples_csv_has_the_documented_columns_and_the_values(report, folder):
  with (folder / "examples.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  assert list(rows[0]) == list(report.results["examples"]["columns"])
  assert len(rows) == 60
  assert [int(row["id"]) for row in rows] == list(range(1000, 1060))
  radius = np.array([float(row["certified_radius"]) for row in rows])
  np.testing.assert_array_equal(
    radius.astype(np.float32), report.examples["certified_radius"]
  )
  robust = np.mean([int(row["robust/pgd/left+right/0.6"]) for row in rows])
  entry = report.results["attacked"][-1]
  assert entry["accuracy"] == pytest.approx(robust)


def test_rendering_again_from_the_files_gives_the_same_page(folder, tmp_path):
  results = json.loads((folder / "results.json").read_text())
  evaluation.render(
    [results], histories=[HISTORY], folders=[tmp_path], path=tmp_path
  )
  for name in ("report.html", "plots/training.png"):
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
  path = tmp_path / "one" / "alone.html"
  evaluation.render([results], path=path)
  assert list(path.parent.iterdir()) == [path]


def test_two_runs_stand_side_by_side(report, other, tmp_path):
  path = evaluation.report.render(
    [report.results, other.results],
    histories=[HISTORY, None],
    path=tmp_path,
  )
  page = (path / "report.html").read_text()
  assert "joint and crmt" in page
  for result in (report.results, other.results):
    assert f"{result['clean']['accuracy']:.4f}" in page
  text = evaluation.table([report.results, other.results])
  header, _, first, *_ = text.splitlines()
  assert header.split() == ["accuracy", "joint", "crmt"]
  assert first.split() == ["clean"] + [
    f"{r['clean']['accuracy']:.4f}" for r in (report.results, other.results)
  ]
  lines = text.split("\n\n")[0].splitlines()
  assert len({len(line) for line in lines}) == 1


def test_what_one_run_lacks_is_a_dash_not_a_number(report):
  bare = {**report.results, "name": "bare", "certified": [], "attacked": []}
  lines = evaluation.table([report.results, bare]).splitlines()
  certified = [line for line in lines if line.startswith("certified")]
  assert certified
  assert all(line.split()[-1] == "-" for line in certified)


def test_certified_and_estimated_never_share_a_row(report):
  rows = [{**row, "sound": False} for row in report.results["certified"]]
  estimated = {**report.results, "certified": rows, "name": "estimate"}
  lines = evaluation.table([report.results, estimated]).splitlines()
  for line in lines:
    if line.startswith("certified"):
      assert line.split()[-1] == "-"
    if line.startswith("estimated"):
      assert line.split()[-2] == "-"
  assert any(line.startswith("estimated") for line in lines)


def test_equal_names_are_told_apart(report):
  header = evaluation.table([report.results] * 2).splitlines()[0]
  assert "joint (2)" in header


def test_runs_in_different_units_are_not_called_comparable(report, tmp_path):
  units = {"left": 2.0, "right": 1.0}
  changed = {**report.results, "units": units, "name": "changed"}
  path = tmp_path / "r.html"
  evaluation.render([report.results, changed], path=path)
  assert "radii cannot be" in path.read_text()


def test_names_are_escaped(report, tmp_path):
  evil = {**report.results, "name": "<script>alert(1)</script>"}
  page = evaluation.render([evil], path=tmp_path / "r.html").read_text()
  assert "<script" not in page


def test_bad_requests_are_named(report, tmp_path):
  with pytest.raises(ValueError, match="results"):
    evaluation.render([], path=tmp_path)
  with pytest.raises(ValueError, match="histories"):
    evaluation.render([report.results], histories=[], path=tmp_path)


def test_plots_of_odd_runs_are_drawn(report, tmp_path):
  odd = {
    **report.results,
    "attacked": [],
    "subsets": {},
    "contributions": None,
    "region": None,
    "tightness": None,
    "vulnerability": None,
    "certified": [],
  }
  page = evaluation.render([odd], path=tmp_path / "r.html").read_text()
  assert embedded(page) == []
  rows = [{**row, "norm": "inf"} for row in report.results["attacked"]]
  settings = {**report.results["settings"], "norm": "inf"}
  other = {**report.results, "attacked": rows, "settings": settings}
  drawn = evaluation.plots.figures([other])
  assert len(drawn["radius_joint"].axes) == 2
