"""Auto-PGD: steps that halve themselves where they have stopped to pay."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import _validate
from robust_mm.attacks import base
from robust_mm.attacks.gradient import TARGETS

MOMENTUM = 0.75
# Fewer steps than this share that raise the loss: the step is too long.
ENOUGH = 0.75


def apgd(
  *,
  norm: Any,
  budget: Any,
  loss: str = "cross_entropy",
  targets: str = "any",
  num_targets: int = 9,
  num_steps: int = 100,
  num_restarts: int = 1,
  valid_range: Any = None,
  units: Any = None,
) -> base.Attack:
  r"""Auto-PGD: projected gradient ascent with momentum and no step to choose.

  .. math:: z = P(\delta_t + \eta d_t) \qquad
            \delta_{t+1} = P\bigl(\delta_t + \tfrac34 (z - \delta_t)
                           + \tfrac14 (\delta_t - \delta_{t-1})\bigr)

  with the steepest direction :math:`d_t` and :math:`\eta = 2\epsilon` at first.
  At the checkpoints :math:`p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + \max(p_j -
  p_{j-1} - 0.03, 0.06)`, as shares of the steps, :math:`\eta` is halved and the
  search goes on from its best point, example by example, where less than three
  quarters of the steps since the last one raised the loss, or where neither
  :math:`\eta` nor the best loss has changed since then.

  Two of the members of AutoAttack are ``apgd(loss="cross_entropy")`` and
  ``apgd(loss="dlr", targets="rivals")``.

  Costs, for each restart and target, ``num_steps + 1`` gradients.

  >>> attack = apgd(norm=2, budget=0.5, loss="dlr", targets="rivals")
  >>> attack.settings["num_targets"]
  9

  Args:
    norm: 2 or ``"l2"``; infinity or ``"linf"``.
    budget: a number, one joint ball over all float modalities; or a mapping,
      one ball for each modality it names. See :class:`attacks.Attack`.
    loss: ``"cross_entropy"``, ``"dlr"`` or ``"margin"``.
    targets: ``"any"``, every wrong class counts; or ``"rivals"``, each of the
      ``num_targets`` best wrong classes by clean logit is raised in turn.
    num_targets: at most so many, and no more than there are wrong classes.
    num_steps: steps per run.
    num_restarts: runs per target, each from another random point.
    valid_range: ``(low, high)`` for all modalities or ``{m: (low, high)}``.
    units: ``{m: size of one unit}``, 1 where not named.

  Returns:
    A frozen :class:`attacks.Attack`.

  Raises:
    ValueError: a bad value, naming the argument.

  References:
    `Croce & Hein (2020) <https://arxiv.org/abs/2003.01690>`_, section 3.
  """
  _validate.at_least(
    1, num_targets=num_targets, num_steps=num_steps, num_restarts=num_restarts
  )
  _validate.one_of(TARGETS, targets=targets)
  options = {
    "targets": targets,
    "num_targets": int(num_targets) if targets == "rivals" else None,
    "num_steps": int(num_steps),
    "num_restarts": int(num_restarts),
  }

  def search(key, objective):
    aims = runs(objective, **options)

    def run(best, xs):
      return _climb(*xs, best, objective, num_steps), None

    xs = (jax.random.split(key, len(aims)), aims)
    best, _ = jax.lax.scan(run, objective.nothing_found(), xs)
    return best.delta

  return base.make_attack(
    "apgd",
    norm=norm,
    budget=budget,
    loss=loss,
    valid_range=valid_range,
    units=units,
    options=options,
    search=search,
  )


def runs(objective, *, targets, num_targets, num_restarts, **_) -> Any:
  """The class that each run of a search raises: ``int[runs, b]``."""
  if targets == "any":
    return jnp.full((num_restarts, *objective.label.shape), base.losses.ANY)
  number = min(num_targets, objective.num_rivals())
  return jnp.concatenate([objective.rivals(number)] * num_restarts)


def windows(num_steps: int) -> np.ndarray:
  """For each step the steps since the last checkpoint, 0 if it is none.

  >>> windows(10).tolist()
  [0, 0, 3, 0, 2, 1, 1, 1, 1, 0]
  """
  shares = [0.0, 0.22]
  while shares[-1] < 1:
    gap = max(shares[-1] - shares[-2] - 0.03, 0.06)
    shares.append(shares[-1] + gap)
  ends = np.unique(np.ceil(np.round(np.array(shares) * num_steps, 6)))
  ends = ends[ends < num_steps].astype(int)
  result = np.zeros(num_steps, np.int32)
  result[ends[1:] - 1] = np.diff(ends)
  return result


class _Climb(NamedTuple):
  """One run, example by example; ``step`` is a share of the budget."""

  delta: Any
  previous: Any
  grad: Any
  loss: Any
  step: Any
  top: Any  # (delta, grad, loss) of the largest loss of this run
  num_raised: Any
  top_at_checkpoint: Any
  halved: Any


def _climb(key, aim, best, objective, num_steps):
  region = objective.region
  random = region.random(key)
  start = region.move(region.zeros(), random, region.radius)
  evaluation, grad = objective.gradient(start, aim)
  best = best.updated(start, evaluation)
  loss = evaluation.loss
  climb = _Climb(
    delta=start,
    previous=start,
    grad=grad,
    loss=loss,
    # Like the label, for its sharding.
    step=jnp.full_like(objective.label, 2, region.dtype),
    top=(start, grad, loss),
    num_raised=jnp.zeros_like(objective.label),
    top_at_checkpoint=loss,
    halved=jnp.zeros_like(loss, bool),
  )

  def step(carry, xs):
    climb, best = carry
    window, momentum = xs
    ahead = region.move(
      climb.delta,
      region.steepest(climb.delta, climb.grad, random),
      {m: climb.step * r for m, r in region.radius.items()},
    )
    delta = region.project(
      {
        m: d
        + momentum * (ahead[m] - d)
        + (1 - momentum) * (d - climb.previous[m])
        for m, d in climb.delta.items()
      }
    )
    evaluation, grad = objective.gradient(delta, aim)
    best = best.updated(delta, evaluation)
    climb = _advanced(climb, delta, grad, evaluation.loss)
    return (_at_checkpoint(climb, window), best), None

  # There is no last move before the first step.
  momentum = np.full(num_steps, MOMENTUM, np.float32)
  momentum[0] = 1
  xs = (jnp.asarray(windows(num_steps)), jnp.asarray(momentum))
  (_, best), _ = jax.lax.scan(step, (climb, best), xs)
  return best


def _advanced(climb, delta, grad, loss):
  better = loss > climb.top[2]
  return climb._replace(
    delta=delta,
    previous=climb.delta,
    grad=grad,
    loss=loss,
    top=base.select(better, (delta, grad, loss), climb.top),
    num_raised=jnp.where(
      loss > climb.loss, climb.num_raised + 1, climb.num_raised
    ),
  )


def _at_checkpoint(climb, window):
  """Halves the step where it is due; nothing changes where window is 0."""
  here = window > 0
  top_delta, top_grad, top_loss = climb.top
  swings = climb.num_raised < ENOUGH * window.astype(jnp.float32)
  stuck = ~climb.halved & (top_loss <= climb.top_at_checkpoint)
  halve = here & (swings | stuck)
  delta, grad, loss = base.select(
    halve,
    (top_delta, top_grad, top_loss),
    (climb.delta, climb.grad, climb.loss),
  )
  return climb._replace(
    delta=delta,
    grad=grad,
    loss=loss,
    step=jnp.where(halve, climb.step / 2, climb.step),
    num_raised=jnp.where(here, 0, climb.num_raised),
    top_at_checkpoint=jnp.where(here, top_loss, climb.top_at_checkpoint),
    halved=jnp.where(here, halve, climb.halved),
  )
