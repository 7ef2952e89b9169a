"""What each kind does to one input, and how strongly at each severity."""

import functools
import math
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import PRNGKeyArray

from robust_mm.corruptions import forms

TIMED = forms.TIMED
NUMERIC = ("image", "sequence", "vector", "video")
EVERY = forms.FORMS


class Draw(NamedTuple):
  """The randomness of one example in one modality.

  Attributes:
    noise: key of what is never shared between modalities.
    decision: key of when and how much; shared where modalities are correlated.
    ticks: how many decisions there are along time.
  """

  noise: PRNGKeyArray
  decision: PRNGKeyArray
  ticks: int


class Kind(NamedTuple):
  """One kind of corruption.

  Attributes:
    function: ``function(draw, x, strength, axes, option) -> x`` of one input.
      None where rows are replaced as a whole.
    forms: of the inputs it makes sense for.
    strengths: at severity 1 to 5.
    by_row: the strength is the chance of a row to be touched at all.
  """

  function: Callable[..., Any] | None
  forms: tuple[str, ...]
  strengths: tuple[float, ...]
  by_row: bool = False


def _in_float(function):
  """Computes in float32 or finer; integers come back rounded, in range."""

  @functools.wraps(function)
  def run(draw, x, strength, axes, option):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    found = function(draw, wide, strength, axes, option)
    if jnp.issubdtype(x.dtype, jnp.integer):
      found = jnp.clip(jnp.round(found), *_range(x.dtype, found.dtype))
    return found.astype(x.dtype)

  return run


def _range(integer, wide) -> tuple:
  """What floats of a type can say of the range of integers of another."""
  info, wide = jnp.iinfo(integer), jnp.dtype(wide)
  top = np.asarray(info.max, wide)
  if int(top) > info.max:  # rounded up: 2**31 in float32
    top = np.nextafter(top, np.asarray(0, wide))
  return np.asarray(info.min, wide), top


@_in_float
def additive(draw, x, strength, axes, option):
  """``x + strength * scale * N(0, I)``."""
  del axes
  scale = jnp.asarray(option, x.dtype)
  scale = jnp.reshape(scale, (1,) * (x.ndim - scale.ndim) + scale.shape)
  noise = jax.random.normal(draw.noise, x.shape, x.dtype)
  return x + strength.astype(x.dtype) * scale * noise


@_in_float
def scalar_gaussian(draw, x, strength, axes, option):
  """``x * (1 - strength + strength * N(0, 1))``, one draw an example."""
  del axes, option
  strength = strength.astype(x.dtype)
  factor = jax.random.normal(draw.noise, (), x.dtype)
  return x * (1 - strength + strength * factor)


@_in_float
def blur(draw, x, strength, axes, option):
  """Gaussian means of ``strength * sqrt(n)`` samples along space, or time."""
  del draw, option
  for axis in axes.space or (axes.time,):
    x = _gaussian_mean(x, axis, strength * math.sqrt(x.shape[axis]))
  return x


def _gaussian_mean(x, axis: int, sigma):
  """Weights are renormalised at the ends, so that constants stay."""
  length = x.shape[axis]
  # Room for both ends, or the transform would join them.
  size = 2 * length
  lag = jnp.arange(size, dtype=x.dtype)
  lag = jnp.minimum(lag, size - lag)
  sigma = jnp.maximum(sigma, 1e-3).astype(x.dtype)
  weights = jnp.where(lag < length, jnp.exp(-0.5 * (lag / sigma) ** 2), 0.0)
  spectrum = jnp.fft.rfft(weights)

  def smooth(values):
    found = jnp.fft.rfft(values, n=size, axis=-1) * _under(spectrum, values)
    return jnp.fft.irfft(found, n=size, axis=-1)[..., :length]

  moved = jnp.moveaxis(x, axis, -1)
  total = smooth(jnp.ones((length,), x.dtype))
  return jnp.moveaxis(smooth(moved) / _under(total, moved), -1, axis)


def _under(vector, like):
  return jnp.reshape(vector, (1,) * (like.ndim - 1) + vector.shape)


@_in_float
def contrast(draw, x, strength, axes, option):
  """Towards the example's own mean in every channel."""
  del draw, option
  along = axes.space if axes.time is None else (axes.time, *axes.space)
  mean = jnp.mean(x, axis=along, keepdims=True)
  return mean + (1 - strength).astype(x.dtype) * (x - mean)


def occlusion(draw, x, strength, axes, option):
  """Zeros on one box: this share of the area, of the time of a sequence."""
  del option
  box = axes.space or (axes.time,)
  side = strength ** (1 / len(box))
  places = jax.random.uniform(draw.decision, (len(box),))
  hidden = jnp.ones((1,) * x.ndim, bool)
  for axis, place in zip(box, places):
    length = x.shape[axis]
    size = jnp.maximum(jnp.round(side * length), 1)
    start = jnp.floor(place * (length - size + 1))
    index = jnp.arange(length)
    inside = (index >= start) & (index < start + size)
    hidden = hidden & _along(inside, axis, x)
  return jnp.where(hidden, jnp.zeros_like(x), x)


