"""A Lipschitz trunk over all embeddings: what it computes and what it states.

Attacks on trained ones are in certification_trained_test.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import robust_mm as rmm
from robust_mm import certification
from robust_mm import losses
from robust_mm import recipes
from robust_mm.models import encoders

SHAPES = {"a": (5,), "b": (3, 2)}
OPTIONS = {"width": 8, "num_blocks": 1, "embedding_dim": 6}


def _model(block="bjorck", encoder=None, **options):
  part = encoder or encoders.lipschitz_mlp(
    width=8, num_blocks=0, embedding_dim=6, block="bjorck"
  )
  return rmm.models.trunk_fusion(
    dict.fromkeys(SHAPES, part),
    num_classes=4,
    input_shapes=SHAPES,
    **{**OPTIONS, "block": block, **options},
  )


def _batch(size=6):
  keys = jax.random.split(jax.random.key(1), len(SHAPES))
  inputs = {
    name: jax.random.normal(key, (size, *shape))
    for key, (name, shape) in zip(keys, SHAPES.items())
  }
  return {
    "inputs": inputs,
    "present": {name: jnp.ones(size, bool) for name in SHAPES},
    "label": jnp.arange(size) % 4,
  }


@pytest.mark.parametrize("block", ["bjorck", "cayley", "aol", "sll"])
def test_logits_move_no_further_than_the_geometry_states(block):
  model = _model(block)
  params, _ = model.init(jax.random.key(0))
  present = _batch(1)["present"]

  @jax.jit
  def jacobian(params, x):
    def logits(x):
      inputs = {"a": x[None, :5], "b": jnp.reshape(x[5:], (1, 3, 2))}
      return model.apply(params, {}, inputs, present)[0].logits[0]

    return jax.jacrev(logits)(x)

  geometry = model.geometry(params)
  assert geometry.fusion == "joint"
  rows = np.asarray(geometry.head["a"], np.float64)
  for seed in range(5):
    found = jacobian(params, jax.random.normal(jax.random.key(seed), (11,)))
    for y in range(4):
      for j in range(y):
        slope = np.linalg.norm(np.asarray(found[y] - found[j], np.float64))
        bound = np.linalg.norm(rows[y] - rows[j])
        assert slope <= bound * (1 + 1e-5)
        # Orthonormal maps throughout lose little on the way.
        if block == "bjorck":
          assert slope > 0.2 * bound


def test_radii_are_those_of_an_ellipsoid():
  model = _model()
  params, _ = model.init(jax.random.key(0))
  batch = _batch()
  found = rmm.certify(model, params, batch, units={"a": 2.0})
  assert found.sound
  assert found.fusion == "joint"
  assert found.contributions is None
  geometry = model.geometry(params)
  rows = np.asarray(geometry.head["b"])
  distance = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
  logits = np.asarray(model.apply(params, {}, **_given(batch))[0].logits)
  y = logits.argmax(-1)
  margin = logits[np.arange(6), y][:, None] - logits
  with np.errstate(divide="ignore", invalid="ignore"):
    ratio = np.where(np.arange(4) == y[:, None], np.inf, margin / distance[y])
  alone = ratio.min(-1)
  np.testing.assert_allclose(found.modality_radius["b"], alone, rtol=2e-3)
  np.testing.assert_allclose(found.modality_radius["a"], alone / 2, rtol=2e-3)
  # The unit ball is longest along the modality with the larger unit.
  np.testing.assert_allclose(found.radius, alone / 2, rtol=2e-3)
  inside = {"a": 0.6 * alone / 2, "b": 0.6 * alone}
  assert np.all(found.covers(inside))
  outside = {"a": 0.8 * alone / 2, "b": 0.8 * alone}
  assert not np.any(found.covers(outside))
  with pytest.raises(ValueError, match="max_missing needs an additive"):
    found.covers(inside, max_missing=1)


def _given(batch):
  return {"inputs": batch["inputs"], "present": batch["present"]}


def test_absent_modalities_have_no_path_and_no_cost():
  model = _model()
  params, _ = model.init(jax.random.key(0))
  batch = _batch()
  present = {**batch["present"], "b": jnp.arange(6) % 2 == 0}
  run = jax.jit(lambda inputs: rmm.certify(model, params, _at(inputs)))

  def _at(inputs):
    return {"inputs": inputs, "present": present}

  here = run(batch["inputs"])
  poisoned = {
    **batch["inputs"],
    "b": jnp.where(present["b"][:, None, None], batch["inputs"]["b"], jnp.nan),
  }
  there = run(poisoned)
  for one, two in zip(jax.tree.leaves(here), jax.tree.leaves(there)):
    np.testing.assert_array_equal(one, two)
  gone = ~np.asarray(present["b"])
  assert np.all(np.isinf(np.asarray(here.modality_radius["b"])[gone]))
  np.testing.assert_array_equal(
    np.asarray(here.radius)[gone], np.asarray(here.modality_radius["a"])[gone]
  )


@pytest.mark.parametrize("block", ["bjorck", "sll"])
def test_frozen_model_has_the_same_logits(block):
  model = _model(block, stem=8)
  params, _ = model.init(jax.random.key(0))
  batch = _batch()
  frozen, fixed = model.freeze(params)
  np.testing.assert_allclose(
    model.apply(params, {}, **_given(batch))[0].logits,
    frozen.apply(fixed, {}, **_given(batch))[0].logits,
    atol=1e-5,
  )


def test_loss_is_that_of_the_certified_radius():
  """T to 0 is the shortfall of the certificate's own radius."""
  model = _model()
  params, _ = model.init(jax.random.key(0))
  batch = _batch()
  found = rmm.certify(model, params, batch)
  right = {**batch, "label": found.prediction}
  geometry = model.geometry(params)
  sensitivity = certification.sensitivity(
    geometry, right["label"], right["present"]
  )
  logits = model.apply(params, {}, **_given(batch))[0].logits
  target = float(jnp.max(found.radius)) + 0.1
  hinge = losses.hinge_radius(
    logits, sensitivity, right["label"], r0=target, fusion="joint"
  )
  np.testing.assert_allclose(hinge, target - found.radius.mean(), rtol=1e-3)
  # A sum of scores would have to bear both modalities at once.
  looser = losses.hinge_radius(logits, sensitivity, right["label"], r0=target)
  assert looser > hinge
  budgets = {"a": 0.3, "b": 0.4}
  covered = losses.hinge_radius(
    logits,
    sensitivity,
    right["label"],
    r0=1.0,
    budgets=budgets,
    fusion="joint",
  )
  # sqrt(.3^2 + .4^2) = .5, of equal constants.
  half = losses.hinge_radius(
    logits, sensitivity, right["label"], r0=0.5, fusion="joint"
  )
  np.testing.assert_allclose(covered, half / 0.5, rtol=1e-5)


