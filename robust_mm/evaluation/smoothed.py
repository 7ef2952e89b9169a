"""Smoothed certificates of a whole data set: counted block by block."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from robust_mm import smoothing
from robust_mm._types import Model
from robust_mm.evaluation import batches
from robust_mm.evaluation import summary

STAGES = ("selection", "estimation")
EXAMPLES_PER_DEVICE = 8  # of a call; the counts do not depend on it


class Counter:
  """Counts of classes under noise; stops and goes on at any block.

  A block is one chunk of noise on some examples. Counts are sums of integers
  that depend on the key, the ids and the number of a chunk only, so neither
  the blocks nor the devices change them: what was counted on some devices goes
  on with others.

  Args:
    model: any model.
    params: its parameters.
    state: its state.
    data: the examples; noise belongs to their ``id``.
    noise: a ``smoothing.Noise``.
    key: of the noise.
    num_selection: samples that choose the class.
    num_estimation: samples that count it.
    chunk_size: copies of one example in a forward pass; it decides the noise.
    sharding: of the leading axis, for several devices.

  Attributes:
    tallies: ``{stage: int32 [n, k + 1]}``, the counts so far and, last, of how
      many chunks; in one array, so that an interruption cannot part them.
    done: blocks looked at so far.
    num_blocks: of the whole job.
  """

  def __init__(
    self,
    model: Model,
    params,
    state,
    data: batches.Data,
    *,
    noise: smoothing.Noise,
    key,
    num_selection: int,
    num_estimation: int,
    chunk_size: int = smoothing.CHUNK_SIZE,
    sharding=None,
  ):
    smoothing.check(noise, data.inputs)
    self._noise, self._data = noise, data
    device = batches.Device({}, {}, sharding=sharding)
    self._sharding, self._largest = sharding, chunk_size
    devices = 1 if sharding is None else len(sharding.device_set)
    self._size = EXAMPLES_PER_DEVICE * devices
    self._predict = device.replicate(smoothing.predict_fn(model, params, state))
    self._keys = dict(zip(STAGES, smoothing.streams(key)))
    self._samples = dict(zip(STAGES, (num_selection, num_estimation)))
    self._compiled = {stage: self._compile(stage) for stage in STAGES}
    shape = (data.size, model.num_classes + 1)
    self.tallies = {stage: np.zeros(shape, np.int32) for stage in STAGES}
    self.done = 0
    self._blocks = [
      (stage, first, start)
      for first in range(0, data.size, self._size)
      for stage in STAGES
      for start in range(self._num_chunks(stage))
    ]
    self.num_blocks = len(self._blocks)

  def restore(self, tallies) -> None:
    """Goes on from the ``tallies`` of another counter.

    Raises:
      ValueError: they are not of so many examples, classes and chunks.
    """
    for stage in STAGES:
      kept, wanted = tallies[stage], self.tallies[stage]
      if kept.shape != wanted.shape or kept.dtype != wanted.dtype:
        raise ValueError(
          f"{stage} has counts {kept.dtype} {kept.shape}, not {wanted.dtype} "
          f"{wanted.shape}"
        )
      most = self._num_chunks(stage)
      if kept.min() < 0 or kept[:, -1].max() > most:
        raise ValueError(f"{stage} has counts that cannot be")
    self.tallies = {stage: np.array(tallies[stage]) for stage in STAGES}

  def advance(self) -> bool:
    """Counts the next block; False where it was counted before."""
    stage, first, start = self._blocks[self.done]
    self.done += 1
    rows = np.arange(first, min(first + self._size, self._data.size))
    # Other devices may have left some rows of it done.
    left = self.tallies[stage][rows, -1] == start
    if not left.any():
      return False
    # Filled up with the last row, so that there is one shape.
    padded = np.arange(first, first + self._size).clip(max=rows[-1])
    chunk = self._data.chunk(padded)
    del chunk["label"]
    # Noise belongs to the data set's ids, not to places in this selection.
    chunk["id"] = self._data.id[padded].astype(np.int32)
    if self._sharding is not None:
      chunk = jax.device_put(chunk, self._sharding)
    found = self._compiled[stage](
      self._predict, chunk, self._keys[stage], start, self._samples[stage]
    )
    fresh = np.asarray(found)[: len(rows)][left]
    one = np.ones((len(fresh), 1), np.int32)
    self.tallies[stage][rows[left]] += np.concatenate([fresh, one], axis=-1)
    return True

  def certificate(self, *, alpha: float, units) -> Any:
    """The ``SmoothedCertificate`` of all counts."""
    return smoothing.from_counts(
      *(self.tallies[stage][:, :-1] for stage in STAGES),
      noise=self._noise,
      present=self._data.present,
      shapes={m: x.shape[1:] for m, x in self._data.inputs.items()},
      num_estimation=self._samples["estimation"],
      alpha=alpha,
      units=units,
    )

  def _chunk_size(self, stage: str) -> int:
    return min(self._largest, self._samples[stage])

  def _num_chunks(self, stage: str) -> int:
    return -(-self._samples[stage] // self._chunk_size(stage))

  def _compile(self, stage: str):
    options = {
      "noise": self._noise,
      "num_chunks": 1,
      "chunk_size": self._chunk_size(stage),
    }

    def count(predict, chunk, key, start, num_samples):
      # The counted function is the one that the other numbers are about.
      with jax.default_matmul_precision(batches.PRECISION):
        return smoothing.count_classes(
          predict,
          chunk["inputs"],
          chunk["present"],
          chunk["id"],
          key,
          start,
          num_samples,
          **options,
        )

    if not isinstance(self._sharding, NamedSharding):
      return jax.jit(count)
    # Examples have nothing to do with each other: every device maps over its
    # own, where automatic sharding would give all of them to all devices.
    mesh, whole = self._sharding.mesh, PartitionSpec()
    mapped = jax.shard_map(
      count,
      mesh=mesh,
      in_specs=(whole, self._sharding.spec, whole, whole, whole),
      out_specs=self._sharding.spec,
      check_vma=False,
    )
    return jax.jit(mapped, out_shardings=NamedSharding(mesh, whole))


def make_counter(
  model, params, state, data, settings, *, units, key, sharding
) -> Counter:
  """The counter of ``settings`` as in a protocol, sigma in units."""
  noise = smoothing.from_settings(
    data.names, sigma=settings["sigma"], keep=settings["keep"], units=units
  )
  return Counter(
    model,
    params,
    state,
    data,
    noise=noise,
    key=key,
    num_selection=settings["num_selection"],
    num_estimation=settings["num_estimation"],
    chunk_size=settings["chunk_size"],
    sharding=sharding,
  )


def entry(found, protocol, data: batches.Data) -> dict | None:
  """The ``"smoothed"`` entry of the results, None without a certificate.

  Args:
    found: the certificate of the data, or None.
    protocol: with the radii of the l2 curves.
    data: the examples.
  """
  if found is None:
    return None
  right = (found.prediction == data.label) & data.counted
  return {
    **summary.share(right, data.counted),
    "abstained": float(np.mean(found.prediction[data.counted] < 0)),
    "kind": found.kind,
    "settings": dict(protocol.smoothing),
    "rows": _rows(found, protocol, right, data),
  }


def _rows(found, protocol, right, data) -> list[dict]:
  alone = found.modality_radius
  curves = []
  if found.noise.kind != "mixed":
    counted = found.noise.kind == "subsample"
    curves = [(data.names, found.radius, counted, protocol.radii)]
  if len(data.names) > 1 or not curves:
    for name in data.names:
      counted = found.noise.kept(name) is not None
      grid = protocol.modality_grid(name)
      curves.append(((name,), alone[name], counted, grid))
  rows = []
  for names, reach, elements, radii in curves:
    sizes = _numbers(reach) if elements else radii
    for size in sizes:
      # A number of elements is certified itself, a ball without its edge.
      held = reach >= size if elements else reach > size
      rows.append(
        {
          "radius": float(size),
          "modalities": list(names),
          **summary.share(right & held, data.counted),
          "norm": 0 if elements else 2,
        }
      )
  return rows


def _numbers(reach) -> list[int]:
  """1, 2, 4, ... elements, as far as any example is certified."""
  finite = reach[np.isfinite(reach)]
  most = int(finite.max()) if finite.size else 0
  return [2**power for power in range(most.bit_length())] or [1]


def columns(found, names) -> dict[str, Any]:
  """The columns of examples.csv that rest on the smoothed classifier."""
  given = {
    "smoothed_prediction": found.prediction,
    "smoothed_p_lower": found.p_lower,
  }
  if found.noise.kind != "mixed":
    given["smoothed_radius"] = found.radius
  alone = found.modality_radius
  return given | {f"smoothed_radius/{name}": alone[name] for name in names}
