"""Verdicts of gates, against spectra and gradients that are known."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_mm import masking
from robust_mm import spectrum
from robust_mm.masking import blocks as blocks_lib
from robust_mm.masking import measures

SEEDS = jnp.arange(20)


def _verdicts(gate, params, value_fn, *, seed=0, destructive=None, **options):
  """The state after one update."""
  labels = {name: name for name in params}
  tx = masking.curvature_mask(
    optax.sgd(0.1), labels, gate=gate, seed=seed, **options
  )
  q = params if destructive is None else destructive
  g = jax.tree.map(jnp.zeros_like, params)
  run = jax.jit(
    lambda q: tx.update(
      g, tx.init(params), params, destructive=q, value_fn=value_fn
    )[1]
  )
  return run(q)


def _over_keys(gate, params, value_fn, number):
  """Gates ``{label: [number]}`` for as many start vectors, compiled once."""
  labels = {name: name for name in params}
  blocks = blocks_lib.Blocks(params, labels, None)
  cached = measures.initial(gate, blocks.gated, None)
  problem = measures.Problem(blocks, params, None, value_fn, None, False)
  run = lambda key: measures.measure(gate, problem, cached, key)  # noqa: E731
  keys = jax.random.split(jax.random.key(0), number)
  return jax.jit(jax.vmap(run))(keys)


def test_a_planted_saddle_is_closed_and_a_bowl_is_not():
  params = {"bowl": jnp.ones(3), "saddle": jnp.ones(3)}
  saddle, bowl = jnp.asarray([1, -0.5, 2]), jnp.asarray([1, 0.5, 2])

  def J(p):
    return jnp.sum(saddle * p["saddle"] ** 2) + jnp.sum(bowl * p["bowl"] ** 2)

  gate = masking.hessian_gate(tau=0.05)
  found = _over_keys(gate, params, J, 20)
  assert not np.any(found.gates["saddle"])
  assert np.all(found.gates["bowl"])
  assert np.all(found.verdicts["saddle"] == masking.CLOSED)
  assert np.all(found.verdicts["bowl"] == masking.OPEN)
  np.testing.assert_allclose(found.evidence["saddle"]["rho_min"], -1, rtol=1e-5)
  np.testing.assert_allclose(found.evidence["saddle"]["rho_max"], 4, rtol=1e-5)


def test_a_positive_semidefinite_hessian_is_never_closed():
  size, draws = 30, 100
  gate = masking.hessian_gate(tau=1e-4)

  @jax.jit
  @jax.vmap
  def run(key, rank):
    factor = (
      jax.random.normal(key, (size, size)) * (jnp.arange(size) < rank)[None]
    )
    H = jnp.matmul(factor, factor.T, precision="highest")
    params = {"w": jnp.ones(size)}
    blocks = blocks_lib.Blocks(params, {"w": "w"}, None)
    J = lambda p: jnp.sum(p["w"] * jnp.matmul(H, p["w"])) / 2  # noqa: E731
    problem = measures.Problem(blocks, params, None, J, None, False)
    cached = measures.initial(gate, blocks.gated, None)
    return measures.measure(gate, problem, cached, key)

  ranks = 1 + jnp.arange(draws) % size
  found = run(jax.random.split(jax.random.key(0), draws), ranks)
  assert np.all(found.gates["w"])
  assert not np.any(found.verdicts["w"] == masking.CLOSED)
  assert not np.any(found.failed["w"])


def test_the_published_gate_warns_once_and_is_always_open():
  with pytest.warns(UserWarning, match="never closes") as seen:
    gate = masking.published_gate()
  assert len(seen) == 1
  params = {"w": jnp.ones(3)}
  for scale in (1.0, -1.0, jnp.nan):
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      state = _verdicts(
        gate, params, lambda p, s=scale: s * jnp.sum(p["w"] ** 4)
      )
    assert state.gates["w"]
    assert state.closed_count["w"] == 0


def test_the_random_gate_closes_at_its_rate_block_by_block():
  params = {"a": jnp.ones(3), "b": jnp.ones(3)}
  found = _over_keys(masking.random_gate(rate=0.3), params, None, 2000)
  closed = {name: ~np.asarray(gate) for name, gate in found.gates.items()}
  for name, rows in closed.items():
    assert abs(rows.mean() - 0.3) < 0.05
    assert np.all((found.verdicts[name] == masking.CLOSED) == rows)
  assert abs(np.mean(closed["a"] & closed["b"]) - 0.09) < 0.03
  for rate, expected in ((0.0, True), (1.0, False)):
    state = _verdicts(masking.random_gate(rate=rate), params, None)
    assert {bool(gate) for gate in state.gates.values()} == {expected}
  with pytest.raises(ValueError, match="rate"):
    masking.random_gate(rate=1.5)


def _adapter_loss(activation, spectral_weight, x):
  def J(params):
    hidden = activation(
      jnp.matmul(x, params["adapter"]["in"]) + params["adapter"]["bias"][None]
    )
    Z = jnp.matmul(hidden, params["adapter"]["out"])
    return spectrum.collapse(Z, spectral_weight=spectral_weight).loss

  return J


def test_collapse_is_convex_in_a_linear_adapter_and_not_in_a_gelu_one():
  x = jax.random.normal(jax.random.key(0), (32, 10))

  def linear(params):
    Z = jnp.matmul(x, params["adapter"])
    loss = spectrum.collapse(Z, spectral_weight=0.0)
    # Its scale is held at the parameters, as a training step holds it.
    return loss.gaussian

  gate = masking.hessian_gate(tau=0.05)
  params = {"adapter": jax.random.normal(jax.random.key(1), (10, 6)) / 3}
  found = _over_keys(gate, params, linear, 10)
  assert not np.any(found.verdicts["adapter"] == masking.CLOSED)

  ratios = []
  J = _adapter_loss(jax.nn.gelu, 0.01, x)

  def init(key):
    one, two = jax.random.split(key)
    return {
      "in": jax.random.normal(one, (10, 16)) / 10**0.5,
      "bias": jnp.zeros(16),
      "out": jax.random.normal(two, (16, 8)) / 4,
    }

  measure = jax.jit(
    lambda params: _verdicts_of(masking.hessian_gate(), params, J)
  )
  for seed in range(3):
    params = {"adapter": init(jax.random.key(seed))}
    evidence = measure(params).evidence["adapter"]
    ratios.append(evidence["rho_min"] / abs(evidence["rho_max"]))
  assert min(ratios) < -0.05


def _verdicts_of(gate, params, value_fn):
  labels = {
    name: jax.tree.map(lambda _, n=name: n, params[name]) for name in params
  }
  blocks = blocks_lib.Blocks(params, labels, None)
  cached = measures.initial(gate, blocks.gated, None)
  problem = measures.Problem(blocks, params, None, value_fn, None, False)
  return measures.measure(gate, problem, cached, jax.random.key(0))


def test_closed_certifies_an_eigenvalue_below_and_a_miss_stays_open():
  size, tau = 60, 0.5
  gate = masking.hessian_gate(tau_absolute=tau, num_steps=10)

  @jax.jit
  @jax.vmap
  def run(key):
    A = jax.random.normal(key, (size, size)) / size**0.5
    A = (A + A.T) / 2
    # Eigenvalues around the threshold, of which few are below it.
    A = A + jax.random.uniform(key, (), minval=0.4, maxval=1.2) * jnp.eye(size)
    params = {"w": jnp.ones(size)}
    J = lambda p: jnp.sum(p["w"] * jnp.matmul(A, p["w"])) / 2  # noqa: E731
    return A, _verdicts_of(gate, params, J)

  matrices, found = run(jax.random.split(jax.random.key(3), 200))
  smallest = np.linalg.eigvalsh(np.asarray(matrices, np.float64))[:, 0]
  closed = found.verdicts["w"] == masking.CLOSED
  assert 20 < np.sum(closed) < 180
  assert np.all(smallest[closed] < -tau)
  opened = found.verdicts["w"] == masking.OPEN
  assert np.all(smallest[opened] >= -tau)
  # Ritz values have not got there yet: open, and said to be undecided.
  rho = np.asarray(found.evidence["w"]["rho_min"])
  missed = (smallest < -tau) & (rho > -tau)
  assert np.sum(missed) > 0
  assert np.all(found.gates["w"][missed])
  assert np.all(found.verdicts["w"][missed] == masking.UNDECIDED)


def test_undecided_goes_where_the_argument_says():
  # Concave in one direction of many, which ten products do not settle.
  curve = jnp.asarray(np.r_[-0.4, np.linspace(0, 1, 399)], jnp.float32)
  params = {"w": jnp.ones(400)}
  J = lambda p: jnp.sum(curve * p["w"] ** 2) / 2  # noqa: E731
  for undecided in ("open", "closed"):
    gate = masking.hessian_gate(tau=0.45, num_steps=10, undecided=undecided)
    found = _verdicts_of(gate, params, J)
    assert found.verdicts["w"] == masking.UNDECIDED
    assert bool(found.gates["w"]) == (undecided == "open")


@pytest.mark.parametrize(
  ("point", "cosine"), [((1.0, 0.1), 0.99 / 1.01), ((0.1, 1.0), -0.99 / 1.01)]
)
def test_direction_of_a_saddle_decides_the_directional_gate(point, cosine):
  params = {"xy": jnp.asarray(point), "z": jnp.ones(2)}

  def J(p):
    x, y = p["xy"]
    return (x**2 - y**2) / 2

  q = {"xy": jax.grad(J)(params)["xy"], "z": jnp.zeros(2)}
  for separable in (False, True):
    for scale in (1.0, 1e-25, 1e25):
      scaled = jax.tree.map(lambda a, s=scale: s * a, q)
      state = _verdicts(
        masking.directional_gate(),
        params,
        J,
        destructive=scaled,
        separable=separable,
      )
      found = state.evidence["xy"]["cosine"]
      np.testing.assert_allclose(found, cosine, atol=1e-5)
      assert bool(state.gates["xy"]) == (cosine > 0)
      # Not attacked: nothing measured, and open as it was.
      assert np.isnan(state.evidence["z"]["cosine"])
      assert state.gates["z"]


def test_a_block_that_is_not_attacked_keeps_its_gate():
  params = {"w": jnp.asarray([0.1, 1.0])}
  J = lambda p: (p["w"][0] ** 2 - p["w"][1] ** 2) / 2  # noqa: E731
  tx = masking.curvature_mask(
    optax.sgd(0.1), {"w": "w"}, gate=masking.directional_gate(), period=1
  )
  g = {"w": jnp.zeros(2)}
  update = jax.jit(
    lambda q, s: tx.update(g, s, params, destructive=q, value_fn=J)[1]
  )
  state = update(jax.grad(J)(params), tx.init(params))
  assert not state.gates["w"]
  state = update(g, state)
  assert not state.gates["w"]
  assert state.closed_count["w"] == 2


def test_separate_blocks_share_a_loop_with_the_same_verdicts():
  rng = np.random.default_rng(0)
  params = {n: jnp.ones(size) for n, size in (("a", 40), ("b", 25), ("c", 6))}
  spectra = {
    n: jnp.asarray(rng.normal(size=p.size) + 0.3, jnp.float32)
    for n, p in params.items()
  }

  def J(p):
    return sum(jnp.sum(spectra[n] * p[n] ** 2) for n in p) / 2

  # As many products as scalars: no start vector is left in the values.
  gate = masking.hessian_gate(num_steps=40)
  apart = _verdicts(gate, params, J)
  together = _verdicts(gate, params, J, separable="check")
  assert apart.gates == together.gates
  assert len(set(map(bool, apart.gates.values()))) == 2
  for label, spectrum_of_block in spectra.items():
    ends = {
      "rho_min": spectrum_of_block.min(),
      "rho_max": spectrum_of_block.max(),
    }
    for state in (apart, together):
      for end, exact in ends.items():
        np.testing.assert_allclose(state.evidence[label][end], exact, atol=2e-5)


def test_a_coupled_loss_is_refused_in_the_checked_mode_alone():
  params = {"a": jnp.ones(12), "b": jnp.ones(12)}
  J = lambda p: jnp.sum(p["a"] ** 2 * p["b"])  # noqa: E731
  gate = masking.hessian_gate()
  assert _verdicts(gate, params, J, separable=True).count == 1
  with pytest.raises(Exception, match="separable must be False"):
    jax.block_until_ready(_verdicts(gate, params, J, separable="check"))


def test_half_precision_parameters_are_measured_in_single():
  curve = jnp.asarray([1.0, -0.2, 3.0])
  J = lambda p: jnp.sum(curve * p["w"] ** 2) / 2  # noqa: E731
  params = {"w": jnp.ones(3, jnp.bfloat16)}
  found = _verdicts(masking.hessian_gate(tau=0.05), params, J)
  np.testing.assert_allclose(found.evidence["w"]["rho_min"], -0.2, atol=1e-5)
  assert not found.gates["w"]


def test_gates_are_hashable_values_and_refuse_bad_arguments():
  gate = masking.hessian_gate()
  assert gate == masking.hessian_gate(tau=0.5)
  assert len({gate, masking.hessian_gate(), masking.directional_gate()}) == 2
  loss = lambda p, e: jnp.sum(p["w"] * e)  # noqa: E731
  fisher = functools.partial(masking.fisher_mask, per_example_loss_fn=loss)
  assert hash(fisher()) == hash(fisher())
  for call, message in (
    (lambda: masking.hessian_gate(tau=-1.0), "tau must be non-negative"),
    (lambda: masking.hessian_gate(num_steps=9), "num_steps"),
    (lambda: masking.hessian_gate(failure_probability=0.0), "failure_prob"),
    (lambda: masking.hessian_gate(undecided="shut"), "undecided must be one"),
    (lambda: masking.hessian_gate(tau_absolute=-0.1), "tau_absolute"),
    (lambda: masking.directional_gate(tau=-0.1), "tau must lie"),
    (lambda: fisher(quantile=0.0), "quantile must lie in"),
    (lambda: fisher(decay=1.0), "decay must lie in"),
    (lambda: fisher(chunk_size=0), "chunk_size"),
    (masking.fisher_mask, "per_example_loss_fn must be given"),
  ):
    with pytest.raises(ValueError, match=message):
      call()
