"""Sources: digits against the reference nets, gathers, subsets, inspection."""

import json

import numpy as np
import pytest

from robust_mm import data
from robust_mm.data import sources
from robust_mm.data import transforms

SPLITS = ("train", "validation", "test")


def _toy(present=None):
  rng = np.random.default_rng(0)
  return sources.Source(
    name="toy",
    split="train",
    columns={
      "b": sources.Column(
        array=rng.integers(0, 256, (4, 3), dtype=np.uint8),
        index=np.array([0, 1, 2, 3, 0, 1], np.int32),
        divisor=255.0,
      ),
      "a": sources.Column(array=rng.normal(size=(6, 2)).astype(np.float32)),
    },
    present={"a": present, "b": None},
    labels=np.array([0, 0, 0, 0, 1, 1], np.int32),
    ids=np.arange(10, 16, dtype=np.int32),
    num_classes=2,
    value_range={"a": None, "b": (0.0, 1.0)},
  )


def test_digits_splits_are_disjoint_and_complete():
  ids = [data.open_source("digits", split).ids for split in SPLITS]
  assert [len(i) for i in ids] == [1293, 144, 360]
  np.testing.assert_array_equal(np.sort(np.concatenate(ids)), np.arange(1797))


def test_digits_test_split_is_that_of_the_reference_nets(shared_path):
  reference = np.load(shared_path / "reference/attacks/digits_mlp.npz")
  batch = data.load("digits")
  left = batch["inputs"]["left"]
  whole = np.concatenate([left, batch["inputs"]["right"]], axis=2)
  np.testing.assert_array_equal(whole.reshape(360, 64), reference["inputs"])
  np.testing.assert_array_equal(batch["label"], reference["labels"])


def test_digits_values_are_sixteenths_in_the_unit_interval():
  batch = data.load("digits", split="train")
  for half in ("left", "right"):
    values = batch["inputs"][half]
    assert values.shape == (1293, 8, 4, 1)
    assert values.dtype == np.float32
    assert values.min() == 0.0
    assert values.max() == 1.0
    np.testing.assert_array_equal(values * 16, np.round(values * 16))


def test_take_gathers_shared_rows_and_divides():
  source = _toy()
  batch = source.take([5, 1, 0])
  raw = source.columns["b"].array
  np.testing.assert_array_equal(
    batch["inputs"]["b"], raw[[1, 1, 0]] / np.float32(255)
  )
  assert batch["inputs"]["b"].dtype == np.float32
  np.testing.assert_array_equal(batch["id"], [15, 11, 10])
  assert source.spec == {"a": ((2,), np.float32), "b": ((3,), np.float32)}
  batch["inputs"]["a"][:] = 7.0
  assert not (source.batch()["inputs"]["a"] == 7.0).any()


def test_absent_inputs_are_zeros():
  present = np.array([True, False, True, True, False, True])
  batch = _toy(present).take([0, 1, 4])
  np.testing.assert_array_equal(batch["present"]["a"], [True, False, False])
  assert (batch["inputs"]["a"][1:] == 0).all()
  assert (batch["inputs"]["a"][0] != 0).all()


def test_subset_of_subset_is_the_subset_of_both():
  source = _toy()
  twice = source.subset([5, 3, 1]).subset([2, 0])
  once = source.take([1, 5])
  np.testing.assert_array_equal(
    twice.batch()["inputs"]["b"], once["inputs"]["b"]
  )
  np.testing.assert_array_equal(twice.ids, once["id"])


@pytest.mark.parametrize("size", [10, 30, 101])
def test_limit_is_balanced_nested_and_repeatable(size):
  source = data.open_source("digits", "train")
  limited = source.limit(size)
  counts = np.bincount(limited.labels, minlength=10)
  assert counts.sum() == size
  assert counts.max() - counts.min() <= 1
  longer = source.limit(size + 7).ids
  np.testing.assert_array_equal(longer[:size], limited.ids)
  assert source.limit(10**6) is source


def test_select_is_sorted_and_keeps_the_rest():
  source = data.open_source("digits", "test", modalities="right,left")
  assert source.modalities == ("left", "right")
  right = source.select(["right"])
  assert right.modalities == ("right",)
  assert set(right.take([0])["present"]) == {"right"}


def test_source_transforms_apply_to_every_batch():
  missing = transforms.missing_at_random(1.0, 0, modalities=("left",))
  source = data.open_source("digits", "test").with_transforms((missing,))
  batch = source.take([3, 4])
  assert not batch["present"]["left"].any()
  assert not batch["inputs"]["left"].any()
  assert batch["present"]["right"].all()


def test_inspection_measures_and_is_json():
  found = json.loads(json.dumps(data.inspect("digits")))
  train = data.load("digits", split="train")
  left = found["modalities"]["left"]
  np.testing.assert_allclose(left["mean"], train["inputs"]["left"].mean(), 1e-5)
  np.testing.assert_allclose(left["std"], train["inputs"]["left"].std(), 1e-4)
  assert [found["splits"][s]["size"] for s in SPLITS] == [1293, 144, 360]
  text = data.format_inspection(found)
  assert "8x4x1" in text
  assert "1293 examples" in text


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_missing_rate_is_as_stated_and_nothing_is_empty(rate):
  ids = np.arange(20000, dtype=np.int32)
  batch = {
    "inputs": {m: np.ones((20000, 1), np.float32) for m in "abc"},
    "present": {m: np.ones(20000, bool) for m in "abc"},
    "label": ids,
    "id": ids,
  }
  after = transforms.missing_at_random(rate, 5)(batch)
  flags = np.stack([after["present"][m] for m in "abc"])
  assert flags.any(axis=0).all()
  expected = rate - rate**3 / 3
  np.testing.assert_allclose(1 - flags.mean(axis=1), expected, atol=0.015)
  # Falling absent is independent between modalities, apart from the rescue.
  both = (~flags[0] & ~flags[1]).mean()
  np.testing.assert_allclose(both, rate**2 - rate**3 * 2 / 3, atol=0.015)
  for i, m in enumerate("abc"):
    np.testing.assert_array_equal(after["inputs"][m][:, 0], flags[i])
  assert batch["present"]["a"].all()


def test_missing_mask_depends_on_seed_and_id_alone():
  source = data.open_source("digits", "test")
  transform = transforms.missing_at_random(0.4, 1)
  whole = transform(source.batch())["present"]["left"]
  rows = np.array([200, 3, 77])
  np.testing.assert_array_equal(
    transform(source.take(rows))["present"]["left"], whole[rows]
  )
  other = transforms.missing_at_random(0.4, 2)(source.batch())
  assert (other["present"]["left"] != whole).any()


def test_missing_keeps_what_was_absent_and_removes_nan():
  batch = {
    "inputs": {"a": np.full((4, 2), np.nan, np.float32)},
    "present": {"a": np.zeros(4, bool)},
    "label": np.zeros(4, np.int32),
    "id": np.arange(4, dtype=np.int32),
  }
  after = transforms.missing_at_random(0.5, 0)(batch)
  assert not after["present"]["a"].any()
  assert (after["inputs"]["a"] == 0).all()


def test_missing_refuses_a_bad_rate_and_an_unknown_modality():
  with pytest.raises(ValueError, match="rate must lie in"):
    transforms.missing_at_random(1.5, 0)
  transform = transforms.missing_at_random(0.5, 0, modalities=("lift",))
  with pytest.raises(ValueError, match="Did you mean 'left'"):
    transform(data.load("digits", limit=2))
