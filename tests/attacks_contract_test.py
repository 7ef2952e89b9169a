"""What every attack must keep, whatever its search does."""

import attacks_bounds_test as bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import attacks

SMALL = {
  "apgd": {
    "targets": "rivals",
    "num_targets": 2,
    "num_steps": 4,
    "loss": "margin",
  },
  "minimum_norm": {"num_targets": 2, "num_steps": 4, "num_restarts": 2},
  "square": {"num_queries": 12},
}
KEY = jax.random.key(11)


def _make(name, **arguments):
  return attacks.make(name, **{**SMALL[name], **arguments})


def test_every_attack_is_here_or_tested_beside():
  assert set(attacks.names()) - set(SMALL) == {"auto", "fgm", "pgd"}


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", SMALL)
def test_sizes_ranges_and_what_must_not_move(name, norm, joint):
  attack = _make(
    name, norm=norm, budget=1.0, units=bounds.UNITS, valid_range=bounds.RANGE
  )
  inputs = bounds._inputs(3)
  present = {"b": jnp.asarray([True, False] * 3)}
  flag = present["b"][:, None, None]
  poisoned = {**inputs, "b": jnp.where(flag, inputs["b"], jnp.nan)}

  def logits_fn(inputs):
    return bounds.logits_fn({**inputs, "b": jnp.where(flag, inputs["b"], 0)})

  @jax.jit
  def run(budget):
    return attack(
      KEY, logits_fn, poisoned, bounds.LABEL, present=present, budget=budget
    )

  for size in (1e-3, 0.3, 5.0):
    budget = np.float32(size)
    if not joint:
      budget = {"a": budget, "b": 2 * budget, "c": np.float32(0)}
    moved = run(budget)
    assert np.all(np.isnan(np.asarray(moved["b"])[1::2]))
    known = {**moved, "b": jnp.where(flag, moved["b"], inputs["b"])}
    sizes = bounds._sizes(known, inputs, norm, bounds.UNITS)
    if joint:
      order = 2 if norm == "l2" else np.inf
      assert np.all(np.linalg.norm(sizes, order, axis=0) <= size * (1 + 1e-6))
    else:
      assert np.all(sizes <= np.array([[1], [2], [0]]) * size * (1 + 1e-6))
      assert (
        np.asarray(moved["c"]).tobytes() == np.asarray(inputs["c"]).tobytes()
      )
    for m, (low, high) in bounds.RANGE.items():
      clean, x = np.asarray(inputs[m]), np.asarray(known[m])
      assert np.all(x >= np.minimum(clean, low))
      assert np.all(x <= np.maximum(clean, high))


@pytest.mark.parametrize("name", SMALL)
def test_dtypes_are_kept_whatever_the_logits_have(name):
  attack = _make(name, norm=2, budget=0.5, valid_range=(-2.0, 2.0))
  with jax.enable_x64(True):
    inputs = {
      m: jnp.asarray(np.asarray(x), "f8" if m == "b" else "bfloat16")
      for m, x in bounds._inputs().items()
    }
    moved = bounds._jitted(attack, bounds.logits_fn)(inputs)
    assert {m: x.dtype for m, x in moved.items()} == {
      m: x.dtype for m, x in inputs.items()
    }

  for dtype in ("bfloat16", "float32"):
    inputs = {m: x.astype(dtype) for m, x in bounds._inputs().items()}

    def logits_fn(inputs, dtype=dtype):
      return bounds.logits_fn(inputs).astype(dtype)

    moved = bounds._jitted(attack, logits_fn)(inputs)
    assert all(x.dtype == dtype for x in moved.values())


@pytest.mark.parametrize(
  "axis_type, norm", [("Auto", "l2"), ("Explicit", "l2"), ("Explicit", "linf")]
)
@pytest.mark.parametrize("name", SMALL)
def test_eight_devices_agree_with_one(name, axis_type, norm):
  rng = np.random.default_rng(0)
  weight = jnp.asarray(rng.normal(size=(6, 3)), "f4")
  inputs = {"x": jnp.asarray(rng.normal(size=(16, 6)), "f4")}
  label = jnp.argmax(inputs["x"] @ weight, axis=-1).astype(jnp.int32)
  attack = _make(name, norm=norm, budget=0.4, valid_range=(-3.0, 3.0))
  axis = getattr(jax.sharding.AxisType, axis_type)
  mesh = jax.make_mesh((8,), ("data",), (axis,))
  sharding = jax.NamedSharding(mesh, jax.P("data"))

  @jax.jit
  def run(inputs, label):
    return attack(KEY, lambda x: x["x"] @ weight, inputs, label)

  one = run(inputs, label)["x"]
  with jax.set_mesh(mesh):
    several = run(*jax.device_put((inputs, label), sharding))["x"]
  assert several.sharding.is_equivalent_to(sharding, 2)
  assert np.mean(np.abs(np.asarray(several) - np.asarray(one)) < 1e-4) > 0.95


@pytest.mark.parametrize("name", SMALL)
def test_no_gradient_flows_and_budgets_map(name):
  attack = _make(name, norm="linf", budget=0.3)
  inputs = bounds._inputs()

  def moved(scale, budget):
    given = jax.tree.map(lambda x: scale * x, inputs)
    out = attack(KEY, bounds.logits_fn, given, bounds.LABEL, budget=budget)
    change = {m: out[m] - jax.lax.stop_gradient(given[m]) for m in out}
    return sum(jnp.sum(x) for x in jax.lax.stop_gradient(change).values()), out

  slopes = jax.jit(
    jax.vmap(jax.grad(lambda s, b: moved(s, b)[0]), in_axes=(None, 0))
  )(1.0, jnp.asarray([0.0, 0.2]))
  assert np.all(slopes == 0)
  together = jax.jit(jax.vmap(lambda b: moved(1.0, b)[1]))(
    jnp.asarray([0.0, 0.2])
  )
  single = jax.jit(lambda b: moved(1.0, b)[1])(jnp.float32(0.2))
  for m, x in inputs.items():
    np.testing.assert_array_equal(together[m][0], x)
    assert np.mean(np.abs(together[m][1] - single[m]) < 1e-4) > 0.95
