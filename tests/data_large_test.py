"""Extractions of large sets: what is read is what was written, or refused."""

import importlib.util
import os
import shutil
import subprocess
import sys

import jax
import large_sets
import numpy as np
import pytest
from command_line import run

from robust_mm import _validate
from robust_mm import config as config_lib
from robust_mm import data
from robust_mm.data import beam as beam_lib
from robust_mm.data import mapped
from robust_mm.data import prepared
from robust_mm.data import registry
from robust_mm.data.builders import imagenet_captions
from robust_mm.data.builders import kinetics
from robust_mm.data.builders import listing
from robust_mm.training import recipe as recipe_lib
from robust_mm.training import setup as setup_lib

NAMES = tuple(large_sets.SHAPES)


@pytest.fixture(scope="module", params=NAMES)
def built(request, tmp_path_factory):
  """``(name, what was written, data directory)``."""
  folder = tmp_path_factory.mktemp(request.param)
  made = large_sets.make(request.param, folder / "source")
  data.prepare(request.param, folder / "source", folder / "out")
  return request.param, made, folder / "out"


def check(name, made, data_dir):
  start = 0
  for split, examples in made.items():
    source = data.open_source(name, split, path=data_dir)
    ids = np.arange(start, start + len(examples))
    np.testing.assert_array_equal(source.ids, ids)
    start += len(examples)
    batch = source.batch()
    for m, shape in large_sets.SHAPES[name].items():
      stored = np.stack([content[m] for _, _, content in examples])
      pixels = stored.dtype == np.uint8
      expected = stored / np.float32(255) if pixels else stored
      np.testing.assert_array_equal(batch["inputs"][m], expected)
      assert batch["inputs"][m].dtype == ("int32" if m == "caption" else "f4")
      assert source.spec[m].shape == shape
      assert source.value_range[m] == ((0.0, 1.0) if pixels else None)
    if name == "audioset":
      expected = [[float(k in c) for k in range(4)] for _, c, _ in examples]
    else:
      expected = [c[0] for _, c, _ in examples]
    np.testing.assert_array_equal(batch["label"], expected)


def test_examples_are_those_of_the_extraction(built):
  name, made, data_dir = built
  check(name, made, data_dir)
  source = data.open_source(name, "train", path=data_dir)
  assert source.task == registry.get(name).task
  assert source.num_classes == 4
  for column in source.columns.values():
    assert isinstance(column.array, np.memmap)
  info = prepared.describe(registry.get(name), data_dir)
  assert info.class_names == large_sets.NAMES
  assert info.splits == large_sets.SIZES


def test_batches_are_no_views_of_the_disk(built):
  name, _, data_dir = built
  source = data.open_source(name, "test", path=data_dir)
  before = source.batch()
  for values in source.batch()["inputs"].values():
    values[...] = 0
  after = source.batch()
  for m, values in before["inputs"].items():
    np.testing.assert_array_equal(after["inputs"][m], values)


def test_columns_that_are_not_whole_are_made_again(built, tmp_path):
  name, made, data_dir = built
  shutil.copytree(data_dir, tmp_path / "copy")
  m = next(iter(large_sets.SHAPES[name]))
  columns = tmp_path / "copy" / name / "1.0.0" / mapped.FOLDER
  file = columns / f"test.inputs.{m}.rows.npy"
  file.write_bytes(file.read_bytes()[:-3])
  (columns / "train.label.rows.npy").unlink()
  check(name, made, tmp_path / "copy")


def test_damaged_records_and_layouts_are_refused_by_folder(built, tmp_path):
  name, _, data_dir = built
  shutil.copytree(data_dir, tmp_path / "copy")
  folder = tmp_path / "copy" / name / "1.0.0"
  shutil.rmtree(folder / mapped.FOLDER)
  record = next(folder.glob("*-test.array_record*"))
  record.write_bytes(record.read_bytes()[:100])
  with pytest.raises(_validate.UserError, match=r"is damaged .*--overwrite"):
    data.open_source(name, "train", path=tmp_path / "copy")
  (folder / registry.LAYOUT).write_text("{}")
  with pytest.raises(_validate.UserError, match=r"metadata\.json is damaged"):
    data.open_source(name, "train", path=tmp_path / "copy")


