"""Gradient ascent on the input, all classes and seeds at once."""

import dataclasses
import functools
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robust_mm.visualization import objectives
from robust_mm.visualization import parameterizations
from robust_mm.visualization import transforms as transforms_lib

TINY = 1e-8
# Of what the model sees at once: inputs, and numbers in them.
MOST_INPUTS, MOST_NUMBERS = 1024, 2**24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """What is done, hashable: equal programs are compiled once.

  Attributes:
    in_place: x itself is transformed every ``every`` steps, and ascends its
      normalised gradient; otherwise the objective is averaged over fresh
      transformations, and u ascends by Adam.
    objective: a name of ``objectives``.
    transforms: ``((m, Transform), ...)``.
    smooth: ``((m, axes of its total variation), ...)``.
    num_steps: of the ascent.
    num_transforms: fresh ones a step.
    step_size: Adam's rate, or the length of a step in place.
    tv_weight: of the mean absolute differences.
    l2_weight: of the mean squared distance to the reference.
    every: steps between two transformations in place.
    annealing: share of the steps, at the end, over which all ranges shrink
      linearly to 0.
    blur_every: steps between two blurs, in the first half; 0 for none.
  """

  in_place: bool
  objective: str
  transforms: tuple[tuple[str, transforms_lib.Transform], ...]
  smooth: tuple[tuple[str, tuple[int, ...]], ...]
  num_steps: int
  num_transforms: int
  step_size: float
  tv_weight: float
  l2_weight: float
  every: int
  annealing: float
  blur_every: int


class Ascent(NamedTuple):
  """Where the ascent is; leading axis ``n``, classes times seeds.

  Attributes:
    u: ``{m: [n, ...]}``.
    last: the u before, whose objective was finite.
    opt_state: of Adam.
    value: ``[n]``, the last finite objective.
    probability: ``[n]``, of the class, then.
    bad_step: ``[n]``, the first step with a non-finite objective; -1 for none.
  """

  u: Any
  last: Any
  opt_state: Any
  value: Any
  probability: Any
  bad_step: Any


