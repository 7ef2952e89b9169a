"""Pipelines: deterministic, sharded, resumable, quick."""

import json
import time

import grain
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from robust_mm import _validate
from robust_mm import data
from robust_mm.data import transforms


@pytest.fixture(scope="module")
def source():
  return data.open_source("digits", "train")


def _ids(source, count=None, **arguments):
  arguments = {"batch_size": 100, "seed": 0, **arguments}
  iterator = iter(data.pipeline(source, **arguments))
  ids = []
  for batch in iterator:
    ids.append(batch["id"])
    if len(ids) == count:
      break
  iterator.close()
  return ids


def test_pipeline_is_a_grain_dataset_of_aligned_batches(source):
  dataset = data.pipeline(source, batch_size=64, seed=3)
  assert isinstance(dataset, grain.IterDataset)
  iterator = iter(dataset)
  batch = next(iterator)
  iterator.close()
  position = {id_: i for i, id_ in enumerate(source.ids.tolist())}
  rows = [position[i] for i in batch["id"].tolist()]
  expected = source.take(rows)
  np.testing.assert_array_equal(
    batch["inputs"]["right"], expected["inputs"]["right"]
  )
  np.testing.assert_array_equal(batch["label"], expected["label"])


def test_epoch_shows_every_example_once_in_a_new_order(source):
  ids = _ids(source, num_epochs=2, drop_remainder=False)
  assert [len(i) for i in ids] == 2 * ([100] * 12 + [93])
  first, second = np.concatenate(ids[:13]), np.concatenate(ids[13:])
  np.testing.assert_array_equal(np.sort(first), np.sort(source.ids))
  np.testing.assert_array_equal(np.sort(second), np.sort(source.ids))
  assert (first != second).any()
  assert (first != source.ids).any()


def test_dropping_the_remainder_keeps_all_shapes_equal(source):
  ids = _ids(source, num_epochs=3)
  assert [len(i) for i in ids] == [100] * 36


def test_order_depends_on_the_seed_alone(source):
  first = _ids(source, 5)
  np.testing.assert_array_equal(first, _ids(source, 5))
  assert (np.array(first) != np.array(_ids(source, 5, seed=1))).any()
  unshuffled = np.concatenate(_ids(source, 12, shuffle=False))
  np.testing.assert_array_equal(unshuffled, source.ids[:1200])


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("drop_remainder", [True, False])
def test_shards_are_disjoint_and_make_up_the_global_batch(
  source, count, drop_remainder
):
  arguments = {"num_epochs": 1, "drop_remainder": drop_remainder}
  whole = _ids(source, **arguments)
  shards = [
    _ids(source, process_index=i, process_count=count, **arguments)
    for i in range(count)
  ]
  assert all(len(shard) == len(whole) for shard in shards)
  for step, ids in enumerate(whole):
    parts = [shard[step] for shard in shards]
    np.testing.assert_array_equal(np.concatenate(parts), ids)


def test_restored_state_gives_the_identical_remaining_batches(source):
  arguments = {"batch_size": 100, "seed": 7, "num_epochs": 2}
  missing = (transforms.missing_at_random(0.3, 0),)
  iterator = iter(data.pipeline(source, transforms=missing, **arguments))
  for _ in range(9):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = list(iterator)
  iterator.close()
  again = iter(data.pipeline(source, transforms=missing, **arguments))
  again.set_state(state)
  remaining = list(again)
  again.close()
  assert len(remaining) == len(expected) == 15
  for a, b in zip(remaining, expected):
    np.testing.assert_array_equal(a["id"], b["id"])
    for name in ("left", "right"):
      np.testing.assert_array_equal(a["inputs"][name], b["inputs"][name])
      np.testing.assert_array_equal(a["present"][name], b["present"][name])


@pytest.mark.parametrize("drop_remainder", [True, False])
@pytest.mark.parametrize("before, after", [(1, 1), (2, 1), (1, 4), (4, 2)])
@pytest.mark.parametrize("start", [0, 1, 9, 17])
def test_another_number_of_processes_goes_on_with_the_same_batches(
  source, start, before, after, drop_remainder
):
  """Nine batches end within the first epoch, 17 lie in the second."""

  def joined(count, number, **arguments):
    parts = [
      _ids(
        source,
        number,
        seed=3,
        num_epochs=2,
        drop_remainder=drop_remainder,
        process_index=index,
        process_count=count,
        **arguments,
      )
      for index in range(count)
    ]
    return [np.concatenate(step) for step in zip(*parts, strict=True)]

  whole = joined(1, None)
  begun = joined(before, start) if start else []
  resumed = joined(after, None, start=start)
  assert len(begun) + len(resumed) == len(whole)
  for mine, expected in zip((*begun, *resumed), whole):
    np.testing.assert_array_equal(mine, expected)


def test_start_applies_transforms_as_the_whole_stream_does(source):
  missing = (transforms.missing_at_random(0.3, 0),)
  arguments = {"batch_size": 100, "seed": 0, "transforms": missing}
  whole = iter(data.pipeline(source, **arguments))
  for _ in range(30):
    next(whole)
  begun = iter(data.pipeline(source, start=30, **arguments))
  for _ in range(3):
    a, b = next(whole), next(begun)
    np.testing.assert_array_equal(a["id"], b["id"])
    np.testing.assert_array_equal(a["inputs"]["left"], b["inputs"]["left"])
    np.testing.assert_array_equal(a["present"]["left"], b["present"]["left"])
  whole.close()
  begun.close()


