"""What a report says in words, for a reader who never saw the project.

A number from a sound bound is *certified*; one from estimated constants is
*estimated*, in every sentence and column, and the two are never merged.
"""

from collections.abc import Mapping
from collections.abc import Sequence

from robust_mm import _validate
from robust_mm.evaluation import rows as rows_lib
from robust_mm.evaluation import texts

GROUPS = (
  "clean",
  "missing",
  "corrupted",
  "attacked all",
  "certified all",
  "estimated all",
  "attacked one",
  "certified one",
  "estimated one",
  "smoothed",
)
_NO_BREAK = "\N{NO-BREAK SPACE}"


def title(results: Sequence[dict]) -> str:
  """A heading from the names and the data sets."""
  names = _listing([result["name"] for result in results])
  data = dict.fromkeys(r["dataset"] for r in results if r["dataset"])
  return f"Robustness of {names}" + (f" on {_listing(data)}" if data else "")


def _listing(words) -> str:
  *first, last = words
  return f"{', '.join(first)} and {last}" if first else last


def percent(share: float | None) -> str:
  """``0.9833`` -> ``"98.3 %"`` that no line break parts; a dash for None."""
  return "-" if share is None else f"{100 * share:.1f}{_NO_BREAK}%"


def kind_word(row: Mapping) -> str:
  """``certified`` for a sound row, else ``estimated``."""
  return "certified" if row["sound"] else "estimated"


def where(names: Sequence[str], result: Mapping) -> str:
  """``all``, or ``only left`` for one modality alone."""
  if sorted(names) == sorted(result["settings"]["modalities"]):
    return "all"
  return f"only {'+'.join(sorted(names))}"


def attack_words(result: Mapping, name: str) -> str:
  """An attack and what it cost: ``pgd (50 steps, 5 restarts)``."""
  settings = result["settings"]["attacks"][name]
  spent = [
    _validate.counted(settings[key], word)
    for key, word in (("num_steps", "step"), ("num_restarts", "restart"))
    if settings.get(key) is not None
  ]
  return f"{name} ({', '.join(spent)})" if spent else name


def size_words(result: Mapping) -> str:
  """How sizes are measured, in a few words."""
  norm = f"l{result['settings']['norm']}"
  if rows_lib.in_raw_units([result]):
    return f"{norm} norm of raw input values"
  if result["settings"]["units"] == "relative":
    return f"{norm} norm in units of each modality's typical size"
  sizes = ", ".join(f"{m} {size:.4g}" for m, size in result["units"].items())
  return f"{norm} norm in units of {sizes}"


