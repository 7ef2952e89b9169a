"""Plots of one or several results, as Matplotlib figures without pyplot."""

import itertools
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from robust_mm.evaluation import bars
from robust_mm.evaluation import histories as histories_lib
from robust_mm.evaluation import regions
from robust_mm.evaluation import rows as rows_lib
from robust_mm.evaluation import style


def figures(
  results: Sequence[dict], histories: Sequence[Any] | None = None
) -> dict[str, Figure]:
  """Every plot there is data for.

  Args:
    results: dictionaries of ``evaluation.SCHEMA``.
    histories: rows of ``metrics.jsonl`` for each result, or None.

  Returns:
    ``{"radius_joint", "radius_modalities", "subsets", "contributions",
    "missing", "vulnerability", "region", "tightness", "training"}``, those
    there is data for.
  """
  drawn = {
    "radius_joint": radius_joint(results),
    "radius_modalities": radius_modalities(results),
    "subsets": bars.subsets(results),
    "contributions": bars.contributions(results),
    "missing": missing(results),
    "vulnerability": bars.vulnerability(results),
    "region": regions.region(results),
    "tightness": tightness(results),
    "training": histories_lib.training(results, histories),
  }
  return {name: figure for name, figure in drawn.items() if figure is not None}


def missing(results: Sequence[dict]) -> Figure | None:
  """Accuracy, MAE or mAP against the share of modalities that are absent."""
  if not any(result.get("missing") for result in results):
    return None
  figure, (axes,) = style.panels(1, height=3.8, width=6.4)
  for index, result in enumerate(results):
    rows = (result.get("missing") or {"rows": []})["rows"]
    rows = [row for row in rows if rows_lib.number(row) is not None]
    if not rows:
      continue
    rates = [row["achieved"] for row in rows]
    colour = style.colour(index)
    axes.plot(
      rates,
      [rows_lib.number(row) for row in rows],
      color=colour,
      linestyle=style.line_styles()[index % len(style.line_styles())],
      marker="o",
      markersize=4,
      label=result["name"],
    )
    axes.fill_between(
      rates,
      [min(row["by_seed"]) for row in rows],
      [max(row["by_seed"]) for row in rows],
      color=colour,
      alpha=0.15,
      linewidth=0,
    )
  axis = bars.AXES[rows_lib.task(results)]
  axes.set_ylim(0, axis.top)
  axes.set_xlabel("missing rate (share of all modalities of all examples)")
  axes.set_ylabel(axis.label)
  axes.legend(frameon=False, fontsize=style.SMALL, loc="best")
  style.title(axes, "Random modalities absent")
  return figure


def radius_joint(results: Sequence[dict]) -> Figure | None:
  """Accuracy against the radius of one ball around all modalities.

  Unlike sizes are never on one axis: every norm has a panel.
  """
  norms = [
    norm for norm in rows_lib.norms_of(results) if _drawn(results, None, norm)
  ]
  if not norms:
    return None
  figure, grid = style.panels(len(norms), height=4.4, width=6.4)
  for axes, norm in zip(grid, norms):
    for index, result in enumerate(results):
      names = result["settings"]["modalities"]
      _radius_curves(axes, result, names, index, norm)
    _radius_axes(axes, results, norm)
    axes.legend(frameon=False, fontsize=style.SMALL, loc="best")
    style.title(axes, "All modalities changed together")
    axes.set_ylabel("accuracy")
  return figure


def radius_modalities(results: Sequence[dict]) -> Figure | None:
  """Accuracy against the radius of one modality, a panel for each and norm."""
  panels = [
    (name, norm)
    for name in rows_lib.names_of(results)
    for norm in rows_lib.norms_of(results)
    if _drawn(results, [name], norm)
  ]
  if not panels or len(rows_lib.names_of(results)) < 2:
    return None
  figure, grid = style.panels(len(panels), height=3.6, width=3.6)
  for axes, (name, norm) in zip(grid, panels):
    for index, result in enumerate(results):
      _radius_curves(axes, result, [name], index, norm)
    style.title(axes, f"Only {name} changed")
    _radius_axes(axes, results, norm)
    _raw_axis(axes, results, name)
  for axes in grid[:: style.MAX_COLUMNS]:
    axes.set_ylabel("accuracy")
  style.shared_legend(figure, grid)
  return figure


