"""A batch attacked member by member, each on what is left of it."""

import dataclasses
import functools
import math
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from robust_mm.attacks import base
from robust_mm.attacks import budgets
from robust_mm.attacks import measures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """What :func:`attack_survivors` found, as NumPy arrays.

  Attributes:
    inputs: ``{m: [b, ...]}``: where an example is broken the point that did
      it, elsewhere the clean input.
    robust: ``bool[b]``, right when clean and not broken; an upper bound of the
      truth.
    broken_by: ``int[b]``, the number of the member in ``members``; -1 where
      the example is robust, -2 where it is wrong when clean.
    members: ``{name: {"tried", "broken"}}``, numbers of examples, in the order
      they were tried.
  """

  inputs: Any
  robust: Any
  broken_by: Any
  members: Any

  @property
  def robust_accuracy(self) -> float:
    """The share that is robust."""
    return float(np.mean(self.robust))


def attack_survivors(
  key: Any,
  attack: base.Attack,
  logits_fn: Callable[[Mapping[str, Any]], Any],
  inputs: Mapping[str, Any],
  label: Any,
  *,
  present: Mapping[str, Any] | None = None,
  budget: Any = None,
) -> Outcome:
  """Runs the members of an ensemble, each on the survivors of the ones before.

  Drives the device from the host, so it is not for use under ``jit``. The
  survivors are padded to one of a few sizes (:func:`sizes`); a member compiles
  once for each size it meets, and not again for other budgets, keys or
  batches of the same size as long as ``logits_fn`` is the same object.

  >>> attack = attacks.auto(norm=2, budget=0.5)           # doctest: +SKIP
  >>> found = attacks.attack_survivors(
  ...   key, attack, logits_fn, inputs, label)            # doctest: +SKIP
  >>> found.robust_accuracy, found.members                # doctest: +SKIP

  Args:
    key: a JAX key.
    attack: an ensemble, or any attack, which then counts as its one member.
    logits_fn: from :func:`attacks.logits_fn`, or a function ``{m: [r, ...]} ->
      [r, k]`` of any number of rows, each for itself.
    inputs: ``{m: [b, ...]}``.
    label: int ``[b]``.
    present: as for :class:`attacks.Attack`.
    budget: likewise.

  Returns:
    An :class:`Outcome`.

  Raises:
    ValueError: as the attack; a range with a row for each example.
  """
  members = attack.members or {attack.name: attack}
  budget = attack.budget if budget is None else budget
  _check(attack, logits_fn, inputs, label, present, budget)
  batch = {
    "inputs": {m: np.asarray(x) for m, x in inputs.items()},
    "label": np.asarray(label),
    "present": {m: np.asarray(x) for m, x in (present or {}).items()},
  }
  size = len(batch["label"])
  fn = _traceable(logits_fn)
  right = np.asarray(_right(fn, inputs, label))
  found = {m: x.copy() for m, x in batch["inputs"].items()}
  broken_by = np.where(right, -1, -2)
  counts = {}
  for number, (name, member) in enumerate(members.items()):
    rows = np.flatnonzero(broken_by == -1)
    counts[name] = {"tried": len(rows), "broken": 0}
    if not len(rows):
      continue
    # The padding repeats the last row.
    padded = rows[
      np.arange(padded_size(len(rows), size)).clip(max=len(rows) - 1)
    ]
    moved, survived = _attacked(
      jax.random.fold_in(key, number),
      member,
      _rows(fn, padded),
      jax.tree.map(lambda x, rows=padded: x[rows], batch),
      _taken(budget, padded),
    )
    lost = ~np.asarray(survived)[: len(rows)]
    broken_by[rows[lost]] = number
    counts[name]["broken"] = int(lost.sum())
    for m, x in found.items():
      x[rows[lost]] = np.asarray(moved[m])[: len(rows)][lost]
  return Outcome(
    inputs=found, robust=broken_by == -1, broken_by=broken_by, members=counts
  )


def sizes(size: int) -> list[int]:
  """What survivors of ``size`` examples are padded to, the largest first.

  >>> sizes(360)
  [360, 270, 180, 135, 90, 68, 45, 34, 23, 17, 12, 9]
  """
  shares = (share / 2**i for i in range(6) for share in (1, 0.75))
  return sorted({math.ceil(size * share) for share in shares}, reverse=True)


def padded_size(number: int, size: int) -> int:
  """The smallest of :func:`sizes` that holds ``number`` rows."""
  return min(s for s in sizes(size) if s >= number)


@functools.partial(jax.jit, static_argnums=1)
def _attacked(key, member, logits_fn, batch, budget):
  inputs, label = batch["inputs"], batch["label"]
  moved = member(
    key, logits_fn, inputs, label, present=batch["present"], budget=budget
  )
  return moved, measures.right(logits_fn(moved), label)


@jax.jit
def _right(logits_fn, inputs, label):
  return measures.right(logits_fn(inputs), label)


def _traceable(logits_fn):
  """A pytree: arrays it knows are data, so new ones compile nothing."""
  if isinstance(logits_fn, measures.LogitsFn):
    return logits_fn
  return jax.tree_util.Partial(logits_fn)


def _rows(logits_fn, rows):
  known = isinstance(logits_fn, measures.LogitsFn)
  return logits_fn.take(rows) if known else logits_fn


def _taken(budget, rows):
  if isinstance(budget, Mapping):
    return {m: _taken(value, rows) for m, value in budget.items()}
  budget = np.asarray(budget, np.float32)
  return budget[rows] if budget.ndim else budget


def _check(attack, logits_fn, inputs, label, present, budget):
  # Here values are known; under jit a bad one would count as zero.
  base.checked_label(label, logits_fn, inputs)
  budgets.region(
    inputs,
    budget,
    norm=attack.norm,
    units=attack.units,
    valid_range=attack.valid_range,
    present=present,
  )
  valid_range = attack.valid_range
  if not isinstance(valid_range, Mapping):
    valid_range = dict.fromkeys(inputs, valid_range)
  for m, x in inputs.items():
    for end in valid_range.get(m) or ():
      if np.ndim(end) == np.ndim(x) and len(end) == len(x) > 1:
        raise ValueError(
          f"valid_range of {m!r} has a row for each example, which survivors "
          "cannot be taken from; call the attack itself."
        )
