"""Batch transforms in numpy: values called with a batch, giving a batch."""

from collections.abc import Callable
from collections.abc import Sequence

import numpy as np

from robust_mm import _validate

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def missing_at_random(
  rate: float, seed: int, *, modalities: Sequence[str] | None = None
) -> Callable[[dict], dict]:
  r"""Marks each modality of an example as absent with probability ``rate``.

  The mask of an example depends on ``seed``, its ``id`` and the name of the
  modality alone: the same in every epoch, batch and process, whichever other
  modalities there are. An example keeps at least one modality, the one with
  the largest draw, so with :math:`M` modalities each is absent with
  probability :math:`rate - rate^M / M`.

  Args:
    rate: in [0, 1].
    seed: of the masks.
    modalities: which may go absent; all by default. The others stay, so then
      each of these is absent with probability ``rate`` exactly.

  Returns:
    ``transform(batch) -> batch``; absent inputs are zeros, and what was absent
    before stays so.
  """
  _validate.in_unit_interval(rate=rate)
  if modalities is not None:
    modalities = tuple(modalities)

  def transform(batch: dict) -> dict:
    names = sorted(batch["inputs"])
    chosen = names if modalities is None else modalities
    _validate.known(names, modalities=chosen)
    before = np.stack([batch["present"][name] for name in names], axis=1)
    draws = np.stack([_uniform(seed, name, batch["id"]) for name in names], 1)
    may_go = np.array([name in chosen for name in names])
    after = before & ((draws >= rate) | ~may_go)
    lost = ~after.any(axis=1) & before.any(axis=1)
    largest = np.argmax(np.where(before, draws, -1.0), axis=1)
    after[lost, largest[lost]] = True
    present = {name: after[:, i] for i, name in enumerate(names)}
    inputs = {
      name: np.where(
        _expand(present[name], values), values, values.dtype.type()
      )
      for name, values in batch["inputs"].items()
    }
    return {**batch, "inputs": inputs, "present": present}

  return transform


def keep_only(modalities: Sequence[str]) -> Callable[[dict], dict]:
  """Marks all other modalities as absent; their inputs are zeros.

  Args:
    modalities: that stay as they are; those that a batch does not have are
      refused.
  """
  kept = tuple(modalities)

  def transform(batch: dict) -> dict:
    _validate.known(sorted(batch["inputs"]), modalities=kept)
    gone = [name for name in batch["inputs"] if name not in kept]
    return {
      **batch,
      "inputs": {
        **batch["inputs"],
        **{name: np.zeros_like(batch["inputs"][name]) for name in gone},
      },
      "present": {
        **batch["present"],
        **{name: np.zeros_like(batch["present"][name]) for name in gone},
      },
    }

  return transform


def _expand(flags: np.ndarray, like: np.ndarray) -> np.ndarray:
  return flags.reshape(flags.shape + (1,) * (like.ndim - 1))


def _uniform(seed: int, name: str, ids: np.ndarray) -> np.ndarray:
  """float64 in [0, 1) per id: SplitMix64 of seed, name and id."""
  state = np.array([seed % 2**64], np.uint64)
  for byte in name.encode():
    state = _scramble(state + np.uint64(byte) + _GOLDEN)
  mixed = _scramble(state + (ids.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
  return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _scramble(state: np.ndarray) -> np.ndarray:
  state = (state ^ (state >> np.uint64(30))) * _MIX[0]
  state = (state ^ (state >> np.uint64(27))) * _MIX[1]
  return state ^ (state >> np.uint64(31))
