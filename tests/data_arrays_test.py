"""Folders of npz files: what is accepted, and the sentence for what is not."""

import numpy as np
import pytest

from robust_mm import _validate
from robust_mm import data

SIZES = {"train": 40, "validation": 12, "test": 20}


def _contents(split, size):
  rng = np.random.default_rng(len(split))
  return {
    "inputs/sensor": rng.normal(size=(size, 5, 2)),
    "inputs/words": rng.integers(0, 9, (size, 4)),
    "label": np.arange(size) % 4,
  }


@pytest.fixture
def folder(tmp_path):
  for split, size in SIZES.items():
    np.savez(tmp_path / f"{split}.npz", **_contents(split, size))
  return tmp_path


def _change(folder, split, key, value):
  file = folder / f"{split}.npz"
  contents = dict(np.load(file))
  if value is None:
    del contents[key]
  else:
    contents[key] = value(contents.get(key)) if callable(value) else value
  np.savez(file, **contents)


@pytest.mark.parametrize("split", SIZES)
def test_folder_round_trip(folder, split):
  source = data.open_source("arrays", split, path=folder)
  raw = _contents(split, SIZES[split])
  batch = source.batch()
  assert source.num_classes == 4
  assert source.modalities == ("sensor", "words")
  np.testing.assert_array_equal(
    batch["inputs"]["sensor"], raw["inputs/sensor"].astype(np.float32)
  )
  np.testing.assert_array_equal(batch["inputs"]["words"], raw["inputs/words"])
  np.testing.assert_array_equal(batch["label"], raw["label"])
  dtypes = {m: v.dtype for m, v in batch["inputs"].items()}
  assert dtypes == {"sensor": np.float32, "words": np.int32}
  assert batch["label"].dtype == batch["id"].dtype == np.int32
  assert source.notes == ()


def test_missing_validation_is_a_stratified_tenth_said_aloud(folder):
  (folder / "validation.npz").unlink()
  train = data.open_source("arrays", "train", path=folder)
  validation = data.open_source("arrays", "validation", path=folder)
  np.testing.assert_array_equal(np.bincount(validation.labels), [1, 1, 1, 1])
  together = np.concatenate([train.ids, validation.ids])
  np.testing.assert_array_equal(np.sort(together), np.arange(40))
  raw = _contents("train", 40)["inputs/sensor"].astype(np.float32)
  np.testing.assert_array_equal(
    validation.batch()["inputs"]["sensor"], raw[validation.ids]
  )
  assert "4 of 40 examples" in train.notes[0]


def test_absent_entries_may_be_nan_and_become_zero(folder):
  flags = np.arange(40) % 3 > 0

  def poison(values):
    values[~flags] = np.nan
    return values

  _change(folder, "train", "inputs/sensor", poison)
  _change(folder, "train", "present/sensor", flags)
  batch = data.load("arrays", split="train", path=folder)
  np.testing.assert_array_equal(batch["present"]["sensor"], flags)
  assert (batch["inputs"]["sensor"][~flags] == 0).all()
  assert np.isfinite(batch["inputs"]["sensor"]).all()
  found = data.inspect("arrays", path=folder)
  assert found["modalities"]["sensor"]["missing"]["train"] == pytest.approx(
    14 / 40
  )
  assert "missing: train 35.0%" in data.format_inspection(found)


PIXELS = {"uint8": 255, "uint16": 65535}


def _pixels(folder, dtype):
  """Replaces "sensor" by pixels, never the brightest but in training."""
  for split, size in SIZES.items():
    rng = np.random.default_rng(size)
    values = rng.integers(0, 200, (size, 5, 2)).astype(dtype)
    if split == "train":
      values[0, 0, 0] = PIXELS[dtype]
    _change(folder, split, "inputs/sensor", values)


@pytest.mark.parametrize("split", SIZES)
@pytest.mark.parametrize("dtype", PIXELS)
def test_unsigned_integers_are_pixels_in_units_of_their_dtype(
  folder, dtype, split
):
  _pixels(folder, dtype)
  source = data.open_source("arrays", split, path=folder)
  raw = np.load(folder / f"{split}.npz")["inputs/sensor"]
  expected = (raw / PIXELS[dtype]).astype(np.float32)
  for batch in (source.batch(), data.load("arrays", split=split, path=folder)):
    assert batch["inputs"]["sensor"].dtype == np.float32
    np.testing.assert_array_equal(batch["inputs"]["sensor"], expected)
    assert batch["inputs"]["words"].dtype == np.int32
  assert (expected.max() == 1.0) == (split == "train")
  assert source.value_range == {"sensor": (0.0, 1.0), "words": None}
  assert source.spec["sensor"].dtype == np.float32
  (note,) = source.notes
  assert f"'inputs/sensor' is {dtype}" in note
  assert f"divided by {PIXELS[dtype]}" in note


