"""Straight lines below and above an activation on an interval."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

_TANGENT_STEPS = 16


class Lines(NamedTuple):
  """``lower_slope z + lower_shift <= f(z) <= upper_slope z + upper_shift``.

  A shift of None is 0: the line goes through the origin.
  """

  lower_slope: Array
  lower_shift: Array | None
  upper_slope: Array
  upper_shift: Array | None


def of(
  kind: str,
  slopes: tuple[float, float],
  low: Array,
  high: Array,
  lean: Any = 1.0,
) -> Lines:
  """The lines of an activation on ``[low, high]``, elementwise.

  ``lean`` is that of a ``Ball``.
  """
  if kind == "tanh":
    return _tanh(low, high)
  return _piecewise(slopes, low, high, lean)


def box(kind: str, slopes, low: Array, high: Array) -> tuple[Array, Array]:
  """The range of an activation on ``[low, high]``."""
  if kind == "tanh":
    return jnp.tanh(low), jnp.tanh(high)
  ends = value(kind, slopes, low), value(kind, slopes, high)
  smallest, largest = jnp.minimum(*ends), jnp.maximum(*ends)
  across = (low < 0) & (high > 0)
  # The kink itself is an extreme point of a valley or a peak.
  return (
    jnp.where(across, jnp.minimum(smallest, 0), smallest),
    jnp.where(across, jnp.maximum(largest, 0), largest),
  )


def slope_box(kind: str, slopes, low: Array, high: Array):
  """The range of the derivative of an activation on ``[low, high]``."""
  if kind == "tanh":
    near = jnp.where(
      (low < 0) & (high > 0), 0, jnp.minimum(abs(low), abs(high))
    )
    far = jnp.maximum(abs(low), abs(high))
    return _tanh_slope(far), _tanh_slope(near)
  negative, positive = slopes
  left = jnp.where(low < 0, negative, positive)
  right = jnp.where(high > 0, positive, negative)
  return jnp.minimum(left, right), jnp.maximum(left, right)


def value(kind: str, slopes, z: Array) -> Array:
  """The activation itself."""
  if kind == "tanh":
    return jnp.tanh(z)
  return jnp.where(z < 0, slopes[0] * z, slopes[1] * z)


def _piecewise(slopes, low, high, lean) -> Lines:
  negative, positive = slopes
  across = (low < 0) & (high > 0)
  width = jnp.where(across, high - low, 1)
  chord = (positive * high - negative * low) / width
  # Through both ends; at the low end it is exact.
  shift = (negative - chord) * low
  # The tangent that leaves less area, a choice that fixes nothing but size.
  tangent = jnp.where(lean * high > -low, positive, negative)
  only = jnp.where(low >= 0, positive, negative)
  chord = jnp.where(across, chord, only)
  shift = jnp.where(across, shift, 0)
  tangent = jnp.where(across, tangent, only)
  # A box that is not known (an overflow before it) bounds nothing.
  unknown = jnp.isnan(low) | jnp.isnan(high)
  chord = jnp.where(unknown, jnp.nan, chord)
  tangent = jnp.where(unknown, jnp.nan, tangent)
  if negative <= positive:
    return Lines(tangent, None, chord, shift)
  return Lines(chord, shift, tangent, None)


def _tanh(low, high) -> Lines:
  upper_slope, upper_shift = _tanh_above(low, high)
  lower_slope, lower_shift = _tanh_above(-high, -low)
  return Lines(lower_slope, -lower_shift, upper_slope, upper_shift)


def _tanh_above(low, high):
  """Above tanh: tangent where it is concave, chord where it is convex."""
  width = jnp.where(high > low, high - low, 1)
  chord = jnp.where(
    high > low, (jnp.tanh(high) - jnp.tanh(low)) / width, _tanh_slope(low)
  )
  # The chord lies above where the curve reaches its upper end from below.
  use_chord = (high <= 0) | ((low < 0) & (_tanh_slope(high) >= chord))

  def clears(touch):
    return jnp.tanh(touch) + _tanh_slope(touch) * (low - touch) >= jnp.tanh(low)

  def halve(ends, _):
    left, right = ends
    middle = (left + right) / 2
    clear = clears(middle)
    return (
      jnp.where(clear, left, middle),
      jnp.where(clear, middle, right),
    ), None

  start = (jnp.zeros_like(low), jnp.maximum(high, 0))
  (_, touch), _ = jax.lax.scan(halve, start, None, length=_TANGENT_STEPS)
  touch = jnp.where(low >= 0, (low + high) / 2, touch)
  slope = jnp.where(use_chord, chord, _tanh_slope(touch))
  anchor = jnp.where(use_chord, low, touch)
  return slope, jnp.tanh(anchor) - slope * anchor


def _tanh_slope(z):
  return 1 - jnp.square(jnp.tanh(z))
