"""Reports of modality shift: hand-computed views, bootstrap, refusals."""

import json
import math

import numpy as np
import pytest
from evaluation_shift_results import CHANCE
from evaluation_shift_results import METHOD
from evaluation_shift_results import REFERENCE
from evaluation_shift_results import N
from evaluation_shift_results import report_of
from evaluation_shift_results import right

from robust_mm import modalities
from robust_mm.evaluation import shift
from robust_mm.evaluation import shift_statistics


@pytest.fixture(scope="module")
def made():
  results = {"ft": right(REFERENCE), "masd": right(METHOD)}
  results["chance"] = right(np.full((3, 3), CHANCE))
  return report_of(results)


# Missing, added and transfer together.
SHIFTED = [0.56, 0.64, 0.62, 0.70, 0.40, 0.35]
MATCHED = [0.60, 0.70, 0.80, 0.80, 0.70, 0.60]
BY_HAND = {
  "shifted": {
    "performance": sum(SHIFTED) / 6,
    "worst": 0.35,
    "relative": (0.36 / 0.4 + 0.44 / 0.5 + 0.92 / 0.6 + 0.2 / 0.5 + 0.15 / 0.4)
    / 6,
    "pooled": (sum(SHIFTED) - 1.2) / (sum(MATCHED) - 1.2),
    "relative_raw": sum(s / r for s, r in zip(SHIFTED, MATCHED)) / 6,
    "pooled_raw": sum(SHIFTED) / sum(MATCHED),
    "drop": ((0.78 - 0.56) + (0.78 - 0.64)) / 2,
    "gain": ((0.62 - 0.58) + (0.70 - 0.66)) / 2,
  },
  "matched": {
    "performance": (0.58 + 0.66 + 0.78) / 3,
    "worst": 0.58,
    "relative": (0.38 / 0.4 + 0.46 / 0.5 + 0.58 / 0.6) / 3,
    "pooled": (0.38 + 0.46 + 0.58) / (0.4 + 0.5 + 0.6),
    "relative_raw": (0.58 / 0.6 + 0.66 / 0.7 + 0.78 / 0.8) / 3,
    "pooled_raw": (0.58 + 0.66 + 0.78) / (0.6 + 0.7 + 0.8),
  },
  "missing": {
    "performance": (0.56 + 0.64) / 2,
    "worst": 0.56,
    "relative": (0.36 / 0.4 + 0.44 / 0.5) / 2,
    "pooled": (0.36 + 0.44) / (0.4 + 0.5),
    "relative_raw": (0.56 / 0.6 + 0.64 / 0.7) / 2,
    "pooled_raw": (0.56 + 0.64) / (0.6 + 0.7),
    "drop": ((0.78 - 0.56) + (0.78 - 0.64)) / 2,
  },
  "added": {
    "performance": (0.62 + 0.70) / 2,
    "worst": 0.62,
    "relative": (0.42 / 0.6 + 0.50 / 0.6) / 2,
    "pooled": (0.42 + 0.50) / (0.6 + 0.6),
    "relative_raw": (0.62 / 0.8 + 0.70 / 0.8) / 2,
    "pooled_raw": (0.62 + 0.70) / (0.8 + 0.8),
    "gain": ((0.62 - 0.58) + (0.70 - 0.66)) / 2,
  },
  "transfer": {
    "performance": (0.40 + 0.35) / 2,
    "worst": 0.35,
    "relative": (0.20 / 0.5 + 0.15 / 0.4) / 2,
    "pooled": (0.20 + 0.15) / (0.5 + 0.4),
    "relative_raw": (0.40 / 0.7 + 0.35 / 0.6) / 2,
    "pooled_raw": (0.40 + 0.35) / (0.7 + 0.6),
  },
}


