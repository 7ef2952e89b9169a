"""Metrics against hand examples, scikit-learn and scipy."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from robust_mm import modalities
from robust_mm.evaluation import metrics

# Zero labels, half-integers, values out of range.
LABEL = np.array([0.0, 0.5, 1.5, -2.5, 3.4, -0.2, 0.0, 2.0])
GUESS = np.array([-0.1, 0.0, 2.2, -2.0, 9.0, 0.3, 0.0, -1.0])


def test_the_hand_example_of_sentiment():
  # Rounded labels 0 0 2 -2 3 0 0 2, rounded guesses 0 0 2 -2 3 0 0 -1.
  assert metrics.accuracy_7(LABEL, GUESS) == 7 / 8
  # Without the two zeros: + + - + - + against - + - + + -.
  assert metrics.accuracy_2(LABEL, GUESS, variant="nonzero") == 3 / 6
  # With them: + + + - + - + + against - + + - + + + -.
  assert metrics.accuracy_2(LABEL, GUESS, variant="has_zero") == 5 / 8
  error = [0.1, 0.5, 0.7, 0.5, 5.6, 0.5, 0.0, 3.0]
  np.testing.assert_allclose(
    metrics.mean_absolute_error(LABEL, GUESS), np.mean(error), rtol=1e-12
  )
  # Positive: precision 2/3, recall 2/4, F1 4/7; negative: 1/3, 1/2, 2/5.
  np.testing.assert_allclose(
    metrics.f1_2(LABEL, GUESS, variant="nonzero"),
    4 / 6 * 4 / 7 + 2 / 6 * 2 / 5,
    rtol=1e-12,
  )


@pytest.mark.parametrize("seed", range(5))
def test_classification_agrees_with_scikit_learn(seed):
  rng = np.random.default_rng(seed)
  label, guess = rng.choice([0, 1, 3, 7], 60), rng.integers(0, 8, 60)
  expected = sklearn.metrics.f1_score(
    label, guess, average="weighted", zero_division=0
  )
  np.testing.assert_allclose(metrics.weighted_f1(label, guess), expected)
  assert metrics.weighted_f1(guess, label) != pytest.approx(expected)
  assert metrics.accuracy(label, guess) == np.mean(label == guess)
  expected = sklearn.metrics.recall_score(
    label, guess, average="macro", labels=[0, 1, 3, 7]
  )
  np.testing.assert_allclose(
    metrics.unweighted_accuracy(label, guess), expected
  )


@pytest.mark.parametrize("seed", range(5))
def test_regression_agrees_with_scipy(seed):
  rng = np.random.default_rng(seed)
  label = rng.normal(0, 2, 50)
  guess = label + rng.normal(0, 1, 50)
  expected = scipy.stats.pearsonr(label, guess).statistic
  np.testing.assert_allclose(metrics.correlation(label, guess), expected)
  expected = sklearn.metrics.mean_absolute_error(label, guess)
  np.testing.assert_allclose(
    metrics.mean_absolute_error(label, guess), expected
  )
  for variant in metrics.VARIANTS:
    rows = np.ones(50, bool) if variant == "has_zero" else label != 0
    binary = [
      x[rows] >= 0 if variant == "has_zero" else x[rows] > 0
      for x in (label, guess)
    ]
    np.testing.assert_allclose(
      metrics.f1_2(label, guess, variant=variant),
      sklearn.metrics.f1_score(*binary, average="weighted"),
    )


def test_the_correlation_of_a_constant_is_nan():
  assert math.isnan(metrics.correlation([1, 2, 3], [0.1, 0.1, 0.1]))
  assert math.isnan(metrics.correlation([1, 1, 1], [1, 2, 3]))
  assert math.isnan(metrics.accuracy_2([0, 0], [1, 2], variant="nonzero"))


@pytest.mark.parametrize("ties", [False, True])
def test_mean_average_precision_agrees_with_scikit_learn(ties):
  rng = np.random.default_rng(0)
  label, score = rng.random((80, 5)) < 0.3, rng.normal(size=(80, 5))
  score = score.round(1 if ties else 12)
  expected = sklearn.metrics.average_precision_score(label, score)
  found = metrics.mean_average_precision(label, score)
  np.testing.assert_allclose(found, expected)
  label = np.append(label, np.zeros((80, 1), bool), axis=1)
  score = np.append(score, rng.normal(size=(80, 1)), axis=1)
  assert metrics.mean_average_precision(label, score) == found
  assert math.isnan(metrics.mean_average_precision(label[:, 5:], score[:, 5:]))


def _scores(names, rng):
  return {subset: rng.random() for subset in modalities.subsets(names)}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shapley_is_the_mean_over_all_orders(count):
  rng = np.random.default_rng(count)
  names = tuple("abcd"[:count])
  scores = {(): 0.1, **_scores(names, rng)}
  expected = dict.fromkeys(names, 0.0)
  orders = list(itertools.permutations(names))
  for order in orders:
    for place, name in enumerate(order):
      before = tuple(sorted(order[:place]))
      after = tuple(sorted(order[: place + 1]))
      expected[name] += (scores[after] - scores[before]) / len(orders)
  del scores[()]
  found = metrics.shapley(scores, empty=0.1)
  for name in names:
    np.testing.assert_allclose(found[name], expected[name], atol=1e-12)


def test_shapley_of_eight_is_efficient_and_a_useless_one_has_nothing():
  names = tuple("abcdefgh")
  rng = np.random.default_rng(0)
  scores = _scores(names[:7], rng)
  for subset in modalities.subsets(names):
    rest = tuple(name for name in subset if name != "h")
    scores[subset] = scores.get(rest, 0.25)
  named = {modalities.subset_name(s): value for s, value in scores.items()}
  found = metrics.shapley(named, empty=0.25)
  assert abs(found["h"]) < 1e-12
  np.testing.assert_allclose(sum(found.values()), scores[names] - 0.25)


def test_corruption_scores_weigh_kinds_alike():
  table = {"blur": {1: 1.0, 2: 0.5}, "swap": {5: 0.25}}
  assert metrics.mean_corruption_score(table) == 0.5


def test_robustness_of_a_hand_example():
  found = metrics.robustness({("a",): 0.2, ("b",): 0.6, ("a", "b"): 1.0})
  assert found["min"] == 0.2
  np.testing.assert_allclose([found["mean"], found["retention"]], [0.6, 0.4])
  assert math.isnan(metrics.robustness({"a": 0.5})["retention"])


def test_the_interval_of_items_is_the_normal_one_and_knows_of_pairs():
  rng = np.random.default_rng(0)
  second = rng.random(600) < 0.6
  first = np.where(rng.random(600) < 0.1, ~second, second)
  found = metrics.paired_bootstrap(first, second)
  difference = first.astype(float) - second
  assert found.difference == pytest.approx(difference.mean())
  width = 2 * 1.96 * difference.std() / np.sqrt(600)
  assert found.high - found.low == pytest.approx(width, rel=0.1)
  shuffled = metrics.paired_bootstrap(first, rng.permutation(second))
  assert shuffled.high - shuffled.low > 1.5 * width


def test_the_interval_covers_about_as_often_as_it_says():
  rng, hits = np.random.default_rng(1), 0
  for number in range(150):
    noise = rng.normal(0.3, 1.0, 80)
    found = metrics.paired_bootstrap(
      noise, np.zeros(80), num_samples=300, seed=number
    )
    hits += found.low <= 0.3 <= found.high
  assert 0.87 < hits / 150 < 0.995


def test_seeds_that_differ_widen_the_interval():
  rng = np.random.default_rng(0)
  items, seeds = rng.normal(size=(1, 400)), rng.normal(size=(5, 1))
  zeros = np.zeros((5, 400))
  alike = metrics.paired_bootstrap(items + 0 * seeds, zeros)
  differ = metrics.paired_bootstrap(items + seeds, zeros)
  assert differ.high - differ.low > 3 * (alike.high - alike.low)
  one = metrics.paired_bootstrap(items[0], zeros[0])
  assert alike.high - alike.low == pytest.approx(one.high - one.low, rel=0.1)


@pytest.mark.parametrize(
  "function, message",
  [
    (lambda: metrics.accuracy([1, 2], [1]), "label and prediction"),
    (lambda: metrics.accuracy([], []), "label and prediction"),
    (lambda: metrics.accuracy_2([1], [1], variant="zero"), "variant"),
    (lambda: metrics.mean_average_precision([1], [1]), "label and score"),
    (lambda: metrics.mean_corruption_score({}), "table"),
    (lambda: metrics.shapley({"a": 1.0, "a+b": 1.0}), "scores lacks.*'b'"),
    (lambda: metrics.shapley({tuple("abcdefghi"): 1.0}), "1 to 8"),
    (lambda: metrics.shapley({}), "scores must"),
    (lambda: metrics.robustness({"a": 1.0, "b": 1.0}), "scores lacks"),
    (lambda: metrics.paired_bootstrap([1], [1, 2]), "first and second"),
    (lambda: metrics.paired_bootstrap([1], [1], level=1.0), "level"),
  ],
)
def test_a_bad_argument_is_refused_by_name(function, message):
  with pytest.raises(ValueError, match=message):
    function()
