"""AudioSet: sound and frames of ten seconds, any number of classes.

The folder given as ``--source``:

- ``classes.csv``: AudioSet's own ``class_labels_indices.csv``, columns
  ``index,mid,display_name`` (527 of them), or part of it with the index
  counted anew;
- ``train.csv``, ``validation.csv``, ``test.csv``: lists as AudioSet publishes
  them, columns ``YTID, start_seconds, end_seconds, positive_labels``, the last
  one the mids of the segment, joined by commas, in quotes. Lines before the
  header that begin with # are skipped, so ``balanced_train_segments.csv`` and
  ``eval_segments.csv`` do as they are; take lines of the first for validation;
- ``<split>/<YTID>.npz`` for every line (a video has one segment), with

  - ``audio`` [t, d]: log-mel frames, float16, float32 or float64, or quantised
    to uint8 or uint16. All of one shape: [998, 128] for ten seconds at 16 kHz
    in windows of 25 ms every 10 ms, say;
  - ``video`` [t, h, w, c]: frames, uint8 or uint16, or floats; all of one
    shape, [10, 112, 112, 3] at one frame a second, say.
"""

from robust_mm.data.builders import listing
from robust_mm.data.builders import records


class Audioset(records.RecordsBuilder):
  """Labels are ``bool[k]``; the measure is mAP."""

  FORM = listing.Form(
    key="mid",
    shown="display_name",
    columns=("YTID", "positive_labels"),
    stem=lambda entry: entry["YTID"],
    classes=lambda entry: tuple(
      mid.strip() for mid in entry["positive_labels"].split(",") if mid.strip()
    ),
  )
