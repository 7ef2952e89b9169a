"""ModalImmune in the training loop: exact resume, devices, selection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes_models as helpers

from robust_mm import config as config_lib
from robust_mm import modalities
from robust_mm import training
from robust_mm.training import steps
from robust_mm.training import writers


class Killed(Exception):
  """Stands for kill -9 at a point of the test's choosing."""


def train(workdir, devices, kill_at=None):
  config = config_lib.load(
    "configs/modal_immune.py:digits,smoke", [f"--config.mesh.data={devices}"]
  )

  def progress(done, total, text):
    if done == kill_at:
      raise Killed

  return training.train(
    config, workdir, say=lambda line: None, progress=progress
  )


def test_eight_devices_resumed_do_what_one_does(tmp_path):
  one, eight = tmp_path / "one", tmp_path / "eight"
  train(one, 1)
  with pytest.raises(Killed):
    train(eight, 8, kill_at=4)
  assert train(eight, 8).finished
  rows = writers.read(one)
  assert any("outer_accepted" in row for row in rows)
  assert any("probe_gain_left" in row for row in rows)
  assert any("validation_mean_over_subsets" in row for row in rows)
  for row, other in zip(rows, writers.read(eight), strict=True):
    assert row.keys() == other.keys()
    for name, value in row.items():
      if not isinstance(value, str):
        np.testing.assert_allclose(
          other[name], value, rtol=1e-3, atol=1e-5, err_msg=name
        )


def test_subsets_are_scored_as_if_the_rest_were_not_there():
  model = helpers.concat_model()
  params, state = model.init(jax.random.key(0))
  batch = helpers.make_batch()
  present = {**batch["present"], "a": jnp.arange(16) % 3 > 0}
  batch = {**batch, "present": present}
  predict = steps.make_predict(model, certified=False, subsets=True)
  found = predict(params, state, batch)
  for column, subset in enumerate(modalities.subsets(model.modalities)):
    alone = predict(params, state, modalities.restrict(batch, subset))
    for name in ("correct", "counted"):
      np.testing.assert_array_equal(
        found[f"subset_{name}"][:, column], alone[name]
      )
