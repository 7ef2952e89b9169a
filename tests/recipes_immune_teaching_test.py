"""ModalImmune: every set, feedback of probes, damage and the guard."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes_immune_models import DROPOUT
from recipes_immune_models import NAMES
from recipes_immune_models import SHAPES
from recipes_immune_models import begin
from recipes_immune_models import make
from recipes_immune_models import make_batch
from recipes_immune_models import settings_of
from recipes_immune_models import small

from robust_mm import losses
from robust_mm import modalities
from robust_mm.recipes import destruction
from robust_mm.recipes import immunity
from robust_mm.recipes import probes
from robust_mm.training import steps


@pytest.fixture(scope="module")
def model():
  return small()


def _by_hand(model, params, batch):
  """(logits [7, 24, 3], counted [7, 24]) by seven whole passes."""
  logits, counted = [], []
  for subset in modalities.subsets(NAMES):
    kept = modalities.restrict(batch, subset)
    outputs, _ = model.apply(params, {}, kept["inputs"], kept["present"])
    logits.append(outputs.logits)
    counted.append(np.any([np.asarray(v) for v in kept["present"].values()], 0))
  return np.asarray(logits, np.float64), np.asarray(counted)


def test_every_set_and_their_consistency_by_hand(model):
  phase = make(
    model,
    removal="every",
    consistency_weight=0.7,
    temperature=3.0,
    attack_weight=1.5,
    warmup_steps=0,
    **DROPOUT,
  )
  state, batch = begin(model, phase), make_batch()
  logits, counted = _by_hand(model, state.params, batch)
  _, metrics = jax.jit(steps.make_train_step(phase))(
    state, batch, jax.random.key(1)
  )
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  label = np.asarray(batch["label"])
  each = -log_p[:, np.arange(24), label]
  over = [np.mean(e[c]) for e, c in zip(each, counted)]
  np.testing.assert_allclose(metrics["clean_loss"], over[-1], rtol=1e-5)
  np.testing.assert_allclose(metrics["attacked_loss"], np.mean(over), rtol=1e-5)
  soft = logits / 3
  soft = soft - np.log(np.exp(soft).sum(-1, keepdims=True))
  apart = np.sum(np.exp(soft[-1]) * (soft[-1] - soft), axis=-1)
  expected = 9 * np.mean([np.mean(a[c]) for a, c in zip(apart, counted)])
  np.testing.assert_allclose(metrics["disagreement"], expected, rtol=1e-4)
  total = over[-1] + 1.5 * np.mean(over) + 0.7 * expected
  np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)


def test_the_teacher_of_consistency_is_not_taught(model):
  params, _ = model.init(jax.random.key(0))
  batch = make_batch(missing=0.0)

  def apart(params, fixed):
    embeddings, _ = model.encode(
      params, {}, batch["inputs"], batch["present"], train=False
    )
    every = immunity.over_sets(model, params, embeddings, batch["present"])
    full = immunity.logits_of(model, fixed, embeddings, batch["present"])
    return immunity.disagreement(model, *every, full, 1.0)

  moving = jax.grad(lambda p: apart(p, p))(params)
  fixed = jax.grad(lambda p: apart(p, params))(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), moving, fixed
  )
  assert optax.tree.norm(moving) > 1e-3


def test_feedback_climbs_the_loss_of_a_probe_up_to_chance():
  rng = np.random.default_rng(0)
  label = jnp.asarray(rng.integers(0, 3, 200))
  embeddings = {
    "a": jax.nn.one_hot(label, 3),
    "b": jnp.asarray(rng.normal(size=(200, 3)), jnp.float32),
  }
  present = {name: jnp.ones(200, bool) for name in embeddings}
  # Knows a by heart; of b it is worse than chance.
  known = {
    name: {"kernel": 4.0 * jnp.eye(3), "bias": jnp.zeros(3)} for name in "ab"
  }

  def pushed(arm):
    return jax.grad(lambda e: probes.feedback(known, e, present, label, arm))(
      embeddings
    )

  first = pushed(jnp.asarray(0))
  moved = {"a": embeddings["a"] - 1.0 * first["a"]}
  before, after = (
    probes.losses({"a": known["a"]}, e, {"a": present["a"]}, label)[0]
    for e in (embeddings, moved)
  )
  assert after > before
  assert not np.any(np.asarray(first["b"]))
  second = pushed(jnp.asarray(1))  # at chance already: nothing to climb
  assert not np.any(np.asarray(second["a"]))
  assert not np.any(np.asarray(second["b"]))
  for value in jax.tree.leaves(pushed(jnp.asarray(2))):
    assert not np.any(np.asarray(value))
  by_probe = jax.grad(
    lambda p: probes.feedback(p, embeddings, present, label, jnp.asarray(0))
  )(known)
  assert not np.any(jax.tree.leaves(jax.tree.map(jnp.any, by_probe)))


def test_feedback_reaches_the_encoder_of_the_arm_alone(model):
  off = {**DROPOUT, "clean_weight": 0.0, "attack_weight": 0.0}
  phase = make(model, feedback_weight=2.0, warmup_steps=0, **off)
  state, batch = begin(model, phase), make_batch(missing=0.0)
  step = jax.jit(steps.make_train_step(phase))
  embeddings, _ = model.encode(
    state.params, {}, batch["inputs"], batch["present"], train=False
  )
  answer = jax.nn.one_hot(batch["label"], 3) - 1 / 3
  fitted = {  # below chance, each of them
    name: {"kernel": 3 * jnp.linalg.pinv(z) @ answer, "bias": jnp.zeros(3)}
    for name, z in embeddings.items()
  }
  state = dataclasses.replace(state, extra={**state.extra, "probes": fitted})
  before, probed = state.params, state.extra["probes"]
  for _ in range(3):
    after, metrics = step(state, batch, jax.random.key(3))
    arm = NAMES[int(after.extra["arm"])]
    for name in NAMES:
      same = jax.tree.map(
        lambda a, b: bool(np.all(a == b)),
        state.params["encoders"][name],
        after.params["encoders"][name],
      )
      assert all(jax.tree.leaves(same)) == (name != arm), (name, arm)
    assert metrics["loss"] < 0
    state = after
  # Nothing else has moved, but the probes have learnt.
  jax.tree.map(
    np.testing.assert_array_equal, before["fusion"], state.params["fusion"]
  )
  assert not np.allclose(
    probed["a"]["kernel"], state.extra["probes"]["a"]["kernel"]
  )


def test_damage_is_of_the_arm_and_of_its_share(monkeypatch, model):
  settings = settings_of(
    monkeypatch, model, damage_rate=0.25, damage_kinds=("additive",)
  )
  batch = make_batch(size=2000)
  run = jax.jit(
    lambda key, arm: destruction.damaged(
      settings, key, batch["inputs"], batch["present"], arm
    )
  )
  for arm in range(4):
    found, intact = run(jax.random.key(arm), arm)
    for index, name in enumerate(NAMES):
      axes = tuple(range(1, found[name].ndim))
      changed = np.any(np.asarray(found[name] != batch["inputs"][name]), axes)
      there = np.asarray(batch["present"][name])
      np.testing.assert_array_equal(intact[name], there & ~changed)
      assert not np.any(changed & ~there)
      share = changed[there].mean()
      assert abs(share - (0.25 if index == arm else 0)) < 0.05


def test_without_a_rate_nothing_is_damaged(monkeypatch, model):
  assert settings_of(monkeypatch, model).damage is None


def test_who_is_damaged_says_nothing_about_how_much(monkeypatch, model):
  settings = settings_of(
    monkeypatch, model, damage_rate=0.25, damage_kinds=("frame_drop",)
  )
  inputs = {n: jnp.ones((8000, *s)) for n, s in SHAPES.items()}
  present = {n: jnp.ones(8000, bool) for n in SHAPES}
  found = jax.jit(
    lambda key: destruction.damaged(settings, key, inputs, present, 1)
  )(jax.random.key(0))[0]["b"]
  lost = np.all(np.asarray(found) == 0, axis=2)
  # A frame of a damaged example is lost with chance .1 to .9, .5 on average.
  assert abs(lost.mean() - 0.25 * 0.5) < 0.015


def _damaged_step(model, monkeypatch, **options):
  """(settings, params, batch, damaged inputs, intact, embeddings) of arm a."""
  settings = settings_of(
    monkeypatch,
    model,
    damage_rate=0.5,
    damage_kinds=("additive",),
    noise_scale=5.0,
    **{**DROPOUT, **options},
  )
  params, _ = model.init(jax.random.key(0))
  batch = make_batch(size=60)
  inputs, intact = destruction.damaged(
    settings, jax.random.key(1), batch["inputs"], batch["present"], 0
  )
  embeddings, _ = model.encode(params, {}, inputs, batch["present"])
  return settings, params, batch, intact, embeddings


def test_what_is_intact_teaches_and_counts_as_clean(model, monkeypatch):
  settings, params, batch, intact, embeddings = _damaged_step(
    model, monkeypatch, consistency_weight=1.0, removal="every"
  )
  hit = np.asarray(batch["present"]["a"] & ~intact["a"])
  assert 0 < hit.sum() < 60
  loss, parts = destruction.make_task(settings)(
    params, embeddings, {}, batch["present"], intact, batch
  )
  del loss
  outputs, _ = model.apply(params, {}, batch["inputs"], batch["present"])
  each = losses.cross_entropy(outputs.logits, batch["label"])
  counted = np.any([np.asarray(f) for f in batch["present"].values()], axis=0)
  np.testing.assert_allclose(
    parts["clean_loss"], np.mean(each[counted & ~hit]), rtol=1e-5
  )
  # The teacher has never seen the damage: it is the model on intact inputs.
  taught, _ = model.apply(params, {}, batch["inputs"], intact)
  every, left = immunity.over_sets(model, params, embeddings, batch["present"])
  some = np.any([np.asarray(f) for f in intact.values()], axis=0)
  assert np.any(counted & ~some)  # who had nothing but the arm is not taught
  left = {name: flag & some[None] for name, flag in left.items()}
  expected = immunity.disagreement(model, every, left, taught.logits, 2.0)
  np.testing.assert_allclose(parts["disagreement"], expected, rtol=1e-5)
  wrong = immunity.logits_of(model, params, embeddings, batch["present"])
  other = immunity.disagreement(model, every, left, wrong, 2.0)
  assert abs(other - expected) > 1e-3


def test_the_guard_does_not_see_damage(model, monkeypatch):
  settings, *_ = _damaged_step(model, monkeypatch)
  extra = {
    "count": jnp.asarray(50),
    "clean_loss": jnp.asarray(1.0),
    "best_clean_loss": jnp.asarray(1.0),
  }
  nothing = destruction.watch(settings, extra, 0.0, False, seen=False)
  assert nothing["clean_loss"] == 1
  assert nothing["best_clean_loss"] == 1
  some = destruction.watch(settings, extra, 0.0, False, seen=True)
  assert some["clean_loss"] < 1


def test_the_inner_loss_knows_of_feedback(model, monkeypatch):
  batch = make_batch()
  params, _ = model.init(jax.random.key(0))
  phi = {}
  rng = np.random.default_rng(0)
  made = {
    name: {
      "kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
      "bias": jnp.zeros(3),
    }
    for name in NAMES
  }
  inner = {"batch": batch, "state": {}, "p": jnp.asarray([0.2, 0.3, 0.5])}
  inner.update(decoders={}, probes=made)
  found = {
    weight: immunity.expected_loss(
      settings_of(monkeypatch, model, feedback_weight=weight, **DROPOUT),
      params,
      phi,
      inner,
    )
    for weight in (0.0, 2.0)
  }
  embeddings, _ = model.encode(params, {}, batch["inputs"], batch["present"])
  bounded = probes.bounded(made, embeddings, batch["present"], batch["label"])
  expected = -2 * jnp.sum(inner["p"] * bounded)
  np.testing.assert_allclose(found[2.0] - found[0.0], expected, rtol=1e-4)
