"""The published procedure and its random control, kept as they are.

AdamW on uniform noise, stopped at the first minibatch that changes little
enough. One minibatch is an optimistic judge, the size follows from the start
and the step budget rather than from eps, and noise is not mean-free: the
result says what was reached on items that it has not seen.
"""

import functools
import math
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm.nullspace import criteria
from robust_mm.nullspace import solver
from robust_mm.nullspace.criteria import Items

OBJECTIVES = ("logit_l2", "logit_sq")
_SHRINK = 0.8
_MOST_SHRINKS = 60  # 0.8 ** 60 is 1.5e-6


class Descent(NamedTuple):
  """What :func:`descend` ends with; arrays.

  Attributes:
    noise: ``[N, d]``.
    reached: whether a minibatch was below eps.
    num_steps: updates.
    criteria: ``[steps]``, of the minibatches seen; NaN after the end.
  """

  noise: Any
  reached: Any
  num_steps: Any
  criteria: Any


def published_noise(
  encode: Callable[..., Any],
  params: Any,
  tokens: Any,
  *,
  eps: float = 0.03,
  limit: float = 3.0,
  lr: float = 0.1,
  weight_decay: float = 0.01,
  num_passes: int = 3,
  share: float = 0.1,
  batch_size: int = 128,
  objective: str = "logit_l2",
  report: Any = None,
  key: PRNGKeyArray,
) -> solver.NoiseResult:
  r"""Noise as published: uniform, descended by AdamW, stopped early.

  ``status`` is ``early_stopped`` or ``not_reached``; ``converged`` is False
  either way, and ``criterion`` is that of ``report``.

  Args:
    encode: ``encode(params, tokens) -> logits [n, k]``, in evaluation mode.
    params: pytree; constants.
    tokens: ``[n, N, d]``, the training set: a pass over it would be ``n //
      batch_size`` steps.
    eps: .03, or .01 in the other of the two released codes.
    limit: noise begins uniform in (-limit, limit).
    lr: of AdamW; a cosine to 0 over ``num_passes`` whole passes.
    weight_decay: *of the noise*.
    num_passes: passes.
    share: of the minibatches that each pass takes, so that the rate hardly
      falls.
    batch_size: of a step.
    objective: ``logit_l2`` or ``logit_sq``, one in each released code.
    report: tokens to score on; those of ``tokens`` by default, and then the
      criterion is of items that were trained on.
    key: typed.

  Raises:
    ValueError: naming the argument that is wrong.

  References:
    `Liu et al. (2024) <https://arxiv.org/abs/2403.10476>`_, and their code.
  """
  solver.check_tokens(tokens=tokens)
  _validate.at_least(1, batch_size=batch_size, num_passes=num_passes)
  if not 0 < share <= 1:
    raise ValueError(f"share must lie in (0, 1], got {share}.")
  if report is not None:
    solver.check_tokens(report=report)
    if report.shape[1:] != tokens.shape[1:]:
      raise ValueError(
        f"report must have items like those of tokens {tokens.shape[1:]}, got "
        f"{report.shape[1:]}."
      )
  if len(tokens) < batch_size:
    raise ValueError(
      f"batch_size must not exceed the {len(tokens)} items of tokens, got "
      f"{batch_size}."
    )
  loader = len(tokens) // batch_size
  settings = Settings(
    eps=eps,
    limit=limit,
    lr=lr,
    weight_decay=weight_decay,
    num_passes=num_passes,
    batches=max(1, round(share * loader)),
    batch_size=batch_size,
    schedule_steps=num_passes * loader,
    objective=objective,
  )
  found = _descend(encode, settings, params, Items(tokens=tokens), key)
  steps = min(int(found.num_steps) + 1, settings.num_steps)
  return solver.published_result(
    encode,
    params,
    tokens if report is None else report,
    found.noise,
    eps=eps,
    reached=bool(found.reached),
    history={"criterion": np.asarray(found.criteria)[:steps].tolist()},
  )


class Settings(NamedTuple):
  """Of :func:`descend`; see :func:`published_noise`."""

  eps: float = 0.03
  limit: float = 3.0
  lr: float = 0.1
  weight_decay: float = 0.01
  num_passes: int = 3
  batches: int = 8
  batch_size: int = 128
  schedule_steps: int = 240
  objective: str = "logit_l2"

  @property
  def num_steps(self) -> int:
    """The most updates."""
    return self.num_passes * self.batches

  def check(self) -> None:
    """ValueError naming what is wrong."""
    _validate.positive(eps=self.eps, limit=self.limit, lr=self.lr)
    _validate.non_negative(weight_decay=self.weight_decay)
    _validate.one_of(OBJECTIVES, objective=self.objective)


