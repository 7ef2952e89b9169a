"""Set-level scores under weights, against scikit-learn on repeated items."""

import doctest
import math
import pathlib
import tracemalloc
import types

import numpy as np
import pytest
import sklearn.metrics

from robust_mm import evaluation
from robust_mm import modalities
from robust_mm.evaluation import shift_scores
from robust_mm.shift_study import job as job_lib
from robust_mm.shift_study import plan

ITEMS, K = 60, 4


def _made(seed=0):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(2, 3, ITEMS, K)).round(1)  # ties
  label = rng.integers(K, size=ITEMS)
  several = rng.random((ITEMS, K)) < 0.3
  weights = rng.multinomial(ITEMS, np.full(ITEMS, 1 / ITEMS), size=3)
  return logits, label, several, weights


def _by_hand(score, logits, label, weights):
  """scikit-learn, on items repeated as often as they were drawn."""
  rows = np.repeat(np.arange(len(weights)), weights)
  label, logits = label[rows], logits[rows]
  if score == "map":
    some = [k for k in range(K) if label[:, k].any()]
    return np.mean(
      [
        sklearn.metrics.average_precision_score(label[:, k], logits[:, k])
        for k in some
      ]
    )
  if score == "auroc":
    some = [k for k in range(K) if 0 < label[:, k].mean() < 1]
    return np.mean(
      [sklearn.metrics.roc_auc_score(label[:, k], logits[:, k]) for k in some]
    )
  guess = logits.argmax(axis=-1)
  if score == "macro_f1":
    return sklearn.metrics.f1_score(
      label, guess, average="macro", labels=np.unique(label), zero_division=0
    )
  if score == "balanced_accuracy":
    return sklearn.metrics.recall_score(
      label, guess, average="macro", labels=np.unique(label), zero_division=0
    )
  return sklearn.metrics.accuracy_score(label, guess)


@pytest.mark.parametrize("score", shift_scores.SCORES)
def test_scores_of_replicates_are_those_of_repeated_items(score):
  logits, label, several, weights = _made()
  label = several if score in shift_scores.MULTI_LABEL else label
  counted = np.ones((1, 3, ITEMS), bool)
  counted[:, 1, ::3] = False
  prepare = shift_scores.scorer(score, label, np.arange(ITEMS))
  found = prepare(logits, counted)(weights.astype(float))
  assert found.shape == (3, 2, 3)
  for (r, seed, pair), value in np.ndenumerate(found):
    drawn = weights[r] * counted[0, pair]
    expected = _by_hand(score, logits[seed, pair], label, drawn)
    np.testing.assert_allclose(value, expected, atol=1e-12)


