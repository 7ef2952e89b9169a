"""What stands below and instead of each figure: its settings, its content."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from robust_mm.evaluation import rows as rows_lib
from robust_mm.evaluation import texts
from robust_mm.evaluation import wording

_ATTACKED = ("radius_joint", "radius_modalities", "vulnerability")
_BOUNDED = (*_ATTACKED, "region")


def settings(name: str, results: Sequence[dict]) -> list[str]:
  """With what the numbers of a figure were made: what is common, then apart."""
  if name == "training":
    return []
  facts = [list(_facts(name, result)) for result in results]
  common = [fact for fact in facts[0] if all(fact in own for own in facts)]
  lines = ["; ".join(common)]
  for result, own in zip(results, facts):
    apart = [fact for fact in own if fact not in common]
    if apart:
      lines.append(f"{result['name']}: {'; '.join(apart)}")
  return [line for line in lines if line]


def _facts(name: str, result: Mapping):
  yield f"{result['clean']['num_examples']} test examples"
  if name == "subsets":
    return
  yield f"sizes in {wording.size_words(result)}"
  attacks = list(result["settings"]["attacks"])
  if name == "tightness":
    attacks = [result["tightness"]["attack"]] if result["tightness"] else []
  if attacks and name in (*_ATTACKED, "tightness"):
    words = [wording.attack_words(result, attack) for attack in attacks]
    yield f"attack {', '.join(words)}"
  certificate = result["settings"]["certificate"]
  if certificate["source"] and name in (*_BOUNDED, "tightness"):
    yield (
      f"{wording.kind_word(certificate)}, source {certificate['source']}, "
      f"norm l{certificate['norm']}"
    )
  if name == "region" and result["region"]:
    counts = [len(radii) for radii in result["region"]["radii"]]
    yield f"a grid of {counts[0]} x {counts[1]} pairs of sizes"


def alternative(
  name: str, results: Sequence[dict], histories: Sequence[Any] | None
) -> str:
  """What a figure shows, for who cannot see it."""
  histories = histories or [None] * len(results)
  parts = [
    f"{result['name']}: {text}"
    for result, history in zip(results, histories)
    if (text := _CONTENT[name](result, history))
  ]
  return f"{texts.TITLES[name]}. {'. '.join(parts)}."


def _joint(result: Mapping, _) -> str:
  return _curves(result, result["settings"]["modalities"])


def _single(result: Mapping, _) -> str:
  return "; ".join(
    f"only {name} changed, {text}"
    for name in result["settings"]["modalities"]
    if (text := _curves(result, [name]))
  )


def _curves(result: Mapping, names: Sequence[str]) -> str:
  radii = rows_lib.grid(result, names)
  lines = {}
  for kind in rows_lib.KINDS:
    for row in rows_lib.curve(result, kind, names):
      if row["radius"] in radii:
        word = row.get("attack") or wording.kind_word(row)
        word = f"attacked by {word}" if kind == "attacked" else word
        at = f"{wording.percent(row['accuracy'])} at {row['radius']:g}"
        lines.setdefault(word, []).append(at)
  return ", ".join(f"{word} {', '.join(ats)}" for word, ats in lines.items())


def _subsets(result: Mapping, _) -> str:
  return ", ".join(
    f"{name} {wording.percent(row['accuracy'])}"
    for name, row in result["subsets"].items()
  )


def _contributions(result: Mapping, _) -> str:
  found = result.get("contributions") or {"values": {}}
  return ", ".join(f"{m} {value:.3f}" for m, value in found["values"].items())


def _missing(result: Mapping, _) -> str:
  found = result.get("missing") or {"rows": []}
  return ", ".join(
    f"{wording.percent(row['accuracy'])} at {row['achieved']:.2f}"
    for row in found["rows"]
  )


def _vulnerability(result: Mapping, _) -> str:
  names = result["settings"]["modalities"]
  lost = {name: rows_lib.accuracy_lost(result, name) for name in names}
  word = wording.kind_word(result["settings"]["certificate"])
  parts = [
    f"{what} {', '.join(f'{m} {x:.2f}' for m, x in values.items())}"
    for what, values in (
      (f"share of the {word} sensitivity", result["vulnerability"] or {}),
      ("accuracy lost", {m: x for m, x in lost.items() if x is not None}),
    )
    if values
  ]
  return "; ".join(parts)


def _region(result: Mapping, _) -> str:
  held = result["region"]
  if not held:
    return ""
  first, second = held["modalities"]
  alone = (
    [row[0] for row in held["accuracy"]],
    held["accuracy"][0],
  )
  ends = [
    max((r for r, share in zip(radii, shares) if share >= 0.5), default=0.0)
    for radii, shares in zip(held["radii"], alone)
  ]
  return (
    f"{wording.kind_word(held)} for half of the examples up to {ends[0]:.2f} "
    f"of {first} alone or {ends[1]:.2f} of {second} alone"
  )


def _tightness(result: Mapping, _) -> str:
  found = result["tightness"]
  if not found:
    return ""
  pairs = zip(found["factors"], found["flipped"])
  flips = [f"{wording.percent(share)} at {x:g} times" for x, share in pairs]
  return f"flipped {', '.join(flips)} the {wording.kind_word(found)} radius"


def _training(_, history) -> str:
  last = {}
  for row in history or []:
    last.update({k: v for k, v in row.items() if k.startswith("validation")})
  return ", ".join(
    f"last {name.replace('_', ' ')} {value:.3g}" for name, value in last.items()
  )


_CONTENT = {
  "radius_joint": _joint,
  "radius_modalities": _single,
  "subsets": _subsets,
  "contributions": _contributions,
  "missing": _missing,
  "vulnerability": _vulnerability,
  "region": _region,
  "tightness": _tightness,
  "training": _training,
}
