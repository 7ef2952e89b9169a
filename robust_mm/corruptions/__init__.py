"""Corruptions of multimodal inputs, as values with a severity of 1 to 5.

``corruption = corruptions.blur(severity=3, modalities="image")`` is a frozen
object; ``corruption(key, inputs, present, id=id)`` gives the corrupted inputs
and presence. Severity 0 is the identity, bit by bit. All kinds take the same
placement by keyword:

- ``modalities``: a name or names; by default all the kind makes sense for.
- ``share``: the chance of an example to be touched, 1 by default.
- ``correlated``: whether modalities share who is touched, when and how much.
- ``forms``: ``{m: "image" | "sequence" | "token" | "vector" | "video"}`` where
  the number of axes does not tell.
- ``strength``: in place of the table's.

Absent modalities stay absent and untouched. Integers stay integers: results
are rounded into their range.
"""

from robust_mm.corruptions.base import Corruption
from robust_mm.corruptions.factories import absent
from robust_mm.corruptions.factories import additive
from robust_mm.corruptions.factories import band_limit
from robust_mm.corruptions.factories import blur
from robust_mm.corruptions.factories import channel_drop
from robust_mm.corruptions.factories import clip
from robust_mm.corruptions.factories import contrast
from robust_mm.corruptions.factories import frame_drop
from robust_mm.corruptions.factories import occlusion
from robust_mm.corruptions.factories import scalar_gaussian
from robust_mm.corruptions.factories import shift
from robust_mm.corruptions.factories import stuck
from robust_mm.corruptions.factories import swap
from robust_mm.corruptions.factories import token_drop
from robust_mm.corruptions.factories import zeros
from robust_mm.corruptions.forms import form
from robust_mm.corruptions.forms import lengths
from robust_mm.corruptions.mixtures import Mixture
from robust_mm.corruptions.mixtures import mixture
from robust_mm.corruptions.registry import deviations
from robust_mm.corruptions.registry import kinds
from robust_mm.corruptions.registry import strengths
from robust_mm.corruptions.registry import suite

__all__ = [
  "Corruption",
  "Mixture",
  "absent",
  "additive",
  "band_limit",
  "blur",
  "channel_drop",
  "clip",
  "contrast",
  "deviations",
  "form",
  "frame_drop",
  "kinds",
  "lengths",
  "mixture",
  "occlusion",
  "scalar_gaussian",
  "shift",
  "strengths",
  "stuck",
  "suite",
  "swap",
  "token_drop",
  "zeros",
]
