"""The one look of every plot: sober, and readable without colour."""

import io

from matplotlib.figure import Figure

# Okabe and Ito: told apart by colour-blind readers and in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK = "#222222"
MAX_COLUMNS = 3
DPI = 120
# Points; no text of a figure is smaller.
SMALL = 9


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
    axes.spines[side].set_color("#777777")
  axes.tick_params(colors=INK, labelsize=SMALL)
  axes.grid(True, axis=grid_axis, color="#e6e6e6", linewidth=0.7)
  axes.set_axisbelow(True)
  return axes


def title(axes, text: str) -> None:
  """A panel's title, above its left end."""
  axes.set_title(text, loc="left", color=INK, fontsize=10)


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


def legend_below(figure, handles) -> None:
  """One legend below all panels."""
  figure.legend(
    handles=handles,
    loc="outside lower center",
    ncols=max(1, min(len(handles), 2)),
    frameon=False,
    fontsize=SMALL,
  )


def shared_legend(figure, grid) -> None:
  """One legend below all panels, of every label of any of them."""
  found = {}
  for axes in grid:
    for handle, label in zip(*axes.get_legend_handles_labels()):
      found.setdefault(label, handle)
  figure.legend(
    list(found.values()),
    list(found),
    loc="outside lower center",
    ncols=max(1, min(len(found), 2)),
    frameon=False,
    fontsize=SMALL,
  )


def line_styles() -> list:
  """Line styles for several series of one colour."""
  return ["-", "--", ":", "-.", (0, (1, 4)), (0, (6, 3))]
