"""Files that appear whole or not at all."""

import csv
import io
import json
import os
import pathlib
import tempfile
from typing import Any

from robust_mm.evaluation import protocol as protocol_lib


def write_bytes(path: pathlib.Path, content: bytes) -> pathlib.Path:
  """Writes beside ``path``, then renames; a reader never sees a part.

  >>> import tempfile
  >>> path = pathlib.Path(tempfile.mkdtemp()) / "a" / "b.txt"
  >>> write_bytes(path, b"whole").read_text()
  'whole'
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(
    dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
  )
  try:
    with os.fdopen(handle, "wb") as file:
      file.write(content)
    # mkstemp makes private files; a report is as readable as any other file.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    os.replace(temporary, path)
  except BaseException:
    pathlib.Path(temporary).unlink(missing_ok=True)
    raise
  return path


def write_json(path: pathlib.Path, value: Any) -> pathlib.Path:
  """Strict JSON: no NaN, no infinity."""
  text = json.dumps(
    protocol_lib.jsonable(value), indent=2, allow_nan=False, sort_keys=False
  )
  return write_bytes(path, (text + "\n").encode())


def write_columns(path: pathlib.Path, columns: dict) -> pathlib.Path:
  """A CSV file with one header line from ``{name: values [n]}``.

  Floats are written with nine digits, which is exact for float32.
  """
  buffer = io.StringIO(newline="")
  writer = csv.writer(buffer, lineterminator="\n")
  writer.writerow(columns)
  cells = [[_cell(item) for item in values] for values in columns.values()]
  writer.writerows(zip(*cells))
  return write_bytes(path, buffer.getvalue().encode())


def _cell(item) -> str:
  item = item.item() if hasattr(item, "item") else item
  if isinstance(item, bool):
    return str(int(item))
  if isinstance(item, float):
    return f"{item:.9g}"
  return str(item)
