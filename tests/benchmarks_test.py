"""Benchmarks that are long jobs take a few steps, stop, and go on."""

import json
import pathlib
import runpy
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


def run(monkeypatch, *arguments, name="immunity_grid"):
  script = str(BENCHMARKS / f"{name}.py")
  # As ``python benchmarks/NAME.py`` has it.
  monkeypatch.syspath_prepend(BENCHMARKS)
  monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
  runpy.run_path(script, run_name="__main__")


def test_the_grid_measures_every_arm_once(tmp_path, monkeypatch, capsys):
  common = ["--dataset=digits", "--seeds=1", "--smoke", "--severities", 3]
  common += ["--workdir", tmp_path / "grid"]
  arms = ["--arms", "every_subset", "full"]
  run(monkeypatch, *common, "--specialists", *arms)
  first = capsys.readouterr().out
  assert "full less the specialist of the subset" in first
  files = sorted((tmp_path / "grid").glob("*/0/measured.json"))
  names = [path.parts[-3] for path in files]
  assert names == ["every_subset", "full", "specialists"]
  times = [path.stat().st_mtime_ns for path in files]
  table = tmp_path / "table.txt"
  run(monkeypatch, *common, "--specialists", *arms, "--output", table)
  assert times == [path.stat().st_mtime_ns for path in files]  # kept
  assert table.read_text() in capsys.readouterr().out
  # What the table says is what was measured.
  found = json.loads(files[1].read_text())
  both = sum(found["correct"]["left+right"]) / len(found["correct"]["left"])
  (row,) = [line for line in first.splitlines() if line.startswith("full  ")][
    :1
  ]
  assert f"{both:.4f}" in row
  assert "zeros" in found["corrupted"]["all"]
  # Other severities, or data, would be read from the same files.
  with pytest.raises(SystemExit, match="holds a grid of"):
    run(monkeypatch, *common[:-3], 5, *common[-2:], *arms)
  with pytest.raises(SystemExit, match="give another folder"):
    run(monkeypatch, *common, "--set", "optimizer.lr=0.1", *arms)


def test_what_is_kept_is_not_measured_again(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(BENCHMARKS)
  import grids

  calls = []

  def measure(folder):
    assert folder.is_dir()
    calls.append(folder)
    return {"value": len(calls)}

  for _ in range(2):
    assert grids.kept(tmp_path / "a", measure) == {"value": 1}
  assert grids.kept(tmp_path / "b", measure) == {"value": 2}
  grids.claim(tmp_path, radii=(1, 2))
  grids.claim(tmp_path, radii=(1, 2))
  with pytest.raises(SystemExit, match="give another folder"):
    grids.claim(tmp_path, radii=(1, 3))
