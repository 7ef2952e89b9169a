"""The loop: resumes exactly, stops cleanly, refuses by name."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import robust_mm
from robust_mm import _validate
from robust_mm import certification
from robust_mm import config as config_lib
from robust_mm import data
from robust_mm import training
from robust_mm.training import checkpoints
from robust_mm.training import runs
from robust_mm.training import sharding
from robust_mm.training import validation
from robust_mm.training import writers


def load(spec="configs/crmt.py:digits,smoke", *overrides):
  return config_lib.load(
    spec, ["--config.mesh.data=1", *(f"--config.{o}" for o in overrides)]
  )


def train(config, workdir, **keywords):
  return training.train(config, workdir, say=lambda line: None, **keywords)


def leaves(workdir, phase=None):
  _, params, _, _ = robust_mm.load(workdir, phase=phase)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def assert_same(first, second):
  assert first.keys() == second.keys()
  for name, value in first.items():
    np.testing.assert_array_equal(value, second[name], err_msg=name)


class Killed(Exception):
  """Stands for kill -9 at a point of the test's choosing."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole")
  train(load(), workdir)
  return workdir


@pytest.mark.parametrize("kill_at", [2, 4, 6])
def test_killed_run_resumes_bit_identically(tmp_path, whole, kill_at):
  def progress(done, total, text):
    if done == kill_at:
      raise Killed

  with pytest.raises(Killed):
    train(load(), tmp_path, progress=progress)
  result = train(load(), tmp_path)
  assert result.finished
  assert_same(leaves(tmp_path), leaves(whole))
  assert writers.read(tmp_path) == writers.read(whole)


def test_checkpoint_with_a_data_iterator_of_old_is_read(tmp_path):
  """Before runs resumed by their step, one file a process lay beside it."""
  state = {"step": jnp.int32(3), "weight": jnp.arange(4.0)}
  source = data.open_source("digits", "train")
  iterator = iter(data.pipeline(source, batch_size=8, seed=0))
  next(iterator)
  old = ocp.training.Checkpointer(tmp_path)
  old.save_checkpointables(3, {"state": state, "data": iterator})
  old.close()
  iterator.close()
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = checkpoints.abstract_like(
    state, jax.tree.map(lambda _: here, state)
  )
  store = checkpoints.Checkpoints(tmp_path)
  found = store.restore(abstract)
  store.close()
  jax.tree.map(np.testing.assert_array_equal, found, state)


def test_sigterm_saves_and_the_same_call_goes_on(tmp_path, whole):
  def progress(done, total, text):
    if done == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  result = train(load(), tmp_path, progress=progress)
  assert not result.finished
  assert 2 <= result.step <= 3
  result = train(load(), tmp_path)
  assert result.finished
  assert_same(leaves(tmp_path), leaves(whole))


def test_a_captioner_keeps_what_spells_most_captions_right(
  tmp_path, monkeypatch
):
  """Of three validations the second, whatever they say of accuracy."""
  shares = iter((0.5, 0.9, 0.1))
  monkeypatch.setattr(
    validation, "_spelled", lambda *given: lambda *model: next(shares)
  )
  config = load(
    "configs/captioning.py:digits,smoke",
    "selection.metric=auto",
    "num_steps=3",
    "training.eval_every=1",
  )
  train(config, tmp_path)
  (finished,) = runs.describe(tmp_path)["finished"].values()
  assert finished["step"] == 2
  assert finished["metrics"]["exact_match"] == 0.9


def test_a_finished_run_called_again_changes_nothing(tmp_path, whole):
  before = leaves(whole)
  result = train(load(), whole)
  assert result.finished
  assert_same(leaves(whole), before)


def test_another_seed_gives_other_parameters(tmp_path, whole):
  train(load("configs/crmt.py:digits,smoke", "seed=1"), tmp_path)
  mine, other = leaves(tmp_path), leaves(whole)
  assert any(np.any(mine[name] != other[name]) for name in mine)


def train_for_changed_threat(workdir, *, r0, radius):
  """What ``run.json`` says of step 2, judged at r0, selected at radius."""
  config = load(
    "configs/crmt.py:digits",
    "num_steps=40",
    "optimizer.warmup_steps=0",
    "recipe.options.integration_steps=60",
    "recipe.options.integration_lr=0.1",
    "recipe.options.lipschitz={'left': 9.0, 'right': 1.0}",
    "recipe.options.clean_tolerance=1.0",
    f"recipe.options.r0={r0}",
    f"selection.radius={radius}",
  )
  train(config, workdir)
  return runs.describe(workdir)["finished"]["integration"]


