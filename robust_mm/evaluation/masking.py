"""Do gradients mislead the attacks?

A model can hide its gradient (saturated, rounded, random) and look robust to
attacks that follow it. Nothing here proves that none is hidden; each check can
find that one is.
"""

import functools
import itertools
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
from robust_mm.evaluation import thorough as thorough_lib

# Near 1, 10, 100, 1000, and powers of two: dividing by them rounds nothing, so
# that a margin attack follows the very same path.
SCALES = (1, 8, 128, 1024)
# Shares of accuracy, as far as the number of examples can tell.
TOLERANCE = 0.01
SATURATED = 0.02
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

  - ``reaches_chance``: at a radius from which an input of another class can be
    reached PGD leaves no more right than chance, or than copying that input;
  - ``falls_with_radius``: a larger radius leaves no more;
  - ``many_steps_beat_one``: it leaves no more than one step of full length;
  - ``gradients_beat_queries``: nor more than Square with 200 queries;
  - ``attack_beats_noise``: noise of that size costs at most half as much;
  - ``margin_ignores_scale``: with logits divided by 8, 128 and 1024 PGD on the
    margin leaves the same;
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
    thorough: some ten more attacks, and statistics of margins, logits and
      gradients.
    surrogate: another model, best one trained with plain cross-entropy from
      another seed, with ``thorough``.
    seed: of the attacks.

  Returns:
    ``{"passed", "radius", "norm", "loss", "num_examples", "accuracy" {attack:
    share left}, "curve" [[radius, share left]], "scales" {loss: [[divisor,
    share left]]}, "checks" [{name, passed, message}]}``; with ``thorough`` also
    ``"effort" [[steps, restarts, share left]], "objectives" {name: share left},
    "statistics" {"model": {"quantiles", "margin", "logit_norm",
    "gradient_norm"}}, "worst_case"`` (the share that no attack at that radius
    broke, example by example: the number to quote), and with a surrogate
    ``"transfer"`` and its statistics.

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
  data = batches.host_data(model, batch)
  for argument, value in (("units", units), ("valid_range", valid_range)):
    if isinstance(value, Mapping):
      _validate.known(data.names, **{argument: value})
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
  return measure_thoroughly(
    probe, tried, data, device, model, radius=radius, surrogate=surrogate
  )


def measure_thoroughly(
  probe: probes.Probe,
  tried: Mapping[str, matrix.Attacker],
  data: batches.Data,
  device: batches.Device,
  model: Model,
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
    data,
    device,
    model,
    loss=found["loss"],
    radius=radius,
    white=found["accuracy"]["white box"],
    least=_least(probe),
    surrogate=surrogate,
  )
  checks = [*found["checks"], *(_check(*check) for check in checks)]
  return {
    **found,
    **more,
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
  least = _least(probe)
  checks = [
    *_curve_checks(curve, copied, probe.num_classes, least),
    *_rival_checks(attacked, least),
    *(_scale_check(name, found, least) for name, found in scales.items()),
  ]
  return {
    "passed": all(check["passed"] for check in checks),
    "radius": radius,
    "norm": protocol_lib.jsonable(probe.norm),
    "loss": loss,
    "num_examples": probe.num_examples,
    "accuracy": attacked,
    "curve": [list(point) for point in curve],
    "scales": {name: list(map(list, p)) for name, p in scales.items()},
    "checks": checks,
  }


def summary_check(found: Mapping[str, Any]) -> dict[str, Any]:
  """The one line of a report."""
  failed = [check for check in found["checks"] if not check["passed"]]
  where = f"{found['num_examples']} examples at size {found['radius']:g}"
  if failed:
    message = (
      "Gradients may mislead the attacks, so attacked accuracies are too high: "
      f"{' '.join(check['message'] for check in failed)} ({where})"
    )
  else:
    message = (
      f"No sign that gradients mislead the attacks: {where}, random search "
      f"left {found['accuracy']['queries']:.0%}, noise "
      f"{found['accuracy']['noise']:.0%}, the attack "
      f"{found['accuracy']['white box']:.0%}."
    )
  return {
    "name": "gradients_do_not_mislead",
    "passed": not failed,
    "required": False,
    "message": message,
  }


def _least(probe: probes.Probe) -> float:
  """The smallest difference of shares that counts."""
  return max(TOLERANCE, 1 / probe.num_examples) + 1e-6


def _check(name, passed, message):
  return {"name": name, "passed": bool(passed), "message": message}


def _curve_checks(curve, copied, num_classes, least):
  (first, _), (last, left) = curve[0], curve[-1]
  allowed = max(1 / num_classes, copied)
  rises = [b - a for (_, a), (_, b) in itertools.pairwise(curve)]
  points = ", ".join(f"{share:.0%} at {r:.3g}" for r, share in curve)
  return [
    _check(
      "reaches_chance",
      left <= allowed + least,
      f"At size {last:.3g} the attack leaves {left:.0%} right; chance is "
      f"{1 / num_classes:.0%}, copying another example leaves {copied:.0%}.",
    ),
    _check(
      "falls_with_radius",
      max(rises, default=0.0) <= least,
      f"From size {first:.3g} on it leaves {points}.",
    ),
  ]


def _rival_checks(attacked, least):
  clean, white = attacked["clean"], attacked["white box"]
  noise = attacked["noise"]
  return [
    *(
      _check(
        name,
        white <= attacked[other] + least,
        f"The attack leaves {white:.0%}, {words} {attacked[other]:.0%}.",
      )
      for name, other, words in (
        ("many_steps_beat_one", "one step", "one step"),
        ("gradients_beat_queries", "queries", "random search"),
      )
      if other in attacked
    ),
    _check(
      "attack_beats_noise",
      clean - noise <= (clean - white) / 2 + least,
      f"Noise takes accuracy from {clean:.0%} to {noise:.0%}, the "
      f"attack to {white:.0%}: where noise does as much, the size is too "
      "large or the attack broken.",
    ),
  ]


def _scale_check(loss, found, least):
  whole, *divided = (share for _, share in found)
  if loss != "cross_entropy":
    spread = max(abs(share - whole) for share in divided)
    return _check(
      f"{loss}_ignores_scale",
      spread <= least,
      f"Divided logits change what the attack on the {loss} loss leaves by up "
      f"to {spread:.0%}.",
    )
  best = min(divided)
  return _check(
    "cross_entropy_unsaturated",
    whole - best <= max(SATURATED, least),
    f"The attack on the cross-entropy leaves {whole:.0%}, with divided logits "
    f"{best:.0%}: a loss with the margin sees more.",
  )
