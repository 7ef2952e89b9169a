"""Prepared data sets: made once from raw files, opened in a moment.

A prepared set is an ordinary TFDS data set in array_record files, one record
an example. Beside the records lie ``columns/*.npy``, the same values stacked
(each distinct row once), so that opening 55,000 pairs takes no decoding. The
columns carry checksums; missing or damaged ones are made again from the
records. Sets that say their own shapes (``DatasetInfo.measured``) may be larger
than the memory: ``mapped`` writes and opens their columns.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import sys
import tempfile
import zlib
from collections.abc import Sequence

import numpy as np

from robust_mm import _validate
from robust_mm.data import archives
from robust_mm.data import beam as beam_lib
from robust_mm.data import mapped
from robust_mm.data import registry
from robust_mm.data import sources

_COLUMNS = "columns"
_MANIFEST = "manifest.json"
_CHUNK = 1024


def prepare(
  name: str,
  source: str | os.PathLike,
  data_dir: str | os.PathLike | None = None,
  overwrite: bool = False,
  progress: bool = True,
  beam: Sequence[str] | None = None,
) -> pathlib.Path:
  """Turns the raw files of a data set into array_record files, once.

  Everything is made in a temporary folder and renamed at the end, so an
  interrupted run leaves nothing half-written.

  Args:
    name: a prepared set, such as ``"utd_mhad"`` or ``"av_digits/hard"``.
    source: folder of the raw files, the lists or npz files checked against
      ``SHA256SUMS`` if it holds one.
    data_dir: default ``ROBUST_MM_DATA_DIR``, else ``~/.cache/robust_mm``.
    overwrite: make it again even if it is there.
    progress: show progress bars where standard error is a terminal.
    beam: options of an Apache Beam pipeline, such as ``["--runner=...",
      "--temp_location=..."]``, that makes the records, for the sets with a file
      an example (``audioset``, ``imagenet_captions``, ``kinetics``); ``[]``
      for one on this machine, None for no pipeline. Workers must see ``source``
      and ``data_dir`` under the same names.

  Returns:
    The folder of the prepared set; returned as it is when already there.

  Raises:
    UserError: unknown name, missing or damaged raw file, unwritable folder;
      ``beam`` without apache_beam, or for another set.
  """
  from robust_mm.data.builders import raw

  info = registry.get(name)
  if info.kind != "prepared":
    raise _validate.UserError(f"Data set {name!r} needs no preparation.")
  root = registry.data_dir(data_dir)
  target = root / info.folder
  if is_prepared(name, data_dir) and not overwrite:
    return target
  source = pathlib.Path(source).expanduser().absolute()
  beam_lib.check(info, beam)
  raw.verify(source, info.raw_files)
  make, info = _maker(info, source, beam)
  try:
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".prepare-") as scratch:
      scratch = pathlib.Path(scratch)
      _write_records(make, source, scratch, progress, beam)
      made = scratch / info.folder
      _write_columns(info, made, progress)
      _install(made, target, scratch)
  except OSError as error:
    raise _validate.UserError(
      f"Cannot write data set {name!r} to {root}: {error}."
    ) from error
  return target


def is_prepared(name: str, data_dir: str | os.PathLike | None = None) -> bool:
  """Whether a call of :func:`prepare` has ended there.

  Raises:
    UserError: an unknown name.
  """
  return _complete(registry.data_dir(data_dir) / registry.get(name).folder)


def _complete(folder: pathlib.Path) -> bool:
  return (folder / registry.MARKER).is_file()


def open_prepared(
  info: registry.DatasetInfo,
  split: str,
  path: str | os.PathLike | None,
  modalities: Sequence[str],
) -> sources.Source:
  """A split of a prepared set; only the chosen modalities are read."""
  folder = registry.prepared_path(info.name, path)
  info = describe(info, path)
  features = _features(info, modalities)
  if info.measured:
    columns = _read_mapped(info, folder, split, features)
    return _source(info, split, modalities, columns)
  columns = _read_columns(folder, split, features)
  if columns is None:
    every_split = read_records(folder, progress=True)
    # A read-only data directory is no obstacle, only slower.
    with contextlib.suppress(OSError):
      write_columns(folder, every_split, folder)
    columns = {name: (every_split[split][name], None) for name in features}
  return _source(info, split, modalities, columns)


def check_prepared(
  info: registry.DatasetInfo, path: str | os.PathLike | None = None
) -> None:
  """UserError with the command to run, if the set is not prepared."""
  registry.prepared_path(info.name, path)


def describe(
  info: registry.DatasetInfo, path: str | os.PathLike | None = None
) -> registry.DatasetInfo:
  """The entry with shapes, dtypes, ranges, classes and sizes of the records.

  It changes nothing but a measured set, which must be prepared.
  """
  if not info.measured:
    return info
  found = registry.layout(info.name, path)
  made = {}
  for name, modality in info.modalities.items():
    stored = found["modalities"][name]["stored"]
    form = archives.form(np.dtype(stored))
    made[name] = dataclasses.replace(
      modality,
      shape=tuple(found["modalities"][name]["shape"]),
      stored=stored,
      dtype=form.dtype,
      divisor=form.divisor,
      value_range=form.value_range,
    )
  return dataclasses.replace(
    info,
    modalities=made,
    class_names=tuple(found["class_names"]),
    splits=found["splits"],
    num_classes=len(found["class_names"]),
  )


def _features(info, modalities) -> tuple[str, ...]:
  return (
    "label",
    "id",
    *(f"inputs/{name}" for name in modalities),
    *(f"metadata/{name}" for name in info.metadata),
  )


def _source(info, split, modalities, columns) -> sources.Source:
  def whole(name):
    values, index = columns[name]
    return values if index is None else values[index]

  inputs = {}
  for name in modalities:
    modality = info.modalities[name]
    values, index = columns[f"inputs/{name}"]
    inputs[name] = sources.Column(
      array=values,
      index=index,
      divisor=modality.divisor,
      dtype=modality.dtype,
    )
  return sources.Source(
    name=info.name,
    split=split,
    columns=inputs,
    present=dict.fromkeys(modalities),
    labels=whole("label"),
    ids=whole("id"),
    num_classes=info.num_classes,
    value_range={m: info.modalities[m].value_range for m in modalities},
    metadata={name: whole(f"metadata/{name}") for name in info.metadata},
    notes=info.notes,
  )


def _maker(info, source, beam):
  """``(data_dir -> builder, the entry filled in)``; the lists are read."""
  from robust_mm.data import builders
  from robust_mm.data.builders import records

  made = builders.builder_class(info.name)
  given = {"file_format": "array_record"}
  if info.measured:
    layout = records.scan(info, source, made.FORM)
    given |= {"layout": layout, "beam": beam is not None}
    info = layout.info
  else:
    given |= {"config": info.config or None}
  return functools.partial(made, **given), info


def _write_records(make, source, data_dir, progress, beam) -> None:
  import tensorflow_datasets as tfds

  builder = make(data_dir=data_dir)
  config = tfds.download.DownloadConfig(
    manual_dir=source,
    compute_stats=tfds.download.ComputeStatsMode.SKIP,
    **beam_lib.download_config(beam),
  )
  # TFDS announces a download to standard output; nothing is downloaded.
  quiet = contextlib.redirect_stdout(io.StringIO())
  with beam_lib.refusals(beam), _bars(progress), quiet:
    builder.download_and_prepare(download_config=config)


@contextlib.contextmanager
def _bars(progress: bool):
  """TFDS progress bars on a terminal only."""
  import tensorflow_datasets as tfds

  shown = progress and sys.stderr.isatty()
  (tfds.enable_progress_bar if shown else tfds.disable_progress_bar)()
  try:
    yield
  finally:
    tfds.enable_progress_bar()


def _write_columns(info, made, progress) -> None:
  if info.measured:
    mapped.write(made, info, progress)
  else:
    write_columns(made, read_records(made, progress), made)


def _read_mapped(info, folder, split, features):
  """``{feature: (rows, None)}``, made again where they are not whole."""
  columns = mapped.read(folder, split, features)
  if columns is None:
    try:
      mapped.write(folder, info, progress=True)
    except OSError as error:
      raise _validate.UserError(
        f"The columns of the data set in {folder} are not whole and cannot be "
        f"made again there: {error}."
      ) from error
    columns = mapped.read(folder, split, features)
  return {name: (values, None) for name, values in columns.items()}


def _install(made, target, scratch) -> None:
  target.parent.mkdir(parents=True, exist_ok=True)
  if target.exists():
    os.replace(target, scratch / "replaced")
  try:
    os.replace(made, target)
  except OSError:
    # Another process was quicker with the same result.
    if not _complete(target):
      raise


def read_records(
  folder: pathlib.Path, progress: bool = False
) -> dict[str, dict[str, np.ndarray]]:
  """``{split: {feature: [n, ...]}}`` from the array_record files, by id.

  Raises:
    UserError: a record file is missing or damaged.
  """
  import tensorflow_datasets as tfds
  import tqdm

  try:
    builder = tfds.builder_from_directory(folder)
    read = {}
    for split in registry.SPLITS:
      records = builder.as_data_source(split=split)
      starts = tqdm.tqdm(
        range(0, len(records), _CHUNK),
        desc=f"reading {split}",
        leave=False,
        disable=not (progress and sys.stderr.isatty()),
      )
      read[split] = _stack(records, starts)
  except (OSError, RuntimeError, ValueError, LookupError, zlib.error) as error:
    raise _validate.UserError(
      f"The prepared data set in {folder} is damaged ({error}); prepare it "
      "again with --overwrite."
    ) from error
  return read


def _stack(records, starts) -> dict[str, np.ndarray]:
  stacked = {}
  for start in starts:
    stop = min(start + _CHUNK, len(records))
    for offset, example in enumerate(records.__getitems__(range(start, stop))):
      for name, value in _flat(example):
        if name not in stacked:
          value = np.asarray(value)
          dtype = value.dtype if value.ndim else np.dtype("int32")
          stacked[name] = np.empty((len(records), *value.shape), dtype)
        stacked[name][start + offset] = value
  order = np.argsort(stacked["id"], kind="stable")
  return {name: values[order] for name, values in stacked.items()}


def _flat(example):
  for name, value in example.items():
    if isinstance(value, dict):
      yield from ((f"{name}/{inner}", v) for inner, v in value.items())
    else:
      yield name, value


def write_columns(folder, every_split, scratch_parent) -> None:
  """Writes ``columns/`` beside the records, by way of a temporary folder."""
  manifest = {}
  with tempfile.TemporaryDirectory(dir=scratch_parent, prefix=".") as scratch:
    made = pathlib.Path(scratch) / _COLUMNS
    made.mkdir()
    for split, columns in every_split.items():
      for name, values in columns.items():
        rows, index = _distinct(values)
        manifest[_file(split, name)] = _save(made, _file(split, name), rows)
        if index is not None:
          file = _file(split, name, "index")
          manifest[file] = _save(made, file, index)
    (made / _MANIFEST).write_text(json.dumps(manifest, indent=1))
    target = folder / _COLUMNS
    if target.exists():
      os.replace(target, pathlib.Path(scratch) / "replaced")
    os.replace(made, target)


def _file(split: str, feature: str, suffix: str = "rows") -> str:
  return f"{split}.{feature.replace('/', '.')}.{suffix}.npy"


def _save(folder: pathlib.Path, name: str, values: np.ndarray) -> int:
  np.save(folder / name, values)
  return zlib.crc32(np.ascontiguousarray(values))


def _distinct(values: np.ndarray):
  """``rows, index`` with ``rows[index] == values`` where rows recur a lot."""
  if values.ndim == 1:
    return values, None
  first = {}
  index = np.empty(len(values), np.int32)
  for position, row in enumerate(values):
    index[position] = first.setdefault(row.tobytes(), len(first))
  if 2 * len(first) > len(values):
    return values, None
  return values[np.unique(index, return_index=True)[1]], index


def _read_columns(folder, split, features):
  """``{feature: (rows, index | None)}``; None if any is missing or damaged."""
  columns = {}
  try:
    manifest = json.loads((folder / _COLUMNS / _MANIFEST).read_text())
    for name in features:
      index = None
      if _file(split, name, "index") in manifest:
        index = _load(folder, _file(split, name, "index"), manifest)
      columns[name] = (_load(folder, _file(split, name), manifest), index)
  except (OSError, ValueError, EOFError, KeyError):
    return None
  return columns


def _load(folder, name, manifest) -> np.ndarray:
  values = np.load(folder / _COLUMNS / name, allow_pickle=False)
  if zlib.crc32(np.ascontiguousarray(values)) != manifest[name]:
    raise ValueError(f"{name} is damaged.")
  return values
