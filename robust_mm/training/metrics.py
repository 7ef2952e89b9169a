"""Metrics read one step late, averaged over a log period, checked for NaN."""

import math

import jax
import numpy as np


class NonFiniteError(FloatingPointError):
  """A loss that is NaN or infinite; names the step."""


class Accumulator:
  """Collects device scalars without waiting for them.

  ``push`` keeps the arrays of a step; ``mean`` fetches them once a log period,
  when all but the newest are long computed.
  """

  def __init__(self):
    self._pending = []

  def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Keeps the metrics of the update that made ``step``."""
    self._pending.append((step, metrics))

  def mean(self, *, newest: bool = True) -> dict[str, float]:
    """Means since the last call; NonFiniteError naming the first bad step.

    Args:
      newest: False leaves the newest step for the next call, so that nothing
        waits for it.
    """
    cut = len(self._pending) - (not newest)
    steps = [step for step, _ in self._pending[:cut]]
    rows = jax.device_get([metrics for _, metrics in self._pending[:cut]])
    self._pending = self._pending[cut:]
    for step, row in zip(steps, rows):
      for name in ("loss", "parameter_norm"):
        if not math.isfinite(row[name]):
          words = name.replace("_", " ")
          raise NonFiniteError(f"the {words} is {row[name]} at step {step}")
    if not rows:
      return {}
    return {name: float(np.mean([r[name] for r in rows])) for name in rows[0]}
