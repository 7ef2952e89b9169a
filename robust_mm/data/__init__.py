"""Data sets as columns of numpy arrays, and pipelines of batches over them.

``load(name)`` gives a split as one batch, ``open_source(name, split)`` a
source that gathers any rows, ``pipeline(source, ...)`` a resumable stream of
batches. Nothing is imported before it is used: a misspelt name is answered
without scikit-learn, grain, TFDS or jax.
"""

from robust_mm import _lazy

__getattr__, __dir__, __all__ = _lazy.attach(
  __name__,
  names={
    "Source": "robust_mm.data.sources",
    "concatenate": "robust_mm.data.sources",
    "evaluation_batches": "robust_mm.data.pipelines",
    "format_inspection": "robust_mm.data.inspection",
    "format_list": "robust_mm.data.registry",
    "inspect": "robust_mm.data.inspection",
    "list_datasets": "robust_mm.data.registry",
    "load": "robust_mm.data.opening",
    "missing_at_random": "robust_mm.data.transforms",
    "open_source": "robust_mm.data.opening",
    "pipeline": "robust_mm.data.pipelines",
    "prepare": "robust_mm.data.prepared",
  },
  modules=(
    "archives",
    "arrays",
    "beam",
    "builders",
    "catalogue",
    "catalogue_entries",
    "catalogue_large",
    "inspection",
    "mapped",
    "opening",
    "pipelines",
    "prepared",
    "registry",
    "sources",
    "transforms",
  ),
)
