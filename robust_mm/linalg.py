r"""Matrices kept orthonormal, norms bounded from above, by matrix products.

Everything here is a few products of small matrices: no SVD, eigendecomposition
or QR, whose backward passes divide by spectral gaps and give NaN at the very
matrices one wants (orthonormal ones have no gaps at all). Products run at
``precision="highest"``: the accelerators' defaults (TF32, bfloat16) would void
the bounds.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import PRNGKeyArray

from robust_mm import _validate

# The first step maps singular values in [0, sqrt(3)] into [0, 1]; 1.5 keeps
# clear of sqrt(3), which it would map to 0.
_FIRST_LIMIT = 1.5
_MAX_SOLVER_STEPS = 64


def random_orthonormal(
  key: PRNGKeyArray, shape: Sequence[int]
) -> Float[Array, "*b k d"]:
  """Uniformly random matrices with orthonormal rows (columns where k > d).

  The polar factor of a Gaussian matrix, which has the Haar distribution, by
  matrix products alone: several QR factorisations inside one compiled function
  dead-lock XLA's CPU client on two cores (seen with jax 0.10.2), and take
  seconds to compile.

  Args:
    key: a random key.
    shape: ``[..., k, d]``.
  """
  *batch, k, d = shape
  wide = jax.random.normal(key, (*batch, min(k, d), max(k, d)))

  def step(_, X):
    gram = jnp.einsum("...kd,...jd->...kj", X, X, precision="highest")
    return 1.5 * X - 0.5 * jnp.einsum(
      "...kj,...jd->...kd", gram, X, precision="highest"
    )

  size = jnp.linalg.norm(wide, axis=(-2, -1), keepdims=True)
  # 48 steps bring singular values from 1e-6 to 1; a compiled loop is small.
  W = jax.lax.fori_loop(0, 48, step, wide / size)
  return W if k <= d else jnp.swapaxes(W, -1, -2)


def newton_schulz(
  Z: Float[Array, "*b k d"], *, num_iters: int = 12
) -> Float[Array, "*b k d"]:
  r"""The polar factor of ``Z``: the closest matrix with orthonormal rows.

  .. math::
    X \leftarrow \tfrac32 X - \tfrac12 X X^T X, \qquad
    W = \lim X = (Z Z^T)^{-1/2} Z

  All but the last steps run on the :math:`k \times k` Gram matrix and stop
  early once they have converged, so an almost orthonormal ``Z`` costs three or
  four of them. For ``k > d`` the columns become orthonormal instead.

  Formal guarantees:
    - ``||W||_2 <= 1`` up to rounding (6e-7 in float32) for every ``num_iters``
      and every finite ``Z``, converged or not: the last step is taken on
      :math:`X` itself and maps singular values in :math:`[0, \sqrt 3]` into
      :math:`[0, 1]`.
    - The derivative (any order, both modes) is that of the limit: at an
      orthonormal ``Z`` a cotangent ``G`` becomes
      :math:`G - (G Z^T + Z G^T) Z / 2`, and :math:`\langle grad, Z\rangle = 0`.
      It is exact where the iteration has converged.

  Edge cases: a zero ``Z`` gives zero; dependent rows have no orthonormal
  answer, the defect then stays (0.5 for two equal rows), the norm is still at
  most 1 and derivatives are finite. Half precision is computed, and returned,
  in float32, because rounding ``W`` to it would break the norm bound.

  Args:
    Z: ``[..., k, d]``; leading axes are a batch.
    num_iters: most steps taken. 12 suffice up to condition number 20 or so, 20
      up to 1000.

  Returns:
    ``W``, of the shape of ``Z``.

  >>> W = newton_schulz(jnp.array([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0]]))
  >>> bool(jnp.allclose(W @ W.T, jnp.eye(2), atol=1e-6))
  True

  References:
    Higham, Functions of Matrices (2008), chapter 8; `Yang et al. (2024)
    <https://arxiv.org/abs/2402.06244>`_ for its use in a head.
  """
  _validate.at_least(1, num_iters=num_iters)
  Z = Z.astype(jnp.promote_types(Z.dtype, jnp.float32))
  if Z.shape[-2] > Z.shape[-1]:
    return _transpose(newton_schulz(_transpose(Z), num_iters=num_iters))
  W, *_ = _polar(jnp.reshape(Z, (-1, *Z.shape[-2:])), num_iters)
  return jnp.reshape(W, Z.shape)


def defect(W: Float[Array, "*b k d"]) -> Float[Array, "*b"]:
  """``max |W W^T - I|`` (of ``W^T W`` for a tall ``W``): 0 if orthonormal."""
  if W.shape[-2] > W.shape[-1]:
    W = _transpose(W)
  error = _dot(W, _transpose(W)) - _eye(W)
  return jnp.max(jnp.abs(error), axis=(-2, -1))


def gram_norm(
  W: Float[Array, "*b k d"], *, num_iters: int = 16
) -> Float[Array, "*b"]:
  r"""Upper bound of the spectral norm by Gram iteration, differentiable.

  .. math:: G_0 = W, \quad G_{t+1} = G_t^T G_t, \qquad
    \|W\|_2 \le \|G_T\|_F^{1/2^T} \le r^{1/2^{T+1}} \|W\|_2

  with ``r`` the rank, each :math:`G_t` rescaled to Frobenius norm 1.

  Formal guarantees:
    - Upper bound for every ``num_iters``, up to rounding (relative 1e-6 in
      float32 up to 512 x 512). Excess at rank 512: 5 % after 6 steps, 5e-5
      after 16; the worst case is an orthonormal ``W``.

  A zero matrix gives 0 with gradient 0.

  Args:
    W: ``[..., k, d]``.
    num_iters: Gram steps; 6 in a loss, 16 in a certificate.

  Returns:
    ``[...]``.

  References:
    `Delattre et al. (2023) <https://arxiv.org/abs/2305.16173>`_.
  """
  _validate.at_least(0, num_iters=num_iters)
  G = W if W.shape[-2] >= W.shape[-1] else _transpose(W)
  zero = jnp.max(jnp.abs(G), axis=(-2, -1), keepdims=True) == 0
  G = jnp.where(zero, jnp.ones_like(G), G)

  log_norm = jnp.zeros(G.shape[:-2], G.dtype)
  for step in range(num_iters):
    # The largest entry first: squares of entries near 1e-20 or 1e20 are
    # outside float32.
    peak = jnp.max(jnp.abs(G), axis=(-2, -1), keepdims=True)
    scale = peak * _frobenius(G / peak)
    log_norm += jnp.log(scale[..., 0, 0]) / 2**step
    G = G / scale
    G = _dot(_transpose(G), G)
  log_norm += jnp.log(_frobenius(G)[..., 0, 0]) / 2**num_iters
  return jnp.where(zero[..., 0, 0], 0.0, jnp.exp(log_norm))


def power_iteration(
  W: Float[Array, "*b k d"], *, num_iters: int = 20
) -> Float[Array, "*b"]:
  r"""**Lower** bound of the spectral norm: a monitor, never a certificate.

  :math:`\|W v\|` at the unit vector ``v`` reached from the longest row; 0.9 %
  low after 20 steps on a random 512 x 512 matrix. Not for a loss either: the
  value is decent long before its gradient points the right way. Use
  :func:`gram_norm` for both.
  """
  _validate.at_least(0, num_iters=num_iters)
  lengths = jnp.linalg.norm(W, axis=-1)
  longest = jnp.argmax(lengths, axis=-1)[..., None, None]
  v = jnp.take_along_axis(W, longest, axis=-2)

  def unit(v):
    norm = jnp.linalg.norm(v, axis=-1, keepdims=True)
    return v / jnp.where(norm == 0, 1.0, norm)

  def step(v, _):
    return unit(_dot(_dot(v, _transpose(W)), W)), None

  v, _ = jax.lax.scan(step, unit(v), None, length=num_iters)
  return jnp.linalg.norm(_dot(v, _transpose(W))[..., 0, :], axis=-1)


def cayley(V: Float[Array, "*b k d"]) -> Float[Array, "*b k d"]:
  r"""Orthonormal columns (rows for ``k < d``) by the Cayley transform.

  With ``V = [U; Y]``, ``U`` square,

  .. math:: A = U - U^T + Y^T Y, \quad
    W = \begin{bmatrix} (I - A)(I + A)^{-1} \\ -2 Y (I + A)^{-1}\end{bmatrix}

  Formal guarantees:
    - ``W^T W = I`` up to the rounding of one linear solve; ``I + A`` is always
      invertible, since the symmetric part of ``A`` is positive semidefinite.

  It reaches no matrix whose square part has the eigenvalue -1, and ``V = 0``
  gives the identity.

  References:
    `Trockman & Kolter (2021) <https://arxiv.org/abs/2104.07167>`_.
  """
  V = V.astype(jnp.promote_types(V.dtype, jnp.float32))
  if V.shape[-2] < V.shape[-1]:
    return _transpose(cayley(_transpose(V)))
  n = V.shape[-1]
  U = V[..., :n, :]
  Y = V[..., n:, :]
  A = U - _transpose(U) + _dot(_transpose(Y), Y)
  eye = _eye(A)
  stacked = jnp.concatenate([eye - A, -2 * Y], axis=-2)
  # (I - A)(I + A)^-1 as a solve from the right.
  return _transpose(jnp.linalg.solve(_transpose(eye + A), _transpose(stacked)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _polar(z: Array, num_iters: int) -> tuple[Array, Array, Array]:
  """``(W, R, size)`` of ``z`` [n, k, d], k <= d.

  ``W = R z`` and ``R -> P^-1``; ``size`` is the largest squared Frobenius
  norm of ``I - X X^T`` before the last step.
  """
  gram = _dot(z, _transpose(z))
  trace = jnp.trace(gram, axis1=-2, axis2=-1)[:, None, None]
  # Singular values scatter around 1 after the root mean square, and near 1
  # convergence is fastest; the bound keeps the first step inside its range.
  scale = jnp.maximum(trace / z.shape[-2], _norm_bound(gram) / _FIRST_LIMIT**2)
  scale = jnp.where(scale == 0, 1.0, scale)
  r, num_done = _gram_steps(gram / scale, num_iters)
  r = r * jax.lax.rsqrt(scale)
  x = _dot(r, z)
  return _direct_steps(x, r, num_done, num_iters)


def _gram_steps(gram: Array, num_iters: int) -> tuple[Array, Array]:
  """Newton-Schulz steps on ``E = I - X X^T``; the accumulated factor.

  One step multiplies ``X`` by ``I + E/2`` and sends ``E`` to ``3/4 E^2 + 1/4
  E^3``: nothing cancels near convergence. One step is left for ``X`` itself.
  """
  epsilon = jnp.finfo(gram.dtype).eps
  eye = _eye(gram)
  # 1 is an unstable fixed point of E: rounding pushes a zero singular value
  # past it, and away. Damping E by the size of that rounding keeps it below 1,
  # which only under-estimates singular values, to be mended on X itself.
  error = (eye - gram) * (1 - 4 * epsilon * gram.shape[-1])
  if num_iters == 1:
    return eye, jnp.zeros((), jnp.int32)

  def advance(error):
    square = _dot(error, error)
    return 0.75 * square + 0.25 * _dot(square, error)

  # A step more than halves the error's exponent, and one more follows on X:
  # an applied error of this size leaves less than rounding behind.
  tolerance = epsilon**0.5

  def unfinished(carry):
    step, error, _ = carry
    size = jnp.max(jnp.sum(jnp.square(error), axis=(-2, -1)))
    return (step < num_iters - 1) & (size > tolerance)

  def body(carry):
    step, error, factor = carry
    error = advance(error)
    return step + 1, error, factor + 0.5 * _dot(factor, error)

  carry = (jnp.ones((), jnp.int32), error, eye + 0.5 * error)
  step, _, factor = jax.lax.while_loop(unfinished, body, carry)
  return factor, step


def _direct_steps(
  x: Array, r: Array, num_done: Array, num_iters: int
) -> tuple[Array, Array, Array]:
  """One step on ``X`` itself, more where it has not converged."""
  epsilon = jnp.finfo(x.dtype).eps
  gram = _dot(x, _transpose(x))
  # A no-op unless rounding spoilt the Gram side: the step below is a
  # contraction onto norm 1 only from singular values below sqrt(3).
  shrink = _FIRST_LIMIT**2 / jnp.maximum(_norm_bound(gram), _FIRST_LIMIT**2)
  x, r = x * jnp.sqrt(shrink), r * jnp.sqrt(shrink)

  def half_error(gram):
    error = _eye(gram) - gram
    return 0.5 * error, jnp.max(jnp.sum(jnp.square(error), axis=(-2, -1)))

  def advance(step, x, r, gram):
    half, size = half_error(gram)
    return step + 1, size, x + _dot(half, x), r + _dot(half, r)

  def unfinished(carry):
    step, size, *_ = carry
    return (step < num_iters) & (size > 4 * epsilon)

  def body(carry):
    step, _, x, r = carry
    return advance(step, x, r, _dot(x, _transpose(x)))

  carry = advance(num_done, x, r, gram * shrink)
  _, size, x, r = jax.lax.while_loop(unfinished, body, carry)
  return x, r, size


@_polar.defjvp
def _polar_jvp(num_iters, primals, tangents):
  """The derivative of the limit: ``Z = P W`` with ``P`` symmetric.

  ``dW = Omega W + P^-1 dZ (I - W^T W)`` with ``Omega`` skew and ``P Omega +
  Omega P = dZ W^T - W dZ^T``.
  """
  (z,), (dz,) = primals, tangents
  w, r, size = _polar(z, num_iters)
  p = _dot(z, _transpose(w))
  p = 0.5 * (p + _transpose(p))
  # Dependent rows make the equation singular. The shift is of the size of the
  # slope that num_iters steps have there, and rounding where they converged.
  mean = jnp.trace(p, axis1=-2, axis2=-1)[:, None, None] / p.shape[-1]
  shift = jnp.minimum(size, 1.0) * mean * 1.5**-num_iters
  shift = jax.lax.stop_gradient(shift + jnp.finfo(z.dtype).tiny)
  a = _dot(dz, _transpose(w))
  omega = _solve_skew(p, shift, a - _transpose(a))
  dw = _dot(omega, w) + _dot(r, dz - _dot(a, w))
  dp = a - _dot(p, omega)
  dr = -_dot(_dot(r, 0.5 * (dp + _transpose(dp))), r)
  return (w, r, size), (dw, dr, jnp.zeros_like(size))


def _solve_skew(p: Array, shift: Array, skew: Array) -> Array:
  """The skew ``Y`` with ``p Y + Y p + 2 shift Y = skew``, by CG."""

  def matvec(y):
    # For a skew y, y p = -(p y)^T: one product in place of two.
    product = _dot(p, y)
    return product - _transpose(product) + 2 * shift * y

  def solve(matvec, b):
    # The transposed solve receives a general matrix, of which only the skew
    # part acts.
    return _conjugate_gradient(matvec, 0.5 * (b - _transpose(b)))

  return jax.lax.custom_linear_solve(matvec, skew, solve, symmetric=True)


def _conjugate_gradient(matvec, b: Array) -> Array:
  """CG for a batch of positive definite systems, each ``[n, k, k]``."""

  def inner(u, v):
    return jnp.sum(u * v, axis=(-2, -1), keepdims=True)

  def ratio(u, v):
    return u / jnp.where(v == 0, 1.0, v)

  tolerance = inner(b, b) * (64 * jnp.finfo(b.dtype).eps) ** 2

  def unfinished(carry):
    step, _, _, _, size = carry
    return (step < _MAX_SOLVER_STEPS) & jnp.any(size > tolerance)

  def body(carry):
    step, x, residual, direction, size = carry
    image = matvec(direction)
    length = ratio(size, inner(direction, image))
    x = x + length * direction
    residual = residual - length * image
    new_size = inner(residual, residual)
    direction = residual + ratio(new_size, size) * direction
    return step + 1, x, residual, direction, new_size

  zero = jnp.zeros((), jnp.int32)
  carry = (zero, jnp.zeros_like(b), b, b, inner(b, b))
  return jax.lax.while_loop(unfinished, body, carry)[1]


def _norm_bound(gram: Array) -> Array:
  """Upper bound of the norm of symmetric matrices, ``[n, 1, 1]``."""
  rows = jnp.max(jnp.sum(jnp.abs(gram), axis=-1), axis=-1)[:, None, None]
  return jnp.minimum(rows, _frobenius(gram))


def _frobenius(matrix: Array) -> Array:
  return jnp.sqrt(jnp.sum(jnp.square(matrix), axis=(-2, -1), keepdims=True))


def _dot(left: Array, right: Array) -> Array:
  return jnp.matmul(left, right, precision="highest")


def _transpose(matrix: Array) -> Array:
  return jnp.swapaxes(matrix, -2, -1)


def _eye(like: Array) -> Array:
  n = like.shape[-2]
  eye = jnp.eye(n, dtype=like.dtype)
  return jnp.broadcast_to(eye, (*like.shape[:-2], n, n))
