"""``evaluate``: from a trained model and a data set to a report."""

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from robust_mm import _validate
from robust_mm import certification
from robust_mm._types import Batch
from robust_mm._types import Model
from robust_mm.evaluation import batches
from robust_mm.evaluation import bounds as bounds_lib
from robust_mm.evaluation import circumstances
from robust_mm.evaluation import forwards
from robust_mm.evaluation import masking as masking_lib
from robust_mm.evaluation import matrix
from robust_mm.evaluation import multi_label
from robust_mm.evaluation import probes
from robust_mm.evaluation import progress as progress_lib
from robust_mm.evaluation import protocol as protocol_lib
from robust_mm.evaluation import regression
from robust_mm.evaluation import report as report_lib
from robust_mm.evaluation import shifts as shifts_lib
from robust_mm.evaluation import smoothed as smoothed_lib
from robust_mm.evaluation import spelling
from robust_mm.evaluation import summary
from robust_mm.evaluation import thorough as thorough_lib
from robust_mm.evaluation import unattacked
from robust_mm.evaluation import verdicts

_TASKS = {task.name: task for task in (regression.TASK, multi_label.TASK)}


def evaluate(
  model: Model,
  params: Any,
  batch: Batch,
  *,
  state: Any = None,
  protocol: protocol_lib.Protocol | None = None,
  seed: int = 0,
  key: Any = None,
  reference: Batch | None = None,
  name: str | None = None,
  recipe: str | None = None,
  dataset: str | None = None,
  progress: Any = None,
  sharding: Any = None,
  surrogate: thorough_lib.Surrogate | None = None,
) -> report_lib.Report:
  r"""Clean, subset, attacked and certified accuracy of one model.

  Of a regression errors, and of several labels the mean average precision,
  without attacks and certificates.

  An example with no modality present is in no average. At every radius

  .. math:: \text{certified} \le \text{true robust accuracy} \le \text{attacked}

  when the certificate is sound; ``results["checks"]`` compares the two ends.

  >>> report = evaluate(model, params, test, protocol=standard(radii=(0.1,)),
  ...                   reference=train)                    # doctest: +SKIP
  >>> report.save("runs/crmt/report")                       # doctest: +SKIP

  Args:
    model: any model that keeps the contract.
    params: its parameters, wherever they live.
    batch: the test data as host arrays: ``inputs {m: [n, ...]}``, ``label
      [n]`` or ``[n, k]``, and, where they are not trivial, ``present`` and
      ``id``.
    state: the model's state; None for an empty one.
    protocol: what to measure; :func:`evaluation.standard` by default.
    seed: of the attacks, and noted in the results.
    key: a JAX key for the attacks instead of one from ``seed``.
    reference: training data, for relative units and estimated constants.
    name: what the report calls this model; the recipe's name by default.
    recipe: how it was trained, a word.
    dataset: what the report calls the data.
    progress: True for a progress bar (quiet when not at a terminal), or
      ``progress(done, total, what)``.
    sharding: of the leading axis of batches, for several devices.
    surrogate: a model whose adversarial points are tried on this one, where
      the protocol has ``masking_thorough``.

  Returns:
    A :class:`Report`; its ``results`` are described by ``evaluation.SCHEMA``.

  Raises:
    ValueError: bad data or a protocol the model cannot follow, naming it.
  """
  if not model.classifies:
    return unattacked.evaluate(
      _TASKS[model.task],
      model,
      params,
      batch,
      state=state,
      protocol=protocol,
      seed=seed,
      key=key,
      reference=reference,
      name=name,
      recipe=recipe,
      dataset=dataset,
      progress=progress,
      sharding=sharding,
    )
  started = time.perf_counter()
  protocol = protocol_lib.standard() if protocol is None else protocol
  thorough_lib.check_surrogate(model, surrogate, protocol)
  spelling.check(model, protocol.captions)
  state = {} if state is None else state
  data = batches.host_data(model, batch, max_examples=protocol.max_examples)
  _check_names(protocol, data.names)
  if not data.counted.any():
    raise ValueError("batch has no example with a modality present.")
  if reference is not None:
    inputs, present = batches.host_inputs(model, reference)
    reference = {"inputs": inputs, "present": present}
  units = _units(protocol, data.names, reference)
  source, reason = bounds_lib.choose_source(
    model,
    params,
    protocol.certificate,
    has_reference=reference is not None,
    mixed=bounds_lib.is_mixed(model, params, state, data),
  )
  key = jax.random.key(seed) if key is None else key
  session = _Session(model, params, state, data, protocol, units, sharding)
  session.surrogate = surrogate
  session.prepare_smoothing(key)
  session.prepare_corruptions(reference)
  with progress_lib.Ticker(progress, session.num_ticks(source)) as tick:
    predictions = session.predict(tick)
    prediction = predictions.pop(None)
    correct = (prediction == data.label) & data.counted
    cells = session.attack(key, correct, tick)
    bounds, reason = session.certify(source, reason, reference, tick)
    tightness = session.tightness(key, bounds, tick)
    masking = session.masking(key, tick)
    spelled = spelling.of_protocol(model, params, state, batch, protocol, tick)
    smoothed = session.smooth(tick)
    shifted = session.shift(key, tick)
  session.timing["total_seconds"] = time.perf_counter() - started
  session.timing["peak_memory_mib"] = circumstances.peak_memory()
  columns = summary.example_columns(data, prediction, cells, bounds)
  if smoothed is not None:
    columns |= smoothed_lib.columns(smoothed, data.names)
  found = {
    "clean": summary.share(correct, data.counted),
    "subsets": summary.subset_rows(predictions, data),
    "contributions": shifts_lib.contributions(predictions, data),
    **shifted,
    "attacked": summary.attacked_rows(cells, protocol, data),
    **summary.bound_entries(bounds, protocol, correct, data),
    "smoothed": smoothed_lib.entry(smoothed, protocol, data),
    "tightness": tightness,
    "units": units,
    "checks": [
      *summary.checks(cells, bounds, correct, data),
      *summary.tightness_checks(tightness),
      *([verdicts.summary(masking)] if masking else []),
    ],
    "captions": spelled,
    "masking": masking,
    "examples": summary.example_entry(data, columns),
    "timing": session.timing,
  }
  _say_loudly(found["checks"])
  settings = {
    **protocol.settings,
    "attacks": session.attack_settings,
    "certificate": circumstances.certificate_settings(protocol, bounds, reason),
    "corruptions": session.corruption_settings,
    **circumstances.settings(model, data, reference, sharding),
  }
  labels = {
    "schema_version": report_lib.SCHEMA_VERSION,
    "task": "classification",
    "name": name or recipe or "model",
    "dataset": dataset,
    "recipe": recipe,
    "seed": seed,
  }
  results = {**labels, "settings": settings, **found}
  return report_lib.Report(
    results=protocol_lib.jsonable(results), examples=columns
  )


