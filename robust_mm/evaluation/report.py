"""Reports: results to HTML, PNG, CSV, JSON, and to one table of text."""

import base64
import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from robust_mm import _files
from robust_mm import _tasks
from robust_mm.evaluation import captions
from robust_mm.evaluation import details
from robust_mm.evaluation import pages
from robust_mm.evaluation import plots
from robust_mm.evaluation import rows as rows_lib
from robust_mm.evaluation import style
from robust_mm.evaluation import templating
from robust_mm.evaluation import texts
from robust_mm.evaluation import visuals
from robust_mm.evaluation import wording

SCHEMA_VERSION = 1
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
    folders = None if path.suffix == ".html" else [path]
    return render(
      [self.results], histories=[history], folders=folders, path=path
    )

  def __str__(self) -> str:
    return table([self.results])


def render(
  results: Sequence[dict],
  *,
  histories: Sequence[Any] | None = None,
  folders: Sequence[Any] | None = None,
  path: Any,
  title: str | None = None,
) -> pathlib.Path:
  """One report of one or several runs, from results alone: no computation.

  >>> render([json.loads(a.read_text()), json.loads(b.read_text())],
  ...        path="comparison.html")                        # doctest: +SKIP

  Args:
    results: dictionaries of ``evaluation.SCHEMA``, as in ``results.json``.
    histories: for each result the rows of its ``metrics.jsonl``, or None.
    folders: for each result the folder of its ``results.json`` and
      ``examples.csv``, which the page then names as seen from itself; what
      ``robust-mm visualize`` has left there is shown.
    path: ends in ``.html`` for one self-contained file, else a folder for
      ``report.html`` and ``plots/*.png``.
    title: a heading; made from the names otherwise.

  Returns:
    The path.

  Raises:
    ValueError: no results, or as many histories or folders as there are not
      results; results of several tasks.
  """
  results = distinct(results)
  rows_lib.task(results)  # refuses several tasks on one page
  for name, given in (("histories", histories), ("folders", folders)):
    if given is not None and len(given) != len(results):
      raise ValueError(
        f"{name} must have one entry for each of the {len(results)} results, "
        f"got {len(given)}."
      )
  path = pathlib.Path(path)
  drawn = {
    name: style.png(figure)
    for name, figure in plots.figures(results, histories).items()
  }
  page = _page(results, histories, title or wording.title(results), drawn)
  page = templating.template("report.html.j2").render(
    **page,
    files=_places(results, folders, path),
    pictures=visuals.read([r["name"] for r in results], folders),
  )
  page = page.encode()
  if path.suffix == ".html":
    return _files.write_bytes(path, page)
  for name, content in drawn.items():
    _files.write_bytes(path / PLOTS_FOLDER / f"{name}.png", content)
  _files.write_bytes(path / REPORT_FILE, page)
  return path


def _page(results, histories, title: str, drawn: dict) -> dict:
  """What the template is filled with."""
  if rows_lib.task(results) != _tasks.CLASSIFICATION:
    return pages.page(results, histories, title, drawn)
  return {
    "title": title,
    "notes": texts.NOTES,
    "summary": wording.summary(results),
    "headlines": wording.headlines(results),
    "runs": [wording.run(result) for result in results],
    "table": wording.table_rows(results),
    "names": [result["name"] for result in results],
    "checks": [(r["name"], check) for r in results for check in r["checks"]],
    "warnings": wording.warnings(results),
    "figures": [
      {
        "title": texts.TITLES[name],
        "text": texts.caption(name, results),
        "settings": captions.settings(name, results),
        "alternative": captions.alternative(name, results, histories),
        "data": base64.b64encode(content).decode(),
      }
      for name, content in drawn.items()
    ],
    "details": [details.details(result) for result in results],
    "glossary": texts.glossary(results),
  }


def _places(results, folders, path: pathlib.Path) -> dict:
  """Where the files lie that a reader of the page may want."""
  whole = path.suffix != ".html"
  home = path if whole else path.parent
  text = f"Its figures also lie in {PLOTS_FOLDER}/ beside it. " if whole else ""
  what = (
    f"{RESULTS_FILE} (every curve) and {EXAMPLES_FILE} (a row for each test "
    "example)"
  )
  if folders is None:
    text += f"A report that is saved into a folder comes with {what}."
    return {"text": text, "folders": []}
  text += f"{what} of each run lie in these folders, seen from this page:"
  seen = [os.path.relpath(folder, home) for folder in folders]
  shown = ["its own folder" if place == "." else place for place in seen]
  names = [result["name"] for result in results]
  return {"text": text, "folders": list(zip(names, shown))}


def table(results: Sequence[dict], *, width: int | None = None) -> str:
  """The main numbers of all runs as one table of text, a column a run.

  Certified and estimated numbers stand in rows of their own; a dash means
  that the run has no such number.

  Args:
    results: dictionaries of ``evaluation.SCHEMA``.
    width: characters of a line; runs that would not fit follow in a table
      below. None for lines of any length.
  """
  results = distinct(results)
  classes = rows_lib.task(results) == _tasks.CLASSIFICATION
  rows = (wording if classes else pages).table_rows(results)
  head = "accuracy" if classes else pages.head(results)
  columns = [[head, *[row["label"] for row in rows]]]
  columns += [
    [result["name"], *[row["values"][index] for row in rows]]
    for index, result in enumerate(results)
  ]
  blocks, sizes = [], dict.fromkeys(map(wording.size_words, results))
  if not classes:
    sizes = {}
  groups = _fitting([max(map(len, column)) for column in columns], width)
  for group in groups:
    lines = list(zip(columns[0], *[columns[i] for i in group]))
    if len(groups) > 1:
      # Rows of the runs in other blocks only.
      lines = [line for line in lines if set(line[1:]) != {"-"}]
    blocks.append(_block(lines))
  return "\n\n".join([*blocks, *[f"sizes: {words}" for words in sizes]])


def _fitting(widths: Sequence[int], width: int | None) -> list[list[int]]:
  """Columns 1, 2, ... in groups that fit beside column 0; at least one each."""
  groups, used = [], 0
  for index in range(1, len(widths)):
    needed = widths[index] + 2
    if not groups or (width is not None and used + needed > width):
      groups.append([])
      used = widths[0]
    groups[-1].append(index)
    used += needed
  return groups


def _block(lines: Sequence[Sequence[str]]) -> str:
  widths = [max(map(len, column)) for column in zip(*lines)]
  written = [
    "  ".join(
      [label.ljust(widths[0])]
      + [cell.rjust(size) for cell, size in zip(cells, widths[1:])]
    )
    for label, *cells in lines
  ]
  return "\n".join([written[0], "-" * len(written[0]), *written[1:]])


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
