"""Every number of a run in tables, each with the settings it was made with."""

from collections.abc import Mapping
from collections.abc import Sequence

from robust_mm.evaluation import rows as rows_lib
from robust_mm.evaluation import tables as tables_lib
from robust_mm.evaluation import texts
from robust_mm.evaluation import wording

_SECONDS = {
  "predict_seconds": "clean and missing modalities",
  "attack_seconds": "attacks",
  "certify_seconds": "certificates",
  "smoothing_seconds": "smoothed certificates",
  "table_seconds": "certificates: tables of constants",
  "tightness_seconds": "attacks at multiples of the radius",
  "masking_seconds": "checks of the gradients",
  "shift_seconds": "missing rates and corruptions",
  "total_seconds": "everything",
}
_CHUNKS = {
  "forward_chunk_seconds": "forward pass, compiled, one batch",
  "certify_chunk_seconds": "certify, compiled, one batch",
}


def details(result: Mapping) -> dict:
  """All tables of one run.

  Returns:
    ``{"name", "tables": [{"title", "note", "columns", "rows"}]}``; a column is
    ``(heading, whether it holds numbers)``, a row a tuple of texts.
  """
  tables = [_clean(result)]
  # Results of earlier versions have none of these.
  if result.get("contributions"):
    tables.append(_contributions(result["contributions"]))
  if result.get("missing"):
    tables.append(_missing(result["missing"]))
  if result.get("corrupted"):
    tables.append(_corrupted(result))
  for name in result["settings"]["attacks"]:
    tables.append(_attack(result, name))
    if any(row.get("broken_by") for row in _rows_of(result, name)):
      tables.append(_members(result, name))
  if result["certified"]:
    tables += [_bound(result), _certificate(result)]
  if result.get("smoothed"):
    tables.append(_smoothed(result))
  if result["tightness"]:
    tables.append(_tightness(result))
  if result.get("captions"):
    tables.append(tables_lib.captions(result["captions"]))
  if result.get("masking"):
    tables += tables_lib.masking(result["masking"])
  if result["vulnerability"]:
    tables.append(_vulnerability(result))
  tables += [_units(result), settings(result), timing(result)]
  return {"name": result["name"], "tables": tables}


def _accuracies(result, title, note, rows: Sequence[tuple]) -> dict:
  """A table of ``(what, row)`` pairs; raw sizes only where units differ."""
  raw = not rows_lib.in_raw_units([result])
  columns = [("modalities", False), ("size", True)]
  columns += [("raw size", True)] if raw else []
  columns += [
    ("accuracy", True),
    ("95 % interval", True),
    ("examples", True),
  ]
  cells = []
  for what, row in rows:
    size = f"l{row['norm']} {row['radius']:g}" if "radius" in row else "0"
    start = [what, size, *([_raw_size(row, result)] if raw else [])]
    cells.append((*start, *_measured(row)))
  return tables_lib.table(title, note, columns, cells)


def _raw_size(row: Mapping, result: Mapping) -> str:
  if "radius" not in row:
    return "0"
  if len(row["modalities"]) > 1:
    return "-"
  unit = result["units"][row["modalities"][0]]
  return f"{row['radius'] * unit:.4g}"


def _measured(row: Mapping) -> tuple[str, str, str]:
  if row["accuracy"] is None:
    return "-", "-", str(row["num_examples"])
  low, high = row["interval"]
  return (
    f"{row['accuracy']:.4f}",
    f"{low:.3f} to {high:.3f}",
    str(row["num_examples"]),
  )


def _clean(result: Mapping) -> dict:
  every = "+".join(sorted(result["settings"]["modalities"]))
  parts = [
    (f"only {name} present", row)
    for name, row in result["subsets"].items()
    if name != every
  ]
  return _accuracies(
    result,
    "Clean and with missing modalities",
    "No attack. Absent modalities are marked absent.",
    [("all present", result["clean"]), *parts],
  )


