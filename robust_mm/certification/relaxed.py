r"""Radii from bounds inside a ball: linear relaxation and local constants.

They need no Lipschitz constants and no additive head: the model is taken apart
as traced (``robust_mm.relaxation``), so plain functions and ordinary encoders
are certified as well, as long as they are affine between known activations.
What they certify is balls, jointly and per modality; there is no polytope.
"""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from robust_mm import margins
from robust_mm import modalities
from robust_mm import relaxation
from robust_mm._types import Model
from robust_mm.certification import programs
from robust_mm.certification.balls import Balls

METHODS = ("local", "relaxation")
NUM_STEPS = 16  # of bisection: the last one moves a radius by 2^-15
_GRID = (0.1, 10.0, 17)  # times the first radius, of the local constants
_JUMP = 1e-3
_ROUNDING = 256.0  # machine epsilons of what inputs contribute to a logit
_SLACK = 64.0  # machine epsilons of the largest logit, below a margin


class Problem(NamedTuple):
  """What is certified; a pytree.

  Attributes:
    params: of the model.
    state: of the model.
    inputs: ``{m: [b, ...]}``.
    present: ``{m: bool[b]}``.
    prediction: int ``[b]``.
    units: ``{m: []}``.
  """

  params: Any
  state: Any
  inputs: Any
  present: Any
  prediction: Any
  units: Any


def network_of(model: Model, problem: Problem) -> relaxation.Network:
  """The logits of one example as a network.

  Raises:
    ValueError: naming the operation there is no relaxation for.
  """
  # Shapes alone: a row of a sharded batch could not be cut out.
  one, here = (
    {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in rows}
    for rows in (problem.inputs.items(), problem.present.items())
  )

  def logits(constants, inputs):
    params, state, present = constants
    rows = {name: x[None] for name, x in inputs.items()}
    flags = {name: x[None] for name, x in present.items()}
    return model.apply(params, state, rows, flags)[0].logits[0]

  return relaxation.trace(logits, (problem.params, problem.state, here), one)


def explains(
  model: Model,
  network: relaxation.Network,
  problem: Problem,
  logits: Float[Array, "b k"],
) -> Bool[Array, " b"]:
  """Whether each example alone has the logits it has among others.

  ``network`` was taken from one example: what a model makes of others (batch
  statistics) is not in it. Tried in the batch, and in the batch beside as many
  rows of ones. Up to rounding; NaN agrees, it proves nothing.
  """
  sizes = _sizes(problem)
  number = problem.prediction.shape[0]
  double = {
    name: jnp.concatenate([x, jnp.ones_like(x)])
    for name, x in problem.inputs.items()
  }
  here = {m: jnp.concatenate([x, x]) for m, x in problem.present.items()}
  with jax.default_matmul_precision("highest"):
    outputs, _ = model.apply(problem.params, problem.state, double, here)

  def one(bound, ball, rows):
    del rows
    found, pull = jax.vjp(bound, dict(ball.center))
    slopes = jax.vmap(pull)(jnp.eye(found.shape[0], dtype=found.dtype))[0]
    terms = [
      jnp.sum(
        jnp.abs(slope * ball.center[name][None]).reshape(len(slope), -1), 1
      )
      for name, slope in slopes.items()
    ]
    return found, jnp.max(sum(terms))

  zero = jnp.zeros_like(problem.prediction, dtype=_dtype(problem))
  norm = tuple((name, "l2") for name in modalities.names(problem.inputs))
  found, moved = _each(one, network, problem, sizes, zero, norm)
  # Rounding is relative to what single inputs contribute, which others and
  # biases may cancel.
  rounding = _ROUNDING * float(jnp.finfo(logits.dtype).eps) * moved
  limit = programs.SAME_ROW * jnp.max(jnp.abs(logits), axis=-1) + rounding
  among = jnp.stack([logits, outputs.logits[:number]])
  difference = jnp.max(jnp.abs(found[None] - among), axis=(0, -1))
  return ~(difference > limit)