def test_grey_levels_are_scaled_as_a_user_would(folder):
  levels = np.arange(256, dtype=np.uint8)
  raw = np.concatenate([levels, levels[:144]]).reshape(40, 5, 2)
  _pixels(folder, "uint8")
  _change(folder, "train", "inputs/sensor", raw)
  found = data.load("arrays", split="train", path=folder)["inputs"]["sensor"]
  np.testing.assert_array_equal(found, raw.astype(np.float32) / 255)


def test_held_out_pixels_are_scaled_and_absent_ones_black(folder):
  _pixels(folder, "uint8")
  (folder / "validation.npz").unlink()
  flags = np.arange(40) % 3 > 0
  _change(folder, "train", "present/sensor", flags)
  raw = np.load(folder / "train.npz")["inputs/sensor"]
  for split in ("train", "validation"):
    source = data.open_source("arrays", split, path=folder)
    expected = raw[source.ids] / np.float32(255)
    expected[~flags[source.ids]] = 0
    np.testing.assert_array_equal(source.batch()["inputs"]["sensor"], expected)


def test_pixels_of_another_depth_in_a_split_are_refused(folder):
  _pixels(folder, "uint8")
  _change(folder, "test", "inputs/sensor", np.zeros((20, 5, 2), np.uint16))
  with pytest.raises(
    _validate.UserError,
    match=r"test\.npz: 'inputs/sensor' is uint16, but train.npz has uint8",
  ):
    data.open_source("arrays", "train", path=folder)


def test_inspection_says_what_pixels_and_tokens_are(folder):
  _pixels(folder, "uint8")
  found = data.inspect("arrays", path=folder)
  assert found["modalities"]["sensor"]["max"] == 1.0
  assert found["modalities"]["sensor"]["value_range"] == [0.0, 1.0]
  taken = [note for note in found["notes"] if "taken as pixels" in note]
  assert len(taken) == 1
  text = data.format_inspection(found)
  assert "pixels, stored as uint8, / 255" in text
  assert "int32 tokens" in text


def test_booleans_are_signals_of_zero_and_one(folder):
  for split, size in SIZES.items():
    _change(folder, split, "inputs/words", np.eye(size, 4, dtype=bool))
  batch = data.load("arrays", split="train", path=folder)
  np.testing.assert_array_equal(
    batch["inputs"]["words"], np.eye(40, 4, dtype=np.float32)
  )


def test_test_file_is_needed_for_its_split_only(folder):
  (folder / "test.npz").unlink()
  source = data.open_source("arrays", "train", path=folder)
  assert len(source) == 40
  assert "test.npz is missing: training does without it" in source.notes[0]
  with pytest.raises(_validate.UserError, match=r"test\.npz is missing"):
    data.open_source("arrays", "test", path=folder)
  assert list(data.inspect("arrays", path=folder)["splits"]) == [
    "train",
    "validation",
  ]


def test_given_number_of_classes_is_kept_and_checked(folder):
  source = data.open_source("arrays", "train", path=folder, num_classes=7)
  assert source.num_classes == 7
  with pytest.raises(_validate.UserError, match="below num_classes 3"):
    data.open_source("arrays", "train", path=folder, num_classes=3)


def test_unknown_key_is_ignored_and_said_aloud(folder):
  _change(folder, "train", "presents/sensor", np.ones(40, bool))
  notes = data.open_source("arrays", "train", path=folder).notes
  assert "'presents/sensor' is ignored" in notes[0]
  assert "Did you mean 'present/sensor'?" in notes[0]


def _nan(values):
  values[7, 0, 0] = np.nan
  return values


def _inf(values):
  values[3, 1, 1] = 1e39  # beyond float32
  return values


