"""What a study compares, on what; refused by key before anything is trained."""

import dataclasses
import json
import pathlib

import numpy as np

from robust_mm import _files
from robust_mm import _tasks
from robust_mm import _validate
from robust_mm import modalities
from robust_mm import shift_derived
from robust_mm import shift_methods
from robust_mm.evaluation import shift_scores
from robust_mm.training import recipe as recipe_lib
from robust_mm.training import runs
from robust_mm.training import setup as setup_lib
from robust_mm.training import sharding

Subset = tuple[str, ...]

RESULTS = "shift.json"
_MOST = 4  # modalities of which all sets are trained on
# Of a task; the first one where none is chosen.
_SCORES = {
  _tasks.CLASSIFICATION: ("accuracy", "balanced_accuracy", "macro_f1"),
  _tasks.MULTI_LABEL: shift_scores.MULTI_LABEL,
}


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
    score: what is measured, as ``evaluation.shift_report`` names it.
  """

  config: object
  folder: pathlib.Path
  names: Subset
  train_sets: tuple[Subset, ...]
  test_sets: tuple[Subset, ...]
  test: dict
  clusters: np.ndarray | None
  prior: np.ndarray
  score: str

  @property
  def seeds(self) -> range:
    """0, 1, ..."""
    return range(self.config.study.seeds)

  @property
  def reference_sets(self) -> tuple[Subset, ...]:
    """E that are no T: the reference is trained on them for s_ref(E -> E)."""
    return tuple(e for e in self.test_sets if e not in self.train_sets)

  def jobs(self) -> list[tuple[str, int, Subset]]:
    """``(method, seed, T)`` of every model, what is made of others last."""
    found = [
      (name, seed, train)
      for seed in self.seeds
      for name in self.config.study.methods
      for train in (
        *self.train_sets,
        *(self.reference_sets if name == shift_methods.REFERENCE else ()),
      )
    ]
    return sorted(found, key=lambda job: shift_methods.is_derived(job[0]))

  def place(self, method: str, train: Subset, seed: int) -> pathlib.Path:
    """The folder of one model, that of the reference where it is the same."""
    kind = shift_methods.METHODS[method]
    if isinstance(kind, shift_methods.Trained):
      if kind.oracle:
        train = self.names  # the same model whatever T is
      elif self.configured(method, train) == self.configured(
        shift_methods.REFERENCE, train
      ):
        method = shift_methods.REFERENCE
    name = modalities.subset_name(train)
    if isinstance(kind, shift_methods.Between):
      method = f"{method}-{self.config.study.alpha:g}"
    return self.folder / "runs" / method / name / str(seed)

  def configured(self, method: str, train: Subset):
    """The configuration of a trained method, but for seed and start."""
    return shift_methods.configured(self.config, method, train, self.names)

  def start(self, seed: int) -> pathlib.Path:
    """The folder of the pretraining that all runs of a seed start from."""
    return self.folder.resolve() / "pretraining" / str(seed)


def prepare(config, folder: pathlib.Path) -> Study:
  """Opens the data and checks what is asked; makes nothing.

  Raises:
    UserError: naming the key.
  """
  asked = config.study
  shift_methods.check(config)
  if config.data.labelled:
    raise _validate.UserError(
      "config.data.labelled must be left out: the study has all of "
      "config.study.train_sets in turn."
    )
  test = setup_lib.open_split(config, "test")
  if test.task not in _SCORES:
    raise _validate.UserError(
      f"config.data.name: robust-mm shift needs classes; the labels of "
      f"{config.data.name} are {_tasks.LABELS[test.task]}."
    )
  names = modalities.names(test.spec)
  train_sets = _sets("train_sets", asked.train_sets, names)
  test_sets = _sets("test_sets", asked.test_sets, names)
  _check_sets(train_sets, test_sets, asked.methods)
  label = setup_lib.open_split(config, "train").batch()["label"]
  study = Study(
    config=config,
    folder=pathlib.Path(folder),
    names=names,
    train_sets=train_sets,
    test_sets=test_sets,
    test=test.batch(),
    clusters=_clusters(test, asked.cluster),
    prior=shift_derived.log_prior(label, test.num_classes),
    score=_score(test.task, asked.score),
  )
  _check_recipes(study)
  _check_batches(study)
  _check_start(study)
  _check_kept(study)
  return study


def _score(task: str, asked: str) -> str:
  if asked == "auto":
    return _SCORES[task][0]
  with _validate.user_errors():
    _validate.one_of(("auto", *_SCORES[task]), **{"config.study.score": asked})
  return asked


def mark(study: Study) -> None:
  """Says in the folder that it is a study's, so that no run goes there."""
  tree = json.loads(study.config.to_json())
  _files.write_json(
    study.folder / runs.STUDY_FILE, tree, sort_keys=True, allow_nan=True
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


def _sets(key: str, given, names) -> tuple[Subset, ...]:
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
    if subset in found:
      raise _validate.UserError(
        f"{path} names {modalities.subset_name(subset)!r} twice."
      )
    found.append(subset)
  return tuple(found)


def _check_sets(train_sets, test_sets, methods) -> None:
  """Refuses an E that lacks what is measured against, or put together."""
  for subset in train_sets:
    if subset not in test_sets:
      name = modalities.subset_name(subset)
      raise _validate.UserError(
        f"config.study.test_sets must have {name!r}, which is one of "
        "config.study.train_sets: matched scores are what others are compared "
        "with."
      )
  derived = [shift_methods.METHODS[name] for name in methods]
  if not any(isinstance(m, shift_methods.Ensemble) for m in derived):
    return
  for name in sorted({name for subset in train_sets for name in subset}):
    # The reference, whose models are put together, is trained on every E.
    if (name,) not in test_sets:
      raise _validate.UserError(
        f"config.study.test_sets must have {name!r} alone for 'ensemble', "
        "which is made of models of one modality."
      )


def _check_recipes(study: Study) -> None:
  """Refuses options whose values the recipe of a method does not take."""
  config = study.config
  setup = setup_lib.prepare(config)
  for name in config.study.methods:
    if shift_methods.is_derived(name):
      continue
    made = study.configured(name, study.train_sets[0])
    try:
      recipe_lib.make(made, setup)
    except (TypeError, ValueError) as error:
      told = str(error).removeprefix(recipe_lib.OPTIONS)
      raise _validate.UserError(
        f"config.study.options.{name} (or config.recipe.options): {told}"
      ) from error


def _check_batches(study: Study) -> None:
  """Refuses batches that some method could not divide over the devices."""
  asked = study.config.mesh
  with _validate.user_errors():
    mesh = sharding.make_mesh(data=asked.data, model=asked.model)
  for name in study.config.study.methods:
    if shift_methods.is_derived(name):
      continue
    for train in study.train_sets:
      size = study.configured(name, train).data.batch_size
      try:
        sharding.check_batch_size(size, mesh)
      except ValueError as error:
        raise _validate.UserError(
          f"config.data.batch_size is {study.config.data.batch_size}, of which "
          f"{name} has {size} (config.study.equal_cost): {error}"
        ) from error


def _check_start(study: Study) -> None:
  """Refuses models that were pretrained otherwise than is asked now."""
  if not study.config.study.pretraining:
    return
  for seed in study.seeds:
    asked = shift_methods.pretraining(study.config, seed)
    try:
      runs.check_config(study.start(seed), asked)
    except _validate.UserError as error:
      raise _validate.UserError(f"config.study.pretraining: {error}") from error


def _check_kept(study: Study) -> None:
  """Refuses a study that would leave less on the page than there is."""
  path = study.folder / RESULTS
  if not path.is_file():
    return
  there = runs.read_json(path)
  asked = study.config.study
  lacking = {
    "methods": [m for m in there["methods"] if m not in asked.methods],
    **{
      key: [
        name
        for name in there[key]
        if name not in map(modalities.subset_name, getattr(study, key))
      ]
      for key in ("train_sets", "test_sets")
    },
  }
  for key, names in lacking.items():
    if names:
      raise _validate.UserError(
        f"config.study.{key} leaves out {', '.join(names)}, which the page of "
        f"the study in {study.folder} has: name them too, or choose another "
        "--workdir."
      )
  if asked.seeds < there["num_seeds"]:
    raise _validate.UserError(
      f"config.study.seeds is {asked.seeds}, and the page of the study in "
      f"{study.folder} has {there['num_seeds']}: ask for as many, or choose "
      "another --workdir."
    )
