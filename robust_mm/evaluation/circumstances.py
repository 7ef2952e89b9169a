"""Under which circumstances an evaluation ran."""

import sys

import jax
import numpy as np

from robust_mm import __version__
from robust_mm import certification
from robust_mm.evaluation import batches

try:
  import resource
except ImportError:  # Windows has none
  resource = None


def certificate_settings(protocol, bounds, reason) -> dict:
  """The certificate that was asked for, and the one there is."""
  return {
    "asked": protocol.certificate,
    "source": None if bounds is None else bounds.source,
    "sound": None if bounds is None else bounds.sound,
    "norm": None if bounds is None else bounds.norm,
    "slack": certification.Slack()._asdict(),
    "reason": reason,
  }


def peak_memory() -> float | None:
  """MiB: of the device where it tells, else of this process."""
  statistics = jax.local_devices()[0].memory_stats()
  if statistics and "peak_bytes_in_use" in statistics:
    return statistics["peak_bytes_in_use"] / 2**20
  if resource is None:
    return None
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # Bytes on macOS, kibibytes elsewhere.
  return peak / (2**20 if sys.platform == "darwin" else 2**10)


def settings(model, data, reference, sharding) -> dict:
  """The model's and the data's sizes, the devices, the versions."""
  num_reference = None
  if reference is not None:
    num_reference = len(reference["present"][data.names[0]])
  return {
    "modalities": list(data.names),
    "num_classes": model.num_classes,
    "input_shapes": {m: list(x.shape[1:]) for m, x in data.inputs.items()},
    "input_types": {m: str(x.dtype) for m, x in data.inputs.items()},
    "num_reference": num_reference,
    "matmul_precision": batches.PRECISION,
    "num_devices": 1 if sharding is None else len(sharding.device_set),
    **where(),
  }


def where() -> dict:
  """The device, and the versions of what the numbers were made with."""
  device = jax.devices()[0]
  return {
    "device": f"{device.platform} ({device.device_kind})",
    "versions": {
      "robust_mm": __version__,
      "jax": jax.__version__,
      "numpy": np.__version__,
    },
  }
