"""Data sets as columns of numpy arrays, and pipelines of batches over them.

``load(name)`` gives a split as one batch, ``open_source(name, split)`` a
source that gathers any rows, ``pipelines.pipeline(source, ...)`` a resumable
stream of batches. Nothing is imported before it is used: a misspelt name is
answered without scikit-learn, grain, TFDS or jax.
"""

import importlib

_MODULES = (
  "arrays",
  "builders",
  "catalogue",
  "inspection",
  "opening",
  "pipelines",
  "prepared",
  "registry",
  "sources",
  "transforms",
)

_NAMES = {
  "Source": "sources",
  "evaluation_batches": "pipelines",
  "format_inspection": "inspection",
  "format_list": "registry",
  "inspect": "inspection",
  "load": "opening",
  "missing_at_random": "transforms",
  "open_source": "opening",
  "pipeline": "pipelines",
  "prepare": "prepared",
}

__all__ = [*_MODULES, *_NAMES, "list_datasets"]  # noqa: PLE0604


def list_datasets() -> tuple[str, ...]:
  """The names ``load`` and ``open_source`` know, sorted."""
  return importlib.import_module("robust_mm.data.registry").names()


def __getattr__(name: str):
  if name in _MODULES:
    return importlib.import_module(f"robust_mm.data.{name}")
  if name in _NAMES:
    module = importlib.import_module(f"robust_mm.data.{_NAMES[name]}")
    return getattr(module, name)
  raise AttributeError(f"module 'robust_mm.data' has no attribute {name!r}.")


def __dir__():
  return sorted([*globals(), *__all__])
