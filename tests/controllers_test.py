"""Arms, probabilities and regret; what each modality is worth."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import controllers
from robust_mm import modalities
from robust_mm import models

ALL = {
  "exp3": controllers.exp3(3, num_rounds=100),
  "exp3s": controllers.exp3s(3, num_rounds=100),
  "hedge": controllers.hedge(3, num_rounds=100),
  "uniform": controllers.uniform(3),
}


def _play(controller, rewards, key):
  """``(state, collected)`` of a run over ``rewards[T, M]``."""

  def step(state, xs):
    key, reward = xs
    arm = controller.draw(key, state)
    # Expected, not drawn: half the noise of a regret for nothing.
    gained = jnp.sum(controller.probabilities(state) * reward)
    return controller.update(state, reward, arm), gained

  keys = jax.random.split(key, rewards.shape[0])
  state, gained = jax.lax.scan(step, controller.init(), (keys, rewards))
  return state, jnp.sum(gained)


@functools.partial(jax.jit, static_argnums=0)
def _mean_gain(controller, rewards, keys):
  play = lambda rewards, key: _play(controller, rewards, key)[1]  # noqa: E731
  return jnp.mean(jax.vmap(play)(rewards, keys))


@pytest.mark.parametrize("name", ALL)
def test_probabilities_sum_to_one_and_explore(name):
  controller = ALL[name]
  rewards = jax.random.uniform(jax.random.key(1), (300, 3))
  rewards = rewards * jnp.asarray([1.0, 0.3, 0.1])[None]
  state, _ = jax.jit(functools.partial(_play, controller))(
    rewards, jax.random.key(0)
  )
  p = controller.probabilities(state)
  np.testing.assert_allclose(jnp.sum(p), 1.0, atol=1e-6)
  assert state.rounds == 300
  assert jnp.max(state.log_weights) == 0
  if name in ("exp3", "exp3s"):
    assert jnp.min(p) >= controller.rate / 3 - 1e-7
  if name == "uniform":
    np.testing.assert_allclose(p, 1 / 3, rtol=1e-6)
  else:
    assert jnp.argmax(p) == 0
    assert p[0] > 0.4


def test_a_bandit_s_estimate_of_rewards_is_unbiased():
  """Read off the weights, so that a wrong p in the update would show."""
  controller = controllers.exp3(3, gamma=0.3)
  state = controllers.ControllerState(
    jnp.log(jnp.asarray([0.7, 0.2, 0.1])), jnp.zeros((), jnp.int32)
  )
  state = state._replace(log_weights=state.log_weights - math.log(0.7))
  rewards = jnp.asarray([0.2, 0.9, 0.5])

  @jax.jit
  @jax.vmap
  def estimates(key):
    arm = controller.draw(key, state)
    after = controller.update(state, rewards, arm)
    # Weights move together by the normalisation; an arm not played is still.
    still = jnp.argmax(jnp.arange(3) != arm)
    moved = after.log_weights - state.log_weights
    return (moved - moved[still]) / (0.3 / 3)

  found = estimates(jax.random.split(jax.random.key(0), 20_000))
  error = jnp.std(found, axis=0) / math.sqrt(20_000)
  assert np.all(np.abs(jnp.mean(found, axis=0) - rewards) < 4 * error)
  # Negative control: divided by probabilities without exploration.
  p, q = controller.probabilities(state), jnp.asarray([0.7, 0.2, 0.1])
  biased = jnp.mean(found * (p / q)[None], axis=0)
  assert np.any(np.abs(biased - rewards) > 4 * error)


@pytest.mark.parametrize("name", ALL)
def test_a_million_rewards_of_one_stay_finite(name):
  controller = ALL[name]

  @jax.jit
  def run(state):
    step = lambda _, s: controller.update(s, jnp.ones(3), 0)  # noqa: E731
    return jax.lax.fori_loop(0, 1_000_000, step, state)

  state = run(controller.init())
  assert np.all(np.isfinite(state.log_weights))
  p = controller.probabilities(state)
  assert np.all(np.isfinite(p))
  np.testing.assert_allclose(jnp.sum(p), 1.0, atol=1e-6)


def test_regret_is_below_the_bound_and_that_of_uniform_above():
  T, M, runs = 2000, 3, 8
  means = jnp.asarray([0.3, 0.5, 0.6])
  keys = jax.random.split(jax.random.key(0), runs)
  draws = jax.random.uniform(jax.random.key(1), (runs, T, M))
  rewards = (draws < means[None, None]).astype(jnp.float32)
  best = jnp.mean(jnp.max(jnp.sum(rewards, axis=1), axis=-1))

  def regret(controller):
    return float(best - _mean_gain(controller, rewards, keys))

  bandit = 2 * math.sqrt((math.e - 1) * T * M * math.log(M))
  full = math.sqrt(T * math.log(M) / 2)
  uniform = regret(controllers.uniform(M))
  assert regret(controllers.exp3(M, num_rounds=T)) < bandit < uniform
  assert regret(controllers.hedge(M, num_rounds=T, share=0.0)) < full < uniform


def test_a_shared_weight_follows_an_arm_that_changes():
  T, M, runs = 2000, 3, 6
  best = jnp.asarray([0, 1, 2, 0])[jnp.arange(T) // 500]
  means = jnp.where(jnp.arange(M)[None] == best[:, None], 0.8, 0.2)
  keys = jax.random.split(jax.random.key(0), runs)
  draws = jax.random.uniform(jax.random.key(1), (runs, T, M))
  rewards = (draws < means[None]).astype(jnp.float32)

  def regret(controller):
    return 0.8 * T - float(_mean_gain(controller, rewards, keys))

  S = 4
  bandit = regret(controllers.exp3s(M, num_rounds=T, num_segments=S))
  bound = math.sqrt((math.e - 1) * T * M * (S * math.log(M * T) + math.e))
  assert bandit < 2 * bound
  assert bandit < 0.7 * regret(controllers.exp3(M, num_rounds=T))
  shared = regret(controllers.hedge(M, num_rounds=T))
  assert shared < 0.7 * regret(controllers.hedge(M, num_rounds=T, share=0.0))


def test_exp3s_without_a_share_is_exp3():
  rewards = jax.random.uniform(jax.random.key(2), (50, 3))
  key = jax.random.key(0)
  one, _ = _play(controllers.exp3(3, gamma=0.2), rewards, key)
  other, _ = _play(controllers.exp3s(3, gamma=0.2, share=0.0), rewards, key)
  np.testing.assert_array_equal(one.log_weights, other.log_weights)
  shared, _ = _play(controllers.exp3s(3, gamma=0.2, share=0.1), rewards, key)
  assert np.max(np.abs(one.log_weights - shared.log_weights)) > 0.1


def test_hedge_on_a_constant_gap_is_the_logistic():
  controller = controllers.hedge(2, learning_rate=0.1, share=0.0)
  rewards = jnp.asarray([0.7, 0.4])
  state = controller.init()
  update = jax.jit(controller.update)
  for t in range(1, 40):
    state = update(state, rewards, 0)
    expected = 1 / (1 + math.exp(-0.1 * 0.3 * t))
    np.testing.assert_allclose(
      controller.probabilities(state)[0], expected, atol=1e-6
    )


def test_caps_hold_exactly_and_no_attack_has_its_mass():
  controller = controllers.hedge(
    3, num_rounds=50, p_min=0.1, p_max=0.5, no_attack=0.2
  )
  for weights in ([0.0, -1.0, -9.0], [0.0, -90.0, -90.0], [0.0, 0.0, 0.0]):
    state = controller.init()._replace(log_weights=jnp.asarray(weights))
    p = controller.probabilities(state)
    np.testing.assert_allclose(jnp.sum(p), 0.8, atol=1e-6)
    assert np.all(p >= 0.8 * 0.1 - 1e-6)
    assert np.all(p <= 0.8 * 0.5 + 1e-6)
  state = controller.init()._replace(log_weights=jnp.asarray([0.0, -9.0, -9.0]))
  arms = jax.vmap(lambda key: controller.draw(key, state))(
    jax.random.split(jax.random.key(0), 4000)
  )
  counts = np.bincount(arms, minlength=4) / 4000
  np.testing.assert_allclose(counts, [0.4, 0.2, 0.2, 0.2], atol=0.03)
  bandit = controllers.exp3(3, gamma=0.1, no_attack=0.2)
  state = bandit.update(bandit.init(), jnp.ones(3), 3)
  np.testing.assert_array_equal(state.log_weights, 0)


def test_controllers_are_values_and_states_are_pytrees():
  assert controllers.hedge(3, num_rounds=7) == controllers.hedge(
    3, num_rounds=7
  )
  assert hash(ALL["exp3"]) != hash(ALL["exp3s"])
  state = ALL["hedge"].init()
  assert len(jax.tree.leaves(state)) == 2


def test_rewards_are_gains_in_units_of_the_largest_lately():
  scale = controllers.initial_scale()
  first = controllers.scale_gains(scale, jnp.asarray([2.0, 1.0, -1.0]))
  np.testing.assert_allclose(first.rewards, [1.0, 0.5, 0.0])
  second = controllers.scale_gains(first.scale, jnp.asarray([0.1, 0.0, 0.0]))
  np.testing.assert_allclose(second.scale, 0.995 * 2)
  np.testing.assert_allclose(second.rewards[0], 0.1 / 1.99, rtol=1e-5)
  spoiled = controllers.scale_gains(first.scale, jnp.asarray([jnp.nan, 1, 0]))
  assert not spoiled.finite
  assert spoiled.rewards[0] == 0
  assert np.all(np.isfinite(spoiled.rewards))
  hidden = controllers.scale_gains(
    first.scale,
    jnp.asarray([jnp.nan, 1, 0]),
    measured=jnp.asarray([False, True, False]),
  )
  assert hidden.finite
  state = ALL["hedge"].update(ALL["hedge"].init(), jnp.full(3, jnp.nan), 0)
  np.testing.assert_allclose(state.log_weights, 0, atol=1e-6)


def test_bad_arguments_are_named():
  make = controllers
  for call, message in (
    (lambda: make.uniform(1), "num_arms"),
    (lambda: make.exp3(3), "num_rounds must be given"),
    (lambda: make.exp3(3, gamma=0.0), "gamma must lie in"),
    (lambda: make.exp3s(3, gamma=1.5, share=0.0), "gamma must lie in"),
    (lambda: make.exp3s(3, num_rounds=10, num_segments=0), "num_segments"),
    (lambda: make.hedge(3, learning_rate=-1.0), "learning_rate"),
    (lambda: make.hedge(3, num_rounds=5, share=1.0), "share must lie in"),
    (lambda: make.hedge(3, num_rounds=5, p_min=0.5), "p_min must be at most"),
    (lambda: make.hedge(3, num_rounds=5, p_max=0.2), "p_max must be at least"),
    (lambda: make.uniform(3, no_attack=1.0), "no_attack"),
    (lambda: ALL["exp3"].update(ALL["exp3"].init(), jnp.ones(2), 0), "rewards"),
  ):
    with pytest.raises(ValueError, match=message):
      call()


def _model_and_batch():
  names = ("left", "right")
  model = models.late_fusion(
    {
      name: models.encoders.mlp(hidden_sizes=(8,), embedding_dim=4)
      for name in names
    },
    num_classes=3,
    input_shapes={name: (5,) for name in names},
  )
  rng = np.random.default_rng(0)
  batch = {
    "inputs": {
      n: jnp.asarray(rng.normal(size=(6, 5)), jnp.float32) for n in names
    },
    "present": {
      "left": jnp.asarray([True] * 5 + [False]),
      "right": jnp.asarray([False] + [True] * 5),
    },
    "label": jnp.asarray([0, 1, 2, 0, 1, 2]),
  }
  return model, batch


def test_leaving_out_a_modality_leaves_no_path_to_its_encoder():
  model, batch = _model_and_batch()
  params, state = model.init(jax.random.key(0))

  def loss_fn(params, batch):
    out, _ = model.apply(params, state, batch["inputs"], batch["present"])
    picked = jax.nn.one_hot(batch["label"], 3)
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(out.logits) * picked, -1))

  left = modalities.without(batch, "left")
  # The one example that has nothing else keeps it.
  np.testing.assert_array_equal(left["present"]["left"], [True] + [False] * 5)
  full, left_out = jax.jit(
    functools.partial(modalities.leave_one_out, loss_fn)
  )(params, batch)
  np.testing.assert_allclose(full, loss_fn(params, batch), rtol=1e-6)
  for name, loss in left_out.items():
    alone = loss_fn(params, modalities.without(batch, name))
    np.testing.assert_allclose(loss, alone, rtol=1e-6)
    assert abs(loss - full) > 1e-4

  both = {**batch, "present": {n: jnp.ones(6, bool) for n in ("left", "right")}}
  both["inputs"] = {**batch["inputs"], "left": jnp.full((6, 5), jnp.nan)}
  without = modalities.without(both, "left")
  assert np.isfinite(loss_fn(params, without))
  slopes = jax.jit(jax.grad(loss_fn))(params, without)
  for path, leaf in jax.tree_util.tree_leaves_with_path(slopes):
    assert np.all(np.isfinite(leaf))
    if "left" in jax.tree_util.keystr(path):
      assert np.all(leaf == 0)
  # Left in, the same encoder does have a gradient.
  present = jax.jit(jax.grad(loss_fn))(params, batch)
  assert any(
    np.any(leaf != 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(present)
    if "left" in jax.tree_util.keystr(path)
  )


def test_only_the_squared_gain_rewards_what_harms():
  left_out = {"helps": jnp.asarray(1.5), "harms": jnp.asarray(0.4)}
  hinge = modalities.information_gain(1.0, left_out)
  squared = modalities.information_gain(1.0, left_out, mode="squared")
  np.testing.assert_allclose([hinge["helps"], squared["helps"]], [0.5, 0.25])
  assert hinge["harms"] == 0
  assert squared["harms"] > squared["helps"]
  with pytest.raises(ValueError, match="mode must be one of"):
    modalities.information_gain(1.0, left_out, mode="square")
  one = {"inputs": {"a": jnp.ones((2, 1))}, "present": {"a": jnp.ones(2, bool)}}
  with pytest.raises(ValueError, match="at least two modalities"):
    modalities.leave_one_out(lambda p, b: 0.0, None, one)
