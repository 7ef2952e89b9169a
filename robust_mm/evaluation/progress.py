"""How far an evaluation is: a line on the terminal, or calls."""

import sys
from collections.abc import Callable


class Ticker:
  """A context that turns ticks into a line on the terminal or into calls."""

  def __init__(self, progress: bool | Callable | None, total: int):
    self._call = progress if callable(progress) else None
    self._terminal = progress is True and sys.stderr.isatty()
    self._done, self._total = 0, total

  def __enter__(self):
    return self._tick

  def __exit__(self, *_):
    if self._terminal:
      sys.stderr.write("\r\x1b[K")

  def _tick(self, what: str) -> None:
    self._done += 1
    if self._call is not None:
      self._call(self._done, self._total, what)
    if self._terminal:
      # To the start of the line, and clear what stood there.
      sys.stderr.write(f"\r\x1b[K{self._done}/{self._total} {what}")
      sys.stderr.flush()
