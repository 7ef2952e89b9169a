"""What a report of a regression says: errors in words and tables."""

import base64
from collections.abc import Mapping
from collections.abc import Sequence

from robust_mm.evaluation import details
from robust_mm.evaluation import rows as rows_lib
from robust_mm.evaluation import texts
from robust_mm.evaluation import wording

WORDS = {
  "mae": "MAE",
  "correlation": "correlation",
  "accuracy_7": "Acc7",
  "accuracy_2_nonzero": "Acc2 (non-zero labels)",
  "f1_2_nonzero": "F1 (non-zero labels)",
  "accuracy_2_has_zero": "Acc2 (zero is positive)",
  "f1_2_has_zero": "F1 (zero is positive)",
}
_NOTES = {
  "headlines": "Errors on the test examples, in units of the label.",
  "numbers": (
    "MAE is the mean absolute error, in units of the label, and smaller is "
    "better; of the others larger is. A dash means not measured. All numbers "
    "and 95\N{NO-BREAK SPACE}% intervals, with the settings of each,"
  ),
}
_TITLES = {
  "subsets": "Error with missing modalities",
  "missing": "Error against the missing rate",
  "training": texts.TITLES["training"],
}
_CAPTIONS = {
  "subsets": (
    "Each bar is the mean absolute error when only the named modalities are "
    "available; the others are marked as absent and no value of them is used. "
    "Thin lines are 95 % intervals."
  ),
  "missing": (
    "The line is the mean absolute error over several masks, which are the "
    "same for every model; the band reaches from the lowest to the highest."
  ),
  "training": (
    "First, what each phase of each recipe minimised, in deviations of the "
    "training labels. The panels on validation data can be compared between "
    "runs."
  ),
}
_TERMS = {
  "modality": "One of the inputs the model combines, such as vitals.",
  "MAE": (
    "Mean absolute error: how far predictions are from the labels on average, "
    "in units of the label."
  ),
  "correlation": (
    "Pearson's, of predictions and labels; there is none (nan) where all "
    "predictions are the same."
  ),
  "best constant": (
    "The MAE of always saying the median of the test labels, which no model "
    "knows: what does not beat it has learnt nothing."
  ),
}
_AFFECT = (
  "Of sentiment in [-3, 3]. Acc7: rounded to seven classes. Acc2 and F1: two "
  "classes, of the labels that are not zero, above zero or not; or of all, "
  "below zero or not. They mean something for such labels only."
)
_INTERVAL = (
  "By the standard error of the mean: what the MAE could be on other examples "
  "of the same kind."
)
_RECIPES = {
  "joint": "L1 on all modalities together, the usual baseline",
  "joint-dropout": "L1, with a random subset of modalities for each example",
  "joint-noise": "L1 on noisy inputs",
  "modal_immune": (
    "L1 with and without one modality, whose embeddings are collapsed"
  ),
}


def page(results, histories, title: str, drawn: Mapping[str, bytes]) -> dict:
  """What the template of a report is filled with."""
  del histories  # the curves of training are in a figure
  return {
    "title": title,
    "notes": _NOTES,
    "summary": [_sentence(result) for result in results],
    "headlines": _headlines(results),
    "runs": [_run(result) for result in results],
    "table": table_rows(results),
    "names": [result["name"] for result in results],
    "checks": [(r["name"], check) for r in results for check in r["checks"]],
    "warnings": _warnings(results),
    "figures": [
      {
        "title": _TITLES[name],
        "text": f"{texts.lost(results)} {_CAPTIONS[name]}"
        if name == "missing"
        else _CAPTIONS[name],
        "settings": [],
        "alternative": _TITLES[name],
        "data": base64.b64encode(content).decode(),
      }
      for name, content in drawn.items()
    ],
    "details": [_details(result) for result in results],
    "glossary": _glossary(results),
  }


def number(value) -> str:
  """``45.26``; a dash for None, and NaN as JSON has it."""
  if value is None:
    return "-"
  return value if isinstance(value, str) else f"{value:#.4g}"


def table_rows(results: Sequence[dict]) -> list[dict]:
  """The errors side by side, as ``wording.table_rows`` has accuracies."""
  cells = {}
  for index, result in enumerate(results):
    for row, value in _cells(result):
      cells.setdefault(row, ["-"] * len(results))[index] = number(value)
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


def _cells(result: Mapping):
  """``((group, kind, inputs), value)``; groups begin with their place."""
  clean = result["clean"]
  for name in _measured(clean):
    yield ("0 clean", WORDS[name], "all present"), clean[name]
  best = clean.get("best_constant_mae")
  yield ("0 clean", WORDS["mae"], "best constant"), best
  for subset, row in _parts(result):
    yield ("1 subsets", WORDS["mae"], f"only {subset} present"), row["mae"]
  for row in (result["missing"] or {"rows": []})["rows"]:
    where = f"missing rate {row['rate']:g}"
    yield ("2 missing", WORDS["mae"], where), row["mae"]
  if result["corrupted"]:
    where = "corrupted, mean over kinds"
    yield ("3 corrupted", WORDS["mae"], where), result["corrupted"]["score"]


