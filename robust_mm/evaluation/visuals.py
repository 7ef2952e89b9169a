"""Synthesised inputs of a run as a section of a page.

``robust-mm visualize`` leaves ``visualization/NAME.json`` and ``NAME.png`` in
the folder of a run; nothing is computed here.
"""

import base64
import json
import pathlib
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from robust_mm import _validate
from robust_mm.evaluation import templating
from robust_mm.evaluation import wording

FOLDER = "visualization"
CAUTION = (
  "Inputs synthesised by gradient ascent to activate a class. A picture shows "
  "something that activates the class; it is not what the network sees, nor "
  "realistic. Scores come from the network that made the picture."
)
_LISTED = 2  # of a longer list, such as deviations, the ends
_NUMBERS = {
  "near": "keeps its class, near",
  "far": "keeps its class, far",
  "probability": "probability of the class",
  "near alone": "keeps its class alone, near",
  "far alone": "keeps its class alone, far",
  "probability alone": "probability of the class alone",
  "other near": "keeps its class in other networks, near",
  "other probability": "probability in other networks",
  "total_variation": "total variation",
  "spectral_slope": "spectral slope",
  "feature_distance": "distance to real features",
  "diversity": "diversity",
}


def read(
  names: Sequence[str], folders: Sequence[Any] | None
) -> list[dict[str, Any]]:
  """The sections of several runs, in order.

  Args:
    names: of the runs.
    folders: of the runs; None for none.

  Raises:
    UserError: a file that is damaged.
  """
  found = []
  for name, folder in zip(names, folders or ()):
    for path in sorted((pathlib.Path(folder) / FOLDER).glob("*.json")):
      found.append({**section(path), "run": name})
  return found


def section(path: pathlib.Path) -> dict[str, Any]:
  """One grid with its numbers, from its JSON file and the PNG beside it."""
  try:
    told = json.loads(path.read_text())
    picture = path.with_suffix(".png").read_bytes()
    return {
      "run": "",
      "title": told["title"],
      "caution": CAUTION,
      "rows": f"Rows from the top: {', '.join(told['rows'])}. Columns: class "
      f"{', '.join(map(str, told['columns']))}.",
      "settings": wording.settings_line(_flat(told["settings"])),
      "data": base64.b64encode(picture).decode(),
      "table": _table(told["numbers"]),
      "notes": [*told.get("notes", []), *_told(told)],
    }
  except (KeyError, TypeError, ValueError, OSError) as error:
    raise _validate.UserError(f"{path} is damaged: {error}.") from error


def _told(told: Mapping[str, Any]) -> list[str]:
  """What near and far are, and whose the margin is."""
  found = [
    f"{what.capitalize()}: {_transforms(test)}."
    for what, test in told["settings"].get("held_out", {}).items()
  ]
  for group, parts in told.get("margin_means", {}).items():
    of = f", {group}" if group else ""
    each = ", ".join(f"{name} {value:+.2f}" for name, value in parts.items())
    found.append(f"Margin by modality{of}: {each}.")
  return found


def _transforms(test: Mapping[str, Any]) -> str:
  """``image, jitter 2, rotation 15``; of several modalities one by one."""
  if "kind" not in test:
    each = (f"{name} by {_transforms(one)}" for name, one in test.items())
    return "; ".join(each)
  options = {n: v for n, v in test.items() if n != "kind" and v is not None}
  return ", ".join(
    [test["kind"], *(f"{name} {_plain(v)}" for name, v in options.items())]
  )


def _plain(value: Any) -> str:
  if not isinstance(value, list):
    return f"{value:.3g}" if isinstance(value, float) else str(value)
  if len(value) > _LISTED:
    return f"{min(value):.3g} to {max(value):.3g}"
  return " to ".join(f"{part:.3g}" for part in value)


def page(title: str, sections: Sequence[Mapping[str, Any]]) -> str:
  """A page of its own, complete in itself."""
  return templating.template("visualization.html.j2").render(
    title=title, pictures=sections
  )


def _table(numbers: Mapping[str, Mapping[str, float]]) -> dict:
  """Means over classes and starts, a row a kind of input."""
  shown = [
    name
    for name in _NUMBERS
    if any(row.get(name) is not None for row in numbers.values())
  ]
  return {
    "columns": [("", False), *((_NUMBERS[name], True) for name in shown)],
    "rows": [
      (row, *(_number(values.get(name)) for name in shown))
      for row, values in numbers.items()
    ],
  }


def _number(value: float | None) -> str:
  return "-" if value is None else f"{value:.3f}"


def _flat(settings: Mapping[str, Any]) -> dict:
  """Without what the page says elsewhere."""
  elsewhere = ("classes", "held_out", "reconstruction")
  return {n: v for n, v in settings.items() if n not in elsewhere}
