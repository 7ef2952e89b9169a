"""ImageNet-Captions: images with the captions they had where they were found.

The folder given as ``--source``:

- ``classes.csv``: columns ``index,wnid,name``, such as
  ``0,n01440764,"tench, Tinca tinca"``;
- ``train.csv``, ``validation.csv``, ``test.csv``: columns ``filename,wnid``
  (others are ignored), fields of the published JSON file;
- ``<split>/<filename without its extension>.npz`` for every line, with

  - ``image`` [h, w, c]: pixels, uint8 or uint16, or floats, cropped and resized
    to one shape, [224, 224, 3] say;
  - ``caption`` [t]: signed integers, ids of a tokeniser of yours, cut or
    filled up with 0 to one length. Ids of validation and test must not exceed
    the largest of train (make what is unknown one id).
"""

import pathlib

from robust_mm.data.builders import listing
from robust_mm.data.builders import records


class ImagenetCaptions(records.RecordsBuilder):
  """One class an example."""

  FORM = listing.Form(
    key="wnid",
    shown="name",
    columns=("filename", "wnid"),
    stem=lambda entry: (
      pathlib.PurePath(entry["filename"]).stem
      if "/" not in entry["filename"]
      else entry["filename"]
    ),
    classes=lambda entry: (entry["wnid"],),
  )
