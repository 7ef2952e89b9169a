"""Optimisers of step 2: what both objectives share, and the published one."""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from robust_mm import _validate

POSITIVITIES = ("simplex", "softplus")


class _IntegrationState(NamedTuple):
  """Updates done, the best parameters so far, and what their mean must be."""

  count: Array
  best: Any
  best_value: Array
  mean: Array
  inner: optax.OptState


def integration_optimizer(
  tx: optax.GradientTransformation,
  *,
  num_steps: int,
  positivity: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""``tx`` for integration factors, that ends at the best parameters it saw.

  The last of ``num_steps`` updates goes back to the parameters with the
  smallest loss, so training never ends above its start.

  Args:
    tx: an optimiser.
    num_steps: updates, the one that goes back included.
    positivity: ``"softplus"`` where the parameters are those of
      :math:`a = \mathrm{softplus}(\alpha)` and the mean of a must stay what it
      was: after every update a is rescaled, so that only its direction moves.
      ``"simplex"`` parameters keep it by themselves; None lets it move.

  Returns:
    a transformation whose ``update`` needs ``params`` and ``value``, the loss.
  """
  _validate.at_least(1, num_steps=num_steps)
  _validate.one_of((*POSITIVITIES, None), positivity=positivity)
  tx = optax.with_extra_args_support(tx)
  zero = functools.partial(jnp.zeros, ())

  def init_fn(params):
    return _IntegrationState(
      zero(jnp.int32), params, jnp.asarray(jnp.inf), zero(), tx.init(params)
    )

  def update_fn(updates, state, params=None, *, value, **extra_args):
    if params is None:
      raise ValueError("integration_optimizer needs params in update().")
    better = value < state.best_value
    best = _where(better, params, state.best)
    updates, inner = tx.update(
      updates, state.inner, params, value=value, **extra_args
    )
    following = optax.apply_updates(params, updates)
    mean = state.mean
    if positivity == "softplus":
      mean = jnp.where(state.count == 0, _mean(params), mean)
      following = _with_mean(following, mean)
    last = state.count == num_steps - 1
    updates = jax.tree.map(jnp.subtract, _where(last, best, following), params)
    value = jnp.where(better, value, state.best_value)
    return updates, _IntegrationState(state.count + 1, best, value, mean, inner)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def inverse_softplus(values: Array) -> Array:
  """alpha of positive ``softplus(alpha)``."""
  return values + jnp.log(-jnp.expm1(-values))


def _where(condition, first, second):
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), first, second)


def _mean(alpha):
  factors = jax.tree.map(jax.nn.softplus, alpha)
  return optax.tree.sum(factors) / optax.tree.size(factors)


def _with_mean(alpha, mean):
  """Parameters of the same direction of factors, with that mean."""
  scale = mean / _mean(alpha)
  # A factor of 0 has no finite parameter.
  return jax.tree.map(
    lambda x: inverse_softplus(
      jnp.maximum(scale * jax.nn.softplus(x), 1e-6 * mean)
    ),
    alpha,
  )


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
