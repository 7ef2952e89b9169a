"""Multimodal models that stay right under attack, corruption and absence.

The public API and nothing else. Everything loads on first use, so importing
the package costs nothing and initialises no device backend.
"""

from robust_mm import _lazy

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = _lazy.attach(
  __name__,
  names={
    "Certificate": "robust_mm.certification",
    "Geometry": "robust_mm._types",
    "Model": "robust_mm._types",
    "Outputs": "robust_mm._types",
    "UserError": "robust_mm._validate",
    "certify": "robust_mm.certification",
    "curvature_mask": "robust_mm.masking",
    "evaluate": "robust_mm.evaluation",
    "load": "robust_mm.training",
  },
  modules=(
    "attacks",
    "augmentations",
    "certification",
    "controllers",
    "corruptions",
    "curvature",
    "data",
    "distillation",
    "evaluation",
    "hypergrad",
    "linalg",
    "lipschitz",
    "losses",
    "margins",
    "masking",
    "missing",
    "modalities",
    "models",
    "nullspace",
    "recipes",
    "relaxation",
    "smoothing",
    "spectrum",
    "training",
    "visualization",
    "weights",
  ),
)
