"""Checks of the gradients that cost many attacks: effort, objectives, transfer.

Beside those of ``masking``, and only when asked for.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import margins
from robust_mm._types import Model
from robust_mm.evaluation import batches
from robust_mm.evaluation import probes

# (steps, restarts): a doubling of each at the end.
EFFORTS = ((10, 1), (50, 1), (100, 1), (200, 1), (50, 5), (50, 10), (50, 20))
DOUBLED = (((100, 1), (200, 1)), ((50, 10), (50, 20)))
OBJECTIVES = ("margin", "cross_entropy", "dlr")
STEPS = 50
NUM_QUERIES = 5000
NUM_DRAWS = 100
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


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
  data: batches.Data,
  device: batches.Device,
  model: Model,
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
    data: the examples.
    device: where the model runs.
    model: the one that is judged.
    loss: of the attack that is judged.
    radius: in units.
    white: what that attack leaves.
    least: the smallest difference that counts.
    surrogate: to borrow adversarial points from; None for no such check.
  """
  effort = {
    (steps, restarts): probe.left(
      radius, name="pgd", loss=loss, num_steps=steps, num_restarts=restarts
    )
    for steps, restarts in EFFORTS
  }
  objectives = {
    name: probe.left(
      radius, name="pgd", loss=name, num_steps=STEPS, targets="any"
    )
    for name in OBJECTIVES
  }
  # The first restart raises any class, the next ones each wrong class in turn,
  # the second best first.
  objectives["margin of every class"] = probe.left(
    radius,
    name="pgd",
    loss="margin",
    num_steps=STEPS,
    num_restarts=probe.num_classes,
  )
  # Where wrong logits are alike none is a better target than another by itself.
  objectives["margin, adaptive targets"] = probe.left(
    radius,
    name="pgd",
    loss="margin",
    num_steps=STEPS,
    num_restarts=2,
    targets="adaptive",
  )
  found = {
    "effort": [[*key, share] for key, share in effort.items()],
    "objectives": objectives,
    "statistics": {"model": statistics(model, data, device)},
  }
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
  if surrogate is not None:
    other = batches.Device(surrogate.params, surrogate.state or {})
    moved = probe.moved_by(
      surrogate.model, other, radius, loss=loss, num_steps=STEPS
    )
    left = probe.left_at(radius, moved)
    found["transfer"] = left
    found["statistics"]["surrogate"] = statistics(surrogate.model, data, other)
    checks.append(
      (
        "white_box_beats_transfer",
        white <= left + least,
        f"The attack leaves {white:.0%}, points made for another model "
        f"{left:.0%}.",
      )
    )
  return found, checks


def statistics(
  model: Model, data: batches.Data, device: batches.Device
) -> dict[str, list[float]]:
  """Quantiles of what a masked gradient shows in, over the examples.

  Returns:
    ``{"quantiles", "margin", "logit_norm", "gradient_norm"}``: of the label's
    margin, of the logits' l2 norm, and of the gradient of that margin in all
    inputs together.
  """

  def one(params, state, chunk):
    present, label = chunk["present"], chunk["label"]

    def margin(inputs):
      logits = model.apply(params, state, inputs, present)[0].logits
      found = margins.smallest(margins.pairwise(logits, label))
      return jnp.sum(found), (found, logits)

    floats = {
      m: x
      for m, x in chunk["inputs"].items()
      if jnp.issubdtype(x.dtype, jnp.floating)
    }
    rest = {m: x for m, x in chunk["inputs"].items() if m not in floats}
    slopes, (found, logits) = jax.grad(
      lambda x: margin({**x, **rest}), has_aux=True
    )(floats)
    squares = sum(
      jnp.sum(jnp.square(jnp.reshape(g, (g.shape[0], -1))), axis=1)
      for g in slopes.values()
    )
    return {
      "margin": found,
      "logit_norm": jnp.linalg.norm(logits, axis=-1),
      "gradient_norm": jnp.sqrt(squares),
    }

  rows = np.arange(data.size)
  size = device.chunk_size(data.size)
  values = device.map(device.compile(one, once=True), data, rows, size)
  return {
    "quantiles": list(_QUANTILES),
    **{
      name: np.quantile(value, _QUANTILES).tolist()
      for name, value in values.items()
    },
  }
