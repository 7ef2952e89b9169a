"""Configuration files: found, overridden, refused by name."""

import pytest

from robust_mm import _validate
from robust_mm import attacks
from robust_mm import commands
from robust_mm import config as config_lib


def load(spec="configs/joint.py:digits", *overrides):
  return config_lib.load(spec, list(overrides))


def test_shipped_config_is_found_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert load().data.name == "digits"
  assert load("joint.py:mfeat").data.name == "mfeat"


def test_own_file_wins_over_the_shipped_one(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "joint.py").write_text(
    "from robust_mm import config\n"
    "def get_config(arg):\n"
    "  c = config.default()\n"
    "  c.seed = 17\n"
    "  return c\n"
  )
  assert load("joint.py").seed == 17


@pytest.mark.parametrize(
  "override, expected",
  [
    ("--config.optimizer.lr=3e-4", 3e-4),
    ("--config.optimizer.lr=1", 1.0),
    ("--config.seed=4", 4),
    ("--config.data.modalities=left,right", ("left", "right")),
    ("--config.data.modalities=left", ("left",)),
    ("--config.evaluation.radii=0.1,0.5", (0.1, 0.5)),
    ("--config.data.path=/a/b", "/a/b"),
    ("--config.recipe.options.variant=mixup", "mixup"),
  ],
)
def test_override_keeps_the_type(override, expected):
  config = load("configs/joint.py:digits", override)
  node = config
  for part in override.removeprefix("--config.").split("=")[0].split("."):
    node = node[part]
  assert node == expected
  assert type(node) is type(expected)


@pytest.mark.parametrize(
  "spec, overrides, sentence",
  [
    ("configs/nope.py", [], r"configs/nope.py, which is no file.*crmt.py"),
    ("configs/joint", [], "must name a Python file"),
    ("configs/joint.py:digit", [], "'digit' is unknown.*Did you mean 'digits'"),
    ("configs/joint.py:digits,mfeat", [], "more than one data set"),
    (
      "configs/joint.py",
      ["--config.optimizer.lrr=1"],
      r"no key 'optimizer.lrr'.*Did you mean 'lr'",
    ),
    ("configs/joint.py", ["--config.optimizer=1"], "is a group of keys"),
    ("configs/joint.py", ["--config.seed=a"], "config.seed must be an integer"),
    ("configs/joint.py", ["--config.num_steps=0"], "config.num_steps must"),
    ("configs/joint.py", ["--config.num_epochs=2"], "both set the length"),
    ("configs/joint.py", ["--config.num_epochs=-1"], "config.num_epochs must"),
    (
      "configs/crmt.py:digits,published",
      ["--config.num_steps=9"],
      r"config.num_steps \(9\) and config.num_epochs \(140\) both",
    ),
    ("configs/joint.py", ["--config.optimizer.lr=-1"], "config.optimizer.lr"),
    (
      "configs/joint.py",
      ["--config.recipe.name=joitn"],
      "config.recipe.name must be one of.*Did you mean 'joint'",
    ),
    ("configs/joint.py", ["--config.data.missing_rate=2.0"], "missing_rate"),
    ("configs/joint.py", ["--configs.seed=1"], "unknown argument"),
    ("configs/joint.py", ["--config.evaluation.radii=0,1"], "radii"),
    ("configs/joint.py", ["--config.evaluation.attack=pgdd"], "'pgd'"),
    ("configs/joint.py", ["--config.evaluation.loss=hinge"], "evaluation.loss"),
    ("configs/joint.py", ["--config.evaluation.batch_size=0"], "batch_size"),
    (
      "configs/joint.py",
      ["--config.mesh.rules=(('[', ('data',)),)"],
      "regular",
    ),
    ("configs/joint.py", ["--config.mesh.rules=('a', ('data',))"], "must look"),
    ("/nowhere/configs/joint.py:digits", [], "which is no file"),
  ],
)
def test_mistake_is_one_sentence_naming_it(spec, overrides, sentence):
  with pytest.raises(_validate.UserError, match=sentence) as error:
    config_lib.load(spec, overrides)
  assert "\n" not in str(error.value)


def test_option_left_at_the_default_of_a_factory_can_be_set():
  config = load(
    "configs/crmt.py:digits",
    "--config.recipe.options.clean_tolerance=0.02",
    "--config.model.encoders.default.num_iters=20",
  )
  assert config.recipe.options.clean_tolerance == 0.02
  assert config.model.encoders.default.num_iters == 20


def test_unknown_key_in_a_file_is_refused(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(
    "from robust_mm import config\n"
    "def get_config(arg):\n"
    "  c = config.default()\n"
    "  c.optimiser = 1\n"
    "  return c\n"
  )
  with pytest.raises(
    _validate.UserError, match=r"config\.optimiser.*optimizer"
  ):
    load(str(path))


def test_every_attack_can_be_asked_for_and_takes_what_it_knows():
  assert tuple(sorted(config_lib.ATTACKS)) == attacks.names()
  config = config_lib.load("configs/joint.py:digits")
  facts = {"value_range": {}, "units": {}}
  for name in config_lib.ATTACKS:
    (given,) = commands.make_protocol(config, facts, None, name).attacks
    known = attacks.arguments(name)
    assert set(given) - {"name"} <= known
    for key in ("loss", "num_steps", "num_restarts", "num_queries", "strength"):
      assert (key in given) == (key in known)
    made = attacks.make(norm=2, budget=1.0, **given)
    assert made.settings["name"] == name