def test_inspection_and_list_have_what_the_records_say(built):
  name, made, data_dir = built
  text = registry.format_list(data_dir)
  kind = " (multi-label)" if name == "audioset" else ""
  assert f"  4 classes{kind}; 12 train, 5 validation, 7 test" in text
  assert f"{name} (prepared)" in text
  assert "your classes" in registry.format_list(data_dir / "nowhere")
  found = data.inspect(name, path=data_dir)
  assert found["class_names"] == list(large_sets.NAMES)
  counts = np.zeros(4, int)
  for _, classes, _ in made["train"]:
    counts[list(classes) if name == "audioset" else classes[:1]] += 1
  assert found["splits"]["train"]["class_counts"] == counts.tolist()
  assert ("labels_per_example" in found["splits"]["train"]) == bool(kind)
  data.format_inspection(found)


@pytest.mark.parametrize("file", ["joint", "modal_immune"])
def test_configurations_make_models_and_recipes(built, file):
  name, _, data_dir = built
  config = config_lib.load(
    f"configs/{file}.py:{name},smoke",
    [f"--config.data.path={data_dir}", "--config.data.batch_size=8"],
  )
  setup = setup_lib.prepare(config)
  assert recipe_lib.make(config, setup).phases
  batch = setup.train.limit(8).batch()
  # Traced alone: a transformer takes long to compile.
  params, state = jax.eval_shape(setup.model.init, jax.random.key(0))
  outputs, _ = jax.eval_shape(
    setup.model.apply, params, state, batch["inputs"], batch["present"]
  )
  assert outputs.logits.shape == (8, 4)


