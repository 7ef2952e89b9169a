"""Training: one loop for every recipe, and finished runs back from disk."""

from robust_mm import _lazy

__getattr__, __dir__, __all__ = _lazy.attach(
  __name__,
  names={
    "NonFiniteError": "robust_mm.training.metrics",
    "Result": "robust_mm.training.loop",
    "load": "robust_mm.training.loading",
    "train": "robust_mm.training.loop",
  },
  modules=("optimizers", "runs", "sharding"),
)
