"""One factory an operation; all raise ValueError naming a wrong argument."""

from robust_mm.augmentations import base


def warp_time(*, scale: float = 1.0, shift: float = 0.0) -> base.Augmentation:
  r"""Stretches and shifts time: sequences ``[b, t, d]``, videos.

  With u from -1 to 1 over the t frames, frame u of the result is read at

  .. math:: (s u + o + 1) / 2 \cdot (t - 1)

  linearly between frames; before the first and after the last one, these stay.

  >>> warp_time(scale=1.3, shift=0.1).kind
  'warp_time'

  Args:
    scale: :math:`\log s` is uniform in :math:`\pm\log scale`; 1 or more.
    shift: :math:`o` is uniform in :math:`\pm shift`: shares of half the length.
  """
  return base.make("warp_time", scale=scale, shift=shift)


def rotate(
  *, angle: float, axis: str | None = None, groups: int = 1
) -> base.Augmentation:
  """Rotates the vectors (x, y, z) that stand one after the other.

  Along the last axis of any input, such as ``[b, t, 3 n]``: joints, readings of
  an accelerometer and a gyroscope. The same rotation for all times.

  Args:
    angle: radians. Without an axis, the standard deviation of each entry of the
      rotation vector; with one, of the angle about it.
    axis: ``"x"``, ``"y"``, ``"z"``, or None for any direction.
    groups: the vectors are this many equal groups, one after the other, each
      with a rotation of its own; 1: all of an example rotate together.
  """
  return base.make("rotate", angle=angle, axis=axis, groups=groups)


def scale(*, deviation: float, per: str = "example") -> base.Augmentation:
  """Multiplies by ``exp(deviation * N(0, 1))``; any input.

  Args:
    deviation: of the logarithm.
    per: one factor for the ``"example"``; for each ``"axis"`` x, y, z of
      vectors that stand one after the other along the last axis; or for each
      ``"channel"``, an entry of the last axis.
  """
  return base.make("scale", deviation=deviation, per=per)


def move(*, scale: float = 0.0, shift: float = 0.0) -> base.Augmentation:
  r"""Stretches and shifts space: images ``[b, h, w, c]``, videos.

  With u from -1 to 1 over the h rows, row u of the result is read at
  :math:`(s u + o + 1) / 2 \cdot (h - 1)`, columns likewise; bilinear, zeros
  outside, all frames of a video alike.

  Args:
    scale: standard deviation of :math:`\log s`, drawn for either axis.
    shift: standard deviation of :math:`o`: 1 moves the centre to the edge.
  """
  return base.make("move", scale=scale, shift=shift)


def brighten(
  *, deviation: float, where: str = "foreground"
) -> base.Augmentation:
  """Adds ``deviation * N(0, 1)``, one draw an example; any input.

  Args:
    deviation: in the input's own units.
    where: ``"foreground"``, values above zero (a depth map is 0 where there is
      nothing), or ``"everywhere"``.
  """
  return base.make("brighten", deviation=deviation, where=where)


def erase(*, share: float) -> base.Augmentation:
  """Sets one box to zero: of an image, of all frames of a video, of time.

  Args:
    share: of the area, or of the time of a sequence; the place is random.
  """
  return base.make("erase", share=share)


def noise(*, deviation: float) -> base.Augmentation:
  """Adds ``deviation * N(0, I)``; any input.

  Args:
    deviation: in the input's own units.
  """
  return base.make("noise", deviation=deviation)
