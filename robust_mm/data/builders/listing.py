"""The lists of an extraction: ``classes.csv`` and one csv file a split.

Refused by file, line and value when something is wrong; the arrays themselves
are of ``records``.
"""

import csv
import pathlib
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import NamedTuple

from robust_mm import _validate
from robust_mm.data import registry

CLASSES = "classes.csv"


class Row(NamedTuple):
  """An example before its arrays are read.

  Attributes:
    id: running number over train, validation and test.
    stem: name of its file, without the folder of the split and ``.npz``.
    classes: numbers of its classes.
  """

  id: int
  stem: str
  classes: tuple[int, ...]


class Form(NamedTuple):
  """How the lists of a data set are written.

  Attributes:
    key: column of ``classes.csv`` that lists name classes by.
    shown: column of ``classes.csv`` that people read; may be ``key``.
    columns: of the list of a split, which may have others.
    stem: ``stem(entry)``, the name of the file of a line; ValueError where the
      line has none.
    classes: ``classes(entry)``, the keys of its classes.
  """

  key: str
  shown: str
  columns: tuple[str, ...]
  stem: Callable[[Mapping[str, str]], str]
  classes: Callable[[Mapping[str, str]], Sequence[str]]


def read_classes(folder: pathlib.Path, form: Form) -> dict[str, str]:
  """``{key: shown name}`` in the order of ``classes.csv``.

  Raises:
    UserError: naming the file and the line; an index that is not 0, 1, 2, ...;
      a key twice; fewer than two classes.
  """
  file, classes = folder / CLASSES, {}
  for line, entry in _entries(file, ("index", form.key, form.shown)):
    if entry["index"] != str(len(classes)):
      raise _error(
        file, line, f"index must be {len(classes)}, got {entry['index']!r}"
      )
    if entry[form.key] in classes:
      raise _error(file, line, f"{form.key} {entry[form.key]!r} is there twice")
    classes[entry[form.key]] = entry[form.shown]
  if len(classes) < 2:
    raise _validate.UserError(f"{file} must list at least two classes.")
  return classes


def read_rows(
  folder: pathlib.Path, form: Form, classes: Mapping[str, str]
) -> dict[str, list[Row]]:
  """``{split: rows}`` of the three lists, in their order.

  Raises:
    UserError: naming the file and the line; an unknown class, with the nearest
      known one; an example that a list, or two, have twice; no class; a file
      name that would leave the folder; an empty list.
  """
  numbers = {key: number for number, key in enumerate(classes)}
  seen, rows = {}, {}
  for split in registry.SPLITS:
    file = folder / f"{split}.csv"
    rows[split] = []
    for line, entry in _entries(file, form.columns):
      stem = _stem(file, line, form, entry)
      if stem in seen:
        raise _error(file, line, f"{stem!r} is already in {seen[stem]}")
      seen[stem] = f"{file.name}, line {line}"
      found = tuple(
        _number(file, line, key, numbers) for key in form.classes(entry)
      )
      if not found:
        raise _error(file, line, f"{stem!r} has no class")
      rows[split].append(Row(len(seen) - 1, stem, found))
    if not rows[split]:
      raise _validate.UserError(f"{file} lists no examples.")
  return rows


def _number(file, line, key: str, numbers: Mapping[str, int]) -> int:
  if key not in numbers:
    near = _validate.suggestion(key, tuple(numbers)).strip()
    problem = f"there is no class {key!r} in {CLASSES}"
    raise _error(file, line, f"{problem}. {near}" if near else problem)
  return numbers[key]


def _stem(file, line, form: Form, entry: Mapping[str, str]) -> str:
  try:
    stem = form.stem(entry)
  except ValueError as error:
    raise _error(file, line, str(error)) from error
  if not stem or stem != pathlib.PurePath(stem).name or "\\" in stem:
    raise _error(file, line, f"{stem!r} is no file name")
  return stem


def _entries(file: pathlib.Path, columns: Sequence[str]):
  """``(line number, {column: text})`` of a csv file with a header.

  The header may be the last of several lines that begin with #, as in the
  lists that AudioSet publishes.
  """
  try:
    with file.open(newline="", encoding="utf-8") as opened:
      reader = csv.reader(opened, skipinitialspace=True, strict=True)
      header = None
      for cells in reader:
        if not cells:
          continue
        first = cells[0].lstrip()
        if header is None:
          names = [first.lstrip("# "), *cells[1:]]
          names = [name.strip() for name in names]
          if set(columns) <= set(names):
            header = names
            continue
          if first.startswith("#"):
            continue
          lacking = next(c for c in columns if c not in names)
          raise _validate.UserError(
            f"{file}: the header has no column {lacking!r}; it must have "
            f"{', '.join(dict.fromkeys(columns))}."
          )
        if len(cells) != len(header):
          raise _error(
            file,
            reader.line_num,
            f"{len(cells)} cells where the header has {len(header)}",
          )
        yield (
          reader.line_num,
          dict(zip(header, (cell.strip() for cell in cells))),
        )
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise _validate.UserError(f"{file} cannot be read: {error}.") from error
  if header is None:
    raise _validate.UserError(f"{file} has no header.")


def _error(file, line: int, problem: str) -> _validate.UserError:
  end = "" if problem.endswith("?") else "."
  return _validate.UserError(f"{file}, line {line}: {problem}{end}")
