"""Attacks on trained networks: how strong, and under every transformation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import datasets

from robust_mm import attacks

SIZES = (32, 48, 10)
HALVES = {"left": slice(0, 4), "right": slice(4, 8)}
KEY = jax.random.key(3)


def _logits(params, inputs):
  total = 0.0
  for name, layers in params.items():
    x = inputs[name]
    hidden = jnp.maximum(x @ layers["in"] + _row(layers["bias"], x), 0)
    total = total + hidden @ layers["out"]
  return total


def _row(bias, x):
  return jnp.broadcast_to(bias, (x.shape[0], bias.shape[0]))


@pytest.fixture(scope="module")
def trained():
  """``(params, inputs, label)``: digits in halves, 150 held-out examples."""
  digits = datasets.load_digits()
  images = digits.images.astype("f4") / 16
  inputs = {
    m: jnp.asarray(images[:, :, columns].reshape(len(images), 32))
    for m, columns in HALVES.items()
  }
  label = jnp.asarray(digits.target, jnp.int32)
  rng = np.random.default_rng(0)
  params = {
    m: {
      "in": jnp.asarray(rng.normal(size=SIZES[:2]) / 5, "f4"),
      "bias": jnp.zeros(SIZES[1]),
      "out": jnp.asarray(rng.normal(size=SIZES[1:]) / 7, "f4"),
    }
    for m in HALVES
  }
  tx = optax.adam(5e-3)

  def loss_fn(params, key):
    # Noise, or dead pixels keep random weights and random noise flips all.
    noise = 0.2 * jax.random.normal(key, (1600, 32))
    logits = _logits(params, {m: x[:1600] + noise for m, x in inputs.items()})
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label[:1600])
    return jnp.mean(loss)

  def step(carry, key):
    params, state = carry
    updates, state = tx.update(jax.grad(loss_fn)(params, key), state)
    return (optax.apply_updates(params, updates), state), None

  (params, _), _ = jax.jit(
    lambda carry: jax.lax.scan(step, carry, jax.random.split(KEY, 150))
  )((params, tx.init(params)))
  held_out = {m: x[1600:1750] for m, x in inputs.items()}
  return params, held_out, label[1600:1750]


def _accuracy(attack, trained):
  """``(budget, scale=1) -> robust accuracy``, compiled once."""
  params, inputs, label = trained

  @jax.jit
  def run(budget, scale):
    return attacks.robust_accuracy(
      KEY,
      attack,
      lambda inputs: scale * _logits(params, inputs),
      inputs,
      label,
      budget=budget,
    )

  return lambda budget, scale=1.0: float(run(budget, scale))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_robust_accuracy_falls_to_zero(trained, norm):
  attack = attacks.pgd(
    norm=norm, budget=1.0, num_steps=20, valid_range=(0.0, 1.0)
  )
  accuracy = _accuracy(attack, trained)
  radii = {"l2": (0.0, 0.3, 0.8, 4.0), "linf": (0.0, 0.05, 0.15, 1.0)}[norm]
  curve = [accuracy(np.float32(radius)) for radius in radii]
  assert curve[0] > 0.9
  assert curve == sorted(curve, reverse=True)
  assert 0.05 < curve[1] < curve[0]
  assert curve[-1] == 0.0


def test_one_modality_alone_is_weaker_than_the_joint_ball(trained):
  attack = attacks.pgd(norm=2, budget=1.0, num_steps=20)
  accuracy = _accuracy(attack, trained)
  joint = accuracy(np.float32(0.6))
  alone = [
    accuracy({m: np.float32(0.6 * (m == only)) for m in HALVES})
    for only in HALVES
  ]
  both = accuracy(dict.fromkeys(HALVES, np.float32(0.6)))
  assert both < joint < min(alone)


def test_margin_loss_sees_through_large_logits(trained):
  """Saturated softmax: the gradient of cross-entropy is exactly zero."""
  common = {"norm": 2, "budget": 1.0, "num_steps": 20, "num_restarts": 2}
  found = {}
  for loss in attacks.losses.LOSSES:
    accuracy = _accuracy(
      attacks.pgd(loss=loss, targets="any", **common), trained
    )
    found[loss] = [accuracy(np.float32(0.8), scale) for scale in (1.0, 1e4)]
  assert found["margin"][1] == pytest.approx(found["margin"][0], abs=0.01)
  assert found["dlr"][1] == pytest.approx(found["dlr"][0], abs=0.01)
  assert found["cross_entropy"][0] < found["margin"][0] + 0.05
  assert found["cross_entropy"][1] > found["margin"][1] + 0.2


def test_more_restarts_and_aims_never_hurt(trained):
  def broken(**options):
    attack = attacks.pgd(norm=2, budget=0.5, num_steps=10, **options)
    return _accuracy(attack, trained)(np.float32(0.5))

  one = broken(num_restarts=1)
  anything = broken(num_restarts=5, targets="any")
  rivals = broken(num_restarts=5)
  fast = _accuracy(attacks.fgm(norm=2, budget=0.5), trained)(np.float32(0.5))
  assert rivals <= anything <= one <= fast


def test_zero_gradient_is_left_behind():
  """A plateau around the clean input hides the slope beyond it."""

  def logits_fn(inputs):
    x = inputs["x"]
    far = jnp.maximum(jnp.abs(x) - 0.1, 0)
    lost = jnp.sum(far, axis=-1)
    return jnp.stack([1 - lost, jnp.zeros_like(lost)], axis=-1)

  inputs = {"x": jnp.zeros((4, 3))}
  label = jnp.zeros(4, jnp.int32)
  for norm in ("l2", "linf"):
    attack = attacks.pgd(norm=norm, budget=3.0, num_restarts=1)
    adversarial = jax.jit(lambda k, a=attack: a(k, logits_fn, inputs, label))(
      KEY
    )
    assert np.all(np.argmax(logits_fn(adversarial), -1) == 1)
    assert np.all(np.isfinite(adversarial["x"]))


def test_non_finite_logits_do_not_spread():
  """One example's logits are NaN everywhere: the others do not notice."""

  def logits_fn(inputs):
    x = inputs["x"]
    return jnp.stack([x[:, 0], -x[:, 0]], axis=-1) * jnp.sqrt(x[:, 1:])

  x = jnp.asarray([[1.0, 1.0], [1.0, -50.0], [1.0, 4.0]])
  label = jnp.zeros(3, jnp.int32)
  attack = attacks.pgd(norm=2, budget=1.1)
  adversarial = jax.jit(lambda k: attack(k, logits_fn, {"x": x}, label))(KEY)
  logits = logits_fn(adversarial)
  assert np.all(np.isfinite(adversarial["x"]))
  assert np.all(np.argmax(logits, -1)[np.array([0, 2])] == 1)
  # The middle one survives nothing: its clean logits are no answer.
  assert not np.any(np.isfinite(logits_fn({"x": x})[1]))