def _contributions(found: Mapping) -> dict:
  return tables_lib.table(
    "Contribution of each modality",
    "Shapley values of the clean accuracies above: the mean gain from adding a "
    "modality, over all orders. They sum to the accuracy of all less that of "
    f"the commonest class, {found['empty']:.4f}.",
    [("modality", False), ("contribution", True)],
    [(name, f"{value:.4f}") for name, value in found["values"].items()],
  )


def _missing(found: Mapping) -> dict:
  columns = [("rate", True), ("achieved", True), ("accuracy", True)]
  columns += [("lowest seed", True), ("highest seed", True), ("examples", True)]
  return tables_lib.table(
    "Missing rates",
    f"{texts.LOST[found['protocol']]}; means over "
    f"the masks of the seeds {', '.join(map(str, found['seeds']))}, which are "
    "the same for every model.",
    columns,
    [
      (
        f"{row['rate']:g}",
        f"{row['achieved']:.3f}",
        f"{row['accuracy']:.4f}",
        f"{min(row['by_seed']):.4f}",
        f"{max(row['by_seed']):.4f}",
        str(row["num_examples"]),
      )
      for row in found["rows"]
    ],
  )


def _corrupted(result: Mapping) -> dict:
  found = result["corrupted"]
  severities = sorted({row["severity"] for row in found["rows"]})
  lines = {}
  for row in found["rows"]:
    place = row["kind"], wording.where(row["modalities"], result)
    lines.setdefault(place, {})[row["severity"]] = f"{row['accuracy']:.4f}"
  return tables_lib.table(
    "Corrupted",
    f"Accuracy by severity. Mean corruption score {found['score']:.4f}: the "
    "mean over kinds of the mean over severities and modalities.",
    [
      ("kind", False),
      ("modalities", False),
      *((f"severity {severity}", True) for severity in severities),
      ("mean of the kind", True),
    ],
    [
      (
        kind.replace("_", " "),
        where,
        *(at.get(severity, "-") for severity in severities),
        f"{found['scores'][kind]:.4f}",
      )
      for (kind, where), at in lines.items()
    ],
  )


def _changed(rows: Sequence[Mapping], result: Mapping) -> list[tuple]:
  """Joint rows before those of one modality, else as they are."""
  ordered = sorted(rows, key=lambda row: -len(row["modalities"]))
  return [
    (f"{wording.where(row['modalities'], result)} changed", row)
    for row in ordered
  ]


def _attack(result: Mapping, name: str) -> dict:
  note = wording.settings_line(result["settings"]["attacks"][name])
  if result["settings"]["survivors_only"]:
    note += (
      "; an example broken by a smaller attack inside the same budget counts "
      "as broken"
    )
  rows = _changed(_rows_of(result, name), result)
  return _accuracies(result, f"Attacked: {name}", note, rows)


def _rows_of(result: Mapping, name: str) -> list[Mapping]:
  return [row for row in result["attacked"] if row["attack"] == name]


def _members(result: Mapping, name: str) -> dict:
  rows = _changed(_rows_of(result, name), result)
  members = list(rows[0][1]["broken_by"])
  return tables_lib.table(
    f"Members of {name}",
    "Examples broken by each member, on what those to its left have left.",
    [("modalities", False), ("size", True), *((m, True) for m in members)],
    [
      (
        what,
        f"l{row['norm']} {row['radius']:g}",
        *(str(row["broken_by"][member]) for member in members),
      )
      for what, row in rows
    ],
  )


def _bound(result: Mapping) -> dict:
  certificate = result["settings"]["certificate"]
  word = wording.kind_word(certificate)
  note = f"{wording.bound_words(result)} Norm l{certificate['norm']}."
  if word == "estimated":
    note += " Estimated numbers are no guarantee."
  rows = [
    row
    for row in result["certified"]
    if row["radius"] in rows_lib.grid(result, row["modalities"])
  ]
  return _accuracies(result, word.capitalize(), note, _changed(rows, result))


