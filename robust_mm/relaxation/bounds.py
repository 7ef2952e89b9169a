r"""Bounds of a network's variables while its inputs move inside a ball.

The linear relaxation (CROWN): a linear function of the output is followed back
through the network; at an activation each coefficient takes the line, below or
above, that its sign asks for, so that what arrives at the inputs bounds the
function from below and is affine:

.. math:: \min_{x \in B} \Lambda f(x) \ge \min_{x \in B} A x + c
          = A x_0 + c - \sup_{\delta} |A \delta|

References:
  `Zhang et al. (2018) <https://arxiv.org/abs/1811.00866>`_; `Weng et al.
  (2018) <https://arxiv.org/abs/1804.09699>`_ for the local constants.
"""

import dataclasses
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from robust_mm.relaxation import lines
from robust_mm.relaxation.network import BoundNetwork

METHODS = ("crown", "interval", "both")
_ROUNDING = 32.0  # machine epsilons of the size of the terms of a bound
_CHUNK = 256  # rows followed back at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ball:
  r"""Where the inputs of one example may go.

  Attributes:
    center: ``{m: [...]}``.
    radius: ``[]``.
    sizes: ``{m: []}``; modality m moves by at most :math:`\epsilon_m =
      radius \cdot sizes_m`, 0 for one that stays.
    joint: :math:`\sum_m (\|\delta_m\| / sizes_m)^2 \le radius^2`; else each
      :math:`\|\delta_m\| \le radius \cdot sizes_m`.
    norm: ``((m, "l2" | "linf" | "l1"), ...)``.
    lean: which of its two slopes a piecewise line is bounded by on its
      convex side: the second where ``lean * high > -low``. Bounds are sound for
      any, and jump where it decides otherwise.
  """

  center: Any
  radius: Any
  sizes: Any
  lean: Any = 1.0
  joint: bool = dataclasses.field(default=True, metadata={"static": True})
  norm: tuple = dataclasses.field(default=(), metadata={"static": True})


class Box(NamedTuple):
  """Bounds of the variable an activation reads."""

  low: Array
  high: Array


class Back(NamedTuple):
  """A function of the inputs below a linear one of a variable.

  Attributes:
    slopes: ``{m: [r, ...]}`` coefficients.
    shift: ``[r]``.
    size: ``[r]`` what the rounding of the shift is relative to.
  """

  slopes: Any
  shift: Array
  size: Array


def lower(
  network: BoundNetwork,
  ball: Ball,
  rows: Float[Array, "r ..."],
  *,
  intermediate: str = "both",
  boxes: tuple[Box, ...] | None = None,
) -> Float[Array, " r"]:
  r"""Lower bounds of ``rows @ output`` over a ball, for one example.

  Formal guarantees:
    - Sound for every ball, with a slack for rounding proportional to the size
      of the terms; it is affine functions exactly (less the slack).

  Args:
    network: of the function.
    ball: around one example.
    rows: ``[r, *output_shape]``.
    intermediate: how the inside is bounded: "crown", "interval", or "both",
      the intersection.
    boxes: of ``inside``, if they are known already.

  Returns:
    ``[r]``.
  """
  if boxes is None:
    boxes = inside(network, ball, intermediate=intermediate)
  position = len(network.network.nodes)
  return _minimum(_back(network, position, rows, boxes, ball.lean), ball)


def inside(
  network: BoundNetwork, ball: Ball, *, intermediate: str = "both"
) -> tuple[Box, ...]:
  """Bounds of what every activation reads, in order."""
  boxes = ()
  for position, node in enumerate(network.network.nodes):
    found = []
    direct = not network.network.pieces[position].parents
    if intermediate != "interval" or direct:
      found.append(_box_by_rows(network, position, boxes, ball))
    if intermediate != "crown" and not direct:
      found.append(_box_by_interval(network, position, boxes, ball))
    low = jnp.max(jnp.stack([b.low for b in found]), axis=0)
    high = jnp.min(jnp.stack([b.high for b in found]), axis=0)
    # Rounding may cross the ends of a point.
    boxes += (Box(jnp.minimum(low, high), jnp.maximum(low, high)),)
    del node
  return boxes