def test_right_by_accident_is_not_robust():
  """A misclassified example that the attack repairs does not survive."""

  def logits_fn(inputs):
    far = jnp.abs(inputs["x"][:, 0]) > 0.2
    return jnp.stack([far * 1.0, ~far * 1.0], axis=-1)

  inputs = {"x": jnp.zeros((2, 1))}
  label = jnp.zeros(2, jnp.int32)
  attack = attacks.fgm(norm="linf", budget=1.0)
  repaired = attack(KEY, logits_fn, inputs, label)
  assert np.all(np.argmax(logits_fn(repaired), -1) == label)
  assert not attacks.survives(KEY, attack, logits_fn, inputs, label).any()


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_eight_devices_agree_with_one(trained, axis_type):
  params, inputs, label = trained
  inputs = {m: x[:144] for m, x in inputs.items()}
  label = label[:144]
  attack = attacks.pgd(norm=2, budget=0.4, num_steps=5, num_restarts=2)
  axis_type = getattr(jax.sharding.AxisType, axis_type)
  mesh = jax.make_mesh((8,), ("data",), (axis_type,))
  sharding = jax.NamedSharding(mesh, jax.P("data"))
  present = {"left": jnp.arange(144) % 3 > 0}

  @jax.jit
  def run(inputs, label, present):
    return attack(
      KEY, lambda x: _logits(params, x), inputs, label, present=present
    )

  one = run(inputs, label, present)
  with jax.set_mesh(mesh):
    several = run(*jax.device_put((inputs, label, present), sharding))
  for m in HALVES:
    assert several[m].sharding.is_equivalent_to(sharding, 2)
    # Rounding can send a step past a kink of the network another way.
    assert np.mean(np.abs(several[m] - one[m]) < 1e-4) > 0.99


def test_vmap_over_models_and_budgets(trained):
  params, inputs, label = trained
  attack = attacks.pgd(norm=2, budget=1.0, num_steps=5, num_restarts=2)
  stacked = jax.tree.map(lambda x: jnp.stack([x, -x]), params)
  budget = jnp.asarray([0.2, 0.6])

  def run(params, budget):
    return attack(
      KEY, lambda x: _logits(params, x), inputs, label, budget=budget
    )

  together = jax.jit(jax.vmap(run))(stacked, budget)
  for i in range(2):
    single = jax.jit(run)(jax.tree.map(lambda x, i=i: x[i], stacked), budget[i])
    for m in HALVES:
      assert np.mean(np.abs(together[m][i] - single[m]) < 1e-4) > 0.99


def test_one_compilation_serves_all_radii(trained, caplog):
  params, inputs, label = trained
  attack = attacks.pgd(norm=2, budget=1.0, num_steps=3, num_restarts=2)

  @jax.jit
  def run(inputs, budget):
    return attack(
      KEY, lambda x: _logits(params, x), inputs, label, budget=budget
    )

  with jax.log_compiles():
    for radius in (0.1, 0.2, 0.0):
      jax.block_until_ready(run(inputs, np.float32(radius)))
  compiled = [r for r in caplog.messages if re.match(r"Compiling.*\brun\b", r)]
  assert len(compiled) == 1


def test_no_gradient_flows_through_an_attack(trained):
  params, inputs, label = trained
  attack = attacks.pgd(norm=2, budget=0.3, num_steps=3, num_restarts=1)

  @jax.jit
  @jax.grad
  def slope(params):
    moved = attack(KEY, lambda x: _logits(params, x), inputs, label)
    return sum(jnp.sum(x**2) for x in moved.values())

  assert all(np.all(g == 0) for g in jax.tree.leaves(slope(params)))


def test_chosen_radius_for_each_example(trained):
  params, inputs, label = trained
  attack = attacks.pgd(norm=2, budget=1.0, num_steps=5, num_restarts=1)
  radius = jnp.linspace(0, 0.5, len(label))
  moved = jax.jit(
    lambda b: attack(KEY, lambda x: _logits(params, x), inputs, label, budget=b)
  )(radius)
  size = np.sqrt(
    sum(np.sum((moved[m] - inputs[m]) ** 2, axis=1) for m in HALVES)
  )
  np.testing.assert_allclose(size, radius, rtol=2e-2, atol=1e-6)
  assert np.all(size <= radius * (1 + 1e-6))
