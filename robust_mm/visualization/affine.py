r"""One differentiable resampling of the leading two axes of an array.

.. math:: out(p) = x(A^{-1}(p - c - d) + c), \qquad
          A = \begin{pmatrix} \cos\theta & -\sin\theta \\
                              \sin\theta & \cos\theta \end{pmatrix}
              \begin{pmatrix} s_0 & 0 \\ 0 & s_1 \end{pmatrix}

acts on (row, column) about the centre :math:`c = ((h - 1) / 2, (w - 1) / 2)`:
a positive angle turns as ``jnp.rot90`` does. Rotation, scaling and shift are
composed into one map, because every bilinear pass blurs.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Real


def resample(
  x: Float[Array, "h w *c"],
  *,
  angle: Real[Array, ""] | float = 0.0,
  scale: Real[Array, "2"] | Real[Array, ""] | float = 1.0,
  shift: Real[Array, "2"] | float = 0.0,
  fill: float | None = None,
) -> Float[Array, "h w *c"]:
  """Rotated, scaled and shifted about the centre, bilinear, in one pass.

  Linear in ``x`` (with ``fill`` 0 or None); its gradient in ``x`` is the
  transpose. The identity is the identity bit by bit, and shifts by whole pixels
  are exact. Scales below about 0.7 alias: there is no prefilter.

  >>> x = jnp.arange(6.0).reshape(2, 3)
  >>> bool(jnp.all(resample(x) == x))
  True

  Args:
    x: ``[h, w, ...]``.
    angle: in radians; a quarter turn is ``jnp.rot90``.
    scale: above 0; above 1 enlarges. One number, or one for rows and columns.
    shift: in pixels, down and to the right.
    fill: what lies outside; None for the nearest pixel of the border.
  """
  height, width = x.shape[:2]
  if not isinstance(scale, jax.core.Tracer) and not np.all(
    np.asarray(scale) > 0
  ):
    raise ValueError(f"scale must be above 0, got {scale}.")
  # Coordinates in bfloat16 would be wrong by pixels.
  real = jnp.promote_types(x.dtype, jnp.float32)
  angle, scale, shift = (jnp.asarray(v, real) for v in (angle, scale, shift))
  centre = jnp.array([(height - 1) / 2, (width - 1) / 2], real)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  offset = jnp.broadcast_to(shift, (2,))
  rows = jnp.arange(height, dtype=real) - centre[0] - offset[0]
  columns = jnp.arange(width, dtype=real) - centre[1] - offset[1]
  rows, columns = jnp.meshgrid(rows, columns, indexing="ij")
  factor = jnp.broadcast_to(scale, (2,))
  turned = (cos * rows + sin * columns, cos * columns - sin * rows)
  place = [turned[i] / factor[i] + centre[i] for i in range(2)]
  flat = jnp.reshape(x, (height, width, -1)).astype(real)
  if fill is not None:
    # The nearest pixel of a frame of the fill is the fill.
    flat = jnp.pad(flat, ((1, 1), (1, 1), (0, 0)), constant_values=fill)
    place = [coordinate + 1 for coordinate in place]

  def read(channel):
    return jax.scipy.ndimage.map_coordinates(
      channel, place, order=1, mode="nearest"
    )

  found = jax.vmap(read, in_axes=-1, out_axes=-1)(flat)
  return jnp.reshape(found, x.shape).astype(x.dtype)
