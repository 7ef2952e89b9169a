"""Refuses parts of a configuration; ``config`` calls it for all of them."""

import re
from typing import Any

from robust_mm import _validate


def check_smoothing(settings: Any) -> None:
  """``config.evaluation.smoothing``."""
  path = "config.evaluation.smoothing"
  _validate.non_negative(**{f"{path}.sigma": settings.sigma})
  _validate.at_least(
    1,
    **{
      f"{path}.num_selection": settings.num_selection,
      f"{path}.num_estimation": settings.num_estimation,
      f"{path}.chunk_size": settings.chunk_size,
      **{f"{path}.keep.{name}": k for name, k in settings.keep.items()},
    },
  )
  if not 0 < settings.alpha < 1:
    raise _validate.UserError(
      f"{path}.alpha must lie in (0, 1), got {settings.alpha}."
    )


def check_rules(rules: Any) -> None:
  """``config.mesh.rules``."""
  for rule in rules:
    if (
      not isinstance(rule, (tuple, list))
      or len(rule) != 2
      or not isinstance(rule[0], str)
      or not isinstance(rule[1], (tuple, list))
    ):
      raise _validate.UserError(
        f"config.mesh.rules must look like (('.*kernel', ('data', None)),), "
        f"got the rule {rule!r}."
      )
    try:
      re.compile(rule[0])
    except re.error as error:
      raise _validate.UserError(
        f"config.mesh.rules: {rule[0]!r} is no regular expression: {error}."
      ) from error


def check_shifts(settings: Any) -> None:
  """``config.evaluation.missing_rates`` and ``corruptions``."""
  path = "config.evaluation"
  for rate in settings.missing_rates:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
      raise _validate.UserError(
        f"{path}.missing_rates must be numbers such as 0.1,0.5; got {rate!r}."
      )
    _validate.in_unit_interval(**{f"{path}.missing_rates": rate})
  _validate.one_of(
    ("none", "suite"), **{f"{path}.corruptions": settings.corruptions}
  )
