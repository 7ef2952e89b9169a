"""Linear late-fusion models with closed-form answers, for evaluation tests."""

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm._types import Geometry
from robust_mm._types import Model
from robust_mm._types import Outputs

DIMS = {"left": 5, "right": 3}
NUM_CLASSES = 3


def linear_model(*, lipschitz=1.0, geometry=True, mixed=False, traces=None):
  """Identity encoders and a dense head; the constant stated may be a lie."""
  names = tuple(sorted(DIMS))

  def init(key):
    head = {
      name: jax.random.normal(
        jax.random.fold_in(key, i), (NUM_CLASSES, DIMS[name])
      )
      for i, name in enumerate(names)
    }
    return {"head": head, "bias": jnp.array([0.3, 0.0, -0.2])}, {}

  def encode(params, state, inputs, present, *, train=False, key=None):
    if traces is not None:
      traces.append(1)
    return {
      name: jnp.where(present[name][:, None], inputs[name], 0.0)
      for name in names
    }, state

  def fuse(params, embeddings, present):
    scores = {
      name: jnp.einsum(
        "bd,kd->bk",
        embeddings[name],
        params["head"][name],
        precision="highest",
      )
      for name in names
    }
    logits = sum(scores.values()) + params["bias"][None]
    return Outputs(
      logits=logits, scores=scores, embeddings=embeddings, mixed=mixed
    )

  def stated(params):
    bound = None if lipschitz is None else jnp.float32(lipschitz)
    return Geometry(
      head=params["head"],
      bias=params["bias"],
      lipschitz=dict.fromkeys(names, bound),
    )

  return Model(
    modalities=names,
    num_classes=NUM_CLASSES,
    init=init,
    encode=encode,
    fuse=fuse,
    geometry=stated if geometry else None,
  )


def make_batch(size=60, seed=0):
  """Random inputs; labels are mostly what the model of key 0 says."""
  rng = np.random.default_rng(seed)
  inputs = {
    name: rng.normal(size=(size, dim)).astype(np.float32)
    for name, dim in DIMS.items()
  }
  params, _ = linear_model().init(jax.random.key(0))
  label = np.argmax(logits(params, inputs), axis=-1)
  wrong = rng.uniform(size=size) < 0.15
  label = np.where(wrong, (label + 1) % NUM_CLASSES, label)
  return {
    "inputs": inputs,
    "present": {name: np.ones(size, bool) for name in DIMS},
    "label": label.astype(np.int32),
    "id": np.arange(size) + 1000,
  }


def logits(params, inputs, names=tuple(DIMS)):
  """The model in NumPy, float64, with only some modalities."""
  terms = [
    np.asarray(inputs[m], np.float64) @ np.asarray(params["head"][m]).T
    for m in names
  ]
  return sum(terms) + np.asarray(params["bias"], np.float64)


def exact_radii(params, inputs, units=None, names=tuple(DIMS)):
  """Distances to the decision boundary in NumPy; only ``names`` move."""
  slopes = pair_slopes(params, inputs, units, names=names)
  return _smallest(params, inputs, np.sqrt(sum(s**2 for s in slopes)))


def exact_linf_radii(params, inputs, units=None, names=tuple(DIMS)):
  """The same where every entry of ``names`` may move by the radius."""
  slopes = pair_slopes(params, inputs, units, order=1, names=names)
  return _smallest(params, inputs, sum(slopes))


def certified_linf_radii(params, inputs, units=None, names=tuple(DIMS)):
  """What follows from l2 constants: the root of the size times the slope."""
  slopes = pair_slopes(params, inputs, units, names=names)
  roots = [DIMS[m] ** 0.5 for m in names]
  return _smallest(params, inputs, sum(r * s for r, s in zip(roots, slopes)))


def pair_slopes(params, inputs, units=None, *, order=2, names=tuple(DIMS)):
  """``[b, k]`` a modality: the norm of the difference of two head rows."""
  units = units or dict.fromkeys(DIMS, 1.0)
  top = logits(params, inputs).argmax(axis=-1)
  heads = {m: np.asarray(params["head"][m], np.float64) for m in names}
  return [
    units[m] * np.linalg.norm(heads[m][top][:, None] - heads[m], order, axis=-1)
    for m in names
  ]


def _smallest(params, inputs, slopes):
  values = logits(params, inputs)
  rows, top = np.arange(len(values)), values.argmax(axis=-1)
  margins = values[rows, top][:, None] - values
  margins[rows, top] = np.inf
  slopes[rows, top] = 1.0
  return (margins / slopes).min(axis=-1)


def without(batch, rows):
  """The same batch, nothing present in ``rows``: poisoned and mislabelled."""
  batch = {
    **batch,
    "inputs": {m: x.copy() for m, x in batch["inputs"].items()},
    "present": {m: x.copy() for m, x in batch["present"].items()},
  }
  for name in DIMS:
    batch["present"][name][rows] = False
    batch["inputs"][name][rows] = np.nan
  return batch
