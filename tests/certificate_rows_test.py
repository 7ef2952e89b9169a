"""robust-mm certify: rows and shares are those of the library's certificate."""

import csv
import os
import re
import shutil
import signal
import sys

import command_line
import numpy as np
import pytest
from command_line import run

import robust_mm
from robust_mm import certificate_rows
from robust_mm import certification
from robust_mm import cli
from robust_mm import data
from robust_mm.training import sharding

SIZE = 90
RADII = (0.02, 0.1)
BUDGETS = ({"left": 0.05, "right": 0.01}, {"right": 0.08})
SHORT = (
  "--config.num_steps=60",
  "--config.data.max_train_examples=400",
  "--config.training.eval_every=60",
  "--config.training.checkpoint_every=60",
)


def train(folder, name, *options):
  config = f"--config=configs/crmt.py:{name}"
  command = ["train", config, f"--workdir={folder}", *SHORT, *options]
  assert cli.main(command) == 0
  return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return train(tmp_path_factory.mktemp("run"), "digits,smoke")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  # Transformers state no constant; perceptrons and convolutions do.
  return train(
    tmp_path_factory.mktemp("run"),
    "digits,published,smoke",
    "--config.model.encoders.default.name=transformer",
  )


def certify(capsys, workdir, output, *options):
  """``(printed lines, {column: values})`` of one command."""
  code, out, err = run(
    capsys,
    "certify",
    f"--workdir={workdir}",
    f"--output={output}",
    f"--limit={SIZE}",
    *options,
  )
  assert code == 0, err
  with output.open(newline="") as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == SIZE
  return out, {name: [row[name] for row in rows] for name in rows[0]}


def numbers(columns, name):
  return np.array([float(value) for value in columns[name]])


def flags(words):
  return [
    f"--budget={','.join(f'{m}={size}' for m, size in budget.items())}"
    for budget in words
  ]


def reference(workdir, **options):
  """The certificate and labels, straight from the library."""
  model, params, state, config = robust_mm.load(workdir)
  batch = data.load("digits", split="test", limit=SIZE)
  if "tables" in options:
    training = data.load(
      "digits", split="train", limit=config.data.max_train_examples
    )
    options["tables"] = options["tables"](model, params, training, state=state)
  found = robust_mm.certify(model, params, batch, state=state, **options)
  return found, np.asarray(batch["label"])


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_rows_and_shares_are_those_of_the_certificate(
  capsys, tmp_path, workdir, norm
):
  out, columns = certify(
    capsys,
    workdir,
    tmp_path / "rows.csv",
    f"--norm={norm}",
    "--radius=0.02,0.1",
    *flags(BUDGETS),
  )
  found, label = reference(workdir, norm=norm)
  reach = {
    "": found.joint_radius(norm),
    "_left": found.modality_radius["left"],
    "_right": found.modality_radius["right"],
  }
  for suffix, radius in reach.items():
    np.testing.assert_allclose(
      numbers(columns, f"radius{suffix}"), radius, rtol=1e-4, atol=1e-6
    )
  right = numbers(columns, "prediction") == label
  np.testing.assert_array_equal(numbers(columns, "correct"), right)
  for radius in RADII:
    (line,) = re.findall(rf"^  {radius:g} +(.*)$", out, re.MULTILINE)
    for text, (suffix, sizes) in zip(line.split(), reach.items(), strict=True):
      stable = numbers(columns, f"stable_at_{radius:g}{suffix}")
      np.testing.assert_array_equal(stable, np.asarray(sizes) > radius)
      assert float(text) == pytest.approx(
        np.mean(right & (stable > 0)), abs=6e-5
      )
  for budget in BUDGETS:
    name = "+".join(f"{m}={size}" for m, size in budget.items())
    covered = numbers(columns, f"covers_{name}")
    np.testing.assert_array_equal(covered, found.covers(budget))
    share = certification.certified_accuracy(found, label, budgets=budget)
    assert f"budget {name.replace('+', ',')}: {float(share):.4f}\n" in out
    assert 0 < float(share) < right.mean(), "the budget decides nothing"
  assert set(columns["norm"]) == {norm}
  assert f"certified accuracy, {SIZE} test examples, {norm} norm" in out