@pytest.mark.parametrize("score", shift_scores.SCORES)
def test_a_cluster_is_drawn_whole(score):
  logits, label, several, _ = _made(1)
  label = several if score in shift_scores.MULTI_LABEL else label
  cluster = np.random.default_rng(2).permutation(np.arange(ITEMS) % 7)
  weights = np.array([[2, 0, 1, 3, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
  prepare = shift_scores.scorer(score, label, cluster)
  counted = np.ones((1, 1, ITEMS), bool)
  found = prepare(logits, counted)(weights.astype(float))
  for r, row in enumerate(weights):
    expected = _by_hand(score, logits[1, 2], label, row[cluster])
    np.testing.assert_allclose(found[r, 1, 2], expected, atol=1e-12)


@pytest.mark.parametrize("score", ["macro_f1", "map", "auroc"])
def test_scores_take_less_room_than_the_logits(score):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 7, 500, 40)).astype("f4")
  label = rng.integers(40, size=500)
  if score in shift_scores.MULTI_LABEL:
    label = rng.random((500, 40)) < 0.1
  prepare = shift_scores.scorer(score, label, np.arange(500))
  tracemalloc.start()
  prepare(logits, np.ones((1, 1, 500), bool))(np.ones((20, 500)))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < logits.nbytes / 2


def test_a_class_that_was_not_drawn_is_left_out():
  label = np.array([0, 0, 1, 2])
  logits = np.eye(3)[[0, 1, 1, 2]]
  weights = np.array([[2.0, 2.0, 0.0, 0.0]])
  for score, expected in (("macro_f1", 2 / 3), ("balanced_accuracy", 1 / 2)):
    run = shift_scores.scorer(score, label, np.arange(4))(
      logits, np.ones(4, bool)
    )
    np.testing.assert_allclose(run(weights), [expected])


@pytest.mark.parametrize("score", shift_scores.SCORES)
def test_reports_from_logits_count_nan_as_wrong(score):
  rng = np.random.default_rng(3)
  label = rng.integers(K, size=200)
  logits = np.eye(K)[label] + rng.normal(size=(1, 3, 3, 200, K)) * 0.7
  logits[:, 0, 0, :50, 1] = np.nan
  several = score in shift_scores.MULTI_LABEL
  given = np.eye(K, dtype=bool)[label] if several else label
  found = evaluation.shift_report(
    {"ft": logits},
    ["a", "b"],
    evaluation.chance_level(given, score=score),
    "ft",
    score=score,
    label=given,
    num_samples=60,
  )
  assert found.num_nan == {"ft": 50}
  assert "50 predictions with NaN count as wrong" in found.table()
  expected = _by_hand(score, logits[0, 1, 1], given, np.ones(200, int))
  np.testing.assert_allclose(found.matrix("ft")[1, 1], expected, atol=1e-12)
  # A quarter is lost, to what it was without the NaN.
  assert found.matrix("ft")[0, 0] < 0.85 * found.matrix("ft")[1, 1]
  if score == "accuracy":
    hits = np.nan_to_num(logits[0, 0, 0]).argmax(-1) == label
    assert found.matrix("ft")[0, 0] == hits[50:].sum() / 200
  draws = found.draws["ft"]["missing"]["performance"]
  assert draws.std() > 0.005  # computed again in every replicate


def test_items_without_a_modality_are_empty_and_no_nan():
  """NaN is what a model says of nothing: told from a bad one by present."""
  rng = np.random.default_rng(3)
  label = rng.integers(K, size=40)
  logits = np.eye(K, dtype=np.float32)[label] + np.zeros((2, 3, 3, 40, K), "f4")
  logits[:, :, 0, :10] = np.nan  # no a
  logits[0, 1, 2, 5:8, 1] = np.nan  # a+b, all there is
  logits[1, 0, 0, 15, 2] = np.nan
  logits[1, 0, 1, 3, :2] = [np.inf, -np.inf]  # no NaN
  present = {"a": np.arange(40) >= 10, "b": np.ones(40, bool)}
  options = {"score": "accuracy", "label": label, "num_samples": 2}
  found = evaluation.shift_report(
    {"ft": logits}, ["a", "b"], 0.25, "ft", present=present, **options
  )
  assert found.num_nan == {"ft": 4}
  assert found.num_empty == {"a": 10}
  np.testing.assert_allclose(found.scores["ft"][0, 1], [0.75, 1, 37 / 40])
  extra = {"a": logits[:, 0, 0], "b": logits[:, 1, 2]}
  found = evaluation.shift_report(
    {"ft": logits[:, 2:]},
    ["a", "b"],
    0.25,
    "ft",
    train_sets=["a+b"],
    matched={"ft": extra},
    present=present,
    **options,
  )
  assert found.num_nan == {"ft": 4}  # all of them in matched


def test_a_study_of_accuracy_counts_nan():
  rng = np.random.default_rng(0)
  train_sets = modalities.subsets(["a", "b"])
  label = rng.integers(K, size=30)
  present = {"a": np.arange(30) >= 10, "b": np.ones(30, bool)}
  study = plan.Study(
    config=types.SimpleNamespace(
      study=types.SimpleNamespace(
        methods=("finetune", "masd"), seeds=2, num_samples=2
      )
    ),
    folder=pathlib.Path(),
    names=("a", "b"),
    train_sets=train_sets,
    test_sets=train_sets,
    test={"label": label, "present": present},
    clusters=None,
    prior=np.zeros(K),
    score="accuracy",
  )
  logits = {
    job: np.stack([np.eye(K, dtype=np.float32)[label]] * 3)
    for job in study.jobs()
  }
  for said in logits.values():
    said[0, :10] = np.nan  # nothing of a
  logits["masd", 1, ("b",)][2, 20:25, 0] = np.nan
  job_lib._report(study, logits)
  assert set(logits) == set(study.jobs())
  report = job_lib._report(study, logits, free=True)
  assert not logits
  assert report.num_nan == {"finetune": 0, "masd": 5}
  assert report.num_empty == {"a": 10}
  np.testing.assert_allclose(report.scores["masd"][1, 1], [2 / 3, 1, 5 / 6])
  assert report.results["masd"].dtype == np.float32


def test_the_class_of_a_nan_is_none():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(50, 7, K)).astype("f4")
  logits[rng.random(logits.shape) < 0.1] = np.nan
  bad = np.isnan(logits).any(axis=-1)
  assert 0 < bad.mean() < 1
  expected = np.where(bad, -1, np.nan_to_num(logits, nan=-9).argmax(-1))
  np.testing.assert_array_equal(shift_scores.predictions(logits), expected)


