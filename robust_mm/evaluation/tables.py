"""Tables of what stands apart: captions, and whether gradients mislead."""

from collections.abc import Iterator
from collections.abc import Mapping

from robust_mm import _validate
from robust_mm.evaluation import wording

_TRIED = {
  "clean": "none",
  "noise": "noise",
  "one step": "one step of full length",
  "white box": "the attack that is judged",
  "queries": "random search",
}
_STATISTICS = {
  "margin": "margin of the label",
  "logit_norm": "l2 norm of the logits",
  "gradient_norm": "l2 norm of the gradient of the margin",
}
_OF = {"model": "the model", "surrogate": "the model points were borrowed from"}


def table(title: str, note: str, columns, rows) -> dict:
  """As :func:`details.details` returns them."""
  return {"title": title, "note": note, "columns": columns, "rows": rows}


def captions(found: Mapping) -> dict:
  """What ``caption_report`` found, a row an attack."""
  first = found["rows"][0]
  settings = found["settings"]
  pairs = ", modalities in new pairs" if settings["mispair"] else ""
  return table(
    "Captions under attack",
    f"{found['num_examples']} examples{pairs}; PGD with "
    f"{settings['num_steps']} steps and "
    f"{_validate.counted(settings['num_restarts'], 'restart')} in linf, raw "
    f"units{_queries(settings)}; up to "
    f"{_validate.counted(settings['num_substitutions'], 'letter')} of a "
    f"prompt. The target of the targeted one is {found['target']!r}, "
    f"reached where it is not said anyway{_anyway(found)}.{_doubts(found)}",
    [
      ("attack", False),
      ("of", False),
      ("size", True),
      *((f"{m} word", True) for m in first["slots"]),
      ("caption", True),
      ("distinct words", True),
      ("entropy, bits", True),
      ("target reached", True),
    ],
    [
      (
        row["attack"],
        row["modalities"],
        "" if row["radius"] is None else f"{row['radius']:.3g}",
        *(
          wording.percent(row["slots"][m]) if m in row["slots"] else ""
          for m in first["slots"]
        ),
        wording.percent(row["exact_match"]),
        f"{row['distinct_1']:.3f}",
        f"{row['entropy']:.2f}",
        "" if row["success"] is None else wording.percent(row["success"]),
      )
      for row in found["rows"]
    ],
  )


def _anyway(found: Mapping) -> str:
  # Results of earlier versions have neither this nor checks.
  share = found.get("target_clean")
  return "" if share is None else f", as it is of {wording.percent(share)}"


def _queries(settings: Mapping) -> str:
  # Results of earlier versions have none.
  number = settings.get("num_queries")
  return f", random search with {number} queries" if number else ""


def _doubts(found: Mapping) -> str:
  failed = [c["message"] for c in found.get("checks", ()) if not c["passed"]]
  if not failed:
    return ""
  return f" The attacks may be misled: {' '.join(failed)}"


def masking(found: Mapping) -> list[dict]:
  """What ``masking_report`` found: its checks and what they rest on."""
  tables = [_checks(found)]
  # Results of earlier versions have no worst case.
  if "worst_case" in found:
    tables.append(_left(found))
  if "statistics" in found:
    tables.append(_statistics(found["statistics"]))
  return tables


def _checks(found: Mapping) -> dict:
  note = (
    f"{found['num_examples']} examples, all modalities changed by l"
    f"{found['norm']} {found['radius']:g}; the first attack, which follows "
    f"the {found['loss']} loss."
  )
  if found.get("inconclusive"):
    note += " Nothing can be said: the checks could not have failed."
  return table(
    "Do gradients mislead the attacks?",
    note,
    [("check", False), ("passed", False), ("what was found", False)],
    [
      (
        check["name"].replace("_", " "),
        "yes" if check["passed"] else "no",
        check["message"],
      )
      for check in found["checks"]
    ],
  )


def _left(found: Mapping) -> dict:
  rows = [(tried, wording.percent(share)) for tried, share in _tried(found)]
  rows.append(
    (
      "worst case: everything at that size, example by example",
      wording.percent(found["worst_case"]),
    )
  )
  return table(
    "Everything tried where gradients were checked",
    f"Right of {found['num_examples']} examples, l{found['norm']} "
    f"{found['radius']:g} where no size is named. The worst case is the number "
    "to quote of them.",
    [("tried", False), ("right", True)],
    rows,
  )


def _tried(found: Mapping) -> Iterator[tuple[str, float]]:
  for name, words in _TRIED.items():
    if name in found["accuracy"]:
      yield words, found["accuracy"][name]
  for radius, share in found["curve"][1:]:
    yield f"the attack that is judged, at {radius:.3g}", share
  for loss, points in found["scales"].items():
    for divisor, share in points[1:]:
      yield f"{_spaced(loss)}, logits divided by {divisor:g}", share
  for name, share in found.get("objectives", {}).items():
    yield f"objective {_spaced(name)}", share
  for steps, restarts, share in found.get("effort", ()):
    spent = _validate.counted(restarts, "restart")
    yield f"{_spaced(found['loss'])}, {steps} steps, {spent}", share
  if "transfer" in found:
    yield "points made for another model", found["transfer"]


def _spaced(name: str) -> str:
  return name.replace("_", " ")


def _statistics(found: Mapping) -> dict:
  shares = next(iter(found.values()))["quantiles"]
  return table(
    "Margins, logits and gradients",
    "Quantiles over the same examples. A gradient of zero leads no attack.",
    [
      ("of", False),
      ("what", False),
      *((f"{share:.0%}", True) for share in shares),
    ],
    [
      (_OF[who], words, *(f"{value:.3g}" for value in values[name]))
      for who, values in found.items()
      for name, words in _STATISTICS.items()
    ],
  )
