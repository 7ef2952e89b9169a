"""robust-mm certify --source=smoothing: rows, resuming, refusals."""

import csv
import os
import re
import signal
import subprocess
import sys

import command_line
import jax
import numpy as np
import pytest

import robust_mm
from robust_mm import cli
from robust_mm import data
from robust_mm import smoothing
from robust_mm.evaluation import smoothed

SIZE = 20
SHORT = (
  "--config.num_steps=60",
  "--config.data.max_train_examples=400",
  "--config.training.eval_every=60",
  "--config.training.checkpoint_every=60",
)
JOB = ("--source=smoothing", "--sigma=0.25", "--num-samples=300")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  config = "--config=configs/joint.py:digits,noise,token,smoke"
  assert cli.main(["train", config, f"--workdir={folder}", *SHORT]) == 0
  return folder


def certify(capsys, workdir, output, *options):
  """``(printed text, {column: values})`` of one command."""
  code, out, err = command_line.run(
    capsys,
    "certify",
    f"--workdir={workdir}",
    f"--output={output}",
    f"--limit={SIZE}",
    *options,
  )
  assert code == 0, err
  with output.open(newline="") as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == SIZE
  return out, {name: [row[name] for row in rows] for name in rows[0]}


def numbers(columns, name):
  return np.array([float(value) for value in columns[name]])


def reference(workdir, noise, **options):
  model, params, state, _ = robust_mm.load(workdir)
  batch = data.load("digits", split="test", limit=SIZE)
  found = smoothing.certify(
    model,
    batch,
    noise,
    jax.random.key(0),
    params=params,
    state=state,
    num_estimation=300,
    **options,
  )
  return found, np.asarray(batch["label"])


def test_rows_are_those_of_the_library_on_eight_devices(
  capsys, tmp_path, workdir
):
  assert jax.device_count() == 8
  out, columns = certify(
    capsys,
    workdir,
    tmp_path / "rows.csv",
    *JOB,
    "--radius=0.1,0.2",
    "--budget=left=0.1,right=0.05",
  )
  found, label = reference(workdir, smoothing.gaussian(sigma=0.25))
  np.testing.assert_array_equal(
    numbers(columns, "smoothed_prediction"), found.prediction
  )
  np.testing.assert_array_equal(
    numbers(columns, "votes"), found.counts.max(axis=-1)
  )
  np.testing.assert_allclose(
    numbers(columns, "smoothed_radius"), found.radius, rtol=1e-6
  )
  np.testing.assert_array_equal(
    numbers(columns, "abstained"), found.prediction < 0
  )
  covered = found.covers({"left": 0.1, "right": 0.05})
  name = "smoothed_covers_left=0.1+right=0.05"
  np.testing.assert_array_equal(numbers(columns, name), covered)
  right = found.prediction == label
  assert 0 < np.mean(right & covered) < 1
  assert f"budget left=0.1,right=0.05: {np.mean(right & covered):.4f}" in out
  assert f"all by 0.2: {np.mean(right & (found.radius > 0.2)):.4f}" in out
  assert "certified with probability 1 - alpha = 0.999 for each example" in out
  assert set(columns["alpha"]) == {"0.001"}
  claims = [c for c in columns if re.search("radius|stable|covers", c)]
  assert claims
  assert all(c.startswith("smoothed_") for c in claims)
  assert [p.name for p in tmp_path.iterdir()] == ["rows.csv"]


def test_sub_sampling_counts_elements(capsys, tmp_path, workdir):
  out, columns = certify(
    capsys,
    workdir,
    tmp_path / "rows.csv",
    "--source=smoothing",
    "--keep=left=28,right=28",
    "--num-samples=300",
    "--budget=left=1",
  )
  noise = smoothing.subsample(keep={"left": 28, "right": 28})
  found, _ = reference(workdir, noise)
  np.testing.assert_array_equal(
    numbers(columns, "smoothed_radius_left"), found.modality_radius["left"]
  )
  np.testing.assert_array_equal(
    numbers(columns, "smoothed_covers_left=1"), found.covers({"left": 1})
  )
  assert "elements kept left=28,right=28" in out
  assert "left: median of" in out
  assert set(columns["keep_left"]) == {"28"}
  assert not any("stable" in name for name in columns)


