"""Inputs as sequences of tokens: patches, frames, vectors, integer ids.

A tokenizer cuts an input, an encoder embeds the pieces: ``[b, N, d]`` in place
of one embedding ``[b, d]``. For ``fusion="transformer"``.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from robust_mm import _validate
from robust_mm.models.functional import Encoder

_FRAMES = 8  # of a token; half of them in sequences below _LONG
_LONG = 64
_BAND = 8  # sides of a patch of a spectrogram
_SIDE = 7  # sides of a patch of an image
_VIDEO_FRAMES = 4
_MOST = 16  # patches along a side of an image
_VIDEO_MOST = 4  # patches along a side of a frame


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
  """How inputs of one modality are cut into non-overlapping pieces.

  Sides that a patch does not divide are filled up with zeros at their end.
  Nothing overlaps, so no piece shows what another one holds.

  Attributes:
    patch: entries along each axis but the channels (of ``[t, d]`` one number,
      frames, or two, frames and bands); None for :func:`default_patch`.
    vocabulary_size: of integer ids, of which 0 is padding; None for numbers.
  """

  patch: tuple[int, ...] | None = None
  vocabulary_size: int | None = None

  def layout(self, shape: Sequence[int]) -> tuple[int, int]:
    """``(N, p)`` of inputs ``[*shape]``: tokens, and values of a token.

    Of integer ids p is the vocabulary's size: what there is to tell apart.

    Raises:
      ValueError: ``input_shape`` has no such tokens, or ``patch`` does not fit.
    """
    shape = tuple(shape)
    if self.vocabulary_size is not None:
      if len(shape) != 1:
        raise ValueError(
          f"input_shape must be (t,) for patches of integer ids, got {shape}."
        )
      return shape[0], self.vocabulary_size
    axes, channels, patch = self._axes(shape)
    counts = [-(-size // side) for size, side in zip(axes, patch)]
    return math.prod(counts), math.prod(patch) * channels

  def cut(self, x: Array, shape: Sequence[int]) -> Array:
    """``[b, *shape] -> [b, N, p]``; integer ids stay ``[b, N]``.

    The order of tokens is that of the axes; within a token the channels come
    last.
    """
    if self.vocabulary_size is not None:
      return x
    axes, channels, patch = self._axes(tuple(shape))
    x = jnp.reshape(x, (x.shape[0], *axes, channels))
    fill = [(0, -size % side) for size, side in zip(axes, patch)]
    x = jnp.pad(x, [(0, 0), *fill, (0, 0)])
    counts = [-(-size // side) for size, side in zip(axes, patch)]
    pairs = [n for pair in zip(counts, patch) for n in pair]
    x = jnp.reshape(x, (x.shape[0], *pairs, channels))
    rank = len(axes)
    order = [*range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2)]
    x = jnp.transpose(x, (0, *order, 2 * rank + 1))
    return jnp.reshape(
      x, (x.shape[0], math.prod(counts), math.prod(patch) * channels)
    )

  def _axes(self, shape):
    """(axes that are cut, channels, patch along each of these axes)."""
    patch = default_patch(shape) if self.patch is None else self.patch
    if len(shape) == 1:
      if patch:
        raise ValueError(
          f"patch must be left out for vectors, which are one token; got "
          f"{patch} for input_shape {shape}."
        )
      return (), shape[0], ()
    bands = len(shape) == 2 and len(patch) == 2
    axes, channels = (shape, 1) if bands else (shape[:-1], shape[-1])
    if len(patch) != len(axes):
      raise ValueError(
        f"patch must have {len(axes)} entries for input_shape {shape}, got "
        f"{patch}."
      )
    for side, size in zip(patch, axes):
      if side > size:
        raise ValueError(
          f"patch must not exceed input_shape {shape}, got {patch}."
        )
    return axes, channels, patch


def default_patch(shape: Sequence[int]) -> tuple[int, ...]:
  """What a token covers where nobody says.

  - ``[n]``, a vector: all of it.
  - ``[t, d]``: 8 frames (4 of fewer than 64); where 8 divides both sides and
    there are at least 64 frames it is taken for a spectrogram, 8 x 8. Log-mel
    windows overlap, so fewer than 4 frames would show their neighbours.
  - ``[h, w, c]``: 7 x 7.
  - ``[t, h, w, c]``: 4 frames by a quarter of each side.

  Larger ones of long and large inputs (64 tokens of time, 16 along a side are
  enough), smaller ones of small inputs: at most half a side.

  >>> default_patch((28, 28, 1)), default_patch((64, 40)), default_patch((6,))
  ((7, 7), (8, 8), ())
  >>> default_patch((128, 6)), default_patch((32, 60)), default_patch((8, 4, 1))
  ((8,), (4,), (4, 2))
  """
  shape = tuple(shape)
  if len(shape) == 1:
    return ()
  if len(shape) == 2:
    time, size = shape
    if time >= _LONG and time % _BAND == 0 and size % _BAND == 0:
      return tuple(
        max(_BAND, -(-n // most)) for n, most in ((time, _LONG), (size, _MOST))
      )
    frames = _FRAMES if time >= _LONG else _FRAMES // 2
    return (_at_most_half(max(frames, -(-time // _LONG)), time),)
  if len(shape) == 3:
    return tuple(
      _at_most_half(max(_SIDE, -(-n // _MOST)), n) for n in shape[:2]
    )
  if len(shape) == 4:
    sides = tuple(-(-n // _VIDEO_MOST) for n in shape[1:3])
    return (_at_most_half(_VIDEO_FRAMES, shape[0]), *sides)
  raise ValueError(
    f"input_shape must have 1 to 4 axes for patches, got {shape}."
  )


def _at_most_half(size: int, side: int) -> int:
  return min(size, -(-side // 2))


def patches(
  *,
  embedding_dim: int = 128,
  patch: Sequence[int] | None = None,
  vocabulary_size: int | None = None,
) -> Encoder:
  """Tokens of a modality, ``[b, N, d]``, for ``fusion="transformer"``.

  Every piece of the input is embedded (a dense layer; two of a vector, which is
  one token; a table of integer ids), and gets a learnt vector of its position
  and one of its modality. Padding (id 0) becomes a token of zeros, which the
  transformer takes for absent.

  Args:
    embedding_dim: d, the same for all modalities of a model.
    patch: entries a token covers along each axis but the channels, such as
      ``(7, 7)`` of an image, ``(8,)`` frames of a sequence, ``(8, 8)`` of a
      spectrogram ``[t, d]``; see :func:`default_patch` for None.
    vocabulary_size: where inputs are integer ids.

  Raises:
    ValueError: naming the argument; ``input_shape`` or ``patch``, once built,
      where they do not fit.
  """
  _validate.at_least(1, embedding_dim=embedding_dim)
  if vocabulary_size is not None:
    _validate.at_least(2, vocabulary_size=vocabulary_size)
    if patch is not None:
      raise ValueError("patch must be left out where there are integer ids.")
  if patch is not None:
    patch = (patch,) if isinstance(patch, int) else tuple(patch)
    for side in patch:
      _validate.at_least(1, patch=side)
  tokenizer = Tokenizer(patch=patch, vocabulary_size=vocabulary_size)

  def build(input_shape, rngs):
    return PatchEncoder(tuple(input_shape), rngs, tokenizer, embedding_dim)

  return Encoder(
    name="patches",
    embedding_dim=embedding_dim,
    build=build,
    tokens=vocabulary_size is not None,
    tokenizer=tokenizer,
  )


class PatchEncoder(nnx.Module):
  """``[b, *input_shape] -> [b, N, d]``, position and modality included."""

  def __init__(self, input_shape, rngs, tokenizer: Tokenizer, width: int):
    number, size = tokenizer.layout(input_shape)
    self.input_shape = input_shape
    self.tokenizer = tokenizer
    self.ids = tokenizer.vocabulary_size is not None
    if self.ids:
      self.embed = nnx.Embed(size, width, rngs=rngs)
    else:
      self.embed = nnx.Linear(size, width, rngs=rngs)
    # A vector has no positions to mix: its stem is a layer deeper.
    vector = len(input_shape) == 1 and not self.ids
    self.stem = nnx.Linear(width, width, rngs=rngs) if vector else None
    draw = lambda shape: 0.02 * jax.random.normal(rngs.params(), shape)  # noqa: E731
    self.position = nnx.Param(draw((number, width)))
    self.kind = nnx.Param(draw((width,)))

  def __call__(self, x):
    pieces = self.tokenizer.cut(x, self.input_shape)
    tokens = self.embed(pieces)
    if self.stem is not None:
      tokens = self.stem(nnx.gelu(tokens))
    tokens = tokens + self.position[...][None] + self.kind[...][None, None]
    if not self.ids:
      return tokens
    return jnp.where((pieces != 0)[..., None], tokens, jnp.zeros_like(tokens))
