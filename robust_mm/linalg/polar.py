"""The polar factor by Newton-Schulz iteration, and its derivative."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm.linalg import products

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
  return newton_schulz(jax.random.normal(key, tuple(shape)), num_iters=40)


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
    return products.transpose(
      newton_schulz(products.transpose(Z), num_iters=num_iters)
    )
  W = _factor(jnp.reshape(Z, (-1, *Z.shape[-2:])), num_iters)
  return jnp.reshape(W, Z.shape)


def defect(W: Float[Array, "*b k d"]) -> Float[Array, "*b"]:
  """``max |W W^T - I|`` (of ``W^T W`` for a tall ``W``): 0 if orthonormal."""
  if W.shape[-2] > W.shape[-1]:
    W = products.transpose(W)
  error = products.dot(W, products.transpose(W)) - products.eye(W)
  return jnp.max(jnp.abs(error), axis=(-2, -1))


# Traced once for a shape, not once for each of a model's layers.
@functools.partial(jax.jit, static_argnums=1)
def _factor(z: Array, num_iters: int) -> Array:
  return _polar(z, num_iters)[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _polar(z: Array, num_iters: int) -> tuple[Array, Array, Array]:
  """``(W, R, size)`` of ``z`` [n, k, d], k <= d.

  ``W = R z`` and ``R -> P^-1``; ``size`` is the largest squared Frobenius
  norm of ``I - X X^T`` before the last step.
  """
  gram = products.dot(z, products.transpose(z))
  trace = jnp.trace(gram, axis1=-2, axis2=-1)[:, None, None]
  # Singular values scatter around 1 after the root mean square, and near 1
  # convergence is fastest; the bound keeps the first step inside its range.
  scale = jnp.maximum(
    trace / z.shape[-2], products.norm_bound(gram) / products.FIRST_LIMIT**2
  )
  scale = jnp.where(scale == 0, 1.0, scale)
  r, num_done = _gram_steps(gram / scale, num_iters)
  r = r * jax.lax.rsqrt(scale)
  x = products.dot(r, z)
  return _direct_steps(x, r, num_done, num_iters)


def _gram_steps(gram: Array, num_iters: int) -> tuple[Array, Array]:
  """Newton-Schulz steps on ``E = I - X X^T``; the accumulated factor.

  One step multiplies ``X`` by ``I + E/2`` and sends ``E`` to ``3/4 E^2 + 1/4
  E^3``: nothing cancels near convergence. One step is left for ``X`` itself.
  """
  epsilon = jnp.finfo(gram.dtype).eps
  eye = products.eye(gram)
  # 1 is an unstable fixed point of E: rounding pushes a zero singular value
  # past it, and away. Damping E by the size of that rounding keeps it below 1,
  # which only under-estimates singular values, to be mended on X itself.
  error = (eye - gram) * (1 - 4 * epsilon * gram.shape[-1])
  if num_iters == 1:
    return eye, jnp.zeros((), jnp.int32)

  def advance(error):
    square = products.dot(error, error)
    return 0.75 * square + 0.25 * products.dot(square, error)

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
    return step + 1, error, factor + 0.5 * products.dot(factor, error)

  carry = (jnp.ones((), jnp.int32), error, eye + 0.5 * error)
  step, _, factor = jax.lax.while_loop(unfinished, body, carry)
  return factor, step


def _direct_steps(
  x: Array, r: Array, num_done: Array, num_iters: int
) -> tuple[Array, Array, Array]:
  """One step on ``X`` itself, more where it has not converged."""
  epsilon = jnp.finfo(x.dtype).eps
  gram = products.dot(x, products.transpose(x))
  # A no-op unless rounding spoilt the Gram side.
  shrink = products.shrink(gram)
  x, r = x * jnp.sqrt(shrink), r * jnp.sqrt(shrink)

  def half_error(gram):
    error = products.eye(gram) - gram
    return 0.5 * error, jnp.max(jnp.sum(jnp.square(error), axis=(-2, -1)))

  def advance(step, x, r, gram):
    half, size = half_error(gram)
    return step + 1, size, x + products.dot(half, x), r + products.dot(half, r)

  def unfinished(carry):
    step, size, *_ = carry
    return (step < num_iters) & (size > 4 * epsilon)

  def body(carry):
    step, _, x, r = carry
    return advance(step, x, r, products.dot(x, products.transpose(x)))

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
  p = products.dot(z, products.transpose(w))
  p = 0.5 * (p + products.transpose(p))
  # Dependent rows make the equation singular. The shift is of the size of the
  # slope that num_iters steps have there, and rounding where they converged.
  mean = jnp.trace(p, axis1=-2, axis2=-1)[:, None, None] / p.shape[-1]
  shift = jnp.minimum(size, 1.0) * mean * 1.5**-num_iters
  shift = jax.lax.stop_gradient(shift + jnp.finfo(z.dtype).tiny)
  a = products.dot(dz, products.transpose(w))
  omega = _solve_skew(p, shift, a - products.transpose(a))
  dw = products.dot(omega, w) + products.dot(r, dz - products.dot(a, w))
  dp = a - products.dot(p, omega)
  dr = -products.dot(products.dot(r, 0.5 * (dp + products.transpose(dp))), r)
  return (w, r, size), (dw, dr, jnp.zeros_like(size))


def _solve_skew(p: Array, shift: Array, skew: Array) -> Array:
  """The skew ``Y`` with ``p Y + Y p + 2 shift Y = skew``, by CG."""

  def matvec(y):
    # For a skew y, y p = -(p y)^T: one product in place of two.
    product = products.dot(p, y)
    return product - products.transpose(product) + 2 * shift * y

  def solve(matvec, b):
    # The transposed solve receives a general matrix, of which only the skew
    # part acts.
    return _conjugate_gradient(matvec, 0.5 * (b - products.transpose(b)))

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
