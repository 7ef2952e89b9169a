"""What an attack must never do, for random inputs, budgets and ranges."""

import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import attacks

SHAPES = {"a": (6, 5), "b": (6, 2, 3), "c": (6, 4)}
NUM_CLASSES = 3
KEY = jax.random.key(7)
LABEL = jnp.asarray([0, 1, 2, 0, 1, 2])


def _weights(seed=0):
  rng = np.random.default_rng(seed)
  return {
    m: jnp.asarray(rng.normal(size=(int(np.prod(s[1:])), 8)), "f4")
    for m, s in SHAPES.items()
  }


WEIGHTS = _weights()
HEAD = jnp.asarray(np.random.default_rng(1).normal(size=(8, 3)), "f4")


def logits_fn(inputs):
  parts = [
    jnp.reshape(inputs[m], (inputs[m].shape[0], -1)).astype("f4") @ WEIGHTS[m]
    for m in SHAPES
  ]
  return jnp.tanh(sum(parts)) @ HEAD


def _inputs(seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  return {
    m: jnp.asarray(scale * rng.uniform(-1, 1, size=shape), "f4")
    for m, shape in SHAPES.items()
  }


def _sizes(adversarial, inputs, norm, units):
  """``[m, b]`` in fp64."""
  sizes = []
  for m in SHAPES:
    change = np.asarray(adversarial[m], "f8") - np.asarray(inputs[m], "f8")
    change = change.reshape(len(change), -1) / units[m]
    order = 2 if norm == "l2" else np.inf
    sizes.append(np.linalg.norm(change, order, axis=1))
  return np.array(sizes)


UNITS = {"a": 0.5, "b": 1.0, "c": 3.0}
PARTIAL = {"norm": "l2", "num_steps": 3, "num_restarts": 2}
RANGE = {"a": (-1.0, 1.0), "b": (-0.5, 0.5)}
RUNS = {
  norm: jax.jit(
    lambda inputs, budget, norm=norm: attacks.pgd(
      norm=norm,
      budget=1.0,
      num_steps=3,
      num_restarts=2,
      units=UNITS,
      valid_range=RANGE,
    )(KEY, logits_fn, inputs, LABEL, budget=budget)
  )
  for norm in ("l2", "linf")
}


def _jitted(attack, logits_fn, **arguments):
  return jax.jit(
    lambda inputs: attack(KEY, logits_fn, inputs, LABEL, **arguments)
  )


budgets = st.floats(2.0**-13, 1024.0, width=32)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
  norm=st.sampled_from(["l2", "linf"]),
  scale=st.sampled_from([1e-3, 1.0, 1e4]),
  seed=st.integers(0, 5),
  joint=st.booleans(),
  budget=st.tuples(budgets, budgets, budgets),
)
def test_size_and_range_are_kept(norm, scale, seed, joint, budget):
  inputs = _inputs(seed, scale)
  given = np.asarray(budget, "f4")
  argument = given[0] if joint else dict(zip(SHAPES, given))
  adversarial = RUNS[norm](inputs, argument)
  sizes = _sizes(adversarial, inputs, norm, UNITS)
  if joint:
    sizes = np.linalg.norm(sizes, 2 if norm == "l2" else np.inf, axis=0)[None]
    given = given[:1]
  assert np.all(sizes <= given[:, None].astype("f8") * (1 + 1e-6))
  for m, (low, high) in RANGE.items():
    clean, moved = np.asarray(inputs[m]), np.asarray(adversarial[m])
    assert np.all(moved >= np.minimum(clean, low))
    assert np.all(moved <= np.maximum(clean, high))


def test_the_bound_of_the_size_is_not_slack():
  inputs = _inputs()
  for norm in ("l2", "linf"):
    adversarial = RUNS[norm](inputs, np.float32(0.01))
    sizes = _sizes(adversarial, inputs, norm, UNITS)
    total = np.linalg.norm(sizes, 2 if norm == "l2" else np.inf, axis=0)
    assert np.all(total >= 0.01 * (1 - 1e-3))


def test_half_precision_keeps_dtype_and_size():
  dtype = jnp.bfloat16
  inputs = {m: x.astype(dtype) for m, x in _inputs().items()}
  for norm in ("l2", "linf"):
    adversarial = RUNS[norm](inputs, np.float32(0.3))
    assert all(adversarial[m].dtype == dtype for m in SHAPES)
    sizes = _sizes(adversarial, inputs, norm, UNITS)
    total = np.linalg.norm(sizes, 2 if norm == "l2" else np.inf, axis=0)
    assert np.all(total <= 0.3 * (1 + 1e-6))
    assert np.all(total > 0.2)


