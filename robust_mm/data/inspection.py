"""What a data set looks like: shapes, ranges, classes, missing values."""

import os

import numpy as np

from robust_mm import _tasks
from robust_mm import _validate
from robust_mm.data import opening
from robust_mm.data import prepared
from robust_mm.data import registry

_CHUNK = 2048


def inspect(name: str, path: str | os.PathLike | None = None) -> dict:
  """Measures all modalities and splits of a data set.

  Args:
    name: of the data set.
    path: as for ``open_source``.

  Returns:
    A JSON-able dict: ``name``, ``description``, ``origin``, ``licence``,
    ``citation``, ``default_modalities``, ``num_classes``, ``class_names``,
    ``modalities`` {m: ``shape``, ``dtype``, ``kind``, ``unit``,
    ``value_range`` (declared), ``min``, ``max``, ``mean``, ``std`` (measured
    over present training examples), ``missing`` {split: share}}, ``splits``
    {split: ``size``, and ``class_counts`` (of several labels also
    ``labels_per_example``, a mean) or, of a regression, ``label`` {``min``,
    ``max``, ``mean``, ``std``}}, ``notes``.
  """
  info = prepared.describe(registry.get(name), path)
  everything = tuple(sorted(info.modalities)) or None
  splits = {}
  for split in registry.SPLITS:
    try:
      splits[split] = opening.open_source(
        name, split, path=path, modalities=everything
      )
    except _validate.UserError:
      # Your own folder may lack a test file; anything else is a mistake.
      if not _lacks_test(info, split, path):
        raise
  train = splits["train"]
  notes = dict.fromkeys(note for s in splits.values() for note in s.notes)
  return {
    "name": name,
    "description": info.description,
    "origin": str(path) if info.kind == "folder" else info.origin,
    "licence": info.licence,
    "citation": info.citation,
    "default_modalities": list(info.default_modalities or train.modalities),
    "num_classes": train.num_classes,
    "class_names": list(info.class_names),
    "modalities": {m: _modality(info, m, splits) for m in train.modalities},
    "splits": {
      split: {"size": len(source), **_labels(source)}
      for split, source in splits.items()
    },
    "notes": list(dict.fromkeys((*info.notes, *notes))),
  }


def _labels(source) -> dict:
  if source.task == _tasks.MULTI_LABEL:
    return {
      "class_counts": source.labels.sum(axis=0).tolist(),
      "labels_per_example": float(source.labels.sum(axis=1).mean()),
    }
  if source.task == _tasks.CLASSIFICATION:
    counts = np.bincount(source.labels, minlength=source.num_classes)
    return {"class_counts": counts.tolist()}
  labels = source.labels.astype(np.float64)
  names = ("min", "max", "mean", "std")
  return {"label": {name: float(getattr(labels, name)()) for name in names}}


def _lacks_test(info, split, path) -> bool:
  if info.kind != "folder" or split != "test" or not path:
    return False
  return not os.path.exists(os.path.join(path, "test.npz"))


def _modality(info, name, splits) -> dict:
  declared = info.modalities.get(name)
  train = splits["train"]
  value_range = train.value_range[name]
  column = train.columns[name]
  kind = "tokens" if train.spec[name].dtype.kind == "i" else ""
  unit = ""
  if column.divisor != 1.0:
    unit = f"pixels, stored as {column.array.dtype}, / {column.divisor:g}"
  return {
    "shape": list(train.spec[name].shape),
    "dtype": str(train.spec[name].dtype),
    "kind": declared.kind if declared else kind,
    "unit": declared.unit if declared else unit,
    "value_range": None if value_range is None else list(value_range),
    **_statistics(train.select((name,)), name),
    "missing": {split: _missing(s, name) for split, s in splits.items()},
  }


def _missing(source, name) -> float:
  flags = source.present[name]
  return 0.0 if flags is None else float(1.0 - flags.mean())


def _statistics(source, name) -> dict:
  low, high, total, squares, count = np.inf, -np.inf, 0.0, 0.0, 0
  for start in range(0, len(source), _CHUNK):
    rows = np.arange(start, min(start + _CHUNK, len(source)))
    batch = source.take(rows)
    values = batch["inputs"][name][batch["present"][name]]
    if values.size:
      low = min(low, float(values.min()))
      high = max(high, float(values.max()))
      total += float(values.sum(dtype=np.float64))
      squares += float(np.square(values, dtype=np.float64).sum())
      count += values.size
  if not count:
    return dict.fromkeys(("min", "max", "mean", "std"))
  mean = total / count
  variance = max(squares / count - mean**2, 0.0)
  return {"min": low, "max": high, "mean": mean, "std": variance**0.5}


def format_inspection(inspection: dict) -> str:
  """The result of ``inspect`` as text for a terminal."""
  lines = [f"{inspection['name']}: {inspection['description']}"]
  for key in ("origin", "licence", "citation"):
    if inspection[key]:
      lines.append(f"{key}: {inspection[key]}")
  lines += ["", "splits"]
  for split, entry in inspection["splits"].items():
    lines.append(
      f"  {split:<11} {entry['size']:>6} examples, {_format_labels(entry)}"
    )
  lines += ["", "modalities (* used by default; statistics of train)"]
  for name, entry in inspection["modalities"].items():
    lines += _format_modality(name, entry, inspection)
  if inspection["notes"]:
    lines += ["", "notes"]
    lines += [f"  - {note}" for note in inspection["notes"]]
  return "\n".join(lines)


def _format_labels(entry) -> str:
  if "label" in entry:
    found = entry["label"]
    return (
      f"label {found['min']:.4g} .. {found['max']:.4g}, mean "
      f"{found['mean']:.4g}, std {found['std']:.4g}"
    )
  counts = entry["class_counts"]
  text = f"{len(counts)} classes of {min(counts)} to {max(counts)}"
  if "labels_per_example" in entry:
    text += f", {entry['labels_per_example']:.3g} an example"
  return text


def _format_modality(name, entry, inspection) -> list[str]:
  star = "*" if name in inspection["default_modalities"] else " "
  shape = "x".join(str(size) for size in entry["shape"]) or "scalar"
  head = f"{star} {name:<10} {shape:<12} {entry['dtype']}"
  lines = [f"{head} {entry['kind']}".rstrip()]
  if entry["min"] is not None:
    measured = (
      f"    {entry['min']:.4g} .. {entry['max']:.4g}, mean "
      f"{entry['mean']:.4g}, std {entry['std']:.4g}"
    )
    if entry["unit"]:
      measured += f"; {entry['unit']}"
    lines.append(measured)
  if any(entry["missing"].values()):
    shares = ", ".join(
      f"{split} {share:.1%}" for split, share in entry["missing"].items()
    )
    lines.append(f"    missing: {shares}")
  return lines