def test_mixed_noise_has_both_kinds_and_no_joint_radius(
  capsys, tmp_path, workdir
):
  out, columns = certify(
    capsys,
    workdir,
    tmp_path / "rows.csv",
    *JOB,
    "--keep=left=28",
    "--radius=0.1",
    "--budget=left=1,right=0.05",
  )
  noise = smoothing.mixed(sigma={"right": 0.25}, keep={"left": 28})
  found, label = reference(workdir, noise)
  alone = found.modality_radius["right"]
  np.testing.assert_array_equal(
    numbers(columns, "smoothed_stable_at_0.1_right"), alone > 0.1
  )
  held = (found.prediction == label) & (alone > 0.1)
  assert f"only right by 0.1: {np.mean(held):.4f}" in out
  assert "smoothed_radius" not in columns
  assert "smoothed_stable_at_0.1" not in columns
  np.testing.assert_array_equal(
    numbers(columns, "smoothed_covers_left=1+right=0.05"),
    found.covers({"left": 1, "right": 0.05}),
  )


def test_votes_are_certified_without_a_probability(capsys, tmp_path, workdir):
  out, columns = certify(
    capsys, workdir, tmp_path / "rows.csv", "--source=smoothing", "--votes=1"
  )
  assert out.startswith("certified accuracy of the vote of 2 choices of 1")
  assert "probability" not in out
  # One of two voters is replaced: the other cannot outvote it.
  assert not numbers(columns, "smoothed_radius").any()
  assert set(columns["num_samples"]) == {"2"}


def test_noise_of_the_evaluation_is_the_default(capsys, tmp_path, workdir):
  _, named = certify(capsys, workdir, tmp_path / "a.csv", *JOB)
  _, default = certify(
    capsys,
    workdir,
    tmp_path / "b.csv",
    "--source=smoothing",
    "--num-samples=300",
  )
  assert named == default


class Killed(BaseException):
  pass


def test_job_that_was_stopped_goes_on_where_it_was(
  capsys, tmp_path, workdir, monkeypatch
):
  job = (*JOB, "--chunk-size=100")
  _, whole = certify(capsys, workdir, tmp_path / "whole.csv", *job)
  advance = smoothed.Counter.advance
  calls = []

  def stopping(counter):
    if len(calls) == 3:
      raise Killed
    calls.append(counter.done)
    advance(counter)

  target = tmp_path / "rows.csv"
  monkeypatch.setattr(smoothed.Counter, "advance", stopping)
  with pytest.raises(Killed):
    certify(capsys, workdir, target, *job)
  assert calls == [0, 1, 2]
  assert not target.exists()
  assert (tmp_path / "rows.partial.npz").exists()

  # Other questions do not take these counts for theirs.
  for option in ("--seed=1", "--num-samples=400", "--sigma=0.3", "--limit=19"):
    code, _, err = command_line.run(
      capsys,
      "certify",
      f"--workdir={workdir}",
      f"--output={target}",
      f"--limit={SIZE}",
      *job,
      "--resume",
      option,
    )
    assert code == 2
    assert re.search("--resume: .* of another job: .* there and .* here", err)
    assert err.count("\n") == 1

  resumed = []
  monkeypatch.setattr(
    smoothed.Counter,
    "advance",
    lambda counter: resumed.append(advance(counter)),
  )
  _, columns = certify(capsys, workdir, target, *job, "--resume")
  assert columns == whole
  # One block for the selection and three chunks.
  assert resumed == [False, False, False, True]
  assert not (tmp_path / "rows.partial.npz").exists()


