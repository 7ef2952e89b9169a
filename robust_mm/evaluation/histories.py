"""Training curves from the rows of ``metrics.jsonl``."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from robust_mm.evaluation import style


def training(
  results: Sequence[dict], histories: Sequence[Any] | None
) -> Figure | None:
  """Losses and accuracies against the update, one colour a run."""
  if not histories or not any(histories):
    return None
  panels = [
    (kind, [_series(history or [], kind) for history in histories])
    for kind in ("loss", "accuracy")
  ]
  panels = [panel for panel in panels if any(panel[1])]
  if not panels:
    return None
  figure, grid = style.panels(len(panels), height=4.0, width=3.8)
  for axes, (kind, runs) in zip(grid, panels):
    metrics = list(dict.fromkeys(metric for run in runs for metric in run))
    lines = dict(zip(metrics, itertools.cycle(style.line_styles())))
    for index, series in enumerate(runs):
      for metric, (steps, values) in series.items():
        axes.plot(
          steps,
          values,
          linestyle=lines[metric],
          linewidth=1.3,
          color=style.colour(index),
          label=f"{results[index]['name']}: {metric.replace('_', ' ')}",
        )
      for step in _phase_starts(histories[index] or []):
        axes.axvline(step, color=style.colour(index), linewidth=0.7, alpha=0.5)
    axes.set_title(kind, loc="left", color=style.INK, fontsize=10)
    axes.set_xlabel("update", fontsize=9)
    axes.legend(
      frameon=False,
      fontsize=7,
      loc="upper center",
      bbox_to_anchor=(0.5, -0.18),
    )
  return figure


def _series(history, kind) -> dict[str, tuple[list, list]]:
  series = {}
  for row in history:
    for metric, value in row.items():
      # Terms of a loss are left out: the total and validation say enough.
      validated = metric.startswith("validation") and metric.endswith(kind)
      if metric != kind and not validated:
        continue
      if isinstance(value, (int, float)) and math.isfinite(value):
        steps, values = series.setdefault(metric, ([], []))
        steps.append(row["step"])
        values.append(value)
  return series


def _phase_starts(history) -> list[int]:
  phases = [(row.get("phase"), row["step"]) for row in history]
  return [
    now[1] for before, now in itertools.pairwise(phases) if before[0] != now[0]
  ]
