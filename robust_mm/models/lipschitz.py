"""Encoders that are 1-Lipschitz by construction.

They state the constant 1 whatever their parameters, so that a margin
certificate needs nothing else. Their layers are in ``models.lipschitz_layers``.
No batch or layer normalisation, which would have no useful constant; inputs
are best normalised with ``fit_normalization("scale", ...)``.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from robust_mm import _validate
from robust_mm.models import lipschitz_layers as layers
from robust_mm.models.functional import Encoder

DENSE_BLOCKS = ("sll", "bjorck", "cayley", "aol", "projected")
CONV_BLOCKS = ("sll", "aol")
POOLS = ("mean", "flatten")


def lipschitz_mlp(
  *,
  width: int = 128,
  num_blocks: int = 2,
  embedding_dim: int = 64,
  block: str = "sll",
  stem: int | None = None,
  num_iters: int = 12,
) -> Encoder:
  """A 1-Lipschitz perceptron for inputs of any shape, flattened.

  Args:
    width: of the hidden layers; even unless ``block="sll"``.
    num_blocks: hidden layers between the first and the last.
    embedding_dim: d.
    block: "sll": orthonormal dense, SLL residual blocks, orthonormal dense;
      "bjorck", "cayley": orthonormal dense layers with max_min between; "aol":
      AOL layers between orthonormal first and last ones (AOL shrinks where a
      layer narrows); "projected": as "bjorck", but weights are made orthonormal
      by ``Model.project`` every few updates (the training loop does), for wide
      layers and small batches, where anything else costs many plain steps.
    stem: width of one more layer before the others, orthonormal with max_min
      behind it; None for none.
    num_iters: Newton-Schulz steps of the orthonormal layers, at most; they stop
      when converged.
  """
  _validate.one_of(DENSE_BLOCKS, block=block)
  _validate.at_least(1, width=width, embedding_dim=embedding_dim)
  _validate.at_least(0, num_blocks=num_blocks)
  _validate.at_least(1, num_iters=num_iters)
  if block != "sll" and width % 2:
    raise ValueError(f"width must be even for max_min, got {width}.")
  if stem is not None and (stem < 2 or stem % 2):
    raise ValueError(f"stem must be even for max_min, got {stem}.")

  def build(input_shape, rngs):
    return _MLP(
      input_shape,
      rngs,
      width=width,
      num_blocks=num_blocks,
      embedding_dim=embedding_dim,
      block=block,
      stem=stem,
      num_iters=num_iters,
    )

  return _encoder("lipschitz_mlp", embedding_dim, build)


def lipschitz_cnn(
  *,
  features: Sequence[int] = (32, 64),
  num_blocks: int = 1,
  kernel_size: int = 3,
  patch_size: int = 2,
  embedding_dim: int = 64,
  block: str = "sll",
  pool: str = "flatten",
  num_iters: int = 12,
) -> Encoder:
  """A 1-Lipschitz convolutional network for ``h w c`` (or ``h w``, ``t h w c``
  with time folded into channels).

  Every stage divides the map by ``patch_size`` (space-to-depth, an isometry),
  brings it to its width (zero channels, or an orthonormal pointwise map where
  it narrows) and applies ``num_blocks`` convolutions. ``pool="flatten"`` keeps
  every position, "mean" sums over positions and divides by the root of their
  number.
  """
  options = _conv_options(
    features, num_blocks, kernel_size, patch_size, embedding_dim, block, pool
  )

  def build(input_shape, rngs):
    return _ConvNet(
      image_shape(input_shape), rngs, num_iters=num_iters, **options
    )

  return _encoder("lipschitz_cnn", embedding_dim, build)


def lipschitz_temporal_cnn(
  *,
  features: Sequence[int] = (64, 128),
  num_blocks: int = 1,
  kernel_size: int = 5,
  patch_size: int = 2,
  embedding_dim: int = 64,
  block: str = "sll",
  pool: str = "mean",
  num_iters: int = 12,
) -> Encoder:
  """A 1-Lipschitz convolutional network over time, for ``t d`` sequences.

  As :func:`lipschitz_cnn` with one axis; axes after the first of an input are
  flattened into features.
  """
  options = _conv_options(
    features, num_blocks, kernel_size, patch_size, embedding_dim, block, pool
  )

  def build(input_shape, rngs):
    return _ConvNet(
      sequence_shape(input_shape), rngs, num_iters=num_iters, **options
    )

  return _encoder("lipschitz_temporal_cnn", embedding_dim, build)


def image_shape(shape: Sequence[int]) -> tuple[int, ...]:
  """``h w c`` of an image, with frames folded into channels."""
  if len(shape) == 2:
    return (*shape, 1)
  if len(shape) == 3:
    return tuple(shape)
  if len(shape) == 4:
    return (shape[1], shape[2], shape[0] * shape[3])
  raise ValueError(
    f"input_shape must be (h, w), (h, w, c) or (t, h, w, c) for an image "
    f"encoder, got {tuple(shape)}."
  )


def sequence_shape(shape: Sequence[int]) -> tuple[int, ...]:
  """``t d`` of a sequence, with all later axes flattened into ``d``."""
  if len(shape) < 2:
    raise ValueError(
      f"input_shape must be (t, d) for a temporal encoder, got {tuple(shape)}."
    )
  return (shape[0], int(np.prod(shape[1:])))


def fold(x, shape: Sequence[int]):
  """Inputs ``[b, ...]`` as ``[b, *shape]``; frames of ``h w c`` into channels.

  For sequences ``shape`` is ``t d`` and time stays where it is.
  """
  if x.ndim == 5 and len(shape) == 3:
    x = jnp.moveaxis(x, 1, -2)
  return jnp.reshape(x, (x.shape[0], *shape))


def _encoder(name, embedding_dim, build) -> Encoder:
  return Encoder(
    name=name, embedding_dim=embedding_dim, build=build, one_lipschitz=True
  )


def _conv_options(
  features, num_blocks, kernel_size, patch_size, embedding_dim, block, pool
) -> dict:
  _validate.one_of(CONV_BLOCKS, block=block)
  _validate.one_of(POOLS, pool=pool)
  _validate.at_least(0, num_blocks=num_blocks)
  _validate.at_least(
    1,
    kernel_size=kernel_size,
    patch_size=patch_size,
    embedding_dim=embedding_dim,
  )
  if not features:
    raise ValueError("features must name at least one width.")
  for width in features:
    _validate.at_least(1, features=width)
    if block == "aol" and width % 2:
      raise ValueError(f"features must be even for max_min, got {width}.")
  return {
    "features": tuple(features),
    "num_blocks": num_blocks,
    "kernel_size": kernel_size,
    "patch_size": patch_size,
    "embedding_dim": embedding_dim,
    "block": block,
    "pool": pool,
  }


class _MLP(layers.OneLipschitz):
  def __init__(
    self,
    input_shape,
    rngs,
    *,
    width,
    num_blocks,
    embedding_dim,
    block,
    stem,
    num_iters,
  ):
    method = block if block in ("cayley", "projected") else "bjorck"
    options = {"num_iters": num_iters, "rngs": rngs}
    size = int(np.prod(input_shape))
    if stem is None:
      self.stem = None
    else:
      self.stem = layers.Dense(size, stem, method=method, **options)
      size = stem
    self.first = layers.Dense(size, width, method=method, **options)
    if num_blocks and block == "sll":
      self.blocks = layers.SLLDense(width, num_layers=num_blocks, rngs=rngs)
    elif num_blocks:
      self.blocks = layers.Dense(
        width, width, method=block, num_layers=num_blocks, **options
      )
    else:
      self.blocks = None
    self.last = layers.Dense(width, embedding_dim, method=method, **options)
    self.block = block

  def __call__(self, x):
    x = jnp.reshape(x, (x.shape[0], -1))
    if self.stem is not None:
      x = layers.max_min(self.stem(x))
    x = self.first(x)
    if self.block == "sll":
      return self.last(x if self.blocks is None else self.blocks(x))
    x = layers.max_min(x)
    if self.blocks is not None:
      x = layers.max_min(self.blocks(x))
    return self.last(x)


class _ConvNet(layers.OneLipschitz):
  """Stages of space-to-depth, a change of width, blocks; pooling; dense."""

  def __init__(
    self,
    input_shape,
    rngs,
    *,
    features,
    num_blocks,
    kernel_size,
    patch_size,
    embedding_dim,
    block,
    pool,
    num_iters,
  ):
    *space, channels = input_shape
    kernel = (kernel_size,) * len(space)
    options = {"num_iters": num_iters, "rngs": rngs}
    self.narrow = nnx.Dict()
    self.blocks = nnx.Dict()
    for stage, width in enumerate(features):
      space = [-(-n // patch_size) for n in space]
      channels = channels * patch_size ** len(space)
      if channels > width:
        self.narrow[f"stage_{stage}"] = layers.Dense(channels, width, **options)
      channels = width
      for index in range(num_blocks):
        layer = (
          layers.SLLConv(width, kernel, rngs=rngs)
          if block == "sll"
          else layers.AOLConv(width, width, kernel, rngs=rngs)
        )
        self.blocks[f"stage_{stage}_{index}"] = layer
    size = channels if pool == "mean" else channels * int(np.prod(space))
    self.last = layers.Dense(size, embedding_dim, **options)
    self.features = tuple(features)
    self.num_blocks = num_blocks
    self.patch_size = patch_size
    self.block = block
    self.pool = pool
    self.input_shape = tuple(input_shape)

  def __call__(self, x):
    x = fold(x, self.input_shape)
    for stage, width in enumerate(self.features):
      x = layers.space_to_depth(x, self.patch_size)
      name = f"stage_{stage}"
      x = (
        self.narrow[name](x) if name in self.narrow else layers.widen(x, width)
      )
      for index in range(self.num_blocks):
        x = self.blocks[f"{name}_{index}"](x)
        x = layers.max_min(x) if self.block == "aol" else x
    x = jnp.reshape(x, (x.shape[0], -1, x.shape[-1]))
    if self.pool == "mean":
      # The mean has constant 1/sqrt(T); scaled back to exactly 1.
      x = jnp.sum(x, axis=1) / np.sqrt(x.shape[1]).astype(x.dtype)
    return self.last(jnp.reshape(x, (x.shape[0], -1)))
