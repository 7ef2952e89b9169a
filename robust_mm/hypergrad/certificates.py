r"""What the residual of a linear solve proves.

With :math:`\mu > 0` at most the smallest eigenvalue of A and r = v - A x:

.. math:: \|A^{-1} v - x\| \le \|r\| / \mu

for any x, however it was found. The truncation of a linear solve is certified,
for the stated A: not that A is the right operator, not the system.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from robust_mm import _validate


def a_posteriori_error(
  residual_norm: Float[Array, "*b"], lower: Float[Array, "*b"]
) -> Float[Array, "*b"]:
  r"""The bound ``||r|| / mu``, of any solver.

  0 for a residual of 0, otherwise infinite where ``lower`` is not positive. For
  ``published(q)`` it is :math:`\|(\alpha H)^{K+1} v\| / (1 - q)`.

  >>> float(a_posteriori_error(jnp.array(0.5), jnp.array(0.25)))
  2.0

  Args:
    residual_norm: of the explicit residual.
    lower: mu, at most the smallest eigenvalue of A.
  """
  safe = jnp.where(lower > 0, lower, 1)
  bound = jnp.where(lower > 0, residual_norm / safe, jnp.inf)
  return jnp.where(residual_norm == 0, 0, bound)


def a_priori_error(
  num_steps: int,
  rhs_norm: Float[Array, "*b"],
  lower: Float[Array, "*b"],
  step_size: Float[Array, "*b"],
) -> Float[Array, "*b"]:
  r"""What ``neumann(num_steps)`` leaves at most, before it runs.

  .. math:: (1 - \alpha\mu)^{K+1} \|v\| / \mu

  For :math:`\alpha \|A\| \le 1`. With ``published(q)``, mu = 1 - q and alpha =
  1, it is :math:`q^{K+1} \|v\| / (1 - q)`.

  >>> args = jnp.array(1.0), jnp.array(0.5), jnp.array(1.0)
  >>> float(a_priori_error(1, *args))
  0.5

  Args:
    num_steps: K.
    rhs_norm: of v.
    lower: mu; nothing positive gives infinity.
    step_size: alpha, of the series.
  """
  _validate.at_least(0, num_steps=num_steps)
  left = (1 - step_size * lower) ** (num_steps + 1) * rhs_norm
  return a_posteriori_error(left, lower)


def sufficient_steps(
  error: float, rhs_norm: float, lower: float, step_size: float
) -> int:
  r"""The least K for which :func:`a_priori_error` is at most ``error``.

  .. math:: K + 1 \ge \ln(\|v\| / (\mu \cdot error)) / -\ln(1 - \alpha\mu)

  >>> sufficient_steps(0.5, 1.0, 0.5, 1.0)
  1

  Args:
    error: of x, in the units of v over those of A.
    rhs_norm: of v.
    lower: mu, positive.
    step_size: alpha, at most 1 / (largest eigenvalue).

  Raises:
    ValueError: naming the argument that is not positive.
  """
  _validate.positive(
    error=error, rhs_norm=rhs_norm, lower=lower, step_size=step_size
  )
  if step_size * lower >= 1:
    return 0
  terms = math.log(rhs_norm / (lower * error)) / -math.log1p(-step_size * lower)
  # One rounding error must not cost a step.
  return max(math.ceil(terms * (1 - 1e-12)) - 1, 0)


def acceptable(
  error: Float[Array, ""], length: Float[Array, ""], acceptance: float | None
) -> Bool[Array, ""]:
  r"""``E <= rho ||ghat||``: the exact gradient of the system agrees.

  Then :math:`\langle\hat g, g_A\rangle \ge (1 - \rho) \|\hat g\|^2`, an angle
  of at most arcsin(rho). None accepts all.
  """
  if acceptance is None:
    return jnp.ones_like(error, bool)
  return error <= acceptance * length