BAD = {
  "key missing": ("train", "label", None, "train.npz has no key 'label'"),
  "no inputs": (
    "test",
    "inputs/sensor",
    None,
    "test.npz has no 'inputs/sensor', which train.npz has",
  ),
  "modality too many": (
    "test",
    "inputs/extra",
    np.zeros((20, 1)),
    "test.npz has 'inputs/extra', which train.npz lacks",
  ),
  "lengths": (
    "train",
    "inputs/sensor",
    np.zeros((39, 5, 2)),
    "train.npz: 'inputs/sensor' has shape (39, 5, 2), but 'label' has 40",
  ),
  "shapes between splits": (
    "test",
    "inputs/sensor",
    np.zeros((20, 5, 3)),
    "test.npz: 'inputs/sensor' has examples of shape (5, 3), but train.npz",
  ),
  "kinds between splits": (
    "test",
    "inputs/words",
    np.zeros((20, 4)),
    "test.npz: 'inputs/words' is float64, but train.npz has int64",
  ),
  "nan": ("train", "inputs/sensor", _nan, "NaN or infinite in row 7"),
  "overflow": ("train", "inputs/sensor", _inf, "NaN or infinite in row 3"),
  "labels of two kinds": (
    "test",
    "label",
    np.zeros(20),
    "'label' is float64, but train.npz has int64; save all as integers",
  ),
  "labels of text": (
    "train",
    "label",
    np.full(40, "a"),
    "must be integers (classes) or floats (numbers to predict), got <U1",
  ),
  "negative label": (
    "train",
    "label",
    np.full(40, -1),
    "must not be negative, got -1 in row 0",
  ),
  "one class": ("train", "label", np.zeros(40, int), "one class only"),
  "label matrix": (
    "train",
    "label",
    np.zeros((40, 2), int),
    "'label' has shape [n], but train.npz has [n, 2]",
  ),
  "complex": (
    "train",
    "inputs/sensor",
    np.zeros((40, 5, 2), complex),
    "must hold floats (signals), uint8 or uint16 (pixels) or signed integers "
    "(tokens), got complex128",
  ),
  "unsigned tokens": (
    "train",
    "inputs/words",
    np.zeros((40, 4), np.uint32),
    "got uint32",
  ),
  "pixels beside tokens": (
    "validation",
    "inputs/words",
    np.zeros((12, 4), np.uint8),
    "validation.npz: 'inputs/words' is uint8, but train.npz has int64",
  ),
  "pixels beside signals": (
    "test",
    "inputs/sensor",
    np.zeros((20, 5, 2), np.uint8),
    "test.npz: 'inputs/sensor' is uint8, but train.npz has float64",
  ),
  "objects": (
    "train",
    "inputs/sensor",
    np.array([None] * 40),
    "'inputs/sensor' is an array of Python objects",
  ),
  "large integers": (
    "train",
    "inputs/words",
    np.full((40, 4), 2**40),
    "does not fit into int32",
  ),
  "presence without modality": (
    "train",
    "present/sensr",
    np.ones(40, bool),
    "Did you mean 'sensor'?",
  ),
  "presence not boolean": (
    "train",
    "present/sensor",
    np.ones(40),
    "'present/sensor' must be booleans of shape [n]",
  ),
  "presence not 0 or 1": (
    "train",
    "present/sensor",
    np.full(40, 2),
    "must hold True and False",
  ),
  "no examples": ("test", "label", np.zeros(0, int), "holds no examples"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_contents_are_refused_by_file_and_key(folder, case):
  split, key, value, words = BAD[case]
  _change(folder, split, key, value)
  # Structure is refused already when training opens its own split.
  with pytest.raises(_validate.UserError) as caught:
    data.open_source("arrays", "train", path=folder)
  assert words in str(caught.value)
  assert f"{split}.npz" in str(caught.value)
  assert "\n" not in str(caught.value)


def test_test_label_beyond_training_classes_is_refused(folder):
  _change(folder, "test", "label", np.arange(20) % 5)
  with pytest.raises(_validate.UserError, match="got 4 in row 4"):
    data.open_source("arrays", "test", path=folder)


@pytest.mark.parametrize("split", SIZES)
def test_check_reads_the_values_of_every_file(folder, split):
  data.arrays.check_arrays(folder)
  _change(folder, split, "inputs/sensor", _nan)
  with pytest.raises(_validate.UserError, match=rf"{split}\.npz.*in row 7"):
    data.arrays.check_arrays(folder)
  data.arrays.check_arrays(folder, modalities=("words",))


def test_check_refuses_labels_nobody_trains(folder):
  _change(folder, "test", "label", np.arange(20) % 5)
  with pytest.raises(_validate.UserError, match=r"test\.npz.*got 4 in row 4"):
    data.arrays.check_arrays(folder)


@pytest.mark.parametrize("split", SIZES)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "text"])
def test_damaged_file_is_refused_by_name(folder, damage, split):
  file = folder / f"{split}.npz"
  contents = bytearray(file.read_bytes())
  if damage == "truncated":
    contents = contents[: len(contents) // 2]
  elif damage == "flipped":
    contents[1000] ^= 0xFF  # inside the values: caught by the archive's CRC
  else:
    contents = b"not an archive"
  file.write_bytes(bytes(contents))
  words = rf"{split}\.npz cannot be read"
  with pytest.raises(_validate.UserError, match=words):
    data.open_source("arrays", split, path=folder)
  with pytest.raises(_validate.UserError, match=words):
    data.arrays.check_arrays(folder)


@pytest.mark.parametrize(
  "path, words",
  [
    (None, "arrays needs a path"),
    ("missing", "is not a folder"),
    ("", "arrays needs a path"),
  ],
)
def test_missing_folder_is_refused(tmp_path, path, words):
  path = path and tmp_path / path
  with pytest.raises(_validate.UserError, match=words):
    data.open_source("arrays", "train", path=path)


def test_empty_folder_and_wrong_modality_are_refused(folder, tmp_path):
  empty = tmp_path / "empty"
  empty.mkdir()
  with pytest.raises(_validate.UserError, match=r"train\.npz is missing"):
    data.open_source("arrays", "train", path=empty)
  with pytest.raises(_validate.UserError, match="Did you mean 'sensor'"):
    data.open_source("arrays", "train", path=folder, modalities=("senso",))
