"""Bring your own data: npz files in a folder, refused by name when wrong.

A folder holds ``train.npz`` and, optionally, ``validation.npz`` (otherwise a
stratified tenth of train is held out) and ``test.npz`` (training does without
it, evaluation of the test split does not). Keys of each file:

- ``inputs/<modality>``: ``[n, ...]``, any rank. Floats are signals and become
  float32. uint8 and uint16 are pixels: divided by 255 or 65535, they become
  float32 in [0, 1], which is then the unit of budgets and radii. Signed
  integers are tokens and become int32. Booleans become 0 and 1 in float32;
- ``label``: ``int[n]``, classes from 0; or ``float[n]``, numbers to predict
  (regression); or ``[n, k]`` of 0 and 1, each of k classes there or not
  (multi-label); the same in every file;
- ``present/<modality>``, optional: ``bool[n]``. Values of absent entries are
  never read as data: they may be NaN and become zeros.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np

from robust_mm import _tasks
from robust_mm import _validate
from robust_mm.data import archives
from robust_mm.data import registry
from robust_mm.data import sources


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Folder:
  """A folder whose files fit together by their headers."""

  path: pathlib.Path
  headers: Mapping[str, Mapping[str, archives.Header]]
  modalities: tuple[str, ...]
  train_labels: np.ndarray
  num_classes: int  # 0: labels are numbers

  @property
  def task(self) -> str:
    """What the labels are of."""
    return _tasks.of_labels(self.train_labels, self.num_classes)

  @property
  def holds_out(self) -> bool:
    """Whether train.npz serves for validation as well."""
    return "validation" not in self.headers

  def file(self, split: str) -> str:
    """The split's file, named by its split; UserError if it is missing."""
    name = "train" if self.holds_out and split == "validation" else split
    if name not in self.headers:
      raise _validate.UserError(
        f"{self.path / name}.npz is missing; arrays needs it for split "
        f"{split!r}."
      )
    return name


def open_arrays(
  path: str | os.PathLike | None,
  split: str,
  *,
  modalities: Sequence[str] | str | None = None,
  num_classes: int | None = None,
) -> sources.Source:
  """One split of a folder of npz files, checked.

  All files present are compared by their headers, so a mis-shaped test file
  is refused before training starts; values are checked in the split opened.

  Args:
    path: the folder.
    split: ``"train"``, ``"validation"`` or ``"test"``.
    modalities: which to use, all by default.
    num_classes: k; by default the largest label of ``train.npz`` plus one.
      None for float labels, and for labels ``[n, k]``.

  Returns:
    The split; its ``notes`` say what was assumed. ``ids`` are row numbers of
    the file the examples come from.

  Raises:
    UserError: one sentence naming the file and the key.
  """
  registry.check_split(split)
  folder = _open(path, modalities, num_classes)
  file = folder.file(split)
  source = _source(folder, file)
  notes = _notes(folder)
  if folder.holds_out:
    rows = _hold_out(folder)
    classes = folder.task == _tasks.CLASSIFICATION
    how = "stratified" if classes else "random"
    notes += (
      f"{folder.path / 'validation.npz'} is missing: a {how} tenth of "
      f"train.npz ({len(rows['validation'])} of {len(folder.train_labels)} "
      "examples) is held out for validation.",
    )
    if file == "train":
      source = source.subset(rows[split])
  return dataclasses.replace(source, split=split, notes=notes)


def check_arrays(
  path: str | os.PathLike | None,
  *,
  modalities: Sequence[str] | str | None = None,
) -> str:
  """Reads every file there is, once, and refuses what ``open_arrays`` would.

  Also the test file, though training never opens it: what is wrong with it is
  better said before training than after. Arguments and errors are those of
  ``open_arrays``; returns the task that the labels are of.
  """
  folder = _open(path, modalities, None)
  for file in folder.headers:
    _source(folder, file)
  if folder.holds_out:
    _hold_out(folder)
  return folder.task


def check_split(path: str | os.PathLike | None, split: str) -> None:
  """Refuses a folder that lacks the split's file, by the headers alone."""
  _open(path, None, None).file(registry.check_split(split))


def _open(path, modalities, num_classes) -> _Folder:
  folder = archives.find_folder(path)
  headers = archives.read_headers(folder)
  available = archives.modalities(headers["train"])
  labels = _labels(folder, "train")
  return _Folder(
    path=folder,
    headers=headers,
    modalities=registry.choose_modalities(
      "arrays", available, available, modalities
    ),
    train_labels=labels,
    num_classes=_num_classes(folder, num_classes, labels),
  )


