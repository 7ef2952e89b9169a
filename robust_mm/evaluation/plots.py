"""Plots of one or several results, as Matplotlib figures without pyplot."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from robust_mm.evaluation import histories as histories_lib
from robust_mm.evaluation import style

KINDS = ("attacked", "certified")


def figures(
  results: Sequence[dict], histories: Sequence[Any] | None = None
) -> dict[str, Figure]:
  """Every plot there is data for.

  Args:
    results: dictionaries of ``evaluation.SCHEMA``.
    histories: rows of ``metrics.jsonl`` for each result, or None.

  Returns:
    ``{"radius_joint", "radius_modalities", "subsets", "vulnerability",
    "region", "tightness", "training"}``, those there is data for.
  """
  drawn = {
    "radius_joint": radius_joint(results),
    "radius_modalities": radius_modalities(results),
    "subsets": subsets(results),
    "vulnerability": vulnerability(results),
    "region": region(results),
    "tightness": tightness(results),
    "training": histories_lib.training(results, histories),
  }
  return {name: figure for name, figure in drawn.items() if figure is not None}


def names_of(results: Sequence[dict]) -> list[str]:
  """The modalities of all results, sorted."""
  found = {
    name for result in results for name in result["settings"]["modalities"]
  }
  return sorted(found)


def norms_of(results: Sequence[dict]) -> list:
  """The norms radii are measured in, 2 before "inf"."""
  found = {
    row["norm"] for result in results for kind in KINDS for row in result[kind]
  }
  return sorted(found, key=str)


def curve(
  result: dict,
  kind: str,
  names: Sequence[str],
  *,
  attack: str | None = None,
  norm: Any = None,
) -> list[dict]:
  """The rows of ``kind`` for exactly these modalities, by radius."""
  rows = [
    row
    for row in result[kind]
    if sorted(row["modalities"]) == sorted(names)
    and (attack is None or row.get("attack") == attack)
    and (norm is None or row["norm"] == norm)
  ]
  return sorted(rows, key=lambda row: row["radius"])


def radius_joint(results: Sequence[dict]) -> Figure | None:
  """Accuracy against the radius of one ball around all modalities.

  Unlike sizes are never on one axis: every norm has a panel.
  """
  norms = [n for n in norms_of(results) if _any_curve(results, None, n)]
  if not norms:
    return None
  figure, grid = style.panels(len(norms), height=4.4, width=6.4)
  for axes, norm in zip(grid, norms):
    for index, result in enumerate(results):
      names = result["settings"]["modalities"]
      _radius_curves(axes, result, names, index, norm)
    _radius_axes(axes, results, norm)
    axes.legend(frameon=False, fontsize=8, loc="best")
    axes.set_title(
      "All modalities changed together", loc="left", color=style.INK
    )
    axes.set_ylabel("accuracy")
  return figure


def radius_modalities(results: Sequence[dict]) -> Figure | None:
  """Accuracy against the radius of one modality, a panel for each and norm."""
  panels = [
    (name, norm)
    for name in names_of(results)
    for norm in norms_of(results)
    if _any_curve(results, [name], norm)
  ]
  if not panels or len(names_of(results)) < 2:
    return None
  figure, grid = style.panels(len(panels), height=3.6, width=3.6)
  for axes, (name, norm) in zip(grid, panels):
    for index, result in enumerate(results):
      _radius_curves(axes, result, [name], index, norm)
    axes.set_title(
      f"Only {name} changed", loc="left", color=style.INK, fontsize=10
    )
    _radius_axes(axes, results, norm)
    _raw_axis(axes, results, name)
  grid[0].set_ylabel("accuracy")
  style.shared_legend(figure, grid[0])
  return figure


def subsets(results: Sequence[dict]) -> Figure | None:
  """Accuracy with only some of the modalities, a bar for each subset."""
  labels = list(
    dict.fromkeys(k for result in results for k in result["subsets"])
  )
  if not labels:
    return None
  labels.sort(key=lambda label: (label.count("+"), label))
  height = 1.2 + 0.22 * len(labels) * (len(results) + 0.6)
  figure = Figure(figsize=(7.6, height), layout="constrained")
  axes = style.plain(figure.add_subplot(), grid_axis="x")
  thickness = 0.8 / len(results)
  for index, result in enumerate(results):
    rows = [result["subsets"].get(label) for label in labels]
    where = np.arange(len(labels)) + index * thickness
    values = [_number(row) for row in rows]
    axes.barh(
      where,
      values,
      height=thickness * 0.9,
      color=style.colour(index),
      xerr=_errors(rows, values),
      error_kw={"elinewidth": 0.8, "ecolor": style.INK},
      label=result["name"],
    )
    for y, value in zip(where, values):
      # Inside the bar: the interval's end is outside it.
      axes.text(0.01, y, f"{value:.3f}", va="center", fontsize=8, color="white")
  axes.set_yticks(np.arange(len(labels)) + 0.4 - thickness / 2)
  axes.set_yticklabels(
    [
      f"only {label}" if _missing(label, results) else f"{label} (all)"
      for label in labels
    ]
  )
  axes.invert_yaxis()
  axes.set_xlim(0, 1)
  axes.set_xlabel("accuracy (bars: 95 % interval)")
  axes.set_title(
    "What is left when modalities are missing", loc="left", color=style.INK
  )
  if len(results) > 1:
    style.shared_legend(figure, axes)
  return figure


def vulnerability(results: Sequence[dict]) -> Figure | None:
  """Which modality is the weak one: by sensitivity and by attack."""
  names = names_of(results)
  if len(names) < 2:
    return None
  panels = []
  if any(result["vulnerability"] for result in results):
    panels.append(("share of the sensitivity", _sensitivity_share))
  if any(
    curve(result, "attacked", [name]) for result in results for name in names
  ):
    panels.append(("accuracy lost to attacks on it alone", _accuracy_lost))
  if not panels:
    return None
  figure, grid = style.panels(len(panels), height=3.4, width=3.8)
  width = 0.8 / len(results)
  for axes, (title, values_of) in zip(grid, panels):
    for index, result in enumerate(results):
      where = np.arange(len(names)) + index * width
      values = [values_of(result, name) for name in names]
      bars = axes.bar(
        where,
        values,
        width=width * 0.9,
        color=style.colour(index),
        label=result["name"],
      )
      axes.bar_label(bars, fmt="%.2f", fontsize=8, color=style.INK, padding=1)
    axes.set_xticks(np.arange(len(names)) + 0.4 - width / 2)
    axes.set_xticklabels(names)
    axes.set_title(title, loc="left", color=style.INK, fontsize=10)
    axes.set_ylim(0, 1.05)
  if len(results) > 1:
    style.shared_legend(figure, grid[0])
  return figure


def region(results: Sequence[dict]) -> Figure | None:
  """Certified accuracy against two budgets at once, a panel for each run."""
  drawn = [(i, r) for i, r in enumerate(results) if r.get("region")]
  if not drawn:
    return None
  figure, grid = style.panels(len(drawn), height=3.6, width=3.8)
  ends = [
    max(result["region"]["radii"][axis][-1] for _, result in drawn)
    for axis in (0, 1)
  ]
  for axes, (_, result) in zip(grid, drawn):
    held = result["region"]
    first, second = held["radii"]
    accuracy = np.asarray(held["accuracy"]).T
    shade = axes.pcolormesh(
      first, second, accuracy, cmap="Blues", vmin=0, vmax=1, shading="auto"
    )
    levels = [x for x in (0.5, 0.7, 0.9) if accuracy.min() < x < accuracy.max()]
    if levels:
      lines = axes.contour(
        first, second, accuracy, levels=levels, colors=style.INK, linewidths=0.8
      )
      axes.clabel(lines, fontsize=8, fmt="%.1f")
    word = "certified" if held["sound"] else "estimated"
    axes.set_title(
      f"{result['name']}: {word}", loc="left", color=style.INK, fontsize=10
    )
    axes.set_facecolor(shade.cmap(0.0))
    axes.set_xlim(0, ends[0])
    axes.set_ylim(0, ends[1])
    # Results of before there was a norm here were in l2.
    norm = held.get("norm", 2)
    axes.set_xlabel(f"radius of {held['modalities'][0]} (l{norm})")
    axes.set_ylabel(f"radius of {held['modalities'][1]} (l{norm})")
    axes.grid(False)
  figure.colorbar(shade, ax=list(grid), label="accuracy kept", shrink=0.9)
  return figure


def tightness(results: Sequence[dict]) -> Figure | None:
  """Share of predictions an attack flips at multiples of the radius."""
  drawn = [(i, r) for i, r in enumerate(results) if r.get("tightness")]
  if not drawn:
    return None
  figure, (axes,) = style.panels(1, height=3.6, width=5.6)
  for index, result in drawn:
    found = result["tightness"]
    word = "certified" if found["sound"] else "estimated"
    axes.plot(
      found["factors"],
      found["flipped"],
      marker="o",
      markersize=4,
      linewidth=1.4,
      linestyle="-" if found["sound"] else ":",
      color=style.colour(index),
      label=f"{result['name']} ({word} l{found.get('norm', 2)} radius)",
    )
  axes.axvline(1.0, color="#999999", linewidth=0.8)
  axes.set_ylim(-0.02, 1.02)
  axes.set_xlabel("attack size / radius of the example", fontsize=9)
  axes.set_ylabel("share of predictions flipped")
  axes.legend(frameon=False, fontsize=8)
  return figure


def _any_curve(results, names, norm) -> bool:
  return any(
    curve(result, kind, names or result["settings"]["modalities"], norm=norm)
    for result in results
    for kind in KINDS
  )


def _radius_axes(axes, results, norm):
  relative = any(
    size != 1.0 for result in results for size in result["units"].values()
  )
  unit = "in units" if relative else "in raw input values"
  axes.set_xlabel(f"radius (l{norm}, {unit})", fontsize=9)
  axes.set_ylim(-0.02, 1.02)
  axes.set_xlim(left=0)


def _radius_curves(axes, result, names, index, norm):
  attacks = dict.fromkeys(row["attack"] for row in result["attacked"])
  for marker, attack in zip(itertools.cycle("osD^v"), attacks):
    rows = curve(result, "attacked", names, attack=attack, norm=norm)
    if rows:
      start = {"radius": 0.0, **result["clean"]}
      label = f"{result['name']}: attacked ({attack})"
      rows = [start, *rows]
      _line(axes, rows, index, label, hold="post", marker=marker)
  rows = curve(result, "certified", names, norm=norm)
  if rows:
    sound = rows[0]["sound"]
    word = "certified" if sound else "estimated, no guarantee"
    label = f"{result['name']}: {word}"
    dashes = "--" if sound else ":"
    _line(axes, rows, index, label, hold="pre", linestyle=dashes)


def _line(axes, rows, index, label, *, hold, **drawing):
  # Accuracy falls with the radius. An attacked value limits it from above until
  # the next tested radius, a certified one from below since the last.
  radii = [row["radius"] for row in rows]
  values = [_number(row) for row in rows]
  low, high = zip(*[row["interval"] for row in rows])
  colour = style.colour(index)
  drawing = {"markersize": 5, "linewidth": 1.1, "color": colour, **drawing}
  axes.plot(radii, values, label=label, drawstyle=f"steps-{hold}", **drawing)
  axes.fill_between(
    radii, low, high, color=colour, alpha=0.10, linewidth=0, step=hold
  )


def _number(row) -> float:
  return row["accuracy"] if row and row["accuracy"] is not None else 0.0


def _errors(rows, values):
  spans = [row["interval"] if row else [v, v] for row, v in zip(rows, values)]
  return np.clip(
    [
      [value - low for value, (low, _) in zip(values, spans)],
      [high - value for value, (_, high) in zip(values, spans)],
    ],
    0.0,
    None,
  )


def _missing(label: str, results) -> bool:
  return label != "+".join(names_of(results))


def _sensitivity_share(result, name) -> float:
  return (result["vulnerability"] or {}).get(name) or 0.0


def _accuracy_lost(result, name) -> float:
  rows = curve(result, "attacked", [name])
  if not rows:
    return 0.0
  return result["clean"]["accuracy"] - _number(rows[-1])


def _raw_axis(axes, results, name):
  sizes = {result["units"].get(name, 1.0) for result in results}
  if sizes == {1.0} or len(sizes) > 1:
    return
  size = sizes.pop()
  top = axes.secondary_xaxis(
    "top", functions=(lambda r: r * size, lambda r: r / size)
  )
  top.tick_params(labelsize=7, colors="#777777")
  top.spines["top"].set_color("#cccccc")
  top.set_xlabel("raw input values", fontsize=7, color="#777777")
