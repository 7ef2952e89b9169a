"""The formulas against simulation, a linear programme and their limits."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize
from scipy import special
from scipy import stats

from robust_mm import smoothing
from robust_mm.smoothing import bounds

ALPHA = 0.05


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_clopper_pearson_covers_and_the_naive_estimate_does_not(p):
  """Coverage is at least 1 - alpha, up to three deviations of 20,000 draws."""
  trials, draws = 200, 20_000
  hits = np.random.default_rng(0).binomial(trials, p, draws)
  limit = 1 - ALPHA - 3 * math.sqrt(ALPHA * (1 - ALPHA) / draws)

  def coverage(estimate):
    return np.mean(estimate <= p)

  bound = smoothing.clopper_pearson(hits, trials, ALPHA)
  assert coverage(bound) >= limit
  assert coverage(hits / trials) < limit
  assert np.all(bound <= hits / trials)


def test_clopper_pearson_is_the_tightest_probability_not_refused():
  for hits, trials in ((1, 10), (7, 10), (990, 1000), (9999, 10_000)):
    bound = float(smoothing.clopper_pearson(hits, trials, 1e-3))
    assert stats.binom.sf(hits - 1, trials, bound) == pytest.approx(1e-3)


def test_clopper_pearson_ends_are_the_closed_forms():
  assert smoothing.clopper_pearson(0, 10, 1e-3) == 0
  assert smoothing.clopper_pearson(10, 10, 1e-3) == pytest.approx(1e-3**0.1)
  assert smoothing.clopper_pearson(1, 1, 1e-3) == pytest.approx(1e-3)
  for trials, cap in ((1e3, 2.46), (1e4, 3.20), (1e5, 3.81)):
    bound = smoothing.clopper_pearson(trials, trials, 1e-3)
    assert bounds.reach(bound) == pytest.approx(cap, abs=0.005)


@pytest.mark.parametrize("alpha", [0, 1, -1, float("nan")])
def test_alpha_is_named(alpha):
  with pytest.raises(ValueError, match="alpha must lie"):
    smoothing.clopper_pearson(1, 2, alpha)


def test_rounding_goes_down_and_not_far():
  values = np.random.default_rng(0).uniform(0, 1, 10_000)
  found = bounds.round_down(values)
  assert found.dtype == np.float32
  assert np.all(found.astype(np.float64) <= values * (1 - 5e-10))
  np.testing.assert_allclose(found, values, rtol=2e-7)
  assert bounds.round_down(np.array([0.0, np.inf])).tolist() == [0, np.inf]


def sub_samples(elements, kept):
  return list(itertools.combinations(elements, kept))


def linear_programme(p_b, before, after, *, worst):
  """The extreme chance of a class over all functions of a sub-sample.

  ``f`` in [0, 1] on every sub-sample that either input can give; its mean over
  those of x is ``p_b``; its mean over those of x' is minimal or maximal.
  """
  every = sorted(set(before) | set(after))
  here = np.array([(s in before) / len(before) for s in every])
  there = np.array([(s in after) / len(after) for s in every])
  sign = 1 if worst == "low" else -1
  found = optimize.linprog(
    sign * there, A_eq=here[None], b_eq=[p_b], bounds=(0, 1)
  )
  assert found.status == 0
  return sign * found.fun


def attacked(number, changed, change):
  """Elements of x' where those of x are 0..number-1; new ones are negative."""
  new = [-1 - i for i in range(changed)]
  if change == "add":
    return list(range(number)) + new
  left = list(range(number - changed))
  return left if change == "delete" else left + new


CASES = [
  (number, kept, changed, change)
  for number, kept in ((5, 1), (6, 2), (7, 3))
  for changed in (1, 2, 3)
  for change in bounds.CHANGES
  if change != "delete" or number - changed >= kept
]


@pytest.mark.parametrize("number, kept, changed, change", CASES)
def test_sub_sampling_bounds_are_the_linear_programme(
  number, kept, changed, change
):
  before = sub_samples(range(number), kept)
  after = sub_samples(sorted(attacked(number, changed, change)), kept)
  q, q_moved = smoothing.overlap(number, kept, changed, change)
  for p in (0.0, 0.2, 0.51, 0.75, 0.9, 0.99, 1.0):
    low = linear_programme(p, before, after, worst="low")
    high = linear_programme(p, before, after, worst="high")
    assert smoothing.kept_probability(p, q[-1], q_moved[-1]) == pytest.approx(
      low, abs=1e-9
    )
    assert smoothing.rival_probability(p, q[-1], q_moved[-1]) == pytest.approx(
      high, abs=1e-9
    )


