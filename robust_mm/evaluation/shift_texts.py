"""A report of modality shift as a dictionary and as text."""

import math
from typing import Any

import numpy as np

from robust_mm import _validate
from robust_mm import modalities
from robust_mm.evaluation import shift_statistics

SCHEMA_VERSION = "1"
_WORDS = {
  "performance": "performance",
  "worst": "worst",
  "pooled": "pooled relative",
  "relative": "mean of ratios",
  "pooled_raw": "pooled, no chance",
  "relative_raw": "ratios, no chance",
  "drop": "drop",
  "gain": "gain",
}


def as_dict(report) -> dict[str, Any]:
  """Numbers, lists and strings; NaN and infinity are None."""
  methods = report.methods
  found = {
    "schema_version": SCHEMA_VERSION,
    "names": list(report.names),
    "train_sets": _named(report.train_sets),
    "test_sets": _named(report.test_sets),
    "kinds": report.kinds.tolist(),
    "score": report.score,
    "chance": report.chance,
    "reference": report.reference,
    "baseline": report.baseline,
    "fidelity": report.fidelity,
    "headline": report.headline,
    "level": report.level,
    "num_items": report.num_items,
    "num_clusters": report.num_clusters,
    "num_seeds": report.num_seeds,
    "seeds_drawn": report.seeds_drawn,
    "num_empty": dict(report.num_empty),
    "skipped_empty": report.skipped_empty,
    "num_pairs": dict(report.num_pairs),
    "methods": {m: _method(report, m) for m in methods},
    "against_reference": {
      m: {kind: _against(report, m, kind) for kind in report.categories}
      for m in methods
      if m != report.baseline
    },
  }
  return plain(found)


def table(report) -> str:
  """Aggregates by kind of every method, what they rest on, and the matrix."""
  intro = (
    f"{report.score}, chance {report.chance:.3g}; "
    f"{_validate.counted(report.num_items, 'item')} in "
    f"{_validate.counted(report.num_clusters, 'cluster')}, "
    f"{_validate.counted(report.num_seeds, 'seed')}; "
    f"reference {report.reference}; fidelity {report.fidelity}; "
    f"{report.level:.0%} intervals of a paired bootstrap over clusters"
    f"{' and seeds' if report.seeds_drawn else ''}."
  )
  blocks = [intro]
  for method in report.methods:
    blocks += [_aggregates(report, method), _matrix(report, method)]
  if any(len(train) == 1 for train in report.train_sets):
    blocks.append(
      "one modality, trained and evaluated on\n" + _aligned(strengths(report))
    )
  notes = [
    f"{method}: {count} predictions with NaN count as wrong."
    for method, count in report.num_nan.items()
    if count
  ]
  word = "left out" if report.skipped_empty else "kept"
  notes += [
    f"{count} items have nothing of {subset}; {word}."
    for subset, count in report.num_empty.items()
  ]
  return "\n\n".join(blocks + (["\n".join(notes)] if notes else [])) + "\n"


def undefined(report) -> str:
  """What "undefined" stands for, a sentence without its point."""
  own = report.reference == "own"
  off = "0" if report.fidelity == "published" else "chance"
  return (
    f"undefined: {'the method itself' if own else report.reference} is within "
    f"two standard errors of {off} there, too close to divide by"
  )


def _aggregates(report, method: str) -> str:
  statistics = ["performance", "worst", "pooled", "relative"]
  if report.fidelity == "published":
    statistics += ["relative_raw"]
  statistics += ["drop", "gain"]
  heads = ["kind", *[_WORDS[s] for s in statistics], "pairs", "undefined"]
  rows = []
  for kind in report.categories:
    if not report.num_pairs[kind]:
      continue
    cells = [
      cell(report.estimate(method, kind, name), report) for name in statistics
    ]
    cells = ["-" if text == "undefined" else text for text in cells]
    counts = report.num_pairs[kind], report.num_undefined[method][kind]
    rows.append([kind, *cells, *[str(count) for count in counts]])
  return f"{method}\n" + _aligned([heads, *rows])


def with_interval(estimate: shift_statistics.Estimate) -> str:
  """``0.912 [0.874, 0.950]``, or what of it is defined."""
  if math.isnan(estimate.value):
    return "undefined"
  if math.isnan(estimate.low):  # in many draws there is nothing to divide by
    return f"{estimate.value:.3f} [undefined]"
  return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def cell(estimate: shift_statistics.Estimate, report) -> str:
  """:func:`with_interval`, and the range of seeds where none are drawn.

  ``0.912 [0.874, 0.950] (0.899..0.921)``.
  """
  text = with_interval(estimate)
  known = not (math.isnan(estimate.value) or math.isnan(estimate.seed_low))
  if known and report.num_seeds > 1 and not report.seeds_drawn:
    text += f" ({estimate.seed_low:.3f}..{estimate.seed_high:.3f})"
  return text


def strengths(report) -> list[list[str]]:
  """s({m} -> {m}) of every modality trained alone: a head, a row a method."""
  names = [train[0] for train in report.train_sets if len(train) == 1]
  rows = [
    [method, *[cell(_strength(report, method, name), report) for name in names]]
    for method in report.methods
  ]
  return [["method", *names], *rows]


def _strength(report, method: str, name: str) -> shift_statistics.Estimate:
  at = report.train_sets.index((name,)), report.test_sets.index((name,))
  seeds = report.scores[method][:, *at]
  ends = report.intervals[method][:, *at]
  numbers = seeds.mean(), *ends, seeds.min(), seeds.max()
  return shift_statistics.Estimate(*map(float, numbers))


def _matrix(report, method: str) -> str:
  """T down, E across, as in the figure and in JSON."""
  heads = ["trained on \\ evaluated on", *_named(report.test_sets)]
  rows = [
    [name, *[f"{value:.3f}" for value in row]]
    for name, row in zip(_named(report.train_sets), report.matrix(method))
  ]
  return _aligned([heads, *rows])


def _aligned(rows: list[list[str]]) -> str:
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return "\n".join(
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
    for row in rows
  )


def _method(report, method: str) -> dict[str, Any]:
  return {
    "matrix": report.matrix(method),
    "intervals": np.moveaxis(report.intervals[method], 0, -1),
    "by_seed": report.scores[method],
    "ratios": report.ratios(method),
    "matched_reference": report.matched[method],
    "matched_reference_error": report.matched_error[method],
    "strengths": report.strengths(method),
    "num_nan": report.num_nan[method],
    "num_undefined": dict(report.num_undefined[method]),
    "aggregates": {
      kind: {
        name: report.estimate(method, kind, name)._asdict()
        for name in shift_statistics.STATISTICS
      }
      for kind in report.categories
    },
  }


def _against(report, method: str, kind: str) -> dict[str, Any]:
  """Differences and ratios to the baseline, in every form."""
  reference = report.baseline
  return {
    "difference": {
      name: report.difference(method, reference, kind, name)._asdict()
      for name in shift_statistics.STATISTICS
    },
    "improvement": {
      form: {
        word: report.improvement(
          method, reference, kind, form, corrected=corrected
        )._asdict()
        for word, corrected in (("corrected", True), ("raw", False))
      }
      for form in shift_statistics.FORMS
    },
  }


def _named(subsets) -> list[str]:
  return [modalities.subset_name(subset) for subset in subsets]


def plain(value):
  """For strict JSON: arrays as lists, NaN and infinity as None."""
  if isinstance(value, dict):
    return {name: plain(part) for name, part in value.items()}
  if isinstance(value, np.ndarray):
    return plain(value.tolist())
  if isinstance(value, list):
    return [plain(part) for part in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
