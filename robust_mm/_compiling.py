"""How much a compiler should try."""

import jax


def options_for_once() -> dict | None:
  """``compiler_options`` of a function that is called a few times on little.

  On a CPU, where optimising it would cost more than it saves; None elsewhere.
  """
  if jax.default_backend() != "cpu":
    return None
  return {"xla_backend_optimization_level": 0}
