"""What is kept under random absence and under corruption, and by whom."""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from robust_mm import corruptions as corruptions_lib
from robust_mm import missing as missing_lib
from robust_mm import modalities
from robust_mm._types import Batch
from robust_mm.evaluation import batches
from robust_mm.evaluation import forwards
from robust_mm.evaluation import metrics
from robust_mm.evaluation import protocol as protocol_lib
from robust_mm.evaluation import rows as rows_lib
from robust_mm.evaluation import summary

# Swapped samples come from so many evenly spaced examples.
MAX_DONORS = 512
LEGACY_BATCH = 32  # rows that lose the same in the protocol per_batch

Tick = Callable[[str], None]


class Bench(NamedTuple):
  """What a measurement needs.

  Attributes:
    forward: predicts; compiled once for everything.
    device: runs it.
    data: the examples.
    size: rows a call.
    measure: ``measure(data, prediction, counted)``, the numbers of a row; the
      first one is what rows are compared by.
  """

  forward: forwards.Forward
  device: batches.Device
  data: batches.Data
  size: int
  measure: Callable[..., dict] = summary.right


def suite(
  protocol: protocol_lib.Protocol, data: batches.Data, reference: Batch | None
) -> dict[str, corruptions_lib.Corruption]:
  """The corruptions a protocol asks for, none or many.

  Raises:
    ValueError: naming ``reference`` if noise needs it and it is missing.
  """
  if protocol.corruptions is None:
    return {}
  chosen = dict(protocol.corruptions)
  kinds = chosen.get("kinds") or corruptions_lib.kinds()
  scale = 1.0
  if "additive" in kinds:
    if reference is None:
      raise ValueError(
        "reference is missing; additive noise is in units of the standard "
        "deviation of training data."
      )
    scale = corruptions_lib.deviations(reference)
  shapes = {
    name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    for name, x in data.inputs.items()
  }
  return corruptions_lib.suite(shapes, scale=scale, **chosen)


def described(suite: Mapping[str, corruptions_lib.Corruption]) -> dict | None:
  """What a suite has, for the settings of a report; None of an empty one.

  Returns:
    ``{"kinds" {kind: {severity: strength}}, "together" (whether several
    modalities are corrupted at once), "correlated" (whether these share who,
    when and how much), "share" (chance of an example to be touched)}``.
  """
  if not suite:
    return None
  kinds = {}
  for one in suite.values():
    kinds.setdefault(one.kind, {})[str(one.severity)] = one.strength
  some = next(iter(suite.values()))
  return {
    "kinds": kinds,
    "together": any(len(one.modalities) > 1 for one in suite.values()),
    "correlated": some.correlated,
    "share": some.share,
  }


def check(protocol: protocol_lib.Protocol, data: batches.Data) -> None:
  """ValueError where the data do not fit what is to be lost of them."""
  if not protocol.missing_rates:
    return
  missing_lib.check_protocol(
    protocol.missing_protocol, data.names, _lengths(data)
  )


def missing(
  bench: Bench, protocol: protocol_lib.Protocol, tick: Tick
) -> dict | None:
  """Accuracy, or that of the task, by missing rate; masks alike for models."""
  if not protocol.missing_rates:
    return None
  data = bench.data.take(np.flatnonzero(bench.data.counted))
  seeds = list(range(protocol.missing_seeds))
  rows = []
  for rate in protocol.missing_rates:
    found, rates, digests = [], [], []
    for seed in seeds:
      seen, masks = _seen(protocol.missing_protocol, data, rate, seed)
      rates.append(_lost_share(masks, data))
      digests.append(missing_lib.digest(masks))
      said = bench.forward(seen, np.arange(data.size), data.names)
      found.append(bench.measure(seen, said, seen.counted))
    names = [n for n in found[0] if n not in ("interval", "num_examples")]
    rows.append(
      {
        "rate": rate,
        "achieved": float(np.mean(rates)),
        **{n: float(np.mean([row[n] for row in found])) for n in names},
        "by_seed": [row[names[0]] for row in found],
        "digests": digests,
        "num_examples": min(row["num_examples"] for row in found),
      }
    )
    tick(f"missing rate {rate:g}")
  return {
    "protocol": protocol.missing_protocol,
    "seeds": seeds,
    "rows": rows,
  }


def _seen(kind: str, data: batches.Data, rate: float, seed: int):
  """(the data without what is lost, ``{m: bool[n]}`` or ``[n, t]`` kept)."""
  if kind == "frames":
    return _without_frames(data, rate, seed)
  if kind == "per_sample":
    drawn = missing_lib.scores(
      data.names, data.size, seed=seed, present=data.present
    )
    present = missing_lib.per_sample(drawn, rate).present
  else:
    if kind == "one_kept":
      masks = missing_lib.one_kept(data.names, data.size, rate, seed=seed)
    else:
      masks = missing_lib.per_batch(
        data.names, data.size, rate, seed=seed, batch_size=LEGACY_BATCH
      )
    present = {n: flag & data.present[n] for n, flag in masks.present.items()}
  left = np.any(list(present.values()), axis=0)
  seen = dataclasses.replace(data, present=present, counted=left)
  return seen, present