def _smoothed(result: Mapping) -> dict:
  found = result["smoothed"]
  note = (
    f"The smoothed classifier, {found['kind']} for each example; it abstains "
    f"on {wording.percent(found['abstained'])}. "
    f"{wording.settings_line(found['settings'])}. Sizes of norm l0 are numbers "
    "of modified elements."
  )
  rows = [("all present", found), *_changed(found["rows"], result)]
  return _accuracies(result, "Smoothed", note, rows)


def _certificate(result: Mapping) -> dict:
  settings, timing = result["settings"]["certificate"], result["timing"]
  word = wording.kind_word(settings)
  rows = [
    ("kind", word if word == "certified" else "estimated, no guarantee"),
    ("source", settings["source"]),
    ("asked for", wording.plain(settings["asked"])),
    ("norm", f"l{settings['norm']}"),
  ]
  if "slack" in settings:
    rows.append(
      ("slack for rounding", wording.settings_line(settings["slack"]))
    )
  forward, certify = (timing.get(key) for key in _CHUNKS)
  if forward and certify:
    rows.append(
      ("time of certify / of a forward pass", f"{certify / forward:.2f}")
    )
  return tables_lib.table(
    "What the bound rests on", "", [("", False), ("", False)], rows
  )


def _tightness(result: Mapping) -> dict:
  found = result["tightness"]
  attack = result["settings"]["attacks"][found["attack"]]
  rows = [
    (f"{factor:g}", f"{flipped:.4f}", str(found["num_examples"]))
    for factor, flipped in zip(found["factors"], found["flipped"])
  ]
  note = (
    f"Attack {found['attack']} on all modalities at a multiple of each "
    f"example's own {wording.kind_word(found)} radius "
    f"(l{found.get('norm', 2)}); {wording.settings_line(attack)}"
  )
  columns = [("multiple", True), ("flipped", True), ("examples", True)]
  return tables_lib.table(
    "Attacked at multiples of the radius", note, columns, rows
  )


def _vulnerability(result: Mapping) -> dict:
  word = wording.kind_word(result["settings"]["certificate"])
  return tables_lib.table(
    "Share of the squared sensitivity at the nearest other class",
    f"From the {word} constants, averaged over the test examples.",
    [("modality", False), ("share", True)],
    [(m, f"{share:.4f}") for m, share in result["vulnerability"].items()],
  )


def _units(result: Mapping) -> dict:
  return tables_lib.table(
    "Units",
    "The raw size of one unit.",
    [("modality", False), ("raw size", True)],
    [(name, f"{size:.5g}") for name, size in result["units"].items()],
  )


def settings(result: Mapping) -> dict:
  elsewhere = ("attacks", "certificate", "input_shapes", "mispair")
  rows = [
    (key.replace("_", " "), _unwrapped(value))
    for key, value in result["settings"].items()
    if key not in elsewhere
  ]
  return tables_lib.table("Settings", "", [("", False), ("", False)], rows)


def _unwrapped(value) -> str:
  text = wording.plain(value)
  return text[1:-1] if isinstance(value, (Mapping, list, tuple)) else text


def timing(result: Mapping) -> dict:
  timing = {
    key: value for key, value in result["timing"].items() if value is not None
  }
  rows = []
  for key, value in timing.items():
    if key in _CHUNKS:
      rows.append((_CHUNKS[key], f"{_short(1000 * value)} ms"))
    elif key == "peak_memory_mib":
      rows.append(("peak memory", f"{_short(value)} MiB"))
    else:
      word = _SECONDS.get(key, key.replace("_", " "))
      rows.append((word, f"{_short(value)} s"))
  return tables_lib.table(
    "Time and memory",
    "Seconds are with compilation.",
    [("", False), ("", True)],
    rows,
  )


def _short(value: float) -> str:
  return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
