r"""Matrices kept orthonormal, norms bounded from above, by matrix products.

Everything here is a few products of small matrices: no SVD, eigendecomposition
or QR, whose backward passes divide by spectral gaps and give NaN at the very
matrices one wants (orthonormal ones have no gaps at all). Products run at
``precision="highest"``: the accelerators' defaults (TF32, bfloat16) would void
the bounds.
"""

from robust_mm.linalg.norms import gram_norm
from robust_mm.linalg.norms import power_iteration
from robust_mm.linalg.orthogonal import cayley
from robust_mm.linalg.polar import defect
from robust_mm.linalg.polar import newton_schulz
from robust_mm.linalg.polar import random_orthonormal

__all__ = [
  "cayley",
  "defect",
  "gram_norm",
  "newton_schulz",
  "power_iteration",
  "random_orthonormal",
]
