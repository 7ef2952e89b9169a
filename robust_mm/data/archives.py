"""A folder of npz files: read by header, compared, refused by file and key."""

import contextlib
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from robust_mm import _validate
from robust_mm.data import registry

INPUTS = "inputs/"
PRESENT = "present/"


class Header(NamedTuple):
  """Shape and dtype of a stored array."""

  shape: tuple[int, ...]
  dtype: np.dtype


class Form(NamedTuple):
  """What stored inputs become: ``stored / divisor`` as ``dtype``.

  Attributes:
    dtype: ``"float32"``, or ``"int32"`` for tokens.
    divisor: 1 unless they are pixels.
    value_range: ``(low, high)`` that holds for every such array, or None.
  """

  dtype: str
  divisor: float = 1.0
  value_range: tuple[float, float] | None = None


def form(dtype: np.dtype) -> Form | None:
  """Floats are signals, signed integers tokens, uint8 and uint16 pixels.

  Booleans are signals of 0 and 1. None for a dtype that is none of these.

  >>> form(np.dtype("uint8"))
  Form(dtype='float32', divisor=255.0, value_range=(0.0, 1.0))
  """
  if dtype.kind == "f":
    return Form("float32")
  if dtype.kind == "i":
    return Form("int32")
  if dtype.kind == "b":
    return Form("float32", value_range=(0.0, 1.0))
  if dtype.kind == "u" and dtype.itemsize <= 2:
    return Form("float32", float(np.iinfo(dtype).max), (0.0, 1.0))
  return None


def find_folder(path: str | os.PathLike | None) -> pathlib.Path:
  """The folder, which holds ``train.npz`` at least; UserError otherwise."""
  if not path:
    raise _validate.UserError(
      "arrays needs a path, the folder that holds train.npz: "
      "--config.data.path=DIR of train, --path=DIR of data inspect."
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


def read(folder: pathlib.Path, split: str, key: str) -> np.ndarray:
  """One array; UserError naming the file if it is damaged."""
  file = folder / f"{split}.npz"
  with _readable(file), np.load(file, allow_pickle=False) as archive:
    return archive[key]


def read_headers(folder: pathlib.Path) -> dict[str, dict[str, Header]]:
  """``{split: {key: Header}}`` of the files there are, which fit together.

  Raises:
    UserError: keys, lengths, dtypes or shapes do not fit, by file and key.
  """
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
  _compare(folder, headers)
  return headers


def _header(archive: zipfile.ZipFile, name: str) -> Header:
  # Only the header is decompressed: a large file is compared at once.
  with archive.open(name) as member:
    version = np.lib.format.read_magic(member)
    read_header = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
      raise ValueError(f"{name} has the unsupported npy version {version}")
    shape, _, dtype = read_header(member)
  return Header(shape, dtype)


def modalities(header: dict[str, Header]) -> tuple[str, ...]:
  """Names below ``inputs/``, sorted."""
  return tuple(
    sorted(key.removeprefix(INPUTS) for key in header if key.startswith(INPUTS))
  )


def _compare(folder, headers) -> None:
  """Refuses files whose keys, lengths, dtypes or shapes do not fit."""
  expected = headers["train"]
  for split, header in headers.items():
    file = folder / f"{split}.npz"
    _check_header(file, header)
    _compare_labels(file, header["label"], expected["label"])
    for name in modalities(expected):
      key = INPUTS + name
      if key not in header:
        raise _validate.UserError(
          f"{file} has no {key!r}, which train.npz has."
        )
      if header[key].shape[1:] != expected[key].shape[1:]:
        raise _validate.UserError(
          f"{file}: {key!r} has examples of shape {header[key].shape[1:]}, "
          f"but train.npz has {expected[key].shape[1:]}."
        )
      if form(header[key].dtype) != form(expected[key].dtype):
        raise _validate.UserError(
          f"{file}: {key!r} is {header[key].dtype}, but train.npz has "
          f"{expected[key].dtype}; save both alike."
        )
    for name in modalities(header):
      if INPUTS + name not in expected:
        raise _validate.UserError(
          f"{file} has {INPUTS + name!r}, which train.npz lacks."
        )


def _rows(header: Header) -> str:
  return "[" + ", ".join(["n", *map(str, header.shape[1:])]) + "]"


def _compare_labels(file, found: Header, expected: Header) -> None:
  if found.shape[1:] != expected.shape[1:]:
    raise _validate.UserError(
      f"{file}: 'label' has shape {_rows(found)}, but train.npz has "
      f"{_rows(expected)}."
    )
  kinds = found.dtype.kind, expected.dtype.kind
  if len(found.shape) == 1 and "f" in kinds and kinds[0] != kinds[1]:
    raise _validate.UserError(
      f"{file}: 'label' is {found.dtype}, but train.npz has {expected.dtype}; "
      "save all as integers (classes) or all as floats (numbers to predict)."
    )


def _check_header(file: pathlib.Path, header: dict[str, Header]) -> None:
  names = modalities(header)
  if not names:
    raise _validate.UserError(f"{file} has no key 'inputs/<modality>'.")
  if "label" not in header:
    raise _validate.UserError(f"{file} has no key 'label'.")
  if len(header["label"].shape) not in (1, 2):
    raise _validate.UserError(
      f"{file}: 'label' must have shape [n], or [n, k] of several classes at "
      f"once, got {header['label'].shape}."
    )
  size = header["label"].shape[0]
  if size == 0:
    raise _validate.UserError(f"{file} holds no examples.")
  for key, (shape, dtype) in header.items():
    if not key.startswith((INPUTS, PRESENT)):
      continue
    if dtype.hasobject:
      raise _validate.UserError(
        f"{file}: {key!r} is an array of Python objects; give numbers."
      )
    if not shape or shape[0] != size:
      raise _validate.UserError(
        f"{file}: {key!r} has shape {shape}, but 'label' has {size} entries."
      )
    if key.startswith(INPUTS) and form(dtype) is None:
      raise _validate.UserError(
        f"{file}: {key!r} must hold floats (signals), uint8 or uint16 "
        f"(pixels) or signed integers (tokens), got {dtype}."
      )
    if key.startswith(PRESENT):
      _check_presence(file, key, shape, dtype, names)


def _check_presence(file, key, shape, dtype, names) -> None:
  name = key.removeprefix(PRESENT)
  if name not in names:
    raise _validate.UserError(
      f"{file}: {key!r} has no {INPUTS + name!r} beside it."
      f"{_validate.suggestion(name, names)}"
    )
  if len(shape) != 1 or dtype.kind not in "biu":
    raise _validate.UserError(
      f"{file}: {key!r} must be booleans of shape [n], got {dtype} {shape}."
    )
