"""Modality votes: an exact certificate against replaced modalities."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from robust_mm import _validate
from robust_mm import modalities
from robust_mm.smoothing import noise as noise_lib


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VoteCertificate:
  """Which modalities may be replaced by anything before the vote can turn.

  Every choice of ``noise.keep`` modalities has one vote. Nothing is drawn:

  Formal guarantees:
    - Replacing the covered modalities by any arrays does not change
      ``prediction``, the class with the most votes. A tie is never certified.
    - Nothing about the base classifier on all modalities at once, or about
      correctness.

  Attributes:
    prediction: int32 ``[b]``; -1, abstention, for a tie, or without any
      vote, as with nothing present.
    votes: int32 ``[b, s]`` class of each subset, -1 for none.
    counts: int32 ``[b, k]``.
    subsets: the s subsets.
    valid: bool ``[b]``, False with nothing present.
    present: ``{m: bool[b]}``.
    noise: the ``Votes``.
  """

  prediction: Any
  votes: Any
  counts: Any
  subsets: tuple[tuple[str, ...], ...]
  valid: Any
  present: Any
  noise: noise_lib.Votes

  alpha = 0.0
  kind = "certified"

  @property
  def modalities(self) -> tuple[str, ...]:
    """Sorted names."""
    return modalities.names(self.present)

  def __repr__(self) -> str:
    return (
      f"VoteCertificate({self.noise}, modalities={self.modalities}, "
      f"shape={self.prediction.shape})"
    )

  @property
  def radius(self) -> np.ndarray:
    """float32 ``[b]``: how many modalities, whichever, may be replaced.

    0 for an abstention.
    """
    found = np.zeros(len(self.prediction), np.float32)
    for size in range(1, len(self.modalities) + 1):
      found = np.where(self.covers({}, max_replaced=size), size, found)
    return found.astype(np.float32)

  @property
  def modality_radius(self) -> dict[str, np.ndarray]:
    """``{m: float32 [b]}``: ``+inf`` where m may be replaced, else 0.

    An absent modality cannot be replaced: ``+inf`` unless it abstains.
    """
    return {
      name: np.where(self.covers({name: np.inf}), np.inf, 0).astype(np.float32)
      for name in self.modalities
    }

  def covers(
    self, budgets: Mapping[str, Any], *, max_replaced: int = 0
  ) -> np.ndarray:
    """Whether the vote survives these replacements, all at once.

    For every attacked set A and every other class j: votes for the prediction
    from subsets that do not touch A > votes for j that do not + subsets that
    touch A. Integers, so ties are exact.

    Args:
      budgets: ``{m: size}``, scalars or ``[b]``; whatever is not 0 counts as a
        replacement of m by anything.
      max_replaced: any so many present modalities besides.

    Returns:
      bool ``[b]``.

    Raises:
      ValueError: an unknown modality, a negative or NaN budget,
        ``max_replaced`` out of range.
    """
    names = self.modalities
    modalities.check_sizes("budgets", budgets, names, np.shape(self.prediction))
    _validate.whole_up_to(len(names), max_replaced=max_replaced)
    named = np.zeros((len(self.prediction), len(names)), bool)
    for name, size in budgets.items():
      if not np.all(np.asarray(size) >= 0):
        raise ValueError(f"budgets[{name!r}] must be non-negative, got {size}.")
      named[:, names.index(name)] = np.asarray(size) > 0
    held = self.prediction >= 0
    # More attacked modalities are never better, so only full sets count.
    for others in itertools.combinations(range(len(names)), max_replaced):
      attacked = named.copy()
      attacked[:, list(others)] = True
      held &= self._survives(attacked)
    return held

  def _survives(self, attacked: np.ndarray) -> np.ndarray:
    """bool ``[b]`` for one attacked set ``bool [b, m]`` an example."""
    here = np.stack([self.present[name] for name in self.modalities], axis=-1)
    inside = np.array(
      [[name in subset for name in self.modalities] for subset in self.subsets]
    )
    # An absent modality cannot be attacked.
    touched = ((attacked & here)[:, None] & inside[None]).any(axis=-1)
    number = self.counts.shape[-1]
    safe = _tally(np.where(touched, -1, self.votes), number)
    own = np.take_along_axis(safe, np.maximum(self.prediction, 0)[:, None], 1)
    rivals = np.arange(number)[None] != self.prediction[:, None]
    lost = touched.sum(axis=-1)[:, None]
    return np.all((own > safe + lost) | ~rivals, axis=-1)


def from_votes(
  votes, *, noise: noise_lib.Votes, num_classes: int, subsets, present
) -> VoteCertificate:
  """The certificate of the votes int ``[b, s]`` of ``subsets``."""
  votes = np.asarray(votes, np.int32)
  present = {name: np.asarray(flag, bool) for name, flag in present.items()}
  counts = _tally(votes, num_classes)
  most = counts.max(axis=-1)
  alone = (counts == most[:, None]).sum(axis=-1) == 1
  prediction = np.where(alone & (most > 0), np.argmax(counts, axis=-1), -1)
  return VoteCertificate(
    prediction=prediction.astype(np.int32),
    votes=votes,
    counts=counts,
    subsets=tuple(subsets),
    valid=np.any(list(present.values()), axis=0),
    present=present,
    noise=noise,
  )


def _tally(votes: np.ndarray, num_classes: int) -> np.ndarray:
  hits = votes[..., None] == np.arange(num_classes)
  return hits.sum(axis=1, dtype=np.int32)
