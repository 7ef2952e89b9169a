"""Plain dense encoders trained to be certifiable."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import robust_mm as rmm
from robust_mm import attacks
from robust_mm import recipes
from robust_mm.models import encoders
from robust_mm.training import state as state_lib
from robust_mm.training import steps

SHAPES = {"left": (8, 4, 1), "right": (8, 4, 1)}
STEPS = 150


HALVED = rmm.models.Normalization(
  mean=np.zeros((1, 1, 1), np.float32),
  scale=np.full((1, 1, 1), 0.5, np.float32),
)


def _model(**right):
  plain = functools.partial(encoders.mlp, hidden_sizes=(32,), embedding_dim=16)
  return rmm.models.concat_fusion(
    {"left": plain(), "right": right.get("encoder", plain())},
    num_classes=10,
    input_shapes=SHAPES,
    normalization={"left": HALVED},
  )


@functools.cache
def _digits(split):
  return jax.tree.map(jnp.asarray, rmm.data.load("digits", split=split))


def _loss(recipe):
  (phase,) = recipe.phases
  return jax.jit(functools.partial(phase.loss, key=jax.random.key(0)))


def test_penalty_is_the_sum_of_the_norms_of_all_layers():
  model = _model()
  params, _ = jax.jit(model.init)(jax.random.key(0))
  make = functools.partial(recipes.joint, model, num_steps=2, tx=optax.sgd(0.1))
  batch = _digits("test")
  plain, _ = _loss(make())(params, {}, batch)
  found, (_, metrics) = _loss(make(spectral_penalty=0.5))(params, {}, batch)
  norms = []
  for name, scale in (("left", 2.0), ("right", 1.0)):
    part = params["encoders"][name]
    layers = [part["hidden"]["0"]["kernel"] * scale, part["last"]["kernel"]]
    layers.append(params["fusion"]["head"][name])
    norms += [np.linalg.norm(np.asarray(w, np.float64), 2) for w in layers]
  # An upper bound, within 3 % at these sizes.
  assert np.sum(norms) <= metrics["spectral_norms"] <= 1.03 * np.sum(norms)
  np.testing.assert_allclose(
    found - plain, 0.5 * metrics["spectral_norms"], rtol=1e-5
  )


@functools.cache
def _radii(penalty, recipe):
  """Mean certified radius of test digits that are right, and their share."""
  found, right, _ = _certified(penalty, recipe)
  return float(np.mean(np.where(right, found.radius, 0))), float(right.mean())


@functools.cache
def _certified(penalty, recipe):
  """The certificate, which test digits are right, and the network."""
  model = _model()
  options = {} if recipe == "joint" else {"r0": 0.6}
  (phase,) = getattr(recipes, recipe)(
    model,
    num_steps=STEPS,
    tx=optax.adam(5e-3),
    spectral_penalty=penalty,
    **options,
  ).phases
  step = steps.make_train_step(phase)
  train = _digits("train")

  @jax.jit
  def run(key):
    state = state_lib.initializer(model, phase)(key)
    state, _ = jax.lax.scan(
      lambda state, _: (step(state, train, key)[0], None), state, length=STEPS
    )
    return state.params

  params = run(jax.random.key(0))
  test = _digits("test")
  found = jax.jit(functools.partial(rmm.certify, model))(params, test)
  assert found.sound
  right = np.asarray(found.prediction) == np.asarray(test["label"])
  return found, right, (model, params)


def test_penalty_makes_a_plain_network_certifiable():
  without, accuracy = _radii(0.0, "joint")
  lifted, after = _radii(0.02, "joint")
  assert accuracy > 0.93
  assert after > 0.93
  assert lifted > 1.5 * without


def test_penalty_closes_most_of_the_gap_to_the_attack():
  """Certified radius over the nearest adversarial point, mean by mean."""
  share = []
  for penalty in (0.0, 0.05):
    found, right, (model, params) = _certified(penalty, "joint")
    test = jax.tree.map(lambda x: x[:90], _digits("test"))
    logits_fn = attacks.logits_fn(model, params, {}, test["present"])
    attack = attacks.minimum_norm(norm=2)
    run = jax.jit(functools.partial(attacks.distances, attack=attack))
    nearest = np.asarray(
      run(
        jax.random.key(0),
        logits_fn=logits_fn,
        inputs=test["inputs"],
        label=test["label"],
      )
    )
    radius = np.where(right, found.radius, 0)[:90]
    assert np.all(radius <= nearest * (1 + 1e-5))
    share.append(radius.mean() / nearest.mean())
  assert share[0] < 0.75
  assert share[1] > 0.9


def test_certified_training_of_plain_encoders_beats_the_penalty_alone():
  penalised, _ = _radii(0.02, "joint")
  trained, accuracy = _radii(0.0, "certified_radius")
  assert accuracy > 0.9
  assert trained > penalised


def test_encoder_whose_layers_cannot_be_read_is_refused_by_name():
  model = _model(encoder=encoders.lipschitz_mlp(width=8, embedding_dim=16))
  for recipe in (recipes.joint, recipes.certified_radius):
    with pytest.raises(ValueError, match=r"spectral_penalty .*'right'"):
      recipe(model, num_steps=2, tx=optax.sgd(0.1), spectral_penalty=0.1)
  with pytest.raises(ValueError, match="spectral_penalty"):
    recipes.joint(
      _model(), num_steps=2, tx=optax.sgd(0.1), spectral_penalty=-1.0
    )
