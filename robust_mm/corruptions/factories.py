"""One factory a kind; all take ``severity`` and the same placement.

Placement, by keyword: ``modalities`` (a name or names; by default all the kind
makes sense for), ``share`` of examples touched, ``correlated`` across
modalities, ``forms`` ``{m: form}`` where a shape does not tell, and
``strength`` in place of the table's. All raise ValueError naming the argument
that is wrong.
"""

from collections.abc import Mapping
from typing import Any

from robust_mm.corruptions import base
from robust_mm.corruptions import forms as forms_lib


def additive(*, severity: int, scale: Any, **placement: Any) -> base.Corruption:
  r"""Gaussian noise in units of the training standard deviation.

  .. math:: x + \sigma s N(0, I)

  with :math:`\sigma` 0.25, 0.5, 1, 1.5, 2.

  >>> noise = additive(severity=3, scale={"audio": 2.0}, modalities="audio")
  >>> noise.strength
  1.0

  Args:
    severity: 0 to 5.
    scale: :math:`s`, the raw size of one standard deviation: a number, or
      ``{m: number or array that broadcasts to the end of one input}``, as
      :func:`deviations` measures it.
    **placement: as for every kind.

  Raises:
    ValueError: a scale that is negative or not finite.
  """
  if isinstance(scale, Mapping):
    option = {name: forms_lib.freeze(size) for name, size in scale.items()}
  else:
    option = forms_lib.freeze(scale)
  return base.make("additive", severity=severity, option=option, **placement)


def scalar_gaussian(*, severity: int, **placement: Any) -> base.Corruption:
  """Multiplies an input by one random number, sign included.

  ``x * (1 - s + s * N(0, 1))`` with s 0.2, 0.4, 0.6, 0.8, 1; severity 5 is the
  published one (MSA-Robustness, NAACL 2022, published code).
  """
  return base.make("scalar_gaussian", severity=severity, **placement)


def blur(*, severity: int, **placement: Any) -> base.Corruption:
  """Gaussian blur along the axes of an image, or the time of a sequence.

  Its deviation is 0.1, 0.2, 0.35, 0.5, 0.75 times the root of the number of
  samples along an axis. Weights sum to one at the ends too: constants stay.
  """
  return base.make("blur", severity=severity, **placement)


def contrast(*, severity: int, **placement: Any) -> base.Corruption:
  """Moves every channel to its mean by 0.25, 0.45, 0.65, 0.8, 0.9 of the way.

  The mean is that of the one example, over space and time.
  """
  return base.make("contrast", severity=severity, **placement)


def occlusion(*, severity: int, **placement: Any) -> base.Corruption:
  """Zeros in one box of 0.1, 0.2, 0.35, 0.5, 0.7 of the area, or of the time.

  The box of a video is the same in every frame.
  """
  return base.make("occlusion", severity=severity, **placement)


def shift(*, severity: int, **placement: Any) -> base.Corruption:
  """Everything 0.05, 0.1, 0.2, 0.3, 0.5 of its length later, or earlier.

  At least one frame; zeros come in.
  """
  return base.make("shift", severity=severity, **placement)


def frame_drop(*, severity: int, **placement: Any) -> base.Corruption:
  """Every frame is zeros with chance 0.1, 0.3, 0.5, 0.7, 0.9 (LNLN).

  Correlated, modalities fail at the same time: their clock is that of the one
  with the fewest frames.
  """
  return base.make("frame_drop", severity=severity, option=0, **placement)


def token_drop(
  *, severity: int, unknown: int = 0, **placement: Any
) -> base.Corruption:
  """Every token is ``unknown`` with chance 0.1, 0.3, 0.5, 0.7, 0.9 (LNLN)."""
  option = int(unknown)
  return base.make("token_drop", severity=severity, option=option, **placement)


def channel_drop(*, severity: int, **placement: Any) -> base.Corruption:
  """Every channel is zeros with chance 0.1, 0.2, 0.35, 0.5, 0.7.

  Of a vector every entry is a channel. Never correlated: channels of
  different modalities do not correspond.
  """
  return base.make("channel_drop", severity=severity, **placement)


def clip(*, severity: int, **placement: Any) -> base.Corruption:
  """Saturation at 0.7, 0.5, 0.3, 0.2, 0.1 of each channel's own peak.

  The peak is the largest absolute value of the one example; a vector has one
  for all its entries.
  """
  return base.make("clip", severity=severity, **placement)


def band_limit(*, severity: int, **placement: Any) -> base.Corruption:
  """Removes the upper 0.3, 0.5, 0.7, 0.8, 0.9 of the frequencies.

  A Fourier mask along time, or along both axes of an image.
  """
  return base.make("band_limit", severity=severity, **placement)


def stuck(*, severity: int, **placement: Any) -> base.Corruption:
  """A sensor that repeats one frame from a random time on.

  It is stuck for half to all of 0.1, 0.3, 0.5, 0.7, 0.9 of the time.
  """
  return base.make("stuck", severity=severity, **placement)


def swap(*, severity: int, **placement: Any) -> base.Corruption:
  """Another example's sample, with a different label where there is one.

  For 0.2, 0.4, 0.6, 0.8, 1 of the examples. The call needs ``label``, and
  ``donors`` for results that do not depend on the batch.
  """
  return base.make("swap", severity=severity, **placement)


def zeros(*, severity: int, **placement: Any) -> base.Corruption:
  """Zeros that are said to be present, for 0.2, 0.4, 0.6, 0.8, 1 of the rows.

  Not the same test as :func:`absent`; report both.
  """
  return base.make("zeros", severity=severity, **placement)


def absent(*, severity: int, **placement: Any) -> base.Corruption:
  """Marked absent, for 0.2, 0.4, 0.6, 0.8, 1 of the rows.

  The same rows as :func:`zeros` for the same key, but that who would be left
  with nothing keeps one modality.
  """
  return base.make("absent", severity=severity, **placement)
