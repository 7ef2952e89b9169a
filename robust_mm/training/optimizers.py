"""Optimisers and schedules by name."""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import optax

from robust_mm import _validate


def _sgd(lr, *, b1, b2, weight_decay=0.0, nesterov=False):
  del b2
  return optax.chain(
    optax.add_decayed_weights(weight_decay),
    optax.sgd(lr, momentum=b1, nesterov=nesterov),
  )


_OPTIMIZERS = {
  "adam": optax.adam,
  "adamw": optax.adamw,
  "sgd": _sgd,
  "nesterov": lambda lr, **options: _sgd(lr, nesterov=True, **options),
  "lion": optax.lion,
}
_DECAYING = {"adamw", "lion", "nesterov", "sgd"}
_SCHEDULES = ("cosine", "constant", "linear", "step")


def make(
  *,
  num_steps: int,
  name: str = "adam",
  lr: float = 1e-3,
  b1: float = 0.9,
  b2: float = 0.999,
  schedule: str = "cosine",
  milestones: Sequence[float] = (),
  milestone_factor: float = 0.1,
  warmup_steps: int = 0,
  weight_decay: float = 0.0,
  clip_norm: float = 0.0,
) -> optax.GradientTransformation:
  """An optimiser over ``num_steps`` updates.

  Args:
    num_steps: length of the schedule; cosine and linear end at zero.
    name: ``adam``, ``adamw``, ``lion``, ``sgd`` (plain momentum) or
      ``nesterov`` (SGD with Nesterov's).
    lr: peak learning rate.
    b1: decay of the first moment, the momentum of ``sgd`` and ``nesterov``.
    b2: decay of the second moment; they have none.
    schedule: ``cosine``, ``linear``, ``constant`` or ``step``.
    milestones: of ``step`` alone: where the rate drops, as rising shares of
      ``num_steps``, each in (0, 1).
    milestone_factor: what the rate is multiplied by at each of them.
    warmup_steps: linear rise from zero, counted in ``num_steps``.
    weight_decay: decoupled in ``adamw`` and ``lion``; in ``sgd`` and
      ``nesterov`` added to the gradient, so that it enters the momentum;
      ``adam`` has none.
    clip_norm: global gradient norm to clip at, before the decay; 0 for none.

  Raises:
    ValueError: an unknown name or a number out of range, naming it.
  """
  _validate.one_of(_OPTIMIZERS, **{"optimizer.name": name})
  _validate.positive(**{"optimizer.lr": lr})
  _validate.in_unit_interval(**{"optimizer.b1": b1, "optimizer.b2": b2})
  _validate.non_negative(
    **{
      "optimizer.weight_decay": weight_decay,
      "optimizer.clip_norm": clip_norm,
      "optimizer.warmup_steps": warmup_steps,
    }
  )
  if weight_decay and name not in _DECAYING:
    raise ValueError(
      f"optimizer.weight_decay needs optimizer.name to be one of "
      f"{', '.join(sorted(_DECAYING))}; got {name!r}."
    )
  rate = make_schedule(
    schedule,
    lr=lr,
    num_steps=num_steps,
    warmup_steps=warmup_steps,
    milestones=milestones,
    milestone_factor=milestone_factor,
  )
  keywords = {"weight_decay": weight_decay} if name in _DECAYING else {}
  tx = _OPTIMIZERS[name](rate, b1=b1, b2=b2, **keywords)
  if clip_norm:
    tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
  return tx


def make_schedule(
  name: str,
  *,
  lr: float,
  num_steps: int,
  warmup_steps: int = 0,
  milestones: Sequence[float] = (),
  milestone_factor: float = 0.1,
) -> optax.Schedule:
  """``step -> learning rate``; see :func:`make`."""
  _validate.one_of(_SCHEDULES, **{"optimizer.schedule": name})
  if warmup_steps >= num_steps and warmup_steps:
    raise ValueError(
      f"optimizer.warmup_steps must be below the number of steps "
      f"({num_steps}), got {warmup_steps}."
    )
  rest = num_steps - warmup_steps
  if name == "cosine":
    after = optax.cosine_decay_schedule(lr, rest)
  elif name == "linear":
    after = optax.linear_schedule(lr, 0.0, rest)
  elif name == "step":
    _check_milestones(milestones, milestone_factor, warmup_steps / num_steps)
    drops = [round(share * num_steps) - warmup_steps for share in milestones]
    after = _step_schedule(lr, drops, milestone_factor)
  else:
    after = optax.constant_schedule(lr)
  if not warmup_steps:
    return after
  warmup = optax.linear_schedule(0.0, lr, warmup_steps)
  return optax.join_schedules([warmup, after], [warmup_steps])


def _step_schedule(lr: float, drops: list[int], factor: float):
  # Counted, not looked up: in a short run several drops may share a step.
  def rate(step):
    return lr * factor ** jnp.sum(step >= jnp.asarray(drops))

  return rate


def _check_milestones(milestones, factor, warmup: float) -> None:
  _validate.positive(**{"optimizer.milestone_factor": factor})
  if not milestones:
    raise ValueError(
      "optimizer.milestones must name at least one share of the steps, such "
      "as 0.5,0.75, where optimizer.schedule is 'step'."
    )
  for share in milestones:
    # True is a number too, and no share.
    if not isinstance(share, float) or not 0 < share < 1:
      raise ValueError(
        f"optimizer.milestones must be shares of the steps in (0, 1), got "
        f"{share!r}."
      )
    if share <= warmup:
      raise ValueError(
        f"optimizer.milestones must lie after optimizer.warmup_steps, which "
        f"end at {warmup:.3g} of the steps; got {share}."
      )
  if any(a >= b for a, b in itertools.pairwise(milestones)):
    raise ValueError(
      f"optimizer.milestones must rise, got {', '.join(map(str, milestones))}."
    )