def balls(
  network: relaxation.Network,
  problem: Problem,
  *,
  method: str,
  norm: tuple,
  sensitivity: Mapping[str, Array] | None = None,
  num_steps: int = NUM_STEPS,
) -> Balls:
  r"""The largest balls a method confirms.

  Args:
    network: from ``network_of``.
    problem: the batch.
    method: "relaxation": the margin is bounded from below over the ball, the
      radius found by bisection; "local": the gradient is, and the radius is the
      best of a grid, :math:`\max_\rho \min(\rho, \min_j M_j / S_j(\rho))`.
    norm: ``((m, norm), ...)``.
    sensitivity: ``{m: [b, k]}`` global ones per unit, which local ones never
      exceed.
    num_steps: of the bisection.
  """
  names = modalities.names(problem.inputs)
  margin, slopes = first_order(network, problem, norm)
  chosen = margins.one_hot(problem.prediction, margin.shape[-1])
  margin = jnp.where(chosen, jnp.inf, margin)

  def search(row):
    """All together, or one alone: ``row`` says who moves."""
    sizes = {
      name: jnp.where(problem.present[name], row[i] * problem.units[name], 0)
      for i, name in enumerate(names)
    }
    moved = {name: slopes[name] * row[i] for i, name in enumerate(names)}
    ratio = margins.joint_ratios(margin, moved)
    first = jnp.min(jnp.where(jnp.isfinite(ratio), ratio, jnp.inf), axis=-1)
    first = jnp.where(jnp.isfinite(first) & (first > 0), first, 1)
    if method == "relaxation":
      holds = functools.partial(confirms, network, problem, sizes, norm=norm)
      return relaxation.largest(holds, first, num_steps=num_steps)
    world = {
      name: value * row[names.index(name)]
      for name, value in (sensitivity or {}).items()
    }
    return _by_local_constants(
      network, problem, sizes, norm, margin, world, first
    )

  rows = jnp.concatenate([jnp.ones((1, len(names))), jnp.eye(len(names))])
  found = jax.lax.map(search, rows.astype(margin.dtype))
  found = jnp.where(_finite(problem)[None], found, 0)
  # Where nothing moves there is nothing to attack.
  here = [problem.present[name] for name in names]
  moves = jnp.stack([functools.reduce(jnp.logical_or, here), *here])
  found = jnp.where(moves, found, jnp.inf)
  return Balls(found[0], dict(zip(names, found[1:])))


def confirms(
  network: relaxation.Network,
  problem: Problem,
  sizes: Mapping[str, Float[Array, " b"]],
  radius: Float[Array, " b"],
  *,
  norm: tuple,
  lean: float = 1.0,
) -> Bool[Array, " b"]:
  """Whether no point of these balls changes the prediction.

  Args:
    network: from ``network_of``.
    problem: the batch.
    sizes: ``{m: [b]}`` raw size of modality m per unit of radius, 0 where it
      does not move.
    radius: ``[b]``.
    norm: ``((m, norm), ...)``.
    lean: of the ``relaxation.Ball``.
  """

  def one(bound, ball, rows):
    ball = dataclasses.replace(ball, lean=lean)
    return relaxation.lower(bound, ball, rows)

  lowest = _each(one, network, problem, sizes, radius, norm)
  rival = ~margins.one_hot(problem.prediction, lowest.shape[-1])
  return jnp.all(jnp.where(rival, lowest > 0, True), axis=-1)


def prover(
  network: relaxation.Network,
  problem: Problem,
  *,
  norm: tuple,
  sensitivity: Mapping[str, Array] | None = None,
) -> Callable[..., Bool[Array, " b"]]:
  """``(moving, radius) -> bool[b]``: whether either method certifies a ball.

  ``moving`` are the modalities that move, the others stay; ``radius`` is [b],
  an infinite one holds where none of them is present. One program for all.

  Args:
    network: from ``network_of``.
    problem: the batch.
    norm: ``((m, norm), ...)``.
    sensitivity: as in ``balls``.
  """

  @jax.jit
  def proves(problem, sensitivity, sizes, radius):
    margin, _ = first_order(network, problem, norm)
    chosen = margins.one_hot(problem.prediction, margin.shape[-1])
    margin = jnp.where(chosen, jnp.inf, margin)
    finite = jnp.where(jnp.isfinite(radius), radius, 1)
    reach = _local_reach(
      network, problem, sizes, norm, margin, sensitivity, finite
    )
    found = reach >= finite
    # A search ends where a bound jumps, and rounding puts the jump elsewhere.
    for lean in (1.0, 1 - _JUMP, 1 + _JUMP):
      found |= confirms(network, problem, sizes, finite, norm=norm, lean=lean)
    return found & jnp.isfinite(radius)

  def holds(moving: tuple[str, ...], radius: Float[Array, " b"]):
    sizes = {
      name: size if name in moving else jnp.zeros_like(size)
      for name, size in _sizes(problem).items()
    }
    found = proves(problem, dict(sensitivity or {}), sizes, radius)
    here = [problem.present[name] for name in moving]
    return jnp.where(functools.reduce(jnp.logical_or, here), found, True)

  return holds


