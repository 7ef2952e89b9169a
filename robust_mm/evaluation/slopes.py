"""What a masked gradient shows in: margins, logits and slopes of examples."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import margins
from robust_mm._types import Model
from robust_mm.evaluation import batches

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def measure(
  model: Model, data: batches.Data, device: batches.Device
) -> dict[str, np.ndarray]:
  """``{"margin", "logit_norm", "gradient_norm"}``, each ``float[n]``.

  Of the label's margin, of the logits' l2 norm, and of the gradient of that
  margin in all inputs together. That is 0 where every entry is, and no sooner.
  """

  def one(params, state, chunk):
    present, label = chunk["present"], chunk["label"]

    def margin(inputs):
      logits = model.apply(params, state, inputs, present)[0].logits
      found = margins.smallest(margins.pairwise(logits, label))
      return jnp.sum(found), (found, logits)

    floats = {m: x for m, x in chunk["inputs"].items() if is_float(x)}
    rest = {m: x for m, x in chunk["inputs"].items() if m not in floats}
    slopes, (found, logits) = jax.grad(
      lambda x: margin({**x, **rest}), has_aux=True
    )(floats)
    return {
      "margin": found,
      "logit_norm": jnp.linalg.norm(logits, axis=-1),
      "gradient_norm": _norm(slopes, len(label)),
    }

  rows = np.arange(data.size)
  size = device.chunk_size(data.size)
  return device.map(device.compile(one, once=True), data, rows, size)


def is_float(x) -> bool:
  """Whether an input has a gradient at all."""
  return jnp.issubdtype(x.dtype, jnp.floating)


def _norm(slopes, size):
  entries = [jnp.zeros((size, 1))]
  entries += [
    jnp.reshape(slope, (size, -1)).astype(jnp.float32)
    for slope in slopes.values()
  ]
  entries = jnp.concatenate(entries, axis=1)
  # Squares of small slopes are 0 long before the slopes are.
  largest = jnp.max(jnp.abs(entries), axis=1)
  unit = jnp.where(largest > 0, largest, 1.0)
  return largest * jnp.linalg.norm(entries / unit[:, None], axis=1)


def quantiles(values: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
  """``{"quantiles", "margin", "logit_norm", "gradient_norm"}``."""
  return {
    "quantiles": list(QUANTILES),
    **{
      name: np.quantile(value, QUANTILES).tolist()
      for name, value in values.items()
    },
  }
