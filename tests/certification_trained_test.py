"""certification.md 11.6, 11.7: five trained models, attacked and compared."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from certification_models import fit

import robust_mm as rmm
from robust_mm import attacks
from robust_mm import certification
from robust_mm import losses
from robust_mm import models

SIZE = 200
SEEDS = 5
NAMES = ("left", "right")
LIPSCHITZ = {"name": "lipschitz_mlp", "block": "bjorck", "embedding_dim": 16}
STEMMED = {**LIPSCHITZ, "stem": 32, "width": 32, "num_blocks": 1}
BARE = {**LIPSCHITZ, "width": 32, "num_blocks": 0}
TRUNK = {"width": 32, "num_blocks": 1, "embedding_dim": 16}
PLAIN = {"name": "mlp", "hidden_sizes": (32,), "embedding_dim": 16}
KINDS = {
  # fusion, encoder, options of the fusion
  "late": ("orthogonal", STEMMED, {}),
  "trunk": ("trunk", BARE, TRUNK),
  "plain": ("orthogonal", PLAIN, {}),
}


@functools.cache
def _trained(kind):
  """(model, parameters of five seeds, 200 test digits), for the radius."""
  fusion, part, options = KINDS[kind]
  model = models.build(
    fusion=fusion,
    encoders=dict.fromkeys(NAMES, part),
    num_classes=10,
    input_shapes=dict.fromkeys(NAMES, (8, 4, 1)),
    fusion_options=options,
  )
  batch = jax.tree.map(jnp.asarray, rmm.data.load("digits", split="train"))
  rate = 5e-3 if kind == "plain" else 3e-2
  tx = optax.adam(optax.cosine_decay_schedule(rate, 150))

  def loss_fn(params):
    outputs, _ = model.apply(
      params, {}, batch["inputs"], batch["present"], train=True
    )
    geometry = model.geometry(params)
    sensitivity = certification.sensitivity(
      geometry, batch["label"], batch["present"]
    )
    return losses.certified_radius(
      outputs.logits,
      sensitivity,
      batch["label"],
      r0=0.6,
      temperature=0.1,
      fusion=geometry.fusion,
    )

  params = fit(loss_fn, model.init, tx, num_steps=150, num_seeds=SEEDS)
  test = rmm.data.load("digits", split="test", limit=SIZE)
  return model, params, jax.tree.map(jnp.asarray, test)


def _certificates(kind, factor=1.0, source="global"):
  """Certificates of all seeds, from tables multiplied by ``factor``."""
  model, params, batch = _trained(kind)

  @jax.jit
  def certify(params):
    tables = certification.sensitivity_tables(model, params)
    scaled = {m: factor * table for m, table in tables.tables.items()}
    tables = dataclasses.replace(tables, tables=scaled)
    return rmm.certify(model, params, batch, tables=tables, source=source)

  return jax.vmap(certify)(params)


@functools.cache
def _attack(kind):
  """``run(label, budget)``: whom an attack changes, ``[seeds, b]``."""
  model, params, batch = _trained(kind)
  attack = attacks.pgd(norm=2, budget=1.0, num_steps=50, num_restarts=3)

  def one(params, label, budget):
    def logits_fn(inputs):
      return model.apply(params, {}, inputs, batch["present"])[0].logits

    found = attack(
      jax.random.key(0), logits_fn, batch["inputs"], label, budget=budget
    )
    return jnp.argmax(logits_fn(found), axis=-1) != label

  run = jax.jit(jax.vmap(one))
  return lambda label, budget: np.asarray(run(params, label, budget))


def _flips(kind, found, moving):
  """Whom attacks on ``moving``, all or one, change inside their radii."""
  alone = found.modality_radius[moving[0]]
  radius = found.radius if moving == NAMES else alone
  assert np.all(np.isfinite(radius))
  assert np.mean(np.asarray(radius) > 0) > 0.95
  attack = _attack(kind)
  if moving == NAMES:
    return attack(found.prediction, 0.999 * radius)
  budget = {m: 0.999 * radius * (m in moving) for m in NAMES}
  return attack(found.prediction, budget)


@pytest.mark.parametrize("moving", [NAMES, NAMES[:1], NAMES[1:]], ids="+".join)
@pytest.mark.parametrize("kind", KINDS)
def test_no_attack_of_a_trained_model_succeeds_inside_the_radius(kind, moving):
  found = _certificates(kind)
  assert found.sound
  _, _, batch = _trained(kind)
  right = found.prediction == batch["label"][None]
  assert np.all(np.mean(right, axis=-1) > 0.9)
  assert not np.any(_flips(kind, found, moving))
  # The same attack refutes constants that are too small.
  cheat = _certificates(kind, factor=0.4)
  assert np.all(_flips(kind, cheat, moving).mean(axis=-1) > 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_balls_of_differently_predicted_test_digits_are_disjoint(kind):
  """Twice the radii would overlap: no attack is needed to see that."""
  _, _, batch = _trained(kind)
  flat = jnp.concatenate(
    [jnp.reshape(batch["inputs"][m], (SIZE, -1)) for m in NAMES], axis=-1
  )
  distance = jnp.linalg.norm(flat[:, None] - flat[None], axis=-1)
  found = _certificates(kind)
  other = found.prediction[:, :, None] != found.prediction[:, None, :]
  reach = found.radius[:, :, None] + found.radius[:, None, :]
  share = np.max(np.where(other, reach / distance[None], 0), axis=(1, 2))
  assert np.all(share <= 1)
  if kind != "plain":
    assert np.all(2 * share > 1)


def test_a_trunk_certifies_more_than_a_sum_of_scores_together():
  """And less where each modality is moved to its limit: an ellipsoid."""
  radius, share = {}, {}
  for kind in ("late", "trunk"):
    found = _certificates(kind)
    right = np.asarray(found.prediction == _trained(kind)[2]["label"][None])
    radius[kind] = np.mean(np.where(right, found.radius, 0))
    alone = found.modality_radius
    # 0.7 < 1 / sqrt(2): inside every ellipsoid, seldom inside a polytope.
    both = {m: alone[m] * 0.7 for m in NAMES}
    share[kind] = np.mean(found.covers(both))
  assert radius["trunk"] > radius["late"]
  assert share["trunk"] > 0.9 > 0.5 > share["late"]
