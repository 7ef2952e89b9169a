r"""Exact kernels of linear stems and heads: what they cannot see.

.. math:: \ker = \{ \delta \in R^p : \delta W = 0 \}, \quad
          \dim = p - \operatorname{rank} W

Everything of a decomposition is done in float64 with NumPy on the host, once;
nothing of it is to be differentiated.
"""

import dataclasses
import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import _validate

# Rounding a rank-deficient matrix leaves singular values of about one eps.
_SAFETY = 8
# Of narrower weights as well: 8 times their own resolution is larger than the
# smallest singular value of many a square matrix of full rank.
_MOST = _SAFETY * float(np.finfo(np.float32).eps)
_LARGEST = 4096  # rows: beyond it the square factor of the SVD is too large
_CURVE = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PatchKernel:
  """The kernel of a linear map ``[p] -> [d]``, as host arrays.

  Attributes:
    basis: ``[p, q]`` float64, orthonormal columns; q may be 0.
    singular_values: ``[min(p, d)]`` float64, falling, of the map itself (of
      all channels side by side, one after the other, where ``per_channel``).
    rank: p less q: at ``tolerance`` that of the map; of single channels the sum
      of theirs, which may exceed it.
    gap: the last singular value that counts over the first one that does not;
      infinite where the latter is 0, or where there is none. Near 1 the rank is
      a matter of taste: look at :meth:`dimension`.
    tolerance: relative to the largest singular value; what does not exceed it
      counts as zero.
    patch_shape: ``(r, r, c)`` of one patch where it is known, or None.
    num_parts: maps that it is the direct sum of: 1, or the channels.
  """

  basis: Any
  singular_values: Any
  rank: int
  gap: float
  tolerance: float
  patch_shape: tuple[int, int, int] | None = None
  num_parts: int = 1

  @property
  def dim(self) -> int:
    """q, the dimension of the kernel."""
    return self.basis.shape[1]

  def dimension(self, tolerance: float) -> int:
    """What the dimension would be at another relative tolerance.

    Of the joint kernel, or of the sum of those of single channels, each
    relative to its own largest value. A kernel that is real keeps its dimension
    over orders of magnitude: see :attr:`dimensions`.
    """
    values = np.reshape(self.singular_values, (self.num_parts, -1))
    kept = np.sum(values > tolerance * values[:, :1])
    return self.basis.shape[0] - int(kept)

  @property
  def dimensions(self) -> dict[float, int]:
    """``{tolerance: dimension}`` from 1e-8 to 1e-2, by powers of ten."""
    return {tolerance: self.dimension(tolerance) for tolerance in _CURVE}

  def project(self, delta: Any) -> jax.Array:
    """The nearest element of the kernel, ``[..., p] -> [..., p]``.

    In the dtype of ``delta``; as ``B (B^T delta)``, never through ``[p, p]``.

    Raises:
      ValueError: ``delta`` has another last axis, or is not of floats.
    """
    if jnp.shape(delta)[-1:] != self.basis.shape[:1]:
      raise ValueError(
        f"delta must end in an axis of {self.basis.shape[0]} entries, got "
        f"{jnp.shape(delta)}."
      )
    if not jnp.issubdtype(jnp.result_type(delta), jnp.floating):
      raise ValueError(
        f"delta must be floats, got {jnp.result_type(delta)}: the kernel has "
        f"no whole numbers."
      )
    delta = jnp.asarray(delta)
    basis = jnp.asarray(self.basis, delta.dtype)
    with jax.default_matmul_precision("highest"):
      return (delta @ basis) @ basis.T


