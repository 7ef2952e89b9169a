"""Sharded parameters, memory, and what the compiler makes of a solve."""

import hypergrad_problems as problems
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import hypergrad

KEY = jax.random.key(0)
SOLVERS = [hypergrad.neumann(8), hypergrad.conjugate_gradient(8)]


def _mesh(kind, size=8):
  if jax.device_count() < 8:
    pytest.skip("needs 8 devices")
  axis_type = getattr(jax.sharding.AxisType, kind)
  return jax.make_mesh(
    (size,), ("x",), axis_types=(axis_type,), devices=jax.devices()[:size]
  )


def _network():
  keys = jax.random.split(KEY, 3)
  theta = {
    "w": jax.random.normal(keys[0], (6, 16)) / 2,
    "u": jax.random.normal(keys[1], (16, 3)) / 4,
  }
  x = jax.random.normal(keys[2], (32, 6))
  target = jnp.sin(x[:, :3])

  def loss(theta, inputs, target):
    hidden = jnp.tanh(jnp.einsum("bd,dh->bh", inputs, theta["w"]))
    # Contractions over an explicitly sharded axis must name their output.
    out = jnp.einsum(
      "bh,hk->bk", hidden, theta["u"], out_sharding=jax.P(None, None)
    )
    return jnp.mean((out - target) ** 2)

  def inner(theta, phi, batch):
    squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(theta))
    return loss(theta, *batch) + 0.5 * jnp.exp(phi[0]) * squares

  def outer(theta, phi, batch):
    return loss(theta, *batch) + 0.1 * phi[1] ** 2

  batches = (x[:16], target[:16]), (x[16:], target[16:])
  return inner, outer, theta, jnp.array([-3.0, 0.5]), batches


@pytest.mark.parametrize("solver", SOLVERS, ids=["neumann", "cg"])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_parameters_give_the_same_gradient(kind, solver):
  inner, outer, theta, phi, batches = _network()
  gradient = hypergrad.hypergradient(
    inner, outer, solver=solver, on_reject="keep"
  )
  run = jax.jit(gradient)
  # Two devices: with eight, simulated on two busy cores, the process aborted
  # now and then inside the CPU client; why is not known (perhaps collectives
  # that wait for each other in its thread pool).
  with jax.set_mesh(_mesh("Auto", 2)):
    alone, _ = run(theta, phi, *batches, key=KEY)
  mesh = _mesh(kind, 2)
  shard = lambda *spec: jax.sharding.NamedSharding(mesh, jax.P(*spec))  # noqa: E731
  with jax.set_mesh(mesh):
    placed = {
      "w": jax.device_put(theta["w"], shard(None, "x")),
      "u": jax.device_put(theta["u"], shard("x", None)),
    }
    rest = jax.device_put((phi, batches, KEY), shard())
    together, info = run(placed, rest[0], *rest[1], key=rest[2])
  np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
  assert np.all(together != 0)
  assert info.certified


@pytest.mark.parametrize(
  "solver", [*SOLVERS, hypergrad.neumann(2, max_steps=64)]
)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_solve_gathers_no_parameter(kind, solver):
  mesh = _mesh(kind)
  diagonal = jnp.linspace(0.5, 1, 64 * 8).reshape(64, 8)
  bounds = hypergrad.Interval(jnp.array(0.5), jnp.array(1.0), jnp.array(1.0))

  @jax.jit
  def run(diagonal, v):
    more = {}
    if solver.max_steps:
      small = lambda x, r: jnp.sum(r * r) < 1e-6 * jnp.sum(x * x)  # noqa: E731
      more = {"accept": small}
    return solver(lambda t: t * diagonal, v, bounds, **more)

  with jax.set_mesh(mesh):
    sharding = jax.sharding.NamedSharding(mesh, jax.P("x", None))
    arrays = jax.device_put((diagonal, diagonal**2), sharding)
    text = run.lower(*arrays).compile().as_text()
    found = run(*arrays)
  assert "all-gather" not in text
  assert "all-reduce" in text
  assert found.x.sharding.spec == jax.P("x", None) or kind == "Auto"
  np.testing.assert_allclose(found.x, diagonal, atol=1e-2)


def test_memory_does_not_grow_with_the_number_of_terms():
  inner, outer, theta, phi = problems.small_quadratic(size=256)

  def temporaries(num_steps):
    run = jax.jit(
      hypergrad.hypergradient(
        inner,
        outer,
        solver=hypergrad.neumann(num_steps),
        bounds=hypergrad.known_bounds(lower=0.2, upper=2.0),
      )
    )
    compiled = run.lower(theta, phi, key=KEY).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporaries(400) == temporaries(4)
