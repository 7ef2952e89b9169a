"""Attacks by name, for configs and reports."""

import inspect
from typing import Any

from robust_mm import _validate
from robust_mm.attacks import ascent
from robust_mm.attacks import base
from robust_mm.attacks import boundaries
from robust_mm.attacks import ensemble
from robust_mm.attacks import gradient
from robust_mm.attacks import queries

ATTACKS = {
  "apgd": ascent.apgd,
  "auto": ensemble.auto,
  "fgm": gradient.fgm,
  "minimum_norm": boundaries.minimum_norm,
  "pgd": gradient.pgd,
  "square": queries.square,
}


def names() -> tuple[str, ...]:
  """The names :func:`make` knows."""
  return tuple(sorted(ATTACKS))


def make(name: str, **arguments: Any) -> base.Attack:
  """The attack called ``name``, made with its factory's arguments.

  >>> make("pgd", norm=2, budget=0.5, num_steps=20).settings["num_steps"]
  20

  Raises:
    ValueError: an unknown name, or a bad value.
    TypeError: an argument that attack does not have.
  """
  _validate.one_of(names(), name=name)
  return ATTACKS[name](**arguments)


def arguments(name: str) -> frozenset[str]:
  """The keyword arguments of the attack called ``name``.

  >>> "num_queries" in arguments("pgd")
  False
  """
  _validate.one_of(names(), name=name)
  return frozenset(inspect.signature(ATTACKS[name]).parameters)