def test_aggregates_of_a_hand_made_matrix(made):
  np.testing.assert_allclose(made.matrix("masd"), METHOD, atol=1e-12)
  for kind, row in BY_HAND.items():
    for statistic in shift_statistics.STATISTICS:
      found = made.estimate("masd", kind, statistic).value
      expected = row.get(statistic, math.nan)
      np.testing.assert_allclose(found, expected, atol=1e-12, err_msg=statistic)
  assert made.num_pairs == {
    "shifted": 6,
    "matched": 3,
    "missing": 2,
    "added": 2,
    "transfer": 2,
    "mixed": 0,
  }
  assert math.isnan(made.estimate("masd", "mixed").value)


def test_chance_is_worth_0_and_the_reference_1(made):
  for kind in ("matched", "missing", "added", "transfer"):
    for statistic in ("relative", "pooled"):
      assert abs(made.estimate("chance", kind, statistic).value) < 1e-12
  for statistic in ("relative", "pooled", "relative_raw", "pooled_raw"):
    assert abs(made.estimate("ft", "matched", statistic).value - 1) < 1e-12
  ratios = made.ratios("ft")
  np.testing.assert_allclose(np.diag(ratios), 1, atol=1e-12)
  expected = (np.array(METHOD) - 0.2) / np.array([0.4, 0.5, 0.6])
  np.testing.assert_allclose(made.ratios("masd"), expected, atol=1e-12)


def test_improvements_in_every_form_with_and_without_chance(made):
  # Transfer of the reference: .30 and .25.
  expected = {
    ("pooled", True): (0.35 / 0.9) / (0.15 / 0.9),
    ("pooled", False): 0.75 / 0.55,
    ("performance", True): 0.175 / 0.075,
    ("performance", False): 0.375 / 0.275,
    ("worst", True): 0.15 / 0.05,
    ("worst", False): 0.35 / 0.25,
    ("relative", True): 0.3875 / ((0.1 / 0.5 + 0.05 / 0.4) / 2),
  }
  for (form, corrected), value in expected.items():
    found = made.improvement(
      "masd", "ft", "transfer", form, corrected=corrected
    )
    np.testing.assert_allclose(found.value, value, atol=1e-12)
    assert found.low <= value <= found.high
  # At chance there is nothing to be a multiple of; without it there is.
  assert math.isnan(made.improvement("masd", "chance", "missing").value)
  found = made.improvement(
    "masd", "chance", "missing", "pooled", corrected=False
  )
  np.testing.assert_allclose(found.value, 0.6 / 0.2, atol=1e-12)


def test_the_headline_pools_every_shifted_pair(made):
  """Improvement over all of missing, added and transfer, paired."""
  below = [0.50, 0.60, 0.55, 0.65, 0.30, 0.25]  # of the reference
  found = made.improvement("masd", "ft")
  expected = (sum(SHIFTED) - 1.2) / (sum(below) - 1.2)
  np.testing.assert_allclose(found.value, expected, atol=1e-12)
  assert found.low < expected < found.high
  inside = [made.draws[m]["shifted"]["pooled"] for m in ("masd", "ft")]
  np.testing.assert_allclose(
    found[1:3], np.quantile(inside[0] / inside[1], [0.025, 0.975])
  )
  # Its interval is that of all pairs together, not of one kind.
  alone = made.improvement("masd", "ft", "transfer")
  assert alone.high - alone.low > found.high - found.low
  stored = made.to_dict()["against_reference"]["masd"]["shifted"]
  stored = stored["improvement"]["pooled"]["corrected"]["value"]
  np.testing.assert_allclose(stored, expected, atol=1e-12)
  lines = [line.split() for line in made.table().splitlines()]
  kinds = [line[0] for line in lines if line and line[0] in made.categories]
  assert kinds[:2] == ["shifted", "matched"]


def test_own_reference_flatters_who_spoils_the_matched_score():
  spoiled = np.array(REFERENCE)
  np.fill_diagonal(spoiled, [0.45, 0.5, 0.62])
  results = {"ft": right(REFERENCE), "spoiled": right(spoiled)}
  fixed, own = report_of(results), report_of(results, reference="own")
  first = [r.estimate("spoiled", "missing").value for r in (fixed, own)]
  np.testing.assert_allclose(first[0], 0.7 / 0.9, atol=1e-12)
  np.testing.assert_allclose(first[1], 0.7 / (0.25 + 0.3), atol=1e-12)
  assert first[1] > 1 > first[0]