def shown(result: Mapping, names: Sequence[str]) -> list[float]:
  """Of the listed radii the ends and the middle; of one modality the middle."""
  radii = rows_lib.grid(result, names)
  if not radii:
    return []
  middle = radii[len(radii) // 2]
  if where(names, result) != "all":
    return [middle]
  return sorted({radii[0], middle, radii[-1]})


def table_rows(results: Sequence[dict]) -> list[dict]:
  """The accuracies side by side, a value a run, as text.

  At most three radii of a joint curve and one of a single modality.

  Returns:
    ``[{"group", "kind", "inputs", "size", "label", "values"}]``; the label says
    kind, inputs and size in one.
  """
  cells = {}
  for index, result in enumerate(results):
    for row, value in _cells(result):
      held = cells.setdefault(row, ["-"] * len(results))
      held[index] = "-" if value is None else f"{value:.4f}"
  ordered = sorted(cells.items(), key=lambda item: GROUPS.index(item[0][0]))
  return [
    {
      "group": group,
      "kind": kind,
      "inputs": inputs,
      "size": size,
      "label": _label(group, kind, inputs, size),
      "values": values,
    }
    for (group, kind, inputs, size), values in ordered
  ]


def _label(group: str, kind: str, inputs: str, size: str) -> str:
  if group == "clean":
    return kind
  return f"{kind}, {inputs}" + (f" by {size}" if size else "")


def _cells(result: Mapping):
  yield ("clean", "clean", "all present", ""), result["clean"]["accuracy"]
  every = "+".join(sorted(result["settings"]["modalities"]))
  for name, row in result["subsets"].items():
    if name != every:
      yield ("missing", "clean", f"only {name} present", ""), row["accuracy"]
  for row in (result.get("missing") or {"rows": ()})["rows"]:
    rate = f"at missing rate {row['rate']:g}"
    yield ("missing", "clean", rate, ""), row["accuracy"]
  if result.get("corrupted"):
    first = ("corrupted", "corrupted", "mean over kinds", "")
    yield first, result["corrupted"]["score"]
  for row in [*result["attacked"], *result["certified"]]:
    if row["radius"] not in shown(result, row["modalities"]):
      continue
    part = where(row["modalities"], result)
    group = "attacked" if "attack" in row else kind_word(row)
    how = f"{row['attack']} l{row['norm']}" if "attack" in row else ""
    kind = f"{group} ({how or 'l' + str(row['norm'])})"
    group = f"{group} {'all' if part == 'all' else 'one'}"
    size = f"{row['radius']:g}"
    yield (group, kind, f"{part} changed", size), row["accuracy"]
  yield from _smoothed_cells(result)


def _smoothed_cells(result: Mapping):
  """Of the smoothed classifier: never in a row with the model itself."""
  found = result.get("smoothed")
  if found is None:
    return
  first = ("smoothed", "smoothed classifier", "all present", "")
  yield first, found["accuracy"]
  for row in found["rows"]:
    same = [
      other["radius"]
      for other in found["rows"]
      if other["modalities"] == row["modalities"]
    ]
    joint = where(row["modalities"], result) == "all"
    middle = same[len(same) // 2]
    if row["radius"] in ({same[0], middle, same[-1]} if joint else {middle}):
      kind = f"{found['kind']} (l{row['norm']})"
      part = f"{where(row['modalities'], result)} changed"
      group = ("smoothed", kind, part, f"{row['radius']:g}")
      yield group, row["accuracy"]


def headlines(results: Sequence[dict]) -> dict:
  """The main numbers, a row a run; attacked, certified, estimated apart.

  Returns:
    ``{"columns": [text], "rows": [[text]]}``; a dash where there is no such
    number, and no column that is empty in every row.
  """
  columns = ("clean", "size of change", *_COLUMNS.values(), _WORST)
  columns += (_ONE, _CORRUPTED)
  rows = []
  for result in results:
    found = rows_lib.headline(result)
    bound, radius = found["bound"], found["radius"]
    values = dict.fromkeys(_COLUMNS, "-")
    if found["attacked"]:
      values["attacked"] = percent(found["attacked"]["accuracy"])
    if bound:
      values[kind_word(bound)] = percent(bound["accuracy"])
    size = "-" if radius is None else f"l{_norm(result)} {radius:g}"
    clean = percent(result["clean"]["accuracy"])
    score = "-"
    if result.get("corrupted"):
      score = percent(result["corrupted"]["score"])
    row = [clean, size, *values.values(), _worst_case(result)]
    rows.append([*row, _worst_alone(result), score])
  kept = [i for i in range(len(columns)) if any(row[i] != "-" for row in rows)]
  return {
    "columns": [columns[i] for i in kept],
    "rows": [[row[i] for i in kept] for row in rows],
  }


_COLUMNS = {
  "attacked": f"attacked (at{_NO_BREAK}most)",
  "certified": f"certified (at{_NO_BREAK}least)",
  "estimated": f"estimated (no{_NO_BREAK}guarantee)",
}

_WORST = f"worst case of all checks (at{_NO_BREAK}most)"
_ONE = "one modality only, at worst"
_CORRUPTED = "corrupted, mean over kinds"


def _norm(result: Mapping):
  return result["settings"]["norm"]


def _worst_case(result: Mapping) -> str:
  """Of some examples, at the same radius; a dash where nobody looked."""
  # Results of earlier versions have none, or none of these.
  found = result.get("masking") or {}
  if "worst_case" not in found:
    return "-"
  return f"{percent(found['worst_case'])} (of {found['num_examples']})"


def _worst_sentence(result: Mapping) -> str:
  found = result.get("masking") or {}
  if "worst_case" not in found:
    return ""
  return (
    f" On {found['num_examples']} of the examples the attack that was checked "
    f"leaves {percent(found['accuracy']['white box'])} right, and everything "
    f"tried together at {found['radius']:g}, example by example, at most "
    f"{percent(found['worst_case'])}."
  )


def _worst_alone(result: Mapping) -> str:
  alone = rows_lib.alone(result)
  return _named_share(alone, min) if len(alone) > 1 else "-"


def _named_share(alone: Mapping[str, float], choose) -> str:
  name = choose(alone, key=alone.get)
  return f"{percent(alone[name])} ({name})"


def summary(results: Sequence[dict]) -> list[str]:
  """A few sentences that say the main thing of every run."""
  return [_sentence(result) for result in results]


def _sentence(result: Mapping) -> str:
  clean = result["clean"]
  text = (
    f"“{result['name']}” is right on {percent(clean['accuracy'])} of "
    f"{clean['num_examples']} test examples with unchanged inputs."
  )
  found = rows_lib.headline(result)
  attacked, bound = found["attacked"], found["bound"]
  parts = []
  if attacked:
    parts.append(
      f"{percent(attacked['accuracy'])} are still right after the attack "
      f"{attack_words(result, attacked['attack'])}"
    )
  if bound and bound["sound"]:
    parts.append(
      f"it is proven that at least {percent(bound['accuracy'])} stay right, "
      "whatever the attacker does"
    )
  elif bound:
    parts.append(
      f"an estimate, which guarantees nothing, says "
      f"{percent(bound['accuracy'])}"
    )
  if parts:
    text += (
      f" When all modalities may change by up to {found['radius']:g} "
      f"({size_words(result)}), {', and '.join(parts)}."
    )
  alone = rows_lib.alone(result)
  text += _worst_sentence(result) + _smoothed_sentence(result)
  if len(alone) > 1:
    least, most = (_named_share(alone, end) for end in (min, max))
    text += f" With one modality only it is right on {least}"
    text += f" to {most}." if least != most else "."
  if result.get("corrupted"):
    text += (
      f" Corrupted, it is right on {percent(result['corrupted']['score'])} in "
      f"the mean over kinds of corruption."
    )
  return text


def _smoothed_sentence(result: Mapping) -> str:
  found = result.get("smoothed")
  if found is None:
    return ""
  text = (
    f" Smoothed by noise, it is right on {percent(found['accuracy'])} and "
    f"abstains on {percent(found['abstained'])}"
  )
  rows = [
    row for row in found["rows"] if where(row["modalities"], result) == "all"
  ]
  if not rows:
    return f"{text}."
  row = rows[len(rows) // 2]
  size = (
    f"{row['radius']:g} changed elements"
    if row["norm"] == 0
    else f"changes of up to {row['radius']:g}"
  )
  return (
    f"{text}; {percent(row['accuracy'])} are {found['kind']} for each example "
    f"to stay right under {size}."
  )


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
  if any(_norm(result) != _norm(first) for result in results):
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
  attacks = ", ".join(
    attack_words(result, name) for name in settings["attacks"]
  )
  return [
    ("training recipe", texts.recipe(result["recipe"])),
    ("data", result["dataset"] or "not stated"),
    ("modalities (input size)", shapes),
    ("classes", str(settings["num_classes"])),
    ("test examples", tested),
    ("seed", str(result["seed"])),
    ("sizes measured in", size_words(result)),
    ("attack", attacks or "none"),
    ("bound", bound_words(result)),
  ]


def bound_words(result: Mapping) -> str:
  """Certified, estimated or none, and why."""
  certificate = result["settings"]["certificate"]
  if certificate["source"] is None:
    return f"none. {certificate['reason']}"
  word = kind_word(certificate)
  return f"{word} (source: {certificate['source']}). {certificate['reason']}"


def settings_line(values: Mapping) -> str:
  """``num_steps 50, loss margin``: settings on one line."""
  return ", ".join(
    f"{key} {plain(value)}"
    for key, value in values.items()
    if key != "name" and value is not None
  )


def plain(value) -> str:
  """A setting as a reader would write it, floats with few digits."""
  if isinstance(value, Mapping):
    return "{" + ", ".join(f"{k}: {plain(v)}" for k, v in value.items()) + "}"
  if isinstance(value, (list, tuple)):
    return "[" + ", ".join(plain(item) for item in value) + "]"
  if isinstance(value, bool):
    return "yes" if value else "no"
  if value is None:
    return "none"
  return f"{value:g}" if isinstance(value, float) else str(value) or "none"
