"""What is read off the certificates of many examples."""

import statistics
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float

from robust_mm import _validate
from robust_mm import margins
from robust_mm.certification.certificates import Certificate


def certified_accuracy(
  certificate: Certificate,
  label,
  radius: Any = None,
  *,
  budgets: Mapping[str, Any] | None = None,
  modality: str | None = None,
  max_missing: int = 0,
) -> Float[Array, "..."]:
  """Share of valid examples that are right and proved to stay so.

  Args:
    certificate: of the examples.
    label: int ``[b]``.
    radius: a number or ``[g]`` of them; an example counts where its radius is
      larger (at 0: margins beyond the slack); not negative.
    budgets: instead of ``radius``, see ``Certificate.covers``.
    modality: take this modality's radius rather than the joint one.
    max_missing: with ``budgets``.

  Returns:
    a scalar, or ``[g]``; 0 where no example is valid.
  """
  if (radius is None) == (budgets is None):
    raise ValueError("certified_accuracy needs either radius or budgets.")
  margins.check_label(
    label, certificate.margins.shape[-1], certificate.prediction.shape
  )
  counted = (certificate.prediction == label) & certificate.valid
  number = jnp.maximum(jnp.sum(certificate.valid), 1)
  if budgets is not None:
    if modality is not None:
      raise ValueError("modality goes with radius, not with budgets.")
    return jnp.sum(counted & certificate.covers(budgets, max_missing)) / number
  if max_missing:
    raise ValueError("max_missing goes with budgets, not with radius.")
  proved = certificate.radius
  if modality is not None:
    _validate.known(certificate.modalities, modality=(modality,))
    proved = certificate.modality_radius[modality]
  if margins.known_values(radius) and not np.all(np.asarray(radius) >= 0):
    raise ValueError(f"radius must be non-negative, got {radius}.")
  sizes = jnp.asarray(radius, proved.dtype)
  inside = proved[..., None] > jnp.reshape(sizes, (1,) * proved.ndim + (-1,))
  share = jnp.sum(counted[..., None] & inside, axis=tuple(range(proved.ndim)))
  return jnp.reshape(share / number, sizes.shape)


def wilson_interval(
  successes: Any, count: int, *, confidence: float = 0.95
) -> tuple[Any, Any]:
  """Wilson score interval of a share, for bands around accuracies.

  >>> low, high = wilson_interval(9, 10)
  >>> round(float(low), 3), round(float(high), 3)
  (0.596, 0.982)
  """
  _validate.at_least(1, count=count)
  if not 0 < confidence < 1:
    raise ValueError(f"confidence must lie in (0, 1), got {confidence}.")
  z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
  share = np.asarray(successes, np.float64) / count
  centre = share + z * z / (2 * count)
  spread = z * np.sqrt(
    share * (1 - share) / count + z * z / (4 * count * count)
  )
  total = 1 + z * z / count
  return (
    np.clip((centre - spread) / total, 0, 1),
    np.clip((centre + spread) / total, 0, 1),
  )
