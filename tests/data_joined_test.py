"""Splits joined: every example once, as it is alone, under an id of its own."""

import dataclasses
import doctest

import jax
import numpy as np
import pytest

from robust_mm import data
from robust_mm.data import sources
from robust_mm.data import transforms

PARTS = ("train", "validation")


def both(name, **options):
  return [data.open_source(name, split, **options) for split in PARTS]


def assert_same_examples(joined, parts, ids=True):
  """The batch of the joined source is that of its parts, end to end."""
  expected = jax.tree.map(
    lambda *leaves: np.concatenate(leaves), *(part.batch() for part in parts)
  )
  found = joined.batch()
  if not ids:
    del found["id"], expected["id"]
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert len(joined) == sum(map(len, parts))
  assert len(np.unique(joined.ids)) == len(joined)


def test_digits():
  parts = both("digits")
  joined = data.concatenate(parts)
  assert_same_examples(joined, parts)
  assert joined.split == "train+validation"
  assert joined.spec == parts[0].spec
  test = data.open_source("digits", "test")
  assert not np.intersect1d(joined.ids, test.ids).size


@pytest.mark.parametrize(
  "name, size", [("mfeat", 1600), ("utd_mhad", 431), ("mosi", 1447)]
)
def test_official_training_sets(name, size, data_dir):
  """Their sizes are those that the files' own descriptions state."""
  parts = both(name, path=data_dir)
  joined = data.concatenate(parts)
  assert len(joined) == size
  assert_same_examples(joined, parts)
  for key, values in joined.metadata.items():
    np.testing.assert_array_equal(
      values, np.concatenate([part.metadata[key] for part in parts])
    )
  test = data.open_source(name, "test", path=data_dir)
  assert not np.intersect1d(joined.ids, test.ids).size


def test_shared_rows_stay_shared(data_dir):
  """One recording in many pairs is kept once."""
  parts = both("av_digits", path=data_dir)
  joined = data.concatenate(parts)
  assert_same_examples(joined, parts)
  kept = len(joined.columns["audio"].array)
  assert kept <= sum(len(np.unique(p.metadata["recording"])) for p in parts)


def write(folder, split, size, pixels=False, present=False):
  rng = np.random.default_rng(size)
  contents = {
    "inputs/a": rng.normal(size=(size, 3)).astype(np.float32),
    "inputs/b": rng.integers(0, 256, (size, 2), dtype=np.uint8),
    "label": np.arange(size) % 4,
  }
  if present:
    contents["present/a"] = np.arange(size) % 3 > 0
  np.savez(folder / f"{split}.npz", **contents)


@pytest.mark.parametrize("where", PARTS)
def test_arrays_of_two_files_get_ids_apart(tmp_path, where):
  for split, size in (("train", 40), ("validation", 12)):
    write(tmp_path, split, size, present=split == where)
  parts = both("arrays", path=tmp_path)
  joined = data.concatenate(parts)
  assert_same_examples(joined, parts, ids=False)
  np.testing.assert_array_equal(joined.ids, np.arange(52))
  assert joined.present["b"] is None
  assert not joined.present["a"].all()


def test_arrays_with_a_tenth_held_out_are_the_whole_file_again(tmp_path):
  write(tmp_path, "train", 40)
  joined = data.concatenate(both("arrays", path=tmp_path))
  assert sorted(joined.ids) == list(range(40))
  raw = np.load(tmp_path / "train.npz")
  np.testing.assert_array_equal(
    joined.batch()["inputs"]["a"], raw["inputs/a"][joined.ids]
  )
  assert len(joined.columns["a"].array) == 40
  assert len(joined.notes) == len(set(joined.notes))


def test_parts_stored_in_other_units_are_joined_in_those_of_models():
  train, _ = both("digits")
  pixels = np.arange(256, dtype=np.uint8).repeat(32).reshape(-1, 8, 4, 1)
  coarse = sources.Column(array=pixels, divisor=255.0)
  part = dataclasses.replace(
    train.subset(np.arange(256)),
    columns=dict.fromkeys(train.columns, coarse),
  )
  joined = data.concatenate([train, part])
  assert_same_examples(joined, [train, part], ids=False)


def test_masks_of_training_examples_do_not_change():
  """What is missing depends on an example's id alone."""
  missing = transforms.missing_at_random(0.5, seed=0)
  train, validation = both("digits")
  joined = data.concatenate([train, validation]).with_transforms((missing,))
  alone = train.with_transforms((missing,)).batch()["present"]
  for name, flags in joined.batch()["present"].items():
    np.testing.assert_array_equal(flags[: len(train)], alone[name])
    assert not flags[len(train) :].all()


def test_a_stream_of_the_joined_set_is_all_of_it():
  joined = data.concatenate(both("digits")).limit(200)
  stream = data.pipeline(joined, batch_size=50, seed=0, num_epochs=1)
  seen = np.concatenate([batch["id"] for batch in stream])
  np.testing.assert_array_equal(np.sort(seen), np.sort(joined.ids))
  validation = data.open_source("digits", "validation").ids
  assert 5 < np.intersect1d(seen, validation).size < 40


def test_one_part_is_itself_and_none_is_refused():
  train = data.open_source("digits", "train")
  assert data.concatenate([train]) is train
  with pytest.raises(ValueError, match="at least one source"):
    data.concatenate([])


@pytest.mark.parametrize(
  "change, fact",
  [
    ({"name": "other"}, "name"),
    ({"num_classes": 11}, "num_classes"),
    ({"metadata": {"subject": np.zeros(144)}}, "metadata"),
    ({"transforms": (dict,)}, "transforms"),
    ({"value_range": {"left": None, "right": None}}, "value_range"),
  ],
)
def test_parts_that_differ_are_refused_by_name(change, fact):
  train, validation = both("digits")
  other = dataclasses.replace(validation, **change)
  with pytest.raises(ValueError, match=f"the same {fact} to be joined"):
    data.concatenate([train, other])
  with pytest.raises(ValueError, match="the same spec"):
    data.concatenate([train, validation.select("left")])


def test_the_example_holds():
  (test,) = doctest.DocTestFinder(recurse=False).find(
    sources.concatenate, globs=vars(sources)
  )
  assert doctest.DocTestRunner().run(test) == (0, 3)
