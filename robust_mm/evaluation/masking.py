"""Do gradients mislead the attacks?

A model can hide its gradient (saturated, rounded, random) and look robust to
attacks that follow it. Nothing here proves that none is hidden; each check can
find that one is.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from robust_mm import _validate
from robust_mm._types import Batch
from robust_mm._types import Model
from robust_mm.evaluation import batches
from robust_mm.evaluation import forwards
from robust_mm.evaluation import matrix
from robust_mm.evaluation import probes
from robust_mm.evaluation import protocol as protocol_lib
from robust_mm.evaluation import slopes
from robust_mm.evaluation import thorough as thorough_lib
from robust_mm.evaluation import verdicts

# No powers of two: those round nothing, and a margin attack would follow the
# very same path whatever the model.
SCALES = (1, 10, 100, 1000)
STEPS = {"num_steps": 20, "num_restarts": 2}
NUM_QUERIES = 200
NUM_DRAWS = 10


def masking_report(
  model: Model,
  params: Any,
  batch: Batch,
  *,
  radius: float,
  state: Any = None,
  norm: Any = 2,
  units: Any = None,
  valid_range: Any = None,
  loss: str = "margin",
  max_examples: int = 64,
  thorough: bool = False,
  surrogate: thorough_lib.Surrogate | None = None,
  seed: int = 0,
) -> dict[str, Any]:
  """Whether the gradients of a model can be believed by who attacks it.

  All attacks change all modalities in one ball. PGD means 20 steps and two
  restarts on ``loss``. A check passes when

  - ``conclusive``: the attack breaks something, so do copies of other examples,
    and there are at least 20 examples; else the report is open, not passed;
  - ``gradients_exist``: the gradient of the margin is finite and not zero for
    every right example;
  - ``reaches_chance``: at a radius from which an input of another class can be
    reached PGD leaves no more right than chance, or than copying that input;
  - ``falls_with_radius``: a larger radius leaves no more;
  - ``many_steps_beat_one``: it leaves no more than one step of full length;
  - ``gradients_beat_queries``: nor more than Square with 200 queries;
  - ``attack_beats_noise``: noise of that size costs at most half as much;
  - ``margin_ignores_scale``: with logits divided by 10, 100 and 1000 PGD on the
    margin leaves the same within half a point;
  - ``cross_entropy_unsaturated``: and PGD on the cross-entropy at most 2 points
    less,

  and with ``thorough`` (then 5,000 queries, 100 draws of noise) also when

  - ``more_effort_finds_no_more``: from 100 to 200 steps, from 10 to 20 restarts
    PGD breaks no more;
  - ``no_objective_is_stronger``: nor does PGD on the margin, the
    cross-entropy, the logit ratio, aimed at every wrong class in turn, or at
    the best and the nearest one;
  - ``white_box_beats_transfer``: nor points made for ``surrogate``;

  each within one point or one example, whichever is more. None of them proves
  that no gradient is masked; each can show that one is.

  >>> found = masking_report(model, params, test, radius=0.5)  # doctest: +SKIP
  >>> [c["message"] for c in found["checks"] if not c["passed"]]
  ...                                                          # doctest: +SKIP

  Args:
    model: any model that keeps the contract.
    params: its parameters.
    batch: host arrays, as for :func:`evaluation.evaluate`.
    radius: in units, one at which the attack breaks something.
    state: the model's state; None for an empty one.
    norm: 2 or infinity.
    units: None for raw, or ``{m: size of one unit}``.
    valid_range: ``{m: (low, high)}`` or ``(low, high)`` to stay in.
    loss: of the attack that is judged.
    max_examples: evenly spaced examples.
    thorough: a dozen more attacks.
    surrogate: another model, best one trained with plain cross-entropy from
      another seed, with ``thorough``.
    seed: of the attacks.

  Returns:
    ``{"passed", "radius", "norm", "loss", "num_examples", "accuracy" {attack:
    share left}, "curve" [[radius, share left]], "scales" {loss: [[divisor,
    share left]]}, "statistics" {"model": {"quantiles", "margin", "logit_norm",
    "gradient_norm"}}, "worst_case", "inconclusive", "checks" [{name, passed,
    message}]}``; the worst case is the share that nothing tried at that radius
    broke, example by example, noise included: the number to quote. With
    ``thorough`` also ``"effort" [[steps, restarts, share left]], "objectives"
    {name: share left}``, and with a surrogate ``"transfer"`` and statistics of
    it.

  Raises:
    ValueError: bad data or a bad argument, naming it.

  References:
    `Athalye et al. (2018) <https://arxiv.org/abs/1802.00420>`_;
    `Carlini et al. (2019) <https://arxiv.org/abs/1902.06705>`_.
  """
  model.need_classes("masking_report")
  _validate.positive(radius=radius)
  _validate.at_least(1, max_examples=max_examples)
  if surrogate is not None and not thorough:
    raise ValueError("surrogate goes with thorough=True.")
  thorough_lib.check_surrogate(model, surrogate)
  protocol = _protocol(model, radius, norm, units, valid_range)
  data = batches.host_data(model, batch)
  if not data.counted.any():
    raise ValueError("batch has no example with a modality present.")
  data = some(data, max_examples)
  device = batches.Device(params, {} if state is None else state)
  forward = forwards.Forward(model, device, size=data.size)
  units = {m: float((units or {}).get(m, 1.0)) for m in data.names}
  tried = attackers(model, device, forward, protocol, units, data.size, loss)
  probe = probes.Probe(
    model,
    forward,
    device,
    data,
    norm=protocol.norm,
    units=units,
    valid_range=valid_range,
    key=jax.random.key(seed),
  )
  if not thorough:
    return measure(probe, tried, radius=radius)
  return measure_thoroughly(probe, tried, radius=radius, surrogate=surrogate)


def _protocol(model, radius, norm, units, valid_range):
  if isinstance(units, str):
    raise ValueError(
      f"units must map modalities to sizes, got {units!r}; "
      "certification.relative_units measures them."
    )
  protocol = protocol_lib.standard(
    norm=norm,
    units=units,
    valid_range=valid_range,
    radii=(radius,),
  )
  for argument, value in (("units", units), ("valid_range", valid_range)):
    if isinstance(value, Mapping):
      _validate.known(model.modalities, **{argument: value})
  return protocol


def measure_thoroughly(
  probe: probes.Probe,
  tried: Mapping[str, matrix.Attacker],
  *,
  radius: float,
  surrogate: thorough_lib.Surrogate | None = None,
) -> dict[str, Any]:
  """:func:`measure` with more queries and draws, and what ``thorough`` adds."""
  found = measure(
    probe,
    tried,
    radius=radius,
    num_queries=thorough_lib.NUM_QUERIES,
    num_draws=thorough_lib.NUM_DRAWS,
  )
  more, checks = thorough_lib.measure(
    probe,
    loss=found["loss"],
    radius=radius,
    white=found["accuracy"]["white box"],
    least=verdicts.least(probe.num_examples),
    surrogate=surrogate,
  )
  checks = [*found["checks"], *(verdicts.check(*check) for check in checks)]
  return {
    **found,
    **more,
    "statistics": {**found["statistics"], **more["statistics"]},
    "worst_case": probe.worst(radius),
    "checks": checks,
    "passed": all(check["passed"] for check in checks),
  }


def attackers(
  model, device, forward, protocol, units, size, judged
) -> dict[str, matrix.Attacker]:
  """``{loss: attack}`` of this report: the judged one first, then PGD.

  ``judged`` is that attack, ``{loss: attack}``, or the name of its loss.
  """
  found = {} if isinstance(judged, str) else dict(judged)
  first = (judged,) if isinstance(judged, str) else ()
  for loss in (*first, "margin", "cross_entropy"):
    if loss in found:
      continue
    attack = matrix.make_attack(
      {"name": "pgd", "loss": loss, **STEPS}, protocol, units=units
    )
    found[loss] = matrix.Attacker(
      model,
      device,
      attack,
      forward,
      units=units,
      norm=protocol.norm,
      size=size,
    )
  return found


def some(data: batches.Data, number: int) -> batches.Data:
  """So many evenly spaced examples of those that have a modality."""
  rows = np.flatnonzero(data.counted)
  if number < len(rows):
    rows = rows[np.linspace(0, len(rows) - 1, number).round().astype(int)]
  return data.take(rows)


def measure(
  probe: probes.Probe,
  attackers: Mapping[str, matrix.Attacker],
  *,
  radius: float,
  one_step: bool = True,
  num_queries: int = NUM_QUERIES,
  num_draws: int = NUM_DRAWS,
) -> dict[str, Any]:
  """The report.

  Args:
    probe: the examples.
    attackers: ``{loss: attack}``; the first is judged, logits are divided under
      all.
    radius: in units.
    one_step: compare with one step as well, a program of its own.
    num_queries: of random search.
    num_draws: of noise.
  """
  loss = next(iter(attackers))

  @functools.cache
  def left(name, radius, scale=1):
    return probe.left_by(attackers[name], radius, scale=scale)

  attacked = {
    "clean": float(np.mean(probe.right())),
    "white box": left(loss, radius),
    "queries": probe.left(radius, name="square", num_queries=num_queries),
    "noise": probe.left_by_noise(radius, num_draws=num_draws),
  }
  if one_step:
    attacked["one step"] = probe.left(radius, name="fgm", loss=loss)
  far, copied = probe.copied()
  radii = [radius]
  if far > radius:
    radii += [math.sqrt(radius * far), 1.001 * far]
  curve = [(r, left(loss, r)) for r in radii]
  scales = {
    name: [(s, left(name, radius, s)) for s in SCALES] for name in attackers
  }
  seen = probe.slopes()
  checks = _checks(probe, attacked, (far, copied), curve, scales, seen)
  return {
    "passed": all(check["passed"] for check in checks),
    "inconclusive": not checks[0]["passed"],
    "radius": radius,
    "norm": protocol_lib.jsonable(probe.norm),
    "loss": loss,
    "num_examples": probe.num_examples,
    "accuracy": attacked,
    "worst_case": probe.worst(radius),
    "curve": [list(point) for point in curve],
    "scales": {name: list(map(list, p)) for name, p in scales.items()},
    "statistics": {"model": slopes.quantiles(seen)},
    "checks": checks,
  }


def _checks(probe, attacked, copies, curve, scales, seen):
  """Whether the others could have failed comes first."""
  number, (far, copied) = probe.num_examples, copies
  least = verdicts.least(number)
  return [
    verdicts.conclusive(number, attacked, far),
    verdicts.gradients_exist(probe.clean, probe.movable, seen["gradient_norm"]),
    verdicts.reaches_chance(curve[-1], copied, probe.num_classes, least),
    verdicts.falls_with_radius(curve, least),
    *verdicts.rivals(attacked, least),
    *(verdicts.scale(name, s, number) for name, s in scales.items()),
  ]
