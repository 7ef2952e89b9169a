"""Metrics to JSON lines and TensorBoard event files, side by side."""

import json
import math
import os
import pathlib


class Writer:
  """Appends rows to ``metrics.jsonl`` and to event files.

  On resume, rows after the restored step are dropped first: the run writes
  them again, and exactly once.

  Args:
    workdir: the run's folder.
    step: the step the run starts or resumes from.
  """

  def __init__(self, workdir: pathlib.Path, *, step: int):
    from tensorboardX import SummaryWriter

    self._path = workdir / "metrics.jsonl"
    rows = [row for row in read(workdir) if row["step"] <= step]
    temporary = self._path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, self._path)
    self._file = self._path.open("a")
    self._events = SummaryWriter(str(workdir / "events"), purge_step=step + 1)

  def write(self, step: int, phase: str, metrics: dict[str, float]) -> None:
    """One row: ``{"step", "phase", **metrics}``."""
    row = {"step": step, "phase": phase, **metrics}
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()
    for name, value in metrics.items():
      if math.isfinite(value):  # a point of a curve; a gate may not have one
        self._events.add_scalar(name, value, step)

  def close(self) -> None:
    """Flushes both."""
    self._file.close()
    self._events.close()


class NullWriter:
  """For the processes that do not write."""

  def write(self, step, phase, metrics) -> None:
    """Nothing."""

  def close(self) -> None:
    """Nothing."""


def read(workdir: pathlib.Path) -> list[dict]:
  """The rows of ``metrics.jsonl``, without a last line cut off by a kill."""
  path = pathlib.Path(workdir) / "metrics.jsonl"
  if not path.is_file():
    return []
  rows = []
  for line in path.read_text().splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows
