"""Kinds of shift, their pairs, and random subsets against their laws."""

import collections
import doctest

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies as st

from robust_mm import modalities
from robust_mm.modalities import sets

SWAPPED = {"missing": "added", "added": "missing"}


@pytest.mark.parametrize("n", range(1, 7))
def test_pairs_of_every_kind_are_as_many_as_the_closed_forms(n):
  names = "abcdef"[:n]
  strict = 3**n - 2 ** (n + 1) + 1
  expected = {
    "matched": 2**n - 1,
    "missing": strict,
    "added": strict,
    "transfer": strict,
    "mixed": 4**n - 3 ** (n + 1) + 3 * 2**n - 1,
  }
  every = modalities.shift_pairs(names)
  found = {kind: modalities.shift_pairs(names, kind) for kind in expected}
  assert {kind: len(pairs) for kind, pairs in found.items()} == expected
  # A partition: all of them together are every pair, once.
  together = [pair for pairs in found.values() for pair in pairs]
  assert sorted(together) == sorted(every)
  assert len(set(every)) == len(every) == (2**n - 1) ** 2


def test_the_table_of_the_specification():
  table = {2: (3, 2, 2, 2, 0), 3: (7, 12, 12, 12, 6), 4: (15, 50, 50, 50, 60)}
  table[6] = (63, 602, 602, 602, 2100)
  for n, row in table.items():
    pairs = modalities.shift_pairs("abcdef"[:n])
    count = collections.Counter(modalities.shift(*pair) for pair in pairs)
    assert tuple(count[kind] for kind in modalities.SHIFTS) == row


SUBSETS = st.frozensets(st.sampled_from("abcde"), min_size=1)


@hypothesis.given(SUBSETS, SUBSETS)
def test_a_kind_is_what_its_condition_says_and_swaps(train, test):
  kind = modalities.shift(train, test)
  holds = {
    "matched": train == test,
    "missing": test < train,
    "added": train < test,
    "transfer": not train & test,
    "mixed": bool(train & test and train - test and test - train),
  }
  assert [name for name, true in holds.items() if true] == [kind]
  assert modalities.shift(test, train) == SWAPPED.get(kind, kind)


def test_a_string_is_one_name_or_several_joined():
  assert modalities.shift("audio", "image") == "transfer"
  assert modalities.shift("audio+image", ["image"]) == "missing"


@pytest.mark.parametrize(
  "call, argument",
  [
    (lambda: modalities.shift([], "a"), "train"),
    (lambda: modalities.shift("a", ()), "test"),
    (lambda: modalities.shift(["a", "a"], "a"), "train"),
    (lambda: modalities.shift_pairs([]), "names"),
    (lambda: modalities.shift_pairs(["a", "b", "a"]), "names"),
    (lambda: modalities.shift_pairs("ab", "lost"), "kind"),
    (lambda: modalities.subsets(["a", "a"]), "modalities"),
  ],
)
def test_bad_sets_are_refused_by_name(call, argument):
  with pytest.raises(ValueError, match=f"^{argument} "):
    call()


def test_the_examples_hold():
  assert doctest.testmod(sets) == (0, 5)


NAMES = ("a", "b", "c")
DRAWS = 20_000


DRAW = jax.jit(
  modalities.sample_subsets,
  static_argnames=("labelled", "distribution", "include_labelled"),
)


def _drawn(present, labelled, distribution, **options):
  """How often every subset was drawn for rows that are all alike."""
  full = {m: jnp.full(DRAWS, m in present) for m in NAMES}
  found = DRAW(jax.random.key(7), full, labelled, distribution, **options)
  matrix = np.stack([np.asarray(found[m]) for m in NAMES], axis=-1)
  rows = ["".join(m for m, there in zip(NAMES, row) if there) for row in matrix]
  return collections.Counter(rows)


def _p_value(count, law):
  expected = np.array(list(law.values())) * DRAWS
  found = [count[subset] for subset in law]
  return scipy.stats.chisquare(found, expected).pvalue


