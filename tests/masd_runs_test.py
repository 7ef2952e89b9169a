"""MASD from configuration to kept model: phases, both kinds of rows, teachers.

Numbers that runs log are computed once more, in float64, from the parameters in
their checkpoints and the batches of their streams.
"""

import jax
import jax.numpy as jnp
import large_sets
import numpy as np
import pytest
from killed_runs import Killed
from killed_runs import load
from killed_runs import train
from run_checkpoints import assert_same
from run_checkpoints import kept
from run_checkpoints import named
from run_checkpoints import stored

import robust_mm
from robust_mm import cli
from robust_mm import data
from robust_mm import modalities
from robust_mm.training import runs
from robust_mm.training import setup as setup_lib
from robust_mm.training import sharding
from robust_mm.training import streams
from robust_mm.training import writers

EVERY = (
  "training.checkpoint_every=1",
  "training.keep_checkpoints=99",
  "training.log_every=1",
)
LEFT = ("data.labelled=left", *EVERY)
DIGITS = "configs/masd.py:digits,smoke"
FROZEN = "configs/masd.py:digits,frozen,supersets,smoke"
SIZE = 16  # labelled rows of a batch in smoke form; as many have no label


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("plain")
  words = [f"--config.{o}" for o in ("mesh.data=1", *LEFT)]
  command = ["train", f"--config={DIGITS}", f"--workdir={workdir}", *words]
  assert cli.main(command) == 0
  return workdir


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("averaged")
  train(load("configs/masd.py:digits,ema,published,smoke", *LEFT), workdir)
  return workdir


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
  """Killed amid its last phase, from 8 to 12, and gone on."""
  workdir = tmp_path_factory.mktemp("frozen")
  with pytest.raises(Killed):
    train(load(FROZEN, *LEFT), workdir, kill_at=10)
  assert 8 < train(load(FROZEN, *LEFT), workdir).start < 11
  return workdir


@pytest.fixture(scope="module")
def number(tmp_path_factory):
  """Of a model that predicts a number."""
  workdir = tmp_path_factory.mktemp("number")
  config = load(DIGITS, "data.name=diabetes", "data.labelled=serum", *EVERY)
  with config.unlocked():
    config.model.encoders = {"default": config.model.encoders.default}
  train(config, workdir)
  return workdir


@pytest.fixture(scope="module")
def several(tmp_path_factory):
  """Of a model of several labels at once, without a probe."""
  folder = tmp_path_factory.mktemp("audioset")
  sizes = {"train": 64, "validation": 32, "test": 32}
  large_sets.make("audioset", folder / "source", sizes)
  data.prepare("audioset", folder / "source", folder / "data")
  spec = "configs/masd.py:audioset,finetune,smoke"
  path = f"data.path={folder / 'data'}"
  train(load(spec, path, "data.labelled=audio", *EVERY), folder / "run")
  return folder / "run"


def logged(workdir, phase):
  """Rows of the updates of a phase."""
  found = [row for row in writers.read(workdir) if row["phase"] == phase]
  return [row for row in found if "loss" in row]


def batch_of(config, step):
  setup = setup_lib.prepare(config)
  stream = streams.training_batches(
    config, setup, sharding.make_mesh(data=1), start=step
  )
  return next(iter(stream))


def log_softmax(x):
  return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


def divergences(task, teacher, student, target):
  if task == "regression":
    return np.square((teacher - student) / target.deviation)[:, 0] / 2
  if task == "classification":
    p, q = log_softmax(teacher), log_softmax(student)
    return np.sum(np.exp(p) * (p - q), axis=-1)
  pairs = [
    (-np.log1p(np.exp(-s * teacher)), -np.log1p(np.exp(-s * student)))
    for s in (1, -1)
  ]
  return np.mean(sum(np.exp(p) * (p - q) for p, q in pairs), axis=-1)


def of_labels(task, logits, label, target):
  if task == "regression":
    return np.abs(logits[:, 0] - label) / target.deviation
  if task == "classification":
    return -log_softmax(logits)[np.arange(len(label)), label]
  terms = np.log1p(np.exp(-np.where(label, 1, -1) * logits))
  return np.mean(terms, axis=-1)


