"""What a model says with every set of modalities: logits, one compilation."""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from robust_mm import modalities
from robust_mm._types import Model
from robust_mm.evaluation import batches
from robust_mm.evaluation import forwards


def logits_by_set(
  model: Model,
  params: Any,
  state: Any,
  batch: dict,
  *,
  sets: Iterable[Iterable[str]] | None = None,
  batch_size: int = 256,
  sharding: Any = None,
) -> dict[tuple[str, ...], np.ndarray]:
  """Logits of every example with only the modalities of a set left.

  Which those are is data: all sets share one compilation, and so do later calls
  with the same model, whatever its parameters; each costs one pass over the
  examples.

  Args:
    model: the model.
    params: its parameters.
    state: its state.
    batch: a data set as host arrays.
    sets: of modalities; all that are not empty by default.
    batch_size: examples a pass.
    sharding: of the leading axis, as in ``evaluation.evaluate``.

  Returns:
    ``{set: [n, k]}``, NaN where a set leaves an example nothing; numbers of a
    regression are ``[n, 1]``.

  Raises:
    ValueError: as ``evaluation.evaluate`` does for a batch that does not fit.
  """
  data = batches.host_data(model, batch)
  device = batches.Device(params, state, sharding=sharding)
  size = device.chunk_size(min(batch_size, data.size))
  forward = _compiled(model, sharding)
  chosen = modalities.subsets(data.names) if sets is None else sets
  found = {}
  for subset in chosen:
    subset = modalities.names(subset)
    left = np.any([data.present[name] for name in subset], axis=0)
    rows = np.flatnonzero(left)
    logits = np.full((data.size, model.num_classes), np.nan, np.float32)
    if len(rows):
      keep = forwards.keep_only(data.names, subset)
      logits[rows] = device.map(
        forward, data, rows, size, extra=lambda number, keep=keep: (keep,)
      )
    found[subset] = logits
  return found


@functools.lru_cache(maxsize=4)
def _compiled(model: Model, sharding: Any):
  """A function jitted anew compiles anew: the last few are kept."""
  device = batches.Device({}, {}, sharding=sharding)
  return device.compile(forwards.logits_fn(model))
