"""Bounds of the spectral norm."""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from robust_mm import _validate
from robust_mm.linalg import products


def gram_norm(
  W: Float[Array, "*b k d"], *, num_iters: int = 16
) -> Float[Array, "*b"]:
  r"""Upper bound of the spectral norm by Gram iteration, differentiable.

  .. math:: G_0 = W, \quad G_{t+1} = G_t^T G_t, \qquad
    \|W\|_2 \le \|G_T\|_F^{1/2^T} \le r^{1/2^{T+1}} \|W\|_2

  with ``r`` the rank, each :math:`G_t` rescaled to Frobenius norm 1.

  Formal guarantees:
    - Upper bound for every ``num_iters``, rounded up by a relative
      :math:`(8 + 2 |\log \|W\||)` machine epsilons. Measured without that, in
      float32 up to 512 x 512: short by at most 1 + |log| epsilons. Excess
      at rank 512: 5 % after 6 steps, 5e-5 after 16; the worst case is an
      orthonormal ``W``.

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
  G = W if W.shape[-2] >= W.shape[-1] else products.transpose(W)
  zero = jnp.max(jnp.abs(G), axis=(-2, -1), keepdims=True) == 0
  G = jnp.where(zero, jnp.ones_like(G), G)

  log_norm = jnp.zeros(G.shape[:-2], G.dtype)
  for step in range(num_iters):
    # The largest entry first: squares of entries near 1e-20 or 1e20 are
    # outside float32.
    peak = jnp.max(jnp.abs(G), axis=(-2, -1), keepdims=True)
    peak = jax.lax.stop_gradient(peak)  # it cancels
    scale = peak * products.frobenius(G / peak)
    log_norm += jnp.log(scale[..., 0, 0]) / 2**step
    G = G / scale
    G = products.dot(products.transpose(G), G)
  log_norm += jnp.log(products.frobenius(G)[..., 0, 0]) / 2**num_iters
  # A logarithm loses the relative precision of a number in its own size.
  eps = float(jnp.finfo(G.dtype).eps)
  up = 1 + eps * (8 + 2 * jnp.abs(jax.lax.stop_gradient(log_norm)))
  return jnp.where(zero[..., 0, 0], 0.0, jnp.exp(log_norm) * up)


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
    return unit(products.dot(products.dot(v, products.transpose(W)), W)), None

  v, _ = jax.lax.scan(step, unit(v), None, length=num_iters)
  return jnp.linalg.norm(
    products.dot(v, products.transpose(W))[..., 0, :], axis=-1
  )
