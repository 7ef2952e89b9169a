"""What each operation does to one input: ``fn(key, x, **options)``.

``x`` [...] is in float32 or finer. Nothing here is random but by its key.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from robust_mm import corruptions
from robust_mm.augmentations import options as options_lib

# Interpolation in bfloat16 or tf32 would be seen in the images.
_EXACT = jax.lax.Precision.HIGHEST
# sum_k v_k G_k is the matrix of the cross product with v.
_GENERATORS = (
  ((0, 0, 0), (0, 0, -1), (0, 1, 0)),
  ((0, 0, 1), (0, 0, 0), (-1, 0, 0)),
  ((0, -1, 0), (1, 0, 0), (0, 0, 0)),
)


def warp_time(key, x, *, scale, shift):
  """The frames at random places; ends are held."""
  scale_key, shift_key = jax.random.split(key)
  bound = math.log(scale)
  factor = jax.random.uniform(scale_key, (), x.dtype, -bound, bound)
  offset = jax.random.uniform(shift_key, (), x.dtype, -shift, shift)
  return frames_at(x, jnp.exp(factor), offset)


def frames_at(
  x: Float[Array, " t *d"], factor: Float[Array, ""], offset: Float[Array, ""]
) -> Float[Array, " t *d"]:
  """Frames at ``positions``, linearly between neighbours; ends are held."""
  last = x.shape[0] - 1
  place = jnp.clip(positions(last + 1, factor, offset), 0, last)
  before = jnp.floor(place)
  weight = jnp.reshape(place - before, (-1,) + (1,) * (x.ndim - 1))
  before = before.astype(jnp.int32)
  low = jnp.take(x, before, axis=0)
  high = jnp.take(x, jnp.minimum(before + 1, last), axis=0)
  return low + weight * (high - low)


def positions(length: int, factor: Array, offset: Array) -> Array:
  """Where samples are read: ``(u factor + offset + 1) / 2 * (length - 1)``.

  ``u`` runs from -1 to 1 over ``[length]``. Exact where nothing moves.
  """
  half = (length - 1) / 2
  index = jnp.arange(length, dtype=factor.dtype)
  return (half + half * offset) + factor * (index - half)


def rotate(key, x, *, angle, axis, groups):
  """Every group of consecutive vectors by a rotation of its own."""
  if axis is None:
    vectors = angle * jax.random.normal(key, (groups, 3), x.dtype)
  else:
    unit = jnp.eye(3, dtype=x.dtype)[options_lib.AXES.index(axis)]
    vectors = angle * jnp.outer(
      jax.random.normal(key, (groups,), x.dtype), unit
    )
  parts = jnp.reshape(x, (*x.shape[:-1], groups, -1, 3))
  turned = jnp.einsum(
    "gij,...gnj->...gni", rotation(vectors), parts, precision=_EXACT
  )
  return jnp.reshape(turned, x.shape)


def rotation(vector: Float[Array, "*g 3"]) -> Float[Array, "*g 3 3"]:
  r"""Rodrigues: by :math:`|v|` radians about ``v``, counter-clockwise.

  .. math:: R = \cos\theta I + \frac{\sin\theta}{\theta} [v]_\times
            + \frac{1 - \cos\theta}{\theta^2} v v^T

  Both quotients are continued to 0, where :math:`R = I`.
  """
  square = jnp.sum(jnp.square(vector), axis=-1)[..., None, None]
  theta = jnp.sqrt(jnp.maximum(square, jnp.finfo(vector.dtype).tiny))
  generators = jnp.asarray(_GENERATORS, vector.dtype)
  cross = jnp.einsum("...k,kij->...ij", vector, generators, precision=_EXACT)
  outer = vector[..., :, None] * vector[..., None, :]
  first = jnp.sinc(theta / math.pi)
  second = 0.5 * jnp.square(jnp.sinc(theta / (2 * math.pi)))
  identity = jnp.broadcast_to(jnp.eye(3, dtype=vector.dtype), cross.shape)
  return jnp.cos(theta) * identity + first * cross + second * outer


def scale(key, x, *, deviation, per):
  """``x * exp(deviation * N(0, I))``."""
  shape = {"example": (), "axis": (3,), "channel": x.shape[-1:]}[per]
  factor = jnp.exp(deviation * jax.random.normal(key, shape, x.dtype))
  if per == "axis":
    factor = jnp.tile(factor, x.shape[-1] // 3)
  return x * jnp.reshape(factor, (1,) * (x.ndim - factor.ndim) + factor.shape)


def move(key, x, *, scale, shift):
  """The pixels at random places; all frames alike."""
  scale_key, shift_key = jax.random.split(key)
  factor = jnp.exp(scale * jax.random.normal(scale_key, (2,), x.dtype))
  offset = shift * jax.random.normal(shift_key, (2,), x.dtype)
  return pixels_at(x, factor, offset)


def pixels_at(
  x: Float[Array, "*t h w c"],
  factor: Float[Array, "2"],
  offset: Float[Array, "2"],
) -> Float[Array, "*t h w c"]:
  """Pixels at ``positions`` of rows and columns; bilinear, zeros outside."""
  height, width = x.shape[-3:-1]
  rows = interpolation(height, factor[0], offset[0])
  columns = interpolation(width, factor[1], offset[1])
  x = jnp.einsum("ip,...pqc->...iqc", rows, x, precision=_EXACT)
  return jnp.einsum("jq,...iqc->...ijc", columns, x, precision=_EXACT)


def interpolation(length: int, factor: Array, offset: Array) -> Array:
  """``[length, length]``: linear weights of samples at ``positions``."""
  place = positions(length, factor, offset)
  index = jnp.arange(length, dtype=place.dtype)
  return jnp.maximum(0, 1 - jnp.abs(place[:, None] - index[None, :]))


def brighten(key, x, *, deviation, where):
  """One offset for all, or for what is above zero."""
  brighter = x + deviation * jax.random.normal(key, (), x.dtype)
  return brighter if where == "everywhere" else jnp.where(x > 0, brighter, x)


def erase(key, x, *, share):
  """Zeros on one box of this share."""
  occlusion = corruptions.occlusion(severity=1, strength=share)
  found, _ = occlusion(key, {"x": x[None]}, {"x": jnp.ones(1, bool)})
  return found["x"][0]


def noise(key, x, *, deviation):
  """``x + deviation * N(0, I)``."""
  return x + deviation * jax.random.normal(key, x.shape, x.dtype)


FUNCTIONS = {
  "brighten": brighten,
  "erase": erase,
  "move": move,
  "noise": noise,
  "rotate": rotate,
  "scale": scale,
  "warp_time": warp_time,
}
# Of the inputs that an operation makes sense for; others are for all.
FORMS = {
  "erase": ("image", "sequence", "video"),
  "move": ("image", "video"),
  "warp_time": ("sequence", "video"),
}
ALL = ("image", "sequence", "vector", "video")
