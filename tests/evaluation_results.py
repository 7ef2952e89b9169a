"""Results with numbers chosen by hand, for tests of plots and words."""

import numpy as np

RADII = (0.25, 0.5, 1.0)
SUBSETS = {"left": 0.6, "right": 0.8, "left+right": 0.9}


def share(accuracy, num_examples=200):
  low, high = max(0.0, accuracy - 0.05), min(1.0, accuracy + 0.05)
  return {
    "accuracy": accuracy,
    "interval": [low, high],
    "num_examples": num_examples,
  }


def make_result(name="crmt-JT", *, sound=True, norm=2, units=1.0, drop=0.4):
  """A whole result; ``sound=None`` has no bound.

  Attacked accuracy falls by ``drop`` a unit of radius, the bound twice as fast;
  the region is ``1 - e1 - e2``.
  """
  names = ["left", "right"]
  groups = (names, ["left"], ["right"])
  attacked = [
    {
      "attack": "pgd",
      "norm": norm,
      "radius": radius,
      "modalities": list(group),
      "largest_size": radius,
      **share(0.9 - drop * radius),
    }
    for group in groups
    for radius in RADII
  ]
  source = "global" if sound else "empirical"
  certified = [
    {
      "radius": float(radius),
      "modalities": list(group),
      "source": source,
      "sound": sound,
      "norm": norm,
      **share(max(0.0, 0.9 - 2 * drop * radius)),
    }
    for group in groups
    for radius in np.linspace(0.0, 1.0, 33)
  ]
  grid = np.linspace(0.0, 1.0, 50)
  region = {
    "modalities": names,
    "radii": [grid.tolist(), grid.tolist()],
    "accuracy": np.clip(1 - grid[:, None] - grid[None, :], 0, 1).tolist(),
    "source": source,
    "sound": sound,
    "norm": norm,
  }
  tightness = {
    "factors": [1.0, 1.2, 2.0],
    "flipped": [0.0, 0.75, 1.0],
    "num_examples": 200,
    "attack": "pgd",
    "sound": sound,
    "norm": norm,
  }
  bounded = sound is not None
  return {
    "schema_version": 1,
    "task": "classification",
    "name": name,
    "dataset": "digits",
    "recipe": name,
    "seed": 7,
    "settings": _settings(norm, sound, source if bounded else None),
    "clean": share(0.9),
    "subsets": {label: share(value) for label, value in SUBSETS.items()},
    "contributions": {"values": {"left": 0.3, "right": 0.5}, "empty": 0.1},
    "missing": _missing(),
    "captions": None,
    "corrupted": None,
    "attacked": attacked,
    "certified": certified if bounded else [],
    "smoothed": None,
    "region": region if bounded else None,
    "vulnerability": {"left": 0.3, "right": 0.7} if bounded else None,
    "tightness": tightness if bounded else None,
    "units": dict.fromkeys(names, units),
    "checks": [],
    "masking": None,
    "examples": {"num_examples": 200, "num_left_out": 0, "columns": {}},
    "timing": {
      "attack_seconds": 6.480123456789,
      "total_seconds": 1234.56789,
      "forward_chunk_seconds": 0.0008157123456,
      "certify_chunk_seconds": 0.0016314246912,
      "peak_memory_mib": 584.41015625,
    },
  }


def _missing():
  """Accuracy falls by half of the missing rate."""
  rows = [
    {
      "rate": rate,
      "achieved": rate,
      "accuracy": 0.9 - 0.5 * rate,
      "by_seed": [0.88 - 0.5 * rate, 0.92 - 0.5 * rate],
      "num_examples": 200,
    }
    for rate in (0.1, 0.3, 0.5)
  ]
  return {"protocol": "per_sample", "seeds": [0, 1], "rows": rows}


def _settings(norm, sound, source):
  return {
    "norm": norm,
    "units": None,
    "survivors_only": True,
    "max_examples": None,
    "attacks": {
      "pgd": {
        "name": "pgd",
        "loss": "margin",
        "num_steps": 50,
        "num_restarts": 5,
        "step": 0.123456789012,
      }
    },
    "certificate": {
      "asked": "auto",
      "source": source,
      "sound": sound,
      "norm": None if source is None else norm,
      "slack": {"margin": 64.0, "sensitivity": 1.00000001e-5},
      "reason": "Because.",
    },
    "modalities": ["left", "right"],
    "num_classes": 10,
    "input_shapes": {"left": [8, 4, 1], "right": [8, 4, 1]},
  }


def make_history(phases=("margins", "integration"), *, certified=True):
  """Two hundred updates a phase, logged and validated every hundred.

  The objective of phase i is constant at ``10 ** -i``.
  """
  rows = []
  for index, phase in enumerate(phases):
    for step in (200 * index + 100, 200 * index + 200):
      at = {"step": step, "phase": phase}
      rows.append({**at, "loss": 10.0**-index, "accuracy": 0.99})
      validation = {"validation_accuracy": 0.9, "validation_loss": 1.5}
      if certified:
        validation["validation_certified_accuracy"] = 0.6
      rows.append({**at, **validation})
  return rows
