"""Values as colours: grey, and one perceptual table of 256 entries."""

import numpy as np

COLORMAPS = ("grey", "perceptual")
# Okabe and Ito, as the plots of reports: told apart by colour-blind readers.
LINES = np.array(
  [
    [0, 114, 178],
    [213, 94, 0],
    [0, 158, 115],
    [204, 121, 167],
    [230, 159, 0],
    [86, 180, 233],
  ],
  np.uint8,
)


def table() -> np.ndarray:
  """``uint8 [256, 3]``: lightness rises evenly while the hue turns once.

  References:
    Green (2011), A colour scheme for the display of astronomical intensity
    images: cubehelix, start 0.5, -1.5 rotations, hue 1, gamma 1.
  """
  share = np.linspace(0, 1, 256)
  angle = 2 * np.pi * (0.5 / 3 + 1 - 1.5 * share)
  size = share * (1 - share) / 2
  mix = np.array([[-0.14861, 1.78277], [-0.29227, -0.90649], [1.97294, 0.0]])
  colour = share[:, None] + size[:, None] * (
    np.stack([np.cos(angle), np.sin(angle)], 1) @ mix.T
  )
  return np.rint(255 * np.clip(colour, 0, 1)).astype(np.uint8)


def levels(values: np.ndarray, value_range) -> np.ndarray:
  """``uint8``: the range as 0..255; what lies outside is cut off.

  NaN is 0.
  """
  low, high = (float(bound) for bound in value_range)
  if not low < high or not np.isfinite(high - low):
    raise ValueError(f"value_range must be (low, high), got {value_range}.")
  share = (np.asarray(values, np.float64) - low) / (high - low)
  share = np.clip(np.nan_to_num(share, nan=0.0), 0, 1)
  return np.rint(255 * share).astype(np.uint8)