def first_order(
  network: relaxation.Network, problem: Problem, norm: tuple
) -> tuple[Array, dict[str, Array]]:
  """Margins ``[b, k]``, less a slack, and gradient norms ``{m: [b, k]}``.

  The norms are per unit and no bound of anything: what the surroundings look
  like from the centre.
  """
  sizes = _sizes(problem)

  def one(bound, ball, rows):
    logits = bound(ball.center)
    slack = _SLACK * float(jnp.finfo(logits.dtype).eps)
    margin = rows @ logits - slack * jnp.max(jnp.abs(logits))
    gradient = jax.jacrev(lambda x: rows @ bound(x))(dict(ball.center))
    return margin, {
      name: _length(slope, dict(norm)[name]) * ball.sizes[name]
      for name, slope in gradient.items()
    }

  zero = jnp.zeros_like(problem.prediction, dtype=_dtype(problem))
  return _each(one, network, problem, sizes, zero, norm)


def _by_local_constants(network, problem, sizes, norm, margin, world, first):
  low, high, count = _GRID
  shares = jnp.geomspace(low, high, count, dtype=margin.dtype)

  def best(share):
    radius = share * first
    reach = _local_reach(network, problem, sizes, norm, margin, world, radius)
    return jnp.minimum(radius, reach)

  found = jnp.max(jax.lax.map(best, shares), axis=0)
  return jnp.where(jnp.isfinite(found), found, 0)


def _local_reach(network, problem, sizes, norm, margin, world, radius):
  """The radius that constants valid inside ``radius`` give."""

  def constants(bound, ball, rows):
    inside = relaxation.inside(bound, ball, intermediate="interval")
    found = relaxation.sensitivity(bound, rows, inside)
    # An l2 constant: of other norms the l2 size is bounded.
    return {
      name: value * ball.sizes[name] * _stretch(ball.center[name], kind)
      for (name, value), (_, kind) in zip(sorted(found.items()), norm)
    }

  local = _each(constants, network, problem, sizes, radius, norm)
  smaller = {
    name: jnp.minimum(value, world[name]) if name in world else value
    for name, value in local.items()
  }
  return margins.radii(margins.joint_ratios(margin, smaller))


def _each(fn: Callable, network, problem, sizes, radius, norm) -> Any:
  """``fn(bound network, ball, rows e_y - e_j)`` of every example."""
  number = network.output_shape[0]

  def one(inputs, present, prediction, sizes, radius, params, state):
    bound = network.bind((params, state, present))
    ball = relaxation.Ball(center=inputs, radius=radius, sizes=sizes, norm=norm)
    rows = jax.nn.one_hot(prediction, number, dtype=radius.dtype)
    return fn(bound, ball, rows[None] - jnp.eye(number, dtype=radius.dtype))

  # With explicit shardings vmap wants all rows alike, also those of constants.
  spread = 0 * problem.prediction.astype(radius.dtype)
  sizes = {name: size + spread for name, size in sizes.items()}
  radius = radius + spread
  return jax.vmap(one, in_axes=(0, 0, 0, 0, 0, None, None))(
    dict(problem.inputs),
    dict(problem.present),
    problem.prediction,
    sizes,
    radius,
    problem.params,
    problem.state,
  )


def _sizes(problem):
  return {
    name: jnp.where(here, problem.units[name], 0).astype(_dtype(problem))
    for name, here in problem.present.items()
  }


def _length(slope, kind):
  flat = jnp.reshape(slope, (slope.shape[0], -1))
  if kind == "linf":
    return jnp.sum(jnp.abs(flat), axis=-1)
  if kind == "l1":
    return jnp.max(jnp.abs(flat), axis=-1)
  return margins.norm(flat)


def _stretch(x, kind):
  return x.size**0.5 if kind == "linf" else 1.0


def _dtype(problem):
  return jnp.result_type(jnp.float32, *problem.inputs.values())


def _finite(problem):
  good = jnp.ones(problem.prediction.shape, bool)
  for x in problem.inputs.values():
    good &= jnp.all(jnp.isfinite(jnp.reshape(x, (x.shape[0], -1))), axis=-1)
  return good
