"""The search for noise of the largest radius, as one pure function.

Grow the radius until it fails, then bisect; between radii the direction is
improved by gradient steps on the sphere. The radius is traced: one compilation,
whatever the search does.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from robust_mm import _validate
from robust_mm.nullspace import criteria
from robust_mm.nullspace import tokens as tokens_lib
from robust_mm.nullspace.criteria import Items

# What a status code stands for.
STATUSES = ("converged", "max_radius", "infeasible", "saturated")
CONVERGED, MAX_RADIUS, INFEASIBLE, SATURATED = range(4)
_EXACT = 1e-2  # of eps: what a direction of the nullspace may still change
_HALVINGS = 6
MIN_HOLDOUT = 64
_GROW, _BISECT, _DONE = range(3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
  """How to search, checked; see ``solver.encoder_noise`` for what each is."""

  eps: float = 0.03
  profile: str = "token"
  objective: str = "criterion"
  num_steps: int = 200
  lr: float = 0.02
  batch_size: int = 128
  start_radius: float = 0.05
  growth: float = 1.25
  max_radius: float = 100.0
  num_bisections: int = 5
  confidence: float = 0.95
  chunk_size: int = 256

  def __post_init__(self):
    _validate.positive(
      eps=self.eps,
      lr=self.lr,
      start_radius=self.start_radius,
      max_radius=self.max_radius,
    )
    _validate.one_of(tokens_lib.PROFILES, profile=self.profile)
    _validate.one_of(criteria.OBJECTIVES, objective=self.objective)
    _validate.at_least(
      1,
      num_steps=self.num_steps,
      batch_size=self.batch_size,
      chunk_size=self.chunk_size,
    )
    _validate.at_least(0, num_bisections=self.num_bisections)
    if not 1 < self.growth < math.inf:
      raise ValueError(f"growth must be above 1, got {self.growth}.")
    if not 0.5 <= self.confidence < 1:
      raise ValueError(
        f"confidence must lie in [0.5, 1), got {self.confidence}."
      )
    if self.start_radius > self.max_radius:
      raise ValueError(
        f"start_radius must not exceed max_radius {self.max_radius}, got "
        f"{self.start_radius}."
      )

  @property
  def quantile(self) -> float:
    """Standard errors above the mean that a bound of this confidence is."""
    return statistics.NormalDist().inv_cdf(self.confidence)

  @property
  def max_stages(self) -> int:
    """No search has more stages."""
    lowest = self.start_radius / 2**_HALVINGS
    steps = math.ceil(math.log(self.max_radius / lowest, self.growth))
    return _HALVINGS + steps + self.num_bisections + 3


class Found(NamedTuple):
  """What a search ends with; arrays.

  Attributes:
    direction: w, ``[N, d]``, of the profile.
    size: s.
    radius: r, the last feasible one; 0 where none was.
    failed: the smallest radius that failed; infinite where none did.
    mean: of the criterion on the hold-out items at that noise.
    upper: its one-sided upper bound.
    status: index in ``STATUSES``.
    radii, uppers, optimised: ``[max_stages]``, of each stage: its radius, the
      bound it ended at, whether it took gradient steps.
    num_stages: how many of these were filled.
  """

  direction: Any
  size: Any
  radius: Any
  failed: Any
  mean: Any
  upper: Any
  status: Any
  radii: Any
  uppers: Any
  optimised: Any
  num_stages: Any

  @property
  def noise(self) -> Any:
    """v = r s w, ``[N, d]``."""
    return self.radius * self.size * self.direction


class _Carry(NamedTuple):
  mode: Any
  direction: Any
  next_radius: Any
  low: Any
  high: Any
  mean: Any
  upper: Any
  status: Any
  halvings: Any
  bisections: Any
  stage: Any
  radii: Any
  uppers: Any
  optimised: Any


def search(
  encode: Callable,
  params: Any,
  optimise: Items,
  holdout: Items,
  settings: Search,
  key: Any,
  *,
  start_radius: Any = None,
) -> Found:
  """Noise of nearly the largest radius that is feasible; pure, jit-able.

  Nothing is feasible where fewer than 64 hold-out items count, or where s is 0:
  noise of no size says nothing.

  Args:
    encode: ``encode(params, tokens[, context]) -> logits [n, k]``.
    params: constants here: nothing is differentiated with respect to them.
    optimise: items whose gradients are followed.
    holdout: items that decide what is feasible.
    settings: see :class:`Search`.
    key: typed.
    start_radius: first radius, such as a little less than the last search of a
      network gave; that of ``settings`` by default, and at least that. Traced.

  Raises:
    ValueError: fewer than 64 hold-out items; tokens of one channel, which have
      nothing but their mean.
  """
  if len(holdout) < MIN_HOLDOUT:
    raise ValueError(
      f"holdout must have at least {MIN_HOLDOUT} items to judge by, got "
      f"{len(holdout)}."
    )
  tokens_lib.check_channels(optimise.tokens)
  params = jax.lax.stop_gradient(params)
  start_key, stage_key = jax.random.split(key)
  start = tokens_lib.random_direction(
    start_key, optimise.tokens.shape[1:], settings.profile
  )
  size = tokens_lib.scale(optimise.tokens, optimise.counted)
  judge = _judge(encode, params, holdout, settings, size)
  improve = _improve(encode, params, optimise, settings, size)

  def body(carry):
    radius = carry.next_radius
    mean, upper = judge(carry.direction, radius)
    needed = ~(upper <= settings.eps)  # NaN needs it as well

    def work(_):
      direction = improve(
        jax.random.fold_in(stage_key, carry.stage), carry.direction, radius
      )
      return (direction, *judge(direction, radius))

    direction, mean, upper = jax.lax.cond(
      needed, work, lambda _: (carry.direction, mean, upper), None
    )
    return _advance(carry, settings, radius, direction, mean, upper, needed)

  first = settings.start_radius
  if start_radius is not None:
    first = jnp.clip(start_radius, first, settings.max_radius)
  nothing = jnp.full(settings.max_stages, jnp.nan, jnp.float32)
  carry = _Carry(
    mode=jnp.int32(_GROW),
    direction=start.astype(jnp.float32),
    next_radius=jnp.asarray(first, jnp.float32),
    low=jnp.float32(0),
    high=jnp.float32(jnp.inf),
    mean=jnp.float32(jnp.nan),
    upper=jnp.float32(jnp.nan),
    status=jnp.int32(INFEASIBLE),
    halvings=jnp.int32(0),
    bisections=jnp.int32(0),
    stage=jnp.int32(0),
    radii=nothing,
    uppers=nothing,
    optimised=jnp.zeros(settings.max_stages, bool),
  )
  carry = jax.lax.while_loop(lambda carry: carry.mode != _DONE, body, carry)
  return Found(
    direction=carry.direction,
    size=size,
    radius=carry.low,
    failed=carry.high,
    mean=carry.mean,
    upper=carry.upper,
    status=carry.status,
    radii=carry.radii,
    uppers=carry.uppers,
    optimised=carry.optimised,
    num_stages=carry.stage,
  )


def _judge(encode, params, holdout, settings, size):
  """``(w, r) -> (mean, upper bound)`` of the criterion on the hold-out."""
  clean = criteria.in_chunks(encode, params, holdout, None, settings.chunk_size)
  enough = jnp.sum(holdout.weights) >= MIN_HOLDOUT

  def judge(direction, radius):
    noise = radius * size * direction
    noisy = criteria.in_chunks(
      encode, params, holdout, noise, settings.chunk_size
    )
    values = criteria.change(clean, noisy, "criterion")
    mean, upper = criteria.upper_bound(values, holdout, settings.quantile)
    return mean, jnp.where(enough & (size > 0), upper, jnp.nan)

  return judge


def _improve(encode, params, optimise, settings, size):
  """``(key, w, r) -> w`` after gradient steps, where they were of use."""
  total, steps = len(optimise), settings.num_steps
  batch = min(settings.batch_size, total)
  clean = criteria.in_chunks(
    encode, params, optimise, None, settings.chunk_size
  )

  def criterion(direction, radius):
    noisy = criteria.in_chunks(
      encode, params, optimise, radius * size * direction, settings.chunk_size
    )
    return optimise.mean(criteria.change(clean, noisy, "criterion"))

  def loss(direction, radius, rows):
    items = optimise.take(rows)
    noise = radius * size * direction
    noisy = criteria.logits(encode, params, items, noise)
    return items.mean(criteria.change(clean[rows], noisy, settings.objective))

  # The step of a schedule at rate 1; the rate itself depends on the radius.
  tx = optax.adam(optax.cosine_decay_schedule(1.0, steps))

  def improve(key, direction, radius):
    rate = settings.lr / jnp.maximum(1.0, radius)

    def step(carry, number):
      w, opt_state = carry
      rows = jax.random.randint(
        jax.random.fold_in(key, number), (batch,), 0, total
      )
      grad = jax.grad(loss)(w, radius, rows)
      updates, opt_state = tx.update(grad, opt_state)
      w = tokens_lib.normalize(w + rate * updates, settings.profile)
      return (w, opt_state), None

    # Fresh moments: those of another radius are of another size.
    (found, _), _ = jax.lax.scan(
      step, (direction, tx.init(direction)), jnp.arange(steps)
    )
    better = criterion(found, radius) < criterion(direction, radius)
    return jnp.where(better, found, direction)

  return improve


def _advance(carry, settings, radius, direction, mean, upper, needed):
  """The next radius, or the end."""
  feasible = upper <= settings.eps
  growing = carry.mode == _GROW
  low = jnp.where(feasible, radius, carry.low)
  high = jnp.where(feasible, carry.high, jnp.minimum(radius, carry.high))
  never = low == 0
  halvings = carry.halvings + (~feasible & never)
  bisections = carry.bisections + ~growing
  # Growth goes on after halving, up to what failed.
  larger = jnp.minimum(settings.growth * radius, settings.max_radius)
  bracketed = ~never & (jnp.maximum(low, larger) >= high)
  at_most = feasible & growing & (radius >= settings.max_radius)
  gave_up = never & (halvings > _HALVINGS)
  to_bisect = ~growing | (~feasible & ~never) | (feasible & bracketed)
  ended = to_bisect & (bisections >= settings.num_bisections)
  mode = jnp.where(
    at_most | gave_up | ended,
    _DONE,
    jnp.where(to_bisect, _BISECT, _GROW),
  )
  exact = mean <= _EXACT * settings.eps
  status = jnp.where(
    at_most,
    jnp.where(exact, MAX_RADIUS, SATURATED),
    jnp.where(ended & ~gave_up, CONVERGED, INFEASIBLE),
  )
  next_radius = jnp.where(
    mode == _BISECT,
    jnp.sqrt(low * high),
    jnp.where(never, radius / 2, larger),
  )
  return _Carry(
    mode=mode.astype(jnp.int32),
    direction=jnp.where(feasible, direction, carry.direction),
    next_radius=next_radius,
    low=low,
    high=high,
    mean=jnp.where(feasible, mean, carry.mean),
    upper=jnp.where(feasible, upper, carry.upper),
    status=status.astype(jnp.int32),
    halvings=halvings,
    bisections=bisections,
    stage=carry.stage + 1,
    radii=carry.radii.at[carry.stage].set(radius),
    uppers=carry.uppers.at[carry.stage].set(upper),
    optimised=carry.optimised.at[carry.stage].set(needed),
  )
