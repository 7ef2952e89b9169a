"""A run's folder: who works in it, what it holds, how to load it back."""

import contextlib
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import ml_collections

from robust_mm import _files
from robust_mm import _validate
from robust_mm import config as config_lib

CONFIG_FILE = "config.json"
RUN_FILE = "run.json"
STUDY_FILE = "study.json"
LOCK_FILE = "lock"


@contextlib.contextmanager
def lock(workdir: pathlib.Path):
  """Holds the folder; UserError when another process does.

  An advisory lock of the operating system: it ends with the process, however
  that ends, so a killed run leaves nothing to clean up.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / LOCK_FILE).open("w") as file:
    if not _held(file):
      raise _validate.UserError(
        f"the work directory {workdir} is in use by another process."
      )
    yield


def _held(file) -> bool:
  """Whether the lock was got; a process just killed has a moment to go."""
  import fcntl

  for attempt in range(6):
    if attempt:
      time.sleep(0.05)
    with contextlib.suppress(OSError):
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return True
  return False


def check_free(workdir: pathlib.Path) -> None:
  """UserError when another process holds the folder; makes nothing."""
  if (workdir / LOCK_FILE).is_file():
    with lock(workdir):
      return


def check_config(
  workdir: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
  """UserError when the folder holds a study, or a run of another config."""
  if (workdir / STUDY_FILE).is_file():
    raise _validate.UserError(
      f"the work directory {workdir} holds a study, which robust-mm shift goes "
      "on with; choose another --workdir."
    )
  path = workdir / CONFIG_FILE
  if not path.is_file():
    return
  given = flatten(json.loads(config.to_json()))
  # What an earlier version did not state was as it is by default.
  default = flatten(json.loads(config_lib.default().to_json()))
  stored = {
    **{key: default[key] for key in _SINCE},
    **flatten(read_json(path)),
  }
  keys = stored.keys() | given.keys()
  for key in sorted(keys, key=lambda key: (key not in _SAID_FIRST, key)):
    if key.startswith(_MAY_CHANGE) and key not in _MAY_NOT_CHANGE:
      continue
    if stored.get(key) != given.get(key) and not _same(key, stored, given):
      raise _validate.UserError(
        f"the work directory {workdir} holds a run of another configuration: "
        f"config.{key} is {stored.get(key)!r} there and {given.get(key)!r} "
        f"here; choose another --workdir."
      )


def check_no_run(workdir: pathlib.Path) -> None:
  """UserError when the folder holds a single run, where a study would lie."""
  if (workdir / CONFIG_FILE).is_file():
    raise _validate.UserError(
      f"the work directory {workdir} holds a single run, and a study needs a "
      "folder of its own; choose another --workdir."
    )


def save_config(
  workdir: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
  """Stores the configuration, unless the folder holds another run."""
  check_config(workdir, config)
  tree = json.loads(config.to_json())
  # A user's own options may be infinite.
  _files.write_json(workdir / CONFIG_FILE, tree, sort_keys=True, allow_nan=True)


def relocate_start(
  workdir: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
  """Names the new place of what a run started from, where both were moved.

  That is a finished run in a folder of the same name, and of the same
  configuration as the old one if that is still there; else nothing is done.

  Raises:
    UserError: anything else of the configuration differs.
  """
  path = workdir / CONFIG_FILE
  if not path.is_file():
    return
  tree = read_json(path)
  old, new = (
    pathlib.Path(x) for x in (tree.get("init_from", ""), config.init_from)
  )
  if old == new or old.parts[-2:] != new.parts[-2:] or not has_ended(new):
    return
  if (old / CONFIG_FILE).is_file():
    first, second = (read_json(place / CONFIG_FILE) for place in (old, new))
    if first != second:
      return
  unmoved = config.copy_and_resolve_references()
  unmoved.init_from = str(old)
  check_config(workdir, unmoved)
  tree["init_from"] = str(new)
  _files.write_json(path, tree, sort_keys=True, allow_nan=True)


def save_facts(workdir: pathlib.Path, facts: dict) -> None:
  """Stores what ``describe`` gives back."""
  # A validation loss may be NaN.
  _files.write_json(workdir / RUN_FILE, facts, sort_keys=True, allow_nan=True)


# What may differ between the parts of a resumed run. The units decide the
# validation score, so they may not.
_SAID_FIRST = ("data.name", "recipe.name")  # of several differences
_MAY_CHANGE = ("evaluation.", "mesh.", "training.")
_MAY_NOT_CHANGE = (
  "evaluation.units",
  "training.average_decay",
  "training.eval_every",
)
# Keys that runs of earlier versions, which may be resumed, do not state.
_SINCE = (
  "data.labelled",
  "data.train_splits",
  "data.unlabelled_ratio",
  "data.unlabelled_splits",
  "init_from",
  "init_phase",
  "training.average_decay",
)


def _same(key: str, stored: Mapping, given: Mapping) -> bool:
  """Whether the two mean one thing, said differently by another version."""
  # Captioners were selected by accuracy, and "auto" is another metric now.
  if key != "selection.metric" or given["recipe.name"] == "captioning":
    return False
  return {stored.get(key), given[key]} == {"accuracy", "auto"}


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
  """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat.update(flatten(value, f"{prefix}{key}."))
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """The configuration of a run; UserError when there is none."""
  path = workdir / CONFIG_FILE
  if (workdir / STUDY_FILE).is_file():
    raise _validate.UserError(
      f"{workdir} holds a study of robust-mm shift, no single run: its results "
      f"are in {workdir / 'shift.html'}, its runs are the folders "
      f"{workdir / 'runs' / 'METHOD' / 'TRAINED_ON' / 'SEED'}."
    )
  if not path.is_file():
    inside = sorted(p.parent.name for p in workdir.glob(f"*/{CONFIG_FILE}"))
    hint = f" Did you mean {workdir / inside[0]}?" if inside else ""
    raise _validate.UserError(
      f"{workdir} is no work directory of a run: it has no {CONFIG_FILE}.{hint}"
    )
  tree = read_json(path)
  return ml_collections.ConfigDict(_tuples(tree)).lock()


def _tuples(value):
  # JSON has no tuples, and the configuration has no lists.
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  if isinstance(value, list):
    return tuple(_tuples(item) for item in value)
  return value


def read_json(path: pathlib.Path) -> Any:
  """A JSON file; UserError naming it when it is damaged."""
  try:
    return json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise _validate.UserError(f"{path} is damaged: {error}.") from error


def has_ended(workdir: pathlib.Path) -> bool:
  """Whether every phase of the run has ended."""
  if not (workdir / CONFIG_FILE).is_file():
    return False
  facts = describe(workdir)
  return all(p["name"] in facts["finished"] for p in facts["phases"])


def task(facts: dict) -> str:
  """The task, as ``Model.task`` says it; runs of old do not."""
  return facts.get("task", "classification")


def describe(workdir: pathlib.Path) -> dict:
  """``run.json``: data set facts, normalisation, finished phases."""
  path = workdir / RUN_FILE
  if not path.is_file():
    raise _validate.UserError(
      f"{workdir} has no {RUN_FILE}: the run there never started training."
    )
  return read_json(path)
