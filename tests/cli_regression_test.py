"""A number from the command line: trained, evaluated, or refused at once."""

import json

import numpy as np
import pytest
from command_line import run

import robust_mm
from robust_mm import config as config_lib
from robust_mm import data
from robust_mm import training
from robust_mm.evaluation import metrics
from robust_mm.training import runs
from robust_mm.training import setup as setup_lib
from robust_mm.training import sharding
from robust_mm.training import validation


@pytest.fixture(scope="module")
def immune(tmp_path_factory):
  """A smoke run of modal_immune on diabetes."""
  workdir = tmp_path_factory.mktemp("runs") / "immune"
  config = config_lib.load(
    "configs/modal_immune.py:diabetes,smoke",
    [
      "--config.mesh.data=1",
      "--config.evaluation.missing_rates=0.3",
      "--config.evaluation.corruptions=suite",
    ],
  )
  assert training.train(config, workdir, say=lambda line: None).finished
  return workdir


def test_joint_beats_the_median_by_far_on_test(capsys, tmp_path):
  config = config_lib.load(
    "configs/joint.py:diabetes", ["--config.mesh.data=1"]
  )
  workdir = tmp_path / "joint"
  training.train(config, workdir, say=lambda line: None)
  code, out, err = run(capsys, "evaluate", f"--workdir={workdir}")
  assert code == 0, err
  assert out.splitlines()[0].split() == ["error", "joint"]
  clean = json.loads((workdir / "results.json").read_text())["clean"]
  # Linear regression is 45.5 off, the median of the training labels 59.4.
  assert clean["best_constant_mae"] == pytest.approx(58.625)
  assert clean["mae"] < 50
  assert clean["correlation"] > 0.5


def test_immune_run_is_evaluated_in_errors(capsys, immune):
  code, _, err = run(capsys, "evaluate", f"--workdir={immune}", "--limit=30")
  assert code == 0, err
  results = json.loads((immune / "results.json").read_text())
  assert set(results["subsets"]) == {"serum", "vitals", "serum+vitals"}
  assert results["missing"]["rows"][0]["mae"] > 0
  assert results["corrupted"]["rows"]
  assert results["examples"]["num_examples"] == 30
  page = (immune / "report.html").read_text()
  for word in ("certif", "attacked by", "accurac"):
    assert word not in page.lower(), word
  code, out, err = run(capsys, "report", f"--workdir={immune}")
  assert code == 0, err
  assert out.startswith("error")


def test_facts_hold_the_task_and_the_scale_of_the_training_labels(immune):
  facts = runs.describe(immune)
  labels = data.open_source("diabetes", "train").limit(64).labels
  assert (facts["task"], facts["num_classes"]) == ("regression", 0)
  assert facts["target"]["mean"] == pytest.approx(labels.mean(), rel=1e-5)
  assert facts["target"]["deviation"] == pytest.approx(labels.std(), rel=1e-5)
  assert facts["finished"]["immune"]["metrics"].keys() == {
    "mae",
    "correlation",
    "mae_over_subsets",
    "loss",
  }
  assert runs.task({"num_classes": 10}) == "classification"  # of old


def test_validation_is_of_errors_alone_and_over_subsets(immune):
  model, params, state, config = robust_mm.load(immune)
  setup = setup_lib.prepare(config)
  validate = validation.make(config, setup, sharding.make_mesh(data=1))
  found = validate(params, state)
  batch = setup.validation.batch()
  errors = []
  for names in (("serum",), ("vitals",), ("serum", "vitals")):
    present = {m: f & (m in names) for m, f in batch["present"].items()}
    said = model.apply(params, state, batch["inputs"], present)[0].logits[:, 0]
    label, said = batch["label"], np.asarray(said)
    errors.append(metrics.mean_absolute_error(label, said))
  assert found["mae"] == pytest.approx(errors[-1], rel=1e-4)
  assert found["mae_over_subsets"] == pytest.approx(np.mean(errors), rel=1e-4)
  r = metrics.correlation(label, said)
  assert found["correlation"] == pytest.approx(r, abs=1e-4)
  scale = setup.facts["target"]["deviation"]
  assert found["loss"] == pytest.approx(found["mae"] / scale, rel=1e-4)


