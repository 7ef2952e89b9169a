"""What a stopped job has done, kept beside its output until it ends."""

import hashlib
import io
import json
import pathlib
import time
import zipfile
from collections.abc import Mapping

import jax
import numpy as np

from robust_mm import _files
from robust_mm import _validate

SAVE_SECONDS = 10.0  # between two savings


class Keeper:
  """Saves arrays of a job now and then, and gives them back to the same job.

  Several processes must see the same folder. A signal that kills at once loses
  what came after the last saving.

  Args:
    output: the file that the finished job writes; ``.partial.npz`` beside it,
      one for all questions: another job that writes the same file replaces it.
    told: what the job was asked, plain values; another answer is another job.
  """

  def __init__(self, output: pathlib.Path, told: Mapping):
    self.path = output.with_suffix(".partial.npz")
    # Through JSON and back, as what will have been stored.
    self._told = json.loads(json.dumps(dict(told)))
    self._saved = time.monotonic()

  def load(self) -> dict[str, np.ndarray] | None:
    """The arrays saved before, None without any.

    Raises:
      UserError: the file is damaged, or of another job, naming what differs.
    """
    if not self.path.is_file():
      return None
    try:
      with np.load(self.path, allow_pickle=False) as kept:
        arrays = {name: kept[name] for name in kept.files}
      before = json.loads(str(arrays.pop("told")))
    except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
      raise self.damaged(error) from error
    for name, value in self._told.items():
      if before.get(name) != value:
        raise _validate.UserError(
          f"--resume: {self.path} holds part of another job: {name} is "
          f"{before.get(name)} there and {value} here. Without --resume the "
          "job begins anew."
        )
    return arrays

  def damaged(self, error: object) -> _validate.UserError:
    """The mistake, to be raised, that the file is no good."""
    return _validate.UserError(
      f"--resume: {self.path} is damaged: {error}. Without --resume the job "
      "begins anew."
    )

  @property
  def due(self) -> bool:
    """Whether it is time to save again."""
    return time.monotonic() - self._saved >= SAVE_SECONDS

  def save(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Keeps the arrays, by the first process alone."""
    if jax.process_index() == 0:
      buffer = io.BytesIO()
      np.savez(buffer, told=json.dumps(self._told), **arrays)
      _files.write_bytes(self.path, buffer.getvalue())
    self._saved = time.monotonic()

  def forget(self) -> None:
    """The job has ended; the first process alone removes what it kept."""
    if jax.process_index() == 0:
      self.path.unlink(missing_ok=True)


def digest(tree) -> str:
  """A word that other arrays would not have."""
  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    value = np.asarray(leaf)
    found.update(f"{path}{value.dtype}{value.shape}".encode())
    found.update(value.tobytes())
  return found.hexdigest()[:16]
