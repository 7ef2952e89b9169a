"""robust-mm shift and robust-mm interpolate, from the command line."""

import dataclasses
import html
import json
import shutil
import types

import jax
import jax.numpy as jnp
import killed_runs
import numpy as np
import pytest
from killed_runs import Killed

import robust_mm
from robust_mm import cli
from robust_mm import config as config_lib
from robust_mm import modalities
from robust_mm import shift_derived
from robust_mm import shift_methods
from robust_mm import shift_study
from robust_mm import training
from robust_mm.shift_study import job
from robust_mm.shift_study import plan
from robust_mm.training import runs
from robust_mm.training import setup as setup_lib

SPEC = "configs/shift.py:digits,smoke"
QUICK = "--config.study.methods=finetune,wise_ft,ensemble,class_mean"


def run(*words):
  return cli.main([*map(str, words)])


@pytest.fixture(name="study", scope="module")
def _study(tmp_path_factory):
  """A finished study, and what was printed of it."""
  folder = tmp_path_factory.mktemp("study")
  config = config_lib.load(SPEC, [QUICK])
  calls, stop = [], True

  def progress(done, total, text):
    nonlocal stop
    calls.append(text)
    if done == 2 and stop:
      stop = False
      raise Killed

  with pytest.raises(Killed):
    shift_study.run(config, folder, progress=progress)
  first = {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/*/*/*.npz")}
  assert first
  said = []
  report = shift_study.run(config, folder, progress=progress, say=said.append)
  for path, made in first.items():
    assert path.stat().st_mtime_ns == made  # not done again
  # A line for every model that was made, and none for those that were there.
  assert [line.split()[0] for line in said] == [
    f"{i + 1}/{len(set(calls))}" for i in range(2, len(set(calls)))
  ]
  return folder, report, config


def test_every_pair_is_measured_by_the_model_of_its_own_labels(study):
  folder, report, config = study
  assert report.matrix("finetune").shape == (3, 3)
  for row, train in enumerate(report.train_sets):
    place = folder / "runs" / "finetune" / modalities.subset_name(train) / "0"
    model, params, state, stored = robust_mm.load(place)
    assert tuple(stored.data.labelled) == train
    assert stored.init_from == str(folder.resolve() / "pretraining" / "0")
    data = setup_lib.open_split(stored, "test").batch()
    for column, test in enumerate(report.test_sets):
      left = modalities.restrict(data, test)
      logits = model.apply(
        params,
        state,
        modalities.mask(left["inputs"], left["present"]),
        jax.tree.map(jnp.asarray, left["present"]),
      )[0].logits
      right = np.argmax(logits, axis=-1) == data["label"]
      np.testing.assert_allclose(
        report.matrix("finetune")[row, column], right.mean(), atol=1e-6
      )
  assert config.study.seeds == 1


def test_the_model_between_two_phases_is_what_wise_ft_is(study):
  folder, _, _ = study
  place = folder / "runs" / "finetune" / "left" / "0"
  (between,) = (folder / "runs").glob("wise_ft-0.5/left/0/logits.npz")
  model, first, _, config = training.load(place, phase="probe")
  _, last, state, _ = training.load(place, phase="finetune")
  middle = jax.tree.map(lambda a, b: (a + b) / 2, first, last)
  data = setup_lib.open_split(config, "test").batch()
  logits = model.apply(middle, state, data["inputs"], data["present"])[0].logits
  found = np.load(between)["left+right"]
  np.testing.assert_allclose(found, logits, atol=1e-4)


def test_a_study_that_was_moved_goes_on_there(study, tmp_path):
  """With a model whose training had stopped on the way, too."""
  folder, report, config = study
  moved = tmp_path / "elsewhere"
  shutil.copytree(folder, moved)
  made = moved / "runs" / "finetune" / "left" / "0" / "logits.npz"
  before = dict(np.load(made))
  # Half of it, as it was where it began.
  shutil.rmtree(made.parent)
  begun = runs.read_config(folder / "runs" / "finetune" / "left" / "0")
  with pytest.raises(Killed):
    killed_runs.train(begun, made.parent, kill_at=6)
  assert not runs.has_ended(made.parent)
  found = shift_study.run(config, moved, progress=lambda *a: None)
  np.testing.assert_array_equal(
    found.matrix("finetune"), report.matrix("finetune")
  )
  for name, logits in np.load(made).items():
    np.testing.assert_array_equal(logits, before[name])
  stored = runs.read_config(made.parent)
  assert stored.init_from == str(moved.resolve() / "pretraining" / "0")


def test_a_run_of_another_start_is_no_moved_one(study, tmp_path):
  """Nor is one of other settings, and what is refused changes no file."""
  folder, _, _ = study
  place = folder / "runs" / "finetune" / "left" / "0"
  copy = tmp_path / "copy"
  copy.mkdir()
  shutil.copy(place / runs.CONFIG_FILE, copy)
  before = (copy / runs.CONFIG_FILE).read_bytes()
  config = runs.read_config(copy).unlock()
  moved = tmp_path / "pretraining" / "0"

  def relocate(start):
    config.init_from = str(start)
    runs.relocate_start(copy, config)
    return (copy / runs.CONFIG_FILE).read_bytes() == before

  assert relocate(moved)  # there is nothing
  shutil.copytree(folder / "pretraining" / "0", moved)
  shutil.copytree(moved, tmp_path / "other" / "1")
  assert relocate(tmp_path / "other" / "1")  # of another name
  lr, config.optimizer.lr = config.optimizer.lr, 0.5
  with pytest.raises(ValueError, match=r"config.optimizer.lr is"):
    relocate(moved)
  config.optimizer.lr = lr
  assert (copy / runs.CONFIG_FILE).read_bytes() == before
  stored = (moved / runs.CONFIG_FILE).read_text()
  (moved / runs.CONFIG_FILE).write_text(
    stored.replace('"seed": 0', '"seed": 1')
  )
  assert relocate(moved)  # another pretraining
  (moved / runs.CONFIG_FILE).write_text(stored)
  assert not relocate(moved)
  assert runs.read_config(copy).init_from == str(moved)


def test_what_was_written_is_what_was_found(study):
  folder, report, _ = study
  stored = json.loads((folder / "shift.json").read_text())
  assert set(report.methods) == set(stored["budget"]) | {
    "wise_ft",
    "class_mean",
  }
  page = (folder / "shift.html").read_text()
  assert page.count("<img") == len(report.methods)
  worst = report.estimate("ensemble", "missing", "worst")
  assert f"{worst.value:.3f} [{worst.low:.3f}" in page
  assert "times plain fine-tuning" in (folder / "shift.txt").read_text()
  for method in report.methods:
    assert (folder / "plots" / f"shift_{method}.png").is_file()


def test_the_page_says_what_it_shows(study):
  folder, report, config = study
  page = html.unescape((folder / "shift.html").read_text())
  for method in report.methods:
    assert shift_methods.METHODS[method].about in page
  assert "at alpha 0.5" in page
  assert "undefined: finetune is within two standard errors" in page
  for said in (
    "shift.json",
    config.study.pretraining,
    f"robust_mm {robust_mm.__version__}",
    jax.devices()[0].platform,
    "warmup_steps",
  ):
    assert said in page
  stored = json.loads((folder / "shift.json").read_text())
  assert stored["config"]["study"]["pretraining"] == config.study.pretraining
  assert stored["versions"]["jax"] == jax.__version__
  assert "oracle" not in stored["about"]
  text = (folder / "shift.txt").read_text()
  assert "nan" not in text
  assert "1 seed;" in text
  head = "4 updates of the head on all training examples"
  assert f"finetune: {head}, then 4 steps." in text


def test_the_matrix_of_the_console_is_that_of_the_figure(study):
  _, report, _ = study
  lines = report.table().splitlines()
  at = next(i for i, line in enumerate(lines) if "trained on \\" in line)
  for row, numbers in zip(lines[at + 1 :], report.matrix("finetune")):
    assert row.split()[1:] == [f"{value:.3f}" for value in numbers]


@pytest.mark.parametrize(
  "words, said",
  [
    (["train", "--config=configs/joint.py:digits,smoke"], "holds a study"),
    (["evaluate"], "shift.html"),
    (["interpolate"], "shift.html"),
    (["report"], "shift.html"),
  ],
)
def test_a_study_is_no_run(study, words, said, capsys):
  folder, _, _ = study
  before = sorted(folder.iterdir())
  assert run(*words, f"--workdir={folder}") == 2
  assert said in capsys.readouterr().err
  assert sorted(folder.iterdir()) == before
  config = config_lib.load("configs/joint.py:digits,smoke")
  with pytest.raises(ValueError, match="holds a study"):
    training.train(config, folder)
  assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
  "override, said",
  [
    ("methods=finetune,wise_ft", "leaves out ensemble, class_mean"),
    ("train_sets=left", "train_sets leaves out right, left.right"),
  ],
)
def test_a_page_of_fewer_is_refused(study, override, said):
  folder, _, _ = study
  before = (folder / "shift.json").read_bytes()
  config = config_lib.load(SPEC, [QUICK, f"--config.study.{override}"])
  with pytest.raises(ValueError, match=said):
    shift_study.run(config, folder)
  assert (folder / "shift.json").read_bytes() == before


