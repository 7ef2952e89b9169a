"""What can be refused before jax is imported: within half a second."""

import math
import pathlib
from collections.abc import Mapping
from collections.abc import Sequence

import ml_collections

from robust_mm import _files
from robust_mm import _tasks
from robust_mm import _validate
from robust_mm import config as config_lib
from robust_mm import config_checks
from robust_mm import data
from robust_mm import shift_methods
from robust_mm.training import runs
from robust_mm.training import starts


def check(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Refuses a run whose data or folder cannot be used.

  Raises:
    UserError: an unknown data set or modality, data that is not there or
      damaged, a folder in use or with another run.
  """
  workdir = pathlib.Path(workdir)
  _check_data(config, workdir)
  if config.evaluation.surrogate:
    _check_surrogate(
      config, config.evaluation.surrogate, "config.evaluation.surrogate"
    )
  starts.check(config)
  runs.check_config(workdir, config)
  runs.check_free(workdir)


def _check_data(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> None:
  """Refuses data that is not there, or not for the recipe."""
  if workdir.exists() and not workdir.is_dir():
    raise _validate.UserError(f"--workdir={workdir} is a file.")
  info = data.registry.get(config.data.name)
  wanted = tuple(config.data.modalities) or None
  if info.kind == "folder":
    task = data.arrays.check_arrays(config.data.path, modalities=wanted)
  else:
    task = info.task
    data.registry.choose_modalities(
      info.name, tuple(sorted(info.modalities)), info.default_modalities, wanted
    )
    if info.kind == "prepared":
      data.prepared.check_prepared(info, config.data.path or None)
  config_checks.check_task(config, task)


def check_study(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Refuses what is no study, or one whose runs cannot be made.

  Raises:
    UserError: one sentence.
  """
  if "study" not in config:
    raise _validate.UserError(
      "--config must have the group study (configs/shift.py): robust-mm train "
      "takes single runs."
    )
  workdir = pathlib.Path(workdir)
  shift_methods.check(config)
  if config.study.pretraining:
    before = shift_methods.pretraining(config)
    difference = starts.difference(before, config)
    if difference:
      raise _validate.UserError(
        f"config.study.pretraining: {config.study.pretraining} has another "
        f"model: {difference}."
      )
  _check_data(config, workdir)
  starts.check(config)
  runs.check_no_run(workdir)
  runs.check_free(workdir)


def check_run(
  workdir: str, split: str | None = None, *, argument: str = "--workdir"
) -> None:
  """Refuses a folder that holds no trained run, or lacks the split's data."""
  path = pathlib.Path(workdir)
  if not path.is_dir():
    raise _validate.UserError(f"{argument}={workdir} is no folder.")
  config = runs.read_config(path)
  facts = runs.describe(path)
  if not facts["finished"]:
    raise _validate.UserError(
      f"no phase of the run in {workdir} has ended yet; run the same "
      f"robust-mm train command again to go on."
    )
  if split and data.registry.get(config.data.name).kind == "folder":
    data.arrays.check_split(config.data.path, split)


def check_classes(workdir: str, what: str) -> None:
  """Refuses what is about classes, one an example, of a run of another task."""
  task = runs.task(runs.describe(pathlib.Path(workdir)))
  if task != _tasks.CLASSIFICATION:
    raise _validate.UserError(
      f"{what} needs a run that predicts classes, one an example; {workdir} "
      f"predicts {_tasks.PREDICTS[task]}."
    )


def check_surrogate(workdir: str, surrogate: str) -> None:
  """Refuses one that is no finished run, or that nobody would look at."""
  config = runs.read_config(pathlib.Path(workdir))
  _check_surrogate(config, surrogate, "--surrogate")


def _check_surrogate(config, surrogate: str, argument: str) -> None:
  # Runs of earlier versions state neither.
  settings = config.evaluation
  if not (
    settings.get("masking_thorough", False)
    and settings.get("masking_examples", 64)
  ):
    raise _validate.UserError(
      f"{argument} needs a run with config.evaluation.masking_thorough and "
      "masking_examples above 0: nothing else looks at its points."
    )
  check_run(surrogate, argument=argument)


def check_attack(name: str | None) -> None:
  """Refuses an attack that does not exist; None is the configuration's."""
  if name is not None:
    with _validate.user_errors():
      _validate.one_of(config_lib.ATTACKS, **{"--attack": name})


def check_certify(
  workdir: str,
  split: str,
  *,
  budgets: Sequence[Mapping[str, float]],
  max_missing: int,
  source: str | None,
  fidelity: str,
  output: str | None,
) -> None:
  """Refuses what cannot be asked of the certificates of a run."""
  check_run(workdir, split)
  path = pathlib.Path(workdir)
  check_classes(workdir, "robust-mm certify")
  names = tuple(sorted(runs.describe(path)["input_shapes"]))
  with _validate.user_errors():
    for budget in budgets:
      _validate.known(names, **{"--budget": budget})
  if max_missing > len(names):
    raise _validate.UserError(
      f"--max-missing must be at most {len(names)}, the number of modalities "
      f"({', '.join(names)}); got {max_missing}."
    )
  if fidelity == "published" and source == "global":
    raise _validate.UserError(
      "--fidelity=published estimates its constants from training data: leave "
      "--source=global out."
    )
  folder = pathlib.Path(output).parent if output else path
  if not folder.is_dir():
    raise _validate.UserError(f"--output: {folder} is no folder.")
  if output and pathlib.Path(output).is_dir():
    raise _validate.UserError(
      f"--output: {output} is a folder; name a file in it, such as rows.csv."
    )
  _check_writable(folder, "--output" if output else "--workdir")


def check_output(output: str) -> None:
  """Refuses a report where no file can be made; folders may be missing."""
  folder = pathlib.Path(output).absolute()
  while not folder.is_dir() and folder != folder.parent:
    folder = folder.parent
  _check_writable(folder, "--output")


def _check_writable(folder: pathlib.Path, option: str) -> None:
  reason = _files.refusal(folder)
  if reason is not None:
    raise _validate.UserError(
      f"{option}: no file can be written to {folder} ({reason})."
    )


def check_smoothing(
  given: Mapping,
  norm: str | None,
  workdir: str,
  *,
  source: str | None,
  budgets: Sequence[Mapping[str, float]],
  max_missing: int,
  fidelity: str,
  **_,
) -> None:
  """Refuses options that have nothing to say to each other."""
  if source != "smoothing":
    for name in given:
      raise _validate.UserError(
        f"--{name.replace('_', '-')} goes with --source=smoothing."
      )
    return
  if fidelity == "published":
    raise _validate.UserError("--fidelity=published: leave --source out.")
  if max_missing:
    raise _validate.UserError(
      "--max-missing does not go with --source=smoothing; --votes asks for "
      "modalities that are replaced."
    )
  if norm not in (None, "l2"):
    raise _validate.UserError(
      f"--norm={norm}: --source=smoothing certifies in l2 only."
    )
  if "votes" in given and len(given) > 1:
    other = min(set(given) - {"votes"}).replace("_", "-")
    raise _validate.UserError(f"--votes draws nothing: leave --{other} out.")
  check_run(workdir)
  names = tuple(sorted(runs.describe(pathlib.Path(workdir))["input_shapes"]))
  sigma, keep = given.get("sigma"), given.get("keep", {})
  sigma = sigma if isinstance(sigma, Mapping) else {}
  with _validate.user_errors():
    _validate.known(names, **{"--sigma": sigma, "--keep": keep})
  for name in sorted(set(sigma) & set(keep)):
    raise _validate.UserError(f"--sigma and --keep both name {name!r}.")
  if given.get("votes", 0) > len(names):
    raise _validate.UserError(
      f"--votes must be at most {len(names)}, the number of modalities."
    )
  _check_elements(budgets, keep)


def _check_elements(budgets, keep) -> None:
  for budget in budgets:
    for name, size in budget.items():
      if name in keep and not (math.isinf(size) or size == int(size)):
        raise _validate.UserError(
          f"--budget: {name}={size:g} must be a whole number of elements, "
          "because --keep names it."
        )


def check_visualize(
  workdir: str,
  split: str,
  output: str | None,
  *,
  modality: str,
  labels: Sequence[int] | None,
  mode: str,
  parameterization: str,
  **_,
) -> None:
  """Refuses what cannot be synthesised of a run."""
  check_run(workdir, split)
  check_classes(workdir, "robust-mm visualize")
  facts = runs.describe(pathlib.Path(workdir))
  with _validate.user_errors():
    _validate.known(sorted(facts["input_shapes"]), **{"--modality": [modality]})
  if facts["kinds"][modality] != "float":
    raise _validate.UserError(
      f"--modality: {modality!r} holds token ids, which have no gradient; use "
      "a modality of features."
    )
  for label in labels or ():
    if label >= facts["num_classes"]:
      raise _validate.UserError(
        f"--label must lie in 0..{facts['num_classes'] - 1}, got {label}."
      )
  if parameterization == "fourier" and mode == "in_place":
    raise _validate.UserError(
      "--parameterization=fourier: leave --mode=in_place out."
    )
  if output and not output.endswith(".png"):
    raise _validate.UserError(f"--output must end in .png, got {output}.")
  if output:
    check_output(output)


def check_evaluated(workdir: str) -> None:
  """Refuses a folder without results."""
  check_run(workdir)
  path = pathlib.Path(workdir)
  if not (path / "results.json").is_file():
    raise _validate.UserError(
      f"{workdir} has no results.json; run "
      f"robust-mm evaluate --workdir={workdir} first."
    )
