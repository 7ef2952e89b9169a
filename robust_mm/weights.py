"""Averages of parameters: along training, and between two models."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import optax

from robust_mm import _validate
from robust_mm._types import PyTree


def start_average(params: PyTree) -> PyTree:
  """Copies of ``params``, in float32 where they are narrower.

  In bfloat16 an average with decay 0.999 would never move.
  """
  return jax.tree.map(
    lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32)), params
  )


def moving_average(
  average: PyTree, params: PyTree, *, decay: float, count
) -> PyTree:
  r"""One step of an exponential moving average.

  .. math:: a_t = d_t a_{t-1} + (1 - d_t) p_t, \qquad
            d_t = \min\bigl(d, \tfrac{1 + t}{10 + t}\bigr)

  so that where training began is soon forgotten.

  Args:
    average: from :func:`start_average`, or the last call.
    params: as they are now; None leaves stay None.
    decay: d, in [0, 1).
    count: t, updates done, this one included: 1 at the first call.

  Returns:
    the average; ``optax.tree.cast_like(average, params)`` has the dtypes of
    ``params``.

  Raises:
    ValueError: ``decay`` is not in [0, 1).

  >>> average = start_average(jnp.array(0.0))
  >>> float(moving_average(average, jnp.array(11.0), decay=0.99, count=1))
  9.0

  References:
    `Polyak and Juditsky (1992) <https://doi.org/10.1137/0330046>`_
  """
  _validate.below_one(decay=decay)
  count = jnp.asarray(count, jnp.float32)
  step_size = 1 - jnp.minimum(decay, (1 + count) / (10 + count))
  return optax.incremental_update(params, average, step_size)


def interpolate(
  start: PyTree, end: PyTree, alpha: Any, *, extrapolate: bool = False
) -> PyTree:
  r"""The model between two models, weight by weight (WiSE-FT).

  .. math:: \theta_\alpha = (1 - \alpha)\, \theta_0 + \alpha\, \theta_1

  >>> start, end = {"w": jnp.zeros(2)}, {"w": jnp.full(2, 4.0)}
  >>> interpolate(start, end, 0.25)["w"].tolist()
  [1.0, 1.0]

  Formal guarantees:
    - At 0 and 1 the floating leaves are those of ``start`` and ``end`` bit by
      bit, -0.0, inf and NaN included, for a traced ``alpha`` as well.
    - Leaves that are no floating-point numbers (counters, keys) are those of
      ``end`` for every ``alpha``.

  Computed in float32 where leaves are narrower, and cast back. The published
  curve has 0, 0.1, ..., 1, and 0.5 is its untuned value. State of an optimizer
  is not to be interpolated, and normalisation statistics are to be measured
  again.

  Args:
    start: :math:`\theta_0`, the model before fine-tuning.
    end: :math:`\theta_1`, fine-tuned from it; the same structure, shapes and
      dtypes.
    alpha: a number in [0, 1], may be traced.
    extrapolate: allow any finite ``alpha``.

  Raises:
    ValueError: naming the path of the first leaf that ``start`` and ``end`` do
      not share, or ``alpha``; of a traced one the value is not looked at.

  References:
    `Wortsman et al. (2021) <https://arxiv.org/abs/2109.01903>`_
  """
  _check_alpha(alpha, extrapolate)
  _check_alike(start, end)
  traced = isinstance(alpha, jax.core.Tracer)
  alpha = alpha if traced else float(alpha)

  def between(first, last):
    if not _floating(last) or (not traced and alpha == 1):
      return last
    if not traced and alpha == 0:
      return first
    first, last = jnp.asarray(first), jnp.asarray(last)
    wide = last.dtype if last.dtype.itemsize >= 4 else jnp.float32
    # Not first + alpha (last - first), which misses last at 1.
    weight = jnp.asarray(alpha, jnp.finfo(wide).dtype)
    mixed = (1 - weight) * first.astype(wide) + weight * last.astype(wide)
    mixed = mixed.astype(last.dtype)
    if not traced:
      return mixed
    # 1 * -0.0 + 0 * x loses the sign, and 0 * inf is NaN.
    mixed = jnp.where(alpha == 1, last, mixed)
    return jnp.where(alpha == 0, first, mixed)

  return jax.tree.map(between, start, end)


def _floating(leaf) -> bool:
  dtype = getattr(leaf, "dtype", None)
  if dtype is None:
    return isinstance(leaf, (float, complex))
  return jnp.issubdtype(dtype, jnp.inexact)


def _check_alpha(alpha, extrapolate: bool) -> None:
  if not isinstance(alpha, numbers.Real) and not hasattr(alpha, "dtype"):
    raise ValueError(f"alpha must be a number, got {alpha!r}.")
  if jnp.ndim(alpha):
    raise ValueError(
      f"alpha must be one number, got the shape {jnp.shape(alpha)}; vmap over "
      "it for several."
    )
  if isinstance(alpha, jax.core.Tracer):
    return
  if not extrapolate:
    _validate.in_unit_interval(alpha=alpha)
  elif not math.isfinite(alpha):
    raise ValueError(f"alpha must be finite, got {alpha}.")


def _check_alike(start: PyTree, end: PyTree) -> None:
  """ValueError naming the first leaf that two trees do not share."""
  first, last = (
    {
      jax.tree_util.keystr(path, simple=True, separator="/"): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in (start, end)
  )
  for path in [*first, *last]:
    if path not in first or path not in last:
      lacks = "start" if path not in first else "end"
      raise ValueError(f"{lacks} has no leaf {path!r}, the other tree has.")
    shapes = jnp.shape(first[path]), jnp.shape(last[path])
    if shapes[0] != shapes[1]:
      raise ValueError(
        f"start and end must have the same shape at {path!r}, got {shapes[0]} "
        f"and {shapes[1]}."
      )
    dtypes = [str(getattr(tree[path], "dtype", "")) for tree in (first, last)]
    if dtypes[0] != dtypes[1]:
      raise ValueError(
        f"start and end must have the same dtype at {path!r}, got "
        f"{dtypes[0] or 'no array'} and {dtypes[1] or 'no array'}."
      )
  structures = jax.tree.structure(start), jax.tree.structure(end)
  if structures[0] != structures[1]:
    raise ValueError(
      f"start and end must have the same structure, got {structures[0]} and "
      f"{structures[1]}."
    )