def test_a_study_in_use_is_refused(study):
  folder, _, config = study
  with runs.lock(folder):
    assert run("shift", f"--config={SPEC}", QUICK, f"--workdir={folder}") == 2
    with pytest.raises(ValueError, match="in use by another process"):
      shift_study.run(config, folder)


def test_the_reference_is_trained_on_what_is_only_evaluated(tmp_path):
  config = config_lib.load(
    "configs/shift.py:digits,smoke,scratch",
    [
      "--config.study.methods=finetune",
      "--config.study.train_sets=left,right",
      "--config.study.test_sets=left,right,left+right",
    ],
  )
  study = shift_study.prepare(config, tmp_path)
  assert study.jobs() == [
    ("finetune", 0, train)
    for train in (("left",), ("right",), ("left", "right"))
  ]
  rng = np.random.default_rng(0)
  number, k = len(study.test["label"]), len(study.prior)
  logits = {
    key: rng.normal(size=(len(study.test_sets), number, k))
    for key in study.jobs()
  }
  report = job._report(study, logits)
  assert report.matrix("finetune").shape == (2, 3)
  own = logits["finetune", 0, ("left", "right")][2]
  right = np.mean(np.argmax(own, axis=1) == study.test["label"])
  np.testing.assert_allclose(report.matched["finetune"][2], right)
  assert "trained on left+right too" in shift_study.summary(study, report)
  assert "times plain" not in shift_study.summary(study, report)


