"""Which modalities are missing, by protocol: masks made once and stored.

The missing rate is the share of absent cells,

.. math:: MR = 1 - \\frac{\\sum_i \\text{available}_i}{N M},

and every row keeps at least one modality, so it is at most
:math:`(M - 1) / M`: "0.7" with three modalities is 0.667, and every protocol
returns the rate it achieved. Masks are NumPy arrays on the host, drawn from a
seed alone, the same for every method that is compared. Each fits a batch:
``{**batch, "present": masks.present}`` with ``modalities.mask`` on the inputs.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from robust_mm import _validate
from robust_mm import modalities
from robust_mm._types import Inputs
from robust_mm._types import Present

# {rate: shares of batches that lose (two, one) of three modalities}.
PER_BATCH = {
  0.0: (0.0, 0.0),
  0.1: (0.1, 0.1),
  0.2: (0.2, 0.2),
  0.3: (0.3, 0.3),
  0.4: (0.5, 0.2),
  0.5: (0.7, 0.1),
  0.6: (0.9, 0.0),
  0.7: (1.0, 0.0),
}
GCNET_TOLERANCE = 0.005
_MAX_DRAWS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Masks:
  """What is there.

  Attributes:
    present: ``{m: bool[n]}``.
    rate: the missing rate achieved.
    seed: of the draw.
  """

  present: Mapping[str, np.ndarray]
  rate: float
  seed: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
  """The order in which cells get lost; to be stored with results.

  Attributes:
    names: the modalities, sorted.
    values: ``[n, m]``, lost from the smallest on: ``-inf`` where already
      absent, ``inf`` in the one cell of a row that is never lost.
    seed: of the draw.
  """

  names: tuple[str, ...]
  values: np.ndarray
  seed: int

  def __post_init__(self):
    shape = np.shape(self.values)
    if len(shape) != 2 or shape[1] != len(self.names):
      raise ValueError(
        f"values must be [n, {len(self.names)}], one column a modality, got "
        f"the shape {shape}."
      )


def fixed(present: Present) -> dict[str, dict[str, Any]]:
  """Protocol 1: every non-empty subset, the same for all rows.

  >>> fixed({"a": np.array([True]), "b": np.array([True])})["a"]["b"]
  array([False])

  Args:
    present: ``{m: bool[n]}`` of the data.

  Returns:
    ``{"a+b": {m: bool[n]}}``, small subsets first; report each, their mean and
    the worst.
  """
  names = _checked(present)
  return {
    modalities.subset_name(subset): {
      name: np.asarray(present[name]) & (name in subset) for name in names
    }
    for subset in modalities.subsets(names)
  }


def scores(
  names: Iterable[str],
  num_rows: int,
  *,
  seed: int,
  present: Present | None = None,
) -> Scores:
  """Draws the order in which :func:`per_sample` loses cells.

  One uniform modality of every row is protected, every other cell has a
  uniform score.

  Args:
    names: of the modalities.
    num_rows: n.
    seed: one for each split and repetition.
    present: ``{m: bool[n]}`` where data lack some already: these cells are lost
      first, and one of the others is protected.

  Raises:
    ValueError: naming ``names`` with fewer than two, or ``num_rows``.
  """
  names = _checked(names)
  _validate.at_least(1, num_rows=num_rows)
  rng = np.random.default_rng(seed)
  shape = num_rows, len(names)
  values, preference = rng.random(shape), rng.random(shape)
  if present is not None:
    there = np.stack([np.asarray(present[name]) for name in names], axis=-1)
    values = np.where(there, values, -np.inf)
    preference = np.where(there, preference, -1.0)
  rows = np.flatnonzero(preference.max(axis=-1) >= 0)
  values[rows, preference[rows].argmax(axis=-1)] = np.inf
  return Scores(names=names, values=values, seed=seed)


def per_sample(scores: Scores, rate: float, *, strict: bool = False) -> Masks:
  r"""Protocol 2, the default: random cells at an exact rate.

  The :math:`\mathrm{round}(MR\, N M)` cells of the lowest scores are lost, so
  masks of one seed are nested over rates, and no modality is preferred.

  >>> drawn = scores(["audio", "image"], 10, seed=0)
  >>> per_sample(drawn, 0.3).rate
  0.3
  >>> per_sample(drawn, 0.7).rate
  0.5

  Args:
    scores: of :func:`scores`.
    rate: MR; clipped to what is possible.
    strict: refuse a rate outside [0, (M-1)/M] instead.

  Raises:
    ValueError: naming ``rate`` if it is not finite, or outside and ``strict``.
  """
  rate = _rate(rate, len(scores.names), strict)
  flat = scores.values.ravel()
  droppable = int(np.sum(flat < np.inf))
  already = int(np.sum(flat == -np.inf))
  lost = min(max(round(rate * flat.size), already), droppable)
  there = np.ones(flat.size, bool)
  there[np.argsort(flat, kind="stable")[:lost]] = False
  return _masks(scores.names, there.reshape(scores.values.shape), scores.seed)


def per_batch(
  names: Iterable[str],
  num_rows: int,
  rate: float,
  *,
  seed: int,
  batch_size: int,
) -> Masks:
  """Protocol 3, legacy: whole batches lose two or one of three modalities.

  The published code of the DiCMoR and IMDer lineage. Not comparable with
  :func:`per_sample`; here for context only.

  Args:
    names: of three modalities.
    num_rows: n; batches are consecutive rows.
    rate: one of 0, 0.1, ..., 0.7 (0.7 gives 2/3).
    seed: of the draw.
    batch_size: rows in a batch.

  Raises:
    ValueError: naming ``names`` unless there are three, or ``rate``.
  """
  names = _checked(names)
  if len(names) != 3:
    raise ValueError(
      f"names must be three modalities in protocol 3, got {', '.join(names)}."
    )
  _validate.one_of(PER_BATCH, rate=rate)
  _validate.at_least(1, num_rows=num_rows, batch_size=batch_size)
  rng = np.random.default_rng(seed)
  num_batches = -(-num_rows // batch_size)
  two, one = PER_BATCH[rate]
  num_two = round(two * num_batches)
  num_some = min(num_two + round(one * num_batches), num_batches)
  order, there = rng.permutation(num_batches), np.ones((num_batches, 3), bool)
  for place, batch in enumerate(order[:num_some]):
    lost = rng.choice(3, size=2 if place < num_two else 1, replace=False)
    there[batch, lost] = False
  rows = np.arange(num_rows) // batch_size
  return _masks(names, there[rows], seed)


def one_kept(
  names: Iterable[str],
  num_rows: int,
  rate: float,
  *,
  seed: int,
  strict: bool = False,
) -> Masks:
  """Protocol 4, of GCNet and CPM-Net: one modality kept, others added.

  Every other cell is added with the one chance that gives the rate in the
  mean, and draws repeat until it is met within 0.005. (The published code
  rounds that chance to whole per cent, and may then never end; this one
  returns its best draw after 1000.) Use one rate for training and test.

  Args:
    names: of the modalities.
    num_rows: n.
    rate: MR; clipped to what is possible.
    seed: of the draw.
    strict: refuse a rate outside [0, (M-1)/M] instead.

  Raises:
    ValueError: naming ``names`` with fewer than two, ``num_rows`` or ``rate``.
  """
  names = _checked(names)
  _validate.at_least(1, num_rows=num_rows)
  count = len(names)
  rate = _rate(rate, count, strict)
  chance = ((1 - rate) * count - 1) / (count - 1)
  rng, best, nearest = np.random.default_rng(seed), None, math.inf
  for _ in range(_MAX_DRAWS):
    kept = rng.integers(count, size=num_rows)[:, None] == np.arange(count)
    there = kept | (rng.random((num_rows, count)) < chance)
    error = abs(1 - there.mean() - rate)
    if error < nearest:
      best, nearest = there, error
    if nearest < GCNET_TOLERANCE:
      break
  return _masks(names, best, seed)


def frames(
  lengths: Mapping[str, int], num_rows: int, rate: float, *, seed: int
) -> dict[str, np.ndarray]:
  """Protocol 5, of LNLN: every time step is lost with chance ``rate``.

  Nested over rates for one seed.

  Args:
    lengths: ``{m: t}``, frames or tokens of one input.
    num_rows: n.
    rate: in [0, 1].
    seed: of the draw.

  Returns:
    ``{m: bool[n, t]}``, True where kept, for :func:`drop_frames`.

  Raises:
    ValueError: naming ``rate``, ``num_rows`` or ``lengths``.
  """
  _validate.in_unit_interval(rate=rate)
  _validate.at_least(1, num_rows=num_rows)
  kept = {}
  for index, name in enumerate(modalities.names(lengths)):
    _validate.at_least(1, **{f"lengths[{name!r}]": lengths[name]})
    rng = np.random.default_rng([seed, index])
    kept[name] = rng.random((num_rows, lengths[name])) >= rate
  return kept


def drop_frames(
  inputs: Inputs,
  kept: Mapping[str, Any],
  *,
  unknown: Mapping[str, int] | None = None,
) -> dict[str, Any]:
  """Frames that are not kept become zeros, tokens the unknown token.

  Args:
    inputs: ``{m: [b, t, ...]}``.
    kept: ``{m: bool[b, t]}``; a modality that is not named is kept whole.
    unknown: ``{m: what a lost entry becomes}``, 0 where not named.
  """
  _validate.known(modalities.names(inputs), kept=kept, unknown=unknown or {})
  found = dict(inputs)
  for name, flag in kept.items():
    value = jnp.asarray(inputs[name])
    flag = jnp.reshape(flag, flag.shape + (1,) * (value.ndim - 2))
    fill = jnp.asarray((unknown or {}).get(name, 0), value.dtype)
    found[name] = jnp.where(flag, value, fill)
  return found


def achieved(present: Present) -> float:
  """The missing rate of ``{m: bool[n]}``."""
  cells = np.stack([np.asarray(present[m]) for m in modalities.names(present)])
  return float(np.sum(~cells) / cells.size)


def digest(masks: Mapping[str, np.ndarray]) -> str:
  """SHA-256 of masks, to see whether two results have lost the same.

  >>> one = per_sample(scores(("a", "b"), 9, seed=0), 0.3).present
  >>> digest(one) == digest(dict(reversed(one.items())))
  True

  Args:
    masks: ``{m: bool[n]}``, or ``bool[n, t]`` of :func:`frames`.
  """
  found = hashlib.sha256()
  for name in modalities.names(masks):
    flag = np.asarray(masks[name], bool)
    found.update(f"{name}{flag.shape}".encode())
    found.update(np.packbits(flag).tobytes())
  return found.hexdigest()


def check_protocol(
  protocol: str, names: Iterable[str], lengths: Mapping[str, int]
) -> None:
  """Refuses a protocol that the modalities do not fit.

  Args:
    protocol: the name of a function of this module.
    names: of the modalities.
    lengths: of those that have time (``corruptions.lengths``).

  Raises:
    ValueError: naming ``missing_protocol`` or ``missing_rates``.
  """
  names = modalities.names(names)
  if protocol == "frames":
    if not lengths:
      raise ValueError(
        "missing_protocol='frames' needs a modality with time: a sequence, a "
        "video or tokens."
      )
  elif len(names) < 2:
    raise ValueError("missing_rates needs at least two modalities.")
  elif protocol == "per_batch" and len(names) != 3:
    raise ValueError(
      f"missing_protocol='per_batch' needs three modalities, got "
      f"{', '.join(names)}."
    )


def _masks(names, there, seed) -> Masks:
  present = {name: there[:, i].copy() for i, name in enumerate(names)}
  return Masks(present=present, rate=achieved(present), seed=seed)


def _checked(names) -> tuple[str, ...]:
  names = modalities.names(names)
  if len(names) < 2:
    raise ValueError(
      f"names must be at least two modalities, got {', '.join(names)}."
    )
  return names


def _rate(rate: float, count: int, strict: bool) -> float:
  largest = (count - 1) / count
  if not math.isfinite(rate) or (strict and not 0 <= rate <= largest):
    raise ValueError(
      f"rate must lie in [0, {largest:.4g}] with {count} modalities, got "
      f"{rate}."
    )
  return min(max(rate, 0.0), largest)
