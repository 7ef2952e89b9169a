"""Figures: what is on which axis, read from the Matplotlib objects."""

import evaluation_results as made
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.contour import QuadContourSet
from matplotlib.text import Text

from robust_mm.evaluation import plots
from robust_mm.evaluation import regions
from robust_mm.evaluation import style


@pytest.fixture
def results():
  return [
    made.make_result("joint", sound=False, drop=0.8),
    made.make_result("crmt-JT"),
  ]


@pytest.fixture
def histories():
  return [
    made.make_history(("joint",), certified=False),
    made.make_history(),
  ]


def panels(figure):
  return {axes.get_title(loc="left"): axes for axes in figure.axes}


def solid_lines(axes):
  """The drawn series: those of more than the two points of a mark."""
  return [line for line in axes.lines if len(set(line.get_xdata())) > 1]


def test_objectives_and_validation_never_share_an_axis(results, histories):
  drawn = panels(plots.figures(results, histories)["training"])
  assert list(drawn) == [
    "Training: joint",
    "Training: crmt-JT, margins",
    "Training: crmt-JT, integration",
    "Validation: accuracy",
    "Validation: cross-entropy",
  ]
  values = {
    title: [set(line.get_ydata()) for line in solid_lines(axes)]
    for title, axes in drawn.items()
  }
  assert values["Training: joint"] == [{1.0}]
  assert values["Training: crmt-JT, margins"] == [{1.0}]
  assert values["Training: crmt-JT, integration"] == [{0.1}]
  assert values["Validation: cross-entropy"] == [{1.5}, {1.5}]
  assert values["Validation: accuracy"] == [{0.9}, {0.9}, {0.6}]
  (line,) = solid_lines(drawn["Training: crmt-JT, integration"])
  assert list(line.get_xdata()) == [300, 400]


def test_runs_of_one_recipe_share_the_panels_of_its_phases():
  results = [made.make_result("crmt-JT"), made.make_result("again")]
  results[1]["recipe"] = "crmt-JT"
  figure = plots.figures(results, [made.make_history()] * 2)["training"]
  drawn = panels(figure)
  assert len(drawn) == 4
  lines = solid_lines(drawn["Training: crmt-JT, margins"])
  assert [line.get_color() for line in lines] == list(style.COLOURS[:2])


def test_attacked_modalities_and_gates_have_panels(results):
  rows = [
    {
      "step": step,
      "phase": "modal_immune",
      "probe_p_left": 0.25,
      "probe_p_right": 0.75,
      "probe_closed_left": 0.1 * step,
      "validation_mean_over_subsets": 0.5,
      "validation_exact_match": 0.75,
    }
    for step in (1, 2)
  ]
  drawn = panels(plots.figures(results[:1], [rows])["training"])
  (attacked,) = [p for name, p in drawn.items() if "Attacked" in name]
  assert {line.get_ydata()[0] for line in attacked.lines} == {0.25, 0.75}
  (gates,) = [p for name, p in drawn.items() if name.startswith("Gates")]
  np.testing.assert_allclose(gates.lines[0].get_ydata(), [0.1, 0.2])
  selected = drawn["Validation: accuracy"]
  assert 0.5 in selected.lines[0].get_ydata()
  spelled = drawn["Validation: captions right"]
  assert 0.75 in spelled.lines[0].get_ydata()


def test_phases_are_marked_by_name_where_they_start(results, histories):
  drawn = panels(plots.figures(results, histories)["training"])
  for title in ("Validation: accuracy", "Validation: cross-entropy"):
    axes = drawn[title]
    named = {
      text.get_text().strip(): text.get_position() for text in axes.texts
    }
    assert {name: x for name, (x, _) in named.items()} == {
      "margins": 0,
      "integration": 200,
    }
    marks = {x for line in axes.lines for x in line.get_xdata()}
    assert {0, 200} <= marks
  alone = plots.figures(results[:1], histories[:1])["training"]
  assert not any(axes.texts for axes in alone.axes)


