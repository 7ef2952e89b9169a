"""Certified accuracy against two budgets at once, as filled contours."""

from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import BoundaryNorm
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from robust_mm.evaluation import style

LINES = (0.5, 0.7, 0.9)
EDGES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
# Pale enough that lines and their labels are read on every band.
_SHADES = ListedColormap(
  colormaps["Blues"](np.linspace(0.0, 0.62, len(EDGES) - 1))
)


def region(results: Sequence[dict]) -> Figure | None:
  """The share that is right and covered, a panel for each run."""
  drawn = [result for result in results if result.get("region")]
  if not drawn:
    return None
  figure, grid = style.panels(len(drawn), height=3.8, width=4.0)
  ends = [
    max(result["region"]["radii"][axis][-1] for result in drawn)
    for axis in (0, 1)
  ]
  for axes, result in zip(grid, drawn):
    bands = _contours(axes, result["region"])
    word = "certified" if result["region"]["sound"] else "estimated"
    style.title(axes, f"{result['name']}: {word}")
    axes.set_xlim(0, ends[0])
    axes.set_ylim(0, ends[1])
    first, second = result["region"]["modalities"]
    axes.set_xlabel(_label(first, result))
    axes.set_ylabel(_label(second, result))
  colours = figure.colorbar(
    bands, ax=list(grid), label="share right and covered", shrink=0.9
  )
  colours.set_ticks(EDGES)
  return figure


def _contours(axes, held: Mapping):
  first, second = held["radii"]
  accuracy = np.clip(np.asarray(held["accuracy"]).T, 0.0, 1.0)
  bands = axes.contourf(
    first,
    second,
    accuracy,
    levels=EDGES,
    cmap=_SHADES,
    norm=BoundaryNorm(EDGES, _SHADES.N),
  )
  levels = [x for x in LINES if accuracy.min() < x < accuracy.max()]
  if levels:
    lines = axes.contour(
      first, second, accuracy, levels=levels, colors=style.INK, linewidths=1.2
    )
    for text in axes.clabel(lines, fontsize=style.SMALL + 1, fmt="%.1f"):
      text.set_fontweight("bold")
      text.set_rotation(0)
  axes.grid(False)
  # Beyond the grid the share is at most what it is on the grid's far edges.
  if max(accuracy[-1].max(), accuracy[:, -1].max()) < EDGES[1]:
    axes.set_facecolor(_SHADES(0))
  return bands


def _label(name: str, result: Mapping) -> str:
  # Results from before there was a norm here were in l2.
  norm = result["region"].get("norm", 2)
  size = result["units"].get(name, 1.0)
  unit = "raw input values" if size == 1.0 else f"1 unit = {size:.3g} raw"
  return f"change of {name} (l{norm}, {unit})"
