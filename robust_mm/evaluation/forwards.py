"""Forward passes of an evaluation: compiled once, and no more than needed."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import modalities
from robust_mm._types import Model
from robust_mm.evaluation import batches


class Forward:
  """The predictions of one model, one compilation for all subsets."""

  def __init__(self, model: Model, device: batches.Device, *, size: int):
    self._model, self._device, self._size = model, device, size
    self.compiled = device.compile(_forward_fn(model))

  def __call__(self, data, rows, subset) -> np.ndarray:
    """``[len(rows)]`` predictions with only the modalities of ``subset``."""
    extra = (keep_only(data.names, subset),)
    return self._device.map(
      self.compiled, data, rows, self._size, extra=lambda number: extra
    )

  def embeddings(self, data, rows) -> dict[str, np.ndarray]:
    """``{m: [len(rows), ...]}`` of the data as they are."""
    model = self._model

    def encode(params, state, chunk):
      return model.encode(params, state, chunk["inputs"], chunk["present"])[0]

    encode = self._device.compile(encode)
    return self._device.map(encode, data, rows, self._size)

  def of_changed(self) -> Callable:
    """``forward(params, state, chunk, chosen)``, compiled.

    The prediction of a chunk in which only modalities of ``chosen`` have been
    changed, and whose ``embeddings`` are those from before.
    """
    model = self._model

    def forward(params, state, chunk, chosen):
      seen = modalities.mask(chunk["inputs"], chunk["present"])
      embeddings = embed(
        model, params, state, chunk, seen, chunk["embeddings"], chosen
      )
      logits = model.fuse(params, embeddings, chunk["present"]).logits
      return _said(model, logits)

    return self._device.compile(forward)


def logits_fn(model: Model) -> Callable:
  """``logits(params, state, chunk, keep)``: of what ``keep`` leaves, [b, k]."""

  def logits(params, state, chunk, keep):
    present = {
      name: flag & keep[name] for name, flag in chunk["present"].items()
    }
    inputs = modalities.mask(chunk["inputs"], present)
    outputs, _ = model.apply(params, state, inputs, present)
    return outputs.logits

  return logits


def _forward_fn(model):
  logits = logits_fn(model)

  def forward(params, state, chunk, keep):
    return _said(model, logits(params, state, chunk, keep))

  return forward


def _said(model, logits):
  return decide(logits) if model.classifies else model.said(logits)


def keep_only(names, subset) -> dict[str, np.ndarray]:
  """``{m: whether it is in the subset}``, arrays, so that jit sees data."""
  return {name: np.asarray(name in subset) for name in names}


def predictions(
  forward: Forward, data: batches.Data, subsets
) -> dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]]:
  """Predictions with only some modalities left.

  Returns:
    ``{subset: (prediction [n], counted bool[n])}``; an example is counted where
    the subset leaves it something. A non-finite logit predicts -1; what is no
    class stays as it is, logits ``[n, k]`` of several labels.
  """
  result = {}
  for subset in subsets:
    counted = np.any([data.present[name] for name in subset], axis=0)
    prediction = np.full_like(data.label, -1)
    rows = np.flatnonzero(counted)
    if len(rows):
      prediction[rows] = forward(data, rows, subset)
    result[subset] = (prediction, counted)
  return result


def decide(logits: jax.Array) -> jax.Array:
  """The argmax, or -1 where a logit is not finite."""
  finite = jnp.all(jnp.isfinite(logits), axis=-1)
  return jnp.where(finite, jnp.argmax(logits, axis=-1), -1).astype(jnp.int32)


def embed(model, params, state, chunk, seen, still, chosen):
  """Embeddings of ``seen`` where chosen, and those of ``still`` elsewhere.

  What is not chosen is not encoded again: in a search that would be every step.
  """

  def again(name, x):
    inputs = {**chunk["inputs"], name: x}
    return model.encode(params, state, inputs, chunk["present"])[0][name]

  return {
    name: jax.lax.cond(
      chosen[name],
      functools.partial(again, name),
      lambda x, name=name: still[name],
      x,
    )
    for name, x in seen.items()
  }
