"""What grids of long runs share: a folder of results, and cells of tables."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from robust_mm.evaluation import metrics


def claim(workdir: pathlib.Path, **settings: Any) -> None:
  """Marks a folder as that of these settings; SystemExit if of others.

  Args:
    workdir: made if need be.
    **settings: all that a measurement depends on and its path does not say.
  """
  wanted = json.loads(json.dumps(settings))
  path = workdir / "settings.json"
  if path.is_file() and (found := json.loads(path.read_text())) != wanted:
    raise SystemExit(
      f"--workdir: {workdir} holds a grid of {found}, not of {wanted}; give "
      f"another folder."
    )
  workdir.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(wanted))


def kept(folder: pathlib.Path, measure: Callable[[pathlib.Path], Any]) -> Any:
  """``measure(folder)``, from its file where it has been made."""
  path = folder / "measured.json"
  if not path.is_file():
    folder.mkdir(parents=True, exist_ok=True)
    found = measure(folder)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(found))
    scratch.replace(path)
  return json.loads(path.read_text())


def slug(name: str) -> str:
  """The name of a row as that of a folder."""
  return "".join(c if c.isalnum() else "_" for c in name)


def keep_compiled(workdir: pathlib.Path) -> None:
  """Seeds of an arm compile the same functions: once, kept in the folder."""
  cache = (workdir / "compiled").resolve()
  jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def also(text: str) -> tuple[str, tuple[str, tuple[str, ...]]]:
  """``NAME:ARM:KEY=VALUE,...`` as (name, (arm, settings of the configuration)).

  Keys are options of the recipe, but for ``num_steps``.

  >>> also("twice:clean:num_steps=9,eps=0.1")
  ('twice', ('clean', ('num_steps=9', 'recipe.options.eps=0.1')))
  """
  name, arm, rest = text.split(":", 2)
  settings = tuple(
    pair if pair.startswith("num_steps=") else f"recipe.options.{pair}"
    for pair in rest.split(",")
  )
  return name, (arm, settings)


def interval(first, second) -> str:
  """The difference of two ``[seed, item]`` in points, and its 95 % interval."""
  found = metrics.paired_bootstrap(
    np.array(list(first)), np.array(list(second))
  )
  mean, low, high = (100 * value for value in found[:3])
  return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def spread(values) -> str:
  """Mean and standard deviation over seeds."""
  deviation = f"{np.std(values, ddof=1):.4f}" if len(values) > 1 else "-"
  return f"{np.mean(values):.4f} +- {deviation}"


def row(head: str, cells, width: int, *, first: int = 24) -> str:
  """A line of a table."""
  return f"{head:{first}s}" + "".join(f"{cell:>{width}s}" for cell in cells)