def by_hand(workdir, step):
  """(task loss, distillation loss) of the update after ``step`` updates."""
  model, _, _, config = robust_mm.load(workdir)
  state, batch = stored(workdir, step), batch_of(config, step)
  flag, inputs, present = (batch[n] for n in ("labelled", "inputs", "present"))
  labelled = tuple(config.data.labelled)

  @jax.jit
  def said(params, seen):
    return model.apply(params, {}, inputs, seen)[0].logits

  def logits(params, keep):
    seen = {m: present[m] & keep[m] for m in present}
    return np.asarray(said(params, seen), np.float64)

  only = {m: np.full(len(flag), m in labelled) for m in present}
  every = {m: np.ones(len(flag), bool) for m in present}
  label = batch["label"][flag]
  taught = logits(state["params"], only)[flag]
  task_loss = np.mean(of_labels(model.task, taught, label, model.target))
  key = jax.random.split(jax.random.key(config.seed))[1]
  key = jax.random.split(jax.random.fold_in(key, step), 1)[0]
  subset = modalities.sample_subsets(
    jax.random.split(key)[0], jax.tree.map(jnp.asarray, present), labelled
  )
  assert len({tuple(map(bool, row)) for row in zip(*subset.values())}) > 1
  params = state["extra"].get("teacher", state["params"])
  teacher = logits(params, only)
  if config.recipe.options.get("teacher_subset") == "supersets":
    teacher = (teacher + logits(params, every)) / 2  # of two modalities
  student = logits(state["params"], subset)
  apart = divergences(model.task, teacher[~flag], student[~flag], model.target)
  return task_loss, np.mean(apart)


@pytest.mark.parametrize(
  "name, phases",
  [
    ("plain", ("probe", "masd")),
    ("averaged", ("probe", "masd")),
    ("frozen", ("probe", "teacher", "masd")),
    ("number", ("probe", "masd")),
    ("several", ("masd",)),
  ],
)
def test_both_terms_are_what_the_formulas_say(name, phases, request):
  workdir = request.getfixturevalue(name)
  facts = runs.describe(workdir)
  assert [phase["name"] for phase in facts["phases"]] == [*phases]
  assert set(facts["finished"]) == {*phases}
  rows = logged(workdir, "masd")
  assert len(rows) == 4
  # The third, where a teacher that stays, or lags, is not the student.
  task_loss, apart = by_hand(workdir, rows[2]["step"] - 1)
  np.testing.assert_allclose(rows[2]["task_loss"], task_loss, rtol=1e-3)
  np.testing.assert_allclose(rows[2]["distillation_loss"], apart, rtol=1e-3)
  assert apart > 1e-3
  for row in rows:
    weight = row["distillation_weight"]
    expected = row["task_loss"] + weight * row["distillation_loss"]
    np.testing.assert_allclose(row["loss"], expected, rtol=1e-5)
  assert all(row["distilled"] == SIZE for row in rows)


def test_only_the_published_form_distils_from_the_start(plain, averaged):
  found = [
    [row["distillation_weight"] for row in logged(run, "masd")]
    for run in (plain, averaged)
  ]
  assert found == [[0, 1, 1, 1], [1, 1, 1, 1]]


def test_rows_without_labels_have_all_and_the_others_what_is_labelled(plain):
  config = robust_mm.load(plain)[3]
  train_set = data.open_source("digits", "train").limit(64).batch()
  for step in (4, 7):
    batch = batch_of(config, step)
    flag = batch["labelled"]
    np.testing.assert_array_equal(flag, np.arange(2 * SIZE) % 2 == 0)
    np.testing.assert_array_equal(batch["present"]["right"], ~flag)
    assert batch["present"]["left"].all()
    assert not np.any(batch["inputs"]["right"][flag])
    where = {int(i): row for row, i in enumerate(train_set["id"])}
    rows = [where[int(i)] for i in batch["id"]]
    right = train_set["inputs"]["right"][rows]
    np.testing.assert_array_equal(batch["inputs"]["right"][~flag], right[~flag])
    label = np.where(flag, train_set["label"][rows], 0)
    np.testing.assert_array_equal(batch["label"], label)


