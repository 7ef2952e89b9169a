r"""Certified l2 -> l2 Lipschitz constants of layers, and how they compose.

Every function returns an upper bound; those that sum over a kernel are rounded
up by 8 machine epsilons (``linalg.gram_norm`` by its own). Constants of a
whole network are made from these by hand, or read off encoders built from
``models.lipschitz``. There is no rule for dot-product attention, recurrent
cells, embedding tables or batch statistics: nothing finite and useful is true
of them.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float

from robust_mm import _extremes
from robust_mm import _validate
from robust_mm import linalg

ACTIVATION_SLOPES = {
  "abs": 1.0,
  "elu": 1.0,
  "gelu": 1.13,
  "groupsort": 1.0,
  "hardtanh": 1.0,
  "identity": 1.0,
  "leaky_relu": 1.0,
  "maxmin": 1.0,
  "mish": 1.09,
  "relu": 1.0,
  "sigmoid": 0.25,
  "silu": 1.10,
  "softplus": 1.0,
  "tanh": 1.0,
}
"""Largest slope of each activation. The suprema of gelu (erf and tanh forms),
silu and mish are 1.1290, 1.0999 and 1.0886, rounded up; leaky_relu is that with
a negative slope of at most 1, elu that with alpha = 1."""

_SVD_LIMIT = 2048
_ROUND_UP = 8.0  # machine epsilons

_Scalar = Float[Array, ""] | float


def activation(name: str) -> float:
  """The largest slope of a named activation; ValueError for an unknown one."""
  _validate.one_of(ACTIVATION_SLOPES, activation=name)
  return ACTIVATION_SLOPES[name]


def dense_norm(
  W: Float[Array, "k d"] | Float[np.ndarray, "k d"],
  *,
  method: str = "gram",
  num_iters: int = 16,
) -> _Scalar:
  r"""Upper bound of :math:`\|W\|_2`.

  Args:
    W: ``[k, d]``; whether rows or columns are outputs does not matter.
    method: "gram" (:func:`linalg.gram_norm`, traceable and differentiable);
      "svd" (float64 on the host, the exact norm, concrete arrays with a side of
      at most 2048); "schur" (cheapest); "frobenius".
    num_iters: of the Gram iteration.

  Returns:
    A scalar array; a float for "svd".
  """
  _validate.one_of(("gram", "svd", "schur", "frobenius"), method=method)
  if method == "svd":
    if isinstance(W, jax.core.Tracer):
      raise ValueError("method='svd' runs on the host; use 'gram' under jit.")
    if min(W.shape) > _SVD_LIMIT:
      raise ValueError(f"method='svd' takes a side of at most {_SVD_LIMIT}.")
    return float(np.linalg.norm(np.asarray(W, np.float64), 2))
  W = jnp.asarray(W)
  if method == "schur":
    return schur_norm(W)
  if method == "frobenius":
    return _up(jnp.linalg.norm(W))
  return linalg.gram_norm(W, num_iters=num_iters)


def dense_chain(
  kernels: Sequence[Float[Array, "_ _"]],
  rows: Float[Array, "k d"],
  *,
  last: Float[Array, "d _"] | None = None,
  num_iters: int = 16,
) -> Float[Array, "k k"]:
  r"""Pairwise constants of a dense network and its head, class by class.

  For ``x -> W_1 x -> act -> ... -> W_n -> act -> V`` with activation slopes in
  [0, 1], a bound of the constant of :math:`z_y - z_j` that is never looser than
  the product of norms:

  .. math:: X_0 = I, \quad A_i = W_i X_{i-1}^{-1} W_i^T, \quad
            l_i = 2 / \lambda_{max}(A_i), \quad
            X_i = l_i I - \tfrac{l_i^2}{4} A_i

  .. math:: C[y, j] = \sqrt{w X_n^{-1} w^T}, \qquad w = V_y - V_j

  Every :math:`X_i` has eigenvalues in :math:`[l_i / 2, l_i]`, so its inverse is
  a short Neumann series of matrix products: no factorisation, differentiable.

  Formal guarantees:
    - Sound: :math:`\lambda_{max}` is bounded from above, the rest of the
      series is added, and the result is rounded up by 4 machine epsilons a
      row of every matrix.

  Args:
    kernels: ``[out, in]`` of every hidden layer, the first one first; none for
      a linear map.
    rows: ``[k, d]``, the head :math:`V` on the last hidden layer, or on
      ``last`` of it.
    last: a linear map between the two. (Rows are subtracted before they are
      multiplied: of near-equal ones nothing else would be left but rounding.)
    num_iters: of the Gram iteration; 6 in a loss, 16 in a certificate.

  Returns:
    ``[k, k]``, diagonal 0.

  Raises:
    ValueError: sizes that do not fit, naming the layer.

  References:
    `Xu & Sivaranjani (2024) <https://arxiv.org/abs/2404.04375>`_, the fast
    form.
  """
  end = rows if last is None else last
  sizes = [*(kernel.shape[1] for kernel in kernels), end.shape[1]]
  for index, kernel in enumerate(kernels):
    if kernel.shape[0] != sizes[index + 1]:
      raise ValueError(
        f"kernels[{index}] has {kernel.shape[0]} outputs, the next layer "
        f"takes {sizes[index + 1]}."
      )
  # X^-1 = scale * inverse, the scale apart: it is a product of norms.
  inverse, log_scale = None, jnp.zeros((), rows.dtype)
  for kernel in kernels:
    gram = _congruence(kernel, inverse)
    largest = linalg.gram_norm(gram, num_iters=num_iters)
    largest = jnp.where(largest > 0, largest, 1)
    inverse = _neumann(gram / (2 * largest))
    log_scale = log_scale + jnp.log(largest / 2)

  def constants(row):
    difference = row[None] - rows
    if last is not None:
      difference = _dot(difference, last)
    return _metric(difference, inverse)

  table = jax.lax.map(constants, rows)
  up = 1 + 4 * float(jnp.finfo(rows.dtype).eps) * (sum(sizes) + rows.shape[1])
  return table * jnp.exp(log_scale / 2) * up


def _congruence(kernel, inverse):
  left = kernel if inverse is None else _dot(kernel, inverse)
  gram = _dot(left, jnp.swapaxes(kernel, -2, -1))
  return (gram + jnp.swapaxes(gram, -2, -1)) / 2


def _neumann(matrix):
  """Above ``(I - B)^-1`` for symmetric B with eigenvalues in [0, 1/2]."""
  eye = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
  total, power = eye + matrix, matrix
  for _ in range(5):
    power = _dot(power, power)
    total = total + _dot(total, power)
  # 64 terms: what is left is at most 2^-63 of the whole.
  return (total + jnp.swapaxes(total, -2, -1)) / 2


def _metric(difference, inverse):
  """``sqrt(w X w^T)`` of every row."""
  scale = jnp.max(jnp.abs(difference), axis=-1, keepdims=True)
  scale = jax.lax.stop_gradient(jnp.where(scale > 0, scale, 1))
  w = difference / scale
  image = w if inverse is None else _dot(w, inverse)
  square = jnp.sum(image * w, axis=-1)
  root = jnp.sqrt(jnp.where(square > 0, square, 1))
  return jnp.where(square > 0, root, 0) * scale[..., 0]


def _dot(left, right):
  return jnp.matmul(left, right, precision="highest")


def schur_norm(W: Float[Array, "k d"]) -> Float[Array, ""]:
  r"""The bound :math:`\sqrt{\|W\|_1 \|W\|_\infty}`, at most Frobenius times
  :math:`\sqrt[4]{kd}`."""
  magnitude = jnp.abs(W)
  rows = jnp.max(jnp.sum(magnitude, axis=1))
  columns = jnp.max(jnp.sum(magnitude, axis=0))
  return _up(jnp.sqrt(rows * columns))


def conv_norm(
  kernel: Float[Array, "... i o"],
  input_shape: Sequence[int] | None = None,
  *,
  stride: int = 1,
  groups: int = 1,
  dilation: int = 1,
  num_iters: int = 16,
) -> Float[Array, ""]:
  r"""Upper bound of the norm of a convolution with zero padding.

  VALID, SAME and FULL zero padding are restrictions of the circular convolution
  on maps of size :math:`N \ge n + n_k - 1`, whose norm is the largest norm of
  its ``c_out x c_in`` transfer matrices over the frequencies. ``N = n`` would
  *not* be a bound. With stride s the map is that of the :math:`s^d` phases of
  the input, as channels of a map s times smaller, without stride.

  Formal guarantees:
    - Sound for the paddings named, strides, dilation and groups. A transposed
      convolution has the norm of its convolution.
    - A stride only removes outputs, so the bound of stride 1 holds for all;
      with ``stride`` it is up to :math:`\sqrt{s^d}` smaller.
    - Without ``input_shape``: :math:`\sqrt{\max_{in}\sum_{out}|K| \cdot
      \max_{out}\sum_{in}|K|}` (Schur), cheaper and looser.

  Args:
    kernel: ``[*n_k, c_in / groups, c_out]``, the layout of flax.
    input_shape: spatial input size, one entry an axis, without channels.
    stride: ``strides``, the same on all axes.
    groups: ``feature_group_count``.
    dilation: ``kernel_dilation``, the same on all axes.
    num_iters: of the Gram iteration on the transfer matrices.

  References:
    `Delattre et al. (2024) <https://arxiv.org/abs/2402.00240>`_ for padding.
  """
  _validate.at_least(1, stride=stride, groups=groups, dilation=dilation)
  if kernel.shape[-1] % groups:
    raise ValueError(f"groups must divide {kernel.shape[-1]}, got {groups}.")
  # [groups, *n_k, c_in, c_out]: block-diagonal over groups.
  split = jnp.stack(jnp.split(kernel, groups, axis=-1))
  axes = tuple(range(1, kernel.ndim - 1))
  if input_shape is None:
    magnitude = jnp.sum(jnp.abs(split), axis=axes)
    sums = jnp.max(jnp.sum(magnitude, 1), -1) * jnp.max(
      jnp.sum(magnitude, 2), -1
    )
    return _up(jnp.sqrt(jnp.max(sums)))
  if len(input_shape) != len(axes):
    raise ValueError(
      f"input_shape must have {len(axes)} entries, got {tuple(input_shape)}."
    )
  phases = _phases(_dilate(split, axes, dilation), axes, stride)
  # n entries in a row touch that many places of a map s times smaller.
  sizes = [
    -(-(n + stride - 1) // stride) + phases.shape[axis] - 1
    for n, axis in zip(input_shape, axes)
  ]
  # Of a real kernel the other half of the frequencies is conjugate.
  transfer = jnp.fft.rfftn(phases, s=sizes, axes=axes)
  transfer = jnp.reshape(transfer, (-1, *transfer.shape[-2:]))
  return _up(jnp.max(linalg.gram_norm(_real(transfer), num_iters=num_iters)))


def conv_matrix(
  kernel: Float[Array, "... i o"], *, stride: int = 1
) -> Float[Array, "j o"]:
  r"""A matrix whose norm bounds that of a convolution: cheap, for a loss.

  A convolution is one matrix on every patch, and an entry of the input is in at
  most :math:`\prod \lceil n_k / s \rceil` of them, whatever the padding; at
  stride :math:`n_k` the bound is the norm itself. :func:`conv_norm` is never
  far above and often far below.

  Args:
    kernel: ``[*n_k, c_in, c_out]``, one group, no dilation.
    stride: the same on all axes.

  Returns:
    ``[prod(n_k) c_in, c_out]``, scaled.
  """
  _validate.at_least(1, stride=stride)
  overlap = math.prod(-(-size // stride) for size in kernel.shape[:-2])
  return jnp.reshape(kernel, (-1, kernel.shape[-1])) * math.sqrt(overlap)


def _up(bound: Array) -> Array:
  """Rounded up past the rounding of sums and transforms."""
  return bound * (1 + _ROUND_UP * float(jnp.finfo(bound.dtype).eps))


def _dilate(kernel: Array, axes: Sequence[int], dilation: int) -> Array:
  config = [(0, 0, 0)] * kernel.ndim
  for axis in axes:
    config[axis] = (0, 0, dilation - 1)
  return jax.lax.pad(kernel, jnp.zeros((), kernel.dtype), config)


def _phases(kernel: Array, axes: Sequence[int], stride: int) -> Array:
  """``[g, *n, i, o]`` of stride s as ``[g, *ceil(n / s), s^d i, o]`` of 1."""
  for axis in axes:
    missing = -kernel.shape[axis] % stride
    config = [(0, 0)] * kernel.ndim
    config[axis] = (0, missing)
    shape = list(kernel.shape)
    shape[axis : axis + 1] = [(shape[axis] + missing) // stride, stride]
    split = jnp.reshape(jnp.pad(kernel, config), shape)
    moved = jnp.moveaxis(split, axis + 1, -3)
    shape = (*moved.shape[:-3], stride * moved.shape[-2], moved.shape[-1])
    kernel = jnp.reshape(moved, shape)
  return kernel


def _real(matrix: Array) -> Array:
  """The real form ``[[A, -B], [B, A]]`` of ``A + iB``: the same norm."""
  real, imag = jnp.real(matrix), jnp.imag(matrix)
  top = jnp.concatenate([real, -imag], axis=-1)
  return jnp.concatenate([top, jnp.concatenate([imag, real], -1)], axis=-2)


def mean_pool(num_items: int) -> float:
  r"""Mean over ``T`` items: :math:`1/\sqrt T`.

  A masked mean over the ``T_i`` present frames of an example has
  :math:`1/\sqrt{T_i}`, sound because masks are not attacked.
  """
  _validate.at_least(1, num_items=num_items)
  return 1 / math.sqrt(num_items)


def average_pool(window: Sequence[int], stride: Sequence[int]) -> float:
  r"""Average pooling: :math:`\prod \sqrt{\lceil w/s \rceil / w}` over axes."""
  return _pool(window, stride) / math.sqrt(math.prod(window))


def max_pool(window: Sequence[int], stride: Sequence[int]) -> float:
  r"""Max pooling: :math:`\prod \sqrt{\lceil w/s \rceil}`; 1 without overlap.

  A global maximum has constant 1 as well.
  """
  return _pool(window, stride)


def _pool(window: Sequence[int], stride: Sequence[int]) -> float:
  if len(window) != len(stride):
    raise ValueError(
      f"stride must have as many axes as window, got {tuple(stride)} for "
      f"{tuple(window)}."
    )
  for w, s in zip(window, stride):
    _validate.at_least(1, window=w, stride=s)
  return math.sqrt(math.prod(-(-w // s) for w, s in zip(window, stride)))


def normalization(scale) -> float:
  r"""``x -> (x - mean) / scale``: ``1 / min |scale|``; inf for a zero scale."""
  smallest = float(np.min(np.abs(np.asarray(scale, np.float64))))
  return 1 / smallest if smallest > 0 else math.inf


def batch_norm(
  scale: Float[Array, " d"],
  variance: Float[Array, " d"],
  *,
  epsilon: float = 1e-5,
) -> Float[Array, ""]:
  """Batch normalisation in *evaluation* mode, a plain affine map.

  With batch statistics there is no bound at all.
  """
  return _extremes.largest(jnp.abs(scale) * jax.lax.rsqrt(variance + epsilon))


def layer_norm(
  scale: Float[Array, " d"], *, epsilon: float = 1e-5
) -> Float[Array, ""]:
  """Layer normalisation: its true supremum, 316 at the usual epsilon."""
  _validate.positive(epsilon=epsilon)
  return _extremes.largest(jnp.abs(scale)) / math.sqrt(epsilon)


def compose(*constants):
  """``f . g``: the product."""
  return math.prod(constants)


def add(*constants):
  """``f + g`` of one input: the sum."""
  return sum(constants)


def residual(constant):
  """``x + f(x)``: ``1 + L_f``."""
  return 1 + constant


def concatenate(*constants):
  """Concatenated outputs of one input: root of the sum of squares."""
  return jnp.sqrt(sum(jnp.square(jnp.asarray(c)) for c in constants))


def parallel(*constants):
  """Maps of disjoint parts of the input, side by side: the maximum."""
  return _extremes.largest(jnp.stack([jnp.asarray(c) for c in constants]))
