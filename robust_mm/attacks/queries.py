"""Square attack: random search that reads nothing but the logits."""

import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import _validate
from robust_mm import modalities
from robust_mm.attacks import balls
from robust_mm.attacks import base

# Of 10,000 queries: after so many the changed share is halved.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square(
  *,
  norm: Any,
  budget: Any,
  num_queries: int = 1000,
  num_restarts: int = 1,
  share: float = 0.8,
  loss: str = "margin",
  valid_range: Any = None,
  units: Any = None,
) -> base.Attack:
  r"""Random search over blocks of the input; needs no gradient.

  Each query changes one block of one modality, picked at random for each
  example, and is kept where the loss grows. Inputs of rank 3 and more per
  example (images, videos) are changed in squares of their first two axes, all
  others (vectors, sequences) in contiguous blocks of their first axis; what
  follows are channels, each with a sign of its own. The block covers ``share``
  of the input at first, and half as much after 0.1 %, 0.5 %, 2 %, ... of the
  queries.

  linf: the block becomes :math:`\pm\epsilon`. l2: a random share of another
  block in the same ball is moved into it, together with what is left of the
  budget, as a random bump on top of what was there.

  A model whose gradients mislead is broken by this attack where PGD fails;
  against an honest one it is the weaker of the two.

  Costs, for each restart, ``num_queries`` forward passes.

  >>> square(norm="linf", budget=0.1, num_queries=500).settings["share"]
  0.8

  Args:
    norm: 2 or ``"l2"``; infinity or ``"linf"``.
    budget: a number, one joint ball over all float modalities; or a mapping,
      one ball for each modality it names. See :class:`attacks.Attack`.
    num_queries: forward passes per restart.
    num_restarts: the best of so many searches.
    share: of a modality that the first blocks cover, in (0, 1].
    loss: ``"margin"``, ``"cross_entropy"`` or ``"dlr"``.
    valid_range: ``(low, high)`` for all modalities or ``{m: (low, high)}``.
    units: ``{m: size of one unit}``, 1 where not named.

  Returns:
    A frozen :class:`attacks.Attack`.

  Raises:
    ValueError: a bad value, naming the argument.

  References:
    `Andriushchenko et al. (2020) <https://arxiv.org/abs/1912.00049>`_; there
    for one image, with another bump and all of the other block.
  """
  _validate.at_least(1, num_queries=num_queries, num_restarts=num_restarts)
  _validate.positive(share=share)
  _validate.in_unit_interval(share=share)
  options = {
    "num_queries": int(num_queries),
    "num_restarts": int(num_restarts),
    "share": float(share),
  }

  def search(key, objective):
    shares = jnp.asarray(_shares(num_queries, share))

    def restart(best, key):
      return _search(key, best, objective, shares), None

    keys = jax.random.split(key, num_restarts)
    best, _ = jax.lax.scan(restart, objective.nothing_found(), keys)
    return best.delta

  return base.make_attack(
    "square",
    norm=norm,
    budget=budget,
    loss=loss,
    valid_range=valid_range,
    units=units,
    options=options,
    search=search,
  )


def _shares(num_queries, share):
  """What share of a modality each query changes, ``float32[num_queries]``."""
  progress = np.arange(num_queries) * 10_000 / num_queries
  halvings = np.searchsorted(HALVINGS, progress, side="left")
  return (share / 2.0**halvings).astype(np.float32)


def _search(key, best, objective, shares):
  region = objective.region
  start_key, key = jax.random.split(key)
  stripes = region.project(_stripes(start_key, region))
  # The first query changes most of them, and is kept whatever it finds.
  own = objective.nothing_found()._replace(delta=stripes)
  propose = _fill if region.norm == "linf" else _move_mass

  def query(own, xs):
    key, share = xs
    changed = propose(_draws(key, region), region, own.delta, share)
    changed = region.project(changed)
    return own.updated(changed, objective(changed)), None

  keys = jax.random.split(key, len(shares))
  own, _ = jax.lax.scan(query, own, (keys, shares))
  return best.updated(own.delta, base.Evaluation(own.loss, own.broken))


def _stripes(key, region):
  """Full size: a sign per channel and place of the last axis of a square."""
  signs = {}
  for number, (m, x) in enumerate(sorted(region.clean.items())):
    shape = (
      x.shape[0],
      *(1 for _ in _space(x)[:-1]),
      *x.shape[len(_space(x)) :],
    )
    sign = _signs(jax.random.fold_in(key, number), shape, region.dtype)
    signs[m] = jnp.broadcast_to(sign, x.shape)
  far = {m: r * region.units[m] for m, r in region.radius.items()}
  if region.norm == "l2":
    size = region.size(signs)
    far = {m: r / jnp.maximum(size[m], 1e-30) for m, r in region.radius.items()}
  return {m: balls.like(far[m], d) * d for m, d in signs.items()}