def test_two_modalities_multiply():
  """Sub-samples of both are drawn independently."""
  pairs = [
    list(itertools.product(sub_samples(a, 2), sub_samples(b, 1)))
    for a, b in (
      (range(4), range(10, 13)),
      ((-1, 0, 1, 2), (-2, 10, 11)),
    )
  ]
  q = [smoothing.overlap(n, k, 1)[0][1] for n, k in ((4, 2), (3, 1))]
  found = smoothing.kept_probability(0.9, np.prod(q), np.prod(q))
  assert found == pytest.approx(
    linear_programme(0.9, *pairs, worst="low"), abs=1e-9
  )


@pytest.mark.parametrize("change", bounds.CHANGES)
def test_overlap_is_the_ratio_of_binomials(change):
  number, kept, changed = 64, 4, 63
  q, q_moved = smoothing.overlap(number, kept, changed, change)
  for r in range(changed + 1):
    common = number if change == "add" else number - r
    total = {"modify": number, "delete": number - r, "add": number + r}[change]
    wanted = math.comb(common, kept) / math.comb(number, kept)
    assert q[r] == pytest.approx(wanted, rel=1e-12)
    moved = math.comb(total, kept)
    wanted = math.comb(common, kept) / moved if moved else 0
    assert q_moved[r] == pytest.approx(wanted, rel=1e-12)


def test_largest_numbers_of_elements_are_those_of_the_method():
  for number, kept, largest in ((784, 50, 10), (784, 20, 26), (64, 4, 9)):
    q, _ = smoothing.overlap(number, kept, number)
    held = smoothing.kept_probability(0.999, q, q) > 0.5
    assert held.sum() - 1 == largest


def test_mixed_rule_has_both_limits():
  p, q, q_moved = 0.97, 0.9, 0.8
  for rho in (0.0, 0.3, 1.0):
    alone = special.ndtr(special.ndtri(p) - rho)
    assert smoothing.kept_probability(p, rho=rho) == pytest.approx(
      alone, abs=1e-9
    )
  exact = smoothing.kept_probability(p, q, q_moved)
  tiny = smoothing.kept_probability(p, q, q_moved, rho=1e-12)
  assert exact == pytest.approx(max(0, p - (1 - q)) * q_moved / q, abs=1e-9)
  assert tiny == pytest.approx(exact, abs=1e-9)


def test_both_bounds_sum_to_one():
  for p, q, rho in itertools.product((0.6, 0.95), (1.0, 0.9), (0.0, 0.5)):
    low = smoothing.kept_probability(p, q, q * 0.99, rho)
    high = smoothing.rival_probability(1 - p, q, q * 0.99, rho)
    assert low + high == pytest.approx(1, abs=1e-12)


def test_mixed_rule_is_the_optimum_of_a_discretised_problem():
  """Neyman-Pearson on a grid: one noise axis times one sub-sampled bit."""
  p, q, rho = 0.9, 0.8, 0.4
  edges = np.linspace(-7, 7, 6001)
  before = np.diff(special.ndtr(edges))
  after = np.diff(special.ndtr(edges - rho))
  # Common sub-samples differ by the shift, others are seen on one side only.
  mass = np.concatenate([q * before, [1 - q]])
  moved = np.concatenate([q * after, [0.0]])
  order = np.argsort(moved / mass)
  filled = np.minimum(np.cumsum(mass[order]), p)
  share = np.diff(np.concatenate([[0], filled])) / mass[order]
  found = np.sum(share * moved[order])
  assert smoothing.kept_probability(p, q, q, rho) == pytest.approx(
    found, abs=1e-5
  )


def test_reach_is_where_the_kept_probability_is_one_half():
  for p, q, moved in ((0.9, 1.0, 1.0), (0.97, 0.9, 0.85), (0.99, 0.7, 0.95)):
    rho = bounds.reach(p, q, moved)
    assert rho > 0
    assert smoothing.kept_probability(p, q, moved, rho) == pytest.approx(
      0.5, abs=1e-12
    )
  assert bounds.reach(0.99, 0.4, 0.5) == -np.inf
  assert bounds.reach(0.99, 0.0, 0.0) == -np.inf