@pytest.mark.parametrize("budgets", [BUDGETS, ()], ids=["budgets", "alone"])
def test_missing_modalities_are_asked_of_every_budget_or_of_none(
  capsys, tmp_path, workdir, budgets
):
  out, columns = certify(
    capsys,
    workdir,
    tmp_path / "rows.csv",
    "--max-missing=1",
    *flags(budgets),
  )
  found, label = reference(workdir)
  for budget in budgets or ({},):
    words = [f"{m}={size}" for m, size in budget.items()]
    covered = numbers(columns, f"covers_{'+'.join([*words, 'max_missing=1'])}")
    np.testing.assert_array_equal(covered, found.covers(budget, 1))
    assert np.mean(covered) < np.mean(found.covers(budget))
    share = certification.certified_accuracy(
      found, label, budgets=budget, max_missing=1
    )
    assert f"any 1 missing: {float(share):.4f}\n" in out
  assert len([c for c in columns if c.startswith("covers")]) == max(
    len(budgets), 1
  )


def test_units_and_norm_stand_in_the_file(capsys, tmp_path, workdir):
  _, raw = certify(capsys, workdir, tmp_path / "raw.csv")
  _, relative = certify(
    capsys, workdir, tmp_path / "relative.csv", "--units=relative"
  )
  for name in ("left", "right"):
    assert set(raw[f"unit_{name}"]) == {"1"}
    unit = numbers(relative, f"unit_{name}")
    assert np.all(unit == unit[0])
    np.testing.assert_allclose(
      numbers(relative, f"radius_{name}") * unit,
      numbers(raw, f"radius_{name}"),
      rtol=1e-4,
    )


def test_published_formula_is_estimated_in_every_word(
  capsys, tmp_path, published
):
  out, columns = certify(
    capsys,
    published,
    tmp_path / "rows.csv",
    "--fidelity=published",
    "--budget=left=0.05",
    "--max-missing=1",
  )
  found, _ = reference(
    published,
    fidelity="published",
    tables=lambda *arguments, **options: certification.empirical_tables(
      *arguments, form="split", **options
    ),
  )
  assert found.rival == "runner_up"
  assert not found.sound
  np.testing.assert_allclose(
    numbers(columns, "estimated_radius"), found.radius, rtol=1e-3, atol=1e-6
  )
  np.testing.assert_array_equal(
    numbers(columns, "nearest_class"), found.runner_up
  )
  assert "estimated (not certified) accuracy" in out
  assert not re.search("certified", out.replace("not certified", ""))
  words = ("radius", "stable", "covers")
  claims = [c for c in columns if any(word in c for word in words)]
  assert "estimated_covers_left=0.05+max_missing=1" in claims
  assert all(c.startswith("estimated_") for c in claims)


@pytest.mark.parametrize(
  "options, sentence",
  [
    (("--budget=lft=0.1",), "'lft'.*left, right.*Did you mean 'left'"),
    (("--budget=left=0.1", "--budget=up=0.1"), "'up'"),
    (("--budget=left=-0.1",), "at least 0.*left=-0.1"),
    (("--budget=left=nan",), "at least 0.*left=nan"),
    (("--budget=left",), "--budget.*got left"),
    (("--budget=left=1,left=2",), "--budget: names left twice: left=1,left=2"),
    (("--max-missing=3",), "--max-missing must be at most 2"),
    (("--max-missing=-1",), "--max-missing.*-1"),
    (("--norm=l3",), "--norm.*l3"),
    (("--fidelity=publishd",), "--fidelity.*publishd"),
    (("--fidelity=published", "--source=global"), "--source=global"),
    (("--output=nowhere/rows.csv",), "--output: nowhere"),
    (("--output=.",), "--output: . is a folder"),
    (
      ("--output=/proc/rows.csv",),
      r"--output: no file can be written to /proc \([^/]*\)\.$",
    ),
  ],
)
def test_mistake_is_answered_without_jax_and_leaves_nothing(
  capsys, tmp_path, monkeypatch, workdir, options, sentence
):
  monkeypatch.chdir(tmp_path)
  # Whatever needs jax begins with this import.
  monkeypatch.delattr(robust_mm, "commands", raising=False)
  monkeypatch.setitem(sys.modules, "robust_mm.commands", None)
  code, _, err = run(capsys, "certify", f"--workdir={workdir}", *options)
  assert code == 2
  assert err.count("\n") == 1, err
  assert re.search(sentence, err), err
  assert list(tmp_path.iterdir()) == []


