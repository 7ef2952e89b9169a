"""From what a user writes, budgets, units and ranges, to a region."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import _validate
from robust_mm import modalities
from robust_mm.attacks import balls

NORMS = {"l2": "l2", "linf": "linf", 2: "l2", jnp.inf: "linf", "inf": "linf"}


def norm_name(norm: Any) -> str:
  """``"l2"`` or ``"linf"`` from 2, infinity or a name."""
  _validate.one_of(NORMS, norm=norm)
  return NORMS[norm]


def check_budget(budget: Any) -> None:
  """Refuses a negative, non-finite or mis-shaped budget by name."""
  named = budget if isinstance(budget, Mapping) else {None: budget}
  for name, value in named.items():
    label = "budget" if name is None else f"budget[{name!r}]"
    if value is None or isinstance(value, (str, bool)):
      raise ValueError(f"{label} must be a number, got {value!r}.")
    if np.ndim(value) > 1:
      raise ValueError(
        f"{label} must be a scalar or one number per example [b], got shape "
        f"{np.shape(value)}."
      )
    if _known(value):
      worst = float(np.min(value, initial=0.0))
      worst = worst if worst < 0 else float(np.max(value, initial=0.0))
      _validate.non_negative(**{label: worst})


def check_units(units: Any) -> None:
  """Units are None or positive numbers by modality."""
  if units is None:
    return
  if not isinstance(units, Mapping):
    raise ValueError(
      f"units must map modalities to positive numbers, got {units!r}."
    )
  for name, value in units.items():
    _validate.positive(**{f"units[{name!r}]": value})


def check_range(valid_range: Any) -> None:
  """A range is None, ``(low, high)`` or ``{m: (low, high) or None}``."""
  if valid_range is None:
    return
  named = valid_range
  if not isinstance(valid_range, Mapping):
    named = {None: valid_range}
  for name, value in named.items():
    label = "valid_range" if name is None else f"valid_range[{name!r}]"
    if name is not None and value is None:
      continue
    if not isinstance(value, (tuple, list)) or len(value) != 2:
      raise ValueError(f"{label} must be (low, high), got {value!r}.")
    if not np.all(np.asarray(value[0]) < np.asarray(value[1])):
      raise ValueError(f"{label} needs low < high, got {value!r}.")


def region(
  inputs: Mapping[str, Any],
  budget: Any,
  *,
  norm: str,
  units: Mapping[str, Any] | None,
  valid_range: Any,
  present: Mapping[str, Any] | None,
) -> balls.Region:
  """The region of one batch; only modalities that may move are in it."""
  names = modalities.names(inputs)
  _check_names(names, budget, units, valid_range, present)
  check_budget(budget)
  joint = not isinstance(budget, Mapping)
  named = dict.fromkeys(names, budget) if joint else budget
  moving = [m for m in named if _moves(m, inputs[m], named[m], joint)]
  present = present or {}
  # Sizes are taken in float32 even for inputs of half precision.
  dtype = jnp.result_type(jnp.float32, *(inputs[m].dtype for m in moving))
  clean, radius = {}, {}
  for name in modalities.names(moving):
    # Here and in the objective, so that a caller who differentiates pays for
    # no tangent of the search.
    x = jax.lax.stop_gradient(jnp.asarray(inputs[name]))
    size = jax.lax.stop_gradient(jnp.asarray(named[name], dtype))
    if size.shape not in ((), x.shape[:1]):
      raise ValueError(
        f"budget has {size.shape[0]} numbers for {x.shape[0]} examples."
      )
    size = jnp.broadcast_to(jnp.where(size > 0, size, 0), x.shape[:1])
    clean[name] = x
    if name in present:
      one = {name: jnp.asarray(present[name])}
      # NaN in what is absent must not reach the joint norm.
      clean[name] = modalities.mask({name: x}, one)[name]
      size = jnp.where(one[name], size, 0)
    radius[name] = size
  ranges = {m: _range(m, clean[m], valid_range) for m in clean}
  return balls.Region(
    clean=clean,
    radius=radius,
    units={m: jnp.asarray((units or {}).get(m, 1.0), dtype) for m in clean},
    valid_range={m: pair for m, pair in ranges.items() if pair is not None},
    norm=norm,
    joint=joint and norm == "l2",
  )


def _check_names(names, budget, units, valid_range, present):
  for argument, value in (
    ("budget", budget),
    ("units", units),
    ("valid_range", valid_range),
    ("present", present),
  ):
    if isinstance(value, Mapping):
      _validate.known(names, **{argument: value})


def _moves(name, x, size, joint):
  zero = _known(size) and not np.any(np.asarray(size) > 0)
  if zero:
    return False
  if jnp.issubdtype(x.dtype, jnp.floating):
    return True
  if not joint and _known(size):
    raise ValueError(
      f"budget[{name!r}] must be 0; {name!r} holds {x.dtype}, and only "
      "floating modalities can be attacked."
    )
  return False


def _range(name, clean, valid_range):
  pair = valid_range
  if isinstance(valid_range, Mapping):
    pair = valid_range.get(name)
  if pair is None:
    return None
  low, high = (_end(name, end, clean) for end in pair)
  # An entry outside the range from the start keeps its place as an end.
  return jnp.minimum(low, clean), jnp.maximum(high, clean)


def _end(name, end, clean):
  end = jnp.asarray(end, clean.dtype)
  try:
    return jnp.broadcast_to(end, clean.shape)
  except ValueError as error:
    raise ValueError(
      f"valid_range of {name!r} has shape {end.shape}, which does not fit "
      f"inputs {clean.shape}."
    ) from error


def _known(value):
  return not isinstance(value, jax.core.Tracer)
