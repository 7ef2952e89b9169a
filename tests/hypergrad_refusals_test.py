"""Bad input is refused by name."""

import hypergrad_problems as problems
import jax
import jax.numpy as jnp
import optax
import pytest

from robust_mm import hypergrad

KEY = jax.random.key(0)
EXACT = hypergrad.conjugate_gradient(40)


def _call(**changes):
  inner, outer, theta, phi = problems.small_quadratic()
  given = {
    "inner": inner,
    "outer": outer,
    "theta": theta,
    "phi": phi,
    **changes,
  }
  theta, phi = given.pop("theta"), given.pop("phi")
  return hypergrad.hypergradient(**given)(theta, phi, key=KEY)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"phi": jnp.zeros(2, int)}, "phi must be floating point"),
    ({"theta": {"w": jnp.zeros(2, bool)}}, r"theta\['w'\] must be floating"),
    ({"phi": {}}, "phi must have at least one"),
    ({"theta": jnp.zeros((0, 3))}, "theta must not be empty"),
    ({"theta": jnp.zeros(8, jnp.float16)}, "theta .*float16"),
    ({"inner": lambda t, f: t}, "inner must return one floating-point scalar"),
    ({"outer": lambda t, f: f}, "outer must return one floating-point scalar"),
    ({"acceptance": 0.0}, "acceptance"),
    (
      {
        "acceptance": 0.5,
        "bounds": None,
        "solver": EXACT,
        "operator": hypergrad.ift(),
      },
      "acceptance must be None without",
    ),
    ({"bounds": None}, "bounds must not be None: the operator"),
    (
      {
        "bounds": None,
        "operator": hypergrad.damped(0.1),
        "solver": hypergrad.neumann(3),
      },
      "bounds must not be None: the solver",
    ),
    ({"on_reject": "skip"}, "on_reject"),
    ({"fidelity": "exact"}, "fidelity"),
    ({"solver": 3}, "solver"),
    ({"max_explicit": 1, "correction": True}, "max_explicit=1"),
    (
      {
        "theta": jnp.zeros(100),
        "inner": lambda t, f: jnp.sum(t**2),
        "outer": lambda t, f: jnp.sum(t),
        "bounds": hypergrad.lanczos_bounds(4),
      },
      "num_steps must be at least",
    ),
  ],
)
def test_bad_input_is_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    _call(**changes)


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"step_clip": 0.0}, "step_clip"),
    ({"refresh_every": 0}, "refresh_every"),
  ],
)
def test_a_bad_outer_step_is_refused_by_name(arguments, message):
  inner, outer, _, _ = problems.small_quadratic()
  gradient = hypergrad.hypergradient(inner, outer)
  with pytest.raises(ValueError, match=message):
    hypergrad.outer_step(gradient, optax.sgd(0.1), **arguments)


def test_a_bad_attachment_is_refused_by_name():
  inner, _, theta, phi = problems.small_quadratic()
  with pytest.raises(ValueError, match="bounds must not be None"):
    hypergrad.attach(inner, bounds=None)
  with pytest.raises(ValueError, match="phi must be floating"):
    hypergrad.attach(inner)(theta, phi.astype(int))
  minimum = hypergrad.attach(lambda t, f: t * f[0])
  with pytest.raises(ValueError, match="inner must return one"):
    jax.grad(lambda f: jnp.sum(minimum(theta, f)))(phi)