def patch_kernel(
  weight: Any,
  *,
  std: Any = None,
  tolerance: float | None = None,
  per_channel: bool = False,
  channels: int | None = None,
  fidelity: str = "default",
) -> PatchKernel:
  r"""What of a patch its linear embedding does not see.

  Formal guarantees:
    - In real arithmetic, pixel noise of which every patch is in the kernel
      changes no token, so nothing that the network computes; patches choose
      independently, and the bias plays no part.
    - It says so of pixels only if ``std`` is that of the normalisation before
      the embedding: the kernel in pixels is that of :math:`diag(1/std) W`.

  What it does not cover: stems whose patches overlap (:func:`project_kernel`),
  and images that are rounded to 8 bits afterwards, which leaves the kernel.

  >>> kernel = patch_kernel(np.random.default_rng(0).normal(size=(49, 32)))
  >>> kernel.dim
  17

  Args:
    weight: ``[p, d]``, rows in the order of a flattened patch (r, r, c); or
      ``[r, r, c, d]`` as of a convolution.
    std: the standard deviation that pixels are divided by: a number, or one a
      channel ``[c]``; None for no normalisation.
    tolerance: relative to the largest singular value, below 1. By default 8
      times the resolution of the dtype of ``weight``, and of float32 at most:
      enough for what rounding leaves of a rank-deficient matrix, but in
      bfloat16 and float16, where it leaves more than many a full one has: there
      a kernel that rounding has hidden is not found, rather than one invented
      that changes tokens. Published:
      ``max(p, d)`` times the resolution, p of one channel, which finds kernels
      in one of seven random square matrices of 768; refused where that is 1.
    per_channel: the direct sum of the kernels of single channels, as the
      published code has it: a part of the joint kernel.
    channels: c, which ``[p, d]`` needs with ``per_channel`` or ``published``
      unless ``std`` has one a channel.
    fidelity: ``published`` for the published tolerance, and one channel at a
      time.

  Raises:
    ValueError: naming ``weight`` (not 2-D or 4-D, not finite, too large),
      ``std``, ``tolerance`` or ``channels``.

  References:
    `Liu et al. (2024) <https://arxiv.org/abs/2403.10476>`_, section 3.
  """
  _validate.one_of(("default", "published"), fidelity=fidelity)
  weight = _checked(weight, ranks=(2, 4))
  shape = weight.shape[:3] if weight.ndim == 4 else None
  matrix = np.reshape(weight, (-1, weight.shape[-1]))
  resolution = _resolution(matrix)
  matrix = matrix.astype(np.float64)
  size = matrix.shape[0]
  published = fidelity == "published"
  single = per_channel or published
  if single and shape is None and channels is None and np.size(std) < 2:
    raise ValueError(
      f"channels must be given with weight of shape {weight.shape}, one "
      f"channel at a time: how many of them share its rows."
    )
  channels = _channels(shape, std, channels, size)
  if std is not None:
    matrix = matrix / _deviations(std, size, channels)[:, None]
  if tolerance is None:
    longest = max(size // channels, matrix.shape[1])
    tolerance = resolution * longest if published else _tolerance(weight)
  _validate.below_one(tolerance=tolerance)
  if not single:
    return _kernel(matrix, tolerance, shape)
  parts = [_kernel(matrix[c::channels], tolerance) for c in range(channels)]
  basis = np.zeros((size, sum(part.dim for part in parts)))
  start = 0
  for c, part in enumerate(parts):
    basis[c::channels, start : start + part.dim] = part.basis
    start += part.dim
  return PatchKernel(
    basis=basis,
    singular_values=np.concatenate([p.singular_values for p in parts]),
    rank=size - basis.shape[1],
    gap=min(part.gap for part in parts),
    tolerance=float(tolerance),
    patch_shape=shape,
    num_parts=channels,
  )


def embedding_kernel(net: Any, params: Any, **options: Any) -> PatchKernel:
  """:func:`patch_kernel` of the embedding of a vision transformer, in pixels.

  Args:
    net: with ``patch_weight``, ``patch_size`` and ``preprocess``, whose
      standard deviation comes in: a ``models.vit.VisionTransformer``.
    params: its parameters.
    **options: ``tolerance``, ``per_channel`` and ``fidelity``; and ``std`` of
      what normalises images before a network without ``preprocess``, as
      multimodal models do by default.

  Raises:
    ValueError: ``std`` where the network has its own, or as of
      :func:`patch_kernel`.
  """
  weight = np.asarray(net.patch_weight(params))
  weight = np.reshape(weight, (*net.patch_size, -1, weight.shape[-1]))
  if net.preprocess is not None:
    if "std" in options:
      raise ValueError(
        "std must be left out: the network has a preprocess of its own."
      )
    options["std"] = net.preprocess[1]
  return patch_kernel(weight, **options)


def linear_kernel(
  weight: Any, *, std: Any = None, tolerance: float | None = None
) -> PatchKernel:
  """What of its input a first layer ``x @ weight`` does not see.

  Args:
    weight: ``[p, d]``.
    std: what inputs are divided by before: a number, or ``[p]``.
    tolerance: as of :func:`patch_kernel`.

  Raises:
    ValueError: naming the argument that is wrong.
  """
  weight = _checked(weight, ranks=(2,))
  return patch_kernel(
    weight, std=std, tolerance=tolerance, channels=weight.shape[0]
  )


def head_kernel(weight: Any, *, tolerance: float | None = None) -> PatchKernel:
  """Directions of the embedding that move no difference of two logits.

  Of dimension d - (k - 1) at full rank: what moves all logits alike counts.

  Args:
    weight: ``[d, k]`` of the last layer, ``embedding @ weight``.
    tolerance: as of :func:`patch_kernel`.

  Raises:
    ValueError: naming ``weight`` or ``tolerance``.
  """
  weight = _checked(weight, ranks=(2,))
  if tolerance is None:
    tolerance = _tolerance(weight)
  _validate.below_one(tolerance=tolerance)
  wide = weight.astype(np.float64)
  return _kernel(wide - wide.mean(axis=1, keepdims=True), tolerance)


def project_kernel(
  delta: Any,
  matvec: Callable[[Any], Any],
  rmatvec: Callable[[Any], Any],
  *,
  num_steps: int = 200,
  num_rounds: int = 2,
) -> Any:
  r"""The nearest element of the kernel of a linear map that is a function.

  .. math:: \delta - A^T (A A^T)^+ A \delta

  by conjugate gradients: for overlapping convolutions, and whatever is too
  large for an SVD. Pure; every round corrects what the one before left, which
  in float32 matters.

  Args:
    delta: pytree of arrays.
    matvec: A, on pytrees like ``delta``.
    rmatvec: its transpose, such as ``jax.linear_transpose`` gives.
    num_steps: of conjugate gradients, a round.
    num_rounds: corrections.

  Raises:
    ValueError: ``num_steps`` or ``num_rounds`` below 1.
  """
  _validate.at_least(1, num_steps=num_steps, num_rounds=num_rounds)

  def normal(z):
    return matvec(rmatvec(z))

  for _ in range(num_rounds):
    z, _ = jax.scipy.sparse.linalg.cg(
      normal, matvec(delta), tol=1e-12, maxiter=num_steps
    )
    delta = jax.tree.map(jnp.subtract, delta, rmatvec(z))
  return delta


def _kernel(matrix, tolerance: float, shape=None) -> PatchKernel:
  left, values, _ = np.linalg.svd(matrix, full_matrices=True)
  rank = int(np.sum(values > tolerance * values[0])) if len(values) else 0
  gap = math.inf
  if 0 < rank < len(values) and values[rank] > 0:
    gap = float(values[rank - 1] / values[rank])
  return PatchKernel(
    basis=left[:, rank:],
    singular_values=values,
    rank=rank,
    gap=gap,
    tolerance=float(tolerance),
    patch_shape=shape,
  )


def _checked(weight, ranks: Sequence[int]):
  weight = np.asarray(weight)
  if weight.ndim not in ranks or 0 in weight.shape:
    wanted = " or ".join(f"{rank}-D" for rank in ranks)
    raise ValueError(f"weight must be {wanted}, got shape {weight.shape}.")
  if math.prod(weight.shape[:-1]) > _LARGEST:
    raise ValueError(
      f"weight must have at most {_LARGEST} rows, got shape {weight.shape}; "
      f"project_kernel needs no decomposition."
    )
  if jnp.iscomplexobj(weight):
    raise ValueError(f"weight must be real, got {weight.dtype}.")
  sides = weight.shape
  if len(sides) == 4 and sides[2] == sides[3] and sides[0] != sides[1]:
    raise ValueError(
      f"weight must be [rows, columns, channels, d], got shape {weight.shape}; "
      f"[d, channels, rows, columns] needs transpose(2, 3, 1, 0)."
    )
  if not np.all(np.isfinite(weight.astype(np.float64))):
    raise ValueError("weight must be finite.")
  return weight


def _resolution(weight) -> float:
  """eps of the stored dtype; integers are exact in float64."""
  if not jnp.issubdtype(weight.dtype, jnp.floating):
    return float(np.finfo(np.float64).eps)
  return float(jnp.finfo(weight.dtype).eps)


def _tolerance(weight) -> float:
  """By default, see :func:`patch_kernel`."""
  return min(_SAFETY * _resolution(weight), _MOST)


def _channels(shape, std, channels, size: int) -> int:
  if shape is not None:
    known = shape[2]
  elif channels is not None:
    known = channels
  else:
    known = np.size(std) if std is not None else 1
  if known < 1 or size % known:
    raise ValueError(
      f"channels must divide the {size} rows of weight, got {known}."
    )
  return known


def _deviations(std, size: int, channels: int):
  std = np.asarray(std, np.float64)
  if std.ndim > 1 or std.size not in (1, channels):
    raise ValueError(
      f"std must be a number or one of each of {channels} channels, got shape "
      f"{std.shape}."
    )
  if not np.all((std > 0) & np.isfinite(std)):
    raise ValueError("std must be positive and finite.")
  # Channels come last in a flattened patch.
  return np.tile(
    np.broadcast_to(std.reshape(-1), (channels,)), size // channels
  )
