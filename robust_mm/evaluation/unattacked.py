"""``evaluate`` of a model that does not classify: no attacks on it.

What is measured is a :class:`Task`, of ``regression`` and ``multi_label``.
"""

import time
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

from robust_mm import _tasks
from robust_mm import modalities
from robust_mm.evaluation import batches
from robust_mm.evaluation import circumstances
from robust_mm.evaluation import forwards
from robust_mm.evaluation import progress as progress_lib
from robust_mm.evaluation import protocol as protocol_lib
from robust_mm.evaluation import report as report_lib
from robust_mm.evaluation import shifts as shifts_lib

_ABOUT_CLASSES = {
  "contributions": None,
  "attacked": [],
  "certified": [],
  "region": None,
  "vulnerability": None,
  "smoothed": None,
  "tightness": None,
  "captions": None,
  "masking": None,
}
_COLUMNS = {
  "id": "the example's id in the data set, or its row number",
  "counted": "1 if at least one modality is present; 0 is in no average",
}


class Task(NamedTuple):
  """What a task measures in place of accuracies.

  Attributes:
    name: as ``Model.task`` says it.
    why: there are no certificates.
    make_measure: ``make_measure(data)`` gives ``measure(data, prediction,
      counted)``, the numbers of one row; by the first rows are compared.
    chance: ``chance(label)``, further numbers of the clean row: what a
      prediction that knows nothing of the inputs has.
    columns: ``columns(data, prediction)``, ``{column: [n]}`` of examples.
    meanings: ``{column: what it says}``.
  """

  name: str
  why: str
  make_measure: Callable[[batches.Data], Callable[..., dict]]
  chance: Callable[[np.ndarray], dict]
  columns: Callable[[batches.Data, np.ndarray], dict]
  meanings: Mapping[str, str]


def evaluate(
  task: Task,
  model,
  params,
  batch,
  *,
  state,
  protocol: protocol_lib.Protocol | None,
  seed: int,
  key,
  reference,
  name: str | None,
  recipe: str | None,
  dataset: str | None,
  progress,
  sharding,
) -> report_lib.Report:
  """The task clean, with missing and with corrupted modalities.

  Further arguments as of :func:`evaluation.evaluate`.

  Raises:
    ValueError: bad data, or a protocol with attacks or certificates.
  """
  started = time.perf_counter()
  protocol = _protocol(task, protocol)
  state = {} if state is None else state
  data = batches.host_data(model, batch, max_examples=protocol.max_examples)
  if not data.counted.any():
    raise ValueError("batch has no example with a modality present.")
  shifts_lib.check(protocol, data)
  if reference is not None:
    inputs, present = batches.host_inputs(model, reference)
    reference = {"inputs": inputs, "present": present}
  suite = shifts_lib.suite(protocol, data, reference)
  device = batches.Device(params, state, sharding=sharding)
  size = device.chunk_size(min(protocol.batch_size, data.size))
  forward = forwards.Forward(model, device, size=size)
  bench = shifts_lib.Bench(forward, device, data, size, task.make_measure(data))
  subsets = protocol.subset_names(data.names)
  key = jax.random.key(seed) if key is None else key
  timing = {}
  total = 1 + len(protocol.missing_rates) + len(suite)
  with progress_lib.Ticker(progress, total) as tick:
    every = data.names
    said = forwards.predictions(forward, data, dict.fromkeys([*subsets, every]))
    tick("clean and missing modalities")
    timing["predict_seconds"] = time.perf_counter() - started
    shifted = {
      "missing": shifts_lib.missing(bench, protocol, tick),
      "corrupted": shifts_lib.corrupted(
        bench, suite, key=jax.random.fold_in(key, 3), tick=tick
      ),
    }
  timing["total_seconds"] = time.perf_counter() - started
  timing["peak_memory_mib"] = circumstances.peak_memory()
  prediction = said[every][0]
  columns = _columns(task, data, prediction)
  meanings = {**_COLUMNS, **task.meanings}
  results = {
    "schema_version": report_lib.SCHEMA_VERSION,
    "task": task.name,
    "name": name or recipe or "model",
    "dataset": dataset,
    "recipe": recipe,
    "seed": seed,
    "settings": {
      **protocol.settings,
      "attacks": {},
      "certificate": circumstances.certificate_settings(
        protocol, None, task.why
      ),
      **circumstances.settings(model, data, reference, sharding),
    },
    "clean": {
      **bench.measure(data, prediction, data.counted),
      **task.chance(data.label[data.counted]),
    },
    "subsets": {
      modalities.subset_name(subset): bench.measure(data, *said[subset])
      for subset in subsets
    },
    **shifted,
    **_ABOUT_CLASSES,
    "units": dict.fromkeys(data.names, 1.0),
    "checks": [_finite(prediction[data.counted])],
    "examples": {
      "num_examples": data.size,
      "num_left_out": int((~data.counted).sum()),
      "columns": {
        column: meanings.get(column, "1 if this modality is present")
        for column in columns
      },
    },
    "timing": timing,
  }
  return report_lib.Report(
    results=protocol_lib.jsonable(results), examples=columns
  )


def _protocol(task, protocol) -> protocol_lib.Protocol:
  if protocol is None:
    return protocol_lib.standard(attack=None, certificate=None, tightness=())
  if protocol.attacks or protocol.certificate not in (None, "auto"):
    raise ValueError(
      "protocol must have attack=None and certificate=None for a model that "
      f"predicts {_tasks.PREDICTS[task.name]}."
    )
  return protocol


def _columns(task: Task, data: batches.Data, prediction) -> dict[str, Any]:
  columns = {
    "id": data.id,
    **task.columns(data, prediction),
    "counted": data.counted,
  }
  for name in data.names:
    columns[f"present/{name}"] = data.present[name]
  return columns


def _finite(prediction: np.ndarray) -> dict:
  whole = np.isfinite(prediction.reshape(len(prediction), -1)).all(axis=1)
  bad = int((~whole).sum())
  return {
    "name": "finite_predictions",
    "passed": bad == 0,
    "required": True,
    "message": f"{bad} of {len(prediction)} predictions are not finite.",
  }
