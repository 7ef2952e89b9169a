"""Grids of pictures, and PNG files by the standard library alone."""

import pathlib
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from robust_mm import _files
from robust_mm import _validate
from robust_mm.visualization import colours

GAP = 2  # pixels between two pictures
_WHITE = 255
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def grid(
  inputs: Any,
  num_columns: int,
  upscale: int = 3,
  colormap: str | None = None,
  *,
  value_range: tuple[float, float] = (0.0, 1.0),
) -> np.ndarray:
  """Pictures side by side, one range of values for all of them.

  Args:
    inputs: floats ``[..., h, w]``, ``[..., h, w, 1]`` or ``[..., h, w, 3]`` (a
      last axis of 1 or 3 is taken for channels), leading axes in order, row by
      row; or uint8, shown as they are.
    num_columns: pictures in a row; the last may have fewer.
    upscale: pixels of the grid for one of an input, each way.
    colormap: ``"grey"`` (default) or ``"perceptual"``, of one channel.
    value_range: black and white, or the ends of the table.

  Returns:
    ``uint8 [H, W]``, or ``[H, W, 3]`` with colours: ``rows * (h * upscale +
    2) - 2`` pixels high, white between and after the pictures.

  Raises:
    ValueError: naming the argument.
  """
  _validate.at_least(1, num_columns=num_columns, upscale=upscale)
  colormap = colormap or "grey"
  _validate.one_of(colours.COLORMAPS, colormap=colormap)
  inputs = np.asarray(inputs)
  if inputs.ndim < 3 or not inputs.size:
    raise ValueError(
      f"inputs must be pictures [..., h, w] or [..., h, w, c], got "
      f"{list(inputs.shape)}."
    )
  channels = 1
  if inputs.ndim > 3 and inputs.shape[-1] in (1, 3):
    channels = inputs.shape[-1]
    inputs = inputs.reshape(-1, *inputs.shape[-3:])
    inputs = inputs[..., 0] if channels == 1 else inputs
  else:
    inputs = inputs.reshape(-1, *inputs.shape[-2:])
  if inputs.dtype != np.uint8:
    if not np.issubdtype(inputs.dtype, np.floating):
      raise ValueError(f"inputs must be floats or uint8, got {inputs.dtype}.")
    inputs = colours.levels(inputs, value_range)
  if channels == 1 and colormap != "grey":
    inputs = colours.table()[inputs]
  return tile(list(inputs), num_columns, upscale)


def tile(
  pictures: list[np.ndarray], num_columns: int, upscale: int = 1
) -> np.ndarray:
  """uint8 pictures of one size side by side, row by row; colour if any has.

  Raises:
    ValueError: no pictures, or some of another size.
  """
  sizes = sorted({p.shape[:2] for p in pictures})
  if len(sizes) != 1:
    raise ValueError(
      f"pictures must be some, all of one size, got {sizes or 'none'}."
    )
  if any(p.ndim == 3 for p in pictures):
    pictures = [
      p if p.ndim == 3 else np.repeat(p[..., None], 3, axis=-1)
      for p in pictures
    ]
  height, width = (size * upscale for size in pictures[0].shape[:2])
  rows = -(-len(pictures) // num_columns)
  shape = (
    rows * (height + GAP) - GAP,
    num_columns * (width + GAP) - GAP,
    *pictures[0].shape[2:],
  )
  canvas = np.full(shape, _WHITE, np.uint8)
  for index, picture in enumerate(pictures):
    row, column = divmod(index, num_columns)
    top, left = row * (height + GAP), column * (width + GAP)
    large = np.repeat(np.repeat(picture, upscale, axis=0), upscale, axis=1)
    canvas[top : top + height, left : left + width] = large
  return canvas


def png(array: Any) -> bytes:
  """A PNG file of ``uint8 [h, w]`` (grey) or ``[h, w, 3]`` (RGB).

  Raises:
    ValueError: another dtype or shape; nothing is rescaled.
  """
  if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
    found = getattr(array, "dtype", _validate.kind(array))
    raise ValueError(f"array must be uint8, got {found}.")
  grey = array.ndim == 2
  if not (grey or (array.ndim == 3 and array.shape[2] == 3)) or not array.size:
    raise ValueError(
      f"array must be [h, w] or [h, w, 3], got {list(array.shape)}."
    )
  height, width = array.shape[:2]
  # Filter 0 (none) at the head of every row.
  rows = np.concatenate(
    [np.zeros((height, 1), np.uint8), array.reshape(height, -1)], axis=1
  )
  head = struct.pack(">IIBBBBB", width, height, 8, 0 if grey else 2, 0, 0, 0)
  return b"".join(
    [
      _SIGNATURE,
      _chunk(b"IHDR", head),
      _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
      _chunk(b"IEND", b""),
    ]
  )


def _chunk(name: bytes, content: bytes) -> bytes:
  check = struct.pack(">I", zlib.crc32(name + content))
  return struct.pack(">I", len(content)) + name + content + check


def write_png(
  path: Any,
  array: Any,
  *,
  value_range: tuple[float, float] | None = None,
  settings: Mapping[str, Any] | None = None,
) -> pathlib.Path:
  """Writes a PNG file and, beside it, ``.json`` with what its values mean.

  Args:
    path: of the file, which ends in ``.png``.
    array: ``uint8 [h, w]`` or ``[h, w, 3]``.
    value_range: what 0 and 255 stand for; with it or with ``settings`` a JSON
      file of the same name is written.
    settings: more for that file, plain values.

  Returns:
    The path.

  Raises:
    ValueError: another dtype or shape; nothing is rescaled.
  """
  path = pathlib.Path(path)
  if path.suffix != ".png":
    raise ValueError(f"path must end in .png, got {path}.")
  _files.write_bytes(path, png(array))
  if value_range is not None or settings:
    told = dict(settings or {})
    if value_range is not None:
      told["value_range"] = [float(bound) for bound in value_range]
    _files.write_json(path.with_suffix(".json"), told)
  return path
