"""One input of any kind as a small picture, ``uint8 [h, w]`` or ``[h, w, 3]``.

Images and spectrograms are shown as they are (time runs to the right, pitch
up); of videos four frames; signals and joints as lines over time; vectors as
bars.
"""

from typing import Any

import numpy as np

from robust_mm.visualization import colours

LINES = ("inertial", "skeleton")  # kinds that are drawn as such
_FRAMES = 4
_PLOT = (48, 96)  # pixels of a line plot
_WHITE, _AXIS = 255, 225


def draw(
  x: np.ndarray,
  kind: str,
  value_range: tuple[Any, Any],
  colormap: str = "grey",
) -> np.ndarray:
  """The picture of one input.

  Args:
    x: one input.
    kind: of its transformation: ``"image"``, ``"log_mel"``, ``"inertial"``...
    value_range: what the darkest and the lightest value are, or the ends of a
      plot: numbers, or of lines one for each channel of the last axis.
    colormap: of images and spectrograms with one channel.
  """
  x = np.asarray(x, np.float32)
  if kind in LINES:
    return lines(x.reshape(len(x), -1), value_range, panels=_panels(x, kind))
  value_range = float(np.min(value_range[0])), float(np.max(value_range[1]))
  if kind == "log_mel":
    flat = x.reshape(x.shape[:2])
    return _coloured(flat.T[::-1], value_range, colormap)
  if x.ndim == 1:
    return bars(x, value_range)
  if kind == "depth" and x.ndim >= 3:
    chosen = np.linspace(0, len(x) - 1, _FRAMES).round().astype(int)
    frames = [x[i].reshape(x.shape[1:3]) for i in chosen]
    return _coloured(np.concatenate(frames, axis=1), value_range, colormap)
  if x.ndim == 3 and x.shape[-1] == 3:
    return colours.levels(x, value_range)
  if x.ndim == 3:
    x = x.mean(axis=-1)
  return _coloured(x, value_range, colormap)


def _coloured(x, value_range, colormap):
  level = colours.levels(x, value_range)
  return level if colormap == "grey" else colours.table()[level]


def _panels(x, kind) -> list[list[int]]:
  """Which columns share a panel: triads of a sensor; x, y, z of all joints."""
  count = int(np.prod(x.shape[1:]))
  if kind == "skeleton":
    return [list(range(axis, count, 3)) for axis in range(3)]
  return [list(range(start, start + 3)) for start in range(0, count, 3)]


def lines(
  x: np.ndarray, value_range: tuple[Any, Any], panels: list[list[int]]
) -> np.ndarray:
  """``[t, d]`` as lines, panels one below the other; ``uint8 [h, w, 3]``.

  A panel is as high as the range of its columns, whatever ``x`` is: pictures of
  one range compare. What lies outside is cut off.
  """
  height, width = _PLOT
  # The channels of a last axis again and again: x, y, z of every joint.
  lows, highs = (np.resize(bound, x.shape[1]) for bound in value_range)
  x = np.clip(np.nan_to_num(x), lows, highs)
  drawn = []
  for columns in panels:
    canvas = np.full((height, width, 3), _WHITE, np.uint8)
    part = x[:, columns]
    low, high = lows[columns].min(), highs[columns].max()
    low, high = (low, high) if low < high else (low - 1, high + 1)
    if low < 0 < high:
      canvas[_row(0.0, low, high, height)] = _AXIS
    place = np.linspace(0, len(x) - 1, width)
    for number, column in enumerate(part.T):
      value = np.interp(place, np.arange(len(x)), column)
      rows = _row(value, low, high, height)
      colour = colours.LINES[number % len(colours.LINES)]
      for at in range(width):
        first = rows[max(at - 1, 0)]
        begin, end = sorted((first, rows[at]))
        canvas[begin : end + 1, at] = colour
    drawn.append(canvas)
  return np.concatenate(drawn)


def _row(value, low, high, height):
  share = (np.asarray(value) - low) / (high - low)
  return np.rint((1 - share) * (height - 1)).astype(int)


def bars(x: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
  """``[d]`` as bars from 0, grey; ``uint8 [h, w]``."""
  height, _ = _PLOT
  low, high = value_range
  rows = _row(np.clip(np.nan_to_num(x), low, high), low, high, height)
  zero = int(_row(np.clip(0.0, low, high), low, high, height))
  canvas = np.full((height, max(len(x), 1)), _WHITE, np.uint8)
  for at, row in enumerate(rows):
    begin, end = sorted((zero, int(row)))
    canvas[begin : end + 1, at] = 60
  return canvas
