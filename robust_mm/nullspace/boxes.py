"""The largest noise of an exact kernel that keeps pixels in range."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import _validate
from robust_mm.nullspace.kernels import PatchKernel

_FAR = 5.0  # root mean square of what is projected, in half-widths of the box
_SLACK = 2e-7  # of the width of the box: a few ulps of a pixel


def largest_kernel_noise(
  kernel: PatchKernel,
  images: Any,
  direction: Any,
  bounds: Any = (0.0, 1.0),
  num_iterations: int = 500,
  num_rounds: int = 3,
) -> jax.Array:
  r"""Noise in the kernel, of large norm, with ``images + noise`` in range.

  For every patch by itself: Dykstra's projection of a far point along
  ``direction`` on the intersection of kernel and box (nearly the largest
  :math:`\langle g, \delta \rangle`, what a linear programme gives); a return to
  the kernel, scaled into the box; then the same with the noise itself for a
  direction, ``num_rounds`` times, which makes the norm larger. The best one is
  kept.

  Formal guarantees:
    - ``images + noise`` is in range, and noise in the kernel, up to rounding
      in float32 (a few 1e-7).
    - The largest norm is *not* claimed: that problem is not convex.

  A patch all of whose pixels are at a bound often has no such noise but 0.

  Args:
    kernel: of the patch embedding, in pixels (``std`` given where the model
      normalises).
    images: ``[..., h, w, c]`` with sides that the patch divides; or ``[...,
      p]`` for maps of whole vectors.
    direction: of the shape of ``images``, such as Gaussian noise.
    bounds: (low, high) of a pixel; images must be within.
    num_iterations: of Dykstra's algorithm.
    num_rounds: of the ascent in norm; 0 for the first projection alone.

  Returns:
    float32, of the shape of ``images``.

  Raises:
    ValueError: naming ``bounds`` (low not below high, or images outside),
      ``direction``, ``images``, ``num_iterations`` or ``num_rounds``.
  """
  if np.shape(bounds) != (2,):
    raise ValueError(f"bounds must be (low, high), got {bounds!r}.")
  low, high = (float(end) for end in bounds)
  if not (math.isfinite(low) and math.isfinite(high) and low < high):
    raise ValueError(f"bounds must be finite and rising, got {bounds}.")
  _validate.at_least(1, num_iterations=num_iterations)
  _validate.at_least(0, num_rounds=num_rounds)
  images = jnp.asarray(images, jnp.float32)
  direction = jnp.asarray(direction, jnp.float32)
  if direction.shape != images.shape:
    raise ValueError(
      f"direction must have the shape of images {images.shape}, got "
      f"{direction.shape}."
    )
  if not images.size:
    raise ValueError(f"images must not be empty, got shape {images.shape}.")
  if not (np.min(images) >= low and np.max(images) <= high):
    raise ValueError(f"images must be within bounds {bounds}.")
  if not np.all(np.isfinite(direction)):
    raise ValueError("direction must be finite.")
  to_patches, to_images = _layout(kernel, images.shape)
  if not kernel.dim:
    return jnp.zeros_like(images)
  noise = _largest(
    jnp.asarray(kernel.basis, jnp.float32),
    to_patches(images),
    to_patches(direction),
    low=low,
    high=high,
    num_iterations=num_iterations,
    num_rounds=num_rounds,
  )
  return to_images(noise)


def _layout(kernel: PatchKernel, shape):
  """(images -> [n, p], and back)."""
  size = kernel.basis.shape[0]
  if kernel.patch_shape is None and shape and shape[-1] == size:
    return (
      lambda x: jnp.reshape(x, (-1, size)),
      lambda x: jnp.reshape(x, shape),
    )
  if len(shape) < 3:
    raise ValueError(
      f"images must be [..., h, w, c] or end in {size} entries, got {shape}."
    )
  height, width, channels = shape[-3:]
  rows, columns, own = kernel.patch_shape or _square(size, channels, shape)
  if own != channels or height % rows or width % columns:
    raise ValueError(
      f"images must be cut into patches of {(rows, columns, own)}, got {shape}."
    )
  count = (-1, height // rows, width // columns)

  def to_patches(x):
    x = jnp.reshape(x, (-1, count[1], rows, count[2], columns, channels))
    return jnp.reshape(jnp.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, size))

  def to_images(x):
    x = jnp.reshape(x, (*count, rows, columns, channels))
    return jnp.reshape(jnp.transpose(x, (0, 1, 3, 2, 4, 5)), shape)

  return to_patches, to_images


def _square(size: int, channels: int, shape):
  side = math.isqrt(size // channels)
  if side * side * channels != size:
    raise ValueError(
      f"images of {channels} channels, got {shape}, have no square patches of "
      f"{size} entries; give patch_kernel the weight as [r, r, c, d]."
    )
  return side, side, channels


@jax.jit(static_argnames=("low", "high", "num_iterations", "num_rounds"))
def _largest(basis, x, g, *, low, high, num_iterations, num_rounds):
  below, above = low - x, high - x
  half = (high - low) / 2

  def project(delta):
    with jax.default_matmul_precision("highest"):
      return (delta @ basis) @ basis.T

  def attempt(g):
    z = project(g)
    size = jnp.sqrt(jnp.mean(jnp.square(z), axis=-1, keepdims=True))
    # The kernel is a subspace: the box alone needs Dykstra's correction.
    start = _FAR * half * z / jnp.maximum(size, 1e-30)

    def dykstra(carry, _):
      point, correction = carry
      inside = project(point) + correction
      point = jnp.clip(inside, below, above)
      return (point, inside - point), None

    def alternate(point, _):
      return jnp.clip(project(point), below, above), None

    (point, _), _ = jax.lax.scan(
      dykstra, (start, jnp.zeros_like(start)), length=num_iterations
    )
    # Nearer to both sets, where a pixel at its bound leaves no slack.
    point, _ = jax.lax.scan(alternate, point, length=num_iterations // 2)
    return repair(project(point))

  def repair(delta):
    # Zero is in both convex sets: what is scaled down stays in the kernel.
    slack = _SLACK * (high - low)
    room = jnp.where(delta > 0, above, -below) + slack
    ratio = room / jnp.maximum(jnp.abs(delta), 1e-30)
    shrink = jnp.minimum(1.0, jnp.min(ratio, axis=-1, keepdims=True))
    return jnp.clip(shrink * delta, below, above)

  def ascend(carry, _):
    best, delta = carry
    delta = attempt(delta)
    grew = _square_norm(delta) > _square_norm(best)
    return (jnp.where(grew, delta, best), delta), None

  first = attempt(g)
  (best, _), _ = jax.lax.scan(ascend, (first, first), length=num_rounds)
  return best


def _square_norm(x):
  return jnp.sum(jnp.square(x), axis=-1, keepdims=True)