def refused(capsys, *arguments):
  code, out, err = run(capsys, *arguments)
  assert code == 2
  assert out == ""
  assert err.count("\n") == 1, err
  return err


@pytest.mark.parametrize("more", [(), ("--source=smoothing", "--sigma=0.1")])
def test_certify_refuses_a_run_that_predicts_a_number(capsys, immune, more):
  err = refused(capsys, "certify", f"--workdir={immune}", *more)
  assert "needs a run that predicts classes" in err


@pytest.mark.parametrize("flag", ["--attack=pgd", "--radius=0.1"])
def test_evaluate_refuses_attacks_on_a_number(capsys, immune, flag):
  err = refused(capsys, "evaluate", f"--workdir={immune}", flag)
  assert f"{flag.split('=')[0]} needs a run that predicts classes" in err


@pytest.mark.parametrize(
  "spec, override, words",
  [
    ("joint.py:diabetes", "selection.metric=accuracy", "are numbers"),
    ("joint.py:diabetes", "selection.metric=certified_accuracy", "are numbers"),
    ("joint.py:digits", "selection.metric=mae", "are classes"),
    ("joint.py:diabetes", "model.fusion=orthogonal", "'concat', 'masked'"),
    ("joint.py:diabetes", "recipe.name=crmt", "'joint', 'modal_immune'"),
    ("joint.py:diabetes", "evaluation.certificate=global", "'auto', 'none'"),
  ],
)
def test_configuration_of_the_other_task_is_refused_by_key(
  capsys, tmp_path, spec, override, words
):
  workdir = tmp_path / "run"
  err = refused(
    capsys,
    "train",
    f"--config=configs/{spec},smoke",
    f"--config.{override}",
    f"--workdir={workdir}",
  )
  assert f"config.{override.split('=')[0]} must not be" in err
  assert words in err
  assert not workdir.exists()


@pytest.mark.parametrize("variant", ["adversarial", "mixup", "spectral"])
def test_variants_about_classes_are_refused(capsys, tmp_path, variant):
  err = refused(
    capsys,
    "train",
    f"--config=configs/joint.py:diabetes,{variant},smoke",
    f"--workdir={tmp_path / 'run'}",
  )
  assert "predicts classes" in err


def folder_of(path, label_of):
  path.mkdir(exist_ok=True)
  rng = np.random.default_rng(0)
  for split, size in (("train", 64), ("validation", 32), ("test", 32)):
    x, y = rng.normal(size=(2, size, 3))
    np.savez(
      path / f"{split}.npz",
      **{"inputs/x": x, "inputs/y": y, "label": label_of(x[:, 0] + y[:, 1])},
    )
  return path


def test_your_own_numbers_are_trained_and_kept_apart_from_classes(
  capsys, tmp_path
):
  folder = folder_of(tmp_path / "data", np.tanh)
  start = (
    "train",
    "--config=configs/joint.py:arrays,smoke",
    f"--config.data.path={folder}",
    "--config.mesh.data=1",
    f"--workdir={tmp_path / 'run'}",
  )
  code, _, err = run(capsys, *start)
  assert code == 0, err
  assert "taken as numbers to predict" in err
  code, out, err = run(capsys, "evaluate", f"--workdir={tmp_path / 'run'}")
  assert code == 0, err
  assert "Acc7" in out  # labels in [-3, 3]
  # The same folder with other labels is another run.
  for label_of, key in (
    (lambda z: 10 * z, "target"),
    (lambda z: (z > 0).astype(int), "num_classes"),
  ):
    folder_of(folder, label_of)
    code, _, err = run(capsys, *start)
    assert code == 2
    assert f"holds a run on other data: {key} is" in err
  err = refused(capsys, "evaluate", f"--workdir={tmp_path / 'run'}")
  assert "labels for classification" in err


def test_numbers_and_classes_have_no_common_report(capsys, tmp_path, immune):
  other = tmp_path / "classes"
  other.mkdir()
  for name in ("config.json", "run.json", "metrics.jsonl"):
    (other / name).write_bytes((immune / name).read_bytes())
  (other / "results.json").write_text(json.dumps({"name": "other"}))
  run(capsys, "evaluate", f"--workdir={immune}", "--limit=8")
  err = refused(
    capsys,
    "report",
    f"--workdir={immune},{other}",
    f"--output={tmp_path / 'page.html'}",
  )
  assert "of one task" in err
