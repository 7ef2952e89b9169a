"""The nearest adversarial point, by projections on linearised boundaries."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from robust_mm import _validate
from robust_mm.attacks import ascent
from robust_mm.attacks import balls
from robust_mm.attacks import base
from robust_mm.attacks.gradient import TARGETS

# As published: the step beyond the boundary, the largest pull towards the
# clean input, and how far back towards it after a success.
OVERSHOOT = 1.05
MAX_PULL = 0.1
BACKWARD = 0.9
# Each step of Newton's method frees or stops entries at the valid range.
NUM_NEWTON = 6
NUM_BISECTIONS = 10


def minimum_norm(
  *,
  norm: Any,
  budget: Any = 1e6,
  targets: str = "rivals",
  num_targets: int = 9,
  num_steps: int = 40,
  num_restarts: int = 1,
  valid_range: Any = None,
  units: Any = None,
) -> base.Attack:
  r"""Fast adaptive boundary attack: the smallest perturbation that is enough.

  With the margin :math:`f` of a wrong class, the boundary is linearised where
  the search stands, :math:`f(\delta_t) + \langle \nabla f, \delta - \delta_t
  \rangle = 0`, and both the current point and the clean input are projected on
  it inside the valid range; the next point lies between, 5 % beyond:

  .. math:: \delta_{t+1} = (1 - a)(\delta_t + 1.05\, d_t) + 1.05\, a\, d_0,
            \qquad a = \min\Bigl(\frac{\|d_t\|}{\|d_t\| + \|d_0\|},
            \tfrac1{10}\Bigr)

  After a success the search goes back a tenth of the way to the clean input. At
  last the best point is drawn towards it by bisection as long as it stays
  adversarial.

  ``attacks.distances`` turns the result into numbers. With balls for several
  modalities "smallest" means the smallest factor by which all budgets can be
  multiplied. Inside a ball it is an attack like any other: where the nearest
  point found lies outside the budget, the example survives.

  Costs, for each restart and target, ``num_steps`` gradients and forward
  passes.

  >>> attack = minimum_norm(norm=2, valid_range=(0.0, 1.0))
  >>> distance = attacks.distances(
  ...   key, attack, logits_fn, inputs, label)            # doctest: +SKIP

  Args:
    norm: 2 or ``"l2"``; infinity or ``"linf"``.
    budget: the largest perturbation of interest; the default is no limit in
      practice. A number, one joint ball over all float modalities; or a
      mapping, one ball for each modality it names.
    targets: ``"rivals"``, the boundary to each of the ``num_targets`` best
      wrong classes by clean logit; or ``"any"``, that to the best wrong class
      where the search stands.
    num_targets: at most so many, and no more than there are wrong classes.
    num_steps: projections per run.
    num_restarts: runs per target; all but the first start at random, half as
      far away as the best point so far.
    valid_range: ``(low, high)`` for all modalities or ``{m: (low, high)}``.
    units: ``{m: size of one unit}``, 1 where not named.

  Returns:
    A frozen :class:`attacks.Attack`.

  Raises:
    ValueError: a bad value, naming the argument.

  References:
    `Croce & Hein (2020) <https://arxiv.org/abs/1907.02044>`_. A joint l2 ball
    with a valid range and linf are projected exactly; separate l2 balls with
    one only nearly.
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
    aims = ascent.runs(objective, **options)
    away = jnp.arange(len(aims)) >= len(aims) // num_restarts

    def run(nearest, xs):
      return _approach(*xs, nearest, objective, num_steps), None

    xs = (jax.random.split(key, len(aims)), aims, away)
    nearest, _ = jax.lax.scan(run, _untouched(objective), xs)
    return _drawn_in(nearest.delta, objective)

  return base.make_attack(
    "minimum_norm",
    norm=norm,
    budget=budget,
    loss="margin",
    valid_range=valid_range,
    units=units,
    options=options,
    search=search,
  )


class _Nearest(NamedTuple):
  """The smallest adversarial perturbation and its extent, [b]; inf if none."""

  delta: Any
  extent: Any

  def updated(self, delta, extent, broken):
    better = broken & (extent < self.extent)
    return _Nearest(*base.select(better, (delta, extent), tuple(self)))


