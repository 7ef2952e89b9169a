"""Modality votes against brute force over all attacks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import smoothing
from robust_mm.smoothing import votes as votes_lib

NAMES = ("a", "b", "c", "d", "e")
NUM_CLASSES = 3


def certificate(votes, keep, names=NAMES):
  subsets = tuple(itertools.combinations(names, keep))
  return votes_lib.from_votes(
    votes,
    noise=smoothing.modality_votes(keep=keep),
    num_classes=NUM_CLASSES,
    subsets=subsets,
    present={name: np.ones(len(votes), bool) for name in names},
  )


def stays(votes, subsets, attacked):
  """Whether no choice of votes of the touched subsets moves the winner."""
  counts = np.bincount([v for v in votes if v >= 0], minlength=NUM_CLASSES)
  winner = int(np.argmax(counts))
  if (counts == counts[winner]).sum() > 1 or not counts[winner]:
    return False
  touched = [i for i, s in enumerate(subsets) if set(s) & set(attacked)]
  for answers in itertools.product(range(NUM_CLASSES), repeat=len(touched)):
    changed = list(votes)
    for index, answer in zip(touched, answers):
      changed[index] = answer
    after = np.bincount([v for v in changed if v >= 0], minlength=NUM_CLASSES)
    # The winner must win alone: a tie is no certificate.
    if any(after[winner] <= after[j] for j in {0, 1, 2} - {winner}):
      return False
  return True


@pytest.mark.parametrize("keep, most, own", [(1, 2, 0.8), (2, 1, 0.65)])
def test_vote_rule_is_brute_force(keep, most, own):
  subsets = tuple(itertools.combinations(NAMES, keep))
  random = np.random.default_rng(keep)
  votes = random.choice(
    [0, 1, 2, -1], p=[own, 0.94 - own, 0.04, 0.02], size=(80, len(subsets))
  )
  found = certificate(votes, keep)
  for size in range(most + 1):
    wanted = [
      all(stays(row, subsets, a) for a in itertools.combinations(NAMES, size))
      for row in votes
    ]
    held = found.covers({}, max_replaced=size)
    np.testing.assert_array_equal(held, wanted)
    assert 0 < np.mean(held) < 1, "the case decides nothing"
  named = found.covers({"b": 1.0})
  wanted = [stays(row, subsets, ("b",)) for row in votes]
  np.testing.assert_array_equal(named, wanted)
  np.testing.assert_array_equal(found.modality_radius["b"] > 0, wanted)
  np.testing.assert_array_equal(
    found.radius >= 1, found.covers({}, max_replaced=1)
  )


def test_exact_tie_is_never_certified():
  votes = np.array([[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
  found = certificate(votes, 1, NAMES[:4])
  assert found.prediction.tolist() == [-1, 0, 0]
  assert found.covers({}).tolist() == [False, True, True]
  # 2 untouched votes against 1 + 1, and 3 against 0 + 1.
  assert found.covers({}, max_replaced=1).tolist() == [False, False, True]
  assert found.radius.tolist() == [0, 0, 1]


def test_absent_modality_cannot_be_attacked_and_only_present_ones_vote():
  def predict(inputs, present):
    del present
    return jnp.concatenate([inputs["a"] + inputs["b"], 0 * inputs["a"]], -1)

  batch = {
    "inputs": {"a": np.ones((3, 1)), "b": np.ones((3, 1))},
    "present": {
      "a": np.array([True, True, False]),
      "b": np.array([True, False, False]),
    },
  }
  batch["inputs"]["b"][1] = np.nan  # absent
  found = smoothing.certify(
    predict, batch, smoothing.modality_votes(keep=1), jax.random.key(0)
  )
  assert found.votes.tolist() == [[0, 0], [0, -1], [-1, -1]]
  assert found.prediction.tolist() == [0, 0, -1]
  assert found.valid.tolist() == [True, True, False]
  assert found.covers({"b": np.inf}).tolist() == [False, True, False]
  assert found.covers({"a": np.inf}).tolist() == [False, False, False]
  assert found.alpha == 0
  assert found.kind == "certified"


@pytest.mark.parametrize(
  "call, words",
  [
    (lambda c: c.covers({"f": 1}), "budgets names the unknown modality 'f'"),
    (lambda c: c.covers({"a": -1}), r"budgets\['a'\]"),
    (lambda c: c.covers({}, max_replaced=6), "max_replaced"),
    (lambda c: smoothing.modality_votes(keep=0), "keep"),
  ],
)
def test_bad_input_is_named(call, words):
  with pytest.raises(ValueError, match=words):
    call(certificate(np.zeros((1, 5), int), 1))


def test_more_modalities_than_there_are_cannot_be_kept():
  batch = {"inputs": {"a": np.ones((1, 1))}}
  with pytest.raises(ValueError, match="keep must be at most 1"):
    smoothing.certify(
      lambda inputs, present: inputs["a"],
      batch,
      smoothing.modality_votes(keep=2),
      jax.random.key(0),
    )
