"""Attacks that follow the gradient: FGM, one step, and PGD, many."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import _validate
from robust_mm.attacks import base
from robust_mm.attacks import losses

TARGETS = ("rivals", "any", "adaptive")


def fgm(
  *,
  norm: Any,
  budget: Any,
  loss: str = "margin",
  valid_range: Any = None,
  units: Any = None,
) -> base.Attack:
  r"""The fast gradient method: one step of full length.

  .. math:: \delta = \epsilon \arg\max_{\|v\| \le 1} \langle g, v \rangle,
            \qquad g = \nabla_x \text{loss}

  that is :math:`\epsilon g / \|g\|_2` in l2 and :math:`\epsilon\, sign(g)` in
  linf, cut to the valid range. Optimal for a linear model without a range;
  weak against anything else, so do not report it alone.

  >>> attack = fgm(norm=2, budget={"audio": 0.1})
  >>> attack.settings["num_steps"]
  1

  Args:
    norm: 2 or ``"l2"``; infinity or ``"linf"``.
    budget: a number, one joint ball over all float modalities; or a mapping,
      one ball for each modality it names. See :class:`attacks.Attack`.
    loss: ``"margin"``, ``"cross_entropy"`` or ``"dlr"``.
    valid_range: ``(low, high)`` for all modalities or ``{m: (low, high)}``;
      ends broadcast to one modality's inputs.
    units: ``{m: size of one unit}``, 1 where not named: a perturbation's size
      is its norm divided by it.

  Returns:
    A frozen :class:`attacks.Attack`.

  Raises:
    ValueError: a bad value, naming the argument.
  """

  def search(key, objective):
    region = objective.region
    zeros = region.zeros()
    _, grad = objective.gradient(zeros)
    direction = region.steepest(zeros, grad, region.random(key))
    return region.move(zeros, direction, region.radius)

  return base.make_attack(
    "fgm",
    norm=norm,
    budget=budget,
    loss=loss,
    valid_range=valid_range,
    units=units,
    options={"num_steps": 1, "num_restarts": 1, "step_size": None},
    search=search,
  )


def pgd(
  *,
  norm: Any,
  budget: Any,
  num_steps: int = 50,
  num_restarts: int = 5,
  step_size: float | None = None,
  loss: str = "margin",
  random_start: bool = True,
  targets: str = "rivals",
  valid_range: Any = None,
  units: Any = None,
) -> base.Attack:
  r"""Projected gradient descent, restarted; the best point seen is returned.

  .. math:: \delta_{t+1} = P\bigl(\delta_t + \alpha_t \arg\max_{\|v\| \le 1}
            \langle g_t, v \rangle \bigr)

  P cuts to the valid range and then shrinks into the ball, outside the
  gradient; the step leaves out entries that would leave the range. Best means,
  example by example over all steps and restarts: a point at which the label
  loses beats one at which it wins, then the larger loss. Where the gradient is
  exactly zero (a masked one) the search follows a random direction.

  With the defaults the first restart starts from the clean input and raises
  any wrong class; restart i raises the class of rank i among the wrong ones by
  clean logit, from a random point. Aiming is worth more than starting points:
  on the reference networks five such restarts find what AutoAttack finds, five
  restarts against any class miss up to three points of accuracy.

  Costs ``num_restarts * (num_steps gradients + 1 forward pass)`` and one
  forward pass; memory that of one gradient and four copies of the inputs.

  >>> attack = pgd(norm="linf", budget=8 / 255, num_steps=20)
  >>> adversarial = attack(key, logits_fn, inputs, label)   # doctest: +SKIP

  Args:
    norm: 2 or ``"l2"``; infinity or ``"linf"``.
    budget: a number, one joint ball over all float modalities; or a mapping,
      one ball for each modality it names. See :class:`attacks.Attack`.
    num_steps: gradients per restart.
    num_restarts: the more, the stronger.
    step_size: a constant step, in the units of the budget. None for steps that
      fall from the whole budget to zero along a cosine, which follow the
      budget of the call.
    loss: ``"margin"``, ``"cross_entropy"`` or ``"dlr"``.
    random_start: False to start from the clean input always. True: a single
      restart starts at random, of several all but the first.
    targets: ``"rivals"`` as above; ``"any"``: every restart raises any wrong
      class; or ``"adaptive"``: the first raises the best wrong class of the
      clean input, the next ones those that the clean gradient reaches first
      (:meth:`base.Objective.nearest`; as many more gradients as there are
      classes). For models whose wrong logits are alike, which tell nothing of
      what is near.
    valid_range: ``(low, high)`` for all modalities or ``{m: (low, high)}``;
      ends broadcast to one modality's inputs.
    units: ``{m: size of one unit}``, 1 where not named: a perturbation's size
      is its norm divided by it.

  Returns:
    A frozen :class:`attacks.Attack`.

  Raises:
    ValueError: a bad value, naming the argument.

  References:
    `Madry et al. (2018) <https://arxiv.org/abs/1706.06083>`_;
    `Gowal et al. (2019) <https://arxiv.org/abs/1910.09338>`_ for the targets.
  """
  _validate.at_least(1, num_steps=num_steps, num_restarts=num_restarts)
  _validate.one_of(TARGETS, targets=targets)
  if step_size is not None:
    _validate.positive(step_size=step_size)
  if num_restarts > 1 and not random_start and targets == "any":
    raise ValueError(
      "num_restarts must be 1 where random_start is False and targets is "
      "'any'; all restarts would be the same."
    )
  options = {
    "num_steps": int(num_steps),
    "num_restarts": int(num_restarts),
    "step_size": step_size,
    "random_start": bool(random_start),
    "targets": targets,
  }

  def search(key, objective):
    return _descend(key, objective, **options)

  return base.make_attack(
    "pgd",
    norm=norm,
    budget=budget,
    loss=loss,
    valid_range=valid_range,
    units=units,
    options=options,
    search=search,
  )


def _descend(
  key, objective, *, num_steps, num_restarts, step_size, random_start, targets
):
  region = objective.region
  aims = _aims(objective, num_restarts, targets)
  lengths = _lengths(num_steps, step_size)

  def restart(best, xs):
    key, number, aim = xs
    start_key, length_key = jax.random.split(key)
    random = region.random(start_key)
    away = random_start & ((number > 0) | (num_restarts == 1))
    share = jax.random.uniform(length_key, objective.label.shape) * away
    start = region.move(
      region.zeros(), random, {m: share * r for m, r in region.radius.items()}
    )

    def step(carry, length):
      delta, best = carry
      evaluation, grad = objective.gradient(delta, aim)
      best = best.updated(delta, evaluation)
      direction = region.steepest(delta, grad, random)
      # A constant step is a length, a falling one a share of the budget.
      length = {
        m: jnp.full_like(r, length) if step_size else length * r
        for m, r in region.radius.items()
      }
      return (region.move(delta, direction, length), best), None

    (delta, best), _ = jax.lax.scan(step, (start, best), lengths)
    return best.updated(delta, objective(delta, aim)), None

  xs = (jax.random.split(key, num_restarts), jnp.arange(num_restarts), aims)
  best, _ = jax.lax.scan(restart, objective.nothing_found(), xs)
  return best.delta


def _lengths(num_steps, step_size):
  if step_size is not None:
    return jnp.full(num_steps, step_size, jnp.float32)
  steps = np.arange(num_steps) / num_steps
  return jnp.asarray((1 + np.cos(np.pi * steps)) / 2, jnp.float32)


def _aims(objective, num_restarts, targets):
  """Per restart, the class to raise, ``[b]``; None when always any."""
  if targets == "adaptive":
    first = objective.rivals(1)
    if num_restarts == 1:
      return first
    return jnp.concatenate([first, objective.nearest(num_restarts - 1)])
  if targets == "any" or num_restarts == 1:
    return None
  return objective.rivals(num_restarts).at[0].set(losses.ANY)
