r"""How many directions embeddings use, and a loss that collapses them.

With row weights :math:`v_i`, :math:`n = \sum v_i` and centred rows
:math:`Z_c = \sqrt v (Z - \mu)`, the covariance is :math:`C = Z_c^T Z_c / (n -
1)` and the stable rank of the embeddings is

.. math:: R = \frac{\|Z_c\|_F^2}{\|Z_c\|_2^2}
            = \frac{\operatorname{tr} C}{\lambda_{max}(C)} \in
            [1, \min(d, n - 1)].

It is the stable rank of the embedding matrix, not that of C, and it depends on
n: compare it at equal n, or divide by :func:`isotropic_stable_rank`.

All of it computes in float32 at least and has first and second derivatives
that are finite everywhere.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm.linalg import trees

TARGETS = ("expected", "sampled")
# Eigenvalues closer than this share of the largest count as tied.
_TIED = 1e-6


class Collapse(NamedTuple):
  """A collapse loss and what it is made of; float32 scalars (float64).

  Attributes:
    loss: ``omega * (gaussian + spectral_weight * stable_rank)``.
    gaussian: the pull towards noise, that is towards zero.
    stable_rank: with the ``eps`` of the loss, 0 for fewer than two rows.
    omega: 1, or the adaptive factor in [0, 1]; no gradient.
  """

  loss: Float[Array, ""]
  gaussian: Float[Array, ""]
  stable_rank: Float[Array, ""]
  omega: Float[Array, ""]


def stable_rank(
  embeddings: Array,
  *,
  weights: Array | None = None,
  eps: float | Array = 0.0,
) -> Float[Array, ""]:
  r"""The stable rank of embeddings: how many directions they use.

  .. math:: R = \operatorname{tr} C / (\lambda_{max}(C) + \epsilon)

  >>> corners = jnp.array([[1.0, 0], [-1.0, 0], [0, 1.0], [0, -1.0]])
  >>> round(float(stable_rank(corners)), 4)
  2.0

  Formal guarantees:
    - With ``eps=0``: between 1 and min(d, n - 1); invariant under a factor and
      under rotations of the embeddings; its gradient is orthogonal to the
      centred embeddings (it can flatten, not shrink).
    - A row of weight 0 is as good as absent, whatever it holds, NaN included.

  ===============================  ======================================
  case                             value
  ===============================  ======================================
  fewer than two rows (n < 2)      0, gradient 0
  all rows equal                   0, gradient 0
  two largest eigenvalues tied     the derivative of one of them; second
                                   derivatives leave the tie out
  ===============================  ======================================

  Args:
    embeddings: ``[b, d]``; bfloat16 and float16 are raised to float32.
    weights: ``[b]``, non-negative, 0 for rows that are absent.
    eps: added to the eigenvalue, in squared units of the embeddings.

  Raises:
    ValueError: embeddings that are not ``[b, d]``, negative weights or eps.
  """
  _validate.non_negative(eps=eps)
  Z, v = _prepared(embeddings, weights)
  return _stable_rank(Z, v, eps)


def isotropic_stable_rank(
  num_rows: int | Array, num_features: int
) -> Float[Array, ""]:
  r"""The stable rank of isotropic Gaussian embeddings, for large n and d.

  .. math:: R_{iso}(n, d) = \frac{d}{(1 + \sqrt{d / (n - 1)})^2}

  A sample of n rows has less than d: 31.9 of 128 at n = 128.

  >>> round(float(isotropic_stable_rank(128, 128)), 1)
  31.9

  Args:
    num_rows: n, the sum of the weights; may be traced. 0 for n <= 1.
    num_features: d.

  References:
    `Geman (1980) <https://doi.org/10.1214/aop/1176994775>`_.
  """
  _validate.at_least(1, num_features=num_features)
  rows = jnp.asarray(num_rows, jnp.result_type(float)) - 1
  ratio = num_features / jnp.where(rows > 0, rows, 1)
  return jnp.where(
    rows > 0, num_features / jnp.square(1 + jnp.sqrt(ratio)), 0.0
  )


def leading_eigenvalue(matrix: Array) -> Float[Array, ""]:
  r"""The largest eigenvalue of a symmetric matrix, safe to differentiate twice.

  .. math:: d\lambda_1 = u^T\, dA\, u, \qquad
            du = \sum_{j \ne 1} v_j \frac{v_j^T\, dA\, u}{\lambda_1 - \lambda_j}

  where terms with a gap below :math:`10^{-6} |\lambda_1|` are left out. The
  derivative that comes with an eigendecomposition divides by all gaps, between
  the other eigenvalues too, and is NaN at a tie; an eigenvector that is held
  constant gives the right gradient and a wrong Hessian.

  >>> float(leading_eigenvalue(jnp.diag(jnp.array([1.0, 3.0, 2.0]))))
  3.0

  Formal guarantees:
    - First and second derivatives are finite for every finite matrix, and
      exact where the largest eigenvalue is simple.
    - Only the symmetric part of ``matrix`` matters.

  Args:
    matrix: ``[d, d]``; bfloat16 and float16 are raised to float32.
  """
  if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
    raise ValueError(f"matrix must be square, got shape {matrix.shape}.")
  matrix = trees.upcast(matrix)
  return _leading_pair((matrix + matrix.T) / 2)[0]


def collapse(
  embeddings: Array,
  *,
  spectral_weight: float | Array,
  target: str = "expected",
  key: PRNGKeyArray | None = None,
  weights: Array | None = None,
  adaptive: bool = False,
) -> Collapse:
  r"""A loss whose descent destroys what the embeddings of a modality say.

  .. math:: L = \omega \Bigl( \frac{1}{n d} \sum_i v_i \|z_i\|^2 + s^2
            + \kappa \frac{\operatorname{tr} C}{\lambda_{max}(C) + \epsilon_0}
            \Bigr), \qquad s^2 = \text{stop}\Bigl(
            \frac{1}{n d} \sum_i v_i \|z_i\|^2 \Bigr)

  with :math:`\epsilon_0 = 10^{-4} s^2 + 10^{-8}`, which bounds the gradient of
  the ratio as the embeddings vanish. The first two terms are the expected
  squared distance to fresh Gaussian noise of the scale of the embeddings:
  shrinkage, and nothing else. The ratio flattens the spectrum and cannot
  shrink.

  Formal guarantees:
    - The gradient of ``target="expected"`` is the expectation of that of
      ``"sampled"``; without the ratio it is :math:`2 v_i z_i / (n d)`.
    - First and second derivatives are finite for finite embeddings: zero,
      constant, rank one and tied ones included. Rows of weight 0 have none.
    - Fewer than two rows: no ratio. No row: loss 0, gradient 0.

  Args:
    embeddings: ``[b, d]``, of a modality, before anything normalises them.
    spectral_weight: :math:`\kappa \ge 0`; may be traced.
    target: ``"expected"``, or ``"sampled"`` for noise drawn with ``key``; fresh
      in every step, as noise fixed per example can be learnt. Where second
      derivatives are taken, use the expected form.
    key: for ``"sampled"``.
    weights: ``[b]``, 1 for rows in which the modality is present, else 0.
    adaptive: :math:`\omega = (R - 1) / (R_{iso} - 1)` cut to [0, 1], no
      gradient, 0 where R_iso <= 1 (too few rows to tell); False for 1.

  Raises:
    ValueError: ``target="sampled"`` without ``key``, a negative weight,
      embeddings that are not ``[b, d]``.

  References:
    `Fu et al. (2026) <https://arxiv.org/abs/2602.16197>`_ for the idea; this
    form of it is our reading.
  """
  _validate.one_of(TARGETS, target=target)
  _validate.non_negative(spectral_weight=spectral_weight)
  if target == "sampled" and key is None:
    raise ValueError("key must be given for target='sampled'.")
  Z, v = _prepared(embeddings, weights)
  number, width = jnp.sum(v), Z.shape[1]
  scalars = jnp.maximum(number, 1) * width
  square = jnp.sum(v[:, None] * jnp.square(Z)) / scalars
  scale = jax.lax.stop_gradient(square)
  if target == "expected":
    gaussian = square + scale
  else:
    noise = trees.sharded_as(jax.random.normal(key, Z.shape, Z.dtype), Z)
    distance = jnp.square(Z - jnp.sqrt(scale) * noise)
    gaussian = jnp.sum(v[:, None] * distance) / scalars
  rank = _stable_rank(Z, v, 1e-4 * scale + 1e-8)
  omega = jnp.ones_like(rank)
  if adaptive:
    omega = _adaptivity(rank, isotropic_stable_rank(number, width))
  weight = jnp.asarray(spectral_weight, rank.dtype)
  return Collapse(omega * (gaussian + weight * rank), gaussian, rank, omega)


def _adaptivity(rank, isotropic):
  spread = isotropic - 1
  share = (rank - 1) / jnp.where(spread > 0, spread, 1)
  share = jnp.where(spread > 0, jnp.clip(share, 0, 1), 0)
  return jax.lax.stop_gradient(share.astype(rank.dtype))


def _prepared(embeddings, weights):
  """Rows in float32 at least, zero where absent, and their weights."""
  if embeddings.ndim != 2:
    raise ValueError(
      f"embeddings must be [b, d], got shape {embeddings.shape}."
    )
  Z = trees.upcast(embeddings)
  if weights is None:
    return Z, jnp.ones_like(Z[:, 0])
  if weights.shape != Z.shape[:1]:
    raise ValueError(
      f"weights must have shape {Z.shape[:1]}, got {weights.shape}."
    )
  if not isinstance(weights, jax.core.Tracer) and (weights < 0).any():
    raise ValueError(f"weights must be non-negative, got {weights.min()}.")
  v = weights.astype(Z.dtype)
  # Selected, not multiplied: an absent row may hold anything.
  return jnp.where(v[:, None] > 0, Z, 0), v


def _stable_rank(Z, v, eps):
  number = jnp.sum(v)
  mean = jnp.sum(v[:, None] * Z, axis=0) / jnp.maximum(number, 1)
  # The root of a weight has no finite slope at 0, and needs none.
  root = jnp.sqrt(jax.lax.stop_gradient(v))
  centred = root[:, None] * (Z - mean[None])
  # In units of the largest entry: squares of small ones would underflow.
  unit = jax.lax.stop_gradient(jnp.max(jnp.abs(centred)))
  unit = jnp.where(unit == 0, 1, unit)
  centred = centred / unit
  eps = jnp.asarray(eps, centred.dtype) / unit / unit
  degrees = jnp.maximum(number - 1, 1)
  rows = "nd,md->nm" if Z.shape[0] < Z.shape[1] else "nd,ne->de"
  matrix = (
    jnp.einsum(
      rows,
      centred,
      centred,
      precision="highest",
      out_sharding=_everywhere(centred),
    )
    / degrees
  )
  trace = jnp.sum(jnp.square(centred)) / degrees
  bottom = leading_eigenvalue(matrix) + eps
  # Both wheres: the quotient of zeros must not be formed in the gradient.
  counts = (number >= 2) & (bottom > 0)
  ratio = trace / jnp.where(counts, bottom, 1)
  return jnp.where(counts, ratio, jnp.where(jnp.isnan(bottom), jnp.nan, 0))


def _everywhere(x):
  """Replicated, for a product over an axis whose type says it is sharded."""
  mesh = jax.typeof(x).sharding.mesh
  if mesh.empty:
    return None
  return jax.sharding.NamedSharding(mesh, jax.P(None, None))


@jax.custom_jvp
def _leading_pair(matrix):
  values, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
  return values[-1], vectors[:, -1]


@_leading_pair.defjvp
def _leading_pair_jvp(primals, tangents):
  (matrix,), (change,) = primals, tangents
  # The pair itself, not its parts: its own rule is used once more when this
  # one is differentiated.
  value, u = _leading_pair(matrix)
  values, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
  image = jnp.matmul(change, u, precision="highest")
  gaps = values[-1] - values[:-1]
  apart = gaps > _TIED * jnp.abs(values[-1])
  inverse = jnp.where(apart, 1 / jnp.where(apart, gaps, 1), 0)
  parts = jnp.matmul(vectors[:, :-1].T, image, precision="highest") * inverse
  turned = jnp.matmul(vectors[:, :-1], parts, precision="highest")
  return (value, u), (jnp.sum(u * image), turned)
