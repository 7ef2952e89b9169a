"""The largest radius a test of one ball confirms."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float


def largest(
  holds: Callable[[Float[Array, "*b"]], Bool[Array, "*b"]],
  first: Float[Array, "*b"],
  *,
  num_steps: int,
) -> Float[Array, "*b"]:
  """Bisection, after doubling for as long as no radius has failed.

  Every radius returned has been confirmed, or is 0; that ``holds`` is monotonic
  is not assumed.

  Args:
    holds: whether the ball of that radius is certified.
    first: the radius to try first, positive where there is any hope.
    num_steps: tests.
  """

  def step(ends, _):
    low, high = ends
    middle = jnp.where(
      jnp.isfinite(high), (low + high) / 2, jnp.where(low > 0, 2 * low, first)
    )
    sure = holds(middle) & (middle > 0)
    return (
      jnp.where(sure, middle, low),
      jnp.where(sure, high, middle),
    ), None

  start = (jnp.zeros_like(first), jnp.full_like(first, jnp.inf))
  (low, _), _ = jax.lax.scan(step, start, None, length=num_steps)
  return low
