"""Checks of the gradients that cost many attacks: effort, objectives, transfer.

Beside those of ``masking``, and only when asked for.
"""

import dataclasses
from typing import Any

from robust_mm._types import Model
from robust_mm.evaluation import batches
from robust_mm.evaluation import probes
from robust_mm.evaluation import slopes

# (steps, restarts): a doubling of each at the end.
EFFORTS = ((10, 1), (50, 1), (100, 1), (200, 1), (50, 5), (50, 10), (50, 20))
DOUBLED = (((100, 1), (200, 1)), ((50, 10), (50, 20)))
OBJECTIVES = ("margin", "cross_entropy", "dlr")
STEPS = 50
NUM_QUERIES = 5000
NUM_DRAWS = 100


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Surrogate:
  """Another model of the same inputs, whose adversarial points are borrowed.

  Best one of the same architecture, trained with plain cross-entropy from
  another seed.

  Attributes:
    model: of the same modalities and classes.
    params: its parameters.
    state: its state.
  """

  model: Model
  params: Any
  state: Any = None


def check_surrogate(
  model: Model, surrogate: Surrogate | None, protocol: Any = None
) -> None:
  """ValueError where its points would be no attack, or nobody would look."""
  if surrogate is None:
    return
  if protocol is not None and not (
    protocol.masking_thorough and protocol.checks_masking
  ):
    raise ValueError(
      "surrogate needs a protocol with masking_thorough, masking_examples, an "
      "attack and radii: nothing else looks at its points."
    )
  for name in ("modalities", "num_classes"):
    mine, other = (getattr(m, name) for m in (model, surrogate.model))
    if mine != other:
      raise ValueError(
        f"surrogate must have the {name} of the model, {mine}; got {other}."
      )
  shapes = model.input_shapes, surrogate.model.input_shapes
  for name in model.modalities if all(shapes) else ():
    mine, other = (known[name] for known in shapes)
    if mine != other:
      raise ValueError(
        f"surrogate must have the input shape of the model, {mine}, for "
        f"{name!r}; got {other}."
      )


def measure(
  probe: probes.Probe,
  *,
  loss: str,
  radius: float,
  white: float,
  least: float,
  surrogate: Surrogate | None,
) -> tuple[dict[str, Any], list[tuple[str, bool, str]]]:
  """``(found, checks)``, to go into a masking report.

  A check is ``(name, passed, message)``.

  Args:
    probe: of the examples.
    loss: of the attack that is judged.
    radius: in units.
    white: what that attack leaves.
    least: the smallest difference that counts.
    surrogate: to borrow adversarial points from; None for no such check.
  """
  effort = _effort(probe, radius, loss)
  objectives = _objectives(probe, radius)
  gains = [effort[half] - effort[whole] for half, whole in DOUBLED]
  best = min(objectives, key=objectives.get)
  checks = [
    (
      "more_effort_finds_no_more",
      max(gains) <= least,
      f"Twice the steps break {gains[0]:.1%} more, twice the restarts "
      f"{gains[1]:.1%}.",
    ),
    (
      "no_objective_is_stronger",
      white <= objectives[best] + least,
      f"The attack leaves {white:.0%}; with {STEPS} steps the objective "
      f"{best!r} leaves {objectives[best]:.0%}.",
    ),
  ]
  found = {
    "effort": [[*key, share] for key, share in effort.items()],
    "objectives": objectives,
    "statistics": {},
  }
  if surrogate is not None:
    left, found["statistics"]["surrogate"] = _transfer(
      probe, radius, loss, surrogate
    )
    found["transfer"] = left
    checks.append(
      (
        "white_box_beats_transfer",
        white <= left + least,
        f"The attack leaves {white:.0%}, points made for another model "
        f"{left:.0%}.",
      )
    )
  return found, checks


def _effort(probe, radius, loss):
  return {
    (steps, restarts): probe.left(
      radius, name="pgd", loss=loss, num_steps=steps, num_restarts=restarts
    )
    for steps, restarts in EFFORTS
  }


def _objectives(probe, radius):
  found = {
    name: probe.left(
      radius, name="pgd", loss=name, num_steps=STEPS, targets="any"
    )
    for name in OBJECTIVES
  }
  # The first restart raises any class, the next ones each wrong class in turn,
  # the second best first.
  found["margin of every class"] = probe.left(
    radius,
    name="pgd",
    loss="margin",
    num_steps=STEPS,
    num_restarts=probe.num_classes,
  )
  # Where wrong logits are alike none is a better target than another by itself.
  found["margin, adaptive targets"] = probe.left(
    radius,
    name="pgd",
    loss="margin",
    num_steps=STEPS,
    num_restarts=2,
    targets="adaptive",
  )
  return found


def _transfer(probe, radius, loss, surrogate):
  """``(share left, statistics)`` of another model's adversarial points."""
  other = batches.Device(surrogate.params, surrogate.state or {})
  moved = probe.moved_by(
    surrogate.model, other, radius, loss=loss, num_steps=STEPS
  )
  seen = probe.slopes(surrogate.model, other)
  return probe.left_at(radius, moved), slopes.quantiles(seen)