def test_nothing_is_left_behind_the_last_epoch(source):
  assert _ids(source, num_epochs=2, start=24) == []
  assert len(_ids(source, num_epochs=2, start=23)) == 1


def test_orbax_checkpoints_the_iterator(source, tmp_path):
  dataset = data.pipeline(source, batch_size=50, seed=0)
  iterator = iter(dataset)
  for _ in range(30):  # into the second epoch
    next(iterator)
  ocp.save_checkpointables(tmp_path / "checkpoint", {"data": iterator})
  expected = [next(iterator)["id"] for _ in range(5)]
  iterator.close()
  again = iter(dataset)
  ocp.load_checkpointables(tmp_path / "checkpoint", {"data": again})
  np.testing.assert_array_equal([next(again)["id"] for _ in range(5)], expected)
  again.close()


def test_batch_of_256_costs_far_less_than_a_millisecond(source):
  iterator = iter(data.pipeline(source, batch_size=256, seed=0))
  next(iterator)
  times = []
  for _ in range(20):
    start = time.perf_counter()
    for _ in range(10):
      next(iterator)
    times.append((time.perf_counter() - start) / 10)
  iterator.close()
  # Measured 0.05 ms; per-example work in Python would take 2 ms and more.
  assert min(times) < 5e-4


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [64, 360, 400])
def test_evaluation_shows_every_example_once_in_equal_shapes(count, batch_size):
  source = data.open_source("digits", "test")
  parts = [
    list(
      data.evaluation_batches(
        source, batch_size, process_index=i, process_count=count
      )
    )
    for i in range(count)
  ]
  assert len({len(part) for part in parts}) == 1
  seen = []
  for step in zip(*parts):
    for batch, num_valid in step:
      assert len(batch["id"]) == batch_size // count
      assert batch["inputs"]["left"].shape[0] == batch_size // count
      assert (batch["id"][num_valid:] == -1).all()
      assert batch["id"].dtype == np.int32
      assert np.isfinite(batch["inputs"]["left"]).all()
      seen.append(batch["id"][:num_valid])
  np.testing.assert_array_equal(np.concatenate(seen), source.ids)


@pytest.mark.parametrize(
  "arguments, error, words",
  [
    ({"batch_size": 0}, ValueError, "batch_size must be an integer"),
    ({"batch_size": 5000}, _validate.UserError, "exceeds the 1293 examples"),
    (
      {"batch_size": 10, "process_count": 3},
      _validate.UserError,
      "must be divisible by the 3 processes",
    ),
    (
      {"batch_size": 10, "process_index": 1},
      ValueError,
      "process_index must lie in",
    ),
    ({"batch_size": 10, "num_epochs": 0}, ValueError, "num_epochs must be"),
    ({"batch_size": 10, "start": -1}, ValueError, "start must be"),
  ],
)
def test_bad_arguments_are_refused(source, arguments, error, words):
  with pytest.raises(error, match=words):
    data.pipeline(source, **{"seed": 0, **arguments})


@pytest.mark.parametrize("start", [0, 3, 16, 19])
def test_evaluation_begins_where_it_is_told_in_every_process(start):
  source = data.open_source("digits", "test", limit=21)
  parts = [
    list(
      data.evaluation_batches(
        source, 8, start=start, process_index=index, process_count=2
      )
    )
    for index in (0, 1)
  ]
  assert len(parts[0]) == len(parts[1])
  seen = [batch["id"][:valid] for pair in zip(*parts) for batch, valid in pair]
  np.testing.assert_array_equal(
    np.concatenate(seen), source.batch()["id"][start:]
  )


def _beside(source, **options):
  common = {"batch_size": 4, "seed": 3, "num_epochs": 3, "ratio": 2, **options}
  return list(
    data.pipeline(
      source.limit(10), unlabelled=source.subset(np.arange(20, 34)), **common
    )
  )


def test_every_labelled_row_is_followed_by_rows_without_a_label(source):
  few = source.limit(10)
  plain = list(data.pipeline(few, batch_size=4, seed=3, num_epochs=3))
  mixed = _beside(source)
  assert len(mixed) == len(plain) == 6
  for one, two in zip(plain, mixed):
    np.testing.assert_array_equal(two["labelled"], [True, False, False] * 4)
    rows = {k: two[k][two["labelled"]] for k in ("id", "label")}
    np.testing.assert_array_equal(rows["id"], one["id"])
    np.testing.assert_array_equal(rows["label"], one["label"])
    assert not two["label"][~two["labelled"]].any()
  # Rows without a label have an order, and epochs, of their own.
  ids = [batch["id"][~batch["labelled"]] for batch in mixed]
  assert all(len(set(part)) == 8 for part in ids)
  assert not np.array_equal(ids[0], ids[1])


def test_rows_beside_are_the_same_for_any_number_of_processes(source):
  whole = _beside(source)
  parts = [
    _beside(source, process_index=i, process_count=2, start=2) for i in range(2)
  ]
  for step, batch in enumerate(whole[2:]):
    joined = np.concatenate([part[step]["id"] for part in parts])
    np.testing.assert_array_equal(joined, batch["id"])


def test_rows_beside_need_whole_batches(source):
  with pytest.raises(ValueError, match="drop_remainder"):
    _beside(source, drop_remainder=False)
  with pytest.raises(ValueError, match="ratio"):
    _beside(source, ratio=0)
  with pytest.raises(ValueError, match="batch_size 16 exceeds the 14"):
    _beside(source, ratio=4)
