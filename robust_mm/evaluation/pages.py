"""The report of a task without attacks: words and tables.

The words are in ``vocabulary``.
"""

import base64
from collections.abc import Mapping
from collections.abc import Sequence

from robust_mm.evaluation import details
from robust_mm.evaluation import rows as rows_lib
from robust_mm.evaluation import tables
from robust_mm.evaluation import texts
from robust_mm.evaluation import vocabulary
from robust_mm.evaluation import wording


def page(results, histories, title: str, drawn: Mapping[str, bytes]) -> dict:
  """What the template of a report is filled with."""
  del histories  # the curves of training are in a figure
  said = vocabulary.of(results)
  return {
    "title": title,
    "notes": said.notes,
    "summary": [_sentence(said, result) for result in results],
    "headlines": _headlines(said, results),
    "runs": [_run(said, result) for result in results],
    "table": table_rows(results),
    "names": [result["name"] for result in results],
    "checks": [(r["name"], check) for r in results for check in r["checks"]],
    "warnings": _warnings(said, results),
    "figures": [
      {
        "title": said.titles[name],
        "text": f"{texts.lost(results)} {said.captions[name]}"
        if name == "missing"
        else said.captions[name],
        "settings": [],
        "alternative": said.titles[name],
        "data": base64.b64encode(content).decode(),
      }
      for name, content in drawn.items()
    ],
    "details": [_details(said, result) for result in results],
    "glossary": _glossary(said, results),
  }


def head(results: Sequence[dict]) -> str:
  """What the table of text is of: ``error``."""
  return vocabulary.of(results).head


def table_rows(results: Sequence[dict]) -> list[dict]:
  """The numbers side by side, as ``wording.table_rows`` has accuracies."""
  cells, said = {}, vocabulary.of(results)
  for index, result in enumerate(results):
    for row, value in _cells(said, result):
      cells.setdefault(row, ["-"] * len(results))[index] = said.number(value)
  return [
    {
      "group": group,
      "kind": kind,
      "inputs": inputs,
      "size": "",
      "label": f"{kind}, {inputs}",
      "values": values,
    }
    for (group, kind, inputs), values in sorted(
      cells.items(), key=lambda item: item[0][0]
    )
  ]


def _cells(said: vocabulary.Vocabulary, result: Mapping):
  """``((group, kind, inputs), value)``; groups begin with their place."""
  clean, main, word = result["clean"], said.main, said.words[said.main]
  for name in said.measured(clean):
    yield ("0 clean", said.words[name], "all present"), clean[name]
  yield ("0 clean", word, said.constant), clean.get(said.constant_key)
  for subset, row in _parts(result):
    yield ("1 subsets", word, f"only {subset} present"), row[main]
  for row in (result["missing"] or {"rows": []})["rows"]:
    yield ("2 missing", word, f"missing rate {row['rate']:g}"), row[main]
  if result["corrupted"]:
    where = "corrupted, mean over kinds"
    yield ("3 corrupted", word, where), result["corrupted"]["score"]


def _parts(result: Mapping) -> list[tuple[str, Mapping]]:
  every = "+".join(sorted(result["settings"]["modalities"]))
  return [(n, row) for n, row in result["subsets"].items() if n != every]


def _alone(result: Mapping) -> dict[str, float]:
  found = {
    name: rows_lib.number(result["subsets"].get(name))
    for name in result["settings"]["modalities"]
  }
  return {name: value for name, value in found.items() if value is not None}


def _extremes(said: vocabulary.Vocabulary, result: Mapping):
  """``(best, worst)`` modality alone; None with fewer than two."""
  found = _alone(result)
  if len(found) < 2:
    return None
  order = sorted(found, key=found.get, reverse=not said.smaller_is_better)
  return tuple((name, found[name]) for name in (order[0], order[-1]))


def _sentence(said: vocabulary.Vocabulary, result: Mapping) -> str:
  text = said.sentence(result, said.number)
  extremes = _extremes(said, result)
  if extremes:
    (best, at_best), (worst, at_worst) = extremes
    text += (
      f" With one modality only {said.phrase} {said.number(at_best)} ({best}) "
      f"to {said.number(at_worst)} ({worst})."
    )
  return text


