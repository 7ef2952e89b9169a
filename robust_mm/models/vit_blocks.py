"""What a vision transformer computes between its tokens and its head.

Pure functions over plain dicts of arrays. Matrix products run in the dtype of
their input; statistics of norms and softmax in float32 at least.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import PRNGKeyArray

from robust_mm._types import Params
from robust_mm.models import residual

IMPLEMENTATIONS = ("xla", "cudnn", "plain")


def init(
  key: PRNGKeyArray, width: int, num_heads: int, mlp_dim: int
) -> dict[str, Any]:
  """A block's parameters, kernels uniform by fan-in plus fan-out."""
  keys = jax.random.split(key, 4)
  head_dim = width // num_heads
  # Query, key and value are three layers that share a product: each is drawn
  # as its own.
  qkv = [_uniform(k, width, width) for k in jax.random.split(keys[0], 3)]
  return {
    "norm_attention": init_norm(width),
    "qkv": {
      "kernel": jnp.reshape(
        jnp.stack(qkv, axis=1), (width, 3, num_heads, head_dim)
      ),
      "bias": jnp.zeros((3, num_heads, head_dim)),
    },
    "out": _dense(keys[1], width, width),
    "norm_mlp": init_norm(width),
    "expand": _dense(keys[2], width, mlp_dim),
    "contract": _dense(keys[3], mlp_dim, width),
  }


def init_norm(width: int) -> dict[str, Array]:
  """Scale 1, bias 0."""
  return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def _dense(key, fan_in, fan_out):
  return {
    "kernel": _uniform(key, fan_in, fan_out),
    "bias": jnp.zeros(fan_out),
  }


def _uniform(key, fan_in, fan_out):
  limit = math.sqrt(6 / (fan_in + fan_out))
  return jax.random.uniform(key, (fan_in, fan_out), minval=-limit, maxval=limit)


def block(
  params: Params,
  x: Array,
  keep: Array | None,
  keys: tuple[PRNGKeyArray, PRNGKeyArray] | None,
  *,
  epsilon: float,
  dropout: float,
  implementation: str,
  length: int | None = None,
) -> Array:
  """Pre-norm self-attention and a perceptron, ``[b, n, d] -> [b, n, d]``.

  Args:
    params: of :func:`init`.
    x: tokens.
    keep: ``bool[b, n]``, who may be attended to; None for everybody.
    keys: of dropout after either part; None without.
    epsilon: of the norms.
    dropout: rate.
    implementation: of the attention.
    length: tokens at the front that may be attended to, for "cudnn" without
      ``keep``; None for all.
  """
  first, second = (None, None) if keys is None else keys
  y = norm(params["norm_attention"], x, epsilon)
  y = dense(params["qkv"], y)
  y = attend(y[..., 0, :, :], y[..., 1, :, :], y[..., 2, :, :], keep,
             implementation, length)  # fmt: skip
  y = dense(params["out"], jnp.reshape(y, x.shape))
  x = x + residual.dropped(y, dropout, first)
  y = norm(params["norm_mlp"], x, epsilon)
  y = dense(params["contract"], gelu(dense(params["expand"], y)))
  return x + residual.dropped(y, dropout, second)


def norm(params: Params, x: Array, epsilon: float) -> Array:
  """LayerNorm over the last axis; statistics in float32 at least."""
  return _norm(params["scale"], params["bias"], x, epsilon)


# Computed again for the gradient, as in gelu: that costs less time than what
# they would keep costs in memory.
@functools.partial(jax.checkpoint, static_argnums=3)
def _norm(scale, bias, x, epsilon):
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  scale, bias = (
    jnp.broadcast_to(value.astype(wide.dtype), wide.shape)
    for value in (scale, bias)
  )
  y = centred * jax.lax.rsqrt(variance + epsilon) * scale + bias
  return y.astype(x.dtype)


def dense(params: Params, x: Array) -> Array:
  """``[b, n, d] -> [b, n, ...]`` with a kernel ``[d, ...]``, bias ``[...]``."""
  kernel, bias = (params[name].astype(x.dtype) for name in ("kernel", "bias"))
  # A product of two matrices: the gradient of one with a batch axis takes
  # nearly twice as long on CPUs.
  y = jnp.reshape(x, (-1, x.shape[-1])) @ jnp.reshape(
    kernel, (kernel.shape[0], -1)
  )
  y = y + jnp.broadcast_to(jnp.reshape(bias, -1), y.shape)
  return jnp.reshape(y, (*x.shape[:-1], *kernel.shape[1:]))


