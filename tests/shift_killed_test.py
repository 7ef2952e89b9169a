"""A study that is killed while a model trains, and the same command again."""

import json

import numpy as np
from end_to_end_test import finish
from end_to_end_test import kill_after_a_checkpoint
from end_to_end_test import start

from robust_mm.training import writers

STUDY = (
  "shift",
  "--config=configs/shift.py:digits,scratch,smoke",
  "--config.study.methods=finetune",
  "--config.study.train_sets=left,right",
  "--config.study.test_sets=left,right",
  "--config.recipe.options.method=finetune",
  "--config.num_steps=400",
  "--config.training.checkpoint_every=50",
  "--config.training.eval_every=400",
  "--config.training.log_every=10",
)


def test_kill_dash_nine_while_a_model_trains(tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  finish(start(*STUDY, f"--workdir={whole}"))
  command = (*STUDY, f"--workdir={killed}")
  first, second = (
    killed / "runs" / "finetune" / name / "0" for name in ("left", "right")
  )
  kill_after_a_checkpoint([start(*command)], second)
  made = (first / "logits.npz").stat().st_mtime_ns
  stopped = writers.read(second)[-1]["step"]
  assert not (second / "logits.npz").exists()
  assert not (killed / "shift.json").exists()
  out = finish(start(*command))
  assert "2/2 finetune right seed 0" in out
  assert "1/2" not in out
  assert (first / "logits.npz").stat().st_mtime_ns == made
  # Every update is written once.
  steps = [row["step"] for row in writers.read(second) if "loss" in row]
  assert steps == [*range(10, 401, 10)]
  assert 50 <= stopped < 400
  one, other = (
    json.loads((folder / "shift.json").read_text())
    for folder in (whole, killed)
  )
  assert one == other
  for name in ("left", "right"):
    place = f"runs/finetune/{name}/0"
    assert writers.read(whole / place) == writers.read(killed / place)
    parts = [np.load(f / place / "logits.npz") for f in (whole, killed)]
    for subset in ("left", "right"):
      np.testing.assert_array_equal(*(part[subset] for part in parts))
