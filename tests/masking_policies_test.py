"""What an optimiser sees of a destructive gradient, by policy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_mm import masking

PARAMS = {
  "bowl": jnp.linspace(0.5, 1.5, 12),
  "saddle": jnp.linspace(-1, 1, 12).reshape(3, 4),
  "rest": jnp.ones(2),
}
LABELS = {name: name for name in PARAMS}
GATE = masking.hessian_gate(tau=0.05, num_steps=12)


def J(params):
  """Convex in one block, concave somewhere in the other."""
  curve = jnp.linspace(-1, 1, 12).reshape(3, 4)
  bowl = jnp.sum(params["bowl"] ** 2)
  return 0.1 * (bowl + jnp.sum(curve * params["saddle"] ** 2))


def _gradient(seed, params=PARAMS, scale=0.1):
  keys = jax.random.split(jax.random.key(seed), len(params))
  return {
    name: scale * jax.random.normal(key, params[name].shape)
    for name, key in zip(sorted(params), keys)
  }


def _mask(inner, **options):
  options = {"gate": GATE, "destructive_clip": None, **options}
  return masking.curvature_mask(inner, LABELS, **options)


def _one(tx, g, params=PARAMS, **extra):
  return jax.jit(lambda g: tx.update(g, tx.init(params), params, **extra))(g)


def _same(left, right):
  pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right))
  return all(
    np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs
  )


def test_open_gates_are_the_sum_and_closed_ones_the_task_bit_for_bit():
  inner, g, q = optax.adamw(1e-2), _gradient(0), _gradient(1)
  g["saddle"] = g["saddle"].at[0].set(-0.0)
  total = jax.tree.map(jnp.add, g, q)

  def expected(gradient):
    return _one(inner, gradient)[0]

  opened, state = _one(
    _mask(inner), g, destructive=q, value_fn=lambda p: J(p) * 0
  )
  assert all(map(bool, state.gates.values()))
  assert _same(opened, expected(total))
  closed, state = _one(
    _mask(inner, gated=["bowl", "saddle", "rest"]),
    g,
    destructive=q,
    value_fn=lambda p: -sum(jnp.sum(x**2) for x in p.values()),
  )
  assert not any(map(bool, state.gates.values()))
  assert _same(closed, expected(g))
  mixed, state = _one(_mask(inner), g, destructive=q, value_fn=J)
  assert state.gates["bowl"]
  assert not state.gates["saddle"]
  wanted = expected({**total, "saddle": g["saddle"]})
  assert _same(mixed, wanted)
  assert not _same(mixed, expected(total))


@pytest.mark.parametrize("policy", ["mask", "separate", "freeze"])
def test_without_a_destructive_gradient_it_is_the_optimiser_alone(policy):
  inner = optax.adamw(1e-2)
  momentum = optax.sgd(0.1, momentum=0.9) if policy == "separate" else None
  tx = _mask(inner, policy=policy, destructive_optimizer=momentum)
  run = jax.jit(lambda g, s: tx.update(g, s, PARAMS))
  alone = jax.jit(lambda g, s: inner.update(g, s, PARAMS))
  state, other = tx.init(PARAMS), inner.init(PARAMS)
  for seed in range(3):
    updates, state = run(_gradient(seed), state)
    wanted, other = alone(_gradient(seed), other)
    if policy == "freeze":
      # Other kernels: compiled block by block, the last bit may differ.
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        updates,
        wanted,
      )
    else:
      assert _same(updates, wanted)
  assert state.count == 3


def _freeze_run(zero_gradients):
  """(path of the saddle block, inner states) of ten AdamW steps."""
  inner = optax.adamw(1e-2, weight_decay=0.1)
  tx = inner if zero_gradients else _mask(inner, policy="freeze", period=100)

  @jax.jit
  def step(params, state, g):
    if zero_gradients:
      # Two steps of learning first, so that there is a momentum.
      g = {**g, "saddle": g["saddle"] * (state[0].count < 2)}
      updates, state = tx.update(g, state, params)
    else:
      updates, state = tx.update(g, state, params, destructive=g, value_fn=J)
    return optax.apply_updates(params, updates), state

  params, state = PARAMS, tx.init(PARAMS)
  path, states = [], []
  for seed in range(10):
    params, state = step(params, state, _gradient(seed))
    path.append(params)
    states.append(state)
  return path, states


def test_freeze_stops_a_block_and_zero_gradients_do_not():
  path, states = _freeze_run(zero_gradients=False)
  for params in path:
    assert _same(params["saddle"], PARAMS["saddle"])
  held = [s.inner_state.inner_states["saddle"] for s in states]
  moments = [h.inner_state.inner_state for h in held]
  assert all(_same(m, moments[0]) for m in moments)
  assert not _same(path[-1]["bowl"], PARAMS["bowl"])
  assert not _same(path[-1]["rest"], PARAMS["rest"])
  assert states[-1].closed_count["saddle"] == 10
  path, _ = _freeze_run(zero_gradients=True)
  travelled = np.abs(path[-1]["saddle"] - path[1]["saddle"])
  assert np.max(travelled) > 0.1 * 1e-2


def _travel(policy, lr, num_steps=60):
  """How far the block moves after the gate closed at step 20, in ``lr``."""
  inner = optax.adam(lr)
  destructive = optax.sgd(0.1, momentum=0.9) if policy == "separate" else None
  tx = _mask(inner, policy=policy, destructive_optimizer=destructive, period=20)
  q = {**_gradient(0), "saddle": jnp.ones((3, 4)), "rest": jnp.zeros(2)}
  q = {**q, "bowl": jnp.zeros(12)}
  g = jax.tree.map(jnp.zeros_like, q)
  concave = lambda p, n: jnp.where(n < 20, 0, -1) * jnp.sum(p["saddle"] ** 2)  # noqa: E731

  def step(carry, _):
    params, state = carry
    updates, after = tx.update(
      g,
      state,
      params,
      destructive=q,
      value_fn=lambda p: concave(p, state.count),
    )
    return (optax.apply_updates(params, updates), after), params["saddle"]

  run = jax.jit(
    lambda: jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), length=num_steps)
  )
  (params, state), path = run()
  assert state.closed_count["saddle"] == num_steps - 20
  assert np.max(np.abs(path[20] - path[0])) > lr
  return np.max(np.abs(params["saddle"] - path[20])) / lr


def test_separate_stops_at_once_and_mask_travels_on_its_momentum():
  assert _travel("separate", 1e-2) == 0
  assert 5 < _travel("mask", 1e-2) < 15


def test_a_destructive_gradient_is_clipped_by_block():
  g = jax.tree.map(jnp.zeros_like, PARAMS)
  q = {**_gradient(0, scale=10), "bowl": jnp.full(12, 1e-3)}
  tx = _mask(optax.sgd(1.0), destructive_clip=0.5, gate=GATE)
  flat = lambda p: 0.0 * J(p)  # noqa: E731
  updates, _ = _one(tx, g, destructive=q, value_fn=flat)
  np.testing.assert_allclose(jnp.linalg.norm(updates["saddle"]), 0.5, rtol=1e-5)
  np.testing.assert_allclose(jnp.linalg.norm(updates["rest"]), 0.5, rtol=1e-5)
  assert _same(updates["bowl"], -q["bowl"])
  huge = jax.tree.map(lambda a: a * 1e15, q)
  updates, state = _one(tx, g, destructive=huge, value_fn=flat)
  np.testing.assert_allclose(jnp.linalg.norm(updates["saddle"]), 0.5, rtol=1e-5)
  assert state.nonfinite_count["saddle"] == 0


@pytest.mark.parametrize("policy", ["mask", "separate"])
def test_a_spoiled_gradient_reaches_nothing(policy):
  q = _gradient(0)
  q["saddle"] = q["saddle"].at[0, 0].set(jnp.nan)  # closed
  q["bowl"] = q["bowl"].at[3].set(jnp.inf)  # open
  q["rest"] = q["rest"].at[0].set(jnp.nan)  # has no gate
  options = {"policy": policy, "destructive_clip": 1.0}
  if policy == "separate":
    options["destructive_optimizer"] = optax.sgd(0.1, momentum=0.9)
  updates, state = _one(
    _mask(optax.sgd(0.1), **options), _gradient(1), destructive=q, value_fn=J
  )
  assert _same(updates, jax.tree.map(lambda g: -0.1 * g, _gradient(1)))
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.inner_state))
  counts = {name: int(n) for name, n in state.nonfinite_count.items()}
  assert counts == {"bowl": 1, "saddle": 1, "rest": 1}
  assert state.gates["bowl"]


@pytest.mark.parametrize(
  "gate", [GATE, masking.directional_gate()], ids=["hessian", "directional"]
)
def test_a_curvature_that_is_not_finite_is_undecided_and_closed(gate):
  g, tx = _gradient(1), _mask(optax.sgd(0.1), gate=gate, period=2)
  blow = lambda p, n: J(p) / jnp.where(n < 2, 0.0, 1.0)  # noqa: E731
  update = jax.jit(
    lambda s: tx.update(
      g,
      s,
      PARAMS,
      destructive=jax.grad(J)(PARAMS),
      value_fn=lambda p: blow(p, s.count),
    )
  )
  updates, state = update(tx.init(PARAMS))
  for name in ("bowl", "saddle"):
    assert state.verdicts[name] == masking.UNDECIDED
    assert not state.gates[name]
    assert state.nonfinite_count[name] == 1
    np.testing.assert_allclose(updates[name], -0.1 * g[name], rtol=1e-6)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates))
  _, state = update(state)  # nothing is measured anew, or counted
  assert state.nonfinite_count["bowl"] == 1
  _, state = update(state)
  assert state.gates["bowl"]
  assert state.closed_count["bowl"] == 2


def _task_loss(params, example):
  return sum(jnp.sum(params[n] * jnp.ravel(example)[0]) for n in params) + (
    jnp.sum(params["bowl"] * example)
  )


@pytest.mark.parametrize("policy", ["mask", "separate"])
def test_fisher_mask_moves_what_the_task_does_not_need(policy):
  # Slopes 1 + x in "bowl" with x = 0..11 / 11 scaled: an order that is known.
  example = jnp.linspace(0.1, 1, 12)[None] * jnp.ones((8, 1))
  gate = masking.fisher_mask(per_example_loss_fn=_task_loss, quantile=0.5)
  momentum = optax.sgd(1.0, momentum=0.9) if policy == "separate" else None
  tx = _mask(
    optax.sgd(1.0), gate=gate, policy=policy, destructive_optimizer=momentum
  )
  g = jax.tree.map(jnp.zeros_like, PARAMS)
  q = jax.tree.map(jnp.ones_like, PARAMS)
  updates, state = _one(tx, g, destructive=q, fisher_batch=example)
  np.testing.assert_array_equal(updates["bowl"], [-1.0] * 6 + [0.0] * 6)
  # All slopes alike: ties are all kept. And a block without a gate is free.
  np.testing.assert_array_equal(updates["saddle"], -1.0)
  np.testing.assert_array_equal(updates["rest"], -1.0)
  report = masking.gate_report(state)
  assert report["bowl"]["kept_share"] == 0.5
  assert report["bowl"]["rate"] == 0.5
  assert report["saddle"]["rate"] == 0
  assert np.all(state.fisher["rest"] == 0)
  np.testing.assert_allclose(
    state.fisher["bowl"], 0.01 * (example[0] + 0.1) ** 2, rtol=1e-5
  )
  spoiled = example.at[0, 0].set(jnp.nan)
  updates, state = _one(tx, g, destructive=q, fisher_batch=spoiled)
  assert np.all(updates["bowl"] == 0)
  assert np.all(state.fisher["bowl"] == 0)
  assert state.verdicts["bowl"] == masking.UNDECIDED


def test_masks_nest_by_name():
  outer = masking.curvature_mask(
    _mask(optax.sgd(1.0), name="forget"),
    LABELS,
    gate=masking.directional_gate(),
    destructive_clip=None,
  )
  g, q = _gradient(0), _gradient(1)
  updates, state = _one(
    outer,
    g,
    destructive=jax.tree.map(jnp.zeros_like, q),
    value_fn=J,
    forget_destructive=q,
    forget_value_fn=J,
  )
  assert _same(updates["bowl"], -(g["bowl"] + q["bowl"]))
  assert _same(updates["saddle"], -g["saddle"])
  report = masking.gate_report(state)
  assert set(report) == {"bowl", "saddle", "2/bowl", "2/saddle"}
  assert not report["2/saddle"]["gate"]
  assert report["2/saddle"]["verdict"] == masking.CLOSED
  assert masking.VERDICTS[int(report["saddle"]["verdict"])] == "open"


def test_clip_before_and_schedule_after_go_on_while_a_block_is_frozen():
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    _mask(optax.scale_by_adam(), policy="freeze"),
    optax.scale_by_schedule(lambda count: -0.1 / (1 + count)),
  )
  step = jax.jit(
    lambda g, s: tx.update(g, s, PARAMS, destructive=g, value_fn=J)
  )
  state = tx.init(PARAMS)
  for seed in range(4):
    updates, state = step(_gradient(seed), state)
  assert np.all(updates["saddle"] == 0)
  assert np.any(updates["bowl"] != 0)
  assert state[2].count == 4
  held = state[1].inner_state.inner_states
  assert held["saddle"].inner_state.inner_state.count == 0
  assert held["bowl"].inner_state.inner_state.count == 4
  assert masking.gate_report(state)["saddle"]["rate"] == 1
  with pytest.raises(ValueError, match="opt_state must hold"):
    masking.gate_report(state[0])


def test_published_fidelity_lets_everything_in():
  inner, g, q = optax.adamw(1e-2), _gradient(0), _gradient(1)
  with pytest.warns(UserWarning, match="never closes"):
    tx = masking.curvature_mask(
      inner, LABELS, fidelity="published", destructive_clip=None
    )
  updates, state = _one(tx, g, destructive=q)  # measures nothing: no value_fn
  assert _same(updates, _one(inner, jax.tree.map(jnp.add, g, q))[0])
  assert all(map(bool, state.gates.values()))
  with pytest.raises(ValueError, match="gate and policy must be left out"):
    functools.partial(masking.curvature_mask, inner, LABELS)(
      gate=GATE, fidelity="published"
    )
