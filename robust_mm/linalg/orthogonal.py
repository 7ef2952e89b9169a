"""Orthonormal matrices by the Cayley transform."""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from robust_mm.linalg import products


def cayley(V: Float[Array, "*b k d"]) -> Float[Array, "*b k d"]:
  r"""Orthonormal columns (rows for ``k < d``) by the Cayley transform.

  With ``V = [U; Y]``, ``U`` square,

  .. math:: A = U - U^T + Y^T Y, \quad
    W = \begin{bmatrix} (I - A)(I + A)^{-1} \\ -2 Y (I + A)^{-1}\end{bmatrix}

  Formal guarantees:
    - ``W^T W = I`` up to rounding; ``I + A`` is always invertible, since the
      symmetric part of ``A`` is positive semidefinite.
    - ``||W||_2 <= 1`` up to rounding even where the inverse is inaccurate
      (``||A||`` beyond 1e3 in float32): a last Newton-Schulz step maps singular
      values in :math:`[0, \sqrt 3]` into [0, 1].

  The inverse is a Newton iteration: LAPACK calls compete with XLA's own threads
  for a CPU, where one took 100 times as long as alone, and several dead-locked.

  It reaches no matrix whose square part has the eigenvalue -1, and ``V = 0``
  gives the identity.

  References:
    `Trockman & Kolter (2021) <https://arxiv.org/abs/2104.07167>`_.
  """
  V = V.astype(jnp.promote_types(V.dtype, jnp.float32))
  if V.shape[-2] < V.shape[-1]:
    return products.transpose(cayley(products.transpose(V)))
  n = V.shape[-1]
  U = V[..., :n, :]
  Y = V[..., n:, :]
  A = U - products.transpose(U) + products.dot(products.transpose(Y), Y)
  eye = products.eye(A)
  inverse = _inverse(eye + A)
  W = products.dot(jnp.concatenate([eye - A, -2 * Y], axis=-2), inverse)
  gram = products.dot(products.transpose(W), W)
  shrink = jax.lax.stop_gradient(products.shrink(gram))
  W, gram = W * jnp.sqrt(shrink), gram * shrink
  return W + 0.5 * products.dot(W, eye - gram)


@jax.custom_jvp
def _inverse(M: Array) -> Array:
  """The inverse by ``X <- X (2 I - M X)``, for ``||M^-1|| <= 1``."""
  epsilon = jnp.finfo(M.dtype).eps
  size = jnp.abs(M)
  rows = jnp.max(jnp.sum(size, axis=-1), axis=-1)
  columns = jnp.max(jnp.sum(size, axis=-2), axis=-1)
  start = products.transpose(M) / (rows * columns)[..., None, None]

  def worst(error):
    return jnp.max(jnp.sum(jnp.square(error), axis=(-2, -1)))

  def unfinished(carry):
    # The error is symmetric with eigenvalues in [0, 1) and squares in every
    # step; it stops falling where rounding has taken over, and would grow.
    before, _, error = carry
    return (worst(error) < before) & (worst(error) > epsilon)

  def body(carry):
    _, X, error = carry
    X = X + products.dot(X, error)
    return worst(error), X, products.eye(M) - products.dot(M, X)

  before = jnp.full((), jnp.inf, M.dtype)
  carry = (before, start, products.eye(M) - products.dot(M, start))
  _, X, error = jax.lax.while_loop(unfinished, body, carry)
  return X + products.dot(X, error)


@_inverse.defjvp
def _inverse_jvp(primals, tangents):
  X = _inverse(*primals)
  return X, -products.dot(products.dot(X, tangents[0]), X)
