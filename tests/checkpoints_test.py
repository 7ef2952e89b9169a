"""What a save does when Orbax stumbles over folders of its own."""

import os

import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm.training import checkpoints


def _stumbling(monkeypatch, times):
  """The folder of the state is there already, so many times."""
  makedirs, left = os.makedirs, [times]

  def stumble(path, *args, **kwargs):
    makedirs(path, *args, **kwargs)
    if "state.orbax" in str(path) and left[0]:
      left[0] -= 1
      raise FileExistsError(17, "File exists", str(path))

  monkeypatch.setattr(os, "makedirs", stumble)
  return left


def test_a_save_that_stumbles_is_tried_again(tmp_path, monkeypatch):
  store = checkpoints.Checkpoints(tmp_path / "run", keep=2)
  store.save(1, {"a": jnp.ones(3)})
  left = _stumbling(monkeypatch, 1)
  store.save(2, {"a": 2 * jnp.ones(3)}, metrics={"loss": 0.5})
  assert left == [0]
  assert store.latest_step == 2
  assert store.metrics() == {"loss": 0.5}
  np.testing.assert_array_equal(store.restore({"a": jnp.zeros(3)})["a"], 2)
  store.save(3, {"a": 3 * jnp.ones(3)})
  store.close()
  assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["2", "3"]


def test_one_that_stumbles_for_ever_says_so(tmp_path, monkeypatch):
  store = checkpoints.Checkpoints(tmp_path / "run")
  _stumbling(monkeypatch, -1)
  with pytest.raises(FileExistsError):
    store.save(1, {"a": jnp.ones(3)})