def test_macro_f1_is_no_mean_over_items():
  """Its interval holds what resampled scikit-learn gives, replicate by one."""
  logits, label, _, _ = _made(4)
  logits = np.broadcast_to(logits[:1, :1], (1, 3, ITEMS, K))[:, :, None]
  logits = np.repeat(logits, 3, axis=2)
  found = evaluation.shift_report(
    {"ft": logits},
    ["a", "b"],
    0.25,
    "ft",
    score="macro_f1",
    label=label,
    num_samples=500,
  )
  rng = np.random.default_rng(5)
  drawn = [
    _by_hand(
      "macro_f1",
      logits[0, 0, 0],
      label,
      np.bincount(rng.integers(ITEMS, size=ITEMS), minlength=ITEMS),
    )
    for _ in range(300)
  ]
  draws = found.draws["ft"]["missing"]["performance"]
  np.testing.assert_allclose(draws.mean(), np.mean(drawn), atol=0.012)
  np.testing.assert_allclose(draws.std(), np.std(drawn), rtol=0.2)


def test_chance_levels():
  label = np.array([0] * 5 + [1] * 3 + [2] * 2)
  assert shift_scores.chance_level(label) == 0.5
  for score in ("balanced_accuracy", "macro_f1"):
    assert shift_scores.chance_level(label, score=score) == 1 / 3
    level = shift_scores.chance_level(label, score=score, num_classes=4)
    assert level == 0.25
  several = np.array([[1, 0], [1, 1], [0, 0], [0, 0]])
  found = shift_scores.chance_level(several, score="map")
  assert math.isclose(found, 3 / 8)


def test_random_scores_are_worth_no_more_than_chance_with_an_empty_class():
  rng = np.random.default_rng(0)
  label = rng.random((4000, 4)) < np.array([0.1, 0.2, 0.3, 0.0])
  sure = label + rng.normal(size=label.shape) * 0.3
  logits = np.stack([np.stack([sure] * 3)] * 3)[None]
  found = evaluation.shift_report(
    {"ft": logits, "random": rng.normal(size=logits.shape)},
    ["a", "b"],
    evaluation.chance_level(label, score="map"),
    "ft",
    score="map",
    label=label,
    num_samples=2,
  )
  assert math.isclose(found.chance, label[:, :3].mean())
  # A quarter less chance, that of all four, would leave 0.06.
  assert abs(found.estimate("random", "missing").value) < 0.01
  assert evaluation.chance_level(np.zeros((3, 2)), score="map") == 0.0


def test_bad_labels_are_refused_by_name():
  with pytest.raises(ValueError, match="label must be int"):
    shift_scores.chance_level(np.zeros((3, 2)))
  with pytest.raises(ValueError, match="label must be bool"):
    shift_scores.chance_level([0, 1], score="map")
  logits = np.zeros((1, 3, 3, 5, K))
  options = {"num_samples": 2}
  for label, score, message in (
    (np.zeros(4, int), "accuracy", "label has 4 items"),
    (np.full(5, 9), "accuracy", "label must lie in 0..3"),
    (np.zeros((5, 3), bool), "map", "label has 3 classes"),
  ):
    with pytest.raises(ValueError, match=message):
      evaluation.shift_report(
        {"ft": logits}, "ab", 0.1, "ft", score=score, label=label, **options
      )


def test_the_examples_hold():
  assert doctest.testmod(shift_scores) == (0, 1)
