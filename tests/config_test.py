"""Configuration files: found, overridden, refused by name."""

import json

import pytest

from robust_mm import _validate
from robust_mm import attacks
from robust_mm import cli
from robust_mm import config as config_lib
from robust_mm import protocols
from robust_mm.training import runs


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
    ("--config.evaluation.missing_rates=0.1,0.5", (0.1, 0.5)),
    ("--config.evaluation.missing_rates=0.5", (0.5,)),
    ("--config.evaluation.corruptions=suite", "suite"),
    ("--config.evaluation.corruptions=correlated", "correlated"),
    ("--config.evaluation.missing_protocol=frames", "frames"),
    ("--config.data.path=/a/b", "/a/b"),
    ("--config.data.train_splits=train", ("train",)),
    ("--config.data.train_splits=train,validation", ("train", "validation")),
    ("--config.recipe.options.variant=mixup", "mixup"),
    ("--config.recipe.options.gate_options.tau=0.25", 0.25),
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
    (
      "configs/masd.py",
      [
        "--config.recipe.options.a=3",
        "--config.recipe.options.a.b=1",
      ],
      "there is no key",
    ),
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
    (
      "configs/joint.py",
      ["--config.training.average_decay=1"],
      r"config.training.average_decay must lie in \[0, 1\), got 1.0",
    ),
    (
      "configs/joint.py:mfeat",
      ["--config.data.train_splits=train,validation"],
      "config.selection.metric must be 'last' where .* got 'auto'",
    ),
    *(
      (
        "configs/joint.py:digits",
        [f"--config.data.train_splits={value}"],
        "config.data.train_splits must be one of",
      )
      for value in ("validation", "train,test", "train,train", "()")
    ),
    ("configs/joint.py", ["--configs.seed=1"], "unknown argument"),
    ("configs/joint.py", ["--config.evaluation.radii=0,1"], "radii"),
    ("configs/joint.py", ["--config.evaluation.attack=pgdd"], "'pgd'"),
    (
      "configs/joint.py",
      ["--config.evaluation.missing_rates=0.5,2"],
      "missing_rates must lie",
    ),
    (
      "configs/joint.py",
      ["--config.evaluation.missing_rates=a,b"],
      "missing_rates must be numbers",
    ),
    (
      "configs/joint.py",
      ["--config.evaluation.missing_protocol=frame"],
      "Did you mean 'frames'",
    ),
    (
      "configs/joint.py",
      ["--config.evaluation.corruptions=sute"],
      "Did you mean 'suite'",
    ),
    ("configs/joint.py", ["--config.evaluation.loss=hinge"], "evaluation.loss"),
    ("configs/joint.py", ["--config.evaluation.batch_size=0"], "batch_size"),
    (
      "configs/joint.py",
      ["--config.mesh.rules=(('[', ('data',)),)"],
      "regular",
    ),
    ("configs/joint.py", ["--config.mesh.rules=('a', ('data',))"], "must look"),
    ("/nowhere/configs/joint.py:digits", [], "which is no file"),
    (
      "configs/joint.py",
      ["--config.selection.metric=exact_match"],
      "metric must not be 'exact_match' where .* 'concat': only a 'captioner'",
    ),
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


@pytest.mark.parametrize(
  "spec, overrides, expected",
  [
    ("configs/joint.py:digits", [], config_lib.default().evaluation.radii),
    ("configs/joint.py:digits", ["norm=linf"], config_lib.LINF_RADII),
    # The file's own are l2 sizes.
    ("configs/crmt.py:utd_mhad", ["norm=linf"], config_lib.LINF_RADII),
    ("configs/joint.py:digits", ["norm=linf", "radii=0.3"], (0.3,)),
    ("configs/joint.py:digits", ["radii=0.3", "norm=linf"], (0.3,)),
    ("configs/crmt.py:utd_mhad", ["norm=l2"], (0.1, 0.2, 0.4)),
  ],
)
def test_radii_that_are_not_given_fit_the_norm(spec, overrides, expected):
  config = load(spec, *(f"--config.evaluation.{word}" for word in overrides))
  assert config.evaluation.radii == expected


@pytest.mark.parametrize("radii, kept", [("(0.03,)", True), (None, False)])
def test_radii_of_a_file_that_says_linf_itself_are_meant(tmp_path, radii, kept):
  line = f"  c.evaluation.radii = {radii}\n" if radii else ""
  path = tmp_path / "own.py"
  path.write_text(
    "from robust_mm import config\n"
    "def get_config(arg):\n"
    "  c = config.default()\n"
    "  c.evaluation.norm = 'linf'\n" + line + "  return c\n"
  )
  found = load(str(path)).evaluation.radii
  assert found == ((0.03,) if kept else config_lib.LINF_RADII)


@pytest.mark.parametrize("text", ["a,b", "0.1,b", "a", "True"])
def test_radii_that_are_no_numbers_are_one_sentence(text, capsys):
  command = ["train", "--config=configs/joint.py:digits", "--workdir=nowhere"]
  code = cli.main([*command, f"--config.evaluation.radii={text}"])
  _, err = capsys.readouterr()
  assert code == 2
  assert err.count("\n") == 1
  assert "config.evaluation.radii must be numbers" in err


@pytest.mark.parametrize(
  "words, pair",
  [
    ("published,radius", "published and radius"),
    ("radius,smoke,published", "published and radius"),
    ("AT,Mix", "AT and Mix"),
    ("AT,radius", "AT and radius"),
  ],
)
def test_variants_that_exclude_each_other_are_named(words, pair):
  with pytest.raises(_validate.UserError, match=f"{pair} exclude each other"):
    load(f"configs/crmt.py:digits,{words}")


def test_every_attack_can_be_asked_for_and_takes_what_it_knows():
  assert tuple(sorted(config_lib.ATTACKS)) == attacks.names()
  config = config_lib.load("configs/joint.py:digits")
  facts = {"value_range": {}, "units": {}}
  for name in config_lib.ATTACKS:
    (given,) = protocols.of_run(config, facts, None, name).attacks
    known = attacks.arguments(name)
    assert set(given) - {"name"} <= known
    for key in ("loss", "num_steps", "num_restarts", "num_queries", "strength"):
      assert (key in given) == (key in known)
    made = attacks.make(norm=2, budget=1.0, **given)
    assert made.settings["name"] == name


def test_the_default_metric_of_an_earlier_version_is_the_same(tmp_path):
  config = load("configs/joint.py:mfeat")
  assert config.selection.metric == "auto"
  runs.save_config(tmp_path, config)
  path = tmp_path / runs.CONFIG_FILE
  stored = json.loads(path.read_text())
  stored["selection"]["metric"] = "accuracy"
  path.write_text(json.dumps(stored))
  runs.check_config(tmp_path, config)
  config.selection.metric = "loss"
  with pytest.raises(_validate.UserError, match=r"selection\.metric"):
    runs.check_config(tmp_path, config)
  config.selection.metric = "auto"
  stored["recipe"]["name"] = config.recipe.name = "captioning"
  path.write_text(json.dumps(stored))
  with pytest.raises(_validate.UserError, match=r"selection\.metric"):
    runs.check_config(tmp_path, config)
