"""What a report says in words, for a reader who never saw the project.

A number from a sound bound is *certified*; one from estimated constants is
*estimated*, in every sentence and column, and the two are never merged.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

GROUPS = (
  "clean",
  "missing",
  "attacked joint",
  "certified joint",
  "estimated joint",
  "attacked single",
  "certified single",
  "estimated single",
)


def title(results: Sequence[dict]) -> str:
  """A heading from the names and the data set."""
  names = " and ".join(result["name"] for result in results)
  data = results[0]["dataset"]
  return f"Robustness of {names}" + (f" on {data}" if data else "")


def percent(share: float | None) -> str:
  """``0.9833`` -> ``"98.3 %"``; a dash for None."""
  return "-" if share is None else f"{100 * share:.1f} %"


def kind_word(row: Mapping) -> str:
  """``certified`` for a sound row, else ``estimated``."""
  return "certified" if row["sound"] else "estimated"


def where(names: Sequence[str], result: Mapping) -> str:
  """``joint``, or ``only left`` for one modality alone."""
  if sorted(names) == sorted(result["settings"]["modalities"]):
    return "joint"
  return f"only {'+'.join(names)}"


def grid(result: Mapping, names: Sequence[str]) -> list[float]:
  """Radii to list: those attacked, else four along the certified curve."""
  names = sorted(names)
  attacked = {
    row["radius"]
    for row in result["attacked"]
    if sorted(row["modalities"]) == names
  }
  if attacked:
    return sorted(attacked)
  curve = sorted(
    row["radius"]
    for row in result["certified"]
    if sorted(row["modalities"]) == names
  )
  return curve[:: max(1, (len(curve) - 1) // 4)][1:]


def shown(result: Mapping, names: Sequence[str]) -> list[float]:
  """Of :func:`grid` the ends and the middle; of one modality the middle."""
  radii = grid(result, names)
  if not radii:
    return []
  middle = radii[len(radii) // 2]
  if where(names, result) != "joint":
    return [middle]
  return sorted({radii[0], middle, radii[-1]})


def joint_first(rows: Sequence[Mapping]) -> list[Mapping]:
  """Rows of many modalities before rows of one, else as they are."""
  return sorted(rows, key=lambda row: -len(row["modalities"]))


def listed(result: Mapping) -> list[dict]:
  """The certified or estimated rows at the radii of :func:`grid`."""
  return [
    row
    for row in result["certified"]
    if row["radius"] in grid(result, row["modalities"])
  ]


def table_rows(results: Sequence[dict]) -> list[dict]:
  """``[{"group", "label", "values"}]``: a value a run, as text.

  At most three radii of a joint curve and one of a single modality.
  """
  cells = {}
  for index, result in enumerate(results):
    for group, label, value in _cells(result):
      row = cells.setdefault((group, label), ["-"] * len(results))
      row[index] = "-" if value is None else f"{value:.4f}"
  ordered = sorted(cells.items(), key=lambda item: GROUPS.index(item[0][0]))
  return [
    {"group": group, "label": label, "values": values}
    for (group, label), values in ordered
  ]


def _cells(result: Mapping):
  yield "clean", "clean", result["clean"]["accuracy"]
  every = "+".join(sorted(result["settings"]["modalities"]))
  for name, row in result["subsets"].items():
    if name != every:
      yield "missing", f"only {name} present", row["accuracy"]
  rows = [*result["attacked"], *result["certified"]]
  for row in rows:
    if row["radius"] not in shown(result, row["modalities"]):
      continue
    part = where(row["modalities"], result)
    group = "attacked" if "attack" in row else kind_word(row)
    how = f" (l{row['norm']})"
    if "attack" in row:
      how = f" ({row['attack']} l{row['norm']})"
    place = "joint" if part == "joint" else "single"
    label = f"{group}{how}, {part}, {row['radius']:g}"
    yield f"{group} {place}", label, row["accuracy"]


def summary(results: Sequence[dict]) -> list[str]:
  """A few sentences that say the main thing of every run."""
  return [_sentence(result) for result in results]


def _sentence(result: Mapping) -> str:
  text = (
    f"The model “{result['name']}” is right on "
    f"{percent(result['clean']['accuracy'])} of "
    f"{result['clean']['num_examples']} test examples."
  )
  joint = [
    row
    for row in result["attacked"]
    if where(row["modalities"], result) == "joint"
  ]
  if joint:
    row = joint[len(joint) // 2]
    text += (
      f" After an attack on all modalities of size {row['radius']:g} "
      f"({size_words(result)}) {percent(row['accuracy'])} are still right."
    )
  bound = [
    row for row in listed(result) if where(row["modalities"], result) == "joint"
  ]
  if bound:
    row = min(
      bound,
      key=lambda r: abs(r["radius"] - bound[len(bound) // 2]["radius"]),
    )
    share, radius = percent(row["accuracy"]), f"{row['radius']:g}"
    if row["sound"]:
      text += f" It is proven that at least {share} stay right at {radius}."
    else:
      text += (
        f" An estimate says {share} at {radius}; it is estimated, not proven."
      )
  alone = {
    name: row["accuracy"]
    for name, row in result["subsets"].items()
    if "+" not in name and row["accuracy"] is not None
  }
  if len(alone) > 1:
    best, worst = max(alone, key=alone.get), min(alone, key=alone.get)
    text += (
      f" With one modality only it reaches {percent(alone[worst])} ({worst}) "
      f"to {percent(alone[best])} ({best})."
    )
  return text


def size_words(result: Mapping) -> str:
  """How sizes are measured, in a few words."""
  norm = result["settings"]["norm"]
  measure = "Euclidean" if norm == 2 else "largest-entry"
  if all(size == 1.0 for size in result["units"].values()):
    return f"{measure} norm of raw input values"
  return f"{measure} norm in units of each modality's typical size"


def warnings(results: Sequence[dict]) -> list[str]:
  """What a reader must know before comparing or believing the numbers."""
  found = [
    f"{result['name']}: {check['message']}"
    for result in results
    for check in result["checks"]
    if check["required"] and not check["passed"]
  ]
  first = results[0]
  for key, what in (("units", "units"), ("dataset", "data sets")):
    if any(result[key] != first[key] for result in results):
      found.append(
        f"The runs were measured in different {what}: their radii cannot be "
        "compared."
      )
  if any(
    result["settings"]["norm"] != first["settings"]["norm"]
    for result in results
  ):
    found.append(
      "The runs were measured in different norms: their radii cannot be "
      "compared."
    )
  return found


def run(result: Mapping) -> list[tuple[str, str]]:
  """Name and value of the facts about one run."""
  settings = result["settings"]
  shapes = ", ".join(
    f"{name} {'x'.join(map(str, shape)) or 'scalar'}"
    for name, shape in settings["input_shapes"].items()
  )
  examples = result["examples"]
  tested = f"{examples['num_examples']}"
  if examples["num_left_out"]:
    tested += (
      f", of which {examples['num_left_out']} have no modality and are left out"
    )
  return [
    ("model", result["name"]),
    ("training recipe", result["recipe"] or "not stated"),
    ("data", result["dataset"] or "not stated"),
    ("modalities (input size)", shapes),
    ("classes", str(settings["num_classes"])),
    ("test examples", tested),
    ("seed", str(result["seed"])),
    ("sizes measured in", size_words(result)),
    ("bound", bound_words(result)),
  ]


def bound_words(result: Mapping) -> str:
  """Certified, estimated or none, and why."""
  certificate = settings_of(result, "certificate")
  if certificate["source"] is None:
    return f"none. {certificate['reason']}"
  word = kind_word(certificate)
  return f"{word} (source: {certificate['source']}). {certificate['reason']}"


def settings_of(result: Mapping, key: str) -> Any:
  """One entry of the settings."""
  return result["settings"][key]


def settings_line(values: Mapping) -> str:
  """``num_steps 50, loss margin``: settings on one line."""
  return ", ".join(
    f"{key} {_plain(value)}"
    for key, value in values.items()
    if key != "name" and value is not None
  )


def _plain(value) -> str:
  if isinstance(value, Mapping):
    return "{" + ", ".join(f"{k}: {_plain(v)}" for k, v in value.items()) + "}"
  if isinstance(value, (list, tuple)):
    return "[" + ", ".join(_plain(item) for item in value) + "]"
  return f"{value:g}" if isinstance(value, float) else str(value)


def details(result: Mapping) -> dict:
  """Every number of one run in tables, with the settings it was made with."""
  settings = result["settings"]
  tables = [_clean_table(result)]
  tables += [_attack_table(result, attack) for attack in settings["attacks"]]
  if result["certified"]:
    tables.append(_bound_table(result))
  return {
    "name": result["name"],
    "tables": tables,
    "units": result["units"],
    "settings": [
      (key, _plain(value))
      for key, value in settings.items()
      if key not in ("attacks", "certificate", "input_shapes")
    ],
    "timing": [
      (key.replace("_", " "), f"{value:.4g}")
      for key, value in result["timing"].items()
      if value is not None
    ],
  }


def _clean_table(result: Mapping) -> dict:
  every = "+".join(sorted(result["settings"]["modalities"]))
  parts = [
    (f"only {name} present", "", "0", row)
    for name, row in result["subsets"].items()
    if name != every
  ]
  return {
    "title": "Clean and with missing modalities",
    "note": "No attack. Absent modalities are marked absent.",
    "rows": [("all present", "", "0", result["clean"]), *parts],
  }


def _attack_table(result: Mapping, attack: str) -> dict:
  note = settings_line(result["settings"]["attacks"][attack])
  if result["settings"]["survivors_only"]:
    note += (
      "; an example broken by a smaller attack inside the same budget counts "
      "as broken"
    )
  rows = [
    (where(row["modalities"], result), f"l{row['norm']}", row["radius"], row)
    for row in joint_first(result["attacked"])
    if row["attack"] == attack
  ]
  rows = [(part, norm, f"{radius:g}", row) for part, norm, radius, row in rows]
  return {"title": f"Attacked: {attack}", "note": note, "rows": rows}


def _bound_table(result: Mapping) -> dict:
  word = kind_word(result["settings"]["certificate"])
  norm = result["settings"]["certificate"]["norm"]
  note = f"{bound_words(result)} Norm l{norm}."
  if word == "estimated":
    note += " Estimated numbers are no guarantee."
  rows = [
    (
      where(row["modalities"], result),
      f"l{row['norm']}",
      f"{row['radius']:g}",
      row,
    )
    for row in listed(result)
  ]
  return {"title": word.capitalize(), "note": note, "rows": rows}
