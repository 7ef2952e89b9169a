"""Names of a package that load on first use (PEP 562)."""

import importlib
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping


def attach(
  package: str, names: Mapping[str, str], modules: Iterable[str] = ()
) -> tuple[Callable, Callable, list[str]]:
  """``__getattr__, __dir__, __all__`` for a package.

  Args:
    package: its ``__name__``.
    names: ``{public name: module that has it}``.
    modules: submodules that load on first use.
  """
  modules = frozenset(modules)
  public = sorted([*modules, *names])

  def get(name: str):
    if name in modules:
      return importlib.import_module(f"{package}.{name}")
    if name in names:
      return getattr(importlib.import_module(names[name]), name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}.")

  return get, lambda: public, public