def changed(monkeypatch, change):
  """All training batches from now on, changed."""
  real = streams.training_batches

  def batches(*given, **keywords):
    return real(*given, **keywords).map(change)

  monkeypatch.setattr(streams, "training_batches", batches)


def test_no_label_of_rows_without_one_reaches_a_parameter(
  plain, tmp_path, monkeypatch
):
  def relabelled(batch):
    label = np.where(batch["labelled"], batch["label"], 7)
    return {**batch, "label": label.astype(batch["label"].dtype)}

  changed(monkeypatch, relabelled)
  train(load(DIGITS, *LEFT), tmp_path)
  assert_same(kept(tmp_path), kept(plain))
  assert logged(tmp_path, "masd") == logged(plain, "masd")


def test_inputs_of_rows_without_labels_do_reach_them(
  plain, tmp_path, monkeypatch
):
  """What has no labels learns from them alone, beyond weight decay."""

  def dark(batch):
    flag = batch["labelled"].reshape(-1, *[1] * 3)
    inputs = {m: np.where(flag, x, 0) for m, x in batch["inputs"].items()}
    return {**batch, "inputs": inputs}

  changed(monkeypatch, dark)
  train(load(DIGITS, *LEFT), tmp_path)
  assert logged(tmp_path, "probe") == logged(plain, "probe")
  mine, other = logged(tmp_path, "masd"), logged(plain, "masd")
  # The first update is of the labels alone.
  assert [row["task_loss"] for row in mine[:2]] == [
    row["task_loss"] for row in other[:2]
  ]
  assert mine[0]["distillation_loss"] != other[0]["distillation_loss"]
  assert mine[3]["task_loss"] != other[3]["task_loss"]
  before, after = named(stored(plain, 4)["params"]), kept(plain)
  for name, value in before.items():
    assert not np.allclose(after[name], value, rtol=1e-4, atol=0), name


def test_the_probe_comes_first_and_moves_the_head_alone(plain):
  model, _, _, config = robust_mm.load(plain)
  key, _ = jax.random.split(jax.random.key(config.seed))
  start = named(jax.jit(model.init)(key)[0])
  first, probe = named(stored(plain, 1)["params"]), kept(plain, "probe")
  for name, value in start.items():
    head = name.startswith("fusion/last/")
    assert np.array_equal(first[name], probe[name]) != head, name
    assert (np.max(np.abs(value - probe[name])) < 1e-6) != head, name
  assert_same(named(stored(plain, 4)["params"]), probe)
  last = kept(plain)
  assert all(np.any(last[name] != probe[name]) for name in probe)


def test_a_frozen_teacher_is_the_end_of_its_own_phase(frozen):
  probe, teacher = kept(frozen, "probe"), kept(frozen, "teacher")
  # Its labels are of the left half: the right one is only decayed.
  for name, value in teacher.items():
    same = np.allclose(value, probe[name], rtol=1e-4, atol=0)
    assert same == name.startswith("encoders/right/"), name
  assert_same(named(stored(frozen, 8)["params"]), teacher)
  for step in (8, 9, 10, 11):
    state = stored(frozen, step)
    assert_same(named(state["extra"]["teacher"]), teacher)
  student = named(state["params"])
  assert all(np.any(student[name] != teacher[name]) for name in teacher)


def test_an_average_teaches_that_began_where_the_probe_ended(averaged):
  expected = kept(averaged, "probe")
  for count in range(1, 4):
    state = stored(averaged, 4 + count)
    decay = min(0.999, (1 + count) / (10 + count))
    params = named(state["params"])
    expected = {
      n: decay * x.astype(np.float64) + (1 - decay) * params[n]
      for n, x in expected.items()
    }
    for name, value in named(state["extra"]["teacher"]).items():
      np.testing.assert_allclose(value, expected[name], atol=1e-6)
  assert np.any(expected["fusion/last/kernel"] != params["fusion/last/kernel"])
