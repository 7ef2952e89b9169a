"""Examples that lie in a file each: scanned first, then read one by one.

``SOURCE`` holds ``classes.csv``, ``train.csv``, ``validation.csv``,
``test.csv`` and, for every line of a list, ``<split>/<stem>.npz`` with one
array a modality under its name. Shapes and dtypes are those of the first
training example, and the others must have them. Floats become float32, uint8
and uint16 are pixels or quantised values (divided by 255 or 65535 when read),
signed integers are tokens.

Nothing is decoded: frames are arrays already, and spectrograms are computed
already, at whatever rates; those are yours to keep alike.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from robust_mm import _validate
from robust_mm.data import archives
from robust_mm.data import registry
from robust_mm.data.builders import base
from robust_mm.data.builders import listing
from robust_mm.data.builders import raw

_KINDS = {"f": "floats", "u": "uint8 or uint16", "i": "signed integers"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """What a scan finds.

  Attributes:
    folder: the source.
    info: the registry's entry with shapes, stored dtypes, classes and sizes.
    rows: ``{split: rows}``.
  """

  folder: pathlib.Path
  info: registry.DatasetInfo
  rows: Mapping[str, list[listing.Row]]

  @property
  def metadata(self) -> dict:
    """What ``registry.layout`` reads of the prepared set."""
    return {
      "modalities": {
        name: {"shape": list(found.shape), "stored": found.stored}
        for name, found in self.info.modalities.items()
      },
      "class_names": list(self.info.class_names),
      "splits": dict(self.info.splits),
    }


class RecordsBuilder(base.Builder, skip_registration=True):
  """A TFDS builder that reads one npz file an example.

  Args:
    layout: of :func:`scan`.
    beam: make the records in an Apache Beam pipeline.
    **kwargs: of ``tfds.core.DatasetBuilder``.
  """

  FORM: ClassVar[listing.Form]

  def __init__(self, *, layout: Layout, beam: bool = False, **kwargs):
    self._layout, self._beam = layout, beam
    super().__init__(**kwargs)

  @property
  def dataset(self) -> registry.DatasetInfo:
    """The registry's entry, filled in by the scan."""
    return self._layout.info

  def _info(self) -> tfds.core.DatasetInfo:
    return self._described(tfds.core.MetadataDict(self._layout.metadata))

  def _split_generators(self, dl_manager):
    del dl_manager  # the scan has the folder
    return {
      split: self._generate_examples(split, rows)
      for split, rows in self._layout.rows.items()
    }

  def _generate_examples(self, split, rows):
    load = functools.partial(
      example, self._layout.folder / split, self._layout.info
    )
    if not self._beam:
      return map(load, rows)
    import apache_beam

    return apache_beam.Create(rows) | "load" >> apache_beam.Map(load)


def scan(
  info: registry.DatasetInfo, folder: pathlib.Path, form: listing.Form
) -> Layout:
  """Reads the lists, looks for every file, and opens the first one.

  Raises:
    UserError: one sentence naming file and line, or file and key.
  """
  raw.verify(folder, info.raw_files)
  classes = listing.read_classes(folder, form)
  rows = listing.read_rows(folder, form, classes)
  for split, listed in rows.items():
    if not (folder / split).is_dir():
      raise _validate.UserError(f"{folder / split} is missing.")
    there = set(os.listdir(folder / split))
    for row in listed:
      if f"{row.stem}.npz" not in there:
        raise _validate.UserError(
          f"{_file(folder / split, row)} is missing; {split}.csv names it."
        )
  return Layout(
    folder=folder,
    info=dataclasses.replace(
      info,
      modalities=_measure(info, _file(folder / "train", rows["train"][0])),
      num_classes=len(classes),
      class_names=tuple(classes.values()),
      splits={split: len(listed) for split, listed in rows.items()},
    ),
    rows=rows,
  )


def _measure(info, file: pathlib.Path) -> dict[str, registry.ModalityInfo]:
  """Shapes and stored dtypes of a file, which fit the kinds of modalities."""
  wanted = {name: found.shape for name, found in info.modalities.items()}
  arrays = raw.read(file, wanted)
  found = {}
  for name, array in arrays.items():
    tokens = info.modalities[name].kind == "tokens"
    form = archives.form(array.dtype)
    if array.dtype.kind not in ("i" if tokens else "fu") or form is None:
      kinds = "i" if tokens else "fu"
      allowed = ", ".join(_KINDS[kind] for kind in kinds)
      raise raw.error(file, name, f"must hold {allowed}, got {array.dtype}")
    if 0 in array.shape:
      raise raw.error(file, name, f"is empty: {list(array.shape)}")
    stored = form.dtype if form.divisor == 1.0 else str(array.dtype)
    found[name] = dataclasses.replace(
      info.modalities[name], shape=array.shape, stored=stored
    )
  return found


def example(
  folder: pathlib.Path, info: registry.DatasetInfo, row: listing.Row
) -> tuple[int, dict[str, Any]]:
  """``(id, features)`` of a row, checked; what a Beam worker runs.

  Raises:
    UserError: naming file and key: damaged, lacking a key, of another shape or
      dtype than the first example, a value that is not finite, a negative
      token.
  """
  file = _file(folder, row)
  arrays = raw.read(file, {n: m.shape for n, m in info.modalities.items()})
  inputs = {
    name: _values(file, name, array, info.modalities[name])
    for name, array in arrays.items()
  }
  if info.multi_label:
    label = np.zeros(info.num_classes, bool)
    label[list(row.classes)] = True
  else:
    label = np.int32(row.classes[0])
  return row.id, {"inputs": inputs, "label": label, "id": np.int32(row.id)}


def _values(file, name, array, modality) -> np.ndarray:
  stored = np.dtype(modality.stored)
  same = array.dtype == stored
  if array.dtype.kind != stored.kind or (stored.kind == "u" and not same):
    raise raw.error(
      file,
      name,
      f"is {array.dtype}, where the first training example is {stored}",
    )
  with np.errstate(over="ignore"):
    values = array.astype(stored)
  if stored.kind == "f" and not np.isfinite(values).all():
    raise raw.error(file, name, "has values that are NaN or infinite")
  if stored.kind == "i" and ((array < 0).any() or (values != array).any()):
    raise raw.error(file, name, "must hold token ids from 0 on, in int32")
  return values


def _file(folder: pathlib.Path, row: listing.Row) -> pathlib.Path:
  return folder / f"{row.stem}.npz"