def test_a_study_of_other_settings_is_refused(study):
  folder, _, _ = study
  changed = config_lib.load(SPEC, [QUICK, "--config.optimizer.lr=0.5"])
  with pytest.raises(ValueError, match=r"optimizer\.lr"):
    shift_study.run(changed, folder)


def test_a_path_is_evaluated_and_chosen_on_validation(study, capsys):
  folder, _, _ = study
  place = folder / "runs" / "finetune" / "left" / "0"
  assert run("interpolate", f"--workdir={place}", "--alpha=0:1:0.5") == 0
  said = capsys.readouterr().out
  assert "* is chosen on it" in said
  assert "examples with left, which was trained on" in said
  whole = (place / "interpolation.json").read_bytes()
  command = ["interpolate", f"--workdir={place}", "--alpha=0,1", "--limit=20"]
  assert run(*command) == 0
  assert "the others: 20 test examples" in capsys.readouterr().out
  limited = json.loads((place / "interpolation-limit20.json").read_text())
  assert limited["num_examples"] == {"validation": 20, "test": 20}
  assert (place / "interpolation.json").read_bytes() == whole
  found = json.loads((place / "interpolation.json").read_text())
  assert (found["start"], found["end"]) == ("probe", "finetune")
  assert found["trained_on"] == ["left"]
  points = found["points"]
  assert [point["alpha"] for point in points] == [0, 0.5, 1]
  best = max(point["matched"] for point in points)
  chosen = next(p for p in points if p["alpha"] == found["chosen"])
  assert chosen["matched"] == best
  # The end is the run's own model.
  data = np.load(place / "logits.npz")
  model, _, _, config = robust_mm.load(place)
  label = setup_lib.open_split(config, "test").batch()["label"]
  for name, score in points[-1]["scores"].items():
    right = np.argmax(data[name], axis=1) == label
    np.testing.assert_allclose(score, right.mean(), atol=1e-6)
  assert (place / "plots" / "interpolation.png").is_file()
  assert model.modalities == ("left", "right")


@pytest.mark.parametrize(
  "words, said",
  [
    (["--alpha=0:2:1"], "must be FROM:TO:STEP"),
    (["--start=finetun"], "Did you mean"),
    (["--start=probe", "--end=probe"], "two phases"),
  ],
)
def test_a_path_that_cannot_be_is_refused(study, words, said, capsys):
  folder, _, _ = study
  place = folder / "runs" / "finetune" / "right" / "0"
  try:
    code = run("interpolate", f"--workdir={place}", *words)
  except SystemExit as error:
    code = error.code
  assert code == 2
  assert said in capsys.readouterr().err
  assert not (place / "interpolation.json").exists()


