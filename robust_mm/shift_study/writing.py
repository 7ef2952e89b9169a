"""The files of a study: numbers, text, plots and the page."""

import json

from robust_mm import _files
from robust_mm import modalities
from robust_mm import shift_methods
from robust_mm.evaluation import circumstances
from robust_mm.evaluation import shift
from robust_mm.evaluation import shift_page
from robust_mm.evaluation import shift_plots
from robust_mm.evaluation import shift_texts
from robust_mm.evaluation import style
from robust_mm.shift_study import budgets
from robust_mm.shift_study import plan

_FILES = (
  "shift.json has every number of this page and more, by pair and by seed; "
  "shift.txt the tables; plots/ the figures; study.json the configuration; "
  "runs/METHOD/TRAINED_ON/SEED the models."
)


def write(study: plan.Study, report: shift.ShiftReport) -> None:
  """``shift.json``, ``shift.txt``, ``shift.html``, ``plots/``."""
  folder, config = study.folder, study.config
  settings = json.loads(config.to_json())
  where = circumstances.where()
  about = {m: _about(study, m) for m in report.methods}
  found = {
    **report.to_dict(),
    "about": about,
    "budget": budgets.budgets(config, study.names, study.train_sets),
    "config": shift_texts.plain(settings),
    **where,
  }
  _files.write_json(folder / plan.RESULTS, found)
  _files.write_bytes(folder / "shift.txt", summary(study, report).encode())
  drawn = {
    method: style.png(shift_plots.heat_map(report, method))
    for method in report.methods
  }
  for method, png in drawn.items():
    _files.write_bytes(folder / "plots" / f"shift_{method}.png", png)
  page = shift_page.render(
    report,
    title=f"Modality shift on {config.data.name}",
    drawn=drawn,
    about=about,
    notes=[*_extra(study), _FILES],
    made={
      "budget": " ".join(_budget(study)),
      "pretraining": config.study.pretraining or "none, from scratch",
      "device": where["device"],
      "versions": ", ".join(f"{n} {v}" for n, v in where["versions"].items()),
    },
    settings=settings,
  )
  _files.write_bytes(folder / "shift.html", page.encode())


def summary(study: plan.Study, report: shift.ShiftReport) -> str:
  """The report's tables, what interventions gain, what each method passed."""
  lines = [report.table().rstrip()]
  others = [m for m in report.methods if m != report.baseline]
  if others:
    lines += ["", "times plain fine-tuning (pooled):"]
  for method in others:
    cells = []
    for kind in report.categories:
      if report.num_pairs[kind]:
        found = report.improvement(method, report.baseline, kind)
        cells.append(f"{kind} {shift_texts.cell(found, report)}")
    lines.append(f"  {method:14s} " + "  ".join(cells))
  if others:
    lines.append(f"  ({shift_texts.undefined(report)})")
  lines += ["", *_budget(study), *_extra(study)]
  return "\n".join(lines) + "\n"


def _budget(study: plan.Study) -> list[str]:
  return budgets.lines(study.config, study.names, study.train_sets)


def _about(study: plan.Study, method: str) -> str:
  said = shift_methods.METHODS[method]
  if isinstance(said, shift_methods.Between):
    return f"{said.about}, at alpha {study.config.study.alpha:g}"
  return said.about


def _extra(study: plan.Study) -> list[str]:
  """Says of which E the reference has models that are no rows."""
  if not study.reference_sets:
    return []
  listed = ", ".join(map(modalities.subset_name, study.reference_sets))
  return [
    f"{shift_methods.REFERENCE} was trained on {listed} too, as reference."
  ]
