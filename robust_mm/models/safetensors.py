"""Arrays of ``.safetensors`` files, by memory map and without unpickling.

A file is eight bytes (little-endian: the length of the header), a JSON header
``{name: {dtype, shape, data_offsets}}`` and the values, row after row, whose
offsets count from the end of the header.

References:
  `The format <https://github.com/huggingface/safetensors>`_.
"""

import json
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {
  "F32": np.dtype("<f4"),
  "F16": np.dtype("<f2"),
  "BF16": np.dtype(jnp.bfloat16),
}
_PREFIX = 8  # bytes in front of the header
_MAX_HEADER = 100_000_000  # as the reference implementation has it
_LISTED = 10


def read(path) -> dict[str, np.ndarray]:
  """``{name: read-only view of the file}``, nothing loaded yet.

  Args:
    path: a ``.safetensors`` file, a ``.index.json`` file of a checkpoint in
      several files, or a folder with ``model.safetensors`` or
      ``model.safetensors.index.json``.

  Returns:
    Arrays of float32, float16 or bfloat16, as stored.

  Raises:
    ValueError: naming the file, and the tensor where it is one's fault: no such
      file, one that is cut off or too long, a header that is none, a dtype
      other than F32, F16 and BF16, a size that does not match its shape.
  """
  path = locate(path)
  if path.name.endswith(".json"):
    return _sharded(path)
  return _single(path)


def locate(path) -> pathlib.Path:
  """The file that is read for ``path``, see :func:`read`."""
  if not isinstance(path, (str, os.PathLike)):
    raise ValueError(f"path must be that of a file or folder, got {path!r}.")
  path = pathlib.Path(path)
  if path.is_dir():
    for name in (SINGLE, INDEX):
      if (path / name).is_file():
        return path / name
    raise ValueError(f"{path} has neither {SINGLE} nor {INDEX}.")
  if not path.is_file():
    raise ValueError(f"{path} is no file.")
  if not path.name.endswith((".safetensors", ".index.json")):
    raise ValueError(
      f"{path} must be a .safetensors file, an .index.json file or a folder "
      f"with one; other formats are not read."
    )
  return path


def compare(
  path, found: Iterable[str], expected: Iterable[str], what: str
) -> None:
  """Refuses missing and surplus names, up to ten of each.

  >>> compare("a.safetensors", ["x"], ["x", "y"], "a model")
  Traceback (most recent call last):
    ...
  ValueError: a.safetensors is not a model: missing y.
  """
  found, expected = set(found), set(expected)
  parts = [
    f"{kind} {listed(names)}"
    for kind, names in (
      ("missing", expected - found),
      ("surplus", found - expected),
    )
    if names
  ]
  if parts:
    raise ValueError(f"{path} is not {what}: {'; '.join(parts)}.")


def listed(names: Iterable[str]) -> str:
  """``a, b and 3 more``, the first ten by name."""
  names = sorted(names)
  rest = len(names) - _LISTED
  return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object; ValueError naming the file for anything else."""
  try:
    return _object(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path} is no JSON object: {error}.") from error


def _object(text: bytes) -> dict[str, Any]:
  def unique(pairs):
    made = dict(pairs)
    if len(made) != len(pairs):
      names = [name for name, _ in pairs]
      twice = {name for name in names if names.count(name) > 1}
      raise ValueError(f"it names {listed(twice)} twice")
    return made

  value = json.loads(text.decode(), object_pairs_hook=unique)
  if not isinstance(value, dict):
    raise ValueError(f"it is a {type(value).__name__}")
  return value


def _sharded(index: pathlib.Path) -> dict[str, np.ndarray]:
  places = read_json(index).get("weight_map")
  if not isinstance(places, dict) or not places:
    raise ValueError(f"{index} has no weight_map from tensors to files.")
  names = sorted(set(map(str, places.values())))
  for name in names:
    if pathlib.PurePath(name).name != name:
      raise ValueError(
        f"{index} names {name!r}, which is not a file beside it."
      )
    if not (index.parent / name).is_file():
      raise ValueError(f"{index} names {name}, which is not there.")
  tensors: dict[str, np.ndarray] = {}
  for name in names:
    shard = index.parent / name
    found = _single(shard)
    expected = [tensor for tensor, place in places.items() if place == name]
    compare(shard, found, expected, f"what {index.name} says")
    tensors |= found
  return tensors


def _single(path: pathlib.Path) -> dict[str, np.ndarray]:
  length = path.stat().st_size
  if length < _PREFIX:
    raise ValueError(f"{path} is cut off: it has {length} bytes.")
  content = np.memmap(path, np.uint8, mode="r")
  size = int(content[:_PREFIX].view("<u8")[0])
  start = _PREFIX + size
  if size > _MAX_HEADER:
    raise ValueError(
      f"{path} is no safetensors file: its header would have {size} bytes."
    )
  if start > length:
    raise ValueError(
      f"{path} is cut off: its header ends at byte {start}, the file at "
      f"{length}."
    )
  try:
    header = _object(content[_PREFIX:start].tobytes())
  except ValueError as error:
    raise ValueError(f"{path} has no readable header: {error}.") from error
  header.pop("__metadata__", None)
  tensors, end = {}, 0
  # In the order of the values, so that neither gaps nor overlaps stay unseen.
  entries = [(*_entry(path, name, e), name) for name, e in header.items()]
  for begin, stop, dtype, shape, name in sorted(entries, key=_place):
    if begin != end:
      raise ValueError(
        f"{path}: tensor {name} begins at {begin}, the one before it ends at "
        f"{end}."
      )
    if start + stop > length:
      raise ValueError(
        f"{path} is cut off: tensor {name} ends at byte {start + stop}, the "
        f"file at {length}."
      )
    data = content[start + begin : start + stop]
    tensors[name] = data.view(dtype).reshape(shape)
    end = stop
  if start + end != length:
    raise ValueError(
      f"{path} has {length - start - end} bytes after its last tensor."
    )
  return tensors


def _place(entry) -> tuple[int, int]:
  return entry[:2]


def _entry(path, name: str, entry):
  """(begin, end, dtype, shape), checked against each other."""
  try:
    dtype, shape, (begin, end) = (
      entry[key] for key in ("dtype", "shape", "data_offsets")
    )
    whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
  except (KeyError, TypeError, ValueError):
    whole = False
  if not whole:
    raise ValueError(
      f"{path}: tensor {name} must have dtype, shape and data_offsets, whole "
      f"numbers of at least 0."
    )
  if dtype not in _DTYPES:
    raise ValueError(
      f"{path}: tensor {name} has dtype {dtype}; {', '.join(_DTYPES)} are read."
    )
  size = math.prod(shape) * _DTYPES[dtype].itemsize
  if size != end - begin:
    raise ValueError(
      f"{path}: tensor {name} of shape {tuple(shape)} and dtype {dtype} needs "
      f"{size} bytes and has {end - begin}."
    )
  return begin, end, _DTYPES[dtype], tuple(shape)
