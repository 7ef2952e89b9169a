"""What every optax transformation owes, and what a mask refuses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

import robust_mm
from robust_mm import masking


def _params(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  return {
    "left": {"w": jax.random.normal(keys[0], (8, 6), dtype)},
    "right": {"w": jax.random.normal(keys[1], (8, 6), dtype)},
    "rest": {"w": jax.random.normal(keys[2], (8,), dtype)},
  }


def labels(params):
  return {
    name: jax.tree.map(lambda _, name=name: name, params[name])
    for name in params
  }


def J(params):
  """Curved both ways."""
  left, right = params["left"]["w"], params["right"]["w"]
  return jnp.sum(jnp.cos(left)) + jnp.sum(jnp.sin(right) ** 2)


def task(params, example):
  hidden = jnp.sum(example[:, None] * params["left"]["w"], axis=0)
  other = jnp.sum(example[:, None] * params["right"]["w"], axis=0)
  return jnp.sum(jnp.tanh(hidden) * jnp.sin(other)) + jnp.sum(
    example * params["rest"]["w"]
  )


GATES = {
  "hessian": masking.hessian_gate(tau=0.3, num_steps=10),
  "directional": masking.directional_gate(),
  "fisher": masking.fisher_mask(per_example_loss_fn=task, quantile=0.7),
  "random": masking.random_gate(rate=0.5),
}
CASES = [
  ("hessian", "mask", False),
  ("hessian", "freeze", True),
  ("hessian", "separate", True),
  ("directional", "separate", False),
  ("directional", "mask", True),
  ("fisher", "mask", False),
  ("fisher", "separate", False),
  ("random", "mask", False),
  ("random", "freeze", False),
]


def _make(gate, policy, separable, *, period=3, inner=None):
  return masking.curvature_mask(
    optax.adamw(1e-2) if inner is None else inner,
    labels,
    gate=GATES[gate],
    policy=policy,
    separable=separable,
    period=period,
    destructive_optimizer=(
      optax.sgd(0.05, momentum=0.9) if policy == "separate" else None
    ),
  )


def _step(tx, batch, scale=1.0):
  def step(params, state):
    g = jax.grad(
      lambda p: jnp.mean(jax.vmap(task, in_axes=(None, 0))(p, batch))
    )(params)
    # Six steps convex in "left", six concave, and so on: its gate flips.
    bend = jnp.where(state.count // 6 % 2 == 0, 10.0, -10.0)
    value_fn = lambda p: J(p) + bend * jnp.sum(p["left"]["w"] ** 2)  # noqa: E731
    q = jax.tree.map(lambda x: scale * x, jax.grad(value_fn)(params))
    updates, state = tx.update(
      g, state, params, destructive=q, value_fn=value_fn, fisher_batch=batch
    )
    return optax.apply_updates(params, updates), state

  return step


BATCH = jax.random.normal(jax.random.key(7), (16, 8))


@pytest.mark.parametrize(("gate", "policy", "separable"), CASES)
def test_one_trace_serves_refreshes_flips_and_a_saved_state(
  gate, policy, separable, caplog, tmp_path
):
  tx = _make(gate, policy, separable)
  step = jax.jit(_step(tx, BATCH, scale=3.0))
  params = _params()
  state, halfway, seen = tx.init(params), None, []
  num_steps = 50 if gate == "hessian" and policy == "mask" else 12
  with jax.log_compiles():
    for count in range(num_steps):
      if count == 7:
        halfway = params, state
      before = state
      params, state = step(params, state)
      if count % 3:
        assert state.gates == before.gates
        np.testing.assert_array_equal(
          jax.tree.leaves(state.evidence), jax.tree.leaves(before.evidence)
        )
      seen.append([bool(x) for x in state.gates.values()])
  compiled = [m for m in caplog.messages if re.match(r"Compiling.*\bstep\b", m)]
  assert len(compiled) == 1
  flips = np.diff(np.asarray(seen)[:, 0].astype(int)) != 0
  if gate != "random":  # by chance, of every third step
    assert np.sum(flips) == (0 if gate == "fisher" else (num_steps - 1) // 6)
  ocp.save(tmp_path / "state", halfway)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    halfway,
  )
  again, restored = ocp.load(tmp_path / "state", abstract)
  for _ in range(num_steps - 7):
    again, restored = step(again, restored)
  assert _bits(restored) == _bits((params, state)[1])
  assert _bits(again) == _bits(params)


def _bits(tree):
  def data(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()

  return [data(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(("gate", "policy", "separable"), CASES)
def test_parameter_trees_in_the_state_are_found_by_optax(
  gate, policy, separable
):
  tx, params = _make(gate, policy, separable), _params()
  state = tx.init(params)
  marked = optax.tree.map_params(
    tx, lambda x: "p", state, transform_non_params=lambda x: "other"
  )
  assert jax.tree.structure(marked) == jax.tree.structure(state)
  found = jax.tree.leaves(marked)
  # Two moments of three parameters; momentum of q; the Fisher diagonal.
  number = 6 + 3 * (policy == "separate") + 3 * (gate == "fisher")
  assert found.count("p") == number


@pytest.mark.parametrize(
  ("gate", "policy", "separable"), [CASES[0], CASES[1], CASES[2], CASES[5]]
)
def test_half_precision_runs_beside_single_precision_moments(
  gate, policy, separable
):
  # Moments are made for a copy in float32, as a trainer with master weights.
  adam = optax.scale_by_adam()
  inner = optax.GradientTransformationExtraArgs(
    lambda params: adam.init(
      jax.tree.map(lambda x: x.astype(jnp.float32), params)
    ),
    lambda g, s, params=None, **_: adam.update(
      jax.tree.map(lambda x: x.astype(jnp.float32), g), s
    ),
  )
  tx = _make(gate, policy, separable, inner=inner)
  params = _params(jnp.bfloat16)
  step = jax.jit(_step(tx, BATCH.astype(jnp.bfloat16)))
  state = tx.init(params)
  types = jax.tree.map(lambda x: x.dtype, state)
  for _ in range(2):
    params, state = step(params, state)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
  assert jax.tree.map(lambda x: x.dtype, state) == types
  for leaf in jax.tree.leaves(state.evidence):
    assert leaf.dtype == jnp.float32
  g = jax.tree.map(jnp.ones_like, params)
  updates, _ = tx.update(g, state, params)
  assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize(
  ("gate", "policy", "separable"), [CASES[1], CASES[4], CASES[6]]
)
def test_sharded_parameters_stay_sharded_and_move_the_same(
  gate, policy, separable, kind
):
  mesh = jax.make_mesh(
    (8,), ("x",), axis_types=(getattr(jax.sharding.AxisType, kind),)
  )

  def pointwise(params, example):
    # Entry by entry, so that the loss itself gathers nothing.
    return sum(jnp.sum(jnp.tanh(x * example)) for x in jax.tree.leaves(params))

  gates = {
    **GATES,
    "fisher": masking.fisher_mask(per_example_loss_fn=pointwise),
  }
  tx = masking.curvature_mask(
    optax.adamw(1e-2),
    labels,
    gate=gates[gate],
    policy=policy,
    separable=separable,
    period=2,
    destructive_optimizer=optax.sgd(0.1) if policy == "separate" else None,
  )
  g = jax.tree.map(lambda x: 0.1 * x, _params())

  @jax.jit
  def run(params, batch):
    state = tx.init(params)
    for _ in range(3):
      updates, state = tx.update(
        g,
        state,
        params,
        destructive=jax.grad(J)(params),
        value_fn=J,
        fisher_batch=batch,
      )
      params = optax.apply_updates(params, updates)
    return params, state.gates, state.evidence

  batch = jnp.linspace(-1, 2, 4)
  alone = run(_params(), batch)
  rows = jax.sharding.NamedSharding(mesh, jax.P("x"))
  with jax.set_mesh(mesh):
    g = jax.device_put(g, rows)
    placed = jax.device_put(_params(), rows)
    shared = run(placed, batch)
    text = run.lower(placed, batch).compile().as_text()
  assert "all-gather" not in text
  for leaf in jax.tree.leaves(shared[0]):
    assert leaf.sharding.is_equivalent_to(rows, leaf.ndim)
  for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(shared)):
    np.testing.assert_allclose(other, one, atol=1e-5)


def test_extra_arguments_reach_the_optimiser_and_no_own_ones():
  seen = {}

  def update_fn(updates, state, params=None, **extra):
    seen.update(extra)
    return updates, state

  inner = optax.GradientTransformationExtraArgs(lambda p: (), update_fn)
  tx = masking.curvature_mask(inner, labels)
  params = _params()
  tx.update(
    params, tx.init(params), params, destructive=params, value_fn=J, loss=3
  )
  assert set(seen) == {"loss"}
  plain = masking.curvature_mask(optax.sgd(0.1), labels)
  chained = optax.chain(optax.clip(1.0), plain)
  updates, _ = chained.update(
    params, chained.init(params), params, unknown=1, obj_fn=J
  )
  assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_vmap_over_models_gives_each_its_own_gates():
  params = {"w": jnp.stack([jnp.full(12, 0.1), jnp.full(12, 3.0)])}
  J = lambda p: jnp.sum(jnp.cos(p["w"]))  # noqa: E731
  tx = robust_mm.curvature_mask(optax.sgd(0.1), {"w": "w"})

  @jax.jit
  @jax.vmap
  def run(params):
    return tx.update(
      params, tx.init(params), params, destructive=params, value_fn=J
    )[1].gates["w"]

  np.testing.assert_array_equal(run(params), [False, True])


def test_without_a_gated_block_everything_is_let_in():
  tx = masking.curvature_mask(optax.sgd(1.0), labels, gated=[])
  params = _params()
  q = jax.tree.map(lambda x: 0.1 * jnp.sign(x) / 7, params)
  g = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(g, tx.init(params), params, destructive=q)
  for u, wanted in zip(jax.tree.leaves(updates), jax.tree.leaves(q)):
    np.testing.assert_allclose(u, -wanted, rtol=1e-6)


def _refused():
  sgd = optax.sgd(0.1)
  make = masking.curvature_mask
  params = _params()
  fisher = GATES["fisher"]

  def update(tx, g=params, p=params, **extra):
    return tx.update(g, tx.init(params), p, **extra)

  plain = make(sgd, labels)
  shape = {**params, "left": {"w": jnp.ones((8, 5))}}
  small = masking.hessian_gate(num_steps=10, failure_probability=1e-9)
  integer = {"left": jnp.zeros(3, jnp.int32)}
  return {
    "labels must have": lambda: make(sgd, {"left": "left"}).init(params),
    "gated names the label 'lef'": lambda: make(
      sgd, labels, gated=["lef"]
    ).init(params),
    "value_fn must be given": lambda: update(plain, destructive=params),
    "fisher_batch must be given": lambda: update(
      make(sgd, labels, gate=fisher), destructive=params
    ),
    "period": lambda: make(sgd, labels, period=0),
    "destructive_optimizer must": lambda: make(sgd, labels, policy="separate"),
    "destructive_optimizer is": lambda: make(
      sgd, labels, destructive_optimizer=sgd
    ),
    "policy must be one of": lambda: make(sgd, labels, policy="masked"),
    "policy must be 'mask'": lambda: make(
      sgd, labels, gate=fisher, policy="freeze"
    ),
    "gate must be a gate": lambda: make(sgd, labels, gate="hessian"),
    "separable must be one of": lambda: make(sgd, labels, separable="yes"),
    "destructive_clip": lambda: make(sgd, labels, destructive_clip=0.0),
    "fidelity must be one of": lambda: make(sgd, labels, fidelity="paper"),
    r"destructive\['left'\]\['w'\] must have shape": lambda: update(
      plain, destructive=shape, value_fn=J
    ),
    "destructive must have the structure": lambda: update(
      plain, destructive={"left": params["left"]}, value_fn=J
    ),
    "curvature_mask needs params": lambda: update(plain, p=None),
    "must be floating point, got int32": lambda: make(
      sgd, {"left": "left"}
    ).init(integer),
    "num_steps must be at least": lambda: make(sgd, labels, gate=small).init(
      params
    ),
  }


@pytest.mark.parametrize("message", _refused())
def test_bad_arguments_are_named(message):
  with pytest.raises(ValueError, match=message):
    _refused()[message]()