def test_legends_tell_runs_by_colour_and_metrics_by_line(results, histories):
  figure = plots.figures(results, histories)["training"]
  (legend,) = figure.legends
  entries = zip(legend.get_texts(), legend.legend_handles)
  colours = {text.get_text(): handle.get_color() for text, handle in entries}
  assert colours == {"joint": style.COLOURS[0], "crmt-JT": style.COLOURS[1]}
  axes = panels(figure)["Validation: accuracy"]
  legend = axes.get_legend()
  looks = {
    text.get_text(): handle.get_linestyle()
    for text, handle in zip(legend.get_texts(), legend.legend_handles)
  }
  assert list(looks) == ["accuracy", "certified accuracy"]
  assert len(set(looks.values())) == 2
  drawn = [line.get_linestyle() for line in solid_lines(axes)]
  assert drawn == [looks["accuracy"]] * 2 + [looks["certified accuracy"]]


def test_a_constant_objective_is_no_zoom_into_its_rounding():
  history = [
    {"step": step, "phase": "p", "loss": 0.08 + step * 1e-10}
    for step in range(1, 9)
  ]
  result = made.make_result()
  axes = plots.figures([result], [history])["training"].axes[0]
  low, high = axes.get_ylim()
  assert low == 0
  assert high > 0.08
  zero = [{**row, "loss": 0.0} for row in history]
  low, high = plots.figures([result], [zero])["training"].axes[0].get_ylim()
  assert low < high
  below = [{**row, "loss": -1.0} for row in history]
  low, high = plots.figures([result], [below])["training"].axes[0].get_ylim()
  assert low < -1 < 0 <= high


def contours(axes):
  found = [c for c in axes.collections if isinstance(c, QuadContourSet)]
  (bands,) = [c for c in found if c.filled]
  return bands, [c for c in found if not c.filled]


def test_region_has_bands_and_labelled_lines_in_the_right_place(results):
  figure = plots.figures(results)["region"]
  for axes in figure.axes[:2]:
    bands, (lines,) = contours(axes)
    assert list(bands.levels) == list(regions.EDGES)
    assert list(lines.levels) == [0.5, 0.7, 0.9]
    labels = sorted(text.get_text() for text in lines.labelTexts)
    assert labels == ["0.5", "0.7", "0.9"]
    for level, path in zip(lines.levels, lines.get_paths()):
      corners = path.vertices
      assert len(corners) > 2
      # The share was made 1 - e1 - e2, which a linear contour hits exactly.
      np.testing.assert_allclose(corners.sum(axis=1), 1 - level, atol=1e-9)


def test_region_says_kind_norm_and_unit(results):
  figure = plots.figures(results)["region"]
  titles = [axes.get_title(loc="left") for axes in figure.axes[:2]]
  assert titles == ["joint: estimated", "crmt-JT: certified"]
  for axes in figure.axes[:2]:
    assert axes.get_xlabel() == "change of left (l2, raw input values)"
    assert axes.get_ylabel() == "change of right (l2, raw input values)"
  scaled = made.make_result(units=3.14159, norm="inf")
  axes = plots.figures([scaled])["region"].axes[0]
  assert axes.get_xlabel() == "change of left (linf, 1 unit = 3.14 raw)"


def test_region_paints_beyond_its_grid_only_what_it_knows():
  small, large = made.make_result("small"), made.make_result("large")
  radii = np.asarray(large["region"]["radii"])
  large["region"]["radii"] = (2 * radii).tolist()
  colour = plots.figures([small, large])["region"].axes[0].get_facecolor()
  assert colour[:3] != (1.0, 1.0, 1.0)
  # Half of the examples cannot be changed at all: held beyond the grid, too.
  held = np.maximum(np.asarray(small["region"]["accuracy"]), 0.5)
  small["region"]["accuracy"] = held.tolist()
  colour = plots.figures([small, large])["region"].axes[0].get_facecolor()
  assert colour[:3] == (1.0, 1.0, 1.0)


def test_a_weak_region_has_no_line_it_does_not_reach():
  weak = made.make_result()
  low = 0.6 * np.asarray(weak["region"]["accuracy"])
  weak["region"]["accuracy"] = low.tolist()
  _, (lines,) = contours(plots.figures([weak])["region"].axes[0])
  assert list(lines.levels) == [0.5]
  weak["region"]["accuracy"] = (0.5 * low).tolist()
  _, lines = contours(plots.figures([weak])["region"].axes[0])
  assert lines == []