def run(program: Program, view: Any, spaces: Any, label, keys, divisor):
  """``run_part``, in as many parts of one size as memory asks for."""
  copies = view.num_others
  copies *= 1 if program.in_place else program.num_transforms
  size = sum(math.prod(space.shape) for space in spaces.values())
  count = label.shape[0]
  part = min(count, MOST_INPUTS // copies, MOST_NUMBERS // (copies * size))
  part = max(part, 1)
  # The last is filled up: one compilation for all.
  rows = np.arange(-(-count // part) * part) % count
  found = [
    run_part(program, view, spaces, label[here], keys[here], divisor)
    for here in np.split(rows, len(rows) // part)
  ]
  return jax.tree.map(lambda *x: jnp.concatenate(x)[:count], *found)


@functools.partial(jax.jit, static_argnames="program")
def run_part(program: Program, view: Any, spaces: Any, label, keys, divisor):
  """Synthesises ``n`` inputs at once.

  Args:
    program: what to do.
    view: the model.
    spaces: ``{m: Parameterization}``.
    label: ``int[n]``.
    keys: ``[n]``.
    divisor: of the objective.

  Returns:
    ``{m: [n, ...]}``, objectives ``[n, steps]``, probabilities of the class
    ``[n, steps]``, and the first bad step ``[n]``: the number of steps where it
    is what the last one made.
  """
  step_fn, start = _ascent(program, view, spaces, label, keys, divisor)
  steps = jnp.arange(program.num_steps, dtype=jnp.int32)
  end, (values, probabilities) = jax.lax.scan(step_fn, start, steps)
  # Nobody has looked at what the last step made.
  x = _decoded(spaces, end.u)
  found = objectives.objective(
    program.objective, view.logits(x), _by_item(view, label)
  )
  bad = ~jnp.all(jnp.isfinite(found), axis=-1) & (end.bad_step < 0)
  x = _choose(bad, _decoded(spaces, end.last), x)
  bad_step = jnp.where(bad, program.num_steps, end.bad_step)
  return x, values.T, probabilities.T, bad_step


def _ascent(program, view, spaces, label, keys, divisor):
  """One step of it, ``step(carry, t)``, and where it starts."""
  tx = optax.adam(program.step_size)
  slope_fn = jax.grad(
    lambda u, keys, strength: _total(
      program, view, spaces, label, divisor, u, keys, strength
    ),
    has_aux=True,
  )

  def step(carry: Ascent, t):
    here = jax.vmap(lambda key: jax.random.fold_in(key, t))(keys)
    drawn, moved = _split(here)
    strength = _strength(program, t)
    grads, (value, probability) = slope_fn(carry.u, drawn, strength)
    frozen = carry.bad_step >= 0
    good = jnp.isfinite(value) & _finite(grads) & ~frozen
    if program.in_place:
      opt_state = carry.opt_state
      after = _stepped(program, spaces, carry.u, grads)
    else:
      grads = jax.tree.map(jnp.negative, grads)
      updates, opt_state = tx.update(grads, carry.opt_state)
      after = optax.apply_updates(carry.u, updates)
    after = _treated(program, spaces, after, moved, strength, t)
    # One that has gone wrong stays where all was finite.
    bad = ~good & ~frozen
    at = functools.partial(_choose, good)
    carry = Ascent(
      u=at(after, _choose(bad, carry.last, carry.u)),
      last=at(carry.u, carry.last),
      opt_state=jax.tree.map(
        lambda new, old: at(new, old) if new.ndim else new,
        opt_state,
        carry.opt_state,
      ),
      value=at(value, carry.value),
      probability=at(probability, carry.probability),
      bad_step=jnp.where(bad, t, carry.bad_step),
    )
    return carry, (carry.value, carry.probability)

  return step, _start(tx, spaces, label, keys)


def _start(tx, spaces, label, keys) -> Ascent:
  begin = jax.vmap(lambda key: jax.random.split(key))(keys)[:, 1]
  u = {
    name: jax.vmap(
      lambda key, i=i, s=space: s.init(jax.random.fold_in(key, i))
    )(begin)
    for i, (name, space) in enumerate(sorted(spaces.items()))
  }
  return Ascent(
    u=u,
    last=u,
    opt_state=tx.init(u),
    value=jnp.full(label.shape, jnp.nan),
    probability=jnp.full(label.shape, jnp.nan),
    bad_step=jnp.full(label.shape, -1, jnp.int32),
  )


def _total(program, view, spaces, label, divisor, u, keys, strength):
  """The sum over ``n``, whose gradient is that of each one alone."""
  x = _decoded(spaces, u)
  number = 1 if program.in_place else program.num_transforms
  seen = x if program.in_place else _transformed(program, x, keys, strength)
  logits = view.logits(seen)
  repeated = jnp.repeat(_by_item(view, label), number, axis=0)
  gained = objectives.objective(program.objective, logits, repeated) / divisor
  probability = jnp.exp(objectives.objective("log_prob", logits, repeated))
  gained, probability = (
    jnp.mean(jnp.reshape(v, (label.shape[0], -1)), axis=1)
    for v in (gained, probability)
  )
  value = gained - _penalty(program, spaces, x)
  return jnp.sum(value), (value, probability)


def _by_item(view, label):
  return jnp.broadcast_to(label[:, None], (label.shape[0], view.num_others))


def _decoded(spaces, u):
  return {
    name: jax.vmap(space.decode)(u[name]) for name, space in spaces.items()
  }


def _transformed(program, x, keys, strength):
  """``{m: [n * num_transforms, ...]}``, each by a draw of its own."""
  found = {}
  for i, (name, transform) in enumerate(program.transforms):

    def several(key, value, i=i, transform=transform):
      draws = transform.draws(
        jax.random.fold_in(key, i),
        program.num_transforms,
        value.shape,
        strength=strength,
      )
      return jax.vmap(
        transform.apply, in_axes=(None, 0), axis_size=program.num_transforms
      )(value, draws)

    moved = jax.vmap(several)(keys, x[name])
    found[name] = jnp.reshape(moved, (-1, *moved.shape[2:]))
  return found


def _penalty(program, spaces, x):
  """``[n]``, in units of each range."""
  found = 0.0
  for name, axes in program.smooth:
    space = spaces[name]

    def one(value, axes=axes, space=space):
      rough = parameterizations.total_variation(value / space.width, axes)
      away = jnp.mean(jnp.square((value - space.reference) / space.width))
      return program.tv_weight * rough + program.l2_weight * away

    found += jax.vmap(one)(x[name])
  return found


def _stepped(program, spaces, x, grads):
  """Up the gradient, whose mean absolute entry is made ``step_size``."""
  found = {}
  for name, space in spaces.items():

    def one(x, slope, space=space):
      slope = slope * space.width
      change = program.step_size * slope / (jnp.mean(jnp.abs(slope)) + TINY)
      return space.project(x + change * space.width)

    found[name] = jax.vmap(one)(x[name], grads[name])
  return found


def _treated(program, spaces, u, keys, strength, t):
  """Transformed where x is, and blurred, at the steps that say so."""
  for i, (name, transform) in enumerate(program.transforms):
    space = spaces[name]
    if program.in_place:
      # Not in the last block, which sharpens what the resampling has blurred.
      now = ((t + 1) % program.every == 0) & (t + 1 < program.num_steps)
      moved = jax.vmap(
        lambda key, value, i=i, transform=transform: transform(
          jax.random.fold_in(key, i), value, strength=strength
        )
      )(keys, u[name])
      u = {**u, name: jnp.where(now, moved, u[name])}
    if program.blur_every:
      axes = dict(program.smooth)[name]
      now = (t + 1) % program.blur_every == 0
      now &= t + 1 <= program.num_steps // 2
      blurred = jax.vmap(lambda v, s=space, a=axes: s.blurred(v, a))(u[name])
      u = {**u, name: jnp.where(now, blurred, u[name])}
  return u


def _strength(program, t):
  if not program.annealing:
    return jnp.ones(())
  left = (program.num_steps - t) / (program.annealing * program.num_steps)
  return jnp.minimum(left, 1.0)


def _split(keys):
  """Two keys of every one."""
  pair = jax.vmap(lambda key: jax.random.split(key))(keys)
  return pair[:, 0], pair[:, 1]


def _finite(tree):
  """``[n]``: whether all entries are."""
  found = [
    jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))
    for x in jax.tree.leaves(tree)
  ]
  return functools.reduce(jnp.logical_and, found)


def _choose(flag, new, old):
  """``new`` where the flag ``[n]`` is set, leaf by leaf."""

  def one(a, b):
    return jnp.where(jnp.reshape(flag, flag.shape + (1,) * (a.ndim - 1)), a, b)

  return jax.tree.map(one, new, old)
