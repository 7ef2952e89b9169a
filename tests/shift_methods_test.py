"""What a study's methods are as configurations, and what they cost."""

import pytest

from robust_mm import config as config_lib
from robust_mm import shift_methods
from robust_mm import shift_study
from robust_mm.data import registry
from robust_mm.training import runs
from robust_mm.training import setup as setup_lib

SPEC = "configs/shift.py:digits,smoke"


def test_pretraining_sees_the_examples_of_the_study_and_no_others():
  config = config_lib.load(
    "configs/shift.py:av_digits",
    [
      "--config.data.name=av_digits/speaker_disjoint",
      "--config.data.max_train_examples=300",
      "--config.data.missing_rate=0.25",
      "--config.data.batch_size=8",
      "--config.data.train_splits=train,validation",
      "--config.selection.metric=last",
    ],
  )
  found = shift_methods.pretraining(config, seed=3)
  assert found.data.name == "av_digits/speaker_disjoint"
  assert found.data.max_train_examples == 300
  assert found.data.missing_rate == 0.25
  assert found.data.train_splits == ("train", "validation")
  assert found.selection.metric == "last"
  assert found.data.batch_size == 256  # its own
  assert found.seed == 3


def test_no_test_speaker_is_pretrained_on(data_dir):
  name = "av_digits/speaker_disjoint"
  for argument in ("av_digits", name):
    config = config_lib.load(
      f"configs/shift.py:{argument}",
      [f"--config.data.name={name}", f"--config.data.path={data_dir}"],
    )
    before = shift_methods.pretraining(config)
    seen = setup_lib.open_split(before, "train").metadata["speaker"]
    tested = setup_lib.open_split(config, "test").metadata["speaker"]
    assert not {*seen} & {*tested}


@pytest.mark.parametrize(
  "name", ["av_digits/hard", "av_digits/speaker_disjoint"]
)
def test_other_splits_of_av_digits_are_named_in_every_file(name):
  for file in ("shift", "masd", "finetune", "pretraining"):
    there = config_lib.load(f"configs/{file}.py:{name}")
    base = config_lib.load(f"configs/{file}.py:av_digits")
    assert there.data.name == name
    assert there.num_epochs == base.num_epochs
  study = config_lib.load(f"configs/shift.py:{name}").study
  assert study.pretraining.endswith(f":{name}")
  assert study.cluster in registry.get(name).metadata


def test_numbers_are_not_relabelled_with_another_pretraining(tmp_path):
  config = config_lib.load(SPEC, ["--config.study.seeds=2"])
  study = shift_study.prepare(config, tmp_path)
  runs.save_config(study.start(1), shift_methods.pretraining(config, 1))
  shift_study.prepare(config, tmp_path)
  config.study.pretraining = "configs/pretraining.py:digits,contrastive,smoke"
  with pytest.raises(
    ValueError, match=r"config\.study\.pretraining: .*objective"
  ):
    shift_study.prepare(config, tmp_path)
