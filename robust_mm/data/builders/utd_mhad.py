"""UTD-MHAD: inertial sensor, skeleton and depth of 27 actions.

Raw file ``utd_mhad.npz``: ``inertial`` [n, 128, 6] (g, deg/s), ``skeleton``
[n, 32, 20, 3] (metres), ``depth`` uint8 [n, 16, 48, 48], ``label``,
``subject``, ``trial``, ``split`` [n] (0 train, 1 validation, 2 test).
"""

import pathlib

import numpy as np

from robust_mm.data.builders import base
from robust_mm.data.builders import raw

_HIP_CENTRE = 3
_SHAPES = {
  "inertial": (None, 128, 6),
  "skeleton": (None, 32, 20, 3),
  "depth": (None, 16, 48, 48),
  "label": (None,),
  "subject": (None,),
  "trial": (None,),
  "split": (None,),
}


class UtdMhad(base.ColumnsBuilder):
  """Rotation in rad/s, skeleton relative to its first hip centre."""

  def columns(self, folder: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    """Inputs in the registry's units, by split."""
    file = folder / "utd_mhad.npz"
    arrays = raw.read(file, _SHAPES)
    raw.check_codes(file, "label", arrays["label"], 27)
    raw.check_codes(file, "split", arrays["split"], 3)
    size = len(arrays["label"])
    columns = {
      "inputs/inertial": inertial(arrays["inertial"]),
      "inputs/skeleton": skeleton(arrays["skeleton"]),
      "inputs/depth": arrays["depth"].astype(np.uint8, copy=False)[..., None],
      "label": arrays["label"].astype(np.int32),
      "id": np.arange(size, dtype=np.int32),
      "metadata/subject": arrays["subject"].astype(np.int32),
      "metadata/trial": arrays["trial"].astype(np.int32),
    }
    return raw.by_split(arrays["split"], columns)


def inertial(values: np.ndarray) -> np.ndarray:
  """``[n, t, 6]`` in g and deg/s -> g and rad/s."""
  # Without this the rotation channels are some 100 times larger.
  scale = np.array([1, 1, 1] + [np.pi / 180] * 3, np.float32)
  return values.astype(np.float32) * scale


def skeleton(values: np.ndarray) -> np.ndarray:
  """``[n, t, 20, 3]`` in metres -> ``[n, t, 60]`` minus the first hip."""
  origin = values[:, :1, _HIP_CENTRE : _HIP_CENTRE + 1]
  centred = (values - origin).astype(np.float32)
  return centred.reshape(*centred.shape[:2], 60)