@jax.checkpoint
def gelu(x: Array) -> Array:
  """The exact one, by the error function, of pretrained models.

  In float32 at least: bfloat16 has no 1 + erf near -1.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  y = 0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))
  return y.astype(x.dtype)


def attend(
  query: Array,
  key: Array,
  value: Array,
  keep: Array | None,
  implementation: str,
  length: int | None = None,
) -> Array:
  """Softmax attention, ``[b, n, heads, d_head]``; weights in float32 at least.

  A key that is not kept has weight 0 exactly; some key must be kept. Of
  ``length``, the number of tokens that are real, only "cudnn" knows, and only
  without ``keep``.
  """
  if implementation == "cudnn":
    return _attend_cudnn(query, key, value, keep, length)
  mask = None if keep is None else keep[:, None, None, :]
  # jax.nn.dot_product_attention rounds the weights of float64 to float32.
  if implementation == "plain" or query.dtype == jnp.float64:
    return _attend_plain(query, key, value, mask)
  return jax.nn.dot_product_attention(
    query, key, value, mask=mask, implementation=implementation
  )


def _attend_cudnn(query, key, value, keep, length):
  batch, number = query.shape[:2]
  mask = lengths = None
  if keep is not None:
    mask = keep[:, None, None, :]  # cuDNN wants a row for every query
    mask = jnp.broadcast_to(mask, (batch, 1, number, number))
  elif length is not None:
    lengths = jnp.full(batch, length, jnp.int32)
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    mask=mask,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    implementation="cudnn",
  )


def _attend_plain(query, key, value, mask):
  # Heads in front of tokens: then both products are matrix products as stored.
  query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
  wide = jnp.promote_types(query.dtype, jnp.float32)
  scores = jnp.einsum(
    "bhqd,bhkd->bhqk", query, key, preferred_element_type=wide
  )
  scores = scores / math.sqrt(query.shape[-1])
  if mask is not None:
    scores = jnp.where(mask, scores, -jnp.inf)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  return jnp.swapaxes(jnp.einsum("bhqk,bhkd->bhqd", weights, value), 1, 2)


def mean(x: Array, keep: Array | None) -> Array:
  """Over tokens that are kept, ``[b, n, d] -> [b, d]``; zeros for none."""
  if keep is None:
    return jnp.mean(x, axis=1)
  total = jnp.sum(jnp.where(keep[..., None], x, jnp.zeros_like(x)), axis=1)
  count = jnp.maximum(jnp.sum(keep, axis=1, keepdims=True), 1)
  return total / count.astype(x.dtype)


def keys(key: PRNGKeyArray | None, depth: int) -> list:
  """One key for the sequence, then a pair for every block; None without."""
  if key is None:
    return [None] * (1 + depth)
  keys = jax.random.split(key, 1 + 2 * depth)
  return [keys[0], *zip(keys[1::2], keys[2::2])]


def resize_positions(
  position: Array, grid: tuple[int, int], new_grid: tuple[int, int]
) -> Array:
  """Positions for another resolution, bicubic; the class token's stay.

  Cubic interpolation of Keys with a = -0.5, smoothed where the grid shrinks.
  PyTorch's bicubic has a = -0.75: what its models compute on a new grid
  differs slightly. Where the grid is the same, so are the numbers, bit for bit.

  Args:
    position: ``[1 + rows * columns, d]``, the class token's first.
    grid: (rows, columns) of patches it was trained with.
    new_grid: (rows, columns) of patches of the new images.

  Raises:
    ValueError: ``position`` has another number of rows.
  """
  if position.ndim != 2 or position.shape[0] != 1 + math.prod(grid):
    raise ValueError(
      f"position must have shape [{1 + math.prod(grid)}, d] for a grid of "
      f"{tuple(grid)}, got {position.shape}."
    )
  if tuple(grid) == tuple(new_grid):
    return position
  width = position.shape[1]
  patch = jnp.reshape(position[1:], (*grid, width))
  patch = jax.image.resize(patch, (*new_grid, width), "cubic")
  return jnp.concatenate([position[:1], jnp.reshape(patch, (-1, width))])