def _measured(row: Mapping) -> list[str]:
  return [name for name in WORDS if name in row]


def _parts(result: Mapping) -> list[tuple[str, Mapping]]:
  every = "+".join(sorted(result["settings"]["modalities"]))
  return [(n, row) for n, row in result["subsets"].items() if n != every]


def _alone(result: Mapping) -> dict[str, float]:
  found = {
    name: rows_lib.number(result["subsets"].get(name))
    for name in result["settings"]["modalities"]
  }
  return {name: value for name, value in found.items() if value is not None}


def _sentence(result: Mapping) -> str:
  clean = result["clean"]
  text = (
    f"“{result['name']}” is off by {number(clean['mae'])} on average on "
    f"{clean['num_examples']} test examples with unchanged inputs (correlation "
    f"{number(clean['correlation'])}); the best constant answer would be off "
    f"by {number(clean['best_constant_mae'])}."
  )
  alone = _alone(result)
  if len(alone) > 1:
    low, high = min(alone, key=alone.get), max(alone, key=alone.get)
    text += (
      f" With one modality only it is off by {number(alone[low])} ({low}) to "
      f"{number(alone[high])} ({high})."
    )
  return text


def _headlines(results) -> dict:
  rows = []
  for result in results:
    clean, alone = result["clean"], _alone(result)
    worst = "-"
    if len(alone) > 1:
      name = max(alone, key=alone.get)
      worst = f"{number(alone[name])} ({name})"
    rows.append(
      [
        number(clean["mae"]),
        number(clean["correlation"]),
        number(clean["best_constant_mae"]),
        worst,
      ]
    )
  columns = ["MAE", "correlation", "best constant"]
  return {"columns": [*columns, "one modality only, at worst"], "rows": rows}


def _run(result: Mapping) -> list[tuple[str, str]]:
  skipped = ("training recipe", "classes", "sizes measured in", "attack")
  facts = [
    (name, value)
    for name, value in wording.run(result)
    if name not in (*skipped, "bound")
  ]
  recipe = result["recipe"] or "not stated"
  if recipe in _RECIPES:
    recipe = f"{recipe}: {_RECIPES[recipe]}"
  return [("training recipe", recipe), ("predicts", "a number"), *facts]


def _warnings(results) -> list[str]:
  found = [
    f"{result['name']}: {check['message']}"
    for result in results
    for check in result["checks"]
    if not check["passed"]
  ]
  if len({result["dataset"] for result in results}) > 1:
    found.append(
      "The runs were measured on different data sets: their errors cannot be "
      "compared."
    )
  return found


def _glossary(results) -> list[tuple[str, str]]:
  terms = list(_TERMS.items())
  if any("accuracy_7" in result["clean"] for result in results):
    terms.append(("Acc7, Acc2, F1", _AFFECT))
  return [*terms, ("95 % interval", _INTERVAL)]


def _details(result: Mapping) -> dict:
  tables = [_clean(result)]
  if result["missing"]:
    tables.append(_missing(result["missing"]))
  if result["corrupted"]:
    tables.append(_corrupted(result))
  tables += [details.settings(result), details.timing(result)]
  return {"name": result["name"], "tables": tables}


def _clean(result: Mapping) -> dict:
  names = _measured(result["clean"])
  rows = [("all present", result["clean"])]
  rows += [(f"only {name} present", row) for name, row in _parts(result)]
  return details.table(
    "Clean and with missing modalities",
    "Absent modalities are marked absent.",
    [
      ("modalities", False),
      *((WORDS[name], True) for name in names),
      ("95 % interval of the MAE", True),
      ("examples", True),
    ],
    [
      (
        what,
        *(number(row[name]) for name in names),
        " to ".join(map(number, row["interval"] or ())) or "-",
        str(row["num_examples"]),
      )
      for what, row in rows
    ],
  )


def _missing(found: Mapping) -> dict:
  names = _measured(found["rows"][0])
  seeds = ", ".join(map(str, found["seeds"]))
  return details.table(
    "Missing rates",
    f"{texts.LOST[found['protocol']]}; means over "
    f"the masks of the seeds {seeds}, which are the same for every model.",
    [
      ("rate", True),
      ("achieved", True),
      *((WORDS[name], True) for name in names),
      ("lowest MAE", True),
      ("highest MAE", True),
    ],
    [
      (
        f"{row['rate']:g}",
        f"{row['achieved']:.3f}",
        *(number(row[name]) for name in names),
        number(min(row["by_seed"])),
        number(max(row["by_seed"])),
      )
      for row in found["rows"]
    ],
  )


def _corrupted(result: Mapping) -> dict:
  names = _measured(result["corrupted"]["rows"][0])
  return details.table(
    "Corrupted",
    f"Mean MAE {number(result['corrupted']['score'])}: the mean over kinds of "
    "the mean over severities and modalities.",
    [
      ("kind", False),
      ("modalities", False),
      ("severity", True),
      *((WORDS[name], True) for name in names),
    ],
    [
      (
        row["kind"].replace("_", " "),
        wording.where(row["modalities"], result),
        str(row["severity"]),
        *(number(row[name]) for name in names),
      )
      for row in result["corrupted"]["rows"]
    ],
  )