def _box_by_rows(network, position, boxes, ball) -> Box:
  shape = network.network.nodes[position].shape
  count = math.prod(shape)

  def ends(indices):
    # An index past the end is a row of zeros.
    rows = jax.nn.one_hot(indices, count, dtype=ball.radius.dtype)
    rows = jnp.reshape(rows, (-1, *shape))
    both = jnp.concatenate([rows, -rows])
    return _minimum(_back(network, position, both, boxes, ball.lean), ball)

  if count <= _CHUNK:
    # All at once: a loop of one turn would keep what does not depend on the
    # example from being computed once for all of them.
    low, high = jnp.split(ends(jnp.arange(count)), 2)
  else:
    size = -(-count // -(-count // _CHUNK))
    indices = jnp.arange(-(-count // size) * size)
    found = jax.lax.map(ends, jnp.reshape(indices, (-1, size)))
    found = jnp.moveaxis(jnp.reshape(found, (-1, 2, size)), 1, 0)
    low, high = jnp.reshape(found, (2, -1))[:, :count]
  return Box(jnp.reshape(low, shape), jnp.reshape(-high, shape))


def _box_by_interval(network, position, boxes, ball) -> Box:
  """From the boxes of the activations before it; inputs as boxes as well."""
  nodes = network.network.nodes
  ranges = [lines.box(n.kind, n.slopes, *box) for n, box in zip(nodes, boxes)]
  middle = [(low + high) / 2 for low, high in ranges]
  half = [(high - low) / 2 for low, high in ranges]
  reach = {
    name: jnp.full_like(x, ball.radius * ball.sizes[name])
    for name, x in ball.center.items()
  }
  centre = network.piece(position)(ball.center, middle)
  spread = network.piece(position, absolute=True)(reach, half)
  size = network.piece(position, absolute=True)(
    jax.tree.map(jnp.abs, ball.center), [abs(m) for m in middle]
  )
  slack = _slack(abs(centre) + size + spread)
  return Box(centre - spread - slack, centre + spread + slack)


def _back(network: BoundNetwork, position: int, rows, boxes, lean) -> Back:
  """Follows ``rows`` of what ``position`` reads back to the inputs."""
  graph = network.network
  slopes = {name: 0.0 for name in graph.input_ids}
  shift = jnp.zeros(rows.shape[0], rows.dtype)
  size = jnp.zeros_like(shift)
  pending = {position: rows}
  for current in range(position, -1, -1):
    if current not in pending:
      continue
    coefficients = pending.pop(current)
    if current < position:
      node = graph.nodes[current]
      drawn = lines.of(node.kind, node.slopes, *boxes[current], lean)
      coefficients, moved = _through(coefficients, drawn)
      shift, size = shift + moved[0], size + moved[1]
    to_inputs, to_nodes, moved = _transpose(network, current, coefficients)
    shift, size = shift + moved[0], size + moved[1]
    for name, value in to_inputs.items():
      slopes[name] = slopes[name] + value
    for parent, value in to_nodes.items():
      pending[parent] = pending.get(parent, 0.0) + value
  return Back(slopes, shift, size)


def _through(coefficients, drawn: lines.Lines):
  """One activation: the line below where positive, above where negative."""
  rows = coefficients.shape[:1]
  positive = jnp.maximum(coefficients, 0)
  negative = coefficients - positive
  # One term is 0, and the other is what it was.
  result = (
    positive * drawn.lower_slope[None] + negative * drawn.upper_slope[None]
  )
  shift = size = jnp.zeros(rows, coefficients.dtype)
  if drawn.lower_shift is not None:
    shift = shift + _dot(positive, drawn.lower_shift)
    size = size + _dot(positive, abs(drawn.lower_shift))
  if drawn.upper_shift is not None:
    shift = shift + _dot(negative, drawn.upper_shift)
    size = size - _dot(negative, abs(drawn.upper_shift))
  return result, (shift, size)


def _transpose(network: BoundNetwork, position: int, rows):
  """Rows through one affine piece, to what it reads, and its constant."""
  graph = network.network
  piece = graph.pieces[position]
  function = network.piece(position)
  inputs = {
    name: jnp.zeros(network.shape(name), rows.dtype) for name in piece.inputs
  }
  acts = {p: jnp.zeros(graph.nodes[p].shape, rows.dtype) for p in piece.parents}
  constant, pull = jax.vjp(function, inputs, acts)
  to_inputs, to_nodes = jax.vmap(pull)(rows)
  moved = _dot(rows, constant), _dot(abs(rows), abs(constant))
  return to_inputs, to_nodes, moved


def _minimum(back: Back, ball: Ball) -> Array:
  """The smallest value over the ball, less the slack for rounding."""
  norms = dict(ball.norm)
  value, size = back.shift, back.size
  costs = []
  for name, centre in ball.center.items():
    slope = back.slopes[name]
    if isinstance(slope, float):
      continue
    value = value + _dot(slope, centre)
    size = size + _dot(abs(slope), abs(centre))
    dual = _dual(slope, norms.get(name, "l2"))
    costs.append(dual * ball.sizes[name])
  if not costs:
    return value - _slack(size)
  costs = jnp.stack(costs)
  cost = jnp.sum(costs, axis=0)
  if ball.joint:
    cost = _length(costs, axis=0)
  cost = cost * ball.radius
  return value - cost - _slack(size + cost)


def _dual(slope, norm):
  flat = jnp.reshape(slope, (slope.shape[0], -1))
  if norm == "linf":
    return jnp.sum(jnp.abs(flat), axis=-1)
  if norm == "l1":
    return jnp.max(jnp.abs(flat), axis=-1)
  return _length(flat, axis=1)


def _length(values, axis):
  """l2 norms; small entries do not vanish when they are squared."""
  peak = jnp.max(jnp.abs(values), axis=axis, keepdims=True)
  scaled = values / jnp.where(peak > 0, peak, 1)
  total = jnp.sum(jnp.square(scaled), axis=axis)
  endless = jnp.squeeze(~jnp.isfinite(peak), axis)
  return jnp.where(endless, jnp.inf, jnp.squeeze(peak, axis) * jnp.sqrt(total))


def _dot(rows, values):
  """``[r, ...]`` with ``[...]``: products, which are faster than sums."""
  flat = jnp.reshape(rows, (rows.shape[0], -1))
  return jnp.matmul(flat, jnp.reshape(values, -1), precision="highest")


def _slack(size):
  """What rounding may cost: of terms of that size, and of ones that vanish."""
  numbers = jnp.finfo(size.dtype)
  return _ROUNDING * (float(numbers.eps) * size + float(numbers.tiny))
