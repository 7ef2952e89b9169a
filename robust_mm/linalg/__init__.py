r"""Matrices kept orthonormal, norms bounded from above; vectors as pytrees.

What is differentiated here is a few products of small matrices: no SVD,
eigendecomposition or QR, whose backward passes divide by spectral gaps and give
NaN at the very matrices one wants (orthonormal ones have no gaps at all).
Products run at ``precision="highest"``: the accelerators' defaults (TF32,
bfloat16) would void the bounds. ``trees`` and ``lanczos`` treat pytrees as
vectors, for maps that are only known by their products.
"""

from robust_mm.linalg import trees
from robust_mm.linalg.lanczos import Ritz
from robust_mm.linalg.lanczos import SpectralBounds
from robust_mm.linalg.lanczos import block_lanczos
from robust_mm.linalg.lanczos import enclose
from robust_mm.linalg.lanczos import error_share
from robust_mm.linalg.lanczos import lanczos
from robust_mm.linalg.lanczos import spectral_bounds
from robust_mm.linalg.norms import gram_norm
from robust_mm.linalg.norms import power_iteration
from robust_mm.linalg.orthogonal import cayley
from robust_mm.linalg.polar import defect
from robust_mm.linalg.polar import newton_schulz
from robust_mm.linalg.polar import random_orthonormal

__all__ = [
  "Ritz",
  "SpectralBounds",
  "block_lanczos",
  "cayley",
  "defect",
  "enclose",
  "error_share",
  "gram_norm",
  "lanczos",
  "newton_schulz",
  "power_iteration",
  "random_orthonormal",
  "spectral_bounds",
  "trees",
]
