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

_STATISTICS = {
  "performance": "mean score",
  "worst": "worst pair",
  "pooled": "relative robustness, pooled",
}


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
  kinds = [kind for kind in report.categories if report.num_pairs[kind]]
  tables = [
    {
      "title": what,
      "head": ["method", *kinds],
      "rows": [
        [
          method,
          *(
            shift_texts.with_interval(report.estimate(method, k, name))
            for k in kinds
          ),
        ]
        for method in report.methods
      ],
    }
    for name, what in _STATISTICS.items()
  ]
  others = [m for m in report.methods if m != report.reference]
  if others:
    tables.append(
      {
        "title": f"times {report.reference} (pooled)",
        "head": ["method", *kinds],
        "rows": [
          [
            method,
            *(
              shift_texts.with_interval(
                report.improvement(method, report.reference, k)
              )
              for k in kinds
            ),
          ]
          for method in others
        ],
      }
    )
  figures = [
    {
      "alt": f"scores of {method}, trained on T and evaluated on E",
      "data": base64.b64encode(png).decode(),
    }
    for method, png in drawn.items()
  ]
  return templating.template("shift.html.j2").render(
    title=title,
    reference=report.reference,
    notes=[_about(report), *notes],
    tables=tables,
    undefined=shift_texts.undefined(report),
    about=about or {},
    made=made or {},
    settings=json.dumps(settings, indent=2) if settings else "",
    figures=figures,
  )


def _about(report) -> str:
  drawn = "clusters and seeds" if report.seeds_drawn else "clusters"
  return (
    f"{report.score.replace('_', ' ')}, chance {report.chance:.3f}; "
    f"{_validate.counted(report.num_items, 'test item')} in "
    f"{_validate.counted(report.num_clusters, 'cluster')}, "
    f"{_validate.counted(report.num_seeds, 'seed')}; "
    f"{report.level:.0%} intervals of a paired bootstrap over {drawn}. "
    "Measured on absence: nothing here bounds a perturbation."
  )
