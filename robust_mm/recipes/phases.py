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
SOURCES = ("validation", "train")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Job:
  """Work on the state of a run that is due now and then.

  Right after the updates number ``start``, ``start + period``, ... of its phase
  (counted from 1), and before anything is saved. Its metrics are logged as
  ``{name}_{metric}``.

  Attributes:
    name: a word.
    run: ``run(state, batch, key) -> (state, metrics)``, pure, jitted once;
      metrics is a flat dict of scalars.
    period: updates between two times.
    start: the first time.
    batch_size: of a batch of examples of ``source``, shuffled; where there are
      fewer, all of them (but for a remainder that the mesh does not divide).
      Time ``i`` takes batch ``i``, so a resumed run sees what the undisturbed
      one sees.
    min_batch: a smaller batch than this is refused before training starts.
    option: what the recipe calls ``batch_size``, for the sentence that does so.
    heavy: whether one time takes so long that compiling it well pays; a job is
      otherwise compiled as fast as may be.
    source: the split that batches are of, ``validation`` or ``train``.
    with_training: ``batch`` is the pair of that batch and of the training batch
      of the update just done (as it came from the pipeline).
  """

  name: str
  run: Callable[..., Any]
  period: int
  start: int
  batch_size: int
  min_batch: int = 1
  option: str = "batch_size"
  heavy: bool = False
  source: str = "validation"
  with_training: bool = False

  def __post_init__(self):
    _validate.one_of(SOURCES, source=self.source)
    _validate.at_least(
      1,
      period=self.period,
      start=self.start,
      batch_size=self.batch_size,
      min_batch=self.min_batch,
    )

  def times(self, done: int) -> int:
    """How often it has been due within the first ``done`` updates.

    >>> job = Job(name="x", run=print, period=5, start=2, batch_size=1)
    >>> [job.times(done) for done in (1, 2, 6, 7)]
    [0, 1, 1, 2]
    """
    return max(0, (done - self.start) // self.period + 1)

  def due(self, done: int) -> bool:
    """Whether it is due after update number ``done``."""
    return done >= self.start and (done - self.start) % self.period == 0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Phase:
  """One stretch of training.

  Attributes:
    name: a word for file names and plots.
    num_steps: optimiser updates.
    loss: ``loss(params, state, batch, *, key) -> (scalar, (state, metrics))``;
      differentiated with respect to the trainable parameters only. None with
      an ``update``.
    tx: the optimiser, started afresh at the beginning of the phase.
    trainable: regex over parameter paths such as
      ``encoders/left/dense_0/kernel``; what does not match stays bit-identical.
    interventions: ``fn(key, params, state, batch) -> batch``, applied in order
      inside the jitted step, outside the gradient: dropout of modalities,
      mixing, adversarial inputs, augmentation.
    prepare: ``prepare(params, state, cached, reference) -> batch`` gives the
      one batch that every step of the phase sees, from the parameters and state
      at its start; ``cached`` holds ``scores`` {m: [N, k]}, ``logits`` [N, k],
      ``features`` [N, d] (where the model has them), ``label`` [N] and
      ``present`` {m: bool[N]} of the *whole* training set in evaluation mode,
      ``reference`` is a class-balanced batch of raw training examples. None to
      stream batches from the data pipeline, one an update.
    judge: ``judge(before, after, state, cached, reference) -> (bool,
      sentence)``: whether the parameters ``after`` this phase are worth having,
      against those ``before`` it, by the phase's own measure; ``cached`` and
      ``reference`` as in ``prepare``, but ``cached`` of the validation set and
      the parameters after. None where selection alone decides.
    extra: ``extra(params, key) -> pytree`` of arrays: what the recipe itself
      remembers (weights of a controller, meta-parameters), in ``state.extra``
      from the beginning of the phase; checkpointed and restored with the rest,
      replicated over the mesh. None for nothing.
    update: ``update(state, batch, key) -> (state, metrics)``, pure, in place of
      the gradient step on ``loss``: it replaces (``dataclasses.replace``)
      ``params``, ``model_state``, ``opt_state`` and ``extra`` of the state it
      is given; metrics must have ``loss``. The step is counted, and parameters
      are projected, by the loop. Needs ``trainable=".*"``.
    jobs: what is due every so many updates.
    evaluate: ``evaluate(state, batch) -> {name: scalar}``, pure: what is
      validated and selected by in place of the model's predictions, of a phase
      that trains something else; ``loss`` must be among them. Rows of which the
      ``id`` is -1 fill a batch up and must not count.
    binding: whether a judgement is obeyed: the phase's last model is judged,
      and the one before it taken back where the answer is no. Not binding, it
      is only reported, and selection chooses the model.
    progress: whether batches get ``progress`` [], the share of the phase's
      updates that are done.
    views: how many independently augmented views of its inputs a batch has; the
      second one is ``batch["second_inputs"]``. Without augmentation there is
      one whatever this says.
    averaged: whether a run that averages its parameters does so in this phase;
      False where the optimiser itself chooses the parameters it ends at.
  """

  name: str
  num_steps: int
  loss: LossFn | None = None
  tx: optax.GradientTransformation
  trainable: str = ".*"
  interventions: tuple[Intervention, ...] = ()
  prepare: Callable[..., Any] | None = None
  judge: Callable[..., Any] | None = None
  binding: bool = True
  views: int = 1
  extra: Callable[..., Any] | None = None
  update: Callable[..., Any] | None = None
  jobs: tuple[Job, ...] = ()
  evaluate: Callable[..., Any] | None = None
  averaged: bool = True
  progress: bool = False

  def __post_init__(self):
    _validate.at_least(1, num_steps=self.num_steps)
    _validate.one_of((1, 2), views=self.views)
    if (self.loss is None) == (self.update is None):
      raise ValueError(f"phase {self.name!r} needs either a loss or an update.")
    if self.update is not None and self.trainable != ".*":
      raise ValueError("trainable must be '.*' for a phase with an update.")
    names = [job.name for job in self.jobs]
    if len(set(names)) < len(names):
      raise ValueError(f"jobs must have different names, got {names}.")

  @property
  def judges_last(self) -> bool:
    """Whether the last model is the candidate, whatever selection prefers."""
    return self.judge is not None and self.binding


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
  """An ordered tuple of phases under one name."""

  name: str
  phases: tuple[Phase, ...]

  def __post_init__(self):
    if self.phases and self.phases[0].judge is not None:
      raise ValueError(
        f"phases: {self.phases[0].name!r} is judged against the phase before "
        f"it, so it cannot come first."
      )

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