def _labels(folder: pathlib.Path, file: str) -> np.ndarray:
  labels = archives.read(folder, file, "label")
  if labels.ndim == 2:
    return _several(labels, f"{folder / file}.npz")
  if labels.dtype.kind == "f":
    return _numbers(labels, f"{folder / file}.npz")
  if labels.dtype.kind not in "iu":
    raise _validate.UserError(
      f"{folder / file}.npz: 'label' must be integers (classes) or floats "
      f"(numbers to predict), got {labels.dtype}."
    )
  if labels.min() < 0:
    raise _validate.UserError(
      f"{folder / file}.npz: 'label' must not be negative, got "
      f"{labels.min()} in row {labels.argmin()}."
    )
  return labels


def _numbers(labels: np.ndarray, where: str) -> np.ndarray:
  with np.errstate(over="ignore"):
    values = labels.astype(np.float32)
  finite = np.isfinite(values)
  if not finite.all():
    raise _validate.UserError(
      f"{where}: 'label' is NaN or infinite in row {finite.argmin()} "
      f"({(~finite).sum()} such rows); every example needs a number."
    )
  return values


def _several(labels: np.ndarray, where: str) -> np.ndarray:
  if labels.dtype.kind not in "biuf":
    raise _validate.UserError(
      f"{where}: 'label' [n, k] must hold 0 and 1, got {labels.dtype}."
    )
  good = ((labels == 0) | (labels == 1)).all(axis=1)
  if not good.all():
    raise _validate.UserError(
      f"{where}: 'label' [n, k] must hold 0 and 1, one for each class; row "
      f"{good.argmin()} ({(~good).sum()} such rows) has others."
    )
  return labels.astype(bool)


def _num_classes(folder, num_classes, train_labels) -> int:
  if train_labels.ndim == 2:
    if num_classes is not None:
      raise _validate.UserError(
        f"num_classes must be left out: 'label' in {folder / 'train.npz'} has "
        f"{train_labels.shape[1]} columns, one a class."
      )
    if train_labels.shape[1] < 2 or not train_labels.any():
      raise _validate.UserError(
        f"{folder / 'train.npz'}: 'label' [n, k] must have at least two "
        "columns and a 1."
      )
    return train_labels.shape[1]
  if train_labels.dtype.kind == "f":
    if num_classes is not None:
      raise _validate.UserError(
        f"num_classes must be left out: 'label' in {folder / 'train.npz'} is "
        "of floats, numbers to predict."
      )
    if np.ptp(train_labels) == 0:
      raise _validate.UserError(
        f"{folder / 'train.npz'}: 'label' holds one value only."
      )
    return 0
  if num_classes is not None:
    if num_classes < 2:
      raise _validate.UserError(
        f"num_classes must be at least 2, got {num_classes}."
      )
    return int(num_classes)
  largest = int(train_labels.max())
  if largest < 1:
    raise _validate.UserError(
      f"{folder / 'train.npz'}: 'label' holds one class only."
    )
  return largest + 1


def _source(folder: _Folder, file: str) -> sources.Source:
  """All examples of one file, checked."""
  labels = folder.train_labels
  if file != "train":
    labels = _labels(folder.path, file)
  dtype = sources.label_dtype(folder.task)
  labels = labels.astype(dtype, copy=False)
  classes = folder.task == _tasks.CLASSIFICATION
  if classes and labels.max() >= folder.num_classes:
    raise _validate.UserError(
      f"{folder.path / file}.npz: 'label' must be below num_classes "
      f"{folder.num_classes}, got {labels.max()} in row {labels.argmax()}."
    )
  columns, present, value_range = {}, {}, {}
  for name in folder.modalities:
    flags = None
    if archives.PRESENT + name in folder.headers[file]:
      flags = _presence(folder.path, file, name)
    columns[name], value_range[name] = _column(folder.path, file, name, flags)
    present[name] = flags
  return sources.Source(
    name="arrays",
    split=file,
    columns=columns,
    present=present,
    labels=labels,
    ids=np.arange(len(labels), dtype=np.int32),
    num_classes=folder.num_classes,
    value_range=value_range,
  )