def test_killed_process_loses_what_was_not_saved_and_ends_the_same(
  capsys, tmp_path, workdir
):
  """SIGKILL, so that nothing can be saved on the way out."""
  target = tmp_path / "rows.csv"
  job = (*JOB, "--chunk-size=100")
  code = (
    "import os, signal, sys\n"
    "from robust_mm import cli, unfinished\n"
    "from robust_mm.evaluation import smoothed\n"
    "unfinished.SAVE_SECONDS = 0\n"
    "advance = smoothed.Counter.advance\n"
    "def dying(counter):\n"
    "  if counter.done == 7: os.kill(os.getpid(), signal.SIGKILL)\n"
    "  advance(counter)\n"
    "smoothed.Counter.advance = dying\n"
    "cli.main(sys.argv[1:])\n"
  )
  words = [
    "certify",
    f"--workdir={workdir}",
    f"--output={target}",
    f"--limit={SIZE}",
    *job,
  ]
  done = subprocess.run(
    [sys.executable, "-c", code, *words],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    check=False,
  )
  assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
  assert not target.exists()
  kept = np.load(tmp_path / "rows.partial.npz")
  assert kept["selection"][:, -1].tolist() == [1] * 16 + [0] * 4
  assert kept["estimation"][:, -1].tolist() == [3] * 8 + [2] * 8 + [0] * 4
  # That was one device; the rest is counted on eight.
  _, resumed = certify(capsys, workdir, target, *job, "--resume")
  _, whole = certify(capsys, workdir, tmp_path / "whole.csv", *job)
  assert resumed == whole


def test_damaged_counts_are_named(capsys, tmp_path, workdir):
  (tmp_path / "rows.partial.npz").write_bytes(b"nothing")
  code, _, err = command_line.run(
    capsys,
    "certify",
    f"--workdir={workdir}",
    f"--output={tmp_path / 'rows.csv'}",
    f"--limit={SIZE}",
    *JOB,
    "--resume",
  )
  assert code == 2
  assert re.search("rows.partial.npz is damaged", err)
  assert err.count("\n") == 1


@pytest.mark.parametrize(
  "options, sentence",
  [
    (("--sigma=0.25",), "--sigma goes with --source=smoothing"),
    ((*JOB, "--norm=linf"), "--norm=linf"),
    ((*JOB, "--max-missing=1"), "--max-missing"),
    ((*JOB, "--fidelity=published"), "--fidelity=published"),
    ((*JOB, "--keep=lft=2"), "--keep names .*'lft'.*Did you mean 'left'"),
    (("--source=smoothing", "--sigma=lft=1"), "--sigma names .*'lft'"),
    (("--source=smoothing", "--sigma=-1"), "--sigma.*-1"),
    (("--source=smoothing", "--sigma=0.1,0.2"), "--sigma.*0.1,0.2"),
    (("--source=smoothing", "--keep=left=0"), "--keep.*left=0"),
    (("--source=smoothing", "--keep=left=1.5"), "--keep.*left=1.5"),
    (("--source=smoothing", "--keep=left=99"), r"keep\['left'\].*at most 32"),
    (
      ("--source=smoothing", "--sigma=left=1", "--keep=left=2"),
      "both name 'left'",
    ),
    (
      ("--source=smoothing", "--keep=left=2", "--budget=left=0.5"),
      "--budget: left=0.5 must be a whole number",
    ),
    (("--source=smoothing", "--votes=3"), "--votes must be at most 2"),
    (("--source=smoothing", "--votes=1", "--sigma=1"), "leave --sigma out"),
    ((*JOB, "--alpha=1"), "--alpha.*got 1"),
    ((*JOB, "--num-samples=0"), "--num-samples.*got 0"),
    ((*JOB, "--budget=up=1"), "--budget names .*'up'"),
  ],
)
def test_mistake_is_one_sentence_and_leaves_nothing(
  capsys, tmp_path, monkeypatch, workdir, options, sentence
):
  monkeypatch.chdir(tmp_path)
  target = f"--output={tmp_path / 'rows.csv'}"
  code, out, err = command_line.run(
    capsys, "certify", f"--workdir={workdir}", target, *options
  )
  assert (code, out) == (2, "")
  assert err.count("\n") == 1, err
  assert re.search(sentence, err), err
  assert list(tmp_path.iterdir()) == []


def test_run_without_noise_needs_it_named(capsys, tmp_path):
  config = "--config=configs/joint.py:digits,smoke"
  assert cli.main(["train", config, f"--workdir={tmp_path / 'run'}"]) == 0
  code, _, err = command_line.run(
    capsys, "certify", f"--workdir={tmp_path / 'run'}", "--source=smoothing"
  )
  assert code == 2
  assert "needs --sigma=..., --keep=... or --votes=" in err