def optimizer(settings: Settings) -> optax.GradientTransformation:
  """AdamW on the noise, its rate along the cosine."""
  schedule = optax.cosine_decay_schedule(settings.lr, settings.schedule_steps)
  return optax.adamw(schedule, weight_decay=settings.weight_decay)


def descend(
  encode: Callable, params: Any, items: Items, settings: Settings, key: Any
) -> Descent:
  """The published procedure as one pure function.

  Every pass draws its minibatches without replacement, from the items that
  count. Without any nothing is reached.
  """
  settings.check()
  params = jax.lax.stop_gradient(params)
  start_key, order_key = jax.random.split(key)
  tx = optimizer(settings)
  shape = items.tokens.shape[1:]
  noise = jax.random.uniform(
    start_key, shape, minval=-settings.limit, maxval=settings.limit
  )
  needed = settings.batches * settings.batch_size
  weights = items.weights
  count = jnp.sum(weights > 0)

  def rows_of_pass(number):
    order = jax.random.permutation(
      jax.random.fold_in(order_key, number), len(items)
    )
    order = order[jnp.argsort(weights[order] <= 0)]  # stable: they come first
    # A pool smaller than a pass is gone through again.
    order = order[jnp.arange(needed) % jnp.maximum(count, 1)]
    return jnp.reshape(order, (settings.batches, settings.batch_size))

  rows = jax.vmap(rows_of_pass)(jnp.arange(settings.num_passes))
  rows = jnp.reshape(rows, (settings.num_steps, settings.batch_size))

  def loss_fn(noise, batch):
    clean = criteria.logits(encode, params, batch)
    noisy = criteria.logits(encode, params, batch, noise)
    loss = batch.mean(criteria.change(clean, noisy, settings.objective))
    return loss, batch.mean(criteria.change(clean, noisy, "criterion"))

  def cond(carry):
    _, _, step, reached, _ = carry
    return (step < settings.num_steps) & ~reached

  def body(carry):
    noise, opt_state, step, _, seen = carry
    batch = items.take(rows[step])
    grad, criterion = jax.grad(loss_fn, has_aux=True)(noise, batch)
    reached = (criterion < settings.eps) & (count > 0)
    updates, moved = tx.update(grad, opt_state, noise)

    def keep(new, old):
      return jnp.where(reached, old, new)

    noise = keep(noise + updates, noise)
    opt_state = jax.tree.map(keep, moved, opt_state)
    seen = seen.at[step].set(criterion)
    return noise, opt_state, step + ~reached, reached, seen

  seen = jnp.full(settings.num_steps, jnp.nan, jnp.float32)
  start = (noise, tx.init(noise), jnp.int32(0), jnp.asarray(False), seen)
  noise, _, step, reached, seen = jax.lax.while_loop(cond, body, start)
  return Descent(noise, reached, step, seen)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _descend(encode, settings, params, items, key):
  return descend(encode, params, items, settings, key)


def random_at_criterion(
  encode: Callable[..., Any],
  params: Any,
  items: Items,
  *,
  eps: float,
  key: PRNGKeyArray,
  chunk_size: int = 256,
) -> tuple[jax.Array, jax.Array]:
  """Random noise shrunk until it changes as little: the control of the size.

  Standard normal noise times 0.8 again and again, until the mean
  criterion of ``items`` is at most eps. Pure, jit-able.

  Returns:
    ``(noise [N, d], its mean criterion)``; noise is 0, and the criterion
    infinite, where 60 times were not enough, or no item counts.

  Raises:
    ValueError: ``eps`` not positive.
  """
  _validate.positive(eps=eps)
  clean = criteria.in_chunks(encode, params, items, None, chunk_size)

  def criterion(noise):
    noisy = criteria.in_chunks(encode, params, items, noise, chunk_size)
    return items.mean(criteria.change(clean, noisy, "criterion"))

  def cond(carry):
    _, found, number = carry
    # NaN is above every eps.
    return ~(found <= eps) & (number < _MOST_SHRINKS)

  def body(carry):
    noise, _, number = carry
    noise = _SHRINK * noise
    return noise, criterion(noise), number + 1

  start = jax.random.normal(key, items.tokens.shape[1:], jnp.float32)
  noise, found, _ = jax.lax.while_loop(
    cond, body, (start, criterion(start), jnp.int32(0))
  )
  held = (found <= eps) & (jnp.sum(items.weights) > 0)
  return jnp.where(held, noise, 0.0), jnp.where(held, found, math.inf)
