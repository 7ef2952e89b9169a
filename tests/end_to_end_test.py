"""Whole commands, as a user starts them: processes of their own."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import robust_mm
from robust_mm.training import writers

COMMAND = (sys.executable, "-m", "robust_mm.cli")


def start(*arguments, **environment):
  return subprocess.Popen(
    [*COMMAND, *arguments],
    env={**os.environ, **environment},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process, timeout=300):
  out, _ = process.communicate(timeout=timeout)
  assert process.returncode == 0, out
  return out


def parameters(workdir):
  _, params, _, _ = robust_mm.load(workdir)
  return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def losses(workdir):
  rows = writers.read(workdir)
  return {row["step"]: row["loss"] for row in rows if "loss" in row}


def assert_bit_identical(first, second):
  for a, b in zip(parameters(first), parameters(second), strict=True):
    np.testing.assert_array_equal(a, b)


def test_quickstart_holds_what_the_readme_says(tmp_path):
  out = finish(start("quickstart", f"--workdir={tmp_path}"))
  assert "report" in out
  joint, certified = (
    json.loads((tmp_path / name / "results.json").read_text())
    for name in ("joint", "certified")
  )
  assert joint["clean"]["accuracy"] > 0.95
  assert certified["clean"]["accuracy"] > 0.95

  def at(results, kind, radius):
    return next(
      row["accuracy"]
      for row in results[kind]
      if row["radius"] == radius and row["modalities"] == ["left", "right"]
    )

  # Thresholds leave room for two standard errors of 360 test images.
  assert at(joint, "attacked", 0.5) < 0.55
  assert at(certified, "attacked", 0.5) > 0.69
  assert at(certified, "certified", 0.5) > 0.62
  assert at(certified, "certified", 0.5) <= at(certified, "attacked", 0.5)
  assert all(row["sound"] for row in certified["certified"])
  # The baseline has a certificate as well, from the chain of its dense layers,
  # and it proves little.
  assert all(row["sound"] for row in joint["certified"])
  assert at(joint, "certified", 0.5) < 0.3
  page = (tmp_path / "report.html").read_text()
  assert "data:image/png;base64," in page
  assert "certified" in page
  run = tmp_path / "certified"
  out = finish(start("certify", f"--workdir={run}", "--limit=90"))
  assert "certified accuracy, 90 test examples" in out
  with (run / "certificates.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  held = [row["radius"] for row in rows if row["prediction"] == row["label"]]
  assert np.mean(np.array(held, float) > 0.5) > 0.55


LENGTH = (
  "--config.num_steps=400",
  "--config.training.checkpoint_every=20",
  "--config.training.log_every=10",
)
TRAIN = ("train", "--config=configs/joint.py:digits", *LENGTH)
# With a controller, gates, decoders and learnt weights in its checkpoints.
IMMUNE = (
  "train",
  "--config=configs/modal_immune.py:digits",
  *LENGTH,
  "--config.recipe.options.warmup_steps=5",
  "--config.recipe.options.controller_period=3",
  "--config.recipe.options.outer_period=25",
)


def kill_after_a_checkpoint(processes, workdir):
  """kill -9 once a checkpoint of step 20 or later lies there."""
  checkpoints = workdir / "checkpoints" / "state"
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline and not any(checkpoints.glob("[2-9]*0")):
    time.sleep(0.01)
  for process in processes:
    process.send_signal(signal.SIGKILL)
  for process in processes:
    process.communicate()
  assert writers.read(workdir)
  assert writers.read(workdir)[-1]["step"] < 400, "it was not killed in time"


@pytest.mark.parametrize("train", [TRAIN, IMMUNE], ids=["joint", "immune"])
def test_kill_dash_nine_and_the_same_command_again(tmp_path, train):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  finish(start(*train, f"--workdir={whole}"))
  process = start(*train, f"--workdir={killed}")
  kill_after_a_checkpoint([process], killed)
  finish(start(*train, f"--workdir={killed}"))
  assert_bit_identical(whole, killed)
  assert writers.read(whole) == writers.read(killed)


def start_together(count, *arguments):
  """Two devices in all, over one or two processes."""
  if count == 1:
    return [start(*arguments, "--device-count=2")]
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  return [
    start(
      *arguments,
      "--device-count=1",
      "--distributed",
      JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
      JAX_NUM_PROCESSES="2",
      JAX_PROCESS_ID=str(index),
      JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo",
    )
    for index in range(2)
  ]


SMOKE = ("train", "--config=configs/joint.py:digits,smoke")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("one")
  finish(*start_together(1, *SMOKE, f"--workdir={workdir}"))
  return workdir


# With a model axis of 2 both processes hold, and feed, the whole batch.
@pytest.mark.parametrize("model_axis", [1, 2])
def test_two_processes_train_as_one(tmp_path, one_process, model_axis):
  axis = f"--config.mesh.model={model_axis}"
  for process in start_together(2, *SMOKE, axis, f"--workdir={tmp_path}"):
    finish(process)
  one, two = losses(one_process), losses(tmp_path)
  assert one.keys() == two.keys()
  np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
  for a, b in zip(parameters(one_process), parameters(tmp_path), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("source", ["global", "best", "smoothing"])
def test_two_processes_certify_as_one(tmp_path, one_process, source):
  options = ["--limit=30", f"--source={source}", f"--workdir={one_process}"]
  if source == "smoothing":
    options += ["--num-samples=200", "--sigma=0.25"]
  rows = []
  for count in (1, 2):
    target = tmp_path / f"{count}.csv"
    job = start_together(count, "certify", *options, f"--output={target}")
    for process in job:
      finish(process)
    rows.append(_numbers(target))
  assert rows[0].keys() == rows[1].keys()
  for name, values in rows[0].items():
    if values.dtype.kind == "f":
      np.testing.assert_allclose(rows[1][name], values, rtol=1e-4, err_msg=name)
    else:
      np.testing.assert_array_equal(rows[1][name], values, err_msg=name)


def _numbers(path):
  """The columns of a .csv file that are numbers."""
  with path.open(newline="") as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 30
  columns = {}
  for name in rows[0]:
    values = [row[name] for row in rows]
    try:
      columns[name] = np.array(values, float)
    except ValueError:
      columns[name] = np.array(values)
  return columns


@pytest.fixture(scope="module")
def every_step(tmp_path_factory):
  """(arguments, losses) of one process that logs the loss of every step."""
  workdir = tmp_path_factory.mktemp("every_step")
  arguments = (*TRAIN, "--config.training.log_every=1")
  finish(*start_together(1, *arguments, f"--workdir={workdir}"))
  return arguments, losses(workdir)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_killed_run_goes_on_with_another_number_of_processes(
  tmp_path, every_step, before, after
):
  """The batches are the same, row by row: so is the loss of every step."""
  arguments, whole = every_step
  arguments = (*arguments, f"--workdir={tmp_path}")
  kill_after_a_checkpoint(start_together(before, *arguments), tmp_path)
  resumed = start_together(after, *arguments)
  outs = [finish(process) for process in resumed]
  assert "resumed at step" in outs[0]
  mine = losses(tmp_path)
  assert mine.keys() == whole.keys()
  np.testing.assert_allclose(
    list(mine.values()), list(whole.values()), rtol=1e-3
  )


@pytest.mark.parametrize("name", ["joint", "crmt"])
def test_smoke_run_evaluates_certifies_and_reports(tmp_path, name):
  workdir = f"--workdir={tmp_path}"
  finish(start("train", f"--config=configs/{name}.py:digits,smoke", workdir))
  # What a checkpoint gives back lives on one device, the batches on eight.
  several = ("--limit=40", "--device-count=8")
  finish(start("evaluate", workdir, *several))
  results = json.loads((tmp_path / "results.json").read_text())
  assert results["dataset"] == "digits"
  assert set(results["subsets"]) == {"left", "right", "left+right"}
  settings = results["settings"]
  assert settings["num_devices"] == 8
  assert settings["certificate"]["source"] == "global"
  source = "global" if name == "crmt" else "empirical"
  out = finish(start("certify", workdir, f"--source={source}", *several))
  assert ("not certified" in out) == (name == "joint")
