"""Names of modalities, sets of them, and what a shift of the set is."""

import itertools
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from robust_mm import _validate

SHIFTS = ("matched", "missing", "added", "transfer", "mixed")


def names(mapping: Iterable[str]) -> tuple[str, ...]:
  """Modality names in the one order everything is stacked in: sorted.

  Pytree maps return dicts sorted by key while models may build them in another
  order, so nothing in the project relies on insertion order.
  """
  return tuple(sorted(mapping))


def subsets(
  modalities: Iterable[str], *, min_size: int = 1
) -> tuple[tuple[str, ...], ...]:
  """All subsets with at least ``min_size`` modalities, small ones first.

  >>> subsets(["b", "a"])
  (('a',), ('b',), ('a', 'b'))

  Raises:
    ValueError: naming ``modalities`` if one is there twice.
  """
  ordered = _distinct("modalities", names(modalities))
  return tuple(
    subset
    for size in range(min_size, len(ordered) + 1)
    for subset in itertools.combinations(ordered, size)
  )


def availability_sets(
  modalities: Iterable[str], *, most: int = 6
) -> tuple[tuple[str, ...], ...]:
  """What a model is asked to do without: every non-empty subset.

  Of more than ``most`` modalities only each alone, all but each, and all.

  >>> len(availability_sets("abcdef")), len(availability_sets("abcdefg"))
  (63, 15)
  """
  ordered = names(modalities)
  if len(ordered) <= most:
    return subsets(ordered)
  return tuple(
    s
    for k in (1, len(ordered) - 1, len(ordered))
    for s in itertools.combinations(ordered, k)
  )


def subset_name(subset: Iterable[str]) -> str:
  """The name of a subset in reports and files: ``"left+right"``."""
  return "+".join(names(subset))


def check_sizes(
  argument: str, sizes: Any, known: tuple[str, ...], shape: tuple[int, ...]
) -> None:
  """ValueError unless ``{m: size}`` has numbers, one or one an example.

  Args:
    argument: what the sentence calls them.
    sizes: that were given.
    known: modalities.
    shape: of one number an example, ``[b]``.
  """
  if not isinstance(sizes, Mapping):
    raise ValueError(
      f"{argument} must map modalities to sizes, such as "
      f"{{{known[0]!r}: 0.1}}; got {sizes!r}."
    )
  _validate.known(known, **{argument: sizes})
  for name, size in sizes.items():
    value = size if hasattr(size, "dtype") else np.asarray(size)
    label = f"{argument}[{name!r}]"
    if not jnp.issubdtype(value.dtype, jnp.number):
      raise ValueError(f"{label} must be a number, got {size!r}.")
    if value.shape not in ((), shape):
      raise ValueError(
        f"{label} must be one number, or one for each example of shape "
        f"{shape}; got shape {value.shape}."
      )


def as_subset(given: Iterable[str], *, argument: str) -> tuple[str, ...]:
  """A non-empty set of modalities as it stands everywhere: sorted.

  >>> as_subset("image+audio", argument="train")
  ('audio', 'image')

  Args:
    given: names, or one string of them joined by ``+``.
    argument: what the sentence calls them.

  Raises:
    ValueError: naming ``argument`` if it is empty or has a name twice.
  """
  given = given.split("+") if isinstance(given, str) else given
  subset = names(name for name in given if name)
  if not subset:
    raise ValueError(f"{argument} must name at least one modality, got none.")
  return _distinct(argument, subset)


def shift(train: Iterable[str], test: Iterable[str]) -> str:
  r"""What happens to the set of modalities between training and test.

  ========  ==========================================
  matched   E = T
  missing   E strictly inside T: sensors fail
  added     T strictly inside E: sensors are added
  transfer  no modality in common: sensors are replaced
  mixed     some in common, neither inside the other
  ========  ==========================================

  Swapping T and E swaps missing and added and leaves the others.

  >>> shift(["image", "audio"], ["audio"]), shift("image", "image+text")
  ('missing', 'added')

  Args:
    train: T, names of the modalities that had labels, or ``"a+b"``.
    test: E, of those there are at test time.

  Returns:
    one of :data:`SHIFTS`.

  Raises:
    ValueError: naming ``train`` or ``test`` if it is empty or has a name twice.

  References:
    `McKinzie et al. (2023) <https://arxiv.org/abs/2304.04385>`_; "mixed" is
    what their vocabulary leaves out.
  """
  first = frozenset(as_subset(train, argument="train"))
  second = frozenset(as_subset(test, argument="test"))
  if first == second:
    return "matched"
  if second < first:
    return "missing"
  if first < second:
    return "added"
  return "mixed" if first & second else "transfer"


def shift_pairs(
  names: Iterable[str], kind: str | None = None
) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
  r"""Every ordered pair of sets (T, E), or those of one kind of shift.

  Of n modalities :math:`2^n - 1` are matched, :math:`3^n - 2^{n + 1} + 1` each
  missing, added and transfer, :math:`4^n - 3^{n + 1} + 3 \cdot 2^n - 1` mixed.

  >>> shift_pairs(["b", "a"], "transfer")
  ((('a',), ('b',)), (('b',), ('a',)))

  Args:
    names: of all modalities.
    kind: one of :data:`SHIFTS`; None for all pairs.

  Returns:
    ``((T, E), ...)``, T and then E in the order of :func:`subsets`.

  Raises:
    ValueError: naming ``names`` if it is empty or has a name twice, or
      ``kind``.
  """
  if kind is not None:
    _validate.one_of(SHIFTS, kind=kind)
  every = subsets(as_subset(list(names), argument="names"))
  return tuple(
    (train, test)
    for train, test in itertools.product(every, every)
    if kind is None or shift(train, test) == kind
  )


def _distinct(argument: str, ordered: tuple[str, ...]) -> tuple[str, ...]:
  for name, following in itertools.pairwise(ordered):
    if name == following:
      raise ValueError(f"{argument} has the modality {name!r} twice.")
  return ordered
