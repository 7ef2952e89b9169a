"""From an attack to a number: who survives it."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from robust_mm._types import Model
from robust_mm._types import Params
from robust_mm._types import Present
from robust_mm._types import State
from robust_mm.attacks import base


def logits_fn(
  model: Model, params: Params, state: State, present: Present
) -> Callable[[Mapping[str, Any]], Any]:
  """``inputs -> logits`` of a model in evaluation mode: what attacks take."""

  def fn(inputs):
    return model.apply(params, state, inputs, present)[0].logits

  return fn


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
  return _right(clean, label) & _right(attacked, label)


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


def _right(logits, label):
  finite = jnp.all(jnp.isfinite(logits), axis=-1)
  return finite & (jnp.argmax(logits, axis=-1) == label)
