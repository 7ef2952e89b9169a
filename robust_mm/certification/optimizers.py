"""The optimiser of the published step 2."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from robust_mm import _validate


def published_optimizer(
  *, steps_per_epoch: int | None = None
) -> optax.GradientTransformation:
  """SGD of the article: 3e-5, momentum 0.9, weight decay 1e-2.

  Args:
    steps_per_epoch: updates after which the momentum starts anew, as the
      article's does every epoch; None for never.
  """
  tx = optax.chain(
    optax.add_decayed_weights(1e-2), optax.sgd(3e-5, momentum=0.9)
  )
  if steps_per_epoch is None:
    return tx
  _validate.at_least(1, steps_per_epoch=steps_per_epoch)
  return _restarted(tx, steps_per_epoch)


class _RestartedState(NamedTuple):
  """Updates since the start, and the state of what is restarted."""

  count: Array
  inner: optax.OptState


def _restarted(
  tx: optax.GradientTransformation, every: int
) -> optax.GradientTransformationExtraArgs:
  """``tx`` with the state of its first update at every ``every``-th one."""
  tx = optax.with_extra_args_support(tx)

  def init_fn(params):
    return _RestartedState(jnp.zeros((), jnp.int32), tx.init(params))

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError("published_optimizer needs params in update().")
    first = state.count % every == 0
    inner = jax.tree.map(
      lambda new, old: jnp.where(first, new, old),
      tx.init(params),
      state.inner,
    )
    updates, inner = tx.update(updates, inner, params, **extra_args)
    return updates, _RestartedState(state.count + 1, inner)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
