"""A batch of every form of modality, and corruptions applied to it."""

import jax
import numpy as np

from robust_mm import corruptions

KEY = jax.random.key(3)
SHAPES = {
  "image": (6, 5, 2),
  "sequence": (12, 3),
  "vector": (7,),
  "video": (6, 4, 4, 1),
}


def make(kind, severity, **placement):
  if kind == "additive":
    placement = {"scale": 1.5, **placement}
  return getattr(corruptions, kind)(severity=severity, **placement)


def make_batch(size=16, seed=0):
  rng = np.random.default_rng(seed)
  inputs = {
    name: rng.normal(1.0, 2.0, (size, *shape)).astype(np.float32)
    for name, shape in SHAPES.items()
  }
  inputs["token"] = rng.integers(1, 9, (size, 10), dtype=np.int32)
  present = {name: np.arange(size) % 5 != i for i, name in enumerate(inputs)}
  id = rng.permutation(1000)[:size]
  label = rng.integers(0, 3, size)
  return {"inputs": inputs, "present": present, "label": label, "id": id}


@jax.jit
def apply(corruption, batch, *, key=KEY, donors=None):
  return corruption(
    key,
    batch["inputs"],
    batch["present"],
    id=batch["id"],
    label=batch["label"],
    donors=donors,
  )


def take(batch, rows):
  return jax.tree.map(lambda x: x[rows], batch)


def of(kind, severity, value, *, present=None, key=KEY, **placement):
  """The corrupted inputs of a single modality."""
  present = np.ones(len(value), bool) if present is None else present
  found, _ = _of(make(kind, severity, **placement), key, value, present)
  return np.asarray(found)


@jax.jit
def _of(corruption, key, value, present):
  found, left = corruption(key, {"m": value}, {"m": present})
  return found["m"], left
