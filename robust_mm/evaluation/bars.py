"""Bar charts: missing modalities, and which modality is the weak one."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from robust_mm import _tasks
from robust_mm.evaluation import rows as rows_lib
from robust_mm.evaluation import style

# Estimated quantities look different from certified ones in every plot.
ESTIMATED_HATCH = "///"


class Axis(NamedTuple):
  """How the number of a task is drawn."""

  label: str
  top: float | None
  digits: str
  heading: str


AXES = {
  _tasks.CLASSIFICATION: Axis("accuracy", 1, ".3f", "Right"),
  _tasks.REGRESSION: Axis(
    "mean absolute error, in units of the label", None, "#.4g", "Off by"
  ),
  _tasks.MULTI_LABEL: Axis("mean average precision (mAP)", 1, ".3f", "mAP"),
}
_WORDS = {True: "certified", False: "estimated", None: "no bound"}


def subsets(results: Sequence[dict]) -> Figure | None:
  """Accuracy, MAE or mAP with only some modalities, a bar for each subset."""
  labels = list(
    dict.fromkeys(k for result in results for k in result["subsets"])
  )
  if not labels:
    return None
  every = "+".join(rows_lib.names_of(results))
  labels.sort(key=lambda label: (-label.count("+"), label))
  height = _height(len(labels), results)
  figure = Figure(figsize=(7.6, height), layout="constrained")
  axes = style.plain(figure.add_subplot(), grid_axis="x")
  thickness = 0.8 / len(results)
  axis = AXES[rows_lib.task(results)]
  for index, result in enumerate(results):
    rows = [result["subsets"].get(label) for label in labels]
    _subset_bars(axes, rows, index, thickness, axis.digits)
  words = [
    f"{label} (all)" if label == every else f"only {label}" for label in labels
  ]
  _name_rows(axes, words, thickness)
  axes.set_xlim(0, axis.top)
  measured = [row for result in results for row in result["subsets"].values()]
  thin = " (thin lines: 95 % interval)"
  thin = thin if any(row["interval"] for row in measured) else ""
  axes.set_xlabel(f"{axis.label}{thin}")
  style.title(axes, f"{axis.heading} with only these modalities available")
  if len(results) > 1:
    style.legend_below(figure, [_patch(i, r) for i, r in enumerate(results)])
  return figure


def _subset_bars(axes, rows, index, thickness, digits) -> None:
  for place, row in enumerate(rows):
    y = place + index * thickness
    value = rows_lib.number(row)
    measured = value is not None
    text = f"{value:{digits}}" if measured else "not measured"
    # Right of the axes: on a short or pale bar it could not be read.
    axes.text(
      1.01,
      y,
      text,
      va="center",
      fontsize=style.SMALL,
      color=style.INK,
      transform=axes.get_yaxis_transform(),
    )
    if measured:
      low, high = row["interval"] or (value, value)
      axes.barh(
        y,
        value,
        height=thickness * 0.9,
        color=style.colour(index),
        xerr=np.maximum([[value - low], [high - value]], 0.0),
        error_kw={"elinewidth": 0.9, "ecolor": style.INK},
      )


def vulnerability(results: Sequence[dict]) -> Figure | None:
  """Which modality is the weak one: by sensitivity and by attack."""
  names = rows_lib.names_of(results)
  if len(names) < 2:
    return None
  panels = []
  if any(result["vulnerability"] for result in results):
    panels.append(("Share of the sensitivity", _sensitivity_share, True))
  if any(
    rows_lib.accuracy_lost(r, name) is not None
    for r in results
    for name in names
  ):
    title = f"Accuracy lost, {_largest_radii(results, names)}"
    panels.append((title, rows_lib.accuracy_lost, False))
  if not panels:
    return None
  height = _height(len(names), results)
  figure, grid = style.panels(len(panels), height=height, width=4.4)
  for axes, (title, value_of, bound) in zip(grid, panels):
    axes.grid(False, axis="y")
    _modality_bars(axes, results, names, value_of, bound=bound)
    style.title(axes, title)
  return figure


def contributions(results: Sequence[dict]) -> Figure | None:
  """The Shapley contribution of each modality, a bar for each run."""
  if not any(result.get("contributions") for result in results):
    return None
  names = rows_lib.names_of(results)
  height = _height(len(names), results)
  figure, (axes,) = style.panels(1, height=height, width=6.4)
  axes.grid(False, axis="y")
  _modality_bars(axes, results, names, _contribution, bound=False)
  # A harmful modality has a negative one.
  values = [_contribution(r, name) or 0.0 for r in results for name in names]
  low, high = min([0.0, *values]), max([0.0, *values])
  room = 0.12 * (high - low) or 1.0
  axes.set_xlim(low - room if low < 0 else 0.0, high + room)
  style.title(axes, "Shapley contribution to the clean accuracy")
  return figure


def _contribution(result: Mapping, name: str) -> float | None:
  return ((result.get("contributions") or {}).get("values") or {}).get(name)


def _modality_bars(axes, results, names, value_of: Callable, *, bound: bool):
  thickness = 0.8 / len(results)
  handles = []
  for index, result in enumerate(results):
    hatch, word = None, ""
    if bound:
      sound = result["settings"]["certificate"]["sound"]
      word = f" ({_WORDS[sound]})"
      hatch = ESTIMATED_HATCH if sound is False else None
    handles.append(_patch(index, result, word=word, hatch=hatch))
    for place, name in enumerate(names):
      value = value_of(result, name)
      if value is not None:
        bar = axes.barh(
          place + index * thickness,
          value,
          height=thickness * 0.9,
          color=style.colour(index),
          hatch=hatch,
          edgecolor="white",
          linewidth=0,
        )
        axes.bar_label(
          bar, fmt="%.2f", fontsize=style.SMALL, color=style.INK, padding=2
        )
  _name_rows(axes, names, thickness)
  # Room for the number behind a bar of length 1.
  axes.set_xlim(0, 1.12)
  axes.legend(
    handles=handles,
    loc="upper left",
    bbox_to_anchor=(0.0, -0.3 / axes.figure.get_figheight()),
    frameon=False,
    fontsize=style.SMALL,
  )


def _name_rows(axes, labels, thickness: float) -> None:
  axes.set_yticks(np.arange(len(labels)) + 0.4 - thickness / 2, labels)
  axes.set_ylim(len(labels) - 0.1 - thickness / 2, -0.1 - thickness / 2)


def _height(num_labels: int, results) -> float:
  return 1.2 + 0.24 * num_labels * (len(results) + 0.6)


def _patch(index, result, *, word="", hatch=None) -> Patch:
  return Patch(
    facecolor=style.colour(index),
    hatch=hatch,
    edgecolor="white",
    linewidth=0,
    label=f"{result['name']}{word}",
  )


def _sensitivity_share(result: Mapping, name: str) -> float | None:
  return (result["vulnerability"] or {}).get(name)


def _largest_radii(results, names) -> str:
  """Where the losses were measured, such as ``l2 attack of size 1``."""
  rows = [
    rows_lib.weakest(rows_lib.curve(result, "attacked", [name]))
    for result in results
    for name in names
  ]
  rows = [row for row in rows if row is not None]
  norms = " or ".join(sorted({f"l{row['norm']}" for row in rows}))
  sizes = " or ".join(f"{r:g}" for r in sorted({row["radius"] for row in rows}))
  return f"{norms} attack of size {sizes}"
