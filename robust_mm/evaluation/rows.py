"""Rows of results: which curve they belong to, how their sizes are measured."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from robust_mm import _tasks

KINDS = ("attacked", "certified")


def main(row: Mapping) -> str:
  """What rows are compared by: ``accuracy``, or ``mae`` or ``map``."""
  return next(name for name in _tasks.MAIN.values() if name in row)


def number(row: Mapping | None) -> float | None:
  """That number, None where there is none (JSON writes NaN as a text)."""
  value = None if row is None else row[main(row)]
  return None if isinstance(value, str) else value


def task(results: Sequence[Mapping]) -> str:
  """The task of all the results.

  Raises:
    ValueError: they are of several.
  """
  tasks = {result.get("task", _tasks.CLASSIFICATION) for result in results}
  if len(tasks) > 1:
    found = " and runs that predict ".join(
      _tasks.PREDICTS[name] for name in sorted(tasks)
    )
    raise ValueError(
      f"results must be of one task: runs that predict {found} have no number "
      "in common."
    )
  return tasks.pop()


def names_of(results: Sequence[dict]) -> list[str]:
  """The modalities of all results, sorted."""
  found = {
    name for result in results for name in result["settings"]["modalities"]
  }
  return sorted(found)


def norms_of(results: Sequence[dict]) -> list:
  """The norms radii are measured in, 2 before "inf"."""
  found = {
    row["norm"] for result in results for kind in KINDS for row in result[kind]
  }
  return sorted(found, key=str)


def curve(
  result: Mapping,
  kind: str,
  names: Sequence[str],
  *,
  attack: str | None = None,
  norm: Any = None,
) -> list[dict]:
  """The rows of ``kind`` for exactly these modalities, by radius."""
  rows = [
    row
    for row in result[kind]
    if sorted(row["modalities"]) == sorted(names)
    and (attack is None or row.get("attack") == attack)
    and (norm is None or row["norm"] == norm)
  ]
  return sorted(rows, key=lambda row: row["radius"])


def weakest(rows: Sequence[Mapping]) -> Mapping | None:
  """The row of the largest radius; of several attacks, what is left by all."""
  return min(
    rows,
    key=lambda row: (-row["radius"], _or_one(row["accuracy"])),
    default=None,
  )


def grid(result: Mapping, names: Sequence[str]) -> list[float]:
  """Radii to list: those attacked, else four along the certified curve."""
  attacked = {row["radius"] for row in curve(result, "attacked", names)}
  if attacked:
    return sorted(attacked)
  radii = [row["radius"] for row in curve(result, "certified", names)]
  return radii[:: max(1, (len(radii) - 1) // 4)][1:]


def headline(result: Mapping) -> dict:
  """What a reader should see first: one radius, all modalities changed.

  Returns:
    ``{"radius", "attacked", "bound"}``: the middle one of the radii, the row of
    the strongest attack there, and the certified or estimated row; None where
    there is none.
  """
  names = result["settings"]["modalities"]
  radii = grid(result, names)
  if not radii:
    return {"radius": None, "attacked": None, "bound": None}
  radius = radii[len(radii) // 2]
  at = {
    kind: [row for row in curve(result, kind, names) if row["radius"] == radius]
    for kind in KINDS
  }
  bound = at["certified"][0] if at["certified"] else None
  return {
    "radius": radius,
    "attacked": weakest(at["attacked"]),
    "bound": bound,
  }


def alone(result: Mapping) -> dict[str, float]:
  """``{modality: accuracy}`` with nothing else present, where measured."""
  return {
    name: row["accuracy"]
    for name, row in result["subsets"].items()
    if name in result["settings"]["modalities"] and row["accuracy"] is not None
  }


def accuracy_lost(result: Mapping, name: str) -> float | None:
  """What attacks on this modality alone cost at their largest radius."""
  row = weakest(curve(result, "attacked", [name]))
  if row is None or row["accuracy"] is None:
    return None
  return result["clean"]["accuracy"] - row["accuracy"]


def in_raw_units(results: Sequence[Mapping]) -> bool:
  """Whether one unit of radius is one raw input value, everywhere."""
  return all(
    size == 1.0 for result in results for size in result["units"].values()
  )


def _or_one(accuracy: float | None) -> float:
  return 1.0 if accuracy is None else accuracy