@pytest.fixture(scope="module")
def accepted(tmp_path_factory):
  """(folder, what it says) of a run whose step 2 is worth having."""
  workdir = tmp_path_factory.mktemp("accepted")
  return workdir, train_for_changed_threat(workdir, r0=0.1, radius=100.0)


def test_step_two_leaves_everything_but_alpha_bit_identical(accepted):
  workdir, _ = accepted
  margins, integration = leaves(workdir, "margins"), leaves(workdir)
  for name, value in margins.items():
    same = np.array_equal(value, integration[name])
    assert same == (name != "fusion/integration/alpha"), name


def test_step_two_is_judged_at_r0_and_not_at_the_radius_of_selection(
  accepted, tmp_path
):
  """Beyond 100 nothing is certified, so nothing can rise there."""
  _, near = accepted
  assert near["model"] == "integration"
  assert near["verdict"].startswith(
    "accepted: certified accuracy at radius 0.1"
  )
  far = train_for_changed_threat(tmp_path, r0=100.0, radius=0.01)
  assert far["model"] == "margins"
  assert far["verdict"].startswith("no improvement, not taken: ")
  assert "at radius 100 with the constants given" in far["verdict"]


@pytest.mark.parametrize(
  "variant, words, taken",
  [
    ("", "no improvement, not taken", "margins"),
    (",published", "acceptance would have refused it", "integration"),
  ],
)
def test_only_the_corrected_form_obeys_acceptance(
  tmp_path, monkeypatch, variant, words, taken
):
  real = certification.accept_integration

  def refuse(*arguments, **keywords):
    return np.asarray(False), real(*arguments, **keywords)[1]

  monkeypatch.setattr(certification, "accept_integration", refuse)
  train(load(f"configs/crmt.py:digits{variant},smoke"), tmp_path)
  finished = runs.describe(tmp_path)["finished"]["integration"]
  assert words in finished["verdict"]
  assert finished["model"] == taken
  alpha = "fusion/integration/alpha"
  same = np.array_equal(
    leaves(tmp_path, "margins")[alpha], leaves(tmp_path)[alpha]
  )
  assert same == (taken == "margins")


def test_non_finite_loss_stops_with_a_sentence(tmp_path):
  config = load("configs/joint.py:digits,smoke", "optimizer.lr=1e38")
  with pytest.raises(training.NonFiniteError, match=r"at step \d.*checkpoint"):
    train(config, tmp_path)


def test_divergence_in_the_very_last_step_is_seen(tmp_path):
  """The loss is that of before the update: the parameters are looked at."""
  config = load(
    "configs/joint.py:digits,smoke", "optimizer.lr=1e38", "num_steps=1"
  )
  with pytest.raises(training.NonFiniteError, match="at step 1 "):
    train(config, tmp_path)


def test_folder_of_another_run_is_refused(whole):
  config = load("configs/crmt.py:digits,smoke", "optimizer.lr=0.5")
  with pytest.raises(_validate.UserError, match=r"config.optimizer.lr is"):
    train(config, whole)


def test_an_option_that_a_recipe_does_not_take_is_refused_by_name(tmp_path):
  config = load("configs/modal_immune.py:digits,smoke")
  with config.unlocked():
    config.recipe.options.damage_rat = 0.5
  match = r"options has 'damage_rat', which .* Did you mean 'damage_rate'\?"
  with pytest.raises(_validate.UserError, match=match):
    train(config, tmp_path)


def test_some_modalities_can_be_taken_of_a_configuration_for_all(tmp_path):
  config = load("configs/joint.py:digits,smoke", "data.modalities=left")
  with config.unlocked():
    config.model.encoders.right = {"name": "mlp"}
    config.augmentation.right = {"noise": {"deviation": 0.1}}
  assert train(config, tmp_path).finished
  config.data.modalities = ()
  with config.unlocked():
    config.augmentation.rihgt = {"noise": {"deviation": 0.1}}
  with pytest.raises(_validate.UserError, match="rihgt"):
    train(config, tmp_path / "other")


@pytest.mark.parametrize("protocol", ["frames", "per_batch"])
def test_what_cannot_go_missing_is_refused_before_training(tmp_path, protocol):
  config = load()
  config.evaluation.missing_rates = (0.1,)
  config.evaluation.missing_protocol = protocol
  match = f"config.evaluation.missing_protocol='{protocol}' needs"
  with pytest.raises(_validate.UserError, match=match):
    train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_folder_in_use_is_refused(tmp_path):
  with (
    runs.lock(tmp_path),
    pytest.raises(_validate.UserError, match="in use by another process"),
  ):
    train(load(), tmp_path)


