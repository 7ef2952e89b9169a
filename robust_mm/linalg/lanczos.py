r"""Lanczos iteration on pytrees, and proven ends of a spectrum.

Ritz values lie inside the spectrum: the largest is a *lower* bound of the
largest eigenvalue. From a start that is uniform on the sphere they are, with a
probability that is known, also not far inside.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import PRNGKeyArray
from jaxtyping import PyTree

from robust_mm import _validate
from robust_mm.linalg import trees

# beta below this times the largest |alpha| is a breakdown.
_BREAKDOWN = 1e-6
_MAX_STEPS = 100_000


class Ritz(NamedTuple):
  """Approximate eigenvalues of a symmetric map.

  Attributes:
    values: ascending.
    residuals: an eigenvalue lies within this of each value; inf for the
      values that fill up an iteration which ended early.
  """

  values: Float[Array, " n"]
  residuals: Float[Array, " n"]


class SpectralBounds(NamedTuple):
  """An interval with a whole spectrum in it, with a probability.

  Attributes:
    lower: at most the smallest eigenvalue.
    upper: at least the largest eigenvalue.
    smallest: the smallest Ritz value, at least the smallest eigenvalue.
    largest: the largest Ritz value, at most the largest eigenvalue.
    failure_probability: over the start vector, in exact arithmetic.
  """

  lower: Float[Array, ""]
  upper: Float[Array, ""]
  smallest: Float[Array, ""]
  largest: Float[Array, ""]
  failure_probability: Float[Array, ""]


def lanczos(
  matvec: Callable[[PyTree], PyTree],
  like: PyTree,
  key: PRNGKeyArray,
  *,
  num_steps: int,
  reorthogonalize: bool = True,
) -> Ritz:
  """Ritz values of a symmetric map after ``num_steps`` products.

  >>> A = jnp.diag(jnp.array([3.0, 1.0, -2.0]))
  >>> key = jax.random.key(0)
  >>> ritz = lanczos(lambda x: A @ x, jnp.zeros(3), key, num_steps=3)
  >>> [round(float(value), 3) for value in ritz.values]
  [-2.0, 1.0, 3.0]

  Args:
    matvec: symmetric, on pytrees like ``like`` in float32 (float64).
    like: gives structure, shapes and shardings; its values do not matter.
    key: of the start, one Gaussian over all leaves.
    num_steps: products; the number of scalars of ``like`` at most.
    reorthogonalize: keep the basis (``num_steps`` copies) and orthogonalise
      against it twice in every step; False keeps two vectors.

  Returns:
    ``min(num_steps, size)`` values.
  """
  labels = jax.tree.map(lambda _: "", like)
  return block_lanczos(
    matvec,
    like,
    labels,
    key,
    num_steps=num_steps,
    reorthogonalize=reorthogonalize,
  )[""]


def block_lanczos(
  matvec: Callable[[PyTree], PyTree],
  like: PyTree,
  labels: PyTree,
  key: PRNGKeyArray,
  *,
  num_steps: int,
  reorthogonalize: bool = True,
) -> dict[str, Ritz]:
  """Ritz values of every diagonal block of a block-diagonal map, in one loop.

  Inner products and norms by block make the one iteration as many independent
  ones. For a map that couples the blocks the result is wrong without a sign of
  it.

  Args:
    matvec: symmetric and block diagonal.
    like: see :func:`lanczos`.
    labels: pytree of str like ``like``: the block of every leaf.
    key: see :func:`lanczos`.
    num_steps: see :func:`lanczos`; at most the size of a block counts for it.
    reorthogonalize: see :func:`lanczos`.

  Returns:
    ``{label: Ritz}``.
  """
  _validate.at_least(1, num_steps=num_steps)
  trees.check_floating(like=like)
  blocks = _Blocks(like, labels)
  steps = min(num_steps, max(blocks.sizes))
  alphas, betas, active = _tridiagonal(
    matvec, blocks, trees.random_normal(key, like), steps, reorthogonalize
  )
  ritz = {}
  for index, name in enumerate(blocks.names):
    count = min(steps, blocks.sizes[index])
    ritz[name] = _ritz(
      alphas[:count, index], betas[:count, index], active[:count, index]
    )
  return ritz


def spectral_bounds(
  matvec: Callable[[PyTree], PyTree],
  like: PyTree,
  key: PRNGKeyArray,
  *,
  num_steps: int = 20,
  failure_probability: float = 1e-3,
  positive: bool = False,
  reorthogonalize: bool = True,
) -> SpectralBounds:
  r"""An interval that holds the spectrum, with probability ``1 - p``.

  With spread :math:`S = \lambda_{max} - \lambda_{min}` and a uniform start on
  the sphere in :math:`R^P`, k products and exact arithmetic,

  .. math:: \Pr(\lambda_{max} - \rho_{max} > \epsilon S) \le
    \sqrt{2P/\pi} / \cosh((2k - 1) \operatorname{artanh} \sqrt\epsilon)

  and the same below. ``error_share`` solves it for :math:`\epsilon`.

  Args:
    matvec, like, key, num_steps, reorthogonalize: see :func:`lanczos`. Without
      reorthogonalisation the probability is a heuristic.
    failure_probability: p, of both ends together (of the upper one with
      ``positive``).
    positive: the map is known to be positive semidefinite.

  Raises:
    ValueError: naming ``num_steps`` when it is too small for the statement.

  References:
    `Kuczynski & Wozniakowski (1992) <https://doi.org/10.1137/0613066>`_.
  """
  share = error_share(
    trees.size(like), num_steps, failure_probability, one_sided=positive
  )
  ritz = lanczos(
    matvec, like, key, num_steps=num_steps, reorthogonalize=reorthogonalize
  )
  return enclose(ritz, share, failure_probability, positive=positive)


def enclose(
  ritz: Ritz,
  share: float,
  failure_probability: float,
  *,
  positive: bool = False,
) -> SpectralBounds:
  """Ritz values moved outwards by the share of the spread that they may lack.

  A margin of 1e-5 of the largest modulus is for the arithmetic.
  """
  smallest, largest = ritz.values[0], ritz.values[-1]
  rounding = 1e-5 * jnp.maximum(jnp.abs(smallest), jnp.abs(largest))
  if positive:
    lower, upper = jnp.zeros_like(largest), largest / (1 - share) + rounding
  else:
    margin = share / (1 - 2 * share) * (largest - smallest) + rounding
    lower, upper = smallest - margin, largest + margin
  return SpectralBounds(
    lower=lower,
    upper=upper,
    smallest=smallest,
    largest=largest,
    failure_probability=jnp.asarray(failure_probability, largest.dtype),
  )


def error_share(
  size: int,
  num_steps: int,
  failure_probability: float,
  *,
  one_sided: bool = False,
) -> float:
  r"""The :math:`\epsilon` of :func:`spectral_bounds`; 0 for a whole basis.

  >>> round(error_share(100_000, 20, 1e-3), 3)
  0.116

  Raises:
    ValueError: where it is not below 1/2 (1 with ``one_sided``), naming
      ``num_steps`` and the smallest value that will do.
  """
  _validate.at_least(1, num_steps=num_steps)
  if not 0 < failure_probability < 1:
    raise ValueError(
      f"failure_probability must be between 0 and 1, got {failure_probability}."
    )
  if num_steps >= size:
    return 0.0
  limit = 1.0 if one_sided else 0.5

  def share(steps: int) -> float:
    one = failure_probability if one_sided else failure_probability / 2
    ratio = max(1.0, math.sqrt(2 * size / math.pi) / one)
    return math.tanh(math.acosh(ratio) / (2 * steps - 1)) ** 2

  # tanh rounds to 1 for few steps: no bound at all.
  found = share(num_steps)
  if found < min(limit, 1 - 1e-6):
    return found
  enough = num_steps
  while share(enough) >= min(limit, 1 - 1e-6) and enough < _MAX_STEPS:
    enough += 1
  raise ValueError(
    f"num_steps must be at least {min(enough, size)} for "
    f"failure_probability={failure_probability} and {size} scalars, "
    f"got {num_steps}."
  )


class _Blocks:
  """Leaves by block: inner products are vectors with an entry a block."""

  def __init__(self, like: PyTree, labels: PyTree):
    leaves, self.structure = jax.tree.flatten(like)
    of_leaf, other = jax.tree.flatten(labels)
    if other != self.structure:
      raise ValueError("labels must have the structure of like.")
    self.names = sorted(set(of_leaf))
    self.index = [self.names.index(name) for name in of_leaf]
    self.sizes = [
      sum(
        math.prod(leaf.shape) for leaf, i in zip(leaves, self.index) if i == j
      )
      for j in range(len(self.names))
    ]

  def gather(self, terms: list) -> Array:
    """Sums of one term a leaf, by block, ``[..., num_blocks]``."""
    totals = [0] * len(self.names)
    for term, index in zip(terms, self.index):
      totals[index] = totals[index] + term
    return jnp.stack(totals, axis=-1)

  def dot(self, left: PyTree, right: PyTree) -> Array:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right))
    return self.gather([jnp.sum(a * b) for a, b in pairs])

  def scale(self, factors: Array, tree: PyTree) -> PyTree:
    leaves = jax.tree.leaves(tree)
    scaled = [
      factors[i].astype(leaf.dtype) * leaf
      for leaf, i in zip(leaves, self.index)
    ]
    return jax.tree.unflatten(self.structure, scaled)

  def project_out(self, basis: PyTree, vector: PyTree) -> PyTree:
    """``vector`` less its parts along ``basis``, ``[steps, ...]`` leaves."""
    rows, leaves = jax.tree.leaves(basis), jax.tree.leaves(vector)
    parts = self.gather([_along(row, leaf) for row, leaf in zip(rows, leaves)])
    left = [
      leaf - _combined(parts[:, i].astype(row.dtype), row)
      for row, leaf, i in zip(rows, leaves, self.index)
    ]
    return jax.tree.unflatten(self.structure, left)


# Products, not sums of products: those take five times as long on a CPU.
def _along(rows: Array, leaf: Array) -> Array:
  """Inner products with ``leaf``, ``[steps]``."""
  axes = tuple(range(leaf.ndim))
  return jax.lax.dot_general(
    rows,
    leaf,
    ((tuple(axis + 1 for axis in axes), axes), ((), ())),
    precision="highest",
    out_sharding=_everywhere(leaf),
  )


def _combined(parts: Array, rows: Array) -> Array:
  contracted = (((0,), (0,)), ((), ()))
  return jax.lax.dot_general(parts, rows, contracted, precision="highest")


def _everywhere(leaf: Array):
  """A vector on every device: for products over axes that are sharded."""
  mesh = jax.typeof(leaf).sharding.mesh
  return None if mesh.empty else jax.sharding.NamedSharding(mesh, jax.P(None))


def _tridiagonal(matvec, blocks, start, num_steps, reorthogonalize):
  """``alphas, betas, active``, each ``[num_steps, num_blocks]``.

  A block is active until its space is exhausted; from then on its vector is 0.
  """
  sizes = jnp.asarray(blocks.sizes)
  length = jnp.sqrt(blocks.dot(start, start))
  first = blocks.scale(1 / length, start)
  basis = ()
  if reorthogonalize:
    empty = jax.tree.map(
      lambda a: jnp.broadcast_to(
        jnp.zeros_like(a)[None], (num_steps, *a.shape)
      ),
      first,
    )
    basis = _with_row(empty, first, 0)

  def step(carry, count):
    current, previous, beta, peak, active, basis = carry
    w = matvec(current)
    w = jax.tree.map(lambda a, b: a - b, w, blocks.scale(beta, previous))
    alpha = blocks.dot(current, w)
    w = jax.tree.map(lambda a, b: a - b, w, blocks.scale(alpha, current))
    if reorthogonalize:
      for _ in range(2):
        w = blocks.project_out(basis, w)
    peak = jnp.maximum(peak, jnp.abs(alpha))
    beta = jnp.sqrt(blocks.dot(w, w))
    goes_on = active & (beta > _BREAKDOWN * peak) & (count + 1 < sizes)
    # Not finite: no verdict may rest on what follows.
    beta = jnp.where(goes_on | ~jnp.isfinite(beta), beta, 0)
    inverse = jnp.where(goes_on, 1 / jnp.where(goes_on, beta, 1), 0)
    following = blocks.scale(inverse, w)
    if reorthogonalize:
      # Written after it was read, so that the loop need not copy the basis;
      # the last one falls on a row that is read no more.
      basis = _with_row(basis, following, count + 1)
    carry = following, current, beta, peak, goes_on, basis
    return carry, (alpha, beta, active)

  zero = jnp.zeros_like(length)
  begin = (
    first,
    trees.zeros_like(first),
    zero,
    zero,
    jnp.ones_like(length, bool),
    basis,
  )
  _, (alphas, betas, active) = jax.lax.scan(step, begin, jnp.arange(num_steps))
  return alphas, betas, active


def _with_row(basis: PyTree, vector: PyTree, index) -> PyTree:
  return jax.tree.map(
    lambda rows, row: jax.lax.dynamic_update_index_in_dim(rows, row, index, 0),
    basis,
    vector,
  )


def _ritz(alphas: Array, betas: Array, active: Array) -> Ritz:
  # A row of zeros would plant the value 0 in any spectrum.
  diagonal = jnp.where(active, alphas, alphas[0])
  inner = betas[:-1]
  matrix = jnp.diag(diagonal) + jnp.diag(inner, 1) + jnp.diag(inner, -1)
  values, vectors = jnp.linalg.eigh(matrix)
  residuals = jnp.abs(betas[-1] * vectors[-1])
  filled = jnp.sum(jnp.where(active[:, None], 0, jnp.square(vectors)), axis=0)
  return Ritz(values, jnp.where(filled > 0.5, jnp.inf, residuals))
