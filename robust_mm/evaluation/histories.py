"""Training curves from the rows of ``metrics.jsonl``."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robust_mm import _tasks
from robust_mm.evaluation import rows as rows_lib
from robust_mm.evaluation import style


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Line:
  run: int
  metric: str
  steps: list[int]
  values: list[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Panel:
  title: str
  ylabel: str
  lines: list[_Line]
  phases: bool


def training(
  results: Sequence[dict], histories: Sequence[Any] | None
) -> Figure | None:
  """What every phase minimised, and what validation said; a colour a run.

  Objectives of different recipes or phases are different quantities, so each
  has a panel; the validation cross-entropy is comparable and has its own.
  """
  if not histories or not any(histories):
    return None
  histories = [history or [] for history in histories]
  panels = [
    *_objectives(results, histories),
    _validation(histories, "accuracy", "accuracy", "mean_over_subsets"),
    _validation(histories, "mean absolute error", "mae", "mae_over_subsets"),
    _validation(histories, "correlation", "correlation"),
    _validation(histories, "mean average precision", "map", "map_over_subsets"),
    _validation(histories, "captions right", "exact_match"),
    _validation(histories, "cross-entropy", "loss"),
    *_probes(histories),
  ]
  if rows_lib.task(results) == _tasks.REGRESSION:
    # The loss is the MAE in deviations.
    panels = [panel for panel in panels if panel.ylabel != "cross-entropy"]
  panels = [panel for panel in panels if panel.lines]
  if not panels:
    return None
  figure, grid = style.panels(len(panels), height=3.2, width=3.5)
  for axes, panel in zip(grid, panels):
    _draw(axes, panel)
    if panel.phases:
      _mark_phases(axes, histories)
  handles = [
    Line2D([], [], color=style.colour(index), label=result["name"])
    for index, result in enumerate(results)
    if histories[index]
  ]
  style.legend_below(figure, handles)
  return figure


def _objectives(results, histories) -> list[_Panel]:
  """A panel for each phase of each recipe, runs of one recipe together."""
  panels = {}
  for index, history in enumerate(histories):
    recipe = results[index]["recipe"] or results[index]["name"]
    for phase in dict.fromkeys(row.get("phase") for row in history):
      rows = [row for row in history if row.get("phase") == phase]
      steps, values = _series(rows, "loss")
      if steps:
        line = _Line(run=index, metric="loss", steps=steps, values=values)
        panels.setdefault((recipe, phase), []).append(line)
  return [
    _Panel(
      title=f"Training: {_phase_title(recipe, phase)}",
      ylabel="objective of this phase",
      lines=lines,
      phases=False,
    )
    for (recipe, phase), lines in panels.items()
  ]


def _phase_title(recipe: str, phase: str | None) -> str:
  return recipe if phase in (None, recipe) else f"{recipe}, {phase}"


def _validation(histories, kind: str, *endings: str) -> _Panel:
  def word(name):
    metric = _validated(name)
    return kind if metric == "loss" else metric.replace("_", " ")

  lines = _lines(
    histories, lambda name: _validated(name).endswith(endings), word
  )
  return _Panel(
    title=f"Validation: {kind}", ylabel=kind, lines=lines, phases=True
  )


def _probes(histories) -> list[_Panel]:
  """What ModalImmune attacks, and what its gates close."""
  return [
    _Panel(
      title=title,
      ylabel=ylabel,
      lines=_lines(
        histories,
        lambda name, prefix=prefix: name.startswith(prefix),
        lambda name, prefix=prefix: name.removeprefix(prefix),
      ),
      phases=True,
    )
    for prefix, title, ylabel in (
      ("probe_p_", "Attacked modality", "probability"),
      (
        "probe_closed_",
        "Gates (under 5 % nothing is gated,\nover 95 % all of it)",
        "share closed",
      ),
    )
  ]


def _lines(histories, wanted, word) -> list[_Line]:
  """Lines of the metrics that are wanted, under their words."""
  lines = []
  for index, history in enumerate(histories):
    for name in dict.fromkeys(name for row in history for name in row):
      if wanted(name):
        steps, values = _series(history, name)
        line = _Line(run=index, metric=word(name), steps=steps, values=values)
        lines.append(line)
  return [line for line in lines if line.steps]


def _validated(name: str) -> str:
  """``validation_loss`` -> ``loss``; empty for what is no such metric."""
  head = "validation"
  return name[len(head) + 1 :] if name.startswith(head) else ""


def _series(history, metric) -> tuple[list, list]:
  pairs = [(row["step"], row.get(metric)) for row in history]
  pairs = [
    (step, value)
    for step, value in pairs
    if isinstance(value, (int, float)) and math.isfinite(value)
  ]
  return [step for step, _ in pairs], [value for _, value in pairs]


def _draw(axes, panel: _Panel) -> None:
  metrics = list(dict.fromkeys(line.metric for line in panel.lines))
  looks = dict(zip(metrics, itertools.cycle(style.line_styles())))
  for line in panel.lines:
    axes.plot(
      line.steps,
      line.values,
      linestyle=looks[line.metric],
      linewidth=1.4,
      marker="." if len(line.steps) == 1 else "",
      color=style.colour(line.run),
    )
  style.title(axes, panel.title)
  axes.set_xlabel("update")
  axes.set_ylabel(panel.ylabel)
  if panel.ylabel == "accuracy":
    axes.set_ylim(0, 1.02)
  else:
    _from_zero(axes, [value for line in panel.lines for value in line.values])
  if len(metrics) > 1:
    handles = [
      Line2D([], [], color=style.INK, linestyle=looks[metric], label=metric)
      for metric in metrics
    ]
    axes.legend(handles=handles, frameon=False, fontsize=style.SMALL)


def _from_zero(axes, values) -> None:
  # Matplotlib would zoom into the rounding of an objective that is constant.
  low, high = min(0.0, *values), max(0.0, *values)
  pad = 0.05 * (high - low) or 1.0
  axes.set_ylim(low - (pad if low < 0 else 0.0), high + pad)


def _mark_phases(axes, histories) -> None:
  found = {}
  for index, history in enumerate(histories):
    for phase, start in _phases(history):
      found.setdefault((phase, start), index)
  for (phase, start), index in found.items():
    axes.axvline(start, color=style.colour(index), linewidth=0.9, alpha=0.7)
    axes.text(
      start,
      0.03,
      f" {phase}",
      rotation=90,
      va="bottom",
      ha="left",
      fontsize=style.SMALL,
      color=style.INK,
      transform=axes.get_xaxis_transform(),
    )


def _phases(history) -> list[tuple[str, int]]:
  """``(phase, the update it starts after)``, nothing for a single phase."""
  rows = [(row.get("phase"), row["step"]) for row in history]
  later = [
    (now[0], before[1])
    for before, now in itertools.pairwise(rows)
    if before[0] != now[0]
  ]
  return [(rows[0][0], 0), *later] if later else []
