"""Labels that are numbers: diabetes, folders of arrays, fixed subsets."""

import json

import numpy as np
import pytest
import sklearn.datasets

from robust_mm import _validate
from robust_mm import data
from robust_mm.data import registry

SPLITS = {"train": 310, "validation": 44, "test": 88}


def test_diabetes_is_all_of_it_once_raw_and_in_two_modalities():
  raw = sklearn.datasets.load_diabetes(scaled=False)
  found = [data.open_source("diabetes", split) for split in SPLITS]
  assert [len(source) for source in found] == list(SPLITS.values())
  ids = np.concatenate([source.ids for source in found])
  np.testing.assert_array_equal(np.sort(ids), np.arange(442))
  for source in found:
    assert source.task == "regression"
    batch = source.batch()
    assert batch["label"].dtype == np.float32
    np.testing.assert_array_equal(batch["label"], raw.target[source.ids])
    joined = [batch["inputs"][name] for name in ("vitals", "serum")]
    np.testing.assert_array_equal(
      np.concatenate(joined, axis=1), raw.data[source.ids].astype(np.float32)
    )
  assert data.open_source("digits", "test").task == "classification"


def test_limit_of_numbers_is_nested_and_no_tail_of_them():
  source = data.open_source("diabetes", "train")
  few, more = source.limit(40), source.limit(80)
  np.testing.assert_array_equal(more.ids[:40], few.ids)
  # Sorted by label, the first forty would have a mean far below.
  error = source.labels.std() / 40**0.5
  assert abs(few.labels.mean() - source.labels.mean()) < 4 * error


def test_inspection_and_list_say_regression():
  found = json.loads(json.dumps(data.inspect("diabetes")))
  label = found["splits"]["test"]["label"]
  test = data.load("diabetes")["label"]
  assert label["mean"] == pytest.approx(test.mean(), rel=1e-5)
  text = data.format_inspection(found)
  assert "88 examples, label 47 .. 321" in text
  assert "regression; 310 train" in registry.format_list()


@pytest.fixture
def folder(tmp_path):
  rng = np.random.default_rng(0)
  for split, size in {"train": 40, "validation": 12, "test": 20}.items():
    np.savez(
      tmp_path / f"{split}.npz",
      **{
        "inputs/a": rng.normal(size=(size, 3)),
        "label": rng.normal(size=size),
      },
    )
  return tmp_path


def relabel(folder, split, label):
  contents = dict(np.load(folder / f"{split}.npz"))
  np.savez(folder / f"{split}.npz", **{**contents, "label": label})


def test_float_labels_of_a_folder_are_numbers_and_said_aloud(folder):
  raw = np.load(folder / "test.npz")["label"]
  source = data.open_source("arrays", "test", path=folder)
  assert (source.num_classes, source.task) == (0, "regression")
  np.testing.assert_array_equal(source.batch()["label"], raw.astype(np.float32))
  assert "'label' is float64, taken as numbers to predict" in source.notes[0]
  assert data.arrays.check_arrays(folder) == "regression"


def test_a_tenth_held_out_of_numbers_is_random_and_the_rest_stays(folder):
  (folder / "validation.npz").unlink()
  train, held = (
    data.open_source("arrays", split, path=folder)
    for split in ("train", "validation")
  )
  assert len(held) == 4
  both = np.concatenate([train.ids, held.ids])
  np.testing.assert_array_equal(np.sort(both), np.arange(40))
  assert any("a random tenth of train.npz" in note for note in held.notes)


HALF = np.where(np.arange(40) == 3, np.nan, 0.5)


@pytest.mark.parametrize(
  "split, label, words",
  [
    ("train", HALF, "'label' is NaN or infinite in row 3 (1 such rows)"),
    ("test", np.full(20, np.inf), "test.npz: 'label' is NaN or infinite"),
    ("train", np.full(40, 2.5), "holds one value only"),
    ("train", np.zeros((40, 2, 2)), "'label' must have shape [n], or [n, k]"),
    ("test", np.arange(20), "'label' is int64, but train.npz has float64"),
  ],
)
def test_bad_numbers_are_refused_in_one_sentence(folder, split, label, words):
  relabel(folder, split, label)
  with pytest.raises(_validate.UserError) as caught:
    data.arrays.check_arrays(folder)
  assert words in str(caught.value)
  assert f"{split}.npz" in str(caught.value)
  assert "\n" not in str(caught.value)


def test_classes_are_not_to_be_counted_where_labels_are_numbers(folder):
  with pytest.raises(_validate.UserError, match="num_classes must be left out"):
    data.open_source("arrays", "train", path=folder, num_classes=3)
