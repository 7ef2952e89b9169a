"""The one look of every plot: sober, and readable without colour."""

import io

from matplotlib.figure import Figure

# Okabe and Ito: told apart by colour-blind readers and in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK = "#333333"
MAX_COLUMNS = 3
DPI = 110


def png(figure: Figure) -> bytes:
  """The figure as a PNG file's bytes, the same for the same figure."""
  buffer = io.BytesIO()
  figure.savefig(
    buffer,
    format="png",
    dpi=DPI,
    facecolor="white",
    metadata={"Software": None},
  )
  return buffer.getvalue()


def colour(index: int) -> str:
  """The colour of run ``index``."""
  return COLOURS[index % len(COLOURS)]


def plain(axes, grid_axis: str = "both"):
  """Axes without box, with a light grid behind the data."""
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
  for side in ("left", "bottom"):
    axes.spines[side].set_color("#999999")
  axes.tick_params(colors=INK, labelsize=9)
  axes.grid(True, axis=grid_axis, color="#e6e6e6", linewidth=0.7)
  axes.set_axisbelow(True)
  return axes


def panels(count: int, *, height: float, width: float = 3.2):
  """A figure and ``count`` axes, at most three abreast; sizes in inches."""
  columns = min(count, MAX_COLUMNS)
  rows = -(-count // columns)
  figure = Figure(
    figsize=(max(width * columns, 5.0), height * rows), layout="constrained"
  )
  axes = [
    plain(figure.add_subplot(rows, columns, index + 1))
    for index in range(count)
  ]
  return figure, axes


def shared_legend(figure, axes):
  """One legend below all panels, from the entries of ``axes``."""
  handles, labels = axes.get_legend_handles_labels()
  figure.legend(
    handles,
    labels,
    loc="outside lower center",
    ncols=min(len(labels), 2),
    frameon=False,
    fontsize=8,
  )


def line_styles() -> list:
  """Line styles for several series of one colour."""
  return ["-", "--", ":", "-.", (0, (1, 4)), (0, (6, 3))]