@pytest.mark.parametrize(
  "override, said",
  [
    ("study.methods=finetune,mask", "config.study.methods"),
    ("study.methods=finetune,masd_wise_ft", "'masd' beside"),
    ("study.methods=masd", "'finetune'"),
    ("study.train_sets=left+top", "config.study.train_sets"),
    ("study.methods=finetune,finetune", "methods names 'finetune' twice"),
    ("study.train_sets=left,left", "train_sets names 'left' twice"),
    ("study.test_sets=left,left", "test_sets names 'left' twice"),
    ("study.test_sets=left,right", "test_sets must have 'left+right'"),
    ("study.num_samples=1", "config.study.num_samples"),
    ("study.pretraining=configs/pre.py", "config.study.pretraining: names"),
    (
      "study.pretraining=configs/joint.py:digits",
      "config.study.pretraining: configs/joint.py:digits has another model",
    ),
    ("recipe.options.method=probe", "must be 'lp_ft' for 'wise_ft'"),
    ("study.seeds=0", "config.study.seeds"),
    ("study.alpha=2.0", "config.study.alpha"),
    ("study.nothing=1", "study.nothing"),
    ("study.cluster=speaker", "config.study.cluster"),
    ("data.labelled=left", "config.data.labelled"),
    ("study.options.masd.wieght=3.0", "Did you mean 'weight'"),
    ("study.options.masd.weight=-1.0", "config.recipe.options): weight must"),
    ("study.options.mask.weight=3.0", "no method of the study"),
    ("study.options.wise_ft.weight=3.0", "trains nothing"),
    ("study.options.masd=3", "must be a group"),
    ("study.options.finetune.method=probe", "must be 'lp_ft' for 'wise_ft'"),
    ("recipe.options.l2_sp=0.1", "'masd' takes no such option"),
  ],
)
def test_bad_studies_are_refused(override, said, tmp_path, capsys):
  folder = tmp_path / "study"
  code = run(
    "shift", f"--config={SPEC}", f"--workdir={folder}", f"--config.{override}"
  )
  assert code == 2
  assert said in capsys.readouterr().err
  assert not folder.exists()


def test_an_ensemble_without_its_parts_is_refused(tmp_path):
  config = config_lib.load(
    SPEC,
    [
      "--config.study.train_sets=left+right,left",
      "--config.study.test_sets=left+right,left",
    ],
  )
  with pytest.raises(ValueError, match="must have 'right' alone"):
    shift_study.prepare(config, tmp_path)


def test_runs_and_studies_are_not_mistaken(tmp_path, capsys):
  workdir = f"--workdir={tmp_path / 'x'}"
  assert run("train", f"--config={SPEC}", workdir) == 2
  assert "robust-mm shift runs it" in capsys.readouterr().err
  assert run("shift", "--config=configs/joint.py:digits", workdir) == 2
  assert "group study" in capsys.readouterr().err


def test_an_ensemble_says_the_mean_or_the_prior():
  single = {
    ("a",): np.log(np.array([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]])),
    ("b",): np.array([[3.0, 1.0], [np.nan, np.nan], [0.0, 0.0]]),
  }
  prior = np.log(np.array([0.3, 0.7]))
  sets = [("a",), ("a", "b"), ("c",)]
  found = shift_derived.ensemble(single, sets, prior)
  np.testing.assert_allclose(found["a",], single["a",], atol=1e-9)
  np.testing.assert_allclose(np.exp(found["c",]), [[0.3, 0.7]] * 3)
  both = found["a", "b"]
  said = np.log(np.exp([3.0, 1.0]) / np.exp([3.0, 1.0]).sum())
  np.testing.assert_allclose(both[0], (np.log(0.5) + said) / 2)
  np.testing.assert_allclose(both[1], np.log([0.9, 0.1]))


def test_clusters_of_a_study_are_drawn_together(tmp_path):
  config = config_lib.load(SPEC, ["--config.study.methods=finetune"])
  study = shift_study.prepare(config, tmp_path)
  number, k = len(study.test["label"]), len(study.prior)
  rng = np.random.default_rng(0)
  logits = {
    ("finetune", 0, train): rng.normal(size=(len(study.test_sets), number, k))
    for train in study.train_sets
  }
  speaker = np.arange(number) // 8
  source = types.SimpleNamespace(name="x", metadata={"speaker": speaker})
  clusters = plan._clusters(source, "speaker")
  together = job._report(dataclasses.replace(study, clusters=clusters), logits)
  apart = job._report(study, logits)
  assert apart.num_clusters == number
  assert together.num_clusters == number // 8
  assert config_lib.load("configs/shift.py:utd_mhad").study.cluster == "subject"


def test_subjects_of_a_prepared_set_are_known(data_dir, monkeypatch):
  monkeypatch.setenv("ROBUST_MM_DATA_DIR", str(data_dir))
  config = config_lib.load("configs/shift.py:utd_mhad,smoke")
  study = shift_study.prepare(config, data_dir / "nothing")
  assert len(study.clusters) == len(study.test["label"])
  assert set(study.clusters) <= {2, 4, 6, 8}  # the official test subjects