def tightness(results: Sequence[dict]) -> Figure | None:
  """Share of predictions an attack flips at multiples of the radius."""
  drawn = [(i, r) for i, r in enumerate(results) if r.get("tightness")]
  if not drawn:
    return None
  figure, (axes,) = style.panels(1, height=3.6, width=5.6)
  factors = sorted({f for _, r in drawn for f in r["tightness"]["factors"]})
  for index, result in drawn:
    found = result["tightness"]
    word = "certified" if found["sound"] else "estimated"
    # Results from before there was a norm here were in l2.
    norm = found.get("norm", 2)
    axes.plot(
      found["factors"],
      found["flipped"],
      marker="o",
      markersize=4,
      linewidth=1.4,
      linestyle="-" if found["sound"] else ":",
      color=style.colour(index),
      label=f"{result['name']} ({word} l{norm} radius)",
    )
  axes.axvline(1.0, color="#777777", linewidth=0.9)
  axes.set_xticks(factors, [f"{factor:g} x" for factor in factors])
  axes.set_ylim(-0.02, 1.02)
  axes.set_xlabel("attack size, as a multiple of the example's own radius")
  axes.set_ylabel("share of predictions flipped")
  axes.legend(frameon=False, fontsize=style.SMALL, loc="center right")
  return figure


def _drawn(results, names, norm) -> bool:
  return any(
    rows_lib.curve(
      result, kind, names or result["settings"]["modalities"], norm=norm
    )
    for result in results
    for kind in rows_lib.KINDS
  )


def _radius_axes(axes, results, norm):
  unit = "raw input values" if rows_lib.in_raw_units(results) else "units"
  axes.set_xlabel(f"size of the change (l{norm}, {unit})")
  axes.set_ylim(-0.02, 1.02)
  axes.set_xlim(left=0)


def _radius_curves(axes, result, names, index, norm):
  attacks = dict.fromkeys(row["attack"] for row in result["attacked"])
  for marker, attack in zip(itertools.cycle("osD^v"), attacks):
    rows = rows_lib.curve(result, "attacked", names, attack=attack, norm=norm)
    if rows:
      start = {"radius": 0.0, **result["clean"]}
      label = f"{result['name']}: attacked ({attack})"
      rows = [start, *rows]
      _line(axes, rows, index, label, hold="post", marker=marker)
  rows = rows_lib.curve(result, "certified", names, norm=norm)
  if rows:
    sound = rows[0]["sound"]
    word = "certified" if sound else "estimated, no guarantee"
    label = f"{result['name']}: {word}"
    dashes = "--" if sound else ":"
    _line(axes, rows, index, label, hold="pre", linestyle=dashes)


def _line(axes, rows, index, label, *, hold, **drawing):
  # Accuracy falls with the radius. An attacked value limits it from above until
  # the next tested radius, a certified one from below since the last.
  rows = [row for row in rows if row["accuracy"] is not None]
  if not rows:
    return
  radii = [row["radius"] for row in rows]
  values = [row["accuracy"] for row in rows]
  low, high = zip(*[row["interval"] for row in rows])
  colour = style.colour(index)
  drawing = {"markersize": 5, "linewidth": 1.2, "color": colour, **drawing}
  axes.plot(radii, values, label=label, drawstyle=f"steps-{hold}", **drawing)
  axes.fill_between(
    radii, low, high, color=colour, alpha=0.10, linewidth=0, step=hold
  )


def _raw_axis(axes, results, name):
  sizes = {result["units"].get(name, 1.0) for result in results}
  if sizes == {1.0} or len(sizes) > 1:
    return
  size = sizes.pop()
  top = axes.secondary_xaxis(
    "top", functions=(lambda r: r * size, lambda r: r / size)
  )
  top.tick_params(labelsize=style.SMALL, colors=style.INK)
  top.spines["top"].set_color("#777777")
  top.set_xlabel("raw input values", fontsize=style.SMALL, color=style.INK)
