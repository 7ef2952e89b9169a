"""What ``class_visualization`` is asked, checked and put into arrays."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import _validate
from robust_mm._types import Model
from robust_mm.visualization import objectives
from robust_mm.visualization import parameterizations

MODES = ("expectation", "in_place")
PARAMETERIZATIONS = ("pixels", "fourier", "unbounded")
FIDELITIES = ("corrected", "published")
AUTO = "auto"


def check_numbers(given) -> None:
  for name in ("num_steps", "num_transforms", "every", "seeds", "num_held_out"):
    _validate.at_least(1, **{name: given[name]})
  _validate.at_least(0, blur_every=given["blur_every"])
  for name in ("learning_rate", "step_size", "init_std"):
    _validate.positive(**{name: given[name]})
  for name in ("tv_weight", "l2_weight", "annealing"):
    if given[name] is not None:
      _validate.non_negative(**{name: given[name]})
  if given["annealing"] is not None:
    _validate.in_unit_interval(annealing=given["annealing"])
  _check_key(given["key"])
  if given["held_out"] is not None and not isinstance(
    given["held_out"], Mapping
  ):
    raise ValueError(
      f"held_out must map names to transformations, got "
      f"{_validate.kind(given['held_out'])}."
    )
  _validate.one_of(MODES, mode=given["mode"])
  _validate.one_of(
    PARAMETERIZATIONS, parameterization=given["parameterization"]
  )
  _validate.one_of(FIDELITIES, fidelity=given["fidelity"])
  if given["parameterization"] == "fourier":
    if given["mode"] == "in_place":
      raise ValueError("parameterization must be 'pixels' in place.")
    if given["blur_every"]:
      raise ValueError("blur_every must be 0 with Fourier coefficients.")


def _check_key(key) -> None:
  dtype = getattr(key, "dtype", None)
  if dtype is None or not jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
    raise ValueError(f"key must be one such as jax.random.key(0), got {key!r}.")


def published(chosen, given):
  """Rotation and scaling alone; what contradicts it is refused."""
  for name, allowed in (
    ("objective", (None, "logit")),
    ("tv_weight", (None, 0.0)),
    ("annealing", (None, 0.0)),
    ("parameterization", ("pixels", "unbounded")),
    ("blur_every", (0,)),
  ):
    if given[name] not in allowed:
      raise ValueError(
        f"{name} must be {allowed[-1 if None in allowed else 0]} with "
        f"fidelity='published', got {given[name]!r}."
      )
  if given["objective_scale"] == AUTO:
    raise ValueError(
      "objective_scale must be a number with fidelity='published', got 'auto'."
    )
  for name, transform in chosen.items():
    if transform.kind != "image":
      raise ValueError(
        f"transforms must be those of images with fidelity='published', got "
        f"{transform.kind} for {name!r}."
      )
  return {n: t.replace(jitter=0.0) for n, t in chosen.items()}


def spaces(view, chosen, given) -> dict:
  """``{m: Parameterization}`` of what is synthesised.

  Args:
    view: of the model.
    chosen: ``{m: Transform}``.
    given: the arguments of ``class_visualization``.
  """
  kind = given["parameterization"]
  bounded = kind != "unbounded"
  ranges = _by_name(view, given["value_range"], "value_range")
  references = _by_name(view, given["reference"], "reference")
  found = {}
  for name in view.names:
    shape = view.shape(name)
    if kind == "fourier" and not chosen[name].has_frequencies(len(shape)):
      raise ValueError(
        f"parameterization must be 'pixels' for {name!r} of shape {shape} and "
        f"transforms of the kind {chosen[name].kind}: Fourier coefficients are "
        "of images and spectrograms."
      )
    low = high = None
    if bounded:
      low, high = _range(ranges.get(name), name, shape)
    found[name] = parameterizations.Parameterization(
      name="projected" if given["mode"] == "in_place" and bounded else kind,
      shape=shape,
      low=low,
      high=high,
      reference=_reference(references.get(name), name, shape, low, high),
      init_std=float(given["init_std"]),
    )
  return found


def _by_name(view, value, argument: str) -> Mapping:
  if isinstance(value, Mapping):
    _validate.known(view.names, **{argument: value})
    return value
  return dict.fromkeys(view.names, value)


def _range(bounds, name: str, shape):
  if bounds is None:
    raise ValueError(
      f"value_range must name {name!r}, unless parameterization is 'unbounded'."
    )
  try:
    low, high = bounds
  except (TypeError, ValueError):
    raise ValueError(
      f"value_range must be (low, high) for {name!r}, got {bounds!r}."
    ) from None
  low, high = (_like(value, shape, "value_range") for value in (low, high))
  if not np.all(low <= high) or not np.any(low < high):
    raise ValueError(f"value_range must be (low, high) for {name!r}.")
  return low, high


def _reference(value, name: str, shape, low, high) -> np.ndarray:
  """0, or what of the range is nearest to it, where nothing is said."""
  center = _like(0.0 if value is None else value, shape, "reference")
  if low is None:
    return center
  if value is None:
    return np.clip(center, low, high)
  if not np.all((low <= center) & (center <= high)):
    raise ValueError(
      f"reference must lie in the value_range of {name!r}, got {value}."
    )
  return center


def _like(value, shape, argument: str) -> np.ndarray:
  """Finite float32 that broadcasts against one input, of its rank."""
  value = np.asarray(value)
  if np.issubdtype(value.dtype, np.number):
    value = value.astype(np.float32)
    fits = value.ndim <= len(shape) and all(
      mine in (1, whole) for mine, whole in zip(value.shape[::-1], shape[::-1])
    )
    if fits and np.all(np.isfinite(value)):
      return value.reshape((1,) * (len(shape) - value.ndim) + value.shape)
  raise ValueError(
    f"{argument} must be finite numbers that broadcast against one input of "
    f"shape {shape}."
  )


def divisor(scale, items, view, others) -> Any:
  """What the objective is divided by."""
  if not isinstance(scale, str):
    if scale is None:
      raise ValueError("objective_scale must be a number or 'auto', got None.")
    _validate.positive(objective_scale=scale)
    return jnp.asarray(scale, jnp.float32)
  _validate.one_of((AUTO,), objective_scale=scale)
  _check_items(items, view)
  rest = {m: x for m, x in items["inputs"].items() if m not in view.names}
  alone = isinstance(others, str)
  if isinstance(view.function, Model):
    present = dict(items["present"])
    if alone:
      present |= {m: np.zeros(len(items["label"]), bool) for m in rest}
    outputs = view.function.apply(
      view.params, view.state, items["inputs"], present
    )[0]
    logits = outputs.logits
  else:
    logits = view.function(view.params, items["inputs"])
  mean = jnp.mean(
    objectives.objective("margin", logits, jnp.asarray(items["label"]))
  )
  # Of a network that does not know their classes it says nothing.
  return jnp.where(mean > 0, mean, 1.0)


def _check_items(items, view) -> None:
  if items is None or not {"inputs", "label"} <= set(items):
    raise ValueError(
      "objective_scale='auto' needs items with inputs and label."
    )
  if isinstance(view.function, Model) and "present" not in items:
    raise ValueError("items must say which modalities are present.")
  for name in view.names:
    shape = np.shape(items["inputs"].get(name, 0.0))
    if shape[1:] != view.shape(name):
      raise ValueError(
        f"items must have inputs {list(view.shape(name))} of {name!r}, got "
        f"{list(shape[1:])}."
      )
