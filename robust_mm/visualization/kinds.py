"""What the transformations of each kind of modality draw, and what they do.

A kind has ``sample(key, shape, strength, **options) -> draw``, a dict of
arrays, and ``apply(x, draw, **options) -> x``, differentiable in ``x`` and in
the draw. ``strength`` in [0, 1] shrinks all ranges; at 0 nothing moves.
"""

import math
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from robust_mm.augmentations import transforms as augmenting
from robust_mm.visualization import affine

# The standard transforms published with Lucid, for images of 224 pixels.
LUCID_PAD = 12
LUCID_ROLL = 4  # jitter of 8 pixels
LUCID_JITTER = 2  # jitter of 4 pixels
LUCID_SCALES = tuple((90 + 2 * i) / 100 for i in range(11))
LUCID_ANGLES = (*range(-10, 11), 0, 0, 0, 0, 0)  # degrees
IMAGES = ("image", "lucid", "shifts")
RESAMPLED = ("image", "depth")  # those with a scale
# Of which Fourier coefficients are.
FREQUENCIES = (*IMAGES, "log_mel")


class Kind(NamedTuple):
  """One kind of transformation.

  Attributes:
    sample: ``sample(key, shape, strength, **options) -> draw``.
    apply: ``apply(x, draw, **options) -> x`` of one input.
    ranks: of the inputs it is for.
    form: what those are, in words.
    smooth: ``smooth(rank)``: axes along which inputs vary smoothly.
    draws: ``draws(key, shape, strength, num, **options)``: several at once,
      where they are not independent.
  """

  sample: Callable[..., dict]
  apply: Callable[..., Any]
  ranks: tuple[int, ...]
  form: str
  smooth: Callable[[int], tuple[int, ...]]
  draws: Callable[..., dict] | None = None


def _within(key, size, strength, shape=()):
  """Uniform in [-size, size] times the strength."""
  return strength * jax.random.uniform(key, shape, minval=-size, maxval=size)


def _log_uniform(key, bounds, strength):
  """Log-uniform between the bounds, both to the power of the strength."""
  low, high = map(math.log, bounds)
  drawn = jax.random.uniform(key, (), minval=low, maxval=high)
  return jnp.exp(strength * drawn)


def _degrees(key, size, strength):
  """An angle in radians, uniform in ``size`` degrees to either side."""
  return _within(key, math.radians(size), strength)


def sample_nothing(key, shape, strength, **options):
  del key, shape, strength, options
  return {}


def apply_nothing(x, draw, **options):
  del draw, options
  return x


def sample_image(key, shape, strength, *, rotation, scale, jitter, fill):
  del shape, fill
  angle_key, scale_key, shift_key = jax.random.split(key, 3)
  return {
    "angle": _degrees(angle_key, rotation, strength),
    "scale": _log_uniform(scale_key, scale, strength),
    "shift": _within(shift_key, jitter, strength, (2,)),
  }


def apply_image(x, draw, *, fill, **options):
  del options
  return affine.resample(x, **draw, fill=fill)


def sample_lucid(key, shape, strength, *, fill):
  del shape, fill
  keys = jax.random.split(key, 4)
  angle = jax.random.choice(keys[0], jnp.array(LUCID_ANGLES, jnp.float32))
  scale = jax.random.choice(keys[1], jnp.array(LUCID_SCALES))
  roll, shift = (
    jnp.round(
      strength * jax.random.randint(k, (2,), -size, size + 1).astype(float)
    )
    for k, size in ((keys[2], LUCID_ROLL), (keys[3], LUCID_JITTER))
  )
  return {
    "angle": strength * jnp.radians(angle),
    "scale": jnp.power(scale, strength),
    "roll": roll.astype(jnp.int32),
    "shift": shift,
  }


def apply_lucid(x, draw, *, fill):
  edge = (LUCID_PAD, LUCID_PAD)
  frame = (edge, edge, (0, 0))
  if fill is None:
    padded = jnp.pad(x, frame, mode="edge")
  else:
    padded = jnp.pad(x, frame, constant_values=fill)
  # Narrower than the padding, so that only the fill goes round.
  rolled = jnp.roll(padded, (draw["roll"][0], draw["roll"][1]), (0, 1))
  where = {name: draw[name] for name in ("angle", "scale", "shift")}
  found = affine.resample(rolled, **where)
  return found[LUCID_PAD:-LUCID_PAD, LUCID_PAD:-LUCID_PAD]


def sample_shifts(key, shape, strength, *, offsets, fill):
  del shape, fill
  place = jax.random.randint(key, (), 0, len(offsets))
  return _listed(offsets, place, strength)


def draw_shifts(key, shape, strength, num, *, offsets, fill):
  """Every listed one as often as any other, in random order."""
  del shape, fill
  order = jax.random.permutation(key, len(offsets))
  return _listed(offsets, order[jnp.arange(num) % len(offsets)], strength)


def _listed(offsets, place, strength):
  chosen = jnp.asarray(offsets, jnp.float32)[place]
  return {"shift": jnp.round(strength * chosen)}


def apply_shifts(x, draw, *, fill, **options):
  del options
  return affine.resample(x, shift=draw["shift"], fill=fill)


def sample_log_mel(
  key, shape, strength, *, time_shift, stretch, mel_shift, gain, fill
):
  del shape, fill
  keys = jax.random.split(key, 4)
  return {
    "shift": jnp.stack(
      [
        _within(keys[0], time_shift, strength),
        _within(keys[1], mel_shift, strength),
      ]
    ),
    "stretch": _log_uniform(keys[2], stretch, strength),
    "gain": _within(keys[3], gain, strength),
  }


