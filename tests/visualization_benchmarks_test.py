"""Benchmarks of visualisations: tables of few steps, and what they compare."""

import pathlib
import runpy
import sys

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


def script(monkeypatch, name, *arguments, run_name="__main__"):
  path = str(BENCHMARKS / f"{name}.py")
  monkeypatch.syspath_prepend(BENCHMARKS)
  monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
  return runpy.run_path(path, run_name=run_name)


@pytest.fixture
def networks(monkeypatch):
  return script(monkeypatch, "visualization_networks", run_name="networks")


def told(far, **more):
  row = {"near": 0.9, "far": far, "total_variation": 0.2, "diversity": 4.0}
  return {
    "numbers": {
      "synthesised": {**row, "mean": 0.3},
      "synthesised, class of the item": {**row, "far": far + 0.1},
      "none": {**row, "far": 0.5},
      "shifts only": {**row, "far": 0.6},
      "real items": {**row, "total_variation": 0.1, "diversity": 8.0},
    },
    "margins": {
      "": {"audio": 1.0, "image": 2.0},
      "class of the item": {"audio": 3.0, "image": 2.0},
    },
  }


def test_lines_have_controls_real_items_and_units_of_those(networks):
  lines = networks["_lines"]("plain image (0.98)", [told(0.7), told(0.9)])
  heads = [line[:56].strip() for line in lines]
  assert heads[0] == "plain image (0.98)"
  assert heads[2] == "synthesised, class of the item"
  assert heads[4] == "real items"
  assert "audio 1.0000" in lines[1]
  assert "audio 3.0000" in lines[3]
  cells = dict(
    zip(
      networks["NUMBERS"],
      [lines[0][56 + 18 * i : 74 + 18 * i].strip() for i in range(9)],
    )
  )
  assert cells["far"].startswith("0.8000 +-")
  assert cells["far less none"].startswith("0.3000 +-")
  assert cells["far less shifts"].startswith("0.2000 +-")
  assert cells["total_variation"].startswith("2.0000")
  assert cells["diversity"].startswith("0.5000")
  assert cells["mean"].startswith("0.3000")


def test_no_question_is_asked_twice_and_actions_are_those_named(networks):
  settings = networks["SETTINGS"]
  asked = [
    (network, repr(sorted(question.items())))
    for network, _, question in settings["with others"]
  ]
  assert len(set(asked)) == len(asked) == 14
  labels = {
    question["labels"]
    for network, _, question in settings["with others"]
    if network == "utd_mhad"
  }
  assert labels == {(0, 3, 19, 24)}
  # What is compared with the certified perceptron is one too.
  names = [network for network, _, _ in settings["networks"]]
  assert {"plain_mlp", "adversarial_mlp", "certified"} <= set(names)


def test_objectives_of_a_network_become_a_table(
  tmp_path, monkeypatch, capsys, data_dir
):
  monkeypatch.setenv("ROBUST_MM_DATA_DIR", str(data_dir))
  table = tmp_path / "table.txt"
  script(
    monkeypatch,
    "visualization_networks",
    *("--seeds=1", "--starts=1", "--smoke", "--parts", "objectives"),
    *("--workdir", tmp_path / "work", "--output", table),
  )
  shown = capsys.readouterr().out
  assert table.read_text() in shown
  for objective in ("margin", "logit", "log_prob"):
    assert f"plain image {objective} (" in shown
  assert shown.count("real items") == 3


def test_rows_are_compared_with_their_own_control(monkeypatch):
  made = script(monkeypatch, "class_visualization", run_name="pictures")
  rng = np.random.default_rng(0)

  def row(mean):
    return {"far": np.clip(rng.normal(mean, 0.2, (3, 30)), 0, 1).tolist()}

  wide = {"far": [[0.0, 1.0] * 15] * 3}
  found = {
    "none": {"far": [[0.0] * 30] * 3},
    "jitter 2 px only": {"far": [[0.5] * 30] * 3},
    "rotation 15, scale .15, jitter 2": {"far": [[0.6] * 30] * 3},
    "rotation 10, scale .1, jitter 2": {"far": [[0.0] * 23 + [1.0] * 7] * 3},
    "published: none": row(0.7),
    "published (rotation 15, scale .15)": row(0.7),
    "auto scale, weights 10 and 5: none": wide,
    "auto scale, weights 10 and 5: rotation 15": wide,
  }
  lines = made["_differences"](found)
  flagged = [line[:46].strip() for line in lines if "20 points" in line]
  # A mean of 0.233 whose interval reaches below is none.
  assert flagged == ["jitter 2 px only", "rotation 15, scale .15, jitter 2"]
  published = next(line for line in lines if line.startswith("published ("))
  assert abs(float(published[46:56])) < 0.1  # against its own, not none
  last = next(line for line in lines if line.startswith("auto scale, weights"))
  assert float(last[46:56]) == 0
  assert not any(line.startswith("published: none") for line in lines)
  (first, second) = made["_controlled"](found)
  assert float(second[46:56]) == pytest.approx(0.1)
  assert float(first[46:56]) == pytest.approx(7 / 30 - 0.5, abs=1e-3)
