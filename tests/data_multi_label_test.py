"""Labels [n, k] of 0 and 1 in a folder of arrays, accepted or refused."""

import json

import numpy as np
import pytest

from robust_mm import _validate
from robust_mm import data

SIZES = {"train": 40, "validation": 12, "test": 20}


@pytest.fixture
def folder(tmp_path):
  rng = np.random.default_rng(0)
  for split, size in SIZES.items():
    np.savez(
      tmp_path / f"{split}.npz",
      **{
        "inputs/a": rng.normal(size=(size, 3)),
        "label": rng.integers(0, 2, (size, 4)),
      },
    )
  return tmp_path


def relabel(folder, split, label):
  contents = dict(np.load(folder / f"{split}.npz"))
  np.savez(folder / f"{split}.npz", **{**contents, "label": label})


@pytest.mark.parametrize("dtype", ["bool", "int64", "uint8", "float32"])
def test_rows_of_0_and_1_are_several_labels_of_any_dtype(folder, dtype):
  for split in SIZES:
    raw = np.load(folder / f"{split}.npz")["label"]
    relabel(folder, split, raw.astype(dtype))
  source = data.open_source("arrays", "test", path=folder)
  assert (source.task, source.num_classes) == ("multi_label", 4)
  batch = source.batch()
  assert batch["label"].dtype == np.float32
  np.testing.assert_array_equal(batch["label"], raw)
  assert "'label' is [n, 4], taken as several classes" in source.notes[0]
  assert data.arrays.check_arrays(folder) == "multi_label"


def test_parts_of_them_are_random_nested_and_joined(folder):
  train = data.open_source("arrays", "train", path=folder)
  few, more = train.limit(8), train.limit(16)
  np.testing.assert_array_equal(more.ids[:8], few.ids)
  test = data.open_source("arrays", "test", path=folder)
  joined = data.concatenate([train, test])
  assert joined.labels.shape == (60, 4)
  (folder / "validation.npz").unlink()
  held = data.open_source("arrays", "validation", path=folder)
  assert len(held) == 4
  assert any("a random tenth of train.npz" in note for note in held.notes)


def test_inspection_counts_the_examples_of_a_class(folder):
  found = json.loads(json.dumps(data.inspect("arrays", path=folder)))
  label = np.load(folder / "train.npz")["label"]
  entry = found["splits"]["train"]
  assert entry["class_counts"] == label.sum(axis=0).tolist()
  assert entry["labels_per_example"] == pytest.approx(label.sum(axis=1).mean())
  assert ", 2" in data.format_inspection(found).split("an example")[0]


TWO = np.where(np.arange(80).reshape(20, 4) == 13, 2, 1)


@pytest.mark.parametrize(
  "split, label, words",
  [
    ("test", TWO, "must hold 0 and 1, one for each class; row 3 (1 such"),
    ("test", np.full((20, 4), np.nan), "must hold 0 and 1, one for each class"),
    ("test", np.full((20, 4), "a"), "must hold 0 and 1, got <U1"),
    ("test", np.ones((20, 3)), "has shape [n, 3], but train.npz has [n, 4]"),
    ("test", np.ones(20, int), "has shape [n], but train.npz has [n, 4]"),
    ("train", np.zeros((40, 4)), "must have at least two columns and a 1"),
  ],
)
def test_bad_labels_are_refused_in_one_sentence(folder, split, label, words):
  relabel(folder, split, label)
  with pytest.raises(_validate.UserError) as caught:
    data.arrays.check_arrays(folder)
  assert words in str(caught.value)
  assert f"{split}.npz" in str(caught.value)
  assert "\n" not in str(caught.value)


def test_one_column_is_no_set_of_classes(folder):
  for split, size in SIZES.items():
    relabel(folder, split, np.ones((size, 1)))
  with pytest.raises(_validate.UserError, match="at least two columns"):
    data.arrays.check_arrays(folder)


def test_classes_are_the_columns(folder):
  with pytest.raises(_validate.UserError, match="has 4 columns, one a class"):
    data.open_source("arrays", "train", path=folder, num_classes=3)
