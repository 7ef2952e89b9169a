"""The outer loop: meta-parameters that take a step when it is certified."""

import functools
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from jaxtyping import Int
from jaxtyping import PRNGKeyArray
from jaxtyping import PyTree

from robust_mm import _validate
from robust_mm import linalg
from robust_mm.hypergrad import door
from robust_mm.hypergrad import engine


class OuterState(NamedTuple):
  """A plain pytree, to be checkpointed with the rest.

  Attributes:
    phi: the meta-parameters.
    opt_state: of ``tx``.
    spectrum: cached ends of the spectrum of H.
    bounds_age: steps since they were computed.
    num_accepted: steps that were taken.
    num_rejected: steps that were skipped.
  """

  phi: PyTree
  opt_state: Any
  spectrum: linalg.SpectralBounds
  bounds_age: Int[Array, ""]
  num_accepted: Int[Array, ""]
  num_rejected: Int[Array, ""]


class OuterStep(NamedTuple):
  """Two pure functions.

  Attributes:
    init: ``init(phi) -> OuterState``.
    update: ``update(state, theta, inner_batch=None, outer_batch=None, *, key)
      -> (OuterState, HypergradientInfo)``.
  """

  init: Callable
  update: Callable


def outer_step(
  hypergradient_fn: door.Hypergradient,
  tx: optax.GradientTransformation,
  *,
  step_clip: float | None = 0.1,
  refresh_every: int = 1,
) -> OuterStep:
  """One step on the meta-parameters, or none where it is not accepted.

  A step that ``info.accepted`` denies changes neither phi nor the state of the
  optimizer and is counted, whatever ``on_reject``; ``acceptance=None`` takes
  all that are finite. Meant for meta-parameters in log-space with
  ``optax.adam(0.05)``.

  >>> inner = lambda theta, phi: 0.5 * ((theta - phi) ** 2).sum()
  >>> outer = lambda theta, phi: (theta**2).sum()
  >>> step = outer_step(hypergradient(inner, outer), optax.adam(0.05))
  >>> state = step.init(jnp.array([1.0]))
  >>> update = jax.jit(step.update)
  >>> state, info = update(state, state.phi, key=jax.random.key(0))
  >>> round(float(state.phi[0]), 3), int(state.num_accepted)
  (0.95, 1)

  Args:
    hypergradient_fn: from :func:`hypergradient`.
    tx: updates phi.
    step_clip: no coordinate moves by more in one step; None: no limit.
    refresh_every: steps between two measurements of the ends of the spectrum.
      With more than 1 the probability of the bounds is no longer known in
      between (``info.failure_probability`` is 1); what a solve observes can
      still refute them, and then they are measured again in the next step.

  Raises:
    ValueError: naming the argument.
  """
  if step_clip is not None:
    _validate.positive(step_clip=step_clip)
  _validate.at_least(1, refresh_every=refresh_every)
  if refresh_every > 1 and hypergradient_fn.bounds is None:
    raise ValueError("refresh_every must be 1 without bounds.")

  return OuterStep(
    init=functools.partial(_init, tx, refresh_every),
    update=functools.partial(
      _update, hypergradient_fn, tx, step_clip, refresh_every
    ),
  )


def _init(tx, refresh_every, phi: PyTree) -> OuterState:
  phi = jax.tree.map(jnp.asarray, phi)
  nothing = jnp.zeros((), jnp.result_type(float))
  zero = jnp.zeros((), jnp.int32)
  return OuterState(
    phi=phi,
    opt_state=tx.init(phi),
    spectrum=linalg.SpectralBounds(*[nothing] * 5),
    bounds_age=jnp.full_like(zero, refresh_every),
    num_accepted=zero,
    num_rejected=zero,
  )


def _update(
  hypergradient_fn,
  tx,
  step_clip,
  refresh_every,
  state: OuterState,
  theta: PyTree,
  inner_batch: Any = None,
  outer_batch: Any = None,
  *,
  key: PRNGKeyArray,
) -> tuple[OuterState, engine.HypergradientInfo]:
  bounds_key, key = jax.random.split(key)
  spectrum, age, spent = None, jnp.zeros((), jnp.int32), 0
  if refresh_every > 1:
    due = state.bounds_age >= refresh_every

    def measure():
      found = hypergradient_fn.spectral_bounds(
        theta, state.phi, inner_batch, key=bounds_key
      )
      return jax.tree.map(lambda a, b: a.astype(b.dtype), found, state.spectrum)

    spectrum = jax.lax.cond(due, measure, lambda: state.spectrum)
    spent = jnp.where(due, hypergradient_fn.bounds.num_matvecs(theta), 0)
    age = jnp.where(due, 0, state.bounds_age)
  gradient, info = hypergradient_fn(
    theta,
    state.phi,
    inner_batch,
    outer_batch,
    key=key,
    spectrum=spectrum,
    bounds_age=age,
  )
  phi, opt_state = _step(tx, step_clip, gradient, state, info.accepted)
  taken = info.accepted.astype(jnp.int32)
  return OuterState(
    phi=phi,
    opt_state=opt_state,
    spectrum=state.spectrum if spectrum is None else spectrum,
    # Refuted bounds are not kept.
    bounds_age=jnp.where(info.certified, age + 1, refresh_every),
    num_accepted=state.num_accepted + taken,
    num_rejected=state.num_rejected + 1 - taken,
  ), info._replace(num_matvecs=info.num_matvecs + spent)


def _step(tx, step_clip, gradient, state, accepted):
  updates, opt_state = tx.update(gradient, state.opt_state, state.phi)
  if step_clip is not None:
    updates = jax.tree.map(
      lambda u: jnp.clip(u, -step_clip, step_clip), updates
    )
  phi = optax.apply_updates(state.phi, updates)
  return jax.tree.map(
    lambda new, old: jnp.where(accepted, new, old),
    (phi, opt_state),
    (state.phi, state.opt_state),
  )