def test_double_precision_beside_single():
  with jax.enable_x64(True):
    inputs = {
      m: jnp.asarray(np.asarray(x), "f8" if m == "b" else "f4")
      for m, x in _inputs().items()
    }
    attack = attacks.pgd(budget=0.3, **PARTIAL)
    adversarial = _jitted(attack, logits_fn)(inputs)
    assert {m: x.dtype for m, x in adversarial.items()} == {
      m: x.dtype for m, x in inputs.items()
    }


def test_size_is_kept_for_a_large_input():
  rng = np.random.default_rng(0)
  x = jnp.asarray(100 + rng.normal(size=(2, 200_000)), "f4")
  w = jnp.asarray(rng.normal(size=(200_000, 2)) / 500, "f4")
  attack = attacks.pgd(norm=2, budget=1.0, num_steps=3, num_restarts=1)
  label = jnp.asarray([0, 1])
  moved = jax.jit(
    lambda x: attack(KEY, lambda inputs: inputs["x"] @ w, {"x": x}, label)
  )(x)["x"]
  size = np.linalg.norm(np.asarray(moved, "f8") - np.asarray(x, "f8"), axis=1)
  assert np.all(size <= 1 + 1e-6)
  assert np.all(size > 0.99)


def test_zero_budget_is_bit_identical():
  inputs = _inputs()
  inputs["c"] = inputs["c"].at[0, 0].set(-0.0).at[0, 1].set(jnp.nan)

  def blind_fn(inputs):
    return logits_fn({**inputs, "c": jnp.zeros_like(inputs["c"])})

  attack = attacks.fgm(norm=2, budget={"a": 0.3, "b": 0.0})
  adversarial = attack(KEY, blind_fn, inputs, LABEL)
  assert adversarial["b"] is inputs["b"]
  assert adversarial["c"] is inputs["c"]
  assert np.all(np.any(adversarial["a"] != inputs["a"], axis=-1))

  @jax.jit
  def run(budget):
    return attack(KEY, blind_fn, inputs, LABEL, budget=budget)

  traced = run({"a": 0.3, "b": 0.0, "c": 0.0})
  for m in ("b", "c"):
    assert np.asarray(traced[m]).tobytes() == np.asarray(inputs[m]).tobytes()
  np.testing.assert_allclose(traced["a"], adversarial["a"], atol=1e-6)
  for budget in (0.0, -1.0, float("nan")):
    still = run({m: budget for m in SHAPES})
    for m in SHAPES:
      assert np.asarray(still[m]).tobytes() == np.asarray(inputs[m]).tobytes()


def test_all_zero_returns_the_same_arrays():
  inputs = _inputs()
  for budget in (0.0, {}, {"a": 0}):
    adversarial = attacks.fgm(norm=2, budget=budget)(
      KEY, logits_fn, inputs, LABEL
    )
    assert all(adversarial[m] is inputs[m] for m in SHAPES)


@pytest.mark.parametrize("factory", ["fgm", "pgd"])
def test_absent_modality_is_left_alone_though_poisoned(factory):
  inputs = _inputs()
  present = {"b": jnp.asarray([True, False] * 3)}
  flag = present["b"][:, None, None]

  def masked_fn(inputs):
    return logits_fn({**inputs, "b": jnp.where(flag, inputs["b"], 0)})

  poisoned = {**inputs, "b": jnp.where(flag, inputs["b"], jnp.nan)}
  attack = attacks.make(factory, norm=2, budget=0.5, valid_range=(-1.0, 1.0))
  run = jax.jit(
    lambda inputs: attack(KEY, masked_fn, inputs, LABEL, present=present)
  )
  clean, attacked = run(inputs), run(poisoned)
  kept = ~present["b"]
  assert np.all(np.isnan(attacked["b"][kept]))
  np.testing.assert_array_equal(clean["b"][kept], inputs["b"][kept])
  for m in ("a", "c"):
    np.testing.assert_array_equal(clean[m], attacked[m])
    assert np.all(np.isfinite(attacked[m]))
  assert np.all(np.any(attacked["b"] != inputs["b"], (1, 2))[~kept])


