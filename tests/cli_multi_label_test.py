"""audioset from the command line: prepared, trained, evaluated, or refused."""

import json

import large_sets
import numpy as np
import pytest
import sklearn.metrics
from command_line import run

import robust_mm
from robust_mm import config as config_lib
from robust_mm import data
from robust_mm import training
from robust_mm.training import runs
from robust_mm.training import setup as setup_lib
from robust_mm.training import sharding
from robust_mm.training import validation

SIZES = {"train": 64, "validation": 32, "test": 32}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A data directory with a made-up audioset."""
  folder = tmp_path_factory.mktemp("data")
  large_sets.make("audioset", folder / "source", SIZES)
  data.prepare("audioset", folder / "source", folder / "out")
  return folder / "out"


@pytest.fixture(scope="module")
def immune(prepared, tmp_path_factory):
  """A run of modal_immune on it, as short as it gets."""
  workdir = tmp_path_factory.mktemp("runs") / "immune"
  config = config_lib.load(
    "configs/modal_immune.py:audioset,damage_alone,smoke",
    [
      "--config.mesh.data=1",
      f"--config.data.path={prepared}",
      "--config.evaluation.missing_rates=0.3",
      "--config.model.encoders.default.name=mlp",
      "--config.recipe.options.adapt=False",
    ],
  )
  assert training.train(config, workdir, say=lambda line: None).finished
  return workdir


def test_a_study_of_shift_is_scored_by_map(prepared, tmp_path, capsys):
  words = [
    "shift",
    "--config=configs/shift.py:audioset,scratch,smoke",
    f"--workdir={tmp_path / 'study'}",
    f"--config.data.path={prepared}",
    "--config.mesh.data=1",
    "--config.study.methods=finetune,ensemble",
  ]
  code, out, _ = run(capsys, *words)
  assert code == 0
  assert "nan" not in out
  found = json.loads((tmp_path / "study" / "shift.json").read_text())
  assert found["train_sets"] == ["audio", "video", "audio+video"]
  batch = data.open_source("audioset", "test", path=prepared).batch()
  mean = sklearn.metrics.average_precision_score

  def logits(method, train):
    place = tmp_path / "study" / "runs" / method / train / "0"
    return dict(np.load(place / "logits.npz"))

  for method in ("finetune", "ensemble"):
    expected = [
      [
        mean(batch["label"], logits(method, train)[test])
        for test in found["test_sets"]
      ]
      for train in found["train_sets"]
    ]
    np.testing.assert_allclose(
      found["methods"][method]["matrix"], expected, rtol=1e-5
    )
  alone = [logits("finetune", m)[m] for m in ("audio", "video")]
  said = [-np.log1p(np.exp(-x)) for x in alone]  # of every class by itself
  np.testing.assert_allclose(
    logits("ensemble", "audio+video")["audio+video"],
    np.mean(said, axis=0),
    rtol=1e-5,
  )
  # The same models, scored otherwise.
  code, _, _ = run(capsys, *words, "--config.study.score=auroc")
  assert code == 0
  scored = json.loads((tmp_path / "study" / "shift.json").read_text())
  assert scored["chance"] == 0.5
  area = sklearn.metrics.roc_auc_score
  expected = area(batch["label"], logits("finetune", "audio")["video"])
  matrix = scored["methods"]["finetune"]["matrix"]
  np.testing.assert_allclose(matrix[0][1], expected, rtol=1e-5)
  err = refused(capsys, *words, "--config.study.score=accuracy")
  assert "config.study.score must be one of" in err


def test_facts_hold_the_task_and_the_metric(immune):
  facts = runs.describe(immune)
  assert (facts["task"], facts["num_classes"]) == ("multi_label", 4)
  assert facts["finished"]["immune"]["metrics"].keys() == {
    "map",
    "map_over_subsets",
    "loss",
  }


def test_validation_is_sklearn_s_map_alone_and_over_subsets(immune):
  model, params, state, config = robust_mm.load(immune)
  assert model.task == "multi_label"
  setup = setup_lib.prepare(config)
  found = validation.make(config, setup, sharding.make_mesh(data=1))(
    params, state
  )
  batch = setup.validation.batch()
  scores = []
  for names in (("audio",), ("video",), ("audio", "video")):
    present = {m: f & (m in names) for m, f in batch["present"].items()}
    said = np.asarray(
      model.apply(params, state, batch["inputs"], present)[0].logits
    )
    scores.append(sklearn.metrics.average_precision_score(batch["label"], said))
  assert found["map"] == pytest.approx(scores[-1], rel=1e-3)
  assert found["map_over_subsets"] == pytest.approx(np.mean(scores), rel=1e-3)
  p = 1 / (1 + np.exp(-said.astype(float)))
  loss = sklearn.metrics.log_loss(batch["label"].ravel(), p.ravel())
  assert found["loss"] == pytest.approx(loss, rel=1e-4)


def test_immune_run_is_evaluated_in_map(capsys, immune):
  code, _, err = run(capsys, "evaluate", f"--workdir={immune}", "--limit=30")
  assert code == 0, err
  results = json.loads((immune / "results.json").read_text())
  assert set(results["subsets"]) == {"audio", "video", "audio+video"}
  assert results["missing"]["rows"][0]["map"] > 0
  page = (immune / "report.html").read_text()
  for word in ("certif", "attacked by", "accurac"):
    assert word not in page.lower(), word
  code, out, err = run(capsys, "report", f"--workdir={immune}")
  assert code == 0, err
  assert out.startswith("mAP")


def test_joint_ranks_what_audio_tells_and_auto_selects_map(prepared, tmp_path):
  config = config_lib.load(
    "configs/joint.py:audioset",
    [
      "--config.mesh.data=1",
      f"--config.data.path={prepared}",
      "--config.num_steps=60",
      "--config.training.eval_every=20",
      "--config.model.encoders.default.name=mlp",
    ],
  )
  found = training.train(config, tmp_path / "run", say=lambda line: None)
  assert set(found.metrics) == {"map", "loss"}
  rows = [
    json.loads(line)
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  ]
  seen = [r["validation_map"] for r in rows if "validation_map" in r]
  assert found.metrics["map"] == pytest.approx(max(seen))
  labels = data.open_source("audioset", "validation", path=prepared).labels
  assert found.metrics["map"] > labels.mean() + 0.1


def refused(capsys, *arguments):
  code, out, err = run(capsys, *arguments)
  assert code == 2
  assert out == ""
  assert err.count("\n") == 1, err
  return err


def test_what_is_about_one_class_is_refused_of_a_run(capsys, immune):
  err = refused(capsys, "certify", f"--workdir={immune}")
  assert "predicts several classes at once (multi-label)" in err
  err = refused(capsys, "evaluate", f"--workdir={immune}", "--attack=pgd")
  assert "--attack needs a run that predicts classes" in err


@pytest.mark.parametrize(
  "override, words",
  [
    ("selection.metric=accuracy", "are several classes at once"),
    ("selection.metric=mae", "are several classes at once"),
    ("recipe.name=crmt", "'joint', 'modal_immune'"),
    ("model.fusion=orthogonal", "'concat', 'masked'"),
    ("evaluation.certificate=smoothing", "'auto', 'none'"),
  ],
)
def test_configuration_of_another_task_is_refused_by_key(
  capsys, prepared, tmp_path, override, words
):
  err = refused(
    capsys,
    "train",
    "--config=configs/joint.py:audioset,smoke",
    f"--config.data.path={prepared}",
    f"--config.{override}",
    f"--workdir={tmp_path / 'run'}",
  )
  assert f"config.{override.split('=')[0]} must not be" in err
  assert words in err
  err = refused(
    capsys,
    "train",
    "--config=configs/joint.py:digits,smoke",
    "--config.selection.metric=map",
    f"--workdir={tmp_path / 'run'}",
  )
  assert "the labels of digits are classes" in err


def test_a_set_that_is_not_prepared_is_answered_with_the_command(
  capsys, tmp_path
):
  err = refused(
    capsys,
    "train",
    "--config=configs/joint.py:audioset,smoke",
    f"--config.data.path={tmp_path}",
    f"--workdir={tmp_path / 'run'}",
  )
  assert "robust-mm data prepare audioset --source=DIR" in err


def test_a_set_that_is_prepared_says_that_nothing_was_read(prepared, capsys):
  words = ["audioset", "--source=nowhere", f"--path={prepared}"]
  code, out, _ = run(capsys, "data", "prepare", *words)
  assert code == 0
  assert "already; --source was not read" in out
