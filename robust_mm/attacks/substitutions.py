"""Attacks on text: other tokens in a few places of a sequence of ids."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from robust_mm import _validate


def substitute(
  loss_fn: Callable[..., Any],
  ids: Any,
  table: Any,
  *,
  editable: Any,
  allowed: Any = None,
  num_substitutions: int = 1,
  num_candidates: int = 16,
) -> Any:
  r"""Greedy substitution of tokens: ranked to first order, then tried.

  One place after the other. The gain of token v at place i is first guessed as

  .. math:: \langle \nabla_{e_i} L,\ E_v - e_i \rangle,

  the best guesses are computed exactly, and the best of these is taken where it
  raises the loss.

  Formal guarantees:
    - At most ``num_substitutions`` ids of an example change, editable ones, and
      only to allowed tokens.
    - The loss of no example falls.

  >>> table = jnp.eye(3)
  >>> loss_fn = lambda e: jnp.sum(e * jnp.array([0.0, 1.0, 5.0]), (1, 2))
  >>> substitute(loss_fn, jnp.array([[0, 1]]), table,
  ...            editable=jnp.array([[True, True]]), num_candidates=2).tolist()
  [[2, 1]]

  Args:
    loss_fn: ``embedded [b, t, d] -> [b]``, to be made large; of one example it
      must not depend on others.
    ids: int ``[b, t]``.
    table: ``[V, d]``, the embedding of every token.
    editable: ``bool[b, t]``.
    allowed: ``bool[V]``, what may be put in; None for all.
    num_substitutions: r.
    num_candidates: tried exactly in every round.

  Returns:
    int ``[b, t]``.

  Raises:
    ValueError: a bad number or shape.
  """
  _validate.at_least(
    1, num_substitutions=num_substitutions, num_candidates=num_candidates
  )
  ids, table = jnp.asarray(ids), jnp.asarray(table)
  editable = jnp.asarray(editable)
  if editable.shape != ids.shape or editable.dtype != bool:
    raise ValueError(
      f"editable must be bool of shape {ids.shape}, got "
      f"{editable.dtype}{list(editable.shape)}."
    )
  size, length = ids.shape
  number = table.shape[0]
  if allowed is None:
    allowed = jnp.ones(number, bool)
  tried = min(num_candidates, length * number)

  def embedded(ids):
    return jnp.take(table, ids, axis=0)

  def replaced(ids, candidate):
    place, token = candidate // number, candidate % number
    here = jax.nn.one_hot(place, length, dtype=bool)
    return jnp.where(here, token[:, None].astype(ids.dtype), ids)

  def one_round(carry, _):
    ids, editable, loss = carry
    letters = embedded(ids)
    slope = jax.grad(lambda e: jnp.sum(loss_fn(e)))(letters)
    gain = jnp.einsum("btd,vd->btv", slope, table)
    gain = gain - jnp.sum(slope * letters, axis=-1, keepdims=True)
    own = jax.nn.one_hot(ids, number, dtype=bool)
    free = editable[..., None] & allowed[None, None] & ~own
    gain = jnp.where(free, gain, -jnp.inf)
    guessed, candidates = jax.lax.top_k(jnp.reshape(gain, (size, -1)), tried)

    def exactly(candidate):
      return loss_fn(embedded(replaced(ids, candidate)))

    found = jax.lax.map(exactly, candidates.T)
    found = jnp.where(jnp.isfinite(guessed.T), found, -jnp.inf)
    best = jnp.argmax(found, axis=0)
    chosen = jnp.take_along_axis(candidates.T, best[None], axis=0)[0]
    reached = jnp.max(found, axis=0)
    better = reached > loss
    moved = jnp.where(better[:, None], replaced(ids, chosen), ids)
    # A place is changed once, so that no more than r differ.
    editable = editable & (moved == ids)
    return (moved, editable, jnp.where(better, reached, loss)), None

  begin = (ids, editable, loss_fn(embedded(ids)))
  (ids, _, _), _ = jax.lax.scan(one_round, begin, length=num_substitutions)
  return ids
