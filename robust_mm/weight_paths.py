"""``robust-mm interpolate``: the models between two of a run (WiSE-FT)."""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from collections.abc import Sequence

import numpy as np

from robust_mm import _files
from robust_mm import _validate
from robust_mm import modalities
from robust_mm import training
from robust_mm import weights
from robust_mm.evaluation import metrics
from robust_mm.evaluation import sets
from robust_mm.evaluation import shift_plots
from robust_mm.evaluation import shift_scores
from robust_mm.evaluation import shift_texts
from robust_mm.evaluation import style
from robust_mm.training import runs
from robust_mm.training import setup as setup_lib
from robust_mm.training import sharding

UNTUNED = 0.5
_SCORES = {
  "classification": "accuracy",
  "multi_label": "map",
  "regression": "mae",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
  """One model on the path.

  Attributes:
    alpha: 0 at the start, 1 at the end.
    matched: validation score with the modalities that were trained on.
    scores: ``{set: score}`` on the split that is reported.
  """

  alpha: float
  matched: float
  scores: dict[str, float]


def trace(
  folder: pathlib.Path,
  *,
  alphas: Sequence[float],
  start: str | None = None,
  end: str | None = None,
  split: str = "test",
  limit: int | None = None,
  progress: Callable[..., None] = lambda done, total, text: None,
) -> dict:
  """Evaluates the path between the models of two phases; writes and draws it.

  ``interpolation.json`` and ``plots/interpolation.png`` in the folder; with
  ``limit`` the names end in ``-limit<limit>``, and what was measured on all
  examples stays.

  Args:
    folder: the run.
    alphas: points of the path, in [0, 1].
    start: phase of the model at 0; the first that ended by default.
    end: phase of the model at 1; the last by default.
    split: that scores are reported of. The choice is made on validation
      examples with the modalities trained on, whatever it is.
    limit: at most so many examples of each split.
    progress: ``progress(done, total, text)``.

  Returns:
    What is written: ``points``, a :class:`Point` each as a dict, and
    ``chosen``, the alpha of the best matched validation score, the nearest to
    0.5 of equals, never one whose score is NaN. NaN is null in the file.

  Raises:
    UserError: a sentence, also where every matched score is NaN; nothing has
      been written.
  """
  facts = runs.describe(folder)
  start, end = _phases(folder, facts, start, end)
  model, first, _, config = training.load(folder, phase=start)
  _, last, state, _ = training.load(folder, phase=end)
  opened = {
    name: setup_lib.open_split(config, name, limit=limit)
    for name in dict.fromkeys(("validation", split))
  }
  for source in opened.values():
    setup_lib.check_same_data(source, facts)
  labelled = tuple(config.data.get("labelled", ())) or model.modalities
  matched = modalities.names(labelled)
  axis = sharding.batch_sharding(sharding.make_mesh())
  data = {name: source.batch() for name, source in opened.items()}
  counts = {name: len(source) for name, source in opened.items()}
  points = []
  for done, alpha in enumerate(alphas):
    progress(done, len(alphas), f"alpha {alpha:g}")
    with _validate.user_errors():
      params = weights.interpolate(first, last, alpha)
      found = {
        name: sets.logits_by_set(
          model,
          params,
          state,
          data[name],
          sets=[matched] if name != split else None,
          batch_size=config.evaluation.batch_size,
          sharding=axis,
        )
        for name in data
      }
    validated = found["validation"][matched]
    points.append(
      Point(
        alpha=float(alpha),
        matched=_score(model, validated, data["validation"], matched),
        scores={
          modalities.subset_name(subset): _score(
            model, logits, data[split], subset
          )
          for subset, logits in found[split].items()
        },
      )
    )
  chosen = _choose(points, higher=model.task != "regression")
  found = {
    "start": start,
    "end": end,
    "trained_on": list(matched),
    "split": split,
    "score": _SCORES[model.task],
    "limit": limit,
    "num_examples": counts,
    "chosen": chosen.alpha,
    "points": [dataclasses.asdict(point) for point in points],
  }
  json_path, plot_path = paths(folder, limit)
  _files.write_json(json_path, shift_texts.plain(found))  # NaN is null
  _files.write_bytes(plot_path, style.png(_figure(found)))
  return found


def paths(folder: pathlib.Path, limit: int | None) -> tuple:
  """(the numbers, the plot) of a path."""
  name = "interpolation" if limit is None else f"interpolation-limit{limit}"
  return folder / f"{name}.json", folder / "plots" / f"{name}.png"


def format_table(found: dict) -> str:
  """A row a point, the chosen one marked; and what the columns are."""
  points = found["points"]
  names = list(points[0]["scores"])
  widths = [max(8, len(name)) for name in names]
  head = "   alpha  validation  " + "  ".join(
    f"{name:>{width}s}" for name, width in zip(names, widths)
  )
  rows = [
    f" {'*' if point['alpha'] == found['chosen'] else ' '} "
    f"{point['alpha']:5.2f}  {point['matched']:10.4f}  "
    + "  ".join(
      f"{point['scores'][name]:{width}.4f}"
      for name, width in zip(names, widths)
    )
    for point in points
  ]
  trained, split = "+".join(found["trained_on"]), found["split"]
  count = found["num_examples"]
  words = [
    f"{found['score']}; weights from phase {found['start']} (alpha 0) to "
    f"{found['end']} (alpha 1).",
    f"validation: {count['validation']} examples with {trained}, which was "
    f"trained on; * is chosen on it.",
    f"the others: {count[split]} {split} examples with each set of modalities.",
  ]
  return "\n".join([head, *rows, "", *words])


def _phases(folder, facts, start, end) -> tuple[str, str]:
  ended = [p["name"] for p in facts["phases"] if p["name"] in facts["finished"]]
  if len(ended) < 2:
    raise _validate.UserError(
      f"--workdir: the run in {folder} has ended "
      f"{_validate.counted(len(ended), 'phase')}, and a "
      "path needs the models of two: configs/finetune.py has a probe and "
      "fine-tuning."
    )
  for name, phase in (("--start", start), ("--end", end)):
    if phase is not None and phase not in ended:
      raise _validate.UserError(
        f"{name} must be one of {', '.join(ended)}; got {phase!r}."
        f"{_validate.suggestion(phase, ended)}"
      )
  chosen = start or ended[0], end or ended[-1]
  if chosen[0] == chosen[1]:
    raise _validate.UserError(
      f"--start and --end must be two phases, both are {chosen[0]!r}."
    )
  return chosen


def _score(model, logits: np.ndarray, batch: dict, subset) -> float:
  """What ``_SCORES`` says, of the examples that a set leaves something.

  A NaN among their logits is wrong; for mAP and MAE the score is NaN.
  """
  counted = np.any([batch["present"][name] for name in subset], axis=0)
  if not counted.any():
    return math.nan
  said, label = logits[counted], batch["label"][counted]
  if model.task == "regression":
    return metrics.mean_absolute_error(label, said[:, 0])
  if model.task == "multi_label":
    return metrics.mean_average_precision(label, said)
  return metrics.accuracy(label, shift_scores.predictions(said))


def _choose(points: Sequence[Point], *, higher: bool) -> Point:
  known = [point for point in points if not math.isnan(point.matched)]
  if not known:
    raise _validate.UserError(
      "no alpha can be chosen: the validation score is NaN at every one (a "
      "model that diverged, or no example with the modalities trained on)."
    )
  sign = 1 if higher else -1
  return max(known, key=lambda p: (sign * p.matched, -abs(p.alpha - UNTUNED)))


def _figure(found: dict):
  """The path, one line a set, the chosen model marked."""
  points = found["points"]
  return shift_plots.curves(
    [point["alpha"] for point in points],
    {
      "validation, as trained": [point["matched"] for point in points],
      **{
        name: [point["scores"][name] for point in points]
        for name in points[0]["scores"]
      },
    },
    score=found["score"],
    chosen=found["chosen"],
  )
