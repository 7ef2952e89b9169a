"""The page of a study of modality shift."""

import base64
import json
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from robust_mm import _validate
from robust_mm.evaluation import shift as shift_lib
from robust_mm.evaluation import shift_texts
from robust_mm.evaluation import templating

_RELATIVE = {
  "pooled": "relative robustness, pooled",
  "relative_raw": "relative robustness, mean of ratios",
}
_CHANGES = {"missing": "drop", "added": "gain"}


def render(
  report: shift_lib.ShiftReport,
  *,
  title: str,
  drawn: Mapping[str, bytes],
  notes: Sequence[str] = (),
  about: Mapping[str, str] | None = None,
  made: Mapping[str, str] | None = None,
  settings: Mapping[str, Any] | None = None,
) -> str:
  """HTML, complete in itself.

  Args:
    report: of ``shift_report``.
    title: of the page.
    drawn: ``{method: PNG}`` heat-maps.
    notes: sentences that come first.
    about: ``{method: what it is}``.
    made: ``{what: how}``, facts of how the numbers were made.
    settings: the configuration, nested.
  """
  figures = [
    {
      "alt": f"scores of {method}, trained on T and evaluated on E",
      "data": base64.b64encode(png).decode(),
    }
    for method, png in drawn.items()
  ]
  return templating.template("shift.html.j2").render(
    title=title,
    relative=_relative(report),
    notes=[_about(report), *notes],
    tables=_tables(report),
    about=about or {},
    made=made or {},
    settings=json.dumps(settings, indent=2) if settings else "",
    figures=figures,
  )


def _tables(report) -> list[dict[str, Any]]:
  """What is asked for first, then what it is made of."""
  kinds = [kind for kind in report.categories if report.num_pairs[kind]]

  def by_kind(title, estimate, methods=report.methods):
    rows = [
      [m, *(shift_texts.cell(estimate(m, kind), report) for kind in kinds)]
      for m in methods
    ]
    return {"title": title, "head": ["method", *kinds], "rows": rows}

  def values(title, name):
    return by_kind(title, lambda m, kind: report.estimate(m, kind, name))

  tables = [values(_RELATIVE[report.headline], report.headline)]
  others = [m for m in report.methods if m != report.baseline]
  if others:
    form = "pooled" if report.headline == "pooled" else "mean of ratios"
    tables.append(
      by_kind(
        f"times {report.baseline} ({form})",
        lambda m, kind: report.improvement(m, report.baseline, kind),
        others,
      )
    )
  tables += [
    values("mean score", "performance"),
    values("worst pair", "worst"),
    *_changes(report, kinds),
  ]
  head, *rows = shift_texts.strengths(report)
  if len(head) > 1:
    title = "one modality, trained and evaluated on"
    tables.append({"title": title, "head": head, "rows": rows})
  return tables


def _changes(report, kinds) -> list[dict[str, Any]]:
  found = {kind: word for kind, word in _CHANGES.items() if kind in kinds}
  if not found:
    return []
  rows = [
    [
      method,
      *(
        shift_texts.cell(report.estimate(method, kind, word), report)
        for kind, word in found.items()
      ),
    ]
    for method in report.methods
  ]
  head = [f"{word} ({kind})" for kind, word in found.items()]
  title = "drop and gain, from the method's own matched score"
  return [{"title": title, "head": ["method", *head], "rows": rows}]


def _relative(report) -> str:
  """What is divided by what, in the sentence of the page."""
  whose = "each method itself"
  if report.reference != "own":
    whose = report.reference
  above = f"above 1 is better than that; {shift_texts.undefined(report)}."
  if report.headline == "pooled":
    return (
      f"Relative robustness is pooled: scores above chance, as a share of "
      f"those of {whose} trained and evaluated on E; {above}"
    )
  return (
    f"Relative robustness is the mean over pairs of the score as a share of "
    f"that of {whose} trained and evaluated on E, chance not taken off; {above}"
  )


def _about(report) -> str:
  drawn = "clusters and seeds" if report.seeds_drawn else "clusters"
  seeds = ""
  if report.num_seeds > 1 and not report.seeds_drawn:
    seeds = ", behind them the smallest and largest of single seeds"
  return (
    f"{report.score.replace('_', ' ')}, chance {report.chance:.3f}; "
    f"{_validate.counted(report.num_items, 'test item')} in "
    f"{_validate.counted(report.num_clusters, 'cluster')}, "
    f"{_validate.counted(report.num_seeds, 'seed')}; "
    f"{report.level:.0%} intervals of a paired bootstrap over {drawn}{seeds}. "
    "Measured on absence: nothing here bounds a perturbation."
  )
