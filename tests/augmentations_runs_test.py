"""Augmentation of a run: read from its configuration, used by every recipe."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import robust_mm
from robust_mm import _validate
from robust_mm import cli
from robust_mm import config as config_lib
from robust_mm import training
from robust_mm.training import recipe as recipe_lib
from robust_mm.training import runs
from robust_mm.training import setup as setup_lib

MOVE = "{'move': {'scale': 0.1, 'shift': 0.2}, 'noise': {'deviation': 0.5}}"
LEFT = f"--config.augmentation.left={MOVE}"
UTD = {
  "inertial": {
    "warp_time": {"scale": 1.3, "shift": 0.1},
    "rotate": {"angle": 0.3},
    "scale": {"deviation": 0.1, "per": "axis"},
    "noise": {"deviation": 0.05},
  },
  "skeleton": {"rotate": {"angle": 0.3, "axis": "y"}},
  "depth": {
    "warp_time": {"scale": 1.2},
    "move": {"scale": 0.1, "shift": 0.1},
    "brighten": {"deviation": 0.1},
    "erase": {"share": 0.1},
  },
}


def load(spec="configs/joint.py:digits,smoke", *overrides):
  return config_lib.load(spec, ["--config.mesh.data=1", *overrides])


@pytest.fixture
def own_file(tmp_path):
  """A configuration file of a user that says what is augmented."""
  path = tmp_path / "own.py"
  path.write_text(
    "from robust_mm import config\n"
    "def get_config(arg):\n"
    "  c = config.default()\n"
    "  c.data.name = 'utd_mhad'\n"
    "  c.model.encoders = {'default': {'name': 'auto'}}\n"
    f"  c.augmentation = {UTD}\n"
    "  return c\n"
  )
  return path


def test_nothing_is_augmented_unless_asked_for():
  config = load()
  assert config.augmentation.to_dict() == {}
  recipe = recipe_lib.make(config, setup_lib.prepare(config))
  assert recipe.phases[0].interventions == ()


def test_a_file_says_what_and_the_command_line_how_much(own_file):
  path = "--config.augmentation.inertial"
  config = load(
    str(own_file), f"{path}.noise.deviation=0.2", f"{path}.rotate.axis=y"
  )
  found = config.augmentation.to_dict()
  assert found["inertial"]["noise"] == {"deviation": 0.2}
  assert found["inertial"]["rotate"] == {"angle": 0.3, "axis": "y"}
  assert found["depth"] == UTD["depth"]


@pytest.mark.parametrize(
  "override, sentence",
  [
    ("inertial.rotate.angle=-1", r"inertial\.rotate\.angle must be non-neg"),
    ("inertial.rotate.angle=a", r"inertial\.rotate\.angle must be a number"),
    ("inertial.rotate.axis=w", r"inertial\.rotate\.axis must be one of None"),
    ("inertial.rotate.angel=1", r"inertial\.rotate\.angel is no .* 'angle'"),
    ("inertial.spin=1", r"inertial\.spin is no known operation; known here"),
    ("inertial.move=1", r"inertial\.move must be a group such as"),
    ("inertial.rotate=1", r"inertial\.rotate is a group of keys"),
    ("colour=1", r"colour must be a group such as"),
  ],
)
def test_a_wrong_option_is_refused_before_jax_is_there(
  own_file, override, sentence
):
  with pytest.raises(_validate.UserError, match=sentence) as error:
    load(str(own_file), f"--config.augmentation.{override}")
  assert "config.augmentation." in str(error.value)
  assert "\n" not in str(error.value)


def test_checking_a_configuration_loads_no_jax():
  code = (
    "import sys\nfrom robust_mm import config\n"
    f"config.load('configs/joint.py:digits', [{LEFT!r}])\n"
    "print('jax' in sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
  "override, sentence",
  [
    ("lift={'noise': {'deviation': 1.0}}", "config.augmentation names the unk"),
    ("left={'rotate': {'angle': 1.0}}", "config.augmentation.left.rotate is "),
    ("left={'warp_time': {}}", "config.augmentation.left.warp_time is for seq"),
    ("left={'noise': {'deviation': -1}}", "config.augmentation.left.noise.dev"),
  ],
)
def test_what_does_not_fit_exits_with_2_and_writes_nothing(
  override, sentence, tmp_path, capsys
):
  command = ["train", "--config=configs/joint.py:digits,smoke"]
  workdir = tmp_path / "run"
  code = cli.main(
    [*command, f"--workdir={workdir}", f"--config.augmentation.{override}"]
  )
  _, err = capsys.readouterr()
  assert code == 2
  assert err.count("\n") == 1
  assert sentence in err
  assert not (workdir / runs.CONFIG_FILE).exists()
  assert not (workdir / runs.RUN_FILE).exists()


@pytest.mark.parametrize(
  "spec",
  [
    "configs/joint.py:digits,noise",
    "configs/joint.py:digits,adversarial",
    "configs/crmt.py:digits",
    "configs/crmt.py:digits,radius",
    "configs/modal_immune.py:digits",
  ],
)
def test_every_phase_that_streams_is_augmented_first(spec):
  plain = load(f"{spec},smoke")
  setup = setup_lib.prepare(plain)
  before = recipe_lib.make(plain, setup)
  after = recipe_lib.make(load(f"{spec},smoke", LEFT), setup)
  batch = setup.reference
  prepared = [phase.prepare is not None for phase in before.phases]
  assert any(prepared) == (spec == "configs/crmt.py:digits")
  for old, new in zip(before.phases, after.phases, strict=True):
    if old.prepare is not None:
      assert len(new.interventions) == len(old.interventions)
      continue
    assert len(new.interventions) == len(old.interventions) + 1
    found = new.interventions[0](jax.random.key(0), None, None, batch)
    assert np.all(found["inputs"]["left"] != batch["inputs"]["left"])
    np.testing.assert_array_equal(
      found["inputs"]["right"], batch["inputs"]["right"]
    )


def weights(workdir):
  _, params, _, _ = robust_mm.load(workdir)
  return np.concatenate(
    [np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(params)]
  )


def test_a_run_is_changed_by_augmentation_and_repeats_itself(tmp_path):
  found = []
  for name, overrides in (("a", [LEFT]), ("b", [LEFT]), ("plain", [])):
    config = load("configs/joint.py:digits,smoke", *overrides)
    training.train(config, tmp_path / name, say=lambda line: None)
    found.append(weights(tmp_path / name))
  np.testing.assert_array_equal(found[0], found[1])
  assert np.any(found[0] != found[2])
  # The folder remembers it.
  with pytest.raises(_validate.UserError, match=r"config\.augmentation\.left"):
    training.train(load(), tmp_path / "a", say=lambda line: None)


def test_every_operation_takes_its_steps_on_real_sensors(data_dir, tmp_path):
  config = load(
    "configs/joint.py:utd_mhad,smoke",
    f"--config.data.path={data_dir}",
    *(f"--config.augmentation.{name}={value}" for name, value in UTD.items()),
  )
  result = training.train(config, tmp_path, say=lambda line: None)
  assert result.finished
