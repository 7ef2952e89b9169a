"""Bring your own data: npz files in a folder, refused by name when wrong.

A folder holds ``train.npz``, ``test.npz`` and, optionally, ``validation.npz``
(otherwise a stratified tenth of train is held out). Keys of each file:

- ``inputs/<modality>``: ``[n, ...]``, floats (become float32) or integers
  (become int32), any rank;
- ``label``: ``int[n]``, classes from 0;
- ``present/<modality>``, optional: ``bool[n]``. Values of absent entries are
  never read as data: they may be NaN and become zeros.
"""

import contextlib
import dataclasses
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from robust_mm import _validate
from robust_mm.data import registry
from robust_mm.data import sources

_INPUTS = "inputs/"
_PRESENT = "present/"


class _Header(NamedTuple):
  shape: tuple[int, ...]
  dtype: np.dtype


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

  Returns:
    The split; its ``notes`` say what was assumed. ``ids`` are row numbers of
    the file the examples come from.

  Raises:
    UserError: one sentence naming the file and the key.
  """
  registry.check_split(split)
  folder = _folder(path)
  headers = _headers(folder)
  _compare(folder, headers)
  available = _modalities(headers["train"])
  chosen = registry.choose_modalities(
    "arrays", available, available, modalities
  )
  held_out = "validation" not in headers
  file = "train" if held_out and split == "validation" else split
  if file not in headers:
    raise _validate.UserError(
      f"{folder / file}.npz is missing; arrays needs it for split {split!r}."
    )
  train_labels = _labels(folder, "train")
  labels = train_labels if file == "train" else _labels(folder, file)
  num_classes = _num_classes(folder, num_classes, train_labels)
  _check_classes(folder, file, labels, num_classes)
  source = _source(folder, file, headers[file], chosen, labels, num_classes)
  notes = _ignored(folder, headers)
  if held_out:
    train, validation = _hold_out(folder, train_labels)
    notes += (
      f"{folder / 'validation.npz'} is missing: a stratified tenth of "
      f"train.npz ({len(validation)} of {len(train_labels)} examples) is held "
      "out for validation.",
    )
    if file == "train":
      source = source.subset({"train": train, "validation": validation}[split])
  return dataclasses.replace(source, split=split, notes=notes)


def _folder(path) -> pathlib.Path:
  if not path:
    raise _validate.UserError(
      "arrays needs a path: the folder that holds train.npz and test.npz."
    )
  folder = pathlib.Path(path).expanduser()
  if not folder.is_dir():
    raise _validate.UserError(f"path {folder} is not a folder.")
  if not (folder / "train.npz").is_file():
    raise _validate.UserError(f"{folder / 'train.npz'} is missing.")
  return folder


@contextlib.contextmanager
def _readable(file: pathlib.Path) -> Iterator[None]:
  """Turns whatever a damaged archive raises into one sentence naming it."""
  try:
    yield
  except _validate.UserError:
    raise
  except (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    KeyError,
    NotImplementedError,
    OSError,
    ValueError,
  ) as error:
    raise _validate.UserError(f"{file} cannot be read: {error}.") from error


def _headers(folder: pathlib.Path) -> dict[str, dict[str, _Header]]:
  headers = {}
  for split in registry.SPLITS:
    file = folder / f"{split}.npz"
    if not file.is_file():
      continue
    with _readable(file), zipfile.ZipFile(file) as archive:
      headers[split] = {
        name.removesuffix(".npy"): _header(archive, name)
        for name in archive.namelist()
      }
  return headers


def _header(archive: zipfile.ZipFile, name: str) -> _Header:
  # Only the header is decompressed: a large file is compared at once.
  with archive.open(name) as member:
    version = np.lib.format.read_magic(member)
    read = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
      raise ValueError(f"{name} has the unsupported npy version {version}")
    shape, _, dtype = read(member)
  return _Header(shape, dtype)


def _modalities(header: dict[str, _Header]) -> tuple[str, ...]:
  return tuple(
    sorted(
      key.removeprefix(_INPUTS) for key in header if key.startswith(_INPUTS)
    )
  )


def _compare(folder, headers) -> None:
  """Refuses files whose keys, lengths, dtypes or shapes do not fit."""
  expected = headers["train"]
  for split, header in headers.items():
    file = folder / f"{split}.npz"
    _check_header(file, header)
    for name in _modalities(expected):
      key = _INPUTS + name
      if key not in header:
        raise _validate.UserError(
          f"{file} has no {key!r}, which train.npz has."
        )
      if header[key].shape[1:] != expected[key].shape[1:]:
        raise _validate.UserError(
          f"{file}: {key!r} has examples of shape {header[key].shape[1:]}, "
          f"but train.npz has {expected[key].shape[1:]}."
        )
      if _target(header[key].dtype) != _target(expected[key].dtype):
        raise _validate.UserError(
          f"{file}: {key!r} is {header[key].dtype}, but train.npz has "
          f"{expected[key].dtype}."
        )
    for name in _modalities(header):
      if _INPUTS + name not in expected:
        raise _validate.UserError(
          f"{file} has {_INPUTS + name!r}, which train.npz lacks."
        )


def _check_header(file: pathlib.Path, header: dict[str, _Header]) -> None:
  names = _modalities(header)
  if not names:
    raise _validate.UserError(f"{file} has no key 'inputs/<modality>'.")
  if "label" not in header:
    raise _validate.UserError(f"{file} has no key 'label'.")
  if len(header["label"].shape) != 1:
    raise _validate.UserError(
      f"{file}: 'label' must have shape [n], got {header['label'].shape}."
    )
  size = header["label"].shape[0]
  if size == 0:
    raise _validate.UserError(f"{file} holds no examples.")
  for key, (shape, dtype) in header.items():
    if not key.startswith((_INPUTS, _PRESENT)):
      continue
    if dtype.hasobject:
      raise _validate.UserError(
        f"{file}: {key!r} is an array of Python objects; give numbers."
      )
    if not shape or shape[0] != size:
      raise _validate.UserError(
        f"{file}: {key!r} has shape {shape}, but 'label' has {size} entries."
      )
    if key.startswith(_INPUTS) and dtype.kind not in "fiub":
      raise _validate.UserError(
        f"{file}: {key!r} must hold floats or integers, got {dtype}."
      )
    if key.startswith(_PRESENT):
      _check_presence_header(file, key, shape, dtype, names)


def _check_presence_header(file, key, shape, dtype, names) -> None:
  name = key.removeprefix(_PRESENT)
  if name not in names:
    raise _validate.UserError(
      f"{file}: {key!r} has no {_INPUTS + name!r} beside it."
      f"{_validate.suggestion(name, names)}"
    )
  if len(shape) != 1 or dtype.kind not in "biu":
    raise _validate.UserError(
      f"{file}: {key!r} must be booleans of shape [n], got {dtype} {shape}."
    )


def _target(dtype: np.dtype) -> np.dtype:
  return np.dtype("float32" if dtype.kind == "f" else "int32")


def _read(folder, split: str, key: str) -> np.ndarray:
  file = folder / f"{split}.npz"
  with _readable(file), np.load(file, allow_pickle=False) as archive:
    return archive[key]


def _labels(folder, split: str) -> np.ndarray:
  file = folder / f"{split}.npz"
  labels = _read(folder, split, "label")
  if labels.dtype.kind not in "iu":
    raise _validate.UserError(
      f"{file}: 'label' must be integers, got {labels.dtype}."
    )
  if labels.min() < 0:
    raise _validate.UserError(
      f"{file}: 'label' must not be negative, got {labels.min()} in row "
      f"{labels.argmin()}."
    )
  return labels


def _num_classes(folder, num_classes, train_labels) -> int:
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


def _check_classes(folder, split, labels, num_classes) -> None:
  if labels.max() >= num_classes:
    raise _validate.UserError(
      f"{folder / split}.npz: 'label' must be below num_classes "
      f"{num_classes}, got {labels.max()} in row {labels.argmax()}."
    )


def _source(folder, split, header, chosen, labels, num_classes):
  columns = {}
  present = {}
  for name in chosen:
    flags = None
    if _PRESENT + name in header:
      flags = _presence(folder, split, name)
    values = _values(folder, split, name, flags)
    columns[name] = sources.Column(array=values, dtype=str(values.dtype))
    present[name] = flags
  return sources.Source(
    name="arrays",
    split=split,
    columns=columns,
    present=present,
    labels=labels.astype(np.int32),
    ids=np.arange(len(labels), dtype=np.int32),
    num_classes=num_classes,
    value_range=dict.fromkeys(chosen),
  )


def _presence(folder, split, name) -> np.ndarray:
  flags = _read(folder, split, _PRESENT + name)
  if flags.dtype != bool and not np.isin(flags, (0, 1)).all():
    raise _validate.UserError(
      f"{folder / split}.npz: {_PRESENT + name!r} must hold True and False."
    )
  return flags.astype(bool)


def _values(folder, split, name, flags) -> np.ndarray:
  """The inputs as float32 or int32, absent ones zero, all finite."""
  raw = _read(folder, split, _INPUTS + name)
  if flags is not None:
    raw[~flags] = 0
  dtype = _target(raw.dtype)
  where = f"{folder / split}.npz: {_INPUTS + name!r}"
  if dtype.kind == "i":
    limits = np.iinfo(np.int32)
    if raw.size and (raw.min() < limits.min or raw.max() > limits.max):
      raise _validate.UserError(f"{where} does not fit into int32.")
    return raw.astype(dtype)
  with np.errstate(over="ignore"):
    values = raw.astype(dtype)
  finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
  if not finite.all():
    raise _validate.UserError(
      f"{where} is NaN or infinite in row {finite.argmin()} "
      f"({(~finite).sum()} such rows); mark missing examples in "
      f"{_PRESENT + name!r}."
    )
  return values


def _hold_out(folder, labels) -> tuple[np.ndarray, np.ndarray]:
  """Rows of train and of a stratified tenth, fixed for the same labels."""
  order = sources.balanced_order(labels, seed=0)
  tenth = []
  for value in np.unique(labels):
    rows = order[labels[order] == value]
    if len(rows) > 1:
      tenth.append(rows[: max(1, round(len(rows) / 10))])
  if not tenth:
    raise _validate.UserError(
      f"{folder / 'train.npz'} has one example a class, too few to hold out "
      "a validation set; add validation.npz."
    )
  validation = np.sort(np.concatenate(tenth))
  return np.setdiff1d(np.arange(len(labels)), validation), validation


def _ignored(folder, headers) -> tuple[str, ...]:
  notes = []
  for split, header in headers.items():
    for key in header:
      if key != "label" and not key.startswith((_INPUTS, _PRESENT)):
        known = ["label", *(k for k in headers["train"] if "/" in k)]
        known += [_PRESENT + name for name in _modalities(headers["train"])]
        hint = _validate.suggestion(key, [k for k in known if k != key])
        notes.append(f"{folder / split}.npz: key {key!r} is ignored.{hint}")
  return tuple(notes)
