"""Residual networks over time: sequences, and video frame by frame.

Group normalisation inside (an example means the same in any batch), none after
the last layer: the scale of an embedding is free. No Lipschitz constants.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from robust_mm import _extremes
from robust_mm.models import lipschitz

_STRIDE = 2


class TemporalResNet(nnx.Module):
  """Stem, residual blocks that halve time, pooling over time, dense."""

  def __init__(
    self,
    input_shape,
    rngs,
    width,
    num_blocks,
    kernel_size,
    dropout,
    velocity,
    embedding_dim,
  ):
    self.input_shape = lipschitz.sequence_shape(input_shape)
    self.velocity = velocity
    size = self.input_shape[1] * (2 if velocity else 1)
    self.trunk = _Trunk(size, width, num_blocks, kernel_size, dropout, rngs)
    self.last = nnx.Linear(2 * width, embedding_dim, rngs=rngs)

  def __call__(self, x, train=False, key=None):
    x = jnp.reshape(x, (x.shape[0], *self.input_shape))
    if self.velocity:
      x = jnp.concatenate([x, self.velocity * differences(x)], axis=-1)
    return self.last(self.trunk(x, _keys(key, train)))


class VideoResNet(nnx.Module):
  """Frames and their changes, convolutions in space, then over time."""

  def __init__(
    self,
    input_shape,
    rngs,
    features,
    pooling,
    width,
    num_blocks,
    dropout,
    velocity,
    appearance,
    embedding_dim,
  ):
    if len(input_shape) != 4:
      raise ValueError(
        f"input_shape must be (t, h, w, c) for video_resnet, got {input_shape}."
      )
    _, height, frame_width, channels = input_shape
    if height % pooling or frame_width % pooling:
      raise ValueError(
        f"pooling must divide the {height} x {frame_width} pixels of a frame, "
        f"got {pooling}."
      )
    self.pooling = pooling
    self.velocity = velocity
    self.dropout = dropout
    self.appearance = appearance
    kinds = (1 if appearance else 0) + (2 if velocity else 0)
    sizes = [channels * kinds, *features]
    self.layers = nnx.List(
      [
        nnx.Conv(a, b, (3, 3), strides=_STRIDE, rngs=rngs)
        for a, b in itertools.pairwise(sizes)
      ]
    )
    self.norms = nnx.List([_norm(b, rngs) for b in features])
    side = [height // pooling, frame_width // pooling]
    for _ in features:
      side = [-(-n // _STRIDE) for n in side]
    self.project = nnx.Linear(side[0] * side[1] * sizes[-1], width, rngs=rngs)
    self.trunk = _Trunk(width, width, num_blocks, 5, dropout, rngs)
    self.last = nnx.Linear(2 * width, embedding_dim, rngs=rngs)

  def __call__(self, x, train=False, key=None):
    keys = _keys(key, train)
    batch, time = x.shape[:2]
    if self.pooling > 1:
      window = (self.pooling, self.pooling)
      x = nnx.avg_pool(
        jnp.reshape(x, (-1, *x.shape[2:])), window, strides=window
      )
      x = jnp.reshape(x, (batch, time, *x.shape[1:]))
    kinds = [x] if self.appearance else []
    if self.velocity:
      change = self.velocity * differences(x)
      kinds += [change, jnp.abs(change)]
    x = jnp.concatenate(kinds, axis=-1)
    x = jnp.reshape(x, (batch * time, *x.shape[2:]))
    for layer, norm in zip(self.layers, self.norms):
      x = nnx.relu(norm(layer(x)))
    x = dropped(jnp.reshape(x, (batch, time, -1)), self.dropout, next(keys))
    return self.last(self.trunk(self.project(x), keys))


class _Trunk(nnx.Module):
  """``[b, t, d] -> [b, 2 width]``: stem, blocks, mean and maximum of time."""

  def __init__(self, size, width, num_blocks, kernel_size, dropout, rngs):
    self.dropout = dropout
    self.stem = nnx.Conv(size, width, (kernel_size,), rngs=rngs)
    self.blocks = nnx.List(
      [_Block(width, kernel_size, dropout, rngs) for _ in range(num_blocks)]
    )
    self.norm = _norm(width, rngs)

  def __call__(self, x, keys):
    x = self.stem(x)
    for block in self.blocks:
      x = block(x, next(keys))
    x = nnx.relu(self.norm(x))
    x = jnp.concatenate(
      [jnp.mean(x, axis=1), _extremes.largest(x, axis=1)], axis=-1
    )
    return dropped(x, self.dropout, next(keys))


class _Block(nnx.Module):
  """Pre-activation: two convolutions, the first of stride 2; pooled skip."""

  def __init__(self, width, kernel_size, dropout, rngs):
    self.dropout = dropout
    self.norm_first = _norm(width, rngs)
    self.first = nnx.Conv(
      width, width, (kernel_size,), strides=_STRIDE, rngs=rngs
    )
    self.norm_second = _norm(width, rngs)
    self.second = nnx.Conv(width, width, (kernel_size,), rngs=rngs)

  def __call__(self, x, key):
    y = self.first(nnx.relu(self.norm_first(x)))
    y = dropped(nnx.relu(self.norm_second(y)), self.dropout, key)
    skip = nnx.avg_pool(
      x,
      (_STRIDE,),
      strides=(_STRIDE,),
      padding="SAME",
      count_include_pad=False,
    )
    return skip + self.second(y)


def differences(x):
  """Of consecutive frames ``[b, t, ...]``; 0 for the first."""
  return jnp.diff(x, axis=1, prepend=x[:, :1])


def dropped(x, rate: float, key):
  """Inverted dropout; nothing without a key."""
  if key is None or not rate:
    return x
  kept = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def _keys(key, train: bool):
  """Fresh keys without end; None where nothing is dropped."""
  for index in itertools.count():
    dropping = train and key is not None
    yield jax.random.fold_in(key, index) if dropping else None


def _norm(width: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
  """Of four channels a group at least: alone, one over time says little."""
  sizes = (n for n in (8, 4, 2) if width % n == 0 and width // n >= 4)
  return nnx.GroupNorm(width, num_groups=max(sizes, default=1), rngs=rngs)
