"""Kinetics, or a part of it such as Kinetics-Sounds: frames and their sound.

One builder for all of them: which clips and which classes are in the lists,
and nothing else differs.

The folder given as ``--source``:

- ``classes.csv``: columns ``index,name``, such as ``0,abseiling``;
- ``train.csv``, ``validation.csv``, ``test.csv``: lists as Kinetics publishes
  them, columns ``label,youtube_id,time_start,time_end`` (others are ignored),
  with the name of one class under ``label``, and whole seconds;
- ``<split>/<youtube_id>_<time_start>_<time_end>.npz`` for every line, the times
  with six digits as in ``-3B32lodo2M_000059_000069.npz``, with

  - ``video`` [t, h, w, c]: frames, uint8 or uint16, or floats;
  - ``audio`` [t, d]: log-mel frames of its sound, floats, or quantised to uint8
    or uint16.

  All examples have one shape each.
"""

from collections.abc import Mapping

from robust_mm.data.builders import listing
from robust_mm.data.builders import records


def clip(entry: Mapping[str, str]) -> str:
  """The usual name of the file of a clip; ValueError for odd times.

  >>> clip({"youtube_id": "a-b_c", "time_start": "59", "time_end": "69"})
  'a-b_c_000059_000069'
  """
  times = entry["time_start"], entry["time_end"]
  if not all(time.isascii() and time.isdigit() for time in times):
    raise ValueError(f"times must be whole seconds, got {' and '.join(times)}")
  return "_".join(
    (entry["youtube_id"], *(f"{int(time):06d}" for time in times))
  )


class Kinetics(records.RecordsBuilder):
  """One class an example."""

  FORM = listing.Form(
    key="name",
    shown="name",
    columns=("label", "youtube_id", "time_start", "time_end"),
    stem=clip,
    classes=lambda entry: (entry["label"],),
  )
