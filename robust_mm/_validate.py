"""Refuse early, by name: one clear sentence for a static bad argument.

Every function takes keyword arguments ``name=value`` and raises ValueError
naming the argument. Traced arrays pass through: their edge cases are
documented where they are used.
"""

import contextlib
import difflib
import math
import numbers
from collections.abc import Iterable
from collections.abc import Mapping


class UserError(ValueError):
  """A user's mistake; the command line prints it and exits with 2."""


@contextlib.contextmanager
def user_errors():
  """Inside, a refusal of the library is a user's mistake."""
  try:
    yield
  except UserError:
    raise
  except ValueError as error:
    raise UserError(str(error)) from error


def _static(value) -> bool:
  # A traced array has an abstract value; jax itself is not imported here, so
  # that the command line can answer a mistake without it.
  return not hasattr(value, "aval") or not hasattr(value, "_trace")


def _number(value):
  # Inside a trace even a constant array would compare to a traced one.
  return value.__array__() if hasattr(value, "__array__") else value


def positive(**arguments) -> None:
  """``x must be positive and finite, got 0.0.``"""
  for name, value in arguments.items():
    if _static(value) and not (_number(value) > 0 and math.isfinite(value)):
      raise ValueError(f"{name} must be positive and finite, got {value}.")


def non_negative(**arguments) -> None:
  """``x must be non-negative and finite, got -1.0.``"""
  for name, value in arguments.items():
    if _static(value) and not (_number(value) >= 0 and math.isfinite(value)):
      raise ValueError(f"{name} must be non-negative and finite, got {value}.")


def at_least(minimum: int, **arguments) -> None:
  """``x must be an integer of at least 1, got 0.``"""
  for name, value in arguments.items():
    if isinstance(value, bool) or int(value) != value or value < minimum:
      raise ValueError(
        f"{name} must be an integer of at least {minimum}, got {value}."
      )


def whole_up_to(maximum: int, **arguments) -> None:
  """``x must be an integer in 0..2, got 1.0.``"""
  for name, value in arguments.items():
    whole = isinstance(value, numbers.Integral)
    if not (whole and 0 <= value <= maximum):
      raise ValueError(
        f"{name} must be an integer in 0..{maximum}, got {value!r}."
      )


def batch(value) -> None:
  """A batch is a mapping with ``inputs``, a mapping of arrays."""
  if not isinstance(value, Mapping):
    raise ValueError(
      "batch needs inputs: {'inputs': {modality: array [b, ...]}}; got "
      f"{kind(value)}."
    )
  if "inputs" not in value:
    raise ValueError(
      "batch needs inputs: {'inputs': {modality: array [b, ...]}}; got a dict "
      f"of {', '.join(map(repr, value)) or 'nothing'}."
    )
  if not isinstance(value["inputs"], Mapping):
    raise ValueError(
      "batch['inputs'] must map modalities to arrays [b, ...]; got "
      f"{kind(value['inputs'])}."
    )


def kind(value) -> str:
  """What a value is, in words: ``the function f``, ``the class C``, ``a C``."""
  name = type(value).__name__
  if isinstance(value, type):
    return f"the class {value.__name__}"
  if name in ("function", "builtin_function_or_method", "method"):
    return f"the function {value.__name__}"
  return f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


def in_unit_interval(**arguments) -> None:
  """``x must lie in [0, 1], got 2.0.``"""
  for name, value in arguments.items():
    if _static(value) and not 0 <= _number(value) <= 1:
      raise ValueError(f"{name} must lie in [0, 1], got {value}.")


def below_one(**arguments) -> None:
  """``x must lie in [0, 1), got 1.0.``"""
  for name, value in arguments.items():
    if _static(value) and not 0 <= _number(value) < 1:
      raise ValueError(f"{name} must lie in [0, 1), got {value}.")


def one_of(choices: Iterable, **arguments) -> None:
  """``x must be one of 'a', 'b', got 'c'. Did you mean 'a'?``"""
  choices = tuple(choices)
  for name, value in arguments.items():
    if value not in choices:
      listed = ", ".join(repr(choice) for choice in choices)
      raise ValueError(
        f"{name} must be one of {listed}; got {value!r}."
        f"{suggestion(value, choices)}"
      )


def known(names: Iterable[str], **arguments) -> None:
  """Every key of a mapping or sequence of names must be in ``names``."""
  names = tuple(names)
  for argument, given in arguments.items():
    for name in given:
      if name not in names:
        raise ValueError(
          f"{argument} names the unknown modality {name!r}; known are "
          f"{', '.join(names)}.{suggestion(name, names)}"
        )


def counted(number: int, word: str) -> str:
  """``1 seed``, ``3 seeds``."""
  return f"{number} {word}{'' if number == 1 else 's'}"


def suggestion(value, choices: Iterable) -> str:
  """`` Did you mean 'x'?`` for the closest choice, or an empty string."""
  close = difflib.get_close_matches(str(value), [str(c) for c in choices], 1)
  return f" Did you mean {close[0]!r}?" if close else ""
