"""``robust-mm shift``: trained on every T, evaluated on every E, compared.

Under the work directory every training run has a folder of its own,
``runs/<method>/<T>/<seed>`` and ``pretraining/<seed>``, which resumes like any
run; what a model says of the test split lies beside it in ``logits.npz``, and
what has that is not done again.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable

import numpy as np

from robust_mm import _files
from robust_mm import _validate
from robust_mm import config as config_lib
from robust_mm import modalities
from robust_mm import shift_derived
from robust_mm import shift_methods
from robust_mm import training
from robust_mm import weights
from robust_mm.evaluation import sets
from robust_mm.evaluation import shift
from robust_mm.evaluation import shift_page
from robust_mm.evaluation import shift_plots
from robust_mm.evaluation import shift_scores
from robust_mm.evaluation import style
from robust_mm.training import runs
from robust_mm.training import setup as setup_lib
from robust_mm.training import sharding

_MOST = 4  # modalities of which all sets are trained on


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Study:
  """What is compared, on what.

  Attributes:
    config: of one run, with ``study``.
    folder: the work directory.
    names: all modalities, P.
    train_sets: T.
    test_sets: E.
    test: the test split, host arrays.
    clusters: of its examples, ``[n]``; None where each is one by itself.
    prior: log-frequencies of the classes in training, ``[k]``.
  """

  config: object
  folder: pathlib.Path
  names: tuple[str, ...]
  train_sets: tuple[tuple[str, ...], ...]
  test_sets: tuple[tuple[str, ...], ...]
  test: dict
  clusters: np.ndarray | None
  prior: np.ndarray

  @property
  def seeds(self) -> range:
    """0, 1, ..."""
    return range(self.config.study.seeds)

  def place(self, method: str, train: tuple[str, ...], seed: int):
    """The folder of one model."""
    name = modalities.subset_name(train)
    if isinstance(shift_methods.METHODS[method], shift_methods.Between):
      method = f"{method}-{self.config.study.alpha:g}"
    return self.folder / "runs" / method / name / str(seed)


class _StoppedError(Exception):
  """SIGTERM: everything so far is saved, the same command goes on."""


def run(
  config,
  folder: pathlib.Path,
  *,
  progress: Callable[..., None] = lambda done, total, text: None,
) -> shift.ShiftReport | None:
  """The whole matrix of every method; writes tables, plots and numbers.

  ``shift.json``, ``shift.txt``, ``shift.html`` and ``plots/shift_<method>.png``
  in the folder.

  Args:
    config: see ``configs/shift.py``.
    folder: the work directory.
    progress: ``progress(done, total, text)``; done counts models.

  Returns:
    The report; None after SIGTERM, when the same call goes on.

  Raises:
    UserError: one sentence naming the key.
  """
  study = prepare(config, folder)
  logits = {}
  jobs = [
    (name, seed, train)
    for seed in study.seeds
    for name in config.study.methods
    for train in study.train_sets
  ]
  # What is made of others comes after them.
  jobs.sort(key=lambda job: _is_derived(job[0]))
  try:
    for done, (name, seed, train) in enumerate(jobs):
      text = f"{name} {modalities.subset_name(train)} seed {seed}"
      progress(done, len(jobs), text)
      logits[name, seed, train] = _logits(study, name, train, seed)
  except _StoppedError:
    return None
  report = _report(study, logits)
  _write(study, report)
  return report


def prepare(config, folder: pathlib.Path) -> Study:
  """Opens the data and checks what is asked.

  Raises:
    UserError: naming the key.
  """
  asked = config.study
  with _validate.user_errors():
    _validate.at_least(
      1,
      **{
        "config.study.seeds": asked.seeds,
        "config.study.num_samples": asked.num_samples,
      },
    )
    _validate.in_unit_interval(**{"config.study.alpha": asked.alpha})
  shift_methods.check(tuple(asked.methods), pretrained=bool(asked.pretraining))
  if config.data.labelled:
    raise _validate.UserError(
      "config.data.labelled must be left out: the study has all of "
      "config.study.train_sets in turn."
    )
  test = setup_lib.open_split(config, "test")
  if test.task != "classification":
    raise _validate.UserError(
      f"config.data.name: robust-mm shift compares classifiers, and "
      f"{config.data.name} is a {test.task}."
    )
  names = modalities.names(test.spec)
  train = setup_lib.open_split(config, "train").batch()
  counts = np.bincount(train["label"], minlength=test.num_classes)
  return Study(
    config=config,
    folder=pathlib.Path(folder),
    names=names,
    train_sets=_sets("train_sets", asked.train_sets, names),
    test_sets=_sets("test_sets", asked.test_sets, names),
    test=test.batch(),
    clusters=_clusters(test, asked.cluster),
    prior=shift_derived.log_prior(counts),
  )


def _clusters(test, name: str) -> np.ndarray | None:
  if not name:
    return None
  if name not in test.metadata:
    known = ", ".join(sorted(test.metadata)) or "none"
    raise _validate.UserError(
      f"config.study.cluster must be metadata of {test.name} ({known}), or '' "
      f"for single items; got {name!r}."
      f"{_validate.suggestion(name, test.metadata)}"
    )
  return np.asarray(test.metadata[name])


def _sets(key: str, given, names) -> tuple[tuple[str, ...], ...]:
  path = f"config.study.{key}"
  if not given:
    if len(names) > _MOST:
      raise _validate.UserError(
        f"{path} must name sets of the {len(names)} modalities: all of them "
        f"are {2 ** len(names) - 1}."
      )
    return modalities.subsets(names)
  found = []
  for text in given:
    with _validate.user_errors():
      subset = modalities.as_subset(text.split("+"), argument=path)
      _validate.known(names, **{path: subset})
    found.append(subset)
  return tuple(found)


def _is_derived(name: str) -> bool:
  return not isinstance(shift_methods.METHODS[name], shift_methods.Trained)


def _logits(study: Study, name: str, train, seed: int) -> np.ndarray:
  """``[E, n, k]`` of one model, from its file where it has been made."""
  method = shift_methods.METHODS[name]
  if isinstance(method, shift_methods.Trained) and method.oracle:
    train = study.names  # the same model whatever T is
  path = study.place(name, train, seed) / "logits.npz"
  if isinstance(method, shift_methods.Trained):
    # A study of other settings is refused, whatever it has left.
    runs.check_config(path.parent, _configured(study, name, train, seed))
  if not path.is_file():
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


def _made(study: Study, name: str, train, seed: int) -> dict:
  method = shift_methods.METHODS[name]
  if isinstance(method, shift_methods.Trained):
    folder = _trained(study, name, train, seed)
    model, params, state, _ = training.load(folder)
  elif isinstance(method, shift_methods.Between):
    folder = study.place(method.of, train, seed)
    ended = list(runs.describe(folder)["finished"])
    if len(ended) < 2:
      raise _validate.UserError(
        f"config.recipe.options.method must be 'lp_ft' for {name!r}, which "
        "lies between a probe and what follows it."
      )
    model, first, _, _ = training.load(folder, phase=ended[0])
    _, last, state, _ = training.load(folder, phase=ended[-1])
    params = weights.interpolate(first, last, study.config.study.alpha)
  elif isinstance(method, shift_methods.Ensemble):
    return shift_derived.ensemble(
      {(name,): _alone(study, method.of, name, seed) for name in train},
      study.test_sets,
      study.prior,
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


def _alone(study: Study, of: str, name: str, seed: int) -> np.ndarray:
  """Logits of the model of one modality, on that modality."""
  alone = (name,)
  for key in ("train_sets", "test_sets"):
    if alone not in getattr(study, key):
      raise _validate.UserError(
        f"config.study.{key} must have {name!r} alone for 'ensemble'."
      )
  return _logits(study, of, alone, seed)[study.test_sets.index(alone)]


def _evaluated(study: Study, model, params, state) -> dict:
  return sets.logits_by_set(
    model,
    params,
    state,
    study.test,
    sets=study.test_sets,
    batch_size=study.config.evaluation.batch_size,
    sharding=sharding.batch_sharding(sharding.make_mesh()),
  )


def _trained(study: Study, name: str, train, seed: int) -> pathlib.Path:
  if study.config.study.pretraining:
    pretrained(study, seed)
  folder = study.place(name, train, seed)
  _train(study, _configured(study, name, train, seed), folder)
  return folder


def _configured(study: Study, name: str, train, seed: int):
  config = shift_methods.METHODS[name].configure(study.config, train)
  config.seed = seed
  if study.config.study.pretraining:
    config.init_from = str(_start(study, seed))
  config_lib.check(config)
  return config


def _start(study: Study, seed: int) -> pathlib.Path:
  return study.folder.resolve() / "pretraining" / str(seed)


def pretrained(study: Study, seed: int) -> pathlib.Path:
  """The folder of the run that all of a seed start from, trained by now."""
  folder = _start(study, seed)
  config = config_lib.load(
    study.config.study.pretraining, [f"--config.seed={seed}"]
  )
  with config.unlocked():
    config.data.path = study.config.data.path
  _train(study, config, folder)
  return folder


def _train(study: Study, config, folder: pathlib.Path) -> None:
  """Trains, or goes on, or finds that it has been done."""
  runs.check_config(folder, config)
  if runs.has_ended(folder):
    return
  result = training.train(config, folder, say=lambda line: None)
  if not result.finished:
    raise _StoppedError


def _report(study: Study, logits) -> shift.ShiftReport:
  label = study.test["label"]
  right = {
    name: np.array(
      [
        [
          shift_scores.predictions(logits[name, seed, train]) == label
          for train in study.train_sets
        ]
        for seed in study.seeds
      ]
    )
    for name in study.config.study.methods
  }
  return shift.shift_report(
    right,
    study.names,
    shift_scores.chance_level(label),
    shift_methods.REFERENCE,
    train_sets=study.train_sets,
    test_sets=study.test_sets,
    present=study.test["present"],
    clusters=study.clusters,
    num_samples=study.config.study.num_samples,
  )


def _write(study: Study, report: shift.ShiftReport) -> None:
  found = report.to_dict()
  found["budget"] = shift_methods.budgets(study.config)
  _files.write_bytes(
    study.folder / "shift.json",
    (json.dumps(found, indent=2, allow_nan=False) + "\n").encode(),
  )
  _files.write_bytes(
    study.folder / "shift.txt", summary(study, report).encode()
  )
  drawn = {
    method: style.png(shift_plots.heat_map(report, method))
    for method in report.methods
  }
  for method, png in drawn.items():
    _files.write_bytes(study.folder / "plots" / f"shift_{method}.png", png)
  page = shift_page.render(
    report,
    title=f"Modality shift on {study.config.data.name}",
    drawn=drawn,
    notes=shift_methods.budget_lines(study.config),
  )
  _files.write_bytes(study.folder / "shift.html", page.encode())


def summary(study: Study, report: shift.ShiftReport) -> str:
  """The report's tables, what interventions gain, what each method passed."""
  lines = [report.table(), "", "times plain fine-tuning (pooled):"]
  for method in report.methods:
    if method == shift_methods.REFERENCE:
      continue
    cells = []
    for kind in report.categories:
      if report.num_pairs[kind]:
        found = report.improvement(method, shift_methods.REFERENCE, kind)
        cells.append(
          f"{kind} {found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
        )
    lines.append(f"  {method:14s} " + "  ".join(cells))
  return (
    "\n".join([*lines, "", *shift_methods.budget_lines(study.config)]) + "\n"
  )
