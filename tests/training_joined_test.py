"""Training on train and validation: what it says, and what it counts."""

import json

import numpy as np
import pytest

import robust_mm
from robust_mm import cli
from robust_mm import config as config_lib
from robust_mm import data
from robust_mm import training
from robust_mm.training import recipe as recipe_lib
from robust_mm.training import runs
from robust_mm.training import setup as setup_lib
from robust_mm.training import writers

BOTH = "data.train_splits=train,validation"
LAST = "selection.metric=last"


def load(spec, *overrides):
  return config_lib.load(
    spec, ["--config.mesh.data=1", *(f"--config.{o}" for o in overrides)]
  )


def train(config, workdir):
  said = []
  result = training.train(config, workdir, say=said.append)
  assert result.finished
  return result, [line for line in said if line.startswith("note: ")]


def rows(workdir):
  return [row for row in writers.read(workdir) if "validation_loss" in row]


def test_a_run_on_both_splits_says_so_and_keeps_the_last(tmp_path):
  config = load("configs/joint.py:digits,smoke", BOTH, LAST)
  _, notes = train(config, tmp_path)
  assert len(notes) == 1
  assert "validation examples are trained on (config.data.tr" in notes[0]
  found = rows(tmp_path)
  assert [row["step"] for row in found] == [2, 4]
  finished = runs.describe(tmp_path)["finished"]["joint"]
  assert finished["step"] == 4
  assert cli.main(["evaluate", f"--workdir={tmp_path}", "--limit=20"]) == 0


def test_the_reference_and_what_is_counted_are_of_the_joined_set():
  config = load("configs/joint.py:digits", BOTH, LAST)
  setup = setup_lib.prepare(config)
  assert setup.facts["num_train"] == len(setup.train) == 1293 + 144
  assert setup.facts["num_validation"] == 144
  plain = setup_lib.prepare(load("configs/joint.py:digits"))
  validation = data.open_source("digits", "validation")
  np.testing.assert_array_equal(
    np.sort(setup.reference["id"]),
    np.sort(np.concatenate([plain.reference["id"], validation.ids])),
  )
  again = setup_lib.reference_batch(setup_lib.open_split(config, "train"))
  np.testing.assert_array_equal(again["id"], setup.reference["id"])
  left = np.concatenate(
    [part.batch()["inputs"]["left"] for part in (plain.train, validation)]
  )
  offset = setup.facts["normalization"]["left"]
  assert offset != plain.facts["normalization"]["left"]
  np.testing.assert_array_equal(
    np.sort(setup.reference["inputs"]["left"], axis=None),
    np.sort(left, axis=None),
  )


def test_limits_and_missing_entries_are_of_the_joined_set():
  config = load(
    "configs/joint.py:digits",
    BOTH,
    LAST,
    "data.max_train_examples=300",
    "data.missing_rate=0.5",
  )
  joined = setup_lib.open_split(config, "train")
  assert len(joined) == 300
  validation = data.open_source("digits", "validation").ids
  assert 10 < np.intersect1d(joined.ids, validation).size < 60
  assert 0.5 < np.mean(joined.batch()["present"]["left"]) < 0.95
  assert (
    setup_lib.open_split(config, "validation").batch()["present"]["left"].all()
  )


@pytest.mark.parametrize(
  "spec, words",
  [
    ("configs/modal_immune.py:digits,smoke", "the probe job and the outer job"),
    ("configs/crmt.py:digits,smoke", "here, for acceptance."),
  ],
)
def test_what_a_recipe_decides_on_training_examples_is_noted(
  tmp_path, spec, words
):
  quick = ["recipe.options.gate=none"] if "immune" in spec else []
  _, notes = train(load(spec, BOTH, LAST, *quick), tmp_path)
  assert len(notes) == 2
  assert words in notes[1]
  assert "validation examples, which are trained on here" in notes[1]
  assert runs.describe(tmp_path)["notes"][1] in notes[1]
  setup = setup_lib.prepare(load(spec))
  recipe = recipe_lib.make(load(spec), setup)
  assert not setup.facts["notes"]
  assert setup_lib.recipe_notes(load(spec), recipe) == []


def test_mfeat_is_trained_on_its_official_training_set(tmp_path, data_dir):
  path = f"data.path={data_dir}"
  config = load("configs/joint.py:mfeat,smoke", BOTH, LAST, path)
  config.data.max_train_examples = 0
  train(config, tmp_path)
  assert runs.describe(tmp_path)["num_train"] == 1600


def test_own_arrays_can_be_trained_on_whole(tmp_path):
  rng = np.random.default_rng(0)
  folder = tmp_path / "data"
  folder.mkdir()
  for split, size in (("train", 40), ("validation", 12)):
    np.savez(
      folder / f"{split}.npz",
      **{"inputs/a": rng.normal(size=(size, 3)), "label": np.arange(size) % 4},
    )
  config = load(
    "configs/joint.py:arrays,smoke", BOTH, LAST, f"data.path={folder}"
  )
  train(config, tmp_path / "run")
  assert runs.describe(tmp_path / "run")["num_train"] == 52


def test_selecting_on_them_is_one_sentence_and_code_2(tmp_path, capsys):
  code = cli.main(
    [
      "train",
      "--config=configs/modal_immune.py:digits,smoke",
      f"--workdir={tmp_path / 'run'}",
      f"--config.{BOTH}",
    ]
  )
  _, err = capsys.readouterr()
  assert code == 2
  assert err.count("\n") == 1
  assert "config.selection.metric must be 'last'" in err
  assert not (tmp_path / "run").exists()


def test_numbers_of_the_validation_split_come_with_a_note(tmp_path, capsys):
  train(load("configs/joint.py:digits,smoke", BOTH, LAST), tmp_path)
  command = f"--workdir={tmp_path}"
  for name in ("evaluate", "certify"):
    for split, count in (("validation", 1), ("test", 0)):
      options = [name, command, f"--split={split}", "--limit=8"]
      if name == "certify":
        options.append("--source=empirical")
      assert cli.main(options) == 0
      out, err = capsys.readouterr()
      assert (out + err).count("note: validation examples are tr") == count


def test_a_run_of_before_is_one_on_the_train_split(tmp_path):
  config = load("configs/joint.py:digits,smoke")
  train(config, tmp_path)
  path = tmp_path / runs.CONFIG_FILE
  tree = json.loads(path.read_text())
  del tree["data"]["train_splits"]
  path.write_text(json.dumps(tree))
  _, _, _, old = robust_mm.load(tmp_path)
  assert setup_lib.train_splits(old) == ("train",)
  assert len(setup_lib.open_split(old, "train")) == 64
  assert cli.main(["evaluate", f"--workdir={tmp_path}", "--limit=8"]) == 0
  with pytest.raises(
    robust_mm.UserError, match=r"config.data.train_splits is \['train'\] there"
  ):
    train(load("configs/joint.py:digits,smoke", BOTH, LAST), tmp_path)
  train(config, tmp_path)