def test_published_is_the_mean_of_ratios_to_the_own_score():
  results = {"ft": right(REFERENCE), "masd": right(METHOD)}
  found = report_of(results, fidelity="published")
  kinds = ("shifted", "matched", "missing", "added", "transfer")
  assert found.categories == kinds
  assert found.reference == "own"
  expected = (0.56 / 0.58 + 0.64 / 0.66) / 2
  np.testing.assert_allclose(
    found.estimate("masd", "missing").value, expected, atol=1e-12
  )
  own = (0.50 / 0.60 + 0.60 / 0.70) / 2
  np.testing.assert_allclose(
    found.improvement("masd", "ft", "missing").value, expected / own, atol=1e-12
  )
  np.testing.assert_allclose(
    found.ratios("masd"), np.array(METHOD) / [[0.58, 0.66, 0.78]], atol=1e-12
  )
  with pytest.raises(ValueError, match="kind must be one of"):
    found.estimate("masd", "mixed")


def test_a_reference_near_chance_has_no_ratio_but_stays_pooled():
  weak = np.array(REFERENCE)
  weak[0, 0] = 0.22  # standard error .013: less than two above .2
  found = report_of({"ft": right(weak), "masd": right(METHOD)})
  ratios = found.ratios("masd")
  assert np.isnan(ratios[:, 0]).all()
  assert not np.isnan(ratios[:, 1:]).any()
  assert found.num_undefined["masd"] == {
    "shifted": 2,
    "matched": 1,
    "missing": 1,
    "added": 0,
    "transfer": 1,
    "mixed": 0,
  }
  missing = found.estimate("masd", "missing", "relative")
  np.testing.assert_allclose(missing.value, 0.44 / 0.5, atol=1e-12)
  pooled = found.estimate("masd", "missing")
  np.testing.assert_allclose(pooled.value, 0.8 / 0.52, atol=1e-12)
  assert np.isfinite(pooled).all()
  weak[0, 0] = 0.24  # now it is three
  assert report_of({"ft": right(weak)}).num_undefined["ft"]["missing"] == 0


def test_all_pairs_of_a_study_with_few_train_sets():
  """T named, E all: the reference beyond the rows comes from ``matched``."""
  names = ("a", "b", "c")
  every = modalities.subsets(names)
  rng = np.random.default_rng(0)
  results = {"ft": rng.random((2, 2, 7, 300)) < 0.6}
  options = {"names": names, "train_sets": ["c", "a+b"]}
  with pytest.raises(ValueError, match="reference has no matched score of"):
    report_of(results, **options)
  extra = {
    e: rng.random((2, 300)) < 0.7
    for e in every
    if e not in {("c",), ("a", "b")}
  }
  found = report_of(results, matched={"ft": extra}, **options)
  assert found.num_pairs == {
    "shifted": 10,
    "matched": 2,
    "missing": 2,
    "added": 4,
    "transfer": 4,
    "mixed": 2,
  }
  for column, subset in enumerate(every):
    own = extra.get(subset)
    if own is None:
      own = results["ft"][:, [("c",), ("a", "b")].index(subset), column]
    np.testing.assert_allclose(found.matched["ft"][column], own.mean())
  few = report_of(
    {"ft": results["ft"][:, :, [2, 3]]}, test_sets=["c", "a+b"], **options
  )
  assert few.num_pairs["transfer"] == 2


def test_items_without_any_of_a_set_are_counted_or_left_out():
  present = {"a": np.arange(N) % 4 > 0, "b": np.ones(N, bool)}
  results = {"ft": right(REFERENCE)}
  results["ft"][:, :, 0] = present["a"] & (np.arange(N) % 2 == 1)
  kept = report_of(results, present=present)
  assert kept.num_empty == {"a": 250}
  assert kept.matrix("ft")[0, 0] == 0.5
  left = report_of(results, present=present, skip_empty=True)
  np.testing.assert_allclose(left.matrix("ft")[0, 0], 500 / 750)
  np.testing.assert_allclose(left.matrix("ft")[0, 1], 0.3)
  assert "250 items have nothing of a; kept" in kept.table()
  assert "left out" in left.table()


