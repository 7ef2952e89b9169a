"""Penalties of the level of the largest wrong logits."""

import functools
import math
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from robust_mm import _validate
from robust_mm import margins
from robust_mm.losses import wrong
from robust_mm.losses.penalties import REDUCTIONS
from robust_mm.losses.penalties import Penalty
from robust_mm.losses.penalties import total

FORMS = ("softplus", "relu")
GLOBAL = "global"


def topk_level(
  *,
  window: Sequence[int] = wrong.FIRST_FOUR,
  space: str = "log_prob",
  reduction: str = "mean",
  level_scope: str | int = GLOBAL,
) -> Penalty:
  r"""PRSL: how unequal the levels of the items of a batch are.

  .. math:: KL(u_N \,\|\, softmax_N(m)) = \log \sum_i e^{m_i}
            - \frac1N \sum_i m_i - \log N

  It equalises the level of the largest wrong logits *between items* and does
  not push them down. Of one item it is 0.

  - ``space="logit"``, as published: a shift of all logits of an item changes
    the penalty and no probability, so that a network can satisfy it without
    doing anything. ``"log_prob"`` takes levels of log-probabilities, which no
    shift changes.
  - Weighted items: :math:`\log \sum_i w_i e^{m_i} - \sum_i w_i m_i`.

  Args:
    window: the ranks whose mean is the level, see the module.
    space: ``"log_prob"`` or ``"logit"``.
    reduction: ``"mean"``, as above; or ``"sum_as_published"``, :math:`N \log
      \sum_i e^{m_i} - \sum_i m_i`, which is N times that plus :math:`N \log
      N`.
    level_scope: ``"global"``, the items of the whole batch, on all devices; or
      a number of equal parts of it, of whole examples, that are compared each
      for itself, as the devices of the release were.

  Raises:
    ValueError: a bad value; a window beyond the wrong classes, once called.

  >>> same = jnp.array([[9.0, 1.0, 0.0], [0.0, 9.0, 1.0]])
  >>> round(float(topk_level(window=(0, 1))(same, jnp.array([0, 1]))), 6)
  0.0
  """
  window = wrong.check_window(window)
  _validate.one_of(("log_prob", "logit"), space=space)
  _validate.one_of(REDUCTIONS, reduction=reduction)
  parts = _parts(level_scope)
  summed = reduction != "mean"

  def items(logits, label):
    return level(logits, label, window, space)

  return Penalty(
    name="topk_level",
    options={
      "window": window,
      "space": space,
      "reduction": reduction,
      "level_scope": level_scope,
    },
    items=items,
    combine=functools.partial(_compared, parts=parts, summed=summed),
    check=functools.partial(wrong.check_fits, window),
    window=window,
    parts=parts,
    summed=summed,
    published=lambda: topk_level(
      window=window,
      space="logit",
      reduction="sum_as_published",
      level_scope=level_scope,
    ),
  )


def level(
  logits: Array, label, window: Sequence[int], space: str = "log_prob"
) -> Array:
  """``[*n]``: the mean wrong logit, or log-probability, of a window."""
  if space == "log_prob":
    logits = jax.nn.log_softmax(logits, axis=-1)
  return wrong.ranked(logits, label, window).mean()


def _parts(level_scope) -> int:
  if level_scope == GLOBAL:
    return 1
  if not isinstance(level_scope, int):
    raise ValueError(
      f"level_scope must be 'global' or a number of parts, got {level_scope!r}."
    )
  _validate.at_least(1, level_scope=level_scope)
  return level_scope


def _compared(levels: Array, weights: Array, *, parts: int, summed: bool):
  """Of every part of a batch by itself, all of them added."""
  if levels.size % parts:
    raise ValueError(
      f"level_scope must divide the {levels.size} items of a batch, got "
      f"{parts}."
    )
  shape = (parts, levels.size // parts)
  levels, weights = (jnp.reshape(x, shape) for x in (levels, weights))
  found = jax.vmap(_unequal)(levels, weights)
  if not summed:
    # N log N, which is no fault of the levels.
    share = jnp.sum(weights, axis=1)
    found = found - jax.scipy.special.xlogy(share, share)
  return jnp.sum(found)


def _unequal(levels: Array, weights: Array) -> Array:
  r""":math:`W \log \sum w e^m - \sum w m`, W the sum of the weights w."""
  # No exponential at all has no logarithm: then all count, and W is 0.
  some = jnp.any(weights > 0)
  safe = jnp.where(some, weights, jnp.ones_like(weights))
  logarithm = jax.nn.logsumexp(levels, b=safe)
  return jnp.sum(weights) * logarithm - total(levels, weights)


def topk_margin(
  *,
  window: Sequence[int] = wrong.FIRST_FOUR,
  form: str = "softplus",
  gamma: float = 0.0,
) -> Penalty:
  r"""A window of wrong logits, below the label's by ``gamma``.

  .. math:: \log\Bigl(1 + e^{\gamma - z_y} \sum_{window} e^{n_j}\Bigr)
            \qquad \text{or} \qquad \max(0, m - z_y + \gamma)

  "Restrict the top K" taken literally: the only one that pushes them down.
  ``softplus`` over ``(0, C - 1)`` with ``gamma = 0`` is cross-entropy, and over
  fewer ranks it is smaller.

  Args:
    window: the ranks.
    form: ``"softplus"``, the first formula; ``"relu"``, the second. Without
      either the penalty would have no lower bound.
    gamma: in units of logits.

  Raises:
    ValueError: a bad value; a window beyond the wrong classes, once called.
  """
  window = wrong.check_window(window)
  _validate.one_of(FORMS, form=form)
  if not isinstance(gamma, numbers.Real) or not math.isfinite(gamma):
    raise ValueError(f"gamma must be finite, and a number; got {gamma!r}.")

  def items(logits, label):
    values = wrong.ranked(logits, label, window)
    own = margins.pick(logits, margins.one_hot(label, logits.shape[-1]))
    own = jnp.squeeze(own, axis=-1)
    if form == "softplus":
      return jax.nn.softplus(values.logsumexp() - own + gamma)
    return jax.nn.relu(values.mean() - own + gamma)

  return Penalty(
    name="topk_margin",
    options={"window": window, "form": form, "gamma": gamma},
    items=items,
    combine=total,
    check=functools.partial(wrong.check_fits, window),
    window=window,
  )
