"""Replicates of a report of modality shift: clusters, seeds, errors."""

import math

import numpy as np
import pytest
from evaluation_shift_results import REFERENCE
from evaluation_shift_results import N
from evaluation_shift_results import report_of
from evaluation_shift_results import right

from robust_mm.evaluation import shift_statistics


def test_standard_errors_are_those_of_a_binomial():
  p = np.diag(REFERENCE)
  found = report_of({"ft": right(REFERENCE)}, num_samples=2000)
  expected = np.sqrt(p * (1 - p) / N)
  np.testing.assert_allclose(found.matched_error["ft"], expected, rtol=0.08)
  low, high = found.intervals["ft"][:, 0, 0]
  np.testing.assert_allclose(
    [low, high], 0.6 + expected[0] * np.array([-1.96, 1.96]), atol=0.004
  )


def test_copies_of_an_item_are_one_cluster_and_no_information():
  few = right(REFERENCE, num_items=100)
  copies = np.repeat(few, 10, axis=-1)
  clusters = np.repeat(np.arange(100)[::-1], 10)
  alone = report_of({"ft": few}, num_samples=1000)
  whole = report_of({"ft": copies}, clusters=clusters, num_samples=1000)
  blind = report_of({"ft": copies}, num_samples=1000)
  assert (whole.num_items, whole.num_clusters) == (1000, 100)
  errors = [r.matched_error["ft"][0] for r in (alone, whole, blind)]
  np.testing.assert_allclose(errors[1] / errors[0], 1, rtol=0.1)
  np.testing.assert_allclose(errors[2] / errors[0], 10**-0.5, rtol=0.1)


def test_clusters_of_unlike_size_are_ratios_of_sums():
  """Items weigh alike, not clusters: one of 90 right, ten of 1 wrong."""
  matrix = np.zeros((1, 3, 3, 100), bool)
  matrix[..., :90] = True
  clusters = np.minimum(np.arange(100) // 90 * np.arange(100), 99)
  found = report_of({"ft": matrix}, clusters=clusters, num_samples=2000)
  assert found.num_clusters == 11
  assert found.matrix("ft")[0, 0] == 0.9
  draws = found.draws["ft"]["missing"]["performance"]
  # Drawn k times of 11: 90 k / (90 k + 11 - k).
  k = np.arange(12)
  possible = 90 * k / (90 * k + 11 - k)
  assert np.abs(draws[:, None] - possible[None]).min(axis=1).max() < 1e-12
  np.testing.assert_allclose(np.mean(draws == 0), (10 / 11) ** 11, atol=0.04)


def test_few_seeds_are_shown_and_many_are_drawn():
  rates = np.linspace(0.4, 0.8, 5)
  stacked = [right(np.full((3, 3), rate))[0] for rate in rates]
  few = report_of({"ft": np.stack(stacked[:3])})
  assert not few.seeds_drawn
  found = few.estimate("ft", "missing", "performance")
  np.testing.assert_allclose(found[0], 0.5, atol=1e-12)
  np.testing.assert_allclose(found[3:], [0.4, 0.6], atol=1e-12)
  many = report_of({"ft": np.stack(stacked)}, num_samples=2000)
  assert many.seeds_drawn
  draws = many.draws["ft"]["missing"]["performance"]
  # Means of 5 of 5 seeds: variance of the seeds over 5; items add little.
  expected = np.sqrt(rates.var() / 5 + 0.6 * 0.4 / N)
  np.testing.assert_allclose(draws.std(), expected, rtol=0.1)
  assert "(0.400..0.600)" in few.table()
  assert "(0.400..0.800)" not in many.table()


def _simulated(rng, kind):
  first = rng.random((1, 3, 3, N)) < 0.6
  if kind == "same":
    second = first
  elif kind == "more":
    second = first | (rng.random(first.shape) < 0.05 / 0.4)
  else:
    # Each errs on its own 5 % of the items of one truth.
    truth = first
    first, second = (truth ^ (rng.random(truth.shape) < 0.05) for _ in "ab")
  return {"ft": first, "masd": second}


def test_identical_methods_differ_by_exactly_nothing():
  rng = np.random.default_rng(0)
  for reference in ("ft", "own"):
    found = report_of(_simulated(rng, "same"), reference=reference)
    for kind in ("matched", "missing", "added", "transfer"):
      for statistic in shift_statistics.STATISTICS:
        estimate = found.difference("masd", "ft", kind, statistic)
        if not math.isnan(found.estimate("ft", kind, statistic).value):
          assert estimate == (0.0, 0.0, 0.0, 0.0, 0.0)
      assert found.improvement("masd", "ft", kind)[:3] == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
  "kind, least, most", [("more", 95, 100), ("flips", 0, 10)]
)
def test_how_often_a_difference_is_separated_from_0(kind, least, most):
  """One pair, T = a and E = a+b, of 1,000 items; 100 simulations."""
  rng = np.random.default_rng(11)
  separated = 0
  for number in range(100):
    results = {
      name: value[:, :1, ::2] for name, value in _simulated(rng, kind).items()
    }
    found = report_of(
      results,
      train_sets=["a"],
      test_sets=["a", "a+b"],
      matched={"ft": {"a+b": results["ft"][:, 0, 1]}},
      num_samples=2000,
      seed=number,
    )
    _, low, high, *_ = found.difference("masd", "ft", "added", "performance")
    separated += low > 0 or high < 0
  assert least <= separated <= most


def test_draws_take_clusters_whole():
  """Speakers of 4 items, all right or all wrong: shares of speakers only."""
  speaker = np.array([f"s{i % 25}" for i in range(100)])
  good = speaker < "s2"  # s0, s1, s10..s19
  results = np.broadcast_to(good, (1, 3, 3, 100))
  options = {"chance": 0.1, "num_samples": 2000}
  found = report_of({"ft": results}, clusters=speaker, **options)
  assert (found.num_items, found.num_clusters) == (100, 25)
  draws = found.draws["ft"]["missing"]["performance"] * 25
  np.testing.assert_allclose(draws, np.rint(draws), atol=1e-9)
  p = good.mean()
  spread = np.sqrt(p * (1 - p) * 25)
  np.testing.assert_allclose(draws.std(), spread, rtol=0.08)
  apart = report_of({"ft": results}, **options)
  single = apart.draws["ft"]["missing"]["performance"] * 25
  np.testing.assert_allclose(single.std(), spread / 2, rtol=0.08)
  assert np.abs(single - np.rint(single)).max() > 0.2
