"""Reports: results to HTML, PNG, CSV, JSON, and to one table of text."""

import base64
import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2

from robust_mm import _files
from robust_mm.evaluation import plots
from robust_mm.evaluation import style
from robust_mm.evaluation import texts
from robust_mm.evaluation import wording

RESULTS_FILE = "results.json"
REPORT_FILE = "report.html"
EXAMPLES_FILE = "examples.csv"
PLOTS_FOLDER = "plots"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Report:
  """What :func:`evaluation.evaluate` found.

  Attributes:
    results: the dictionary that ``evaluation.SCHEMA`` describes, plain values.
    examples: ``{column: values [n]}``, one row an example; the columns are
      explained in ``results["examples"]["columns"]``.
  """

  results: Any
  examples: Any

  def save(self, path: Any, *, history: Any = None) -> pathlib.Path:
    """Writes the report; every file appears whole or not at all.

    Args:
      path: a folder, made if missing, for ``results.json``, ``report.html``,
        ``examples.csv`` and ``plots/*.png``; or a path that ends in ``.html``
        for that one file, plots inside.
      history: rows of ``metrics.jsonl`` for the training curves, or None.

    Returns:
      The path.
    """
    path = pathlib.Path(path)
    if path.suffix != ".html":
      _files.write_json(path / RESULTS_FILE, self.results)
      _files.write_columns(path / EXAMPLES_FILE, self.examples)
    return render([self.results], histories=[history], path=path)

  def __str__(self) -> str:
    return table([self.results])


def render(
  results: Sequence[dict],
  *,
  histories: Sequence[Any] | None = None,
  path: Any,
  title: str | None = None,
) -> pathlib.Path:
  """One report of one or several runs, from results alone: no computation.

  >>> render([json.loads(a.read_text()), json.loads(b.read_text())],
  ...        path="comparison.html")                        # doctest: +SKIP

  Args:
    results: dictionaries of ``evaluation.SCHEMA``, as in ``results.json``.
    histories: for each result the rows of its ``metrics.jsonl``, or None.
    path: ends in ``.html`` for one self-contained file, else a folder for
      ``report.html`` and ``plots/*.png``.
    title: a heading; made from the names otherwise.

  Returns:
    The path.

  Raises:
    ValueError: no results, or as many histories as there are not results.
  """
  results = distinct(results)
  if histories is not None and len(histories) != len(results):
    raise ValueError(
      f"histories must have one entry for each of the {len(results)} results, "
      f"got {len(histories)}."
    )
  path = pathlib.Path(path)
  drawn = {
    name: style.png(figure)
    for name, figure in plots.figures(results, histories).items()
  }
  page = (
    _template()
    .render(
      title=title or wording.title(results),
      summary=wording.summary(results),
      runs=[wording.run(result) for result in results],
      table=wording.table_rows(results),
      names=[result["name"] for result in results],
      checks=[(r["name"], check) for r in results for check in r["checks"]],
      warnings=wording.warnings(results),
      figures=[
        {
          "name": name,
          "title": texts.FIGURES[name][0],
          "text": texts.FIGURES[name][1],
          "data": base64.b64encode(content).decode(),
        }
        for name, content in drawn.items()
      ],
      details=[wording.details(result) for result in results],
      glossary=texts.glossary(results),
    )
    .encode()
  )
  if path.suffix == ".html":
    return _files.write_bytes(path, page)
  for name, content in drawn.items():
    _files.write_bytes(path / PLOTS_FOLDER / f"{name}.png", content)
  _files.write_bytes(path / REPORT_FILE, page)
  return path


def table(results: Sequence[dict]) -> str:
  """The accuracies of all runs as one table of text, a column a run.

  Certified and estimated numbers stand in rows of their own; a dash means
  that the run has no such number.
  """
  results = distinct(results)
  rows = wording.table_rows(results)
  cells = [["accuracy", *[result["name"] for result in results]]]
  cells += [[row["label"], *row["values"]] for row in rows]
  widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
  lines = [
    "  ".join(
      [line[0].ljust(widths[0])]
      + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
    )
    for line in cells
  ]
  return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def distinct(results: Sequence[dict]) -> list[dict]:
  """The results with names made different: ``crmt``, ``crmt (2)``."""
  if not results:
    raise ValueError("results must hold at least one result, got none.")
  seen, named = {}, []
  for result in results:
    name = result["name"]
    seen[name] = seen.get(name, 0) + 1
    if seen[name] > 1:
      result = {**result, "name": f"{name} ({seen[name]})"}
    named.append(result)
  return named


@functools.cache
def _template() -> jinja2.Template:
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("robust_mm.evaluation"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template("report.html.j2")