UNIFORM = dict.fromkeys(["b", "c", "ab", "ac", "bc", "abc"], 1 / 6)
SIZE_FIRST = {
  **dict.fromkeys(["b", "c"], 1 / 6),
  **dict.fromkeys(["ab", "ac", "bc"], 1 / 9),
  "abc": 1 / 3,
}
LEAVE_ONE_OUT = dict.fromkeys(["ab", "ac", "bc"], 1 / 3)
LAWS = {
  "uniform": UNIFORM,
  "size_first": SIZE_FIRST,
  "leave_one_out": LEAVE_ONE_OUT,
}


@pytest.mark.parametrize("distribution", LAWS)
def test_draws_follow_their_law_and_no_other(distribution):
  count = _drawn("abc", "a", distribution)
  assert set(count) <= set(LAWS[distribution])
  assert _p_value(count, LAWS[distribution]) > 1e-3
  others = {"uniform": "size_first", "size_first": "uniform"}
  if distribution in others:
    assert _p_value(count, LAWS[others[distribution]]) < 1e-6


@pytest.mark.parametrize("distribution", LAWS)
def test_neither_the_labelled_set_nor_an_absent_modality_is_drawn(distribution):
  patterns = [set(subset) for subset in modalities.subsets(NAMES)] * 400
  present = {m: jnp.array([m in row for row in patterns]) for m in NAMES}
  for labelled in ("a", "a+b"):
    found = DRAW(jax.random.key(5), present, labelled, distribution)
    rows = np.stack([np.asarray(found[m]) for m in NAMES], axis=-1)
    for there, row in zip(patterns, rows):
      drawn = {m for m, flag in zip(NAMES, row) if flag}
      assert drawn <= there
      assert not drawn or drawn != there & set(labelled.split("+"))
    assert rows.any()


def test_what_an_item_lacks_leaves_the_law_of_the_rest():
  law = dict.fromkeys(["b", "ab"], 1 / 2)
  assert _p_value(_drawn("ab", "a", "uniform"), law) > 1e-3
  # Of T = ab the item has b alone; b is where its teacher looks.
  assert set(_drawn("bc", "a+b", "uniform")) == {"c", "bc"}


def test_the_labelled_set_is_drawn_where_asked_for():
  law = dict.fromkeys([*UNIFORM, "a"], 1 / 7)
  count = _drawn("abc", "a", "uniform", include_labelled=True)
  assert _p_value(count, law) > 1e-3


def test_a_row_without_an_allowed_subset_gets_none_in_any_company():
  present = {"a": jnp.array([True, False, True]), "b": jnp.array([False] * 3)}
  found = modalities.sample_subsets(jax.random.key(0), present, ["a"])
  assert not np.any([found["a"], found["b"]])
  present["b"] = jnp.array([True, False, False])
  for seed in range(20):
    found = DRAW(jax.random.key(seed), present, "a")
    assert np.asarray(found["a"] | found["b"]).tolist() == [True, False, False]


def test_other_presence_is_no_other_program():
  traced = []

  @jax.jit
  def draw(key, present):
    traced.append(1)
    return modalities.sample_subsets(key, present, ("a",))

  for flag in (True, False):
    draw(jax.random.key(0), {"a": jnp.array([True]), "b": jnp.array([flag])})
  assert len(traced) == 1


@pytest.mark.parametrize(
  "labelled, distribution, message",
  [
    ([], "uniform", "labelled must name"),
    (["a", "a"], "uniform", "labelled has the modality 'a' twice"),
    (["d"], "uniform", "labelled names the unknown modality 'd'"),
    (["a"], "unifrom", "distribution must be one of .*Did you mean 'uniform'"),
  ],
)
def test_bad_draws_are_refused_by_name(labelled, distribution, message):
  present = {"a": jnp.array([True]), "b": jnp.array([True])}
  with pytest.raises(ValueError, match=message):
    modalities.sample_subsets(
      jax.random.key(0), present, labelled, distribution
    )