def test_tokens_are_never_attacked():
  inputs = {**_inputs(), "c": jnp.ones((6, 4), jnp.int32)}
  attack = attacks.fgm(norm=2, budget=0.5)
  adversarial = attack(KEY, logits_fn, inputs, LABEL)
  assert adversarial["c"] is inputs["c"]
  assert np.all(np.any(adversarial["a"] != inputs["a"], axis=-1))
  fine = attack(KEY, logits_fn, inputs, LABEL, budget={"a": 0.1, "c": 0.0})
  assert fine["c"] is inputs["c"]
  with pytest.raises(ValueError, match=r"budget\['c'\] must be 0; 'c' holds"):
    attack(KEY, logits_fn, inputs, LABEL, budget={"c": 0.1})


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"norm": 3}, "norm must be one of"),
    ({"budget": -1.0}, "budget must be non-negative and finite, got -1.0"),
    ({"budget": {"a": float("inf")}}, r"budget\['a'\] must be non-negative"),
    ({"budget": float("nan")}, "budget must be non-negative and finite"),
    ({"budget": None}, "budget must be a number"),
    ({"budget": np.ones((2, 2))}, r"budget must be a scalar or .* \[b\]"),
    ({"num_steps": 0}, "num_steps must be an integer of at least 1"),
    ({"num_restarts": 0}, "num_restarts must be an integer of at least 1"),
    ({"step_size": 0.0}, "step_size must be positive"),
    ({"loss": "hinge"}, "loss must be one of"),
    ({"targets": "all"}, "targets must be one of"),
    ({"targets": "any", "random_start": False}, "num_restarts must be 1"),
    ({"units": {"a": 0.0}}, r"units\['a'\] must be positive"),
    ({"units": "relative"}, "units must map modalities"),
    ({"valid_range": (1.0, 0.0)}, "valid_range needs low < high"),
    ({"valid_range": {"a": 1.0}}, r"valid_range\['a'\] must be \(low, high\)"),
  ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
  with pytest.raises(ValueError, match=message):
    attacks.pgd(**{"norm": 2, "budget": 1.0, **arguments})


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"budget": {"d": 1.0}}, "budget names the unknown modality 'd'"),
    ({"units": {"d": 1.0}}, "units names the unknown modality 'd'"),
    ({"valid_range": {"d": (0, 1)}}, "valid_range names the unknown modality"),
    ({"valid_range": {"a": (np.zeros(4), 1)}}, "valid_range of 'a' has shape"),
    ({"budget": np.ones(5)}, "budget has 5 numbers for 6 examples"),
  ],
)
def test_bad_calls_are_refused_by_name(arguments, message):
  attack = attacks.pgd(**{"norm": 2, "budget": 1.0, **arguments})
  with pytest.raises(ValueError, match=message):
    attack(KEY, logits_fn, _inputs(), LABEL)


def test_bad_labels_and_logits_are_refused():
  attack = attacks.fgm(norm=2, budget=1.0)
  with pytest.raises(ValueError, match="label must be integer class indices"):
    attack(KEY, logits_fn, _inputs(), LABEL[:3])
  with pytest.raises(ValueError, match=r"label must lie in 0\.\.2"):
    attack(KEY, logits_fn, _inputs(), LABEL + 1)
  with pytest.raises(
    ValueError, match=r"logits_fn must return logits \[b, k\]"
  ):
    attack(KEY, lambda x: logits_fn(x)[0], _inputs(), LABEL)
  with pytest.raises(ValueError, match="name must be one of 'apgd', 'auto', "):
    attacks.make("pdg", norm=2, budget=1.0)


def test_settings_state_the_attack():
  attack = attacks.make(
    "pgd",
    norm=jnp.inf,
    budget={"a": np.float32(0.5)},
    num_steps=7,
    valid_range={"a": (np.zeros(2), 1)},
    units=UNITS,
  )
  assert json.loads(json.dumps(attack.settings)) == {
    "name": "pgd",
    "norm": "linf",
    "budget": {"a": 0.5},
    "loss": "margin",
    "valid_range": {"a": [[0.0, 0.0], 1]},
    "units": UNITS,
    "num_steps": 7,
    "num_restarts": 5,
    "step_size": None,
    "random_start": True,
    "targets": "rivals",
  }
  attack.settings["norm"] = "changed"
  assert attack.settings["norm"] == "linf"
  required = {"name", "norm", "loss", "num_steps", "num_restarts", "step_size"}
  required |= {"valid_range", "units"}
  assert required <= set(attacks.fgm(norm=2, budget=0.1).settings)
  known = ("apgd", "auto", "fgm", "minimum_norm", "pgd", "square")
  assert attacks.names() == known