def shift(draw, x, strength, axes, option):
  """Later or earlier by this share of the time; zeros come in."""
  del option
  length = x.shape[axes.time]
  steps = jnp.maximum(jnp.round(strength * length), 1).astype(jnp.int32)
  later = jax.random.bernoulli(draw.decision)
  source = jnp.arange(length) - jnp.where(later, steps, -steps)
  valid = _along((source >= 0) & (source < length), axes.time, x)
  moved = jnp.take(x, jnp.clip(source, 0, length - 1), axis=axes.time)
  return jnp.where(valid, moved, jnp.zeros_like(x))


def frame_drop(draw, x, strength, axes, option):
  """Every frame becomes zeros, every token ``option``, with this chance."""
  lost = jax.random.uniform(draw.decision, (draw.ticks,)) < strength
  length = x.shape[axes.time]
  # A clock of another modality may be slower: its ticks last several frames.
  lost = lost[(jnp.arange(length) * draw.ticks) // length]
  fill = jnp.asarray(option, x.dtype)
  return jnp.where(_along(lost, axes.time, x), fill, x)


def channel_drop(draw, x, strength, axes, option):
  """Every channel becomes zeros with this chance."""
  del option
  shape = tuple(n if a in axes.channels else 1 for a, n in enumerate(x.shape))
  lost = jax.random.uniform(draw.noise, shape) < strength
  return jnp.where(lost, jnp.zeros_like(x), x)


@_in_float
def clip(draw, x, strength, axes, option):
  """Saturates at ``1 - strength`` of the channel's largest absolute value."""
  del draw, option
  along = tuple(a for a in range(x.ndim) if a not in axes.channels)
  # A vector has one value a channel: there the peak is that of all of them.
  peak = jnp.max(jnp.abs(x), axis=along or None, keepdims=True)
  level = (1 - strength).astype(x.dtype) * peak
  return jnp.clip(x, -level, level)


@_in_float
def band_limit(draw, x, strength, axes, option):
  """Keeps frequencies up to ``1 - strength`` of the highest, and the mean."""
  del draw, option
  for axis in axes.space if axes.time is None else (axes.time,):
    length = x.shape[axis]
    frequency = jnp.fft.rfftfreq(length, dtype=x.dtype)
    kept = frequency <= (1 - strength) * 0.5 + 1e-6
    moved = jnp.moveaxis(x, axis, -1)
    found = jnp.fft.rfft(moved, axis=-1)
    found = jnp.where(_under(kept, found), found, jnp.zeros_like(found))
    x = jnp.moveaxis(jnp.fft.irfft(found, n=length, axis=-1), -1, axis)
  return x


def stuck(draw, x, strength, axes, option):
  """One frame repeated to the end, for half to all of this share of time."""
  del option
  length = x.shape[axes.time]
  duration = strength * jax.random.uniform(draw.decision, (), minval=0.5)
  last = jnp.floor(length * (1 - duration)).astype(jnp.int32)
  source = jnp.minimum(jnp.arange(length), jnp.clip(last, 0, length - 1))
  return jnp.take(x, source, axis=axes.time)


def zeros(draw, x, strength, axes, option):
  """Nothing but zeros, and still said to be present."""
  del draw, strength, axes, option
  return jnp.zeros_like(x)


def _along(vector: Array, axis: int, like: Array) -> Array:
  shape = tuple(-1 if a == axis else 1 for a in range(like.ndim))
  return jnp.reshape(vector, shape)


_RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
_ROWS = (0.2, 0.4, 0.6, 0.8, 1.0)

KINDS = {
  "absent": Kind(None, EVERY, _ROWS, by_row=True),
  "additive": Kind(additive, NUMERIC, (0.25, 0.5, 1.0, 1.5, 2.0)),
  "band_limit": Kind(
    band_limit, ("image", "sequence", "video"), (0.3, 0.5, 0.7, 0.8, 0.9)
  ),
  "blur": Kind(
    blur, ("image", "sequence", "video"), (0.1, 0.2, 0.35, 0.5, 0.75)
  ),
  "channel_drop": Kind(channel_drop, NUMERIC, (0.1, 0.2, 0.35, 0.5, 0.7)),
  "clip": Kind(clip, NUMERIC, (0.3, 0.5, 0.7, 0.8, 0.9)),
  "contrast": Kind(
    contrast, ("image", "sequence", "video"), (0.25, 0.45, 0.65, 0.8, 0.9)
  ),
  "frame_drop": Kind(frame_drop, ("sequence", "video"), _RATES),
  "occlusion": Kind(
    occlusion, ("image", "sequence", "video"), (0.1, 0.2, 0.35, 0.5, 0.7)
  ),
  "scalar_gaussian": Kind(scalar_gaussian, NUMERIC, _ROWS),
  "shift": Kind(shift, TIMED, (0.05, 0.1, 0.2, 0.3, 0.5)),
  "stuck": Kind(stuck, TIMED, (0.1, 0.3, 0.5, 0.7, 0.9)),
  "swap": Kind(None, EVERY, _ROWS, by_row=True),
  "token_drop": Kind(frame_drop, ("token",), _RATES),
  "zeros": Kind(zeros, EVERY, _ROWS, by_row=True),
}


def fits(kind: str, form: str, shape: tuple[int, ...]) -> bool:
  """Whether a kind makes sense for one input of a form and shape."""
  channels = forms.axes(form, len(shape)).channels
  single = all(shape[axis] == 1 for axis in channels)
  # Losing the only channel is what zeros does.
  return form in KINDS[kind].forms and not (kind == "channel_drop" and single)