class _Draws(NamedTuple):
  """The random numbers of a query, in as few draws as there are kinds.

  Each draw inside the loop is a long program to compile.
  """

  chosen: Any  # {m: bool[b]}, the modality that changes
  giver: Any  # {m: bool[b]}, the one that gives in a joint l2 ball
  share: Any  # [b], what it keeps
  places: Any  # {m: two blocks [2 axes, b]} in [0, 1)
  bump: Any  # {m: [b, ...]}, positive; for channels only in linf
  sign: Any  # {m: [b, 1, channels]}


def _draws(key, region):
  names = modalities.names(region.clean)
  uniform_key, key = jax.random.split(key)
  batch = region.clean[names[0]].shape[0]
  numbers = jax.random.uniform(uniform_key, (3 + 4 * len(names), batch))
  places, bump, sign = {}, {}, {}
  for number, m in enumerate(names):
    x = region.clean[m]
    start = 3 + 4 * number
    places[m] = (numbers[start : start + 2], numbers[start + 2 : start + 4])
    shape = _channels(x) if region.norm == "linf" else x.shape
    own = jax.random.fold_in(key, number)
    normal = jax.random.normal(own, shape, region.dtype)
    bump[m] = jnp.abs(normal)
    first = (slice(None), *(slice(0, 1) for _ in _space(x)))
    sign[m] = jnp.where(normal[first] < 0, -1, 1).astype(region.dtype)
  chosen = _chosen(numbers[0], region)
  giver = _chosen(numbers[1], region) if region.joint else chosen
  return _Draws(chosen, giver, numbers[2], places, bump, sign)


def _fill(draws, region, delta, share):
  """A block of the chosen modality at the ends of the budget."""
  changed = {}
  for m, d in delta.items():
    block = _block(draws.places[m][0], d, share)
    block &= balls.like(draws.chosen[m], d)
    end = balls.like(region.radius[m] * region.units[m], d)
    # Products, because a choice wants all its operands sharded alike.
    changed[m] = block * (draws.sign[m] * end) + ~block * d
  return changed


def _move_mass(draws, region, delta, share):
  """Part of the size of a second block, and what is unspent, into a first."""
  scaled = {m: d / region.units[m] for m, d in delta.items()}
  pattern, emptied = {}, {}
  for m, d in scaled.items():
    first, second = draws.places[m]
    into = _block(first, d, share) & balls.like(draws.chosen[m], d)
    other = _block(second, d, share) & balls.like(draws.giver[m], d)
    bump = into * (draws.sign[m] * draws.bump[m])
    # Half, or a block of one entry could cancel to nothing but rounding.
    pattern[m] = _normalised(_normalised(bump) + _normalised(into * d) / 2)
    left = jnp.where(other, balls.like(draws.share, d), 1)
    emptied[m] = (~into * left).astype(d.dtype) * d
  left = region.size({m: d * region.units[m] for m, d in emptied.items()})
  room = {
    m: jnp.sqrt(_free(jnp.square(r), jnp.square(left[m])))
    for m, r in region.radius.items()
  }
  return {
    m: region.units[m] * (d + balls.like(room[m], d) * pattern[m])
    for m, d in emptied.items()
  }


def _free(whole, taken):
  """What is left of a squared size; rounding errors of it count as nothing."""
  free = whole - taken
  return jnp.where(free > 1e-5 * whole, free, 0)


def _chosen(number, region):
  """One modality per example among those that may move: ``{m: bool[b]}``."""
  names = modalities.names(region.clean)
  moving = modalities.stack(region.radius, axis=-1) > 0
  rank = jnp.cumsum(moving, axis=-1)
  wanted = jnp.floor(number * rank[:, -1]).astype(rank.dtype) + 1
  return {m: moving[:, i] & (rank[:, i] == wanted) for i, m in enumerate(names)}


def _space(x):
  """The axes that blocks are cut from, by size."""
  return x.shape[1 : 3 if x.ndim > 3 else 2]


def _channels(x):
  num = len(_space(x))
  return (x.shape[0], *(1,) * num, *x.shape[1 + num :])


def _block(numbers, x, share):
  """A block of about ``share`` of the input: ``bool[b, ...]``.

  ``numbers`` in [0, 1) place it, ``[axes, b]``.
  """
  space = _space(x)
  inside = jnp.ones(x.shape[:1] + (1,) * (x.ndim - 1), bool)
  side = share * math.prod(space)
  side = jnp.sqrt(side) if len(space) == 2 else side
  for axis, size in enumerate(space):
    length = jnp.clip(jnp.round(side), 1, size)
    start = balls.like(jnp.floor(numbers[axis] * (size - length + 1)), x)
    place = jnp.expand_dims(
      jnp.arange(size, dtype=start.dtype),
      [i for i in range(x.ndim) if i != axis + 1],
    )
    inside = inside & (place >= start) & (place < start + length)
  return jnp.broadcast_to(inside, x.shape)


def _signs(key, shape, dtype):
  return jax.random.rademacher(key, shape).astype(dtype)


def _normalised(x):
  squares = jnp.sum(x * x, axis=tuple(range(1, x.ndim)))
  return x * balls.like(
    jnp.where(squares > 0, jax.lax.rsqrt(jnp.maximum(squares, 1e-30)), 0), x
  )
