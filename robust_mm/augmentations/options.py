"""The options of every operation and what they may be; no jax in here."""

import math
import numbers
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

from robust_mm import _validate

AXES = ("x", "y", "z")
PER = ("example", "axis", "channel")
WHERE = ("foreground", "everywhere")
_REQUIRED = object()


class Option(NamedTuple):
  """One option of an operation.

  Attributes:
    check: ``check(**{key: value})`` raises ValueError naming the key.
    default: where it is not given; ``_REQUIRED`` for none.
    idle: the value at which a strength does nothing; None where the option is
      no strength.
  """

  check: Callable[..., None]
  default: Any = _REQUIRED
  idle: float | None = None


def check(settings: Any, path: str) -> dict[str, dict[str, dict[str, Any]]]:
  """``{modality: {operation: {option: value}}}``, complete and in order.

  Args:
    settings: the same, with options at their defaults left out.
    path: the key that sentences begin with, such as ``config.augmentation``.

  Raises:
    ValueError: one sentence naming the key that is wrong.
  """
  _group(settings, path, "{'image': {'noise': {'deviation': 0.1}}}")
  return {
    modality: _operations(chosen, f"{path}.{modality}")
    for modality, chosen in settings.items()
  }


def _operations(chosen, path):
  _group(chosen, path, "{'noise': {'deviation': 0.1}}")
  _known(chosen, KINDS, path, "operation")
  return {
    kind: complete(kind, chosen[kind], f"{path}.{kind}")
    for kind in KINDS
    if kind in chosen
  }


def complete(kind: str, given: Any, path: str) -> dict[str, Any]:
  """All options of an operation, checked; ``path`` is the operation's key."""
  options = KINDS[kind]
  first = next(iter(options))
  _group(given, path, f"{{{first!r}: 1.0}}")
  _known(given, options, path, "option")
  found = {}
  for name, option in options.items():
    value = given.get(name, option.default)
    if value is _REQUIRED:
      raise ValueError(f"{path}.{name} is missing.")
    option.check(**{f"{path}.{name}": value})
    # Equal values make equal, and equally hashed, augmentations.
    is_float = option.idle is not None
    found[name] = float(value) if is_float else value
  return found


def idle(kind: str, chosen: Mapping[str, Any]) -> bool:
  """Whether every strength is at the value at which it does nothing."""
  options = KINDS[kind].items()
  return all(
    chosen[n] == option.idle for n, option in options if option.idle is not None
  )


def _group(value, path, example) -> None:
  if not isinstance(value, Mapping):
    raise ValueError(f"{path} must be a group such as {example}, got {value}.")


def _known(given, choices, path, what) -> None:
  for name in given:
    if name not in choices:
      raise ValueError(
        f"{path}.{name} is no known {what}; known here: {', '.join(choices)}."
        f"{_validate.suggestion(name, choices)}"
      )


def _number(key, value) -> None:
  if isinstance(value, bool) or not isinstance(value, numbers.Real):
    raise ValueError(f"{key} must be a number, got {value!r}.")


def _non_negative(**arguments) -> None:
  for key, value in arguments.items():
    _number(key, value)
  _validate.non_negative(**arguments)


def _factor(**arguments) -> None:
  for key, value in arguments.items():
    _number(key, value)
    if not (value >= 1 and math.isfinite(value)):
      raise ValueError(f"{key} must be at least 1 and finite, got {value}.")


def _share(**arguments) -> None:
  for key, value in arguments.items():
    _number(key, value)
  _validate.in_unit_interval(**arguments)


def _count(**arguments) -> None:
  for key, value in arguments.items():
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
      raise ValueError(f"{key} must be an integer, got {value!r}.")
  _validate.at_least(1, **arguments)


def _one_of(*choices) -> Callable[..., None]:
  def check_one(**arguments):
    _validate.one_of(choices, **arguments)

  return check_one


_STRENGTH = Option(_non_negative, idle=0.0)
_NONE = Option(_non_negative, default=0.0, idle=0.0)

# In the order in which they are applied.
KINDS: dict[str, dict[str, Option]] = {
  "warp_time": {"scale": Option(_factor, 1.0, idle=1.0), "shift": _NONE},
  "rotate": {
    "angle": _STRENGTH,
    "axis": Option(_one_of(None, *AXES), None),
    "groups": Option(_count, 1),
  },
  "scale": {"deviation": _STRENGTH, "per": Option(_one_of(*PER), PER[0])},
  "move": {"scale": _NONE, "shift": _NONE},
  "brighten": {
    "deviation": _STRENGTH,
    "where": Option(_one_of(*WHERE), WHERE[0]),
  },
  "erase": {"share": Option(_share, idle=0.0)},
  "noise": {"deviation": _STRENGTH},
}
