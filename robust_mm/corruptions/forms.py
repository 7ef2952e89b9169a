"""Which axes of one input are time, space and channels."""

import math
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax.numpy as jnp

from robust_mm import _validate

FORMS = ("image", "sequence", "token", "vector", "video")
TIMED = ("sequence", "token", "video")
_BY_RANK = {1: "vector", 2: "sequence", 3: "image", 4: "video"}


class Axes(NamedTuple):
  """The axes of one input, without that of examples.

  Attributes:
    time: the axis of frames, or None.
    space: the axes of pixels, or none.
    channels: all others.
  """

  time: int | None
  space: tuple[int, ...]
  channels: tuple[int, ...]


def form(shape: tuple[int, ...], dtype: Any = jnp.float32) -> str:
  """What one input of this shape is taken for, unless told otherwise.

  ``[d]`` is a vector, of integers ``[t]`` a row of tokens, ``[t, d]`` a
  sequence, ``[h, w, c]`` an image and ``[t, h, w, c]`` a video.

  >>> form((128, 6)), form((28, 28, 1)), form((50,), jnp.int32)
  ('sequence', 'image', 'token')

  Raises:
    ValueError: naming ``shape`` if it has no axis or more than four.
  """
  if len(shape) not in _BY_RANK:
    raise ValueError(
      f"shape must have one to four axes or a form given, got {shape}."
    )
  if len(shape) == 1 and not jnp.issubdtype(dtype, jnp.floating):
    return "token"
  return _BY_RANK[len(shape)]


def lengths(shapes: Mapping[str, Any]) -> dict[str, int]:
  """``{m: frames, or tokens}`` of the modalities that have time.

  Args:
    shapes: ``{m: (shape, dtype)}`` of one input.

  >>> lengths({"imu": ((128, 6), "float32"), "pose": ((20,), "float32")})
  {'imu': 128}
  """
  return {
    name: shape[0]
    for name, (shape, dtype) in shapes.items()
    if form(tuple(shape), jnp.dtype(dtype)) in TIMED
  }


def axes(form: str, rank: int) -> Axes:
  """The axes of one input of ``rank`` axes.

  Raises:
    ValueError: naming ``forms`` if an input of that form has more axes.
  """
  leading = {"image": 2, "sequence": 1, "token": 1, "vector": 0, "video": 3}
  if rank < leading[form]:
    raise ValueError(
      f"forms says {form!r}, but one input has only {rank} axes."
    )
  time = None if form in ("image", "vector") else 0
  space = {"image": (0, 1), "video": (1, 2)}.get(form, ())
  return Axes(time, space, tuple(range(leading[form], rank)))


def check(forms: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
  """``{m: form}`` as sorted pairs; ValueError for an unknown form."""
  for name, chosen in (forms or {}).items():
    _validate.one_of(FORMS, **{f"forms[{name!r}]": chosen})
  return tuple(sorted((forms or {}).items()))


def freeze(value: Any) -> Any:
  """Numbers and nested sequences of them as floats and tuples.

  Raises:
    ValueError: naming ``scale`` if one is negative or not finite.
  """
  if hasattr(value, "tolist"):
    value = value.tolist()
  if isinstance(value, (list, tuple)):
    return tuple(freeze(item) for item in value)
  if not (value >= 0 and math.isfinite(value)):
    raise ValueError(f"scale must be non-negative and finite, got {value}.")
  return float(value)
