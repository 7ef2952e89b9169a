"""Whole commands, as a user starts them: processes of their own."""

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
  assert not any(row["sound"] for row in joint["certified"])
  page = (tmp_path / "report.html").read_text()
  assert "data:image/png;base64," in page
  assert "estimated" in page


TRAIN = (
  "train",
  "--config=configs/joint.py:digits",
  "--config.num_steps=400",
  "--config.training.checkpoint_every=20",
  "--config.training.log_every=10",
)


def test_kill_dash_nine_and_the_same_command_again(tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  finish(start(*TRAIN, f"--workdir={whole}"))
  process = start(*TRAIN, f"--workdir={killed}")
  checkpoints = killed / "checkpoints" / "state"
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline and not any(checkpoints.glob("[2-9]*0")):
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert writers.read(killed)
  assert writers.read(killed)[-1]["step"] < 400, "it was not killed in time"
  finish(start(*TRAIN, f"--workdir={killed}"))
  assert_bit_identical(whole, killed)
  assert writers.read(whole) == writers.read(killed)


def test_two_processes_train_as_one(tmp_path):
  smoke = ("train", "--config=configs/joint.py:digits,smoke")
  finish(start(*smoke, f"--workdir={tmp_path / 'one'}", "--device-count=2"))
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  processes = [
    start(
      *smoke,
      f"--workdir={tmp_path / 'two'}",
      "--device-count=1",
      "--distributed",
      JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
      JAX_NUM_PROCESSES="2",
      JAX_PROCESS_ID=str(index),
      JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo",
    )
    for index in range(2)
  ]
  for process in processes:
    finish(process)
  one, two = (
    [row["loss"] for row in writers.read(tmp_path / name) if "loss" in row]
    for name in ("one", "two")
  )
  np.testing.assert_allclose(two, one, rtol=1e-5)
  for a, b in zip(
    parameters(tmp_path / "one"), parameters(tmp_path / "two"), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-4)


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
  source = "global" if name == "crmt" else "empirical"
  settings = results["settings"]
  assert settings["num_devices"] == 8
  assert settings["certificate"]["source"] == source
  out = finish(start("certify", workdir, f"--source={source}", *several))
  assert ("not certified" in out) == (name == "joint")