def _presence(folder, file, name) -> np.ndarray:
  key = archives.PRESENT + name
  flags = archives.read(folder, file, key)
  if flags.dtype != bool and not np.isin(flags, (0, 1)).all():
    raise _validate.UserError(
      f"{folder / file}.npz: {key!r} must hold True and False."
    )
  return flags.astype(bool)


def _column(folder, file, name, flags):
  """(the inputs of a modality, absent ones zero; their range or None)."""
  key = archives.INPUTS + name
  raw = archives.read(folder, file, key)
  form = archives.form(raw.dtype)
  if flags is not None:
    raw[~flags] = 0
  # Pixels stay as they are stored, in a quarter of the memory.
  values = raw
  if form.divisor == 1.0:
    with np.errstate(over="ignore"):
      values = raw.astype(form.dtype)
  where = f"{folder / file}.npz: {key!r}"
  if raw.dtype.kind == "i" and not np.array_equal(values, raw):
    raise _validate.UserError(f"{where} does not fit into int32.")
  if raw.dtype.kind == "f":
    _check_finite(values, where, archives.PRESENT + name)
  column = sources.Column(array=values, divisor=form.divisor, dtype=form.dtype)
  return column, form.value_range


def _check_finite(values: np.ndarray, where: str, presence: str) -> None:
  finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
  if not finite.all():
    raise _validate.UserError(
      f"{where} is NaN or infinite in row {finite.argmin()} "
      f"({(~finite).sum()} such rows); mark missing examples in {presence!r}."
    )


def _hold_out(folder: _Folder) -> dict[str, np.ndarray]:
  """Rows of train and of a stratified tenth, fixed for the same labels.

  Of other tasks a random tenth.
  """
  labels = folder.train_labels
  if folder.task != _tasks.CLASSIFICATION:
    order = sources.fixed_order(labels)
    size = max(1, round(len(labels) / 10))
    return {
      "train": np.sort(order[size:]),
      "validation": np.sort(order[:size]),
    }
  order = sources.balanced_order(labels, seed=0)
  tenth = []
  for value in np.unique(labels):
    rows = order[labels[order] == value]
    if len(rows) > 1:
      tenth.append(rows[: max(1, round(len(rows) / 10))])
  if not tenth:
    raise _validate.UserError(
      f"{folder.path / 'train.npz'} has one example a class, too few to hold "
      "out a validation set; add validation.npz."
    )
  validation = np.sort(np.concatenate(tenth))
  train = np.setdiff1d(np.arange(len(labels)), validation)
  return {"train": train, "validation": validation}


def _notes(folder: _Folder) -> tuple[str, ...]:
  """What was assumed about the folder, the same for every split."""
  notes = []
  for name in folder.modalities:
    key = archives.INPUTS + name
    dtype = folder.headers["train"][key].dtype
    divisor = archives.form(dtype).divisor
    if divisor != 1.0:
      notes.append(
        f"{folder.path}: {key!r} is {dtype}, taken as pixels: divided by "
        f"{divisor:g}, so that its values, budgets and radii are in units of "
        "[0, 1]; save tokens as int32 instead."
      )
  if folder.task == _tasks.REGRESSION:
    dtype = folder.headers["train"]["label"].dtype
    notes.append(
      f"{folder.path}: 'label' is {dtype}, taken as numbers to predict "
      "(regression); save classes as integers instead."
    )
  if folder.task == _tasks.MULTI_LABEL:
    notes.append(
      f"{folder.path}: 'label' is [n, {folder.num_classes}], taken as "
      "several classes at once (multi-label)."
    )
  notes += _ignored(folder)
  if "test" not in folder.headers:
    notes.append(
      f"{folder.path / 'test.npz'} is missing: training does without it, "
      "robust-mm evaluate needs it, or --split=validation."
    )
  return tuple(notes)


def _ignored(folder: _Folder) -> list[str]:
  notes = []
  train = folder.headers["train"]
  for split, header in folder.headers.items():
    for key in header:
      if key != "label" and not key.startswith(
        (archives.INPUTS, archives.PRESENT)
      ):
        known = ["label", *(k for k in train if "/" in k)]
        known += [archives.PRESENT + n for n in archives.modalities(train)]
        hint = _validate.suggestion(key, [k for k in known if k != key])
        notes.append(
          f"{folder.path / split}.npz: key {key!r} is ignored.{hint}"
        )
  return notes
