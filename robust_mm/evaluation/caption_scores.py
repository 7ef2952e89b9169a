"""What captions are worth: words, whole captions, and how diverse they are."""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from robust_mm._types import Captions


def right(
  captions: Captions,
  ids: np.ndarray,
  classes: Mapping[str, np.ndarray],
  present: Mapping[str, np.ndarray],
  *,
  slots: Sequence[str] | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """``({m: bool[n]}, bool[n])``: whose words, and whose captions, are right.

  Args:
    captions: of the model.
    ids: ``[n, t]``, what it said.
    classes: ``{m: int[n]}``.
    present: ``{m: bool[n]}``.
    slots: those that count, the others being given; all by default.
  """
  slots = captions.slots if slots is None else tuple(slots)
  said = _words(captions, ids)
  found = {}
  for name in slots:
    place = captions.slots.index(name)
    meant = [
      captions.words[c] if here else captions.none
      for c, here in zip(classes[name], present[name])
    ]
    found[name] = np.array(
      [
        len(words) > place and words[place] == word
        for words, word in zip(said, meant)
      ]
    )
  # A word too many spoils no slot, but the whole.
  sizes = np.array([len(words) == len(captions.slots) for words in said])
  return found, np.all([found[name] for name in slots], axis=0) & sizes


def scores(
  captions: Captions,
  ids: np.ndarray,
  classes: Mapping[str, np.ndarray],
  present: Mapping[str, np.ndarray],
  *,
  slots: Sequence[str] | None = None,
) -> dict[str, Any]:
  """``{slots {m: share}, exact_match, distinct_1, distinct_2, entropy}``.

  ``distinct_n`` is the number of different sequences of n words over that of
  all; ``entropy`` that of whole captions, in bits. A model that says the same
  of everything scores low in both, whatever it says. Arguments are those of
  :func:`right`.
  """
  found, whole = right(captions, ids, classes, present, slots=slots)
  said = _words(captions, ids)
  # Words that were given say nothing of how diverse what is said is.
  places = [captions.slots.index(name) for name in found]
  if len(places) < len(captions.slots):
    said = [[words[i] for i in places if i < len(words)] for words in said]
  counts = collections.Counter(" ".join(words) for words in said)
  shares = np.array(list(counts.values())) / len(said)
  return {
    "slots": {name: float(np.mean(flag)) for name, flag in found.items()},
    "exact_match": float(np.mean(whole)),
    "distinct_1": distinct(said, 1),
    "distinct_2": distinct(said, 2),
    "entropy": float(-np.sum(shares * np.log2(shares)) + 0.0),
  }


def _words(captions: Captions, ids: np.ndarray) -> list[list[str]]:
  return [text.split(" ") for text in captions.texts(ids)]


def distinct(said: Sequence[Sequence[str]], number: int) -> float:
  """Different sequences of ``number`` words, as a share of all; 0 for none.

  >>> distinct([["one", "two"], ["one", "one"]], 1)
  0.5
  """
  grams = [
    tuple(words[i : i + number])
    for words in said
    for i in range(len(words) - number + 1)
  ]
  return len(set(grams)) / len(grams) if grams else 0.0
