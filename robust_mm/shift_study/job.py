"""The whole study: every model that is not there yet, then the page."""

import pathlib
from collections.abc import Callable

import numpy as np

from robust_mm import modalities
from robust_mm import shift_methods
from robust_mm.evaluation import shift
from robust_mm.evaluation import shift_scores
from robust_mm.shift_study import making
from robust_mm.shift_study import plan
from robust_mm.shift_study import writing
from robust_mm.training import runs


def run(
  config,
  folder: pathlib.Path,
  *,
  progress: Callable[..., None] = lambda done, total, text: None,
  say: Callable[[str], None] = lambda line: None,
) -> shift.ShiftReport | None:
  """The whole matrix of every method; writes tables, plots and numbers.

  ``shift.json``, ``shift.txt``, ``shift.html`` and ``plots/shift_<method>.png``
  in the folder; ``study.json``, what was asked, from the start.

  Args:
    config: see ``configs/shift.py``.
    folder: the work directory.
    progress: ``progress(done, total, text)``; done counts models.
    say: prints a line, one before every model that is made.

  Returns:
    The report; None after SIGTERM, when the same call goes on.

  Raises:
    UserError: one sentence naming the key; before anything is trained, unless
      a folder holds runs of other settings.
  """
  study = plan.prepare(config, folder)
  with runs.lock(study.folder):
    plan.mark(study)
    try:
      logits = _all_logits(study, progress, say)
    except making.StoppedError:
      return None
    report = _report(study, logits, free=True)
    writing.write(study, report)
  return report


def _all_logits(study: plan.Study, progress, say) -> dict:
  """``{(method, seed, T): [E, n, k]}``."""
  found = {}
  jobs = study.jobs()
  for done, (name, seed, train) in enumerate(jobs):
    text = f"{name} {modalities.subset_name(train)} seed {seed}"
    if not making.is_made(study, name, train, seed):
      _pretrain(study, seed, say)
      say(f"{done + 1}/{len(jobs)} {text}")
    progress(done, len(jobs), text)
    found[name, seed, train] = making.logits(study, name, train, seed)
  return found


def _pretrain(study: plan.Study, seed: int, say) -> None:
  """What all runs of a seed start from, where it is not there."""
  spec = study.config.study.pretraining
  if spec and not runs.has_ended(study.start(seed)):
    say(f"pretraining of seed {seed}: {spec}")
    making.pretrained(study, seed)


def _report(
  study: plan.Study, logits: dict, *, free: bool = False
) -> shift.ShiftReport:
  """The report; with ``free`` logits leave the dict, so none are held twice."""
  take = logits.pop if free else logits.__getitem__
  label, reference = study.test["label"], shift_methods.REFERENCE
  seeds, trains = list(study.seeds), study.train_sets

  def stacked(name):
    shape = len(study.test_sets), len(label), len(study.prior)
    found = np.empty((len(seeds), len(trains), *shape), np.float32)
    for s, seed in enumerate(seeds):
      for t, train in enumerate(trains):
        found[s, t] = take((name, seed, train))
    return found

  matched = {
    subset: np.array(
      [
        take((reference, seed, subset))[study.test_sets.index(subset)]
        for seed in seeds
      ],
      np.float32,
    )
    for subset in study.reference_sets
  }
  return shift.shift_report(
    {name: stacked(name) for name in study.config.study.methods},
    study.names,
    shift_scores.chance_level(label, score=study.score),
    reference,
    train_sets=trains,
    test_sets=study.test_sets,
    matched={reference: matched},
    score=study.score,
    label=label,
    present=study.test["present"],
    clusters=study.clusters,
    num_samples=study.config.study.num_samples,
  )