def _untouched(objective):
  zeros = objective.region.zeros()
  broken = objective(zeros).broken
  extent = jnp.where(broken, 0, jnp.inf).astype(objective.region.dtype)
  return _Nearest(zeros, extent)


def _approach(key, aim, away, nearest, objective, num_steps):
  region = objective.region
  random = region.random(key)
  known = jnp.isfinite(nearest.extent)
  length = jnp.where(known & away, nearest.extent, 0) / 2
  start = region.in_range(
    {m: balls.like(length * region.radius[m], d) * d for m, d in random.items()}
  )

  def step(carry, _):
    delta, nearest = carry
    evaluation, grad = objective.gradient(delta, aim)
    nearest = nearest.updated(delta, region.extent(delta), evaluation.broken)
    need = -evaluation.loss.astype(region.dtype)
    here = _onto_boundary(region, delta, grad, need, random)
    need = need + _inner(grad, delta)
    there = _onto_boundary(region, region.zeros(), grad, need, random)
    near, far = region.extent(here), region.extent(there)
    pull = jnp.minimum(near / jnp.maximum(near + far, 1e-30), MAX_PULL)
    delta = region.in_range(
      {
        m: balls.like(1 - pull, d) * (d + OVERSHOOT * here[m])
        + balls.like(pull, d) * OVERSHOOT * there[m]
        for m, d in delta.items()
      }
    )
    broken = objective(delta, aim).broken
    nearest = nearest.updated(delta, region.extent(delta), broken)
    share = jnp.where(broken, BACKWARD, 1.0)
    return ({m: balls.like(share, d) * d for m, d in delta.items()}, nearest), (
      None
    )

  (_, nearest), _ = jax.lax.scan(step, (start, nearest), None, num_steps)
  return nearest


def _onto_boundary(region, start, grad, need, otherwise):
  """The smallest move from ``start`` with ``<grad, move> = need``, in range.

  As far as the range allows. Without a gradient there is no boundary in sight
  and no move.
  """
  sign = jnp.where(need < 0, -1.0, 1.0)
  grad = {
    m: balls.like(sign, g) * g.astype(region.dtype) for m, g in grad.items()
  }
  need = jnp.abs(need)
  unit = region.steepest(start, grad, otherwise)
  direction = {m: balls.like(region.radius[m], d) * d for m, d in unit.items()}
  slope = _inner(grad, direction)
  length = _quotient(need, slope)

  def reached(length):
    return {
      m: d + balls.like(length, d) * direction[m] for m, d in start.items()
    }

  def gained(length):
    ends = region.in_range(reached(length))
    return {m: ends[m] - d for m, d in start.items()}

  if not region.valid_range:
    return gained(length)

  # Along the path the gain is concave and piecewise linear in the length, so
  # that Newton's method climbs to the solution from below.
  def newton(length, _):
    inside = region.inside(reached(length))
    free = {m: jnp.where(inside[m], d, 0) for m, d in direction.items()}
    left = jnp.maximum(need - _inner(grad, gained(length)), 0)
    return length + _quotient(left, _inner(grad, free)), None

  length, _ = jax.lax.scan(newton, length, None, NUM_NEWTON)
  return gained(length)


def _drawn_in(delta, objective):
  """As near to the clean input as the flip allows, along the line to it."""

  def halve(carry, _):
    low, high = carry
    middle = (low + high) / 2
    closer = {m: balls.like(middle, d) * d for m, d in delta.items()}
    broken = objective.returned(closer).broken
    low = jnp.where(broken, low, middle)
    return (low, jnp.where(broken, middle, high)), None

  # Like the label, for its sharding.
  one = jnp.ones_like(objective.label, objective.region.dtype)
  carry = (jnp.zeros_like(one), one)
  (_, high), _ = jax.lax.scan(halve, carry, None, NUM_BISECTIONS)
  return {m: balls.like(high, d) * d for m, d in delta.items()}


def _inner(a, b):
  def total(x, y):
    product = jnp.where(jnp.isfinite(x), x, 0) * y
    return jnp.sum(product, axis=tuple(range(1, product.ndim)))

  return sum(total(a[m], b[m]) for m in sorted(a))


def _quotient(value, slope):
  """0 where there is no slope."""
  return jnp.where(slope > 0, value / jnp.where(slope > 0, slope, 1), 0)
