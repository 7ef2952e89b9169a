"""Which model of a phase is kept, by what validation is made to say of each."""

import jax
import numpy as np
import pytest
from killed_runs import Killed
from killed_runs import load
from killed_runs import train

from robust_mm.training import runs
from robust_mm.training import validation

NAN = float("nan")
JOINT = (
  "configs/joint.py:digits,smoke",
  "training.eval_every=1",
  "training.log_every=1",
)


def scripted(monkeypatch, scores):
  """The accuracy of every model, in the order in which they first come up."""
  known, rest = {}, iter(scores)

  def validate(params, model_state):
    del model_state
    name = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(params))
    if name not in known:
      known[name] = next(rest)
    return {"accuracy": known[name], "loss": -known[name]}

  monkeypatch.setattr(validation, "make", lambda *given: validate)


def chosen(workdir):
  (finished,) = runs.describe(workdir)["finished"].values()
  return finished["step"]


@pytest.mark.parametrize(
  "scores, metric, step",
  [
    ((0.5, 0.9, 0.9, 0.1), "accuracy", 3),
    ((1.0, 1.0, 1.0, 1.0), "accuracy", 4),
    ((0.9, 0.5, 0.8, 0.7), "accuracy", 1),
    ((0.5, 0.9, 0.9, 0.1), "loss", 3),
    ((NAN, 0.1, NAN, 0.05), "accuracy", 2),
    ((0.9, 0.9, 0.9, 0.1), "last", 4),
  ],
)
def test_the_latest_of_the_best_is_kept(
  scores, metric, step, tmp_path, monkeypatch
):
  scripted(monkeypatch, scores)
  train(load(*JOINT, f"selection.metric={metric}"), tmp_path)
  assert chosen(tmp_path) == step


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("kill_at", [2, 3, 4])
def test_a_resumed_run_keeps_the_same(period, kill_at, tmp_path, monkeypatch):
  """Also where what lies there is later than the checkpoint gone on from."""
  scripted(monkeypatch, (0.5, 0.9, 0.9, 0.1))
  every = f"training.checkpoint_every={period}"
  config = load(*JOINT, "selection.metric=accuracy", every)
  with pytest.raises(Killed):
    train(config, tmp_path, kill_at)
  train(config, tmp_path)
  assert chosen(tmp_path) == 3
