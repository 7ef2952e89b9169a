"""Benchmarks that are long jobs take a few steps, stop, and go on."""

import json
import pathlib
import re
import runpy
import sys

import jax
import numpy as np
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


def test_pictures_are_made_once_and_compared_with_those_without(
  tmp_path, monkeypatch, capsys, data_dir
):
  monkeypatch.setenv("ROBUST_MM_DATA_DIR", str(data_dir))
  turned = "rotation 15, scale .15, jitter 2"
  folder = tmp_path / "visual"
  common = ["--networks=1", "--starts=2", "--smoke", "--workdir", folder]
  rows = ["--rows", "none", turned]
  run(monkeypatch, *common, *rows, name="class_visualization")
  first = capsys.readouterr().out
  files = [
    folder / name / "measured.json"
    for name in ("none", "rotation_15__scale__15__jitter_2")
  ]
  times = [path.stat().st_mtime_ns for path in files]
  table = tmp_path / "table.txt"
  run(
    monkeypatch, *common, *rows, "--output", table, name="class_visualization"
  )
  assert times == [path.stat().st_mtime_ns for path in files]  # kept
  assert table.read_text() in first
  none, other = (json.loads(path.read_text()) for path in files)
  assert set(none) == set(other)
  assert len(none["far"][0]) == 10 * 2
  far = [sum(values["far"][0]) / 20 for values in (none, other)]
  assert f"{turned:46s}{far[1] - far[0]:+10.3f} [" in first
  assert "real test digits" in first
  # Other pictures would be read from the same files.
  with pytest.raises(SystemExit, match="give another folder"):
    run(
      monkeypatch,
      *common[1:],
      "--networks=2",
      *rows,
      name="class_visualization",
    )


@pytest.fixture
def workdir(tmp_path):
  """A folder of a grid that compiles where all tests do.

  And puts back the settings of compilation that the script has changed.
  """
  names = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
  )
  before = {name: getattr(jax.config, name) for name in names}
  folder = tmp_path / "grid"
  folder.mkdir()
  (folder / "compiled").symlink_to(before[names[0]])
  yield folder
  for name, value in before.items():
    jax.config.update(name, value)


def test_the_grid_of_noise_measures_every_arm_once(
  workdir, data_dir, monkeypatch, capsys
):
  common = ["--seeds=1", "--smoke", "--severities", 3, "--images=48"]
  common += ["--attacked=16", "--strength=1"]
  common += ["--arms", "twice_clean", "published"]
  common += ["--set", f"data.path={data_dir}", "mesh.data=1"]
  common += ["--workdir", workdir]
  run(monkeypatch, *common, name="nullspace_grid")
  first = capsys.readouterr().out
  files = sorted(workdir.glob("*/0/measured.json"))
  assert [path.parts[-3] for path in files] == ["published", "twice_clean"]
  times = [path.stat().st_mtime_ns for path in files]
  table = workdir / "table.txt"
  run(monkeypatch, *common, "--output", table, name="nullspace_grid")
  assert times == [path.stat().st_mtime_ns for path in files]  # kept
  assert table.read_text() in capsys.readouterr().out
  noisy, control = (json.loads(path.read_text()) for path in files)
  assert len(noisy["clean"]) == 48
  assert len(noisy["attacked"]) == 16
  assert set(noisy["corrupted"]) == set(control["corrupted"])
  assert (noisy["searches"]["rounds"], control["searches"]) == (2, {})
  # Both are fine-tuned from the same network, and measured each by itself.
  assert (workdir / "pretrained" / "0").is_dir()
  assert noisy["kernel"] != control["kernel"]
  low, high = noisy["kernel"]["dims"]
  assert low <= noisy["kernel"]["dim"] == 17 <= high
  clean = sum(noisy["clean"]) / 48
  rows = [line for line in first.splitlines() if line.startswith("published  ")]
  assert f"{clean:.4f}" in rows[0]
  assert "difference to twice_clean" in first


def test_partial_correlation_is_that_of_three_plain_ones(monkeypatch):
  monkeypatch.syspath_prepend(BENCHMARKS)
  found = runpy.run_path(str(BENCHMARKS / "dispersion_correlation.py"))
  first, second, given = np.random.default_rng(0).normal(size=(3, 30))
  second = second + first + 2 * given
  plain = found["correlation"]
  a, b, c = plain(first, second), plain(first, given), plain(second, given)
  expected = (a - b * c) / np.sqrt((1 - b**2) * (1 - c**2))
  assert found["partial"](first, second, given) == pytest.approx(expected)
  assert abs(expected - a) > 0.1


def test_a_longer_training_is_another_model(monkeypatch):
  """Also beyond the length of the configuration, where its rate would be 0."""
  monkeypatch.syspath_prepend(BENCHMARKS)
  found = runpy.run_path(str(BENCHMARKS / "dispersion_correlation.py"))
  first, second = (
    jax.tree.leaves(found["_trainer"](4, length)(jax.random.key(0)))
    for length in (500, 510)
  )
  assert max(np.abs(a - b).max() for a, b in zip(first, second)) > 1e-4


def test_captions_of_two_losses_are_compared_example_by_example(
  workdir, data_dir, monkeypatch, capsys
):
  common = ["--seeds=1", "--smoke", "--examples=8", "--steps=1"]
  common += ["--restarts=1", "--radii", 0.02, 0.04, "--workdir", workdir]
  common += ["--set", f"data.path={data_dir}"]
  run(monkeypatch, *common, "--losses", "cross-entropy", name="captions")
  (path,) = workdir.glob("cross_entropy/0/measured.json")
  found = json.loads(path.read_text())
  smaller, larger = found["right"]["worst case"]
  assert len(smaller) == len(larger) == found["num_examples"] == 8
  # Two losses alike: paired, nothing is left to chance.
  right = [True] * 5 + [False] * 3
  found["right"]["worst case"] = [right, right]
  path.write_text(json.dumps(found))
  other = workdir / "PRSL__0__2_" / "0" / "measured.json"
  other.parent.mkdir(parents=True)
  other.write_text(json.dumps(found))
  capsys.readouterr()
  table = workdir / "table.txt"
  names = ["--losses", "cross-entropy", "PRSL (0, 2)"]

  def compared():
    run(monkeypatch, *common, *names, "--output", table, name="captions")
    text = table.read_text()
    assert text in capsys.readouterr().out
    lines = text.splitlines()
    (first,) = (i for i, line in enumerate(lines) if "up to 0.0400; sd" in line)
    return lines[first - 2], lines[first + 2]

  for line in compared():
    assert line.startswith("PRSL (0, 2)")
    assert "+0.00 [+0.00, +0.00]" in line
  found["right"]["worst case"] = [right, [*right[:-2], True, True]]
  other.write_text(json.dumps(found))
  smaller, larger = compared()
  assert "+0.00 [+0.00, +0.00]" in smaller
  assert re.search(r"\+25\.00 \[\+0\.00, \+[56]\d\.\d+\]", larger)


def test_the_rate_is_of_the_steps_that_were_taken(monkeypatch, capsys):
  small = ["--size=tiny", "--patch-size=32", "--batch=2", "--repeats=1"]
  run(monkeypatch, "--rate", *small, "--dtype=float32", name="vit_cost")
  *_, line = capsys.readouterr().out.strip().splitlines()
  found = re.search(r"step (\S+) ms +(\S+) images/s +(\S+) TFLOP/s", line)
  milliseconds, images, _ = map(float, found.groups())
  assert images == pytest.approx(2 / (milliseconds / 1e3), rel=0.05, abs=1)
