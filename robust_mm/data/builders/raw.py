"""Raw files: checksums, keys and shapes, refused by name when wrong."""

import hashlib
import pathlib
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np

from robust_mm import _validate

CHECKSUMS = "SHA256SUMS"


def verify(folder: pathlib.Path, files: tuple[str, ...]) -> None:
  """Refuses missing files, and damaged ones where ``SHA256SUMS`` is present."""
  if not folder.is_dir():
    raise _validate.UserError(f"source {folder} is not a folder.")
  for name in files:
    if not (folder / name).is_file():
      raise _validate.UserError(f"{folder / name} is missing.")
  sums = folder / CHECKSUMS
  if not sums.is_file():
    return
  expected = dict(
    reversed(line.split(maxsplit=1))
    for line in sums.read_text().splitlines()
    if len(line.split(maxsplit=1)) == 2
  )
  expected = {name.strip().lstrip("*"): s for name, s in expected.items()}
  for name in files:
    if name in expected and _sha256(folder / name) != expected[name].lower():
      raise _validate.UserError(
        f"{folder / name} is damaged: its SHA-256 differs from {CHECKSUMS}."
      )


def _sha256(file: pathlib.Path) -> str:
  with file.open("rb") as opened:
    return hashlib.file_digest(opened, "sha256").hexdigest()


def read(
  file: pathlib.Path, shapes: Mapping[str, tuple[int | None, ...]]
) -> dict[str, np.ndarray]:
  """The named arrays of an npz file; None in a shape is any length.

  Raises:
    UserError: the file cannot be read, a key is missing, or a shape differs.
  """
  arrays = {}
  try:
    with zipfile.ZipFile(file):  # np.load takes other files too
      pass
    with np.load(file, allow_pickle=False) as archive:
      for key, shape in shapes.items():
        if key not in archive:
          raise _validate.UserError(f"{file} has no key {key!r}.")
        arrays[key] = archive[key]
        _check_shape(file, key, arrays[key].shape, shape)
  except (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    OSError,
  ) as error:
    raise _validate.UserError(f"{file} cannot be read: {error}.") from error
  except ValueError as error:
    if isinstance(error, _validate.UserError):
      raise
    raise _validate.UserError(f"{file} cannot be read: {error}.") from error
  return arrays


def _check_shape(file, key, shape, expected) -> None:
  fits = len(shape) == len(expected) and all(
    b is None or a == b for a, b in zip(shape, expected)
  )
  if not fits:
    listed = ", ".join("n" if size is None else str(size) for size in expected)
    raise _validate.UserError(
      f"{file}: {key!r} must have shape [{listed}], got {list(shape)}."
    )


def check_codes(file: pathlib.Path, key: str, codes, size: int) -> None:
  """Refuses integers outside ``[0, size)``: labels, splits, row numbers."""
  if codes.dtype.kind not in "iu" or (
    codes.size and (codes.min() < 0 or codes.max() >= size)
  ):
    raise _validate.UserError(
      f"{file}: {key!r} must be integers from 0 to {size - 1}."
    )


def by_split(codes: np.ndarray, columns: Mapping) -> dict[str, dict]:
  """``{split: {feature: rows}}`` by split codes 0, 1, 2."""
  return {
    split: {name: values[codes == code] for name, values in columns.items()}
    for code, split in enumerate(("train", "validation", "test"))
  }


def error(file: pathlib.Path, key: str, problem: str) -> _validate.UserError:
  """The error that ``key`` of ``file`` has a problem, to be raised."""
  return _validate.UserError(f"{file}: {key!r} {problem}.")