def test_refusal_of_the_library_is_a_sentence_and_leaves_the_old_rows(
  capsys, tmp_path
):
  config = command_line.without_constants(tmp_path)
  folder = tmp_path / "run"
  assert cli.main(["train", config, f"--workdir={folder}", *SHORT]) == 0
  target = tmp_path / "rows.csv"
  target.write_text("old")
  before = sorted(tmp_path.rglob("*"))
  capsys.readouterr()
  code, out, err = run(
    capsys, "certify", f"--workdir={folder}", f"--output={target}"
  )
  assert (code, out) == (2, "")
  assert err.count("\n") == 1
  assert "states no Lipschitz bound" in err
  assert target.read_text() == "old"
  assert sorted(tmp_path.rglob("*")) == before


def test_run_without_its_checkpoint_is_named_and_left_alone(
  capsys, tmp_path, workdir
):
  folder = tmp_path / "run"
  shutil.copytree(workdir, folder)
  for empty in (True, False):
    if empty:
      for phase in (folder / "checkpoints").iterdir():
        shutil.rmtree(phase)
        phase.mkdir()
    else:
      shutil.rmtree(folder / "checkpoints")
    before = sorted(folder.rglob("*"))
    code, _, err = run(capsys, "certify", f"--workdir={folder}")
    assert (code, err.count("\n")) == (2, 1), err
    assert f"{folder} holds no model of phase" in err
    assert sorted(folder.rglob("*")) == before


def test_share_that_survives_a_replaced_modality(tmp_path, capsys):
  config = "--config=configs/crmt.py:digits,smoke"
  radius = "--config.model.encoders.default.embedding_radius=0.05"
  train_options = ["train", config, f"--workdir={tmp_path / 'run'}", radius]
  assert cli.main([*train_options, *SHORT]) == 0
  out, columns = certify(capsys, tmp_path / "run", tmp_path / "rows.csv")
  right = numbers(columns, "correct") == 1
  for name in ("left", "right"):
    replaced = np.isinf(numbers(columns, f"radius_{name}"))
    assert f"{name} replaced: {np.mean(right & replaced):.4f}" in out


def write(capsys, folder, target, **options):
  """``(printed, columns)`` of the function behind the command."""
  certificate_rows.write(folder, output=str(target), limit=SIZE, **options)
  with target.open(newline="") as file:
    rows = list(csv.reader(file))
  return capsys.readouterr().out, rows[0]


@pytest.mark.parametrize("source", [None, "global", "empirical"])
def test_published_rows_are_never_called_certified(
  capsys, tmp_path, workdir, source
):
  """Global tables are sound; the published formula on them is not."""
  out, names = write(
    capsys,
    workdir,
    tmp_path / "rows.csv",
    radii=(0.1,),
    fidelity="published",
    source=source,
  )
  assert out.startswith("estimated (not certified) accuracy")
  claims = [name for name in names if "radius" in name or "stable" in name]
  assert claims
  assert all(name.startswith("estimated_") for name in claims)


def test_corrected_rows_are_certified_by_default(capsys, tmp_path, workdir):
  out, names = write(capsys, workdir, tmp_path / "rows.csv", radii=(0.1,))
  assert out.startswith("certified accuracy")
  assert {"radius", "stable_at_0.1"} <= set(names)


def test_every_size_has_a_column_of_its_own_and_only_one(
  capsys, tmp_path, workdir
):
  near = 0.1 + 1e-9
  _, names = write(
    capsys,
    workdir,
    tmp_path / "rows.csv",
    radii=(0.1, near, 0.1, 1.0),
    budgets=(
      {"left": 0.1, "right": 0.2},
      {"right": 0.2, "left": 0.1},
      {"left": near, "right": 0.2},
    ),
  )
  assert len(names) == len(set(names))
  for kind, count in (("stable_at_0.1_left", 1), ("covers_", 2)):
    assert sum(name.startswith(kind) for name in names) == count
  joint = {n for n in names if re.fullmatch("stable_at_[0-9.]+", n)}
  assert joint == {f"stable_at_{size}" for size in ("0.1", "0.100000001", "1")}


