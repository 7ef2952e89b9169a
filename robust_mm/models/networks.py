"""The networks of the ordinary encoders, as nnx modules.

The perceptron and the plain convolutional networks state Lipschitz constants,
products of norms; those of normalised and attending ones do not exist or say
nothing.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from robust_mm import lipschitz as bounds
from robust_mm.models import lipschitz

ACTIVATIONS = {
  "elu": nnx.elu,
  "gelu": nnx.gelu,
  "leaky_relu": nnx.leaky_relu,
  "relu": nnx.relu,
  "silu": nnx.silu,
  "softplus": nnx.softplus,
  "tanh": jnp.tanh,
}
# Slopes in [0, 1] throughout.
CHAIN_ACTIVATIONS = ("elu", "leaky_relu", "relu", "softplus", "tanh")
_STRIDE = 2
_MAX_POOLED_SIDE = 8
_LARGE_IMAGE = 64


class MLP(nnx.Module):
  """Flatten, dense layers with an activation between."""

  def __init__(self, input_shape, rngs, hidden_sizes, embedding_dim, name):
    sizes = [int(np.prod(input_shape)), *hidden_sizes]
    self.hidden = nnx.List(
      [nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)]
    )
    self.last = nnx.Linear(sizes[-1], embedding_dim, rngs=rngs)
    self.activation = name

  def __call__(self, x):
    x = jnp.reshape(x, (x.shape[0], -1))
    for layer in self.hidden:
      x = ACTIVATIONS[self.activation](layer(x))
    return self.last(x)

  def lipschitz(self):
    """The product of the norms of its layers and slopes: sound, loose."""
    slope = bounds.activation(self.activation) ** len(self.hidden)
    layers = [*self.hidden, self.last]
    norms = [bounds.dense_norm(layer.kernel[...]) for layer in layers]
    return bounds.compose(slope, *norms)

  def chain(self):
    """``[out, in]`` matrices for ``lipschitz.dense_chain``, or None."""
    if self.activation not in CHAIN_ACTIVATIONS:
      return None
    return self.linear_maps()

  def linear_maps(self):
    """``[out, in]`` matrices of its layers, the first one first."""
    layers = [*self.hidden, self.last]
    return tuple(jnp.transpose(layer.kernel[...]) for layer in layers)


class CNN(nnx.Module):
  """Strided convolutions, average pooling, flatten, dense."""

  def __init__(self, input_shape, rngs, features, embedding_dim):
    height, width, channels = lipschitz.image_shape(input_shape)
    self.input_shape = (height, width, channels)
    sizes = [channels, *features]
    self.layers = nnx.List(
      [
        nnx.Conv(a, b, (3, 3), strides=_STRIDE, rngs=rngs)
        for a, b in itertools.pairwise(sizes)
      ]
    )
    for _ in features:
      height, width = -(-height // _STRIDE), -(-width // _STRIDE)
    self.window = (
      -(-height // _MAX_POOLED_SIDE),
      -(-width // _MAX_POOLED_SIDE),
    )
    positions = (height // self.window[0]) * (width // self.window[1])
    self.last = nnx.Linear(positions * sizes[-1], embedding_dim, rngs=rngs)

  def __call__(self, x):
    x = lipschitz.fold(x, self.input_shape)
    for layer in self.layers:
      x = nnx.relu(layer(x))
    if self.window != (1, 1):
      x = nnx.avg_pool(x, self.window, strides=self.window)
    return self.last(jnp.reshape(x, (x.shape[0], -1)))

  def lipschitz(self):
    """The product of the norms of its layers: sound, loose."""
    return bounds.compose(
      *_conv_norms(self.layers, self.input_shape[:2]),
      bounds.average_pool(self.window, self.window),
      bounds.dense_norm(self.last.kernel[...]),
    )

  def linear_maps(self):
    """A matrix for every layer, with at least its norm."""
    return _conv_maps(self.layers, self.last)


class TemporalCNN(nnx.Module):
  """Strided convolutions over time, mean, dense."""

  def __init__(self, input_shape, rngs, features, kernel_size, embedding_dim):
    self.input_shape = lipschitz.sequence_shape(input_shape)
    sizes = [self.input_shape[1], *features]
    self.layers = nnx.List(
      [
        nnx.Conv(a, b, (kernel_size,), strides=_STRIDE, rngs=rngs)
        for a, b in itertools.pairwise(sizes)
      ]
    )
    self.last = nnx.Linear(sizes[-1], embedding_dim, rngs=rngs)

  def __call__(self, x):
    x = jnp.reshape(x, (x.shape[0], *self.input_shape))
    for layer in self.layers:
      x = nnx.relu(layer(x))
    return self.last(jnp.mean(x, axis=1))

  def lipschitz(self):
    """The product of the norms of its layers: sound, loose."""
    length = self.input_shape[0]
    for _ in self.layers:
      length = -(-length // _STRIDE)
    return bounds.compose(
      *_conv_norms(self.layers, self.input_shape[:1]),
      bounds.mean_pool(length),
      bounds.dense_norm(self.last.kernel[...]),
    )

  def linear_maps(self):
    """A matrix for every layer, with at least its norm."""
    return _conv_maps(self.layers, self.last)


class TransformerBlock(nnx.Module):
  """Pre-norm self-attention and a perceptron, ``[b, t, d]``."""

  def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
    self.norm_attention = nnx.LayerNorm(width, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(
      num_heads, width, decode=False, keep_rngs=False, rngs=rngs
    )
    self.norm_mlp = nnx.LayerNorm(width, rngs=rngs)
    self.expand = nnx.Linear(width, 4 * width, rngs=rngs)
    self.contract = nnx.Linear(4 * width, width, rngs=rngs)

  def __call__(self, x, keep):
    """``keep`` is ``bool[b, t]``: who may be attended to."""
    mask = keep[:, None, None, :]
    x = x + self.attention(self.norm_attention(x), mask=mask)
    return x + self.contract(nnx.gelu(self.expand(self.norm_mlp(x))))


class Transformer(nnx.Module):
  """Embedding, positions, blocks, masked mean, dense."""

  def __init__(
    self, shape, rngs, width, num_layers, num_heads, embedding_dim, vocabulary
  ):
    self.tokens = vocabulary is not None
    if self.tokens:
      if len(shape) != 1:
        raise ValueError(
          f"input_shape must be (t,) for a transformer of tokens, got {shape}."
        )
      self.input_shape = shape
      self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
    else:
      self.input_shape = lipschitz.sequence_shape(shape)
      self.embed = nnx.Linear(self.input_shape[1], width, rngs=rngs)
    position = 0.02 * jax.random.normal(rngs.params(), (shape[0], width))
    self.position = nnx.Param(position)
    self.blocks = nnx.List(
      [TransformerBlock(width, num_heads, rngs=rngs) for _ in range(num_layers)]
    )
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.last = nnx.Linear(width, embedding_dim, rngs=rngs)

  def __call__(self, x):
    x = jnp.reshape(x, (x.shape[0], *self.input_shape))
    keep = x != 0 if self.tokens else jnp.ones(x.shape[:2], bool)
    x = self.embed(x)
    x = x + self.position[...][None]
    for block in self.blocks:
      x = block(x, keep)
    # At least 1: an input of padding only has no mean.
    count = jnp.maximum(jnp.sum(keep, axis=1, keepdims=True), 1)
    pooled = jnp.sum(jnp.where(keep[..., None], self.norm(x), 0.0), axis=1)
    return self.last(pooled / count.astype(pooled.dtype))


class _ResidualBlock(nnx.Module):
  def __init__(self, num_inputs, num_outputs, stride, rngs):
    options = {"use_bias": False, "rngs": rngs}
    self.first = nnx.Conv(
      num_inputs, num_outputs, (3, 3), strides=stride, **options
    )
    self.second = nnx.Conv(num_outputs, num_outputs, (3, 3), **options)
    self.norm_first = _group_norm(num_outputs, rngs)
    self.norm_second = _group_norm(num_outputs, rngs)
    # One assignment: nnx fixes what is data by the first.
    self.project = (
      nnx.Conv(num_inputs, num_outputs, (1, 1), strides=stride, **options)
      if stride != 1 or num_inputs != num_outputs
      else None
    )

  def __call__(self, x):
    y = nnx.relu(self.norm_first(self.first(x)))
    y = self.norm_second(self.second(y))
    return nnx.relu(y + (x if self.project is None else self.project(x)))


class ResNet(nnx.Module):
  """Stem, eight residual blocks, mean over positions and frames."""

  def __init__(self, input_shape, rngs, width, embedding_dim):
    # One frame at a time: a video's embedding is the mean over its frames.
    self.frame_shape = lipschitz.image_shape(
      input_shape[1:] if len(input_shape) == 4 else input_shape
    )
    self.large = max(self.frame_shape[:2]) > _LARGE_IMAGE
    self.stem = nnx.Conv(
      self.frame_shape[2],
      width,
      (7, 7) if self.large else (3, 3),
      strides=2 if self.large else 1,
      use_bias=False,
      rngs=rngs,
    )
    self.norm = _group_norm(width, rngs)
    sizes = [width, width, 2 * width, 4 * width, 8 * width]
    blocks = []
    for stage, (a, b) in enumerate(itertools.pairwise(sizes)):
      blocks.append(_ResidualBlock(a, b, 2 if stage else 1, rngs))
      blocks.append(_ResidualBlock(b, b, 1, rngs))
    self.blocks = nnx.List(blocks)
    self.last = nnx.Linear(sizes[-1], embedding_dim, rngs=rngs)

  def __call__(self, x):
    size = x.shape[0]
    x = jnp.reshape(x, (-1, *self.frame_shape))
    x = nnx.relu(self.norm(self.stem(x)))
    if self.large:
      x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
    for block in self.blocks:
      x = block(x)
    x = self.last(jnp.mean(x, axis=(1, 2)))
    return jnp.mean(jnp.reshape(x, (size, -1, x.shape[-1])), axis=1)


def _conv_norms(layers, size):
  """Norms of a stack of strided convolutions on maps of ``size``."""
  norms = []
  for layer in layers:
    norms.append(bounds.conv_norm(layer.kernel[...], size, stride=_STRIDE))
    size = tuple(-(-n // _STRIDE) for n in size)
  return norms


def _conv_maps(layers, last):
  convolutions = (
    bounds.conv_matrix(layer.kernel[...], stride=_STRIDE) for layer in layers
  )
  return (*convolutions, last.kernel[...])


def _group_norm(width: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
  groups = max(n for n in (32, 16, 8, 4, 2, 1) if width % n == 0)
  return nnx.GroupNorm(width, num_groups=groups, rngs=rngs)