def test_tfds_reads_the_set_alone_without_tensorflow(built):
  name, _, data_dir = built
  code = f"""
import sys
import tensorflow_datasets as tfds
builder = tfds.builder({name!r}, data_dir={str(data_dir)!r},
                       file_format="array_record")
print(len(builder.as_data_source(split="test")), "tensorflow" in sys.modules)
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "7 False"


def test_names_of_files_are_the_published_ones():
  entry = {"youtube_id": "-3B32lodo2M", "time_start": "59", "time_end": "69"}
  assert kinetics.clip(entry) == "-3B32lodo2M_000059_000069"
  with pytest.raises(ValueError, match=r"whole seconds, got 5\.5 and 69"):
    kinetics.clip({**entry, "time_start": "5.5"})
  form = imagenet_captions.ImagenetCaptions.FORM
  assert form.stem({"filename": "n01440764_10026.JPEG"}) == "n01440764_10026"


def edit(folder, file, old, new, count=1):
  text = (folder / file).read_text()
  assert old in text
  (folder / file).write_text(text.replace(old, new, count))


def rewrite(folder, made, split, number, **changes):
  stem, _, content = made[split][number]
  content = {k: v for k, v in {**content, **changes}.items() if v is not None}
  np.savez(folder / split / f"{stem}.npz", **content)
  return f"{split}/{stem}.npz"


def truncate(folder, made, split, number):
  file = folder / split / f"{made[split][number][0]}.npz"
  file.write_bytes(file.read_bytes()[:200])
  return f"{split}/{file.name}"


VIDEO = np.zeros((2, 5, 5, 3), np.uint8)
PICKLE = np.array([{"a": 1}], dtype=object)
# {what: (what is done, what the sentence has beside the file)}
BAD = {
  "unknown class": (
    lambda f, m: edit(f, "test.csv", "/m/09x0r", "/m/09x0x") or "test.csv",
    "line 4: there is no class '/m/09x0x' in classes.csv. Did you mean",
  ),
  "twice in a list": (
    lambda f, m: (
      edit(f, "train.csv", "-train_0003", "-train_0001") or "train.csv"
    ),
    "line 7: '-train_0001' is already in train.csv, line 5.",
  ),
  "in two lists": (
    lambda f, m: edit(f, "test.csv", "-test_0000", "-train_0001") or "test.csv",
    "line 4: '-train_0001' is already in train.csv, line 5.",
  ),
  "no class": (
    lambda f, m: (
      (f / "test.csv").write_text("YTID,positive_labels\nabc,\n") and "test.csv"
    ),
    "line 2: 'abc' has no class.",
  ),
  "leaves the folder": (
    lambda f, m: edit(f, "test.csv", "-test_0000", "../x") or "test.csv",
    "line 4: '../x' is no file name.",
  ),
  "cells": (
    lambda f, m: edit(f, "test.csv", " 40.000,", "") or "test.csv",
    "line 4: 3 cells where the header has 4.",
  ),
  "no column": (
    lambda f, m: edit(f, "test.csv", "YTID", "VIDEO") or "test.csv",
    "the header has no column 'YTID'",
  ),
  "empty list": (
    lambda f, m: (
      (f / "test.csv").write_text("YTID,positive_labels\n") and "test.csv"
    ),
    "lists no examples",
  ),
  "no list": (lambda f, m: (f / "test.csv").unlink() or "test.csv", "missing"),
  "bytes": (
    lambda f, m: (f / "test.csv").write_bytes(b"\xff\xfe") and "test.csv",
    "cannot be read",
  ),
  "index": (
    lambda f, m: edit(f, "classes.csv", "2,", "3,") or "classes.csv",
    "line 4: index must be 2, got '3'.",
  ),
  "class twice": (
    lambda f, m: (
      edit(f, "classes.csv", "/m/04rlf", "/m/09x0r") or "classes.csv"
    ),
    "line 4: mid '/m/09x0r' is there twice.",
  ),
  "one class": (
    lambda f, m: (
      (f / "classes.csv").write_text("index,mid,display_name\n0,a,b\n")
      and "classes.csv"
    ),
    "at least two classes",
  ),
  "missing file": (
    lambda f, m: (
      (f / "test" / "-test_0002.npz").unlink() or "test/-test_0002.npz"
    ),
    "is missing; test.csv names it.",
  ),
  "missing folder": (lambda f, m: shutil.rmtree(f / "test") or "test", ""),
  "truncated": (lambda f, m: truncate(f, m, "test", 3), "cannot be read"),
  "truncated first": (
    lambda f, m: truncate(f, m, "train", 0),
    "cannot be read",
  ),
  "missing key": (
    lambda f, m: rewrite(f, m, "test", 3, video=None),
    "has no key 'video'",
  ),
  "shape": (
    lambda f, m: rewrite(f, m, "test", 3, video=VIDEO[:1]),
    "'video' must have shape [2, 5, 5, 3], got [1, 5, 5, 3]",
  ),
  "rank": (
    lambda f, m: rewrite(f, m, "train", 0, video=VIDEO[0]),
    "'video' must have shape [n, n, n, n], got [5, 5, 3]",
  ),
  "dtype": (
    lambda f, m: rewrite(f, m, "test", 3, video=VIDEO.astype(np.float32)),
    "'video' is float32, where the first training example is uint8",
  ),
  "kind": (
    lambda f, m: rewrite(f, m, "train", 0, video=VIDEO.astype(np.int64)),
    "'video' must hold floats, uint8 or uint16, got int64",
  ),
  "nan": (
    lambda f, m: rewrite(f, m, "train", 5, audio=np.full((6, 4), np.nan)),
    "'audio' has values that are NaN or infinite",
  ),
  "pickle": (
    lambda f, m: rewrite(f, m, "test", 3, audio=PICKLE),
    "allow_pickle=False",
  ),
  "pickle first": (
    lambda f, m: rewrite(f, m, "train", 0, audio=PICKLE),
    "allow_pickle=False",
  ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_extraction_is_refused_in_one_sentence(case, tmp_path):
  damage, words = BAD[case]
  folder = tmp_path / "source"
  made = large_sets.make("audioset", folder)
  place = damage(folder, made)
  with pytest.raises(_validate.UserError) as caught:
    data.prepare("audioset", folder, tmp_path / "out")
  assert str(folder / place) in str(caught.value)
  assert words in str(caught.value)
  assert "\n" not in str(caught.value)
  out = tmp_path / "out"
  assert not out.exists() or os.listdir(out) == []


def test_tokens_that_training_lacks_are_refused(tmp_path):
  made = large_sets.make("imagenet_captions", tmp_path / "source")
  tokens = np.array([12, 1, 2, 3, 0], np.int64)
  rewrite(tmp_path / "source", made, "test", 1, caption=tokens)
  with pytest.raises(_validate.UserError, match="'caption' has the token 12"):
    data.prepare("imagenet_captions", tmp_path / "source", tmp_path / "out")
  assert os.listdir(tmp_path / "out") == []
  rewrite(tmp_path / "source", made, "test", 1, caption=-tokens)
  with pytest.raises(_validate.UserError, match="token ids from 0 on"):
    data.prepare("imagenet_captions", tmp_path / "source", tmp_path / "out")


def test_quoted_names_and_other_columns_are_read(tmp_path):
  (tmp_path / "classes.csv").write_text('name,index,note\n"a, b",0,x\nc,1,y\n')
  found = listing.read_classes(tmp_path, kinetics.Kinetics.FORM)
  assert found == {"a, b": "a, b", "c": "c"}


def test_command_line_prepares_and_refuses(capsys, tmp_path):
  large_sets.make("kinetics", tmp_path / "source")
  where = (f"--source={tmp_path / 'source'}", f"--path={tmp_path / 'out'}")
  code, out, err = run(capsys, "data", "prepare", "kinetics", *where)
  assert code == 0, err
  assert out.startswith("prepared kinetics in")
  edit(tmp_path / "source", "test.csv", "Gush", "Rush")
  code, out, err = run(
    capsys, "data", "prepare", "kinetics", *where, "--overwrite"
  )
  assert (code, out) == (2, "")
  assert err.count("\n") == 1
  assert "no class 'Rush'" in err
  assert len(data.open_source("kinetics", "test", path=tmp_path / "out")) == 7


def test_beam_is_refused_where_it_is_not_of_use(capsys, tmp_path, monkeypatch):
  code, _, err = run(
    capsys, "data", "prepare", "mfeat", f"--source={tmp_path}", "--beam"
  )
  assert code == 2
  assert "'mfeat' has a file for all of it and needs no Beam" in err
  monkeypatch.setattr(beam_lib.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(_validate.UserError, match=r"'robust_mm\[beam\]'"):
    data.prepare("audioset", tmp_path, tmp_path / "out", beam=[])
  assert not (tmp_path / "out").exists()


def test_what_a_worker_refuses_is_one_sentence():
  said = "RuntimeError: Traceback ...\nrobust_mm._validate.UserError: a.npz is"
  with (
    pytest.raises(_validate.UserError) as caught,
    beam_lib.refusals(["--runner=Other"]),
  ):
    raise RuntimeError(f"{said} bad. [while running 'load']\n more")
  assert str(caught.value) == "a.npz is bad."
  with pytest.raises(RuntimeError, match=r"^other$"), beam_lib.refusals([]):
    raise RuntimeError("other")


WITH_BEAM = """
import sys
from robust_mm import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(
  importlib.util.find_spec("apache_beam") is None,
  reason="apache_beam, an extra, is not installed",
)
def test_beam_makes_the_same_set_and_refuses_alike(tmp_path):
  made = large_sets.make("audioset", tmp_path / "source")

  def prepare(*more):
    # In a process of its own: Beam warns, and starts threads, as it likes.
    return subprocess.run(
      [
        *(sys.executable, "-c", WITH_BEAM, "data", "prepare", "audioset"),
        f"--source={tmp_path / 'source'}",
        f"--path={tmp_path / 'out'}",
        "--beam=--direct_num_workers=2",
        *more,
      ],
      capture_output=True,
      text=True,
    )

  done = prepare()
  assert done.returncode == 0, done.stderr
  check("audioset", made, tmp_path / "out")
  place = rewrite(tmp_path / "source", made, "test", 3, video=None)
  done = prepare("--overwrite")
  assert done.returncode == 2
  assert f"{place} has no key 'video'." in done.stderr.splitlines()[-1]
  check("audioset", made, tmp_path / "out")  # what was there stays