def test_json_and_text_hold_the_matrix_and_both_ratios(made):
  found = json.loads(made.to_json())
  masd = found["methods"]["masd"]
  np.testing.assert_allclose(masd["matrix"], METHOD)
  assert masd["strengths"] == pytest.approx({"a": 0.58, "b": 0.66})
  transfer = masd["aggregates"]["transfer"]
  assert transfer["pooled"]["value"] == pytest.approx(0.35 / 0.9)
  assert transfer["drop"]["value"] is None
  against = found["against_reference"]["masd"]["transfer"]["improvement"]
  assert against["worst"]["corrected"]["value"] == pytest.approx(3.0)
  assert found["chance"] == CHANCE
  text = made.table()
  lines = [line.split() for line in text.splitlines()]
  assert ["a", "0.580", "0.400", "0.620"] in lines  # trained on a
  (row,) = [
    line
    for line in text[
      text.index("masd\n") : text.index("chance\nkind")
    ].splitlines()
    if line.startswith("transfer")
  ]
  for number in ("0.375", "0.350", "0.389", "0.388"):
    assert f"{number} [" in row
  assert "mixed" not in text  # there are none of two modalities


def _bad(**options):
  results = options.pop("results", {"ft": right(REFERENCE, 20)})
  return lambda: report_of(results, **options)


@pytest.mark.parametrize(
  "call, message",
  [
    (_bad(names=[]), "names must name at least one"),
    (_bad(names=["a", "a"]), "names has the modality 'a' twice"),
    (_bad(train_sets=[]), "train_sets must hold at least one"),
    (_bad(train_sets=[[]]), "train_sets must name at least one modality"),
    (_bad(test_sets=["a", "d"]), "test_sets names the unknown modality 'd'"),
    (_bad(test_sets=["a", "a"]), "test_sets has 'a' twice"),
    (_bad(test_sets=["a"]), "test_sets lacks 'b'"),
    (_bad(reference="mads"), "reference must be one of 'own', 'ft'"),
    (_bad(chance=1.5), "chance must lie in"),
    (_bad(score="f1"), "score must be one of"),
    (_bad(score="macro_f1"), "label is None"),
    (_bad(fidelity="paper"), "fidelity must be one of"),
    (_bad(level=1.0), "level must lie in"),
    (_bad(num_samples=1), "num_samples must be an integer of at least 2"),
    (_bad(clusters=[1, 2]), "clusters must be"),
    (_bad(present={"a": np.ones(20)}), "present lacks the modality 'b'"),
    (_bad(results={}), "results must map methods"),
    (_bad(results={"ft": np.zeros((1, 3, 2, 5))}), r"results\['ft'\] must be"),
    (
      _bad(results={"ft": np.full((1, 3, 3, 5), np.nan)}),
      r"results\['ft'\] must be right or not",
    ),
    (
      _bad(results={"ft": np.zeros((1, 3, 3, 5)), "x": np.zeros((2, 3, 3, 5))}),
      r"results\['x'\] must have seeds and items",
    ),
    (_bad(results={"own": np.zeros((1, 3, 3, 5))}), "may not name .* 'own'"),
    (_bad(matched={"no": {}}), "matched must be one of"),
    (_bad(matched={"ft": {"a": [1]}}), "matched.* must be of a test set"),
  ],
)
def test_bad_arguments_are_refused_by_name(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_bad_questions_are_refused_by_name(made):
  for call, word in (
    (lambda: made.estimate("mads", "missing"), "method"),
    (lambda: made.estimate("masd", "lost"), "kind"),
    (lambda: made.estimate("masd", "missing", "mean"), "statistic"),
    (lambda: made.improvement("masd", "ft", "missing", "ratio"), "form"),
  ):
    with pytest.raises(ValueError, match=f"{word} must be one of"):
      call()
  assert isinstance(made, shift.ShiftReport)
