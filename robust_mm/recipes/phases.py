"""Recipes as data: phases of a loss, what it trains, and what precedes it.

One training loop (``robust_mm.training``) runs every recipe. A recipe is an
ordered tuple of phases; a phase is data plus pure functions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from robust_mm import _validate

LossFn = Callable[..., Any]
Intervention = Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Phase:
  """One stretch of training.

  Attributes:
    name: a word for file names and plots.
    num_steps: optimiser updates.
    loss: ``loss(params, state, batch, *, key) -> (scalar, (state, metrics))``;
      differentiated with respect to the trainable parameters only.
    tx: the optimiser, started afresh at the beginning of the phase.
    trainable: regex over parameter paths such as
      ``encoders/left/dense_0/kernel``; what does not match stays bit-identical.
    interventions: ``fn(key, params, state, batch) -> batch``, applied in order
      inside the jitted step, outside the gradient: dropout of modalities,
      mixing, adversarial inputs, augmentation.
    prepare: ``prepare(params, state, cached, reference) -> batch`` gives the
      one batch that every step of the phase sees, from the parameters and state
      at its start; ``cached`` holds ``scores`` {m: [N, k]}, ``logits`` [N, k],
      ``label`` [N] and ``present`` {m: bool[N]} of the *whole* training set in
      evaluation mode, ``reference`` is a class-balanced batch of raw training
      examples. None to stream batches from the data pipeline, one an update.
    accept: ``accept(before, after) -> (bool, sentence)`` decides from the two
      validation metric dicts whether the phase's result is kept; None keeps
      the result that selection prefers.
  """

  name: str
  num_steps: int
  loss: LossFn
  tx: optax.GradientTransformation
  trainable: str = ".*"
  interventions: tuple[Intervention, ...] = ()
  prepare: Callable[..., Any] | None = None
  accept: Callable[..., Any] | None = None

  def __post_init__(self):
    _validate.at_least(1, num_steps=self.num_steps)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
  """An ordered tuple of phases under one name."""

  name: str
  phases: tuple[Phase, ...]

  @property
  def num_steps(self) -> int:
    """Updates of all phases together."""
    return sum(phase.num_steps for phase in self.phases)

  def locate(self, step: int) -> tuple[int, int]:
    """The phase index that global ``step`` falls in, and its first step."""
    start = 0
    for index, phase in enumerate(self.phases):
      if step < start + phase.num_steps:
        return index, start
      start += phase.num_steps
    return len(self.phases), start