def _headlines(said: vocabulary.Vocabulary, results) -> dict:
  rows = []
  for result in results:
    clean, extremes = result["clean"], _extremes(said, result)
    worst = "-"
    if extremes:
      name, value = extremes[1]
      worst = f"{said.number(value)} ({name})"
    shown = (*said.headline, said.constant_key)
    rows.append([*(said.number(clean[name]) for name in shown), worst])
  columns = [*(said.words[name] for name in said.headline), said.constant]
  return {"columns": [*columns, "one modality only, at worst"], "rows": rows}


def _run(said: vocabulary.Vocabulary, result: Mapping) -> list:
  facts = [
    (name, value)
    for name, value in wording.run(result)
    if name not in said.not_said
  ]
  recipe = result["recipe"] or "not stated"
  if recipe in said.recipes:
    recipe = f"{recipe}: {said.recipes[recipe]}"
  return [("training recipe", recipe), ("predicts", said.predicts), *facts]


def _warnings(said: vocabulary.Vocabulary, results) -> list[str]:
  found = [
    f"{result['name']}: {check['message']}"
    for result in results
    for check in result["checks"]
    if not check["passed"]
  ]
  if len({result["dataset"] for result in results}) > 1:
    found.append(
      "The runs were measured on different data sets: their "
      f"{said.plural} cannot be compared."
    )
  return found


def _glossary(said: vocabulary.Vocabulary, results) -> list[tuple[str, str]]:
  terms = list(said.terms.items())
  for key, more in said.optional_terms.items():
    if any(key in result["clean"] for result in results):
      terms += more.items()
  return [*terms, *said.last_terms.items()]


def _details(said: vocabulary.Vocabulary, result: Mapping) -> dict:
  tables = [_clean(said, result)]
  if result["missing"]:
    tables.append(_missing(said, result["missing"]))
  if result["corrupted"]:
    tables.append(_corrupted(said, result))
  tables += [details.settings(result), details.timing(result)]
  return {"name": result["name"], "tables": tables}


def _heads(said: vocabulary.Vocabulary, names) -> list[tuple[str, bool]]:
  return [(said.words[name], True) for name in names]


def _values(said: vocabulary.Vocabulary, names, row: Mapping) -> list[str]:
  return [said.number(row[name]) for name in names]


def _intervals(said: vocabulary.Vocabulary, row, shown) -> list[str]:
  text = " to ".join(map(said.number, row["interval"] or ())) or "-"
  return [text for _ in shown]


def _clean(said: vocabulary.Vocabulary, result: Mapping) -> dict:
  names = said.measured(result["clean"])
  rows = [("all present", result["clean"])]
  rows += [(f"only {name} present", row) for name, row in _parts(result)]
  interval = []
  if any(row["interval"] for _, row in rows):
    interval = [(f"95 % interval of the {said.words[said.main]}", True)]
  return tables.table(
    "Clean and with missing modalities",
    "Absent modalities are marked absent.",
    [
      ("modalities", False),
      *_heads(said, names),
      *interval,
      ("examples", True),
    ],
    [
      (
        what,
        *_values(said, names, row),
        *_intervals(said, row, interval),
        str(row["num_examples"]),
      )
      for what, row in rows
    ],
  )


def _missing(said: vocabulary.Vocabulary, found: Mapping) -> dict:
  names, word = said.measured(found["rows"][0]), said.words[said.main]
  seeds = ", ".join(map(str, found["seeds"]))
  return tables.table(
    "Missing rates",
    f"{texts.LOST[found['protocol']]}; means over "
    f"the masks of the seeds {seeds}, which are the same for every model.",
    [
      ("rate", True),
      ("achieved", True),
      *_heads(said, names),
      (f"lowest {word}", True),
      (f"highest {word}", True),
    ],
    [
      (
        f"{row['rate']:g}",
        f"{row['achieved']:.3f}",
        *_values(said, names, row),
        said.number(min(row["by_seed"])),
        said.number(max(row["by_seed"])),
      )
      for row in found["rows"]
    ],
  )


def _corrupted(said: vocabulary.Vocabulary, result: Mapping) -> dict:
  names = said.measured(result["corrupted"]["rows"][0])
  return tables.table(
    "Corrupted",
    f"Mean {said.words[said.main]} "
    f"{said.number(result['corrupted']['score'])}: the mean over kinds of "
    "the mean over severities and modalities.",
    [
      ("kind", False),
      ("modalities", False),
      ("severity", True),
      *_heads(said, names),
    ],
    [
      (
        row["kind"].replace("_", " "),
        wording.where(row["modalities"], result),
        str(row["severity"]),
        *_values(said, names, row),
      )
      for row in result["corrupted"]["rows"]
    ],
  )
