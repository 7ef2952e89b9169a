"""UCI Multiple Features: six views of 2,000 digits.

Raw file ``mfeat.npz``: the views ``pix``, ``fou``, ``fac``, ``zer``, ``kar``,
``mor`` [n, d], ``label`` [n] and ``split`` [n] (0 train, 1 validation, 2 test).
"""

import pathlib

import numpy as np

from robust_mm.data import registry
from robust_mm.data.builders import base
from robust_mm.data.builders import raw


class Mfeat(base.ColumnsBuilder):
  """Views at their raw scales; pixels and profile counts stay integers."""

  def columns(self, folder: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    """Views, label and row number, by split."""
    views = registry.get("mfeat").modalities
    file = folder / "mfeat.npz"
    shapes = {name: (None, *view.shape) for name, view in views.items()}
    arrays = raw.read(file, shapes | {"label": (None,), "split": (None,)})
    raw.check_codes(file, "label", arrays["label"], 10)
    raw.check_codes(file, "split", arrays["split"], 3)
    columns = {
      f"inputs/{name}": arrays[name].astype(view.stored, copy=False)
      for name, view in views.items()
    }
    columns["label"] = arrays["label"].astype(np.int32)
    columns["id"] = np.arange(len(arrays["label"]), dtype=np.int32)
    return raw.by_split(arrays["split"], columns)
