"""Columns of sets that do not fit into memory: streamed out, mapped in.

The same ``columns/*.npy`` as of other prepared sets, but written a chunk of
records at a time, and opened memory-mapped. They are made again from the
records when a file is missing or its size or header is not the one written; a
flipped bit inside is not noticed, as it would be in the records. They take as
much of the disk as the arrays have bytes, beside the records, which are
compressed.
"""

import json
import os
import pathlib
import sys
import tempfile

import numpy as np

from robust_mm import _validate
from robust_mm.data import registry

FOLDER = "columns"
MANIFEST = "manifest.json"
CHUNK = 256


def write(
  folder: pathlib.Path, info: registry.DatasetInfo, progress: bool = False
) -> None:
  """Writes ``columns/`` beside the records, by way of a temporary folder.

  Args:
    folder: of the prepared set.
    info: filled in, as ``prepared.describe`` gives it.
    progress: bars where standard error is a terminal.

  Raises:
    UserError: records that are damaged, or tokens that training lacks.
  """
  manifest, largest = {}, {}
  with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
    made = pathlib.Path(scratch) / FOLDER
    made.mkdir()
    start = 0
    for split in registry.SPLITS:
      size = info.splits[split]
      columns = _create(made, split, size, info)
      _fill(folder, split, columns, start, progress)
      start += size
      largest[split] = {
        name: int(columns[f"inputs/{name}"].max())
        for name, found in info.modalities.items()
        if found.kind == "tokens"
      }
      for name, values in columns.items():
        values.flush()
        file = _name(split, name)
        manifest[file] = (made / file).stat().st_size
    _check_tokens(largest)
    (made / MANIFEST).write_text(json.dumps(manifest, indent=1))
    target = folder / FOLDER
    if target.exists():
      os.replace(target, pathlib.Path(scratch) / "replaced")
    os.replace(made, target)


def read(
  folder: pathlib.Path, split: str, features: tuple[str, ...]
) -> dict[str, np.ndarray] | None:
  """``{feature: [n, ...]}`` mapped from the disk; None if any is not whole.

  Labels and ids are read into memory.
  """
  columns = {}
  try:
    manifest = json.loads((folder / FOLDER / MANIFEST).read_text())
    for name in features:
      file = folder / FOLDER / _name(split, name)
      if file.stat().st_size != manifest[file.name]:
        return None
      mapped = np.load(file, mmap_mode="r", allow_pickle=False)
      columns[name] = mapped if "/" in name else np.array(mapped)
  except (OSError, ValueError, EOFError, KeyError):
    return None
  return columns


def _name(split: str, feature: str) -> str:
  return f"{split}.{feature.replace('/', '.')}.rows.npy"


def _create(made, split, size, info) -> dict[str, np.ndarray]:
  """Empty files of the split's columns, mapped."""
  forms = {
    f"inputs/{name}": (found.shape, found.stored)
    for name, found in info.modalities.items()
  }
  forms["id"] = (), "int32"
  forms["label"] = (), "int32"
  if info.multi_label:
    forms["label"] = (info.num_classes,), "bool"
  return {
    name: np.lib.format.open_memmap(
      made / _name(split, name), mode="w+", dtype=dtype, shape=(size, *shape)
    )
    for name, (shape, dtype) in forms.items()
  }


def _fill(folder, split, columns, start: int, progress: bool) -> None:
  """Every record at the row its id says; Beam writes them in any order."""
  import tensorflow_datasets as tfds
  import tqdm

  size = len(columns["id"])
  filled = np.zeros(size, bool)
  try:
    records = tfds.builder_from_directory(folder).as_data_source(split=split)
    chunks = tqdm.tqdm(
      range(0, len(records), CHUNK),
      desc=f"columns of {split}",
      leave=False,
      disable=not (progress and sys.stderr.isatty()),
    )
    for first in chunks:
      rows = range(first, min(first + CHUNK, len(records)))
      for example in records.__getitems__(rows):
        row = int(example["id"]) - start
        if not 0 <= row < size or filled[row]:
          raise ValueError(f"id {example['id']} is not expected in {split}")
        filled[row] = True
        columns["id"][row] = example["id"]
        columns["label"][row] = example["label"]
        for name, value in example["inputs"].items():
          columns[f"inputs/{name}"][row] = value
    if not filled.all():
      raise ValueError(f"{(~filled).sum()} records of {split} are missing")
  except (OSError, RuntimeError, ValueError, LookupError) as error:
    raise _validate.UserError(
      f"The prepared data set in {folder} is damaged ({error}); prepare it "
      "again with --overwrite."
    ) from error


def _check_tokens(largest) -> None:
  # An embedding has rows for the tokens of train only.
  for split, found in largest.items():
    for name, token in found.items():
      if token > largest["train"][name]:
        raise _validate.UserError(
          f"{split}: {name!r} has the token {token}, but the largest of train "
          f"is {largest['train'][name]}; make unknown tokens one id."
        )
