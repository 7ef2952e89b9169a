"""Named data sets, found by name or refused with the closest one.

Imports nothing but the standard library, so that the command line can answer a
misspelt name at once.
"""

import json
import os
import pathlib

from robust_mm import _tasks
from robust_mm import _validate
from robust_mm.data import catalogue
from robust_mm.data import catalogue_large
from robust_mm.data.catalogue_entries import DatasetInfo
from robust_mm.data.catalogue_entries import ModalityInfo

__all__ = [
  "DATA_DIR_VARIABLE",
  "MARKER",
  "SPLITS",
  "DatasetInfo",
  "ModalityInfo",
  "check_split",
  "choose_modalities",
  "data_dir",
  "format_list",
  "get",
  "layout",
  "list_datasets",
  "of_builder",
  "prepared_path",
]

SPLITS = ("train", "validation", "test")
# The file TFDS writes last.
MARKER = "dataset_info.json"
DATA_DIR_VARIABLE = "ROBUST_MM_DATA_DIR"

# Where TFDS keeps what the records of a measured set say of themselves.
LAYOUT = "metadata.json"

_DATASETS = {
  info.name: info for info in (*catalogue.DATASETS, *catalogue_large.LARGE)
}


def list_datasets() -> tuple[str, ...]:
  """Every name ``get`` knows, sorted."""
  return tuple(sorted(_DATASETS))


def get(name: str) -> DatasetInfo:
  """The data set of that name; UserError with the closest name otherwise.

  >>> get("digits").num_classes
  10
  """
  if name not in _DATASETS:
    raise _validate.UserError(
      f"There is no data set {name!r}; known are {', '.join(list_datasets())}."
      f"{_validate.suggestion(name, list_datasets())}"
    )
  return _DATASETS[name]


def of_builder(builder_name: str, config: str) -> DatasetInfo:
  """The data set a TFDS builder makes in a configuration."""
  for info in _DATASETS.values():
    if (info.builder_name, info.config) == (builder_name, config):
      return info
  raise ValueError(f"No data set has builder {builder_name!r}, {config!r}.")


def check_split(split: str) -> str:
  """``split`` itself; UserError if it is none of ``SPLITS``."""
  if split not in SPLITS:
    hint = _validate.suggestion({"val": "validation"}.get(split, split), SPLITS)
    raise _validate.UserError(
      f"split must be one of {', '.join(SPLITS)}; got {split!r}.{hint}"
    )
  return split


def choose_modalities(
  info_name: str,
  available: tuple[str, ...],
  default: tuple[str, ...],
  modalities: tuple[str, ...] | list[str] | str | None,
) -> tuple[str, ...]:
  """The modalities asked for, sorted; UserError for an unknown name or none."""
  if modalities is None:
    return tuple(sorted(default))
  if isinstance(modalities, str):
    modalities = modalities.split(",")
  for name in modalities:
    if name not in available:
      raise _validate.UserError(
        f"Data set {info_name!r} has no modality {name!r}; it has "
        f"{', '.join(available)}.{_validate.suggestion(name, available)}"
      )
  if not modalities:
    raise _validate.UserError("modalities must name at least one modality.")
  return tuple(sorted(set(modalities)))


def data_dir(path: str | os.PathLike | None = None) -> pathlib.Path:
  """Where prepared sets live: ``path``, else the variable, else the cache.

  The variable is ``ROBUST_MM_DATA_DIR``, the cache ``~/.cache/robust_mm``.
  """
  named = path or os.environ.get(DATA_DIR_VARIABLE)
  return pathlib.Path(named or "~/.cache/robust_mm").expanduser().absolute()


def prepared_path(
  name: str, path: str | os.PathLike | None = None
) -> pathlib.Path:
  """The folder of a prepared set; UserError with the command that makes it."""
  info = get(name)
  folder = data_dir(path) / info.folder
  if not (folder / MARKER).is_file():
    raise _validate.UserError(
      f"Data set {name!r} is not prepared in {data_dir(path)}. Prepare it "
      f"once: robust-mm data prepare {name} --source=DIR"
      f"{f' --path={data_dir(path)}' if path else ''} (DIR holds "
      f"{', '.join(info.raw_files)})."
    )
  return folder


def layout(name: str, path: str | os.PathLike | None = None) -> dict:
  """What the records of a measured set say of themselves.

  ``{"modalities": {m: {"shape", "stored"}}, "class_names", "splits": {split:
  size}}``, as the builder wrote it.

  Raises:
    UserError: the set is not prepared, or the file is damaged.
  """
  file = prepared_path(name, path) / LAYOUT
  try:
    found = json.loads(file.read_text())
    found["modalities"], found["class_names"], found["splits"]
  except (OSError, ValueError, LookupError, TypeError) as error:
    raise _validate.UserError(
      f"{file} is damaged ({error!r}); prepare the data set again with "
      "--overwrite."
    ) from error
  return found


def format_list(path: str | os.PathLike | None = None) -> str:
  """All data sets as text, and which prepared ones are there."""
  lines = []
  for name in list_datasets():
    info = get(name)
    state = info.kind
    if info.kind == "prepared":
      there = (data_dir(path) / info.folder / MARKER).is_file()
      state = "prepared" if there else "not prepared"
    lines.append(f"{name} ({state}): {info.description}")
    if info.modalities:
      splits, num_classes = info.splits, info.num_classes
      if info.measured and state == "prepared":
        found = layout(name, path)
        splits, num_classes = found["splits"], len(found["class_names"])
      sizes = ", ".join(f"{size} {s}" for s, size in splits.items())
      sizes = sizes or "sizes are yours"
      listed = ", ".join(
        f"{modality}{'*' if modality in info.default_modalities else ''}"
        for modality in sorted(info.modalities)
      )
      task = "regression"
      if info.task != _tasks.REGRESSION:
        task = f"{num_classes or 'your'} classes"
        task += " (multi-label)" if info.multi_label else ""
      lines.append(f"  {task}; {sizes}; {listed}")
  lines.append("(* used by default)")
  return "\n".join(lines)
