r"""Local Lipschitz constants: how fast rows of the output move inside a ball.

The gradient of ``rows @ output`` is a product of matrices and activation
slopes; over a ball every slope lies in an interval, and interval arithmetic on
the product bounds each partial derivative, hence

.. math:: S_m(\rho) = \sup_{\|\delta\| \le \rho} \|\nabla_{x_m}\|_2 \le
          \sqrt{\textstyle\sum_i \max(|lo_i|, |hi_i|)^2}

The segment between two points of a ball stays inside, so :math:`S_m(\rho)` is a
Lipschitz constant there; at the kinks of a relu the argument is Clarke's.

References:
  `Weng et al. (2018) <https://arxiv.org/abs/1804.09699>`_ (Fast-Lip).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from robust_mm.relaxation import bounds
from robust_mm.relaxation import lines
from robust_mm.relaxation.network import BoundNetwork

_UP = 1e-5  # relative, for rounding


def sensitivity(
  network: BoundNetwork,
  rows: Float[Array, "r ..."],
  boxes: tuple[bounds.Box, ...],
) -> dict[str, Float[Array, " r"]]:
  """Bounds of the l2 norm of the gradient of every row, per input.

  Args:
    network: of the function.
    rows: ``[r, *output_shape]``.
    boxes: from ``bounds.inside``; the bounds hold where the boxes do.

  Returns:
    ``{m: [r]}``.
  """
  graph = network.network
  last = len(graph.nodes)
  pending = {last: (rows, jnp.zeros_like(rows))}
  gradient = {}
  for current in range(last, -1, -1):
    if current not in pending:
      continue
    middle, half = pending.pop(current)
    if current < last:
      node = graph.nodes[current]
      slopes = lines.slope_box(node.kind, node.slopes, *boxes[current])
      middle, half = _times(middle, half, *slopes)
    for kind, name, value in _pull(network, current, middle, half):
      held = gradient if kind == "input" else pending
      old = held.get(name)
      held[name] = value if old is None else jax.tree.map(jnp.add, old, value)
  return {
    name: _largest(*gradient[name])
    if name in gradient
    else jnp.zeros(rows.shape[0], rows.dtype)
    for name in graph.input_ids
  }


def _times(middle, half, low, high):
  """The product of two intervals, as middle and half width."""
  ends = [
    (middle + sign * half) * slope[None]
    for sign in (-1, 1)
    for slope in (low, high)
  ]
  ends = jnp.stack(ends)
  smallest, largest = jnp.min(ends, axis=0), jnp.max(ends, axis=0)
  return (smallest + largest) / 2, (largest - smallest) / 2


def _pull(network, position, middle, half):
  """Interval rows through one affine piece: ``W^T c`` and ``|W|^T r``."""
  graph = network.network
  piece = graph.pieces[position]
  arguments = (
    {name: jnp.zeros(network.shape(name), half.dtype) for name in piece.inputs},
    {p: jnp.zeros(graph.nodes[p].shape, half.dtype) for p in piece.parents},
  )
  _, pull = jax.vjp(network.piece(position), *arguments)
  _, pull_size = jax.vjp(network.piece(position, absolute=True), *arguments)
  middles, halves = jax.vmap(pull)(middle), jax.vmap(pull_size)(half)
  for kind, found, width in zip(("input", "node"), middles, halves):
    for name in found:
      yield kind, name, (found[name], width[name])


def _largest(middle, half):
  size = jnp.abs(middle) + half
  size = jnp.reshape(size, (size.shape[0], -1))
  return jnp.sqrt(jnp.sum(jnp.square(size), axis=-1)) * (1 + _UP)