def _say_loudly(checks) -> None:
  for check in checks:
    if check["required"] and not check["passed"]:
      logging.getLogger(__name__).error("%s", check["message"])


class _Session:
  """What the stages of one evaluation share; each notes its seconds."""

  def __init__(self, model, params, state, data, protocol, units, sharding):
    self._model, self._params, self._state = model, params, state
    self._data, self._protocol, self._units = data, protocol, units
    self._sharding = sharding
    self._device = batches.Device(params, state, sharding=sharding)
    size = min(protocol.batch_size, data.size)
    self._size = self._device.chunk_size(size)
    self._subsets = protocol.subset_names(data.names)
    self._factors = protocol.tightness if protocol.attacks else ()
    self.timing, self.surrogate = {}, None
    self.attack_settings, self._attackers = {}, {}
    self._forward = forwards.Forward(model, self._device, size=self._size)
    self._make_attackers()
    self._counter, self._corruptions = None, {}

  def num_ticks(self, source) -> int:
    """How often the stages will report progress."""
    plan = matrix.attack_plan(self._protocol, self._data.names)
    ticks = 1 + len(self._protocol.attacks) * len(plan)
    ticks += self._protocol.checks_masking
    ticks += self._model.captions is not None
    ticks += len(self._protocol.missing_rates) + len(self._corruptions)
    if self._counter is not None:
      ticks += self._counter.num_blocks
    return ticks if source is None else ticks + 1 + len(self._factors)

  def predict(self, tick) -> dict:
    """Predictions of each subset, and of everything under None."""
    start = time.perf_counter()
    every = self._data.names
    subsets = dict.fromkeys([*self._subsets, every])
    predictions = forwards.predictions(self._forward, self._data, subsets)
    clean = predictions[every][0]
    tick("clean and missing modalities")
    self.timing["predict_seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    rows = np.arange(min(self._size, self._data.size))
    self._forward(self._data, rows, every)
    self.timing["forward_chunk_seconds"] = time.perf_counter() - start
    return {
      **{subset: predictions[subset] for subset in self._subsets},
      None: clean,
    }

  def _make_attackers(self) -> None:
    """One attacker an attack, and its settings under the same name."""
    for given in self._protocol.attacks:
      name = given["name"]
      while name in self._attackers:
        name += "+"
      attack = matrix.make_attack(given, self._protocol, units=self._units)
      self.attack_settings[name] = {**given, **dict(attack.settings)}
      # The radius is the row's; what the factory was given is only a default.
      self.attack_settings[name].pop("budget", None)
      self._attackers[name] = matrix.Attacker(
        self._model,
        self._device,
        attack,
        self._forward,
        units=self._units,
        norm=self._protocol.norm,
        size=self._size,
      )

  def attack(self, key, correct, tick) -> list[matrix.Cell]:
    """All cells of all attacks."""
    start = time.perf_counter()
    cells = []
    for number, (name, run) in enumerate(self._attackers.items()):
      cells += matrix.attacked(
        run,
        self._data,
        correct,
        self._protocol,
        name=name,
        key=jax.random.fold_in(key, number),
        tick=tick,
      )
    self.timing["attack_seconds"] = time.perf_counter() - start
    return cells

  def tightness(self, key, bounds, tick) -> dict | None:
    """Flips at multiples of each example's own radius, by the first attack."""
    if bounds is None or not self._factors:
      return None
    start = time.perf_counter()
    name = next(iter(self._attackers))
    found = matrix.tightness(
      self._attackers[name],
      self._data,
      bounds,
      self._factors,
      key=jax.random.fold_in(key, len(self._protocol.attacks)),
      tick=tick,
    )
    self.timing["tightness_seconds"] = time.perf_counter() - start
    if found is None:
      return None
    norm = protocol_lib.jsonable(bounds.norm)
    return {**found, "attack": name, "sound": bounds.sound, "norm": norm}

  def masking(self, key, tick) -> dict | None:
    """Whether gradients mislead the first attack; None where not asked."""
    protocol = self._protocol
    if not protocol.checks_masking:
      return None
    start = time.perf_counter()
    judged = next(iter(self._attackers.values())).first()
    data = masking_lib.some(self._data, protocol.masking_examples)
    probe = probes.Probe(
      self._model,
      self._forward,
      self._device,
      data,
      norm=protocol.norm,
      units=self._units,
      valid_range=protocol.valid_range,
      key=jax.random.fold_in(key, len(protocol.attacks) + 1),
    )
    if protocol.masking_thorough:
      rest = (self._forward, protocol, self._units, self._size)
      found = masking_lib.measure_thoroughly(
        probe,
        masking_lib.attackers(
          self._model, self._device, *rest, {judged.loss: judged}
        ),
        radius=protocol.middle_radius,
        surrogate=self.surrogate,
      )
    else:
      # What a first step does costs another program for a known answer.
      found = masking_lib.measure(
        probe,
        {judged.loss: judged},
        radius=protocol.middle_radius,
        one_step=False,
      )
    tick("masked gradients")
    self.timing["masking_seconds"] = time.perf_counter() - start
    return found

  def prepare_smoothing(self, key) -> None:
    """Refuses noise that does not fit before anything is measured."""
    if self._protocol.smoothing is not None:
      self._counter = smoothed_lib.make_counter(
        self._model,
        self._params,
        self._state,
        self._data,
        self._protocol.smoothing,
        units=self._units,
        # The attacks have the numbers before this one and the masking report.
        key=jax.random.fold_in(key, len(self._protocol.attacks) + 2),
        sharding=self._sharding,
      )

  def smooth(self, tick):
    """The smoothed certificate of every example, or None."""
    if self._counter is None:
      return None
    start = time.perf_counter()
    while self._counter.done < self._counter.num_blocks:
      self._counter.advance()
      tick("smoothing")
    self.timing["smoothing_seconds"] = time.perf_counter() - start
    return self._counter.certificate(
      alpha=self._protocol.smoothing["alpha"], units=self._units
    )

  def prepare_corruptions(self, reference) -> None:
    """Refuses what cannot be made before anything is measured."""
    shifts_lib.check(self._protocol, self._data)
    self._corruptions = shifts_lib.suite(self._protocol, self._data, reference)
    self.corruption_settings = shifts_lib.described(self._corruptions)

  def shift(self, key, tick) -> dict:
    """Accuracy by missing rate and under corruption, None where not asked."""
    start = time.perf_counter()
    bench = shifts_lib.Bench(
      self._forward, self._device, self._data, self._size
    )
    own = jax.random.fold_in(key, len(self._protocol.attacks) + 3)
    found = {
      "missing": shifts_lib.missing(bench, self._protocol, tick),
      "corrupted": shifts_lib.corrupted(
        bench, self._corruptions, key=own, tick=tick
      ),
    }
    if any(found.values()):
      self.timing["shift_seconds"] = time.perf_counter() - start
    return found

  def certify(self, source, reason, reference, tick):
    """``(bounds of every example or None, the reason in words)``.

    Where the protocol says "auto", a model that ``certify`` refuses has no
    certificate, and the reason is its sentence.
    """
    if source is None:
      return None, reason
    start = time.perf_counter()
    try:
      bounds, seconds = bounds_lib.certified(
        self._model,
        self._device,
        self._data,
        self._size,
        params=self._params,
        state=self._state,
        source=source,
        units=self._units,
        norm=self._protocol.norm,
        reference=reference,
      )
    except bounds_lib.Refused as error:
      if self._protocol.certificate != "auto":
        raise
      return None, f"The model was refused: {error}"
    tick("certificates")
    self.timing["certify_seconds"] = time.perf_counter() - start
    self.timing.update(seconds)
    return bounds, reason


def _check_names(protocol, names):
  for argument in ("modality_radii", "units", "valid_range"):
    value = getattr(protocol, argument)
    if isinstance(value, Mapping):
      _validate.known(names, **{argument: value})


def _units(protocol, names, reference) -> dict[str, float]:
  if protocol.units is None:
    return dict.fromkeys(names, 1.0)
  if protocol.units == "relative":
    if reference is None:
      raise ValueError(
        "reference is missing; units='relative' are measured on training data."
      )
    ball = "linf" if protocol.norm == math.inf else "l2"
    measured = certification.relative_units(reference, ball)
    return {name: float(measured[name]) for name in names}
  return {name: float(protocol.units.get(name, 1.0)) for name in names}
