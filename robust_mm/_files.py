"""Files that appear whole or not at all: bytes, JSON, CSV."""

import csv
import io
import json
import os
import pathlib
import tempfile
from typing import Any


def write_bytes(path: pathlib.Path, content: bytes) -> pathlib.Path:
  """Writes beside ``path``, then renames; a reader never sees a part.

  >>> import tempfile
  >>> path = pathlib.Path(tempfile.mkdtemp()) / "a" / "b.txt"
  >>> write_bytes(path, b"whole").read_text()
  'whole'
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    temporary.write_bytes(content)
    os.replace(temporary, path)
  except BaseException as error:
    temporary.unlink(missing_ok=True)
    if isinstance(error, OSError) and error.errno is not None:
      # Nobody asked for the temporary name.
      raise OSError(error.errno, error.strerror, str(path)) from error
    raise
  return path


def refusal(folder: pathlib.Path) -> str | None:
  """Why no file can be made in a folder, or None; leaves nothing there."""
  try:
    with tempfile.TemporaryFile(dir=folder):
      return None
  except OSError as error:
    return error.strerror or str(error)


def write_json(
  path: pathlib.Path,
  value: Any,
  *,
  sort_keys: bool = False,
  allow_nan: bool = False,
) -> pathlib.Path:
  """Strict JSON unless ``allow_nan``: ValueError for NaN and infinity."""
  text = json.dumps(value, indent=2, allow_nan=allow_nan, sort_keys=sort_keys)
  return write_bytes(path, (text + "\n").encode())


def write_columns(path: pathlib.Path, columns: dict) -> pathlib.Path:
  """A CSV file with one header line from ``{name: values [n]}``.

  Floats are written with nine digits, which is exact for float32.
  """
  buffer = io.StringIO(newline="")
  writer = csv.writer(buffer, lineterminator="\n")
  writer.writerow(columns)
  cells = [[_cell(item) for item in values] for values in columns.values()]
  writer.writerows(zip(*cells, strict=True))
  return write_bytes(path, buffer.getvalue().encode())


def _cell(item) -> str:
  item = item.item() if hasattr(item, "item") else item
  if isinstance(item, bool):
    return str(int(item))
  if isinstance(item, float):
    return f"{item:.9g}"
  return str(item)