def apply_log_mel(x, draw, *, fill, **options):
  del options
  scale = jnp.stack([draw["stretch"], jnp.ones_like(draw["stretch"])])
  moved = affine.resample(x, scale=scale, shift=draw["shift"], fill=fill)
  return moved + draw["gain"]  # a factor of the power is a term of its log


def _sample_time(key, time_shift, stretch, strength):
  shift_key, stretch_key = jax.random.split(key)
  return {
    "time_shift": _within(shift_key, time_shift, strength),
    "stretch": _log_uniform(stretch_key, stretch, strength),
  }


def _in_time(x, draw):
  """Later by ``time_shift`` frames, longer by ``stretch``; ends are held."""
  half = max(x.shape[0] - 1, 1) / 2
  factor = 1 / draw["stretch"]
  return augmenting.frames_at(x, factor, -draw["time_shift"] * factor / half)


def sample_inertial(
  key, shape, strength, *, rotation, amplitude, time_shift, stretch
):
  del shape
  keys = jax.random.split(key, 4)
  axis = jax.random.normal(keys[1], (3,))
  angle = _degrees(keys[0], rotation, strength)
  return {
    "rotation": angle * axis / jnp.linalg.norm(axis),
    "amplitude": _log_uniform(keys[2], amplitude, strength),
    **_sample_time(keys[3], time_shift, stretch, strength),
  }


def apply_inertial(x, draw, **options):
  del options
  # One rotation for all triads: the sensors sit on one board.
  turned = _turned(x, draw["rotation"])
  return draw["amplitude"] * _in_time(turned, draw)


def _turned(x, vector):
  matrix = augmenting.rotation(vector)
  triads = jnp.reshape(x, (*x.shape[:1], -1, 3))
  turned = jnp.einsum(
    "ij,tnj->tni", matrix, triads, precision=jax.lax.Precision.HIGHEST
  )
  return jnp.reshape(turned, x.shape)


def sample_skeleton(
  key, shape, strength, *, rotation, vertical, scale, time_shift, stretch
):
  del shape
  keys = jax.random.split(key, 3)
  return {
    "rotation": _degrees(keys[0], rotation, strength) * jnp.eye(3)[vertical],
    "scale": _log_uniform(keys[1], scale, strength),
    **_sample_time(keys[2], time_shift, stretch, strength),
  }


def apply_skeleton(x, draw, **options):
  del options
  points = jnp.reshape(x, (x.shape[0], -1, 3))
  # About the body, wherever the camera stands.
  centre = jnp.mean(points, axis=(0, 1), keepdims=True)
  turned = centre + draw["scale"] * _turned(points - centre, draw["rotation"])
  return _in_time(jnp.reshape(turned, x.shape), draw)


def sample_depth(
  key, shape, strength, *, rotation, scale, jitter, time_shift, fill
):
  del shape
  space_key, time_key = jax.random.split(key)
  return {
    **sample_image(
      space_key,
      (),
      strength,
      rotation=rotation,
      scale=scale,
      jitter=jitter,
      fill=fill,
    ),
    "time_shift": _within(time_key, time_shift, strength),
  }


def apply_depth(x, draw, *, fill, **options):
  del options
  where = {name: draw[name] for name in ("angle", "scale", "shift")}
  if x.ndim == 2:
    return affine.resample(x, **where, fill=fill)
  # All frames by one map.
  moved = affine.resample(jnp.moveaxis(x, 0, 2), **where, fill=fill)
  return _in_time(
    jnp.moveaxis(moved, 2, 0),
    {
      "time_shift": draw["time_shift"],
      "stretch": jnp.ones_like(draw["time_shift"]),
    },
  )


def sample_vector(key, shape, strength, *, deviation, std):
  size = deviation * jnp.asarray(std, jnp.float32)
  return {"noise": strength * size * jax.random.normal(key, shape)}


def apply_vector(x, draw, **options):
  del options
  return x + draw["noise"].astype(x.dtype)


def _first_two(rank):
  del rank
  return (0, 1)


def _time(rank):
  del rank
  return (0,)


KINDS: dict[str, Kind] = {
  "depth": Kind(
    sample_depth,
    apply_depth,
    (2, 3, 4),
    "depth maps [h, w], [t, h, w] or [t, h, w, c]",
    lambda rank: (0, 1) if rank == 2 else (0, 1, 2),
  ),
  "identity": Kind(
    sample_nothing,
    apply_nothing,
    (1, 2, 3, 4),
    "inputs of one to four axes",
    lambda rank: {1: (), 2: (0,), 3: (0, 1), 4: (0, 1, 2)}[rank],
  ),
  "image": Kind(
    sample_image, apply_image, (3,), "images [h, w, c]", _first_two
  ),
  "inertial": Kind(
    sample_inertial, apply_inertial, (2,), "signals [t, 3 n]", _time
  ),
  "log_mel": Kind(
    sample_log_mel,
    apply_log_mel,
    (2, 3),
    "spectrograms [t, mel] or [t, mel, 1]",
    _first_two,
  ),
  "lucid": Kind(
    sample_lucid, apply_lucid, (3,), "images [h, w, c]", _first_two
  ),
  "shifts": Kind(
    sample_shifts,
    apply_shifts,
    (3,),
    "images [h, w, c]",
    _first_two,
    draw_shifts,
  ),
  "skeleton": Kind(
    sample_skeleton,
    apply_skeleton,
    (2, 3),
    "joints [t, 3 n] or [t, n, 3]",
    _time,
  ),
  "vector": Kind(
    sample_vector,
    apply_vector,
    (1,),
    "feature vectors [d]",
    lambda rank: (),
  ),
}
