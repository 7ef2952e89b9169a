"""Captions of what the modalities show, spelled letter by letter.

A caption has a word for every modality, in sorted order, with a space between
them and an end: "seven three". A modality that is absent has the word "none".
Everything about them is a table made once, so that spelling works under jit.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven",
          "eight", "nine")  # fmt: skip
NONE = "none"
PAD, END, SPACE = 0, 1, 2
_MARKS = ("", ".", " ")  # of the ids above
_MOST = 100_000


@dataclasses.dataclass(frozen=True)
class Speller:
  """Classes to letters and back.

  Attributes:
    slots: the modalities, sorted.
    words: one a class; different, of lower-case letters.
  """

  slots: tuple[str, ...]
  words: tuple[str, ...]

  def __post_init__(self):
    for word in self.words:
      if not (word.isalpha() and word.islower()):
        raise ValueError(f"words must be of lower-case letters, got {word!r}.")
    if len({*self.words, NONE}) <= len(self.words):
      raise ValueError(
        f"words must be different and none of them {NONE!r}, got {self.words}."
      )
    number = (len(self.words) + 1) ** len(self.slots)
    if number > _MOST:
      raise ValueError(
        f"words: {len(self.words)} words for {len(self.slots)} modalities make "
        f"{number} captions; at most {_MOST} are spelled."
      )

  @property
  def vocabulary(self) -> tuple[str, ...]:
    """Padding, the end, a space, then the letters."""
    return (*_MARKS, *sorted(set("".join((*self.words, NONE)))))

  @property
  def length(self) -> int:
    """Tokens of the longest caption, its end included."""
    return self.table.shape[1]

  @property
  def table(self) -> np.ndarray:
    """``[(k + 1)^M, t]`` ids, the first modality's class changing slowest."""
    return _table(self)

  def spell(
    self, classes: Mapping[str, Array], present: Mapping[str, Array]
  ) -> Array:
    """Token ids ``[b, t]``, padded.

    Args:
      classes: ``{m: int[b]}``.
      present: ``{m: bool[b]}``.
    """
    none = len(self.words)
    index = 0
    for name in self.slots:
      chosen = jnp.where(present[name], classes[name], none)
      index = index * (none + 1) + chosen
    return jnp.asarray(self.table)[index]

  def texts(self, ids) -> list[str]:
    """What token ids ``[b, t]`` say, up to their end."""
    vocabulary = self.vocabulary
    found = []
    for row in np.asarray(ids):
      ends = np.flatnonzero(row == END)
      row = row[: ends[0]] if len(ends) else row
      found.append("".join(vocabulary[i] for i in row))
    return found

  def ids(self, text: str) -> np.ndarray:
    """The padded ids ``[t]`` of a sentence.

    Raises:
      ValueError: too long, or another letter.
    """
    vocabulary = self.vocabulary
    for letter in text:
      if letter not in vocabulary[SPACE:]:
        raise ValueError(
          f"text must be of the letters {''.join(vocabulary[SPACE + 1 :])} and "
          f"spaces, got {text!r}."
        )
    if len(text) >= self.length:
      raise ValueError(
        f"text must have fewer than {self.length} letters, got {text!r}."
      )
    found = np.full(self.length, PAD, np.int32)
    found[: len(text)] = [vocabulary.index(letter) for letter in text]
    found[len(text)] = END
    return found


@functools.lru_cache(maxsize=16)
def _table(speller: Speller) -> np.ndarray:
  vocabulary = speller.vocabulary
  every = itertools.product((*speller.words, NONE), repeat=len(speller.slots))
  rows = [
    [*(vocabulary.index(letter) for letter in " ".join(words)), END]
    for words in every
  ]
  table = np.full((len(rows), max(map(len, rows))), PAD, np.int32)
  for row, ids in zip(table, rows):
    row[: len(ids)] = ids
  return table


def words_for(num_classes: int, words: Sequence[str] = ()) -> tuple[str, ...]:
  """The words given, or those of digits.

  Raises:
    ValueError: not one a class.
  """
  chosen = tuple(words) or DIGITS[:num_classes]
  if len(chosen) != num_classes:
    raise ValueError(
      f"words must name {num_classes} classes, got {len(chosen)}: "
      f"{', '.join(chosen)}."
    )
  return chosen
