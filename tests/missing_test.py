"""Missing-modality protocols: exact rates, nested masks, symmetric ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import missing
from robust_mm import modalities

NAMES = ("audio", "text", "vision")
RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def _cells(masks):
  return np.stack([masks.present[name] for name in NAMES], axis=-1)


@pytest.mark.parametrize("seed", range(3))
def test_per_sample_masks_are_exact_nested_and_leave_something(seed):
  scores, before = missing.scores(NAMES, 101, seed=seed), None
  for rate in RATES:
    masks = missing.per_sample(scores, rate)
    cells = _cells(masks)
    assert abs(masks.rate - min(rate, 2 / 3)) <= 1 / 303
    assert masks.rate == np.mean(~cells)
    assert cells.sum(-1).min() >= 1
    assert before is None or np.all(cells <= before)
    before = cells
  np.testing.assert_array_equal(before.sum(-1), 1)


def test_no_modality_is_preferred():
  for rate in (0.3, 0.7):
    lost = [
      ~_cells(missing.per_sample(missing.scores(NAMES, 500, seed=s), rate))
      for s in range(40)
    ]
    by_name = np.concatenate(lost).mean(0)
    error = np.sqrt(rate * (1 - rate) / 20_000)
    assert np.all(np.abs(by_name - min(rate, 2 / 3)) < 4 * error)


def test_a_seed_is_a_mask_and_another_one_another():
  one, same, other = (
    _cells(missing.per_sample(missing.scores(NAMES, 50, seed=s), 0.4))
    for s in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, same)
  assert np.any(one != other)


def test_what_is_absent_already_counts_and_one_of_the_rest_is_kept():
  rng = np.random.default_rng(0)
  present = {name: rng.random(200) < 0.7 for name in NAMES}
  scores = missing.scores(NAMES, 200, seed=0, present=present)
  there = np.stack([present[name] for name in NAMES], -1)
  for rate in RATES:
    cells = _cells(missing.per_sample(scores, rate))
    assert not np.any(cells & ~there)
    np.testing.assert_array_equal(cells.any(-1), there.any(-1))
  first = missing.per_sample(scores, 0.0)
  assert first.rate == missing.achieved(present)
  half = missing.per_sample(scores, 0.5)
  assert abs(half.rate - 0.5) <= 1 / 600


def test_fixed_sets_are_all_subsets():
  present = {name: np.arange(4) != i for i, name in enumerate(NAMES)}
  found = missing.fixed(present)
  assert list(found) == [
    modalities.subset_name(s) for s in modalities.subsets(NAMES)
  ]
  np.testing.assert_array_equal(found["text"]["text"], present["text"])
  assert not found["text"]["audio"].any()


@pytest.mark.parametrize("rate", RATES)
def test_per_batch_masks_are_whole_batches_at_the_stated_rate(rate):
  masks = missing.per_batch(NAMES, 320, rate, seed=1, batch_size=16)
  cells = _cells(masks)
  assert abs(masks.rate - min(rate, 2 / 3)) < 1e-9
  for batch in cells.reshape(20, 16, 3):
    assert np.all(batch == batch[0])
  lost = 3 - cells[::16].sum(-1)
  two, one = missing.PER_BATCH[rate]
  assert np.sum(lost == 2) == round(20 * two)
  assert np.sum(lost == 1) == round(20 * one)


@pytest.mark.parametrize("num_rows", [50, 5000])
def test_one_kept_meets_the_rate_within_its_tolerance(num_rows):
  for rate in RATES:
    masks = missing.one_kept(NAMES, num_rows, rate, seed=2)
    assert abs(masks.rate - min(rate, 2 / 3)) < max(0.005, 1 / (3 * num_rows))
    assert _cells(masks).sum(-1).min() >= 1


def test_frames_are_lost_at_the_rate_nested_and_replaced():
  lengths = {"audio": 30, "text": 20}
  before = None
  for rate in (0.0, 0.3, 0.9, 1.0):
    kept = missing.frames(lengths, 400, rate, seed=0)
    for name, flag in kept.items():
      assert flag.shape == (400, lengths[name])
      error = 4 * np.sqrt(rate * (1 - rate) / flag.size)
      assert abs(1 - flag.mean() - rate) <= error
      assert before is None or np.all(flag <= before[name])
    before = kept
  kept = missing.frames(lengths, 4, 0.5, seed=0)
  inputs = {
    "audio": jnp.full((4, 30, 2), 5.0),
    "text": jnp.full((4, 20), 7),
    "other": jnp.ones((4, 3)),
  }
  found = jax.jit(
    lambda x, k: missing.drop_frames(x, k, unknown={"text": 100})
  )(inputs, kept)
  expected = np.where(kept["audio"][..., None], 5.0, 0.0).repeat(2, -1)
  np.testing.assert_array_equal(found["audio"], expected)
  expected = np.where(kept["text"], 7, 100)
  np.testing.assert_array_equal(found["text"], expected)
  assert found["text"].dtype == inputs["text"].dtype
  np.testing.assert_array_equal(found["other"], inputs["other"])


@pytest.mark.parametrize(
  "function, message",
  [
    (lambda s: missing.per_sample(s, 0.7, strict=True), "rate must lie in"),
    (lambda s: missing.per_sample(s, -0.1, strict=True), "rate must lie in"),
    (lambda s: missing.per_sample(s, float("nan")), "rate must lie in"),
    (lambda s: missing.scores(["a"], 3, seed=0), "names must be at least two"),
    (lambda s: missing.scores(NAMES, 0, seed=0), "num_rows must be"),
    (lambda s: missing.one_kept(NAMES, 9, 0.9, seed=0, strict=True), "rate"),
    (
      lambda s: missing.per_batch(NAMES[:2], 9, 0.1, seed=0, batch_size=3),
      "names must be three",
    ),
    (
      lambda s: missing.per_batch(NAMES, 9, 0.15, seed=0, batch_size=3),
      "rate must be one of",
    ),
    (lambda s: missing.frames({"a": 3}, 9, 1.5, seed=0), "rate must lie"),
    (lambda s: missing.frames({"a": 0}, 9, 0.5, seed=0), "lengths"),
    (
      lambda s: missing.Scores(names=NAMES, values=np.ones((3, 2)), seed=0),
      "values must be",
    ),
  ],
)
def test_a_bad_argument_is_refused_by_name(function, message):
  with pytest.raises(ValueError, match=message):
    function(missing.scores(NAMES, 6, seed=0))


def test_clipping_is_the_default():
  scores = missing.scores(NAMES, 30, seed=0)
  assert missing.per_sample(scores, 5.0).rate == pytest.approx(2 / 3)
  assert missing.per_sample(scores, -5.0).rate == 0