def test_replaced_is_asked_of_examples_that_have_the_modality():
  """3 of the 4 have it, 2 of these are right and bear anything."""
  found = {
    "radius": np.ones(4),
    "modality_radius": {"a": np.array([np.inf, np.inf, 1.0, np.inf])},
    "valid": np.ones(4, bool),
    "covers": [],
  }
  question = certificate_rows.Question(
    radii=(),
    budgets=(),
    max_missing=0,
    norm="l2",
    units=None,
    fidelity="corrected",
    source="global",
  )
  here = {"a": np.array([True, True, True, False])}
  lines = certificate_rows._lines(found, question, np.ones(4, bool), here)
  assert lines[-1] == "  a replaced: 0.6667"


def test_job_that_was_stopped_goes_on_where_it_was(
  capsys, tmp_path, workdir, monkeypatch
):
  # Batches of 32, the last of them partly filled.
  job = ("--source=relaxation", "--radius=0.02", *flags(BUDGETS))
  out, whole = certify(capsys, workdir, tmp_path / "whole.csv", *job)
  each_batch = sharding.each_batch

  def stopping(*arguments):
    yield from list(each_batch(*arguments))[:2]
    raise RuntimeError("stopped")

  target = tmp_path / "rows.csv"
  monkeypatch.setattr(sharding, "each_batch", stopping)
  with pytest.raises(RuntimeError, match="stopped"):
    certify(capsys, workdir, target, *job)
  assert not target.exists()
  assert (tmp_path / "rows.partial.npz").exists()

  # Rows of another question are not taken for its own.
  monkeypatch.setattr(sharding, "each_batch", each_batch)
  for option in ("--radius=0.1", "--source=local", "--norm=linf", "--limit=80"):
    again = (*job, option, "--resume")
    common = (f"--workdir={workdir}", f"--output={target}", f"--limit={SIZE}")
    code, _, err = run(capsys, "certify", *common, *again)
    assert code == 2
    assert re.search("--resume: .* of another job: .* there and .* here", err)

  # Columns of different length would put answers beside the wrong example.
  partial = tmp_path / "rows.partial.npz"
  with np.load(partial) as kept:
    arrays = dict(kept)
  good = partial.read_bytes()
  np.savez(partial, **{**arrays, "radius": arrays["radius"][:40]})
  code, _, err = run(capsys, "certify", *common, *job, "--resume")
  assert code == 2
  assert "rows.partial.npz is damaged" in err
  partial.write_bytes(good)

  seen = []

  def counting(fn, batches, axis):
    for piece in each_batch(fn, batches, axis):
      seen.append(len(piece["prediction"]))
      yield piece

  monkeypatch.setattr(sharding, "each_batch", counting)
  printed, columns = certify(capsys, workdir, target, *job, "--resume")
  assert columns == whole
  assert printed.replace("rows.csv", "whole.csv") == out
  assert seen == [SIZE - 64]
  assert not (tmp_path / "rows.partial.npz").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_keeps_what_is_done_and_says_how_to_go_on(
  capsys, tmp_path, workdir, monkeypatch, number
):
  each_batch = sharding.each_batch

  def stopping(*arguments):
    yield next(each_batch(*arguments))
    os.kill(os.getpid(), number)

  monkeypatch.setattr(sharding, "each_batch", stopping)
  before = signal.getsignal(signal.SIGTERM)
  common = (f"--workdir={workdir}", f"--output={tmp_path / 'rows.csv'}")
  # A shell's background jobs, this one too, are started without it.
  inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    code, _, err = run(capsys, "certify", *common, "--source=relaxation")
  finally:
    signal.signal(signal.SIGINT, inherited)
  assert code == 130
  assert "interrupted; with --resume the same command goes on" in err
  assert [path.name for path in tmp_path.iterdir()] == ["rows.partial.npz"]
  assert signal.getsignal(signal.SIGTERM) == before