def test_certified_estimated_and_attacked_look_different(results):
  (axes,) = plots.figures(results)["radius_joint"].axes
  looks = {
    line.get_label(): (line.get_linestyle(), line.get_marker())
    for line in axes.lines
  }
  assert looks == {
    "joint: attacked (pgd)": ("-", "o"),
    "joint: estimated, no guarantee": (":", "None"),
    "crmt-JT: attacked (pgd)": ("-", "o"),
    "crmt-JT: certified": ("--", "None"),
  }
  bars = plots.figures(results)["vulnerability"].axes[0]
  hatches = [bar.get_hatch() for bar in bars.patches]
  assert hatches.count(None) == 2
  assert len(hatches) == 4
  texts = [text.get_text() for text in bars.get_legend().get_texts()]
  assert texts == ["joint (estimated)", "crmt-JT (certified)"]


def test_what_was_not_measured_has_no_bar(results):
  results[0]["vulnerability"] = None
  results[0]["subsets"]["left"] = {
    "accuracy": None,
    "interval": [0.0, 1.0],
    "num_examples": 0,
  }
  figures = plots.figures(results)
  assert len(figures["vulnerability"].axes[0].patches) == 2
  axes = figures["subsets"].axes[0]
  assert len(axes.patches) == 5
  texts = [text.get_text() for text in axes.texts]
  assert texts.count("not measured") == 1
  assert "0.000" not in texts


def test_subsets_start_with_everything_present(results):
  axes = plots.figures(results)["subsets"].axes[0]
  labels = [label.get_text() for label in axes.get_yticklabels()]
  assert labels == ["left+right (all)", "only left", "only right"]
  assert axes.yaxis_inverted()
  widths = [bar.get_width() for bar in axes.patches]
  assert (
    widths == [made.SUBSETS[k] for k in ("left+right", "left", "right")] * 2
  )


def test_accuracy_lost_is_that_of_the_strongest_attack_and_says_where(results):
  weaker = [
    {**row, "attack": "fgm", **made.share(0.9)}
    for row in results[1]["attacked"]
  ]
  results[1]["attacked"] += weaker
  axes = plots.figures(results)["vulnerability"].axes[1]
  assert axes.get_title(loc="left") == "Accuracy lost, l2 attack of size 1"
  heights = sorted(bar.get_width() for bar in axes.patches)
  np.testing.assert_allclose(heights, [0.4, 0.4, 0.8, 0.8])


def test_tightness_has_a_tick_at_every_multiple(results):
  (axes,) = plots.figures(results)["tightness"].axes
  assert list(axes.get_xticks()) == [1.0, 1.2, 2.0]
  labels = [line.get_label() for line in axes.lines]
  assert "joint (estimated l2 radius)" in labels
  assert "crmt-JT (certified l2 radius)" in labels


def contrast(colour):
  """WCAG contrast ratio against white."""
  rgb = np.asarray(to_rgb(colour))
  linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
  return 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05)


def test_every_text_is_large_and_dark_enough(results, histories):
  scaled = [{**r, "units": {"left": 3.0, "right": 2.0}} for r in results]
  drawn = plots.figures(scaled, histories)
  assert len(drawn) == 9
  for name, figure in drawn.items():
    style.png(figure)
    texts = [t for t in figure.findobj(Text) if t.get_text().strip()]
    assert texts
    for text in texts:
      assert text.get_fontsize() >= style.SMALL, (name, text)
      assert contrast(text.get_color()) >= 7, (name, text)


def test_no_panel_runs_into_another(results, histories):
  for name, figure in plots.figures(results, histories).items():
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for index, box in enumerate(boxes):
      assert not any(box.overlaps(b) for b in boxes[index + 1 :]), name


def test_numbers_at_bars_do_not_run_into_each_other(results):
  runs = [*results, made.make_result("third"), made.make_result("fourth")]
  for name in ("vulnerability", "subsets"):
    figure = plots.figures(runs)[name]
    figure.draw_without_rendering()
    for axes in figure.axes:
      boxes = [text.get_window_extent() for text in axes.texts]
      assert len(boxes) >= 8
      for index, box in enumerate(boxes):
        assert not any(box.overlaps(b) for b in boxes[index + 1 :]), name
