"""Multimodal models that stay right under attack, corruption and absence.

The public API and nothing else. Everything loads on first use, so importing
the package costs nothing and initialises no device backend.
"""

import importlib

__version__ = "0.1.0"

_MODULES = (
  "attacks",
  "certification",
  "data",
  "evaluation",
  "linalg",
  "lipschitz",
  "losses",
  "margins",
  "modalities",
  "models",
  "recipes",
  "training",
)

_NAMES = {
  "Certificate": "robust_mm.certification",
  "Geometry": "robust_mm._types",
  "Model": "robust_mm._types",
  "Outputs": "robust_mm._types",
  "UserError": "robust_mm._validate",
  "certify": "robust_mm.certification",
  "evaluate": "robust_mm.evaluation",
  "load": "robust_mm.training",
}

__all__ = [*_MODULES, *_NAMES]  # noqa: PLE0604


def __getattr__(name: str):
  if name in _MODULES:
    return importlib.import_module(f"robust_mm.{name}")
  if name in _NAMES:
    return getattr(importlib.import_module(_NAMES[name]), name)
  raise AttributeError(f"module 'robust_mm' has no attribute {name!r}.")


def __dir__():
  return sorted([*globals(), *__all__])
