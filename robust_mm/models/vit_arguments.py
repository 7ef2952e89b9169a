"""What the arguments of a vision transformer mean, and which are refused."""

import math
import numbers
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from robust_mm import _validate

# width, depth, heads; the perceptron is four times as wide.
SIZES = {
  "tiny": (192, 12, 3),
  "small": (384, 12, 6),
  "base": (768, 12, 12),
  "large": (1024, 24, 16),
}
DTYPES = ("bfloat16", "float32")


def pair(patch_size) -> tuple[int, int]:
  """(rows, columns) of a patch, from one number or two."""
  if isinstance(patch_size, numbers.Integral):
    sides = (patch_size,) * 2
  else:
    sides = _sequence(patch_size)
  if len(sides) != 2 or not all(isinstance(n, numbers.Integral) for n in sides):
    raise ValueError(
      f"patch_size must be one number or (rows, columns), got {patch_size!r}."
    )
  for side in sides:
    _validate.at_least(1, patch_size=side)
  return sides


def image(shape) -> tuple[int, int, int]:
  """``(h, w, c)`` of ``(h, w)`` or ``(h, w, c)``."""
  given, shape = shape, _sequence(shape)
  if len(shape) not in (2, 3):
    raise ValueError(
      f"image_shape must be (h, w) or (h, w, c) for a vision transformer, got "
      f"{given}."
    )
  return (*shape, 1)[:3]


def preprocess(given):
  """(mean, std) as tuples of floats, so that the value can be hashed."""
  if given is None:
    return None
  if len(_sequence(given)) != 2:
    raise ValueError(f"preprocess must be (mean, std), got {given!r}.")
  mean, std = (np.atleast_1d(np.asarray(v, np.float64)) for v in given)
  if any(v.ndim > 1 or not v.size for v in (mean, std)):
    raise ValueError(
      f"preprocess must be (mean, std), each one number or one a channel, got "
      f"{given!r}."
    )
  mean, std = tuple(mean.tolist()), tuple(std.tolist())
  for value in mean:
    if not math.isfinite(value):
      raise ValueError(f"preprocess: mean must be finite, got {value}.")
  for value in std:
    _validate.positive(**{"preprocess: std": value})
  return mean, std


def _sequence(given) -> tuple:
  """Its parts; none where it has none, or is a word."""
  whole = isinstance(given, str) or not isinstance(given, Iterable)
  return () if whole else tuple(given)


def same_preprocess(one, two) -> bool:
  """Whether two (mean, std) are the same for every channel."""
  pairs = zip(preprocess(one), preprocess(two))
  return all(
    len({len(a), len(b)} - {1}) <= 1
    and np.allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-3)
    for a, b in pairs
  )


def dtype(given) -> str:
  """The name of a dtype to compute in."""
  try:
    name = jnp.dtype(given).name
  except TypeError:
    name = given
  _validate.one_of(DTYPES, dtype=name)
  return name


def channels(preprocess, channels: int) -> None:
  """Refuses constants of another number of channels."""
  for value in preprocess or ():
    if len(value) not in (1, channels):
      raise ValueError(
        f"preprocess must have one number or one a channel; it has "
        f"{len(value)} and the image {channels} channels."
      )


def keep(tokens, present):
  """``bool[b, N]`` of ``bool[b]`` or ``bool[b, N]``; None for all."""
  if present is None:
    return None
  shapes = (tokens.shape[:1], tokens.shape[:2])
  if present.dtype != jnp.bool_ or present.shape not in shapes:
    raise ValueError(
      f"present must be bool of shape {shapes[0]} or {shapes[1]}, got "
      f"{present.dtype} of shape {present.shape}."
    )
  if present.ndim == 1:
    present = jnp.broadcast_to(present[:, None], tokens.shape[:2])
  return present
