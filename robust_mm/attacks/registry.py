"""Attacks by name, for configs and reports."""

from typing import Any

from robust_mm import _validate
from robust_mm.attacks import base
from robust_mm.attacks import gradient

ATTACKS = {"fgm": gradient.fgm, "pgd": gradient.pgd}


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
