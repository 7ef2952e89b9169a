"""Every shipped configuration takes its steps on real data."""

import pytest

from robust_mm import config as config_lib
from robust_mm import training

PREPARED = ("utd_mhad", "mfeat", "mosi", "av_digits")


def smoke(spec, workdir, path=""):
  config = config_lib.load(
    f"{spec},smoke",
    ["--config.mesh.data=1", f"--config.data.path={path}"],
  )
  result = training.train(config, workdir, say=lambda line: None)
  assert result.finished
  assert 0 <= result.metrics["accuracy"] <= 1


JOINT = ("dropout", "adversarial", "mixup", "token")
CRMT = ("AT", "Mix", "published", "published,Mix", "radius")


@pytest.mark.parametrize(
  "spec",
  [
    "configs/joint.py:digits",
    *(f"configs/joint.py:digits,{variant}" for variant in JOINT),
    "configs/crmt.py:digits",
    *(f"configs/crmt.py:digits,{variant}" for variant in CRMT),
  ],
)
def test_every_variant_takes_its_steps_on_digits(spec, tmp_path):
  smoke(spec, tmp_path)


@pytest.mark.parametrize("name", PREPARED)
@pytest.mark.parametrize("file", ["joint", "crmt"])
def test_every_data_set_takes_its_steps(file, name, data_dir, tmp_path):
  smoke(f"configs/{file}.py:{name}", tmp_path, data_dir)
