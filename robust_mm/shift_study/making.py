"""The models of a study, trained or made, and what they say of the test split.

Under the work directory every training run has a folder of its own,
``runs/<method>/<T>/<seed>`` and ``pretraining/<seed>``, which resumes like any
run; what a model says of the test split lies beside it in ``logits.npz``, and
what has that is not done again.
"""

import pathlib

import numpy as np

from robust_mm import _validate
from robust_mm import config as config_lib
from robust_mm import modalities
from robust_mm import shift_derived
from robust_mm import shift_methods
from robust_mm import training
from robust_mm import weights
from robust_mm.evaluation import sets
from robust_mm.evaluation import shift_scores
from robust_mm.shift_study import plan
from robust_mm.training import runs
from robust_mm.training import setup as setup_lib
from robust_mm.training import sharding


class StoppedError(Exception):
  """SIGTERM: everything so far is saved, the same command goes on."""


def is_made(study: plan.Study, name: str, train, seed: int) -> bool:
  """Whether :func:`logits` reads a file."""
  path = _path(study, name, train, seed)
  # Logits beside no run are of an earlier version, and of who knows what.
  ran = (path.parent / runs.CONFIG_FILE).is_file()
  return path.is_file() and (ran or shift_methods.is_derived(name))


def logits(study: plan.Study, name: str, train, seed: int) -> np.ndarray:
  """``[E, n, k]`` of one model, from its file where it has been made."""
  method = shift_methods.METHODS[name]
  path = _path(study, name, train, seed)
  if isinstance(method, shift_methods.Trained):
    config = _configured(study, name, train, seed)
    # A study that was moved took its pretraining along.
    runs.relocate_start(path.parent, config)
    # A study of other settings is refused, whatever it has left.
    runs.check_config(path.parent, config)
  if not is_made(study, name, train, seed):
    found = _made(study, name, train, seed)
    # The name must end so, or numpy adds it.
    scratch = path.with_name("unfinished.npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
      scratch, **{modalities.subset_name(e): x for e, x in found.items()}
    )
    scratch.replace(path)
  with np.load(path, allow_pickle=False) as kept:
    lacking = {modalities.subset_name(e) for e in study.test_sets} - {*kept}
    if lacking:
      raise _validate.UserError(
        f"{path} lacks the sets {', '.join(sorted(lacking))}: the study in "
        f"{study.folder} had other config.study.test_sets."
      )
    return np.stack([kept[modalities.subset_name(e)] for e in study.test_sets])


def _path(study: plan.Study, name: str, train, seed: int) -> pathlib.Path:
  return study.place(name, train, seed) / "logits.npz"


def _made(study: plan.Study, name: str, train, seed: int) -> dict:
  method = shift_methods.METHODS[name]
  if isinstance(method, shift_methods.Trained):
    folder = _trained(study, name, train, seed)
    model, params, state, _ = training.load(folder)
  elif isinstance(method, shift_methods.Between):
    folder = study.place(method.of, train, seed)
    ended = list(runs.describe(folder)["finished"])
    model, first, _, _ = training.load(folder, phase=ended[0])
    _, last, state, _ = training.load(folder, phase=ended[-1])
    params = weights.interpolate(first, last, study.config.study.alpha)
  elif isinstance(method, shift_methods.Ensemble):
    return shift_derived.ensemble(
      {(name,): _alone(study, method.of, name, seed) for name in train},
      study.test_sets,
      study.prior,
      present=study.test["present"],
      multi_label=study.score in shift_scores.MULTI_LABEL,
    )
  else:
    model, params, state, _ = training.load(pretrained(study, seed))
    source = setup_lib.open_split(study.config, "train")
    return shift_derived.class_means(
      model,
      params,
      state,
      source.batch(),
      study.test,
      train,
      study.test_sets,
      batch_size=study.config.evaluation.batch_size,
    )
  return _evaluated(study, model, params, state)


def _alone(study: plan.Study, of: str, name: str, seed: int) -> np.ndarray:
  """Logits of the model of one modality, on that modality."""
  return logits(study, of, (name,), seed)[study.test_sets.index((name,))]


def _evaluated(study: plan.Study, model, params, state) -> dict:
  return sets.logits_by_set(
    model,
    params,
    state,
    study.test,
    sets=study.test_sets,
    batch_size=study.config.evaluation.batch_size,
    sharding=sharding.batch_sharding(sharding.make_mesh()),
  )


def _trained(study: plan.Study, name: str, train, seed: int) -> pathlib.Path:
  if study.config.study.pretraining:
    pretrained(study, seed)
  folder = study.place(name, train, seed)
  _train(study, _configured(study, name, train, seed), folder)
  return folder


def _configured(study: plan.Study, name: str, train, seed: int):
  config = study.configured(name, train)
  config.seed = seed
  if study.config.study.pretraining:
    config.init_from = str(study.start(seed))
  config_lib.check(config)
  return config


def pretrained(study: plan.Study, seed: int) -> pathlib.Path:
  """The folder of the run that all of a seed start from, trained by now."""
  folder = study.start(seed)
  config = shift_methods.pretraining(study.config, seed)
  _train(study, config, folder)
  return folder


def _train(study: plan.Study, config, folder: pathlib.Path) -> None:
  """Trains, or goes on, or finds that it has been done."""
  runs.check_config(folder, config)
  if runs.has_ended(folder):
    return
  result = training.train(config, folder, say=lambda line: None)
  if not result.finished:
    raise StoppedError
