"""Averages of parameters along training, on pytrees."""

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
