"""Runs that start from another one, and see labelled modalities alone."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robust_mm
from robust_mm import _validate
from robust_mm import config as config_lib
from robust_mm import data
from robust_mm import modalities
from robust_mm import preflight
from robust_mm import training
from robust_mm.training import context
from robust_mm.training import recipe as recipe_lib
from robust_mm.training import runs
from robust_mm.training import setup as setup_lib
from robust_mm.training import starts
from robust_mm.training import steps


def load(spec, *overrides):
  return config_lib.load(
    f"{spec},smoke",
    ["--config.mesh.data=1", *(f"--config.{o}" for o in overrides)],
  )


def train(config, workdir):
  return training.train(config, workdir, say=lambda line: None)


def leaves(workdir, phase=None):
  _, params, _, _ = robust_mm.load(workdir, phase=phase)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("pre")
  result = train(load("configs/pretraining.py:digits"), workdir)
  assert result.finished
  assert set(result.metrics) == {"loss", "reconstruction_loss"}
  return workdir


@pytest.fixture(scope="module")
def tuned(pretrained, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("tuned")
  spec = "configs/finetune.py:digits"
  config = load(spec, f"init_from={pretrained}", "data.labelled=left", "seed=3")
  assert train(config, workdir).finished
  return workdir


def test_a_run_starts_from_the_model_of_another(pretrained, tuned):
  was, probe, last = leaves(pretrained), leaves(tuned, "probe"), leaves(tuned)
  for name, value in was.items():
    if name.startswith("fusion/last/"):
      continue
    np.testing.assert_array_equal(probe[name], value, err_msg=name)
  # What has no labels is not trained: weight decay alone, the same for all.
  for name, value in was.items():
    ratio = last[name] / np.where(value == 0, 1, value)
    if name.startswith("encoders/right/"):
      np.testing.assert_allclose(ratio[value != 0], 1, rtol=1e-4)
    else:
      assert np.any(np.abs(ratio - 1) > 1e-4), name


def test_normalisation_is_that_of_the_run_before(pretrained, tuned):
  before, after = (
    json.loads((d / "run.json").read_text()) for d in (pretrained, tuned)
  )
  assert after["normalization"] == before["normalization"]
  assert after["normalization"]["right"] is not None


def test_training_and_selection_see_labelled_modalities_alone():
  config = load("configs/finetune.py:digits", "data.labelled=left")
  setup = setup_lib.prepare(config)
  for source in (setup.train, setup.validation):
    batch = source.take([0, 1, 2])
    assert batch["present"]["left"].all()
    assert not batch["present"]["right"].any()
    assert np.all(batch["inputs"]["right"] == 0)
    assert np.any(batch["inputs"]["left"] != 0)
  assert not setup.reference["present"]["right"].any()
  plain = setup_lib.prepare(load("configs/finetune.py:digits"))
  assert plain.train.take([0])["present"]["right"].all()
  assert plain.facts["normalization"] == setup.facts["normalization"]
  assert setup_lib.open_split(config, "test").take([0])["present"]["right"][0]


def test_every_subset_of_a_loaded_run_is_evaluated(tuned):
  model, params, state, _ = robust_mm.load(tuned)
  batch = data.load("digits", limit=32)
  logits = {}
  for subset in modalities.subsets(model.modalities):
    one = modalities.restrict(batch, subset)
    outputs, _ = model.apply(params, state, one["inputs"], one["present"])
    logits[subset] = np.asarray(outputs.logits)
    assert np.all(np.isfinite(logits[subset]))
  assert np.any(logits["left",] != logits["left", "right"])


@pytest.mark.parametrize(
  "override,message",
  [
    ("init_from=nowhere", "config.init_from must be the work directory"),
    ("init_phase=x", "config.init_phase .'x'. needs config.init_from"),
    ("data.labelled=up", "config.data.labelled names the unknown modality"),
    ("selection.metric=nonsense", "config.selection.metric must be one of"),
    ("recipe.name=pretrain", "selection.metric must be 'loss' or 'last'"),
  ],
)
def test_keys_are_refused_by_name(override, message, tmp_path):
  with pytest.raises(_validate.UserError, match=message):
    train(load("configs/finetune.py:digits", override), tmp_path)


def test_a_model_that_does_not_fit_is_refused(pretrained, tmp_path):
  def start(*overrides, folder=pretrained):
    spec = "configs/finetune.py:digits"
    config = load(spec, f"init_from={folder}", *overrides)
    train(config, tmp_path / "run")

  with pytest.raises(_validate.UserError, match="must be one of pretrain; got"):
    start("init_phase=margins")
  with pytest.raises(
    _validate.UserError, match=r"fusion_options\.num_heads is not set"
  ):
    start("model.fusion_options.num_heads=8")
  with pytest.raises(_validate.UserError, match="was trained on input_shapes"):
    start("data.modalities=left")
  # A damaged description: the leaves themselves do not fit.
  other = tmp_path / "other"
  shutil.copytree(pretrained, other)
  stored = json.loads((other / "config.json").read_text())
  stored["model"]["fusion_options"]["num_layers"] = 2
  (other / "config.json").write_text(json.dumps(stored))
  with pytest.raises(
    _validate.UserError,
    match=r"fusion/blocks/1/contract/bias is missing there; .* and 9 more",
  ):
    start("model.fusion_options.num_layers=2", folder=other)
  assert not (tmp_path / "run" / "config.json").exists()


def test_a_missing_run_is_refused_before_anything_is_read(tmp_path):
  config = load("configs/finetune.py:digits", "init_from=nowhere")
  with pytest.raises(_validate.UserError, match=r"config\.init_from"):
    preflight.check(config, str(tmp_path / "run"))


# Every data set and variant is in one of them.
@pytest.mark.parametrize(
  "spec",
  [
    "configs/pretraining.py:utd_mhad,no_hiding",
    "configs/pretraining.py:mfeat,both",
    "configs/pretraining.py:av_digits,few",
    "configs/pretraining.py:mosi,contrastive",
    "configs/finetune.py:utd_mhad,dropout",
    "configs/finetune.py:mfeat,probe",
    "configs/finetune.py:av_digits,few,finetune",
    "configs/finetune.py:mosi",
  ],
)
def test_configurations_fit_their_data(spec, data_dir):
  """All but the compiler: shapes of every step, on real batches."""
  config = load(spec, f"data.path={data_dir}")
  setup = setup_lib.prepare(config)
  recipe = recipe_lib.make(config, setup)
  batch = setup.train.take(range(16))
  for phase in recipe.phases:
    state = context.abstract_state(setup.model, phase)
    if phase.prepare is not None:
      continue
    after, metrics = jax.eval_shape(
      steps.make_train_step(phase), state, batch, jax.random.key(0)
    )
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert metrics["loss"].shape == ()


def test_contrasts_of_tokens_and_numbers_take_their_steps(data_dir, tmp_path):
  config = load(
    "configs/pretraining.py:mosi,both",
    f"data.path={data_dir}",
    "data.modalities=audio,tokens",
    "recipe.options.decoder_width=8",
  )
  result = train(config, tmp_path)
  assert result.finished
  assert np.isfinite(result.metrics["loss"])


def test_a_start_of_another_recipe_is_told_what_makes_one(tmp_path):
  runs.save_config(tmp_path, load("configs/joint.py:digits"))
  runs.save_facts(tmp_path, {"finished": {"train": {}}})
  with pytest.raises(_validate.UserError, match=r"'joint'; configs/pretrain"):
    starts.check(load("configs/finetune.py:digits", f"init_from={tmp_path}"))