def test_recipes_say_which_of_them_takes_a_trunk():
  options = {"num_steps": 3, "tx": optax.adam(1e-2)}
  recipe = recipes.certified_radius(_model(), **options)
  assert [phase.name for phase in recipe.phases] == ["margins"]
  for rho, steps in ((1.0, 0), (0.0, 5)):
    with pytest.raises(ValueError, match="trunk' has none"):
      recipes.crmt(_model(), rho=rho, integration_steps=steps, **options)
  with pytest.raises(ValueError, match="trunk' has none"):
    recipes.crmt(_model(), fidelity="published", **options)


def test_ordinary_encoders_before_a_trunk_count_by_their_constants():
  model = _model(encoder=encoders.mlp(hidden_sizes=(8,), embedding_dim=6))
  params, _ = model.init(jax.random.key(0))
  geometry = model.geometry(params)
  assert geometry.chain is None  # a chain would end before the trunk
  found = rmm.certify(model, params, _batch())
  stretched = jax.tree.map(lambda leaf: leaf, params)
  for part in stretched["encoders"]["a"].values():
    if "kernel" in part:
      part["kernel"] = 2 * part["kernel"]
  again = model.geometry(stretched)
  assert again.lipschitz["a"] > 1.9 * geometry.lipschitz["a"]
  assert found.sound


class _Doubling(nnx.Module):
  """Says nothing about its constant."""

  def __init__(self, input_shape, rngs):
    self.dense = nnx.Linear(int(np.prod(input_shape)), 6, rngs=rngs)

  def __call__(self, x):
    return 2 * self.dense(jnp.reshape(x, (x.shape[0], -1)))


def test_estimates_see_the_whole_logit():
  """Without constants the slopes of the logits themselves are measured."""
  model = _model(
    encoder=encoders.custom(_Doubling, embedding_dim=6),
  )
  params, _ = model.init(jax.random.key(0))
  with pytest.raises(ValueError, match="states no Lipschitz bound"):
    rmm.certify(model, params, _batch())
  found = rmm.certify(model, params, _batch(), source="empirical")
  assert not found.sound
  assert np.all(np.asarray(found.radius) > 0)


@pytest.mark.parametrize(
  "change,message",
  [
    ({"block": "projected"}, "block must be one of"),
    ({"width": 7}, "width must be even"),
    ({"embedding_dim": 3}, "embedding_dim of modality 'trunk'"),
    ({"stem": 3}, "stem must be even"),
  ],
)
def test_bad_options_are_refused_by_name(change, message):
  with pytest.raises(ValueError, match=message):
    _model(**change).init(jax.random.key(0))