def _without_frames(data: batches.Data, rate: float, seed: int):
  """Every frame, or token, of every modality that has time, by chance."""
  kept = missing_lib.frames(_lengths(data), data.size, rate, seed=seed)
  inputs = missing_lib.drop_frames(data.inputs, kept)
  seen = dataclasses.replace(
    data, inputs={name: np.asarray(x) for name, x in inputs.items()}
  )
  return seen, kept


def _lost_share(masks, data: batches.Data) -> float:
  """The missing rate; of frames that of those an example had."""
  if next(iter(masks.values())).ndim == 1:
    return missing_lib.achieved(masks)
  there = {name: data.present[name][:, None] for name in masks}
  lost = sum(np.sum(~flag & there[name]) for name, flag in masks.items())
  had = sum(flag.shape[1] * np.sum(there[name]) for name, flag in masks.items())
  return float(lost / max(had, 1))


def corrupted(
  bench: Bench,
  suite: Mapping[str, corruptions_lib.Corruption],
  *,
  key: Any,
  tick: Tick,
) -> dict | None:
  """Accuracy, or that of the task, under every corruption, and the mean."""
  if not suite:
    return None
  run = _run_fn(bench)
  data, rows = bench.data, []
  donors = bench.device.replicate(_donors(data))
  counted = np.flatnonzero(data.counted)
  prediction = np.full_like(data.label, -1)
  embeddings = bench.forward.embeddings(data, counted)
  for name, corruption in suite.items():
    given = donors if corruption.kind == "swap" else None
    chosen = forwards.keep_only(data.names, corruption.targets(data.inputs))
    extra = (corruption, key, given, chosen)
    prediction[counted] = bench.device.map(
      run,
      data,
      counted,
      bench.size,
      extra=lambda number, extra=extra: extra,
      aligned={"embeddings": embeddings},
    )
    rows.append(
      {
        "kind": corruption.kind,
        "modalities": list(corruption.modalities),
        "severity": corruption.severity,
        "strength": corruption.strength,
        **bench.measure(data, prediction, data.counted),
      }
    )
    tick(name)
  return {"rows": rows, **corruption_scores(rows)}


def _run_fn(bench):
  def change(params, state, chunk, corruption, key, donors):
    inputs, present = corruption(
      key,
      chunk["inputs"],
      chunk["present"],
      id=chunk["id"],
      label=chunk["label"],
      donors=donors,
    )
    return {**chunk, "inputs": inputs, "present": present}, ()

  # A program for each kind and modality, run at few severities.
  changed = bench.device.compile(change, moved=True, once=True)
  # That after it is one for all, and encodes again what has changed.
  forward = bench.forward.of_changed()

  def run(params, state, chunk, corruption, key, donors, chosen):
    moved, _ = changed(params, state, chunk, corruption, key, donors)
    return forward(params, state, moved, chosen)

  return run


def _donors(data: batches.Data) -> dict:
  count = min(MAX_DONORS, data.size)
  return data.chunk(np.linspace(0, data.size - 1, count).round().astype(int))


def corruption_scores(rows) -> dict:
  """``{"score", "scores": {kind: mean accuracy}}``; every kind counts alike.

  Of other tasks means of what their rows are compared by.
  """
  table = {}
  for row in rows:
    at = row["severity"], *row["modalities"]
    table.setdefault(row["kind"], {})[at] = row[rows_lib.main(row)]
  return {
    "score": metrics.mean_corruption_score(table),
    "scores": {k: float(np.mean(list(v.values()))) for k, v in table.items()},
  }


def contributions(predictions: Mapping, data: batches.Data) -> dict | None:
  """Shapley contributions to the accuracy, from the predictions of all subsets.

  An example that a subset leaves nothing counts as guessed, like the empty
  subset: as the commonest class.

  Args:
    predictions: ``{subset: (prediction [n], counted bool[n])}``.
    data: the examples.

  Returns:
    ``{"values": {m: contribution}, "empty": share of the commonest class}``,
    None where a subset was not measured or there is one modality.
  """
  wanted = modalities.subsets(data.names)
  if not 1 < len(data.names) <= metrics.MAX_MODALITIES:
    return None
  if not all(subset in predictions for subset in wanted):
    return None
  label = data.label[data.counted]
  guess = np.bincount(label).argmax()
  scores = {}
  for subset in wanted:
    prediction, counted = predictions[subset]
    said = np.where(counted, prediction, guess)[data.counted]
    scores[subset] = float(np.mean(said == label))
  empty = float(np.mean(label == guess))
  return {"values": metrics.shapley(scores, empty=empty), "empty": empty}


def _lengths(data: batches.Data) -> dict[str, int]:
  return corruptions_lib.lengths(
    {name: (x.shape[1:], x.dtype) for name, x in data.inputs.items()}
  )
