"""From an attack to a number: who survives it."""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from robust_mm._types import Model
from robust_mm._types import Params
from robust_mm._types import Present
from robust_mm._types import State
from robust_mm.attacks import balls
from robust_mm.attacks import base
from robust_mm.attacks import budgets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitsFn:
  """``inputs -> logits`` of a model in evaluation mode; a pytree.

  Attributes:
    model: static.
    params: its parameters.
    state: its state.
    present: ``{m: bool[b]}``.
  """

  model: Any = dataclasses.field(metadata={"static": True})
  params: Any
  state: Any
  present: Any

  def __call__(self, inputs: Mapping[str, Any]) -> Any:
    """The logits ``[b, k]`` of inputs ``{m: [b, ...]}``."""
    return self.model.apply(self.params, self.state, inputs, self.present)[
      0
    ].logits

  def take(self, rows: Any) -> "LogitsFn":
    """The same for some examples of the batch."""
    present = {m: jnp.asarray(flag)[rows] for m, flag in self.present.items()}
    return dataclasses.replace(self, present=present)


def logits_fn(
  model: Model, params: Params, state: State, present: Present
) -> LogitsFn:
  """``inputs -> logits`` of a model in evaluation mode: what attacks take."""
  return LogitsFn(model, params, state, dict(present))


def survives(
  key: Any,
  attack: base.Attack,
  logits_fn: Callable[[Mapping[str, Any]], Any],
  inputs: Mapping[str, Any],
  label: Any,
  *,
  present: Mapping[str, Any] | None = None,
  budget: Any = None,
) -> Any:
  """Whether an example is right, clean and attacked: ``bool[b]``.

  An upper bound of the truth: an attack that fails proves nothing. Non-finite
  logits count as wrong. The arguments are those of the attack.
  """
  adversarial = attack(
    key, logits_fn, inputs, label, present=present, budget=budget
  )
  label = jnp.asarray(label)
  clean, attacked = logits_fn(inputs), logits_fn(adversarial)
  return right(clean, label) & right(attacked, label)


def robust_accuracy(
  key: Any,
  attack: base.Attack,
  logits_fn: Callable[[Mapping[str, Any]], Any],
  inputs: Mapping[str, Any],
  label: Any,
  *,
  present: Mapping[str, Any] | None = None,
  budget: Any = None,
) -> Any:
  """The share of a batch that survives: a scalar in [0, 1]."""
  return jnp.mean(
    survives(
      key, attack, logits_fn, inputs, label, present=present, budget=budget
    )
  )


def distances(
  key: Any,
  attack: base.Attack,
  logits_fn: Callable[[Mapping[str, Any]], Any],
  inputs: Mapping[str, Any],
  label: Any,
  *,
  present: Mapping[str, Any] | None = None,
  budget: Any = None,
) -> Any:
  """How far the nearest adversarial point that an attack finds is: ``[b]``.

  Meant for :func:`attacks.minimum_norm`; of another attack it is the size of
  what it makes. 0 where the clean input is wrong, infinity where nothing was
  found. An upper bound of the true distance. The arguments are those of the
  attack.

  Returns:
    For one joint ball the size in the attack's norm and units. With a ball for
    each modality the factor by which all budgets must be multiplied.
  """
  budget = attack.budget if budget is None else budget
  adversarial = attack(
    key, logits_fn, inputs, label, present=present, budget=budget
  )
  region = budgets.region(
    inputs,
    budget,
    norm=attack.norm,
    units=attack.units,
    valid_range=None,
    present=present,
  )
  label = jnp.asarray(label)
  right_clean = right(logits_fn(inputs), label)
  if not region.clean:
    return jnp.where(right_clean, jnp.inf, 0.0)
  dtype = region.dtype
  change = {
    m: jnp.asarray(adversarial[m]).astype(dtype) - x.astype(dtype)
    for m, x in region.clean.items()
  }
  # What is absent may hold NaN.
  zeros = region.zeros()
  size = region.extent(
    {
      m: balls.choose(region.radius[m] > 0, d, zeros[m])
      for m, d in change.items()
    }
  )
  if not isinstance(budget, Mapping):
    size = size * jnp.asarray(budget, size.dtype)
  size = jnp.where(right(logits_fn(adversarial), label), jnp.inf, size)
  return jnp.where(right_clean, size, 0.0)


def right(logits: Any, label: Any) -> Any:
  """Whether the label has the largest logit and all are finite: ``bool[b]``."""
  finite = jnp.all(jnp.isfinite(logits), axis=-1)
  return finite & (jnp.argmax(logits, axis=-1) == label)
