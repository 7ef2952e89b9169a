"""Figures of a report of modality shift, without pyplot."""

from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from robust_mm import modalities
from robust_mm.evaluation import shift as shift_lib
from robust_mm.evaluation import style

# Told apart by sign too, not by colour alone.
MARKS = {
  "matched": ("=", style.COLOURS[0]),
  "missing": ("\N{MINUS SIGN}", style.COLOURS[1]),
  "added": ("+", style.COLOURS[2]),
  "transfer": ("\N{MULTIPLICATION SIGN}", style.COLOURS[3]),
  "mixed": ("~", style.COLOURS[4]),
}
CELL = 0.62
UNTUNED = 0.5
_DASHES = ("-", "--", "-.", ":")


def heat_map(
  report: shift_lib.ShiftReport, method: str, *, ratios: bool = False
) -> Figure:
  """The matrix of a method: T down, E across, every cell with its number.

  A sign in each cell, and the colour of its frame, say the kind of shift.

  Args:
    report: of ``shift_report``.
    method: one of its methods.
    ratios: show :meth:`ShiftReport.ratios` instead; an undefined one is empty
      and says "n/a".

  Raises:
    ValueError: naming ``method``.
  """
  values = report.ratios(method) if ratios else report.matrix(method)
  num_rows, num_columns = values.shape
  size = (max(CELL * num_columns + 2.6, 5.0), CELL * num_rows + 2.4)
  figure = Figure(figsize=size, layout="constrained")
  axes = style.plain(figure.add_subplot())
  axes.grid(False)
  top = max(1.0, np.nanmax(values, initial=0.0))
  colours = colormaps["cividis"]
  image = axes.imshow(values, cmap=colours, vmin=0.0, vmax=top, aspect="equal")
  for (row, column), value in np.ndenumerate(values):
    _cell(axes, row, column, value, report.kinds[row, column], colours, top)
  for axis, subsets in (("x", report.test_sets), ("y", report.train_sets)):
    labels = [modalities.subset_name(subset) for subset in subsets]
    axes.set(
      **{f"{axis}ticks": range(len(labels)), f"{axis}ticklabels": labels}
    )
  axes.tick_params(axis="x", labelrotation=90)
  axes.set_xlabel("evaluated on E")
  axes.set_ylabel("trained on T")
  what = "relative to the reference" if ratios else report.score
  style.title(axes, f"{method}: {what.replace('_', ' ')}")
  bar = figure.colorbar(image, ax=axes, shrink=0.8)
  bar.ax.tick_params(labelsize=style.SMALL, colors=style.INK)
  _legend(figure, [kind for kind in MARKS if (report.kinds == kind).any()])
  return figure


def curves(
  alphas: Sequence[float],
  lines: Mapping[str, Sequence[float]],
  *,
  score: str,
  chosen: float | None = None,
) -> Figure:
  """What the weights between two models are worth (WiSE-FT), a line a set.

  Args:
    alphas: ascending.
    lines: ``{what: score at every alpha}``.
    score: what is measured.
    chosen: the alpha that was picked on matched validation.
  """
  figure, (axes,) = style.panels(1, height=4.4, width=6.4)
  for index, (name, values) in enumerate(lines.items()):
    axes.plot(
      alphas,
      values,
      color=style.colour(index),
      linestyle=_DASHES[index % len(_DASHES)],
      marker="o",
      markersize=3,
      linewidth=1.4,
      label=name,
    )
  axes.set_ylabel(score)
  return _along(figure, axes, chosen)


def _along(figure, axes, chosen: float | None) -> Figure:
  """0.5 and the choice marked, axes named."""
  _mark(axes, UNTUNED, "untuned", "--")
  if chosen is not None and chosen != UNTUNED:
    _mark(axes, chosen, "chosen on matched validation", "-")
  axes.set_xlabel("alpha (0: before fine-tuning, 1: fine-tuned)")
  style.title(axes, "Weights between two models")
  style.shared_legend(figure, [axes])
  return figure


def _cell(axes, row, column, value, kind, colours, top) -> None:
  sign, frame = MARKS[kind]
  known = not np.isnan(value)
  dark = known and _luminance(colours(value / top)) < 0.18
  axes.text(
    column,
    row,
    f"{value:.2f}\n{sign}" if known else f"n/a\n{sign}",
    ha="center",
    va="center",
    fontsize=style.SMALL,
    color="white" if dark else "black",
  )
  axes.add_patch(
    Rectangle(
      (column - 0.46, row - 0.46),
      0.92,
      0.92,
      fill=False,
      edgecolor=frame,
      linewidth=2.0,
    )
  )


def _luminance(colour) -> float:
  """Relative luminance of sRGB; white and black text part at 0.18."""
  rgb = np.asarray(colour[:3])
  linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
  return float(linear @ [0.2126, 0.7152, 0.0722])


def _legend(figure, kinds) -> None:
  handles = [
    Rectangle(
      (0, 0),
      1,
      1,
      fill=False,
      edgecolor=MARKS[kind][1],
      linewidth=2.0,
      label=f"{MARKS[kind][0]}  {kind}",
    )
    for kind in kinds
  ]
  figure.legend(
    handles=handles,
    loc="outside lower center",
    ncols=min(len(handles), 5),
    frameon=False,
    fontsize=style.SMALL,
  )


def _mark(axes, alpha: float, word: str, dashes) -> None:
  axes.axvline(
    alpha, color="#777777", linewidth=0.9, linestyle=dashes, label=word
  )
