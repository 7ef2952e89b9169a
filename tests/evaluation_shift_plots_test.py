"""Figures of modality shift, read from the Matplotlib objects."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from robust_mm import evaluation
from robust_mm.evaluation import shift_plots
from robust_mm.evaluation import style

ALPHAS = (0.0, 0.3, 0.5, 1.0)


@pytest.fixture(scope="module")
def report():
  rng = np.random.default_rng(0)
  results = {
    f"wise {alpha:g}": rng.random((1, 7, 7, 200)) < 0.05 + 0.9 * alpha
    for alpha in ALPHAS
  }
  return evaluation.shift_report(
    results, ["a", "b", "c"], 0.1, "wise 1", num_samples=100
  )


def _luminance(colour):
  rgb = np.asarray(to_rgb(colour))
  linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
  return linear @ [0.2126, 0.7152, 0.0722]


def _cells(axes):
  """{(column, row): text} of the annotations."""
  return {tuple(text.get_position()): text for text in axes.texts}


def test_every_cell_has_its_number_its_sign_and_its_frame(report):
  axes = shift_plots.heat_map(report, "wise 0.5").axes[0]
  matrix, cells = report.matrix("wise 0.5"), _cells(axes)
  assert len(cells) == 49
  frames = {
    tuple(np.rint(np.add(p.get_xy(), 0.46)).astype(int)): p
    for p in axes.patches
    if isinstance(p, Rectangle)
  }
  for (row, column), value in np.ndenumerate(matrix):
    sign, colour = shift_plots.MARKS[report.kinds[row, column]]
    assert cells[column, row].get_text() == f"{value:.2f}\n{sign}"
    edge = frames[column, row].get_edgecolor()
    assert to_hex(edge) == colour.lower()
  assert axes.get_xlabel() == "evaluated on E"
  labels = [label.get_text() for label in axes.get_yticklabels()]
  assert labels == ["a", "b", "c", "a+b", "a+c", "b+c", "a+b+c"]


def test_numbers_can_be_read_on_every_colour(report):
  for method in report.methods:
    axes = shift_plots.heat_map(report, method).axes[0]
    (image,) = axes.images
    for (column, row), text in _cells(axes).items():
      shade = image.to_rgba(report.matrix(method)[row, column])[:3]
      pair = sorted([_luminance(shade), _luminance(text.get_color())])
      assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5
      assert text.get_fontsize() >= style.SMALL


def test_kinds_are_told_apart_without_colour():
  signs, colours = zip(*shift_plots.MARKS.values())
  for looks in (signs, colours):
    assert len(set(looks)) == 5
  assert set(colours) <= set(style.COLOURS)


def test_an_undefined_ratio_is_no_number(report):
  axes = shift_plots.heat_map(report, "wise 0.5", ratios=True).axes[0]
  assert all("n/a" not in t.get_text() for t in axes.texts)
  rng = np.random.default_rng(0)
  results = {"ft": rng.random((1, 3, 3, 200)) < 0.1}
  weak = evaluation.shift_report(results, "ab", 0.2, "ft", num_samples=50)
  axes = shift_plots.heat_map(weak, "ft", ratios=True).axes[0]
  assert all(t.get_text().startswith("n/a\n") for t in axes.texts)


def test_the_path_has_a_line_a_set_and_marks_the_choice():
  lines = {"a": [0.1, 0.5, 0.4], "a+b": [0.2, 0.6, 0.7]}
  figure = shift_plots.curves(
    [0.0, 0.3, 1.0], lines, score="accuracy", chosen=0.3
  )
  axes = figure.axes[0]
  drawn = {line.get_label(): line for line in axes.lines}
  assert set(drawn) == {*lines, "untuned", "chosen on matched validation"}
  for name, values in lines.items():
    assert list(drawn[name].get_xdata()) == [0.0, 0.3, 1.0]
    assert list(drawn[name].get_ydata()) == values
  assert set(drawn["untuned"].get_xdata()) == {0.5}
  assert set(drawn["chosen on matched validation"].get_xdata()) == {0.3}
  (legend,) = figure.legends
  assert len(legend.get_texts()) == 4


def test_texts_are_large_and_dark_enough_and_do_not_overlap(report):
  path = {"a": [0.1, 0.5], "b": [0.2, 0.6]}
  for figure in (
    shift_plots.heat_map(report, "wise 1"),
    shift_plots.curves([0.0, 1.0], path, score="accuracy", chosen=0.3),
  ):
    style.png(figure)
    inside = set(figure.axes[0].texts)
    for text in figure.findobj(Text):
      if text.get_text().strip() and text not in inside:
        assert text.get_fontsize() >= style.SMALL
        assert 1.05 / (_luminance(text.get_color()) + 0.05) >= 7
    boxes = [text.get_window_extent() for text in inside]
    for index, box in enumerate(boxes):
      assert not any(box.overlaps(b) for b in boxes[index + 1 :])
    axes_boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert not any(
      a.overlaps(b) for i, a in enumerate(axes_boxes) for b in axes_boxes[:i]
    )
    (legend,) = figure.legends
    assert not any(legend.get_window_extent().overlaps(b) for b in axes_boxes)


def test_an_unknown_method_is_refused_by_name(report):
  with pytest.raises(ValueError, match="method must be one of"):
    shift_plots.heat_map(report, "wise 2")
