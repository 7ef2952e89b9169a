"""Optimisers and schedules by name."""

import optax

from robust_mm import _validate

_OPTIMIZERS = {
  "adam": optax.adam,
  "adamw": optax.adamw,
  "sgd": lambda lr, b1, b2: optax.sgd(lr, momentum=b1, nesterov=True),
  "lion": optax.lion,
}
_DECAYING = {"adamw", "lion"}
_SCHEDULES = ("cosine", "constant", "linear")


def make(
  *,
  num_steps: int,
  name: str = "adam",
  lr: float = 1e-3,
  b1: float = 0.9,
  b2: float = 0.999,
  schedule: str = "cosine",
  warmup_steps: int = 0,
  weight_decay: float = 0.0,
  clip_norm: float = 0.0,
) -> optax.GradientTransformation:
  """An optimiser over ``num_steps`` updates.

  Args:
    num_steps: length of the schedule; cosine and linear end at zero.
    name: ``adam``, ``adamw``, ``sgd`` (Nesterov) or ``lion``.
    lr: peak learning rate.
    b1: decay of the first moment, the momentum of ``sgd``.
    b2: decay of the second moment; ``sgd`` has none.
    schedule: ``cosine``, ``linear`` or ``constant``.
    warmup_steps: linear rise from zero, counted in ``num_steps``.
    weight_decay: decoupled decay, ``adamw`` and ``lion`` only.
    clip_norm: global gradient norm to clip at; 0 for none.

  Raises:
    ValueError: an unknown name or a number out of range, naming it.
  """
  _validate.one_of(_OPTIMIZERS, **{"optimizer.name": name})
  _validate.one_of(_SCHEDULES, **{"optimizer.schedule": schedule})
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
    schedule, lr=lr, num_steps=num_steps, warmup_steps=warmup_steps
  )
  keywords = {"weight_decay": weight_decay} if name in _DECAYING else {}
  tx = _OPTIMIZERS[name](rate, b1=b1, b2=b2, **keywords)
  if clip_norm:
    tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
  return tx


def make_schedule(
  name: str, *, lr: float, num_steps: int, warmup_steps: int = 0
) -> optax.Schedule:
  """``step -> learning rate``; see :func:`make`."""
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
  else:
    after = optax.constant_schedule(lr)
  if not warmup_steps:
    return after
  warmup = optax.linear_schedule(0.0, lr, warmup_steps)
  return optax.join_schedules([warmup, after], [warmup_steps])
