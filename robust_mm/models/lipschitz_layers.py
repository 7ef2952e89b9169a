r"""Layers that are 1-Lipschitz by construction.

Every layer here has l2 -> l2 constant at most 1 for *any* value of its
parameters; ``models.lipschitz`` makes encoders of them. What a layer does about
its own norm:

- AOL rescales columns by a bound of the Gram matrix; exact for orthonormal
  columns. Goes with :func:`max_min`.
- SLL is a residual block :math:`x - 2 W T^{-1} relu(W^T x + b)` with constant
  1. Needs an activation with slopes in [0, 1].
- Bjorck takes the polar factor (Newton-Schulz), Cayley the Cayley transform of
  its weight: orthonormal rows or columns. Go with :func:`max_min`.

"projected" layers are the exception: their weight is used as it is, and made
orthonormal by ``project`` every few updates, which is many times cheaper. What
they state is a bound of the weight as it stands, whoever forgets to project.

Zero padding and strides are sound for the convolutions, because a truncated
convolution is a compression of the infinite one. Matrix products run at
``precision="highest"``: TF32 or bfloat16 would void the constant.

References:
  AOL: `Prach & Lampert (2022) <https://arxiv.org/abs/2208.03160>`_. SLL:
  `Araujo et al. (2023) <https://arxiv.org/abs/2303.03169>`_. Bjorck, MaxMin:
  `Anil et al. (2019) <https://arxiv.org/abs/1811.05381>`_. Cayley: `Trockman &
  Kolter (2021) <https://arxiv.org/abs/2104.07167>`_.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from jaxtyping import Float

from robust_mm import _validate
from robust_mm import linalg

METHODS = ("bjorck", "cayley", "aol", "projected")


def max_min(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
  """(max, min) of channel ``i`` and channel ``i + d/2``; ``d`` even.

  A permutation of the input, so norms are kept exactly.
  """
  if x.shape[-1] % 2:
    raise ValueError(f"max_min needs an even width, got {x.shape[-1]}.")
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
    [jnp.maximum(first, second), jnp.minimum(first, second)], axis=-1
  )


def aol_scale(absolute_gram: Float[Array, "*b d d"]) -> Float[Array, "*b d"]:
  r"""The factors :math:`D_i = (\sum_j |W^T W|_{ij})^{-1/2}`; 0 for a zero sum.

  :math:`\|W D\|_2 \le 1` by diagonal dominance.
  """
  total = jnp.sum(absolute_gram, axis=-1)
  return jnp.where(
    total > 0, jax.lax.rsqrt(jnp.where(total > 0, total, 1.0)), 0.0
  )


def sll_scale(
  absolute_gram: Float[Array, "*b d d"], q: Float[Array, "*b d"]
) -> Float[Array, "*b d"]:
  r"""The factors :math:`2/T_i`, :math:`T_i=\sum_j |W^T W|_{ij} e^{q_j-q_i}`.

  0 where the sum is 0: that unit then does nothing.
  """
  ratio = jnp.exp(q[..., None, :] - q[..., :, None])
  total = jnp.sum(absolute_gram * ratio, axis=-1)
  return jnp.where(total > 0, 2 / jnp.where(total > 0, total, 1.0), 0.0)


def absolute_autocorrelation(
  kernel: Float[Array, "*n c o"],
) -> Float[Array, "o o"]:
  r"""The sums :math:`\sum_u |A_{ij}(u)|` over the autocorrelation of a kernel.

  :math:`A_{ij}(u) = \sum_{v,c} K[v,c,i] K[v+u,c,j]`, all offsets ``u`` from
  :math:`-(n_k-1)` to :math:`n_k-1` on each axis.
  """
  taps = list(itertools.product(*(range(n) for n in kernel.shape[:-2])))
  steps = [[tuple(np.subtract(b, a).tolist()) for b in taps] for a in taps]
  offsets = sorted({step for row in steps for step in row})
  # [u, v, w] = 1 where tap w lies the offset u after tap v.
  select = np.array([[[s == u for s in row] for row in steps] for u in offsets])
  flat = jnp.reshape(kernel, (len(taps), *kernel.shape[-2:]))
  # Two dense products: several times quicker on a CPU, backwards above all,
  # than a convolution of the kernel with itself.
  pairs = jnp.einsum("vci,wcj->vwij", flat, flat, precision="highest")
  correlation = jnp.einsum(
    "uvw,vwij->uij", select.astype(kernel.dtype), pairs, precision="highest"
  )
  return jnp.sum(jnp.abs(correlation), axis=0)


class OneLipschitz(nnx.Module):
  """States the constant of everything in this file.

  A subclass computes its map from its parameters in every call. ``freeze``
  puts what was computed in their place, and ``fixed`` says so: same map, no
  longer to be trained.
  """

  fixed = False

  def lipschitz(self) -> Float[Array, ""]:
    """1, times what projected parts exceed it by (or stay below)."""
    bound = jnp.ones(())
    for _, part in nnx.iter_modules(self):
      if isinstance(part, Dense) and part.projects:
        bound = bound * jnp.prod(part.norms())
    return bound

  def freeze(self) -> None:
    """See above; in place."""
    self.fixed = True


class Dense(OneLipschitz):
  """``num_layers`` dense layers of one shape, each with norm at most 1.

  The weights of equal layers are made orthonormal together, in one batch of
  products. With ``num_layers > 1`` (square ones) :func:`max_min` stands
  between them; the call ends with the affine map of the last.
  """

  def __init__(
    self,
    num_inputs: int,
    num_outputs: int,
    *,
    method: str = "bjorck",
    num_layers: int = 1,
    num_iters: int = 12,
    use_bias: bool = True,
    rngs: nnx.Rngs,
  ):
    _validate.one_of(METHODS, method=method)
    _validate.at_least(1, num_layers=num_layers, num_iters=num_iters)
    if num_layers > 1 and num_inputs != num_outputs:
      raise ValueError("num_layers > 1 needs num_inputs equal to num_outputs.")
    shape = (num_layers, num_outputs, num_inputs)
    # The Cayley transform maps 0 to the identity, whose layers would all be
    # the same; normal entries spread its eigenvalues over the circle.
    if method == "cayley":
      normal = nnx.initializers.glorot_normal(batch_axis=0)
      weight = normal(rngs.params(), shape)
    else:
      weight = linalg.random_orthonormal(rngs.params(), shape)
    self.weight = nnx.Param(weight)
    self.bias = nnx.Param(jnp.zeros(shape[:2])) if use_bias else None
    self.method = method
    self.num_iters = num_iters

  def matrices(self) -> Float[Array, "n o i"]:
    """The maps themselves, ``[num_layers, num_outputs, num_inputs]``."""
    weight = self.weight[...]
    if self.fixed or self.projects:
      return weight
    if self.method == "bjorck":
      return linalg.newton_schulz(weight, num_iters=self.num_iters)
    if self.method == "cayley":
      return linalg.cayley(weight)
    gram = jnp.einsum("noi,noj->nij", weight, weight, precision="highest")
    return jnp.einsum("noi,ni->noi", weight, aol_scale(jnp.abs(gram)))

  def freeze(self) -> None:
    self.weight = nnx.Param(self.matrices())
    super().freeze()

  @property
  def projects(self) -> bool:
    """Whether it is ``project`` that makes the weight orthonormal."""
    return self.method == "projected"

  def project(self) -> None:
    """Replaces the weight by its polar factor, in place."""
    weight = self.weight[...]
    # Sixteen large updates leave small singular values, and a rare projection
    # can take the steps they need; it stops when it has converged.
    num_iters = max(self.num_iters, 40)
    projected = linalg.newton_schulz(weight, num_iters=num_iters)
    self.weight = nnx.Param(projected.astype(weight.dtype))

  def norms(self) -> Float[Array, " n"]:
    """Upper bounds of the spectral norms; 1 + 5e-5 at most after projection."""
    return linalg.gram_norm(self.matrices())

  def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
    for index, matrix in enumerate(self.matrices()):
      x = max_min(x) if index else x
      x = jnp.einsum("...i,oi->...o", x, matrix, precision="highest")
      if self.bias is not None:
        x = x + _like(self.bias[index], x)
    return x


class SLLDense(OneLipschitz):
  """``num_layers`` SLL residual blocks of one width and inner size."""

  def __init__(
    self,
    width: int,
    *,
    inner: int | None = None,
    num_layers: int = 1,
    rngs: nnx.Rngs,
  ):
    _validate.at_least(1, width=width, num_layers=num_layers)
    inner = width if inner is None else inner
    shape = (num_layers, width, inner)
    normal = nnx.initializers.normal(width**-0.5)
    self.weight = nnx.Param(normal(rngs.params(), shape))
    self.bias = nnx.Param(jnp.zeros((num_layers, inner)))
    self.q = nnx.Param(jnp.zeros((num_layers, inner)))

  def scale(self) -> Float[Array, "n i"]:
    """The factors of the inner units; ``q`` itself holds them once fixed."""
    if self.fixed:
      return self.q[...]
    weight = self.weight[...]
    gram = jnp.einsum("ndi,ndj->nij", weight, weight, precision="highest")
    return sll_scale(jnp.abs(gram), self.q[...])

  def freeze(self) -> None:
    self.q = nnx.Param(self.scale())
    super().freeze()

  def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    weight, scale = self.weight[...], self.scale()
    for index in range(weight.shape[0]):
      inner = jnp.einsum("...d,di->...i", x, weight[index], precision="highest")
      inner = nnx.relu(inner + _like(self.bias[index], inner))
      inner = inner * _like(scale[index], inner)
      x = x - jnp.einsum(
        "...i,di->...d", inner, weight[index], precision="highest"
      )
    return x


class SLLConv(OneLipschitz):
  """An SLL residual block of zero-padded convolutions, ``[b, *n, c]``."""

  def __init__(
    self,
    width: int,
    kernel_size: Sequence[int],
    *,
    inner: int | None = None,
    rngs: nnx.Rngs,
  ):
    _odd(kernel_size)
    inner = width if inner is None else inner
    shape = (*kernel_size, width, inner)
    normal = nnx.initializers.normal(np.prod(shape[:-1]) ** -0.5)
    self.kernel = nnx.Param(normal(rngs.params(), shape))
    self.bias = nnx.Param(jnp.zeros(inner))
    self.q = nnx.Param(jnp.zeros(inner))

  def scale(self) -> Float[Array, " i"]:
    """The factors of the inner channels; ``q`` itself holds them once fixed."""
    if self.fixed:
      return self.q[...]
    return sll_scale(absolute_autocorrelation(self.kernel[...]), self.q[...])

  def freeze(self) -> None:
    self.q = nnx.Param(self.scale())
    super().freeze()

  def __call__(self, x: Float[Array, "b *n c"]) -> Float[Array, "b *n c"]:
    kernel, scale = self.kernel[...], self.scale()
    inner = _convolve(x, kernel)
    inner = nnx.relu(inner + _like(self.bias[...], inner))
    inner = inner * _like(scale, inner)
    # The adjoint of a SAME convolution with an odd kernel: flipped, with its
    # channels swapped.
    axes = tuple(range(kernel.ndim - 2))
    adjoint = jnp.swapaxes(jnp.flip(kernel, axes), -2, -1)
    return x - _convolve(inner, adjoint)


class AOLConv(OneLipschitz):
  """A zero-padded convolution rescaled to norm at most 1, ``[b, *n, c]``."""

  def __init__(
    self,
    num_inputs: int,
    num_outputs: int,
    kernel_size: Sequence[int],
    *,
    rngs: nnx.Rngs,
  ):
    _odd(kernel_size)
    shape = (*kernel_size, num_inputs, num_outputs)
    # An orthogonal centre tap: AOL leaves orthonormal columns alone and
    # shrinks everything else.
    middle = tuple(n // 2 for n in kernel_size)
    tap = linalg.random_orthonormal(rngs.params(), shape[-2:])
    noise = nnx.initializers.normal(0.1 * np.prod(shape[:-1]) ** -0.5)
    kernel = noise(rngs.params(), shape).at[middle].add(tap)
    self.kernel = nnx.Param(kernel)
    self.bias = nnx.Param(jnp.zeros(num_outputs))

  def rescaled(self) -> Float[Array, "*n i o"]:
    """The kernel of the map itself."""
    kernel = self.kernel[...]
    if self.fixed:
      return kernel
    swapped = jnp.swapaxes(kernel, -2, -1)
    scale = aol_scale(absolute_autocorrelation(swapped))
    return jnp.einsum("...io,i->...io", kernel, scale)

  def freeze(self) -> None:
    self.kernel = nnx.Param(self.rescaled())
    super().freeze()

  def __call__(self, x: Float[Array, "b *n c"]) -> Float[Array, "b *n o"]:
    x = _convolve(x, self.rescaled())
    return x + _like(self.bias[...], x)


def space_to_depth(x: Float[Array, "b *n c"], factor: int) -> Array:
  """Blocks of ``factor`` on each axis become channels: an isometry.

  Axes that ``factor`` does not divide are zero-padded at their end.
  """
  pad = [(0, -n % factor) for n in x.shape[1:-1]]
  x = jnp.pad(x, [(0, 0), *pad, (0, 0)])
  num_axes = x.ndim - 2
  shape = [x.shape[0]]
  for n in x.shape[1:-1]:
    shape += [n // factor, factor]
  x = jnp.reshape(x, (*shape, x.shape[-1]))
  outer = [1 + 2 * axis for axis in range(num_axes)]
  inner = [2 + 2 * axis for axis in range(num_axes)]
  x = jnp.transpose(x, (0, *outer, *inner, 2 * num_axes + 1))
  return jnp.reshape(x, (*x.shape[: 1 + num_axes], -1))


def widen(x: Float[Array, "*b d"], width: int) -> Float[Array, "*b e"]:
  """Zero channels up to ``width``: an isometry."""
  pad = [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]
  return jnp.pad(x, pad)


def _convolve(x: Array, kernel: Array) -> Array:
  """SAME zero-padded convolution with stride 1, channels last."""
  axes = "HWD"[: kernel.ndim - 2]
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(1,) * len(axes),
    padding="SAME",
    dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
    precision="highest",
  )


def _like(vector: Array, x: Array) -> Array:
  """A vector of channels with the rank of ``x``."""
  return jnp.reshape(vector, (1,) * (x.ndim - 1) + vector.shape)


def _odd(kernel_size: Sequence[int]) -> None:
  if any(n % 2 == 0 for n in kernel_size):
    raise ValueError(f"kernel_size must be odd, got {tuple(kernel_size)}.")
