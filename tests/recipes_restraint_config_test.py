"""A penalty by its configuration: what becomes of it, what is refused."""

import jax.numpy as jnp
import pytest

from robust_mm import _validate
from robust_mm import cli
from robust_mm import config as config_lib
from robust_mm.training import recipe as recipe_lib
from robust_mm.training import setup as setup_lib


def test_a_configuration_becomes_a_restraint():
  config = config_lib.load(
    "configs/joint.py:digits",
    [
      "--config.penalty.name=topk_level",
      "--config.penalty.weight=0.1",
      "--config.penalty.options.window=0,2",
      "--config.penalty.options.level_scope=4",
    ],
  )
  found = recipe_lib.restraint(config)
  assert found.penalty.options["window"] == (0, 2)
  assert found.penalty.options["level_scope"] == 4
  assert found.penalty.options["space"] == "log_prob"
  assert found.weight == 0.1
  assert found.at({"progress": jnp.float32(0.025)}).scale == 0.5
  published = config_lib.load("configs/restrained_softmax.py:digits,published")
  assert recipe_lib.restraint(published).fidelity == "published"
  with pytest.raises(_validate.UserError, match="ce changes nothing"):
    config_lib.load("configs/restrained_softmax.py:digits,ce,scores")
  with pytest.raises(_validate.UserError, match="topk_margin changes nothing"):
    config_lib.load(
      "configs/restrained_softmax.py:digits,topk_margin,published"
    )


@pytest.mark.parametrize(
  "config, override, sentence",
  [
    (
      "configs/crmt.py:digits,smoke",
      "name=complement_kl",
      "penalty must be left out of recipe 'crmt'",
    ),
    (
      "configs/pretraining.py:digits,smoke",
      "name=complement_kl",
      "config.penalty.name must be empty for recipe 'pretrain'",
    ),
    (
      "configs/joint.py:digits,smoke",
      "name=drsl",
      "config.penalty: name must be one of",
    ),
    (
      "configs/joint.py:diabetes,smoke",
      "name=complement_kl",
      "penalty must be left out for a model that predicts a number",
    ),
    (
      "configs/restrained_softmax.py:digits,prsl,smoke",
      "options.window=0,12",
      "window must end at 9 at most",
    ),
    (
      "configs/restrained_softmax.py:digits,smoke",
      "weight=-1",
      "config.penalty.weight must be non-negative",
    ),
    (
      "configs/captioning.py:digits,prsl,smoke",
      "options.window=0,30",
      "window must end at 17 at most, the number of wrong letters",
    ),
    (
      "configs/restrained_softmax.py:digits,prsl,smoke",
      "options.level_scope=7",
      "level_scope must divide config.data.batch_size, 16 in phase 'joint'",
    ),
    (
      "configs/captioning.py:digits,prsl,smoke",
      "fidelity=published",
      "config.optimizer.clip_norm must be 0 where config.penalty.fidelity",
    ),
    (
      "configs/joint.py:digits,smoke",
      "ramp=slow",
      "config.penalty.ramp must be a number such as 0.05, or none",
    ),
    (
      "configs/restrained_softmax.py:digits,smoke",
      "options.top=1",
      "options of the penalty 'wrong_class_dispersion'",
    ),
  ],
)
def test_a_mistake_is_one_sentence_on_the_command_line(
  config, override, sentence, tmp_path, capsys
):
  code = cli.main(
    [
      "train",
      f"--config={config}",
      f"--workdir={tmp_path / 'run'}",
      f"--config.penalty.{override}",
    ]
  )
  _, err = capsys.readouterr()
  assert code == 2
  assert err.count("\n") == 1
  assert sentence in err


def test_parts_that_do_not_divide_all_training_examples_are_refused():
  """The probe of fine-tuning has them in one batch."""
  config = config_lib.load(
    "configs/joint.py:digits,smoke",
    [
      "--config.penalty.name=topk_level",
      "--config.penalty.options.level_scope=16",
      "--config.data.max_train_examples=60",
      "--config.recipe.name=finetune",
      "--config.model.fusion=transformer",
    ],
  )
  patches = {"name": "patches", "patch": (2, 2)}
  config.model.encoders = {"default": patches}
  config.recipe.options = {}
  setup = setup_lib.prepare(config)
  with pytest.raises(
    _validate.UserError, match="level_scope must divide the number of training"
  ):
    recipe_lib.make(config, setup)


@pytest.mark.parametrize("window", ["0,10", "4,13", "0,17"])
def test_a_window_is_of_letters_where_a_caption_is_spelled(window):
  """Beyond the ten classes, within the eighteen letters."""
  config = config_lib.load(
    "configs/captioning.py:digits,prsl,smoke",
    [f"--config.penalty.options.window={window}"],
  )
  recipe = recipe_lib.make(config, setup_lib.prepare(config))
  assert recipe.phases[0].name == "captioning"


def test_as_published_there_is_no_ramp_unless_it_is_asked_for():
  published = ["--config.penalty.name=topk_level"]
  published += ["--config.penalty.fidelity=published"]
  at = {"progress": jnp.float32(0.025)}
  for more, scale in (([], 1.0), (["--config.penalty.ramp=0.05"], 0.5)):
    config = config_lib.load("configs/joint.py:digits", [*published, *more])
    assert recipe_lib.restraint(config).at(at).scale == scale


def test_captions_as_published():
  for name, weight in (("prsl", 1e-5), ("drsl", 1e-8)):
    config = config_lib.load(f"configs/captioning.py:digits,{name},published")
    found = recipe_lib.restraint(config)
    assert (found.fidelity, found.weight) == ("published", weight)
    assert config.optimizer.clip_norm == 0
    at = {"progress": jnp.float32(0.0)}
    assert found.at(at).scale == 1
  for word in ("published", "complement_kl,published"):
    with pytest.raises(_validate.UserError, match="published changes nothing"):
      config_lib.load(f"configs/captioning.py:digits,{word}")