def test_checkpoint_of_another_model_is_refused_by_leaf(tmp_path, whole):
  import shutil

  workdir = tmp_path / "copy"
  shutil.copytree(whole, workdir)
  stored = json.loads((workdir / runs.CONFIG_FILE).read_text())
  stored["model"]["encoders"]["default"]["embedding_dim"] = 32
  (workdir / runs.CONFIG_FILE).write_text(json.dumps(stored))
  with pytest.raises(
    _validate.UserError, match=r"another model: .*(encoders|fusion)/.*shape"
  ):
    robust_mm.load(workdir)


def test_unfinished_folder_is_refused(tmp_path):
  with pytest.raises(_validate.UserError, match="no work directory of a run"):
    robust_mm.load(tmp_path)


def losses(workdir):
  return [row["loss"] for row in writers.read(workdir) if "loss" in row]


@pytest.mark.parametrize(
  "override",
  [
    "mesh.data=8",
    "mesh.rules=(('encoders/left/dense_0/kernel', ('data', None)),)",
  ],
)
def test_eight_devices_give_the_losses_of_one(tmp_path, override):
  spec = "configs/joint.py:digits,smoke"
  one = load(spec)
  eight = load(spec, "mesh.data=8", override)
  train(one, tmp_path / "one")
  train(eight, tmp_path / "eight")
  np.testing.assert_allclose(
    losses(tmp_path / "eight"), losses(tmp_path / "one"), rtol=1e-5
  )


def test_a_run_resumes_on_another_number_of_devices(tmp_path, whole):
  def progress(done, total, text):
    if done == 4:
      raise Killed

  with pytest.raises(Killed):
    train(load(), tmp_path, progress=progress)
  config = load("configs/crmt.py:digits,smoke", "mesh.data=8")
  assert train(config, tmp_path).finished
  mine, other = leaves(tmp_path), leaves(whole)
  for name, value in mine.items():
    np.testing.assert_allclose(value, other[name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
  "owners, parts",
  [
    ([[0], [0], [0]], [(0, 1)]),
    ([[0], [0], [1], [1]], [(0, 2), (1, 2)]),
    ([[1], [0]], [(1, 2), (0, 2)]),  # a mesh may order devices otherwise
    ([[0, 0], [1, 1]], [(0, 2), (1, 2)]),
    ([[0, 1]], [(0, 1), (0, 1)]),  # both hold the whole batch
    ([[0, 1], [2, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ([[0, 1], [0, 1]], [(0, 1), (0, 1)]),
  ],
)
def test_every_process_feeds_the_rows_it_holds(owners, parts):
  found = [sharding.part_of(owners, process) for process in range(len(parts))]
  assert found == parts


@pytest.mark.parametrize("owners", [[[0, 0], [0, 1], [1, 1]], [[0], [0], [1]]])
def test_processes_that_share_a_part_of_their_rows_are_refused(owners):
  with pytest.raises(ValueError, match="cannot be divided evenly"):
    sharding.part_of(owners, 0)


@pytest.mark.parametrize(
  "override, sentence",
  [
    ("mesh.data=9", "mesh.data x mesh.model must be the number of devices"),
    ("data.batch_size=12", "data.batch_size must be a multiple of 8"),
    ("mesh.rules=(('alpha', ('data',)),)", "dimensions, its rule has"),
    ("mesh.rules=(('proxy', ('date', None)),)", "mesh.rules axis"),
    ("data.modalities=left,wright", "wright"),
    ("recipe.options.rho=-1.0", "^config.recipe.options.rho must be non-neg"),
    ("recipe.options.units=relatve", "Did you mean 'relative'"),
    ("recipe.options.units={'lift': 2.0}", "Did you mean 'left'"),
    ("recipe.options.no_such_option=1", "no_such_option"),
    ("optimizer.schedule=step", "optimizer.milestones must name"),
  ],
)
def test_mistakes_in_a_run_are_sentences(tmp_path, override, sentence):
  config = load("configs/crmt.py:digits,smoke", "mesh.data=8", override)
  with pytest.raises(_validate.UserError, match=sentence):
    train(config, tmp_path)
  assert not (tmp_path / runs.CONFIG_FILE).exists()
