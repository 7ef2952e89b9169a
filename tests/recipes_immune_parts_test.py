"""ModalImmune: removal, reconstruction, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes_immune_models import FEATURES
from recipes_immune_models import NAMES
from recipes_immune_models import SHAPES
from recipes_immune_models import make
from recipes_immune_models import make_batch
from recipes_immune_models import small

from robust_mm import controllers
from robust_mm import modalities
from robust_mm import models
from robust_mm import recipes
from robust_mm.models import encoders
from robust_mm.recipes import decoders


@pytest.fixture(scope="module")
def model():
  return small()


def test_the_traced_removal_is_the_static_one():
  batch = make_batch()
  for arm, name in enumerate(NAMES):
    traced = jax.jit(modalities.removed)(batch["present"], arm)
    jax.tree.map(
      np.testing.assert_array_equal,
      traced,
      modalities.without(batch, name)["present"],
    )


def test_decoders_see_neither_the_removed_nor_the_absent():
  batch = make_batch()
  embeddings = {name: jnp.ones((24, 4)) for name in NAMES}
  made = decoders.init(jax.random.key(0), FEATURES, dict.fromkeys(SHAPES, 4))

  def loss(embeddings, inputs):
    return decoders.loss(
      made,
      FEATURES,
      embeddings,
      modalities.removed(batch["present"], 1),
      {**batch, "inputs": inputs},
    )

  spoiled = {
    n: jnp.where(
      jnp.reshape(batch["present"][n], (-1,) + (1,) * (x.ndim - 1)), x, np.nan
    )
    for n, x in batch["inputs"].items()
  }
  value, grads = jax.value_and_grad(loss)(embeddings, batch["inputs"])
  assert loss(embeddings, spoiled) == value
  alone = (
    batch["present"]["b"] & ~batch["present"]["a"] & ~(batch["present"]["c"])
  )
  assert np.all(np.asarray(grads["b"])[~np.asarray(alone)] == 0)
  assert np.any(grads["a"] != 0)


def test_a_feature_that_hardly_varies_does_not_own_the_reconstruction():
  """As the border of a picture once training moves it."""
  batch = make_batch(missing=0.0)
  embeddings = {name: jnp.ones((24, 4)) for name in NAMES}
  made = decoders.init(jax.random.key(0), FEATURES, dict.fromkeys(SHAPES, 4))
  made = jax.tree.map(jnp.zeros_like, made)  # says the mean of every feature

  def loss(deviation):
    scale = np.ones(6, np.float32)
    scale[0] = deviation
    features = {**FEATURES, "a": (FEATURES["a"][0], scale)}
    return decoders.loss(made, features, embeddings, batch["present"], batch)

  assert 0.8 < loss(1.0) < 1.2
  assert loss(1e-5) < loss(1.0) + decoders.LARGEST**2 / 6 / 3
  wanted = [
    np.mean(np.square(np.clip(batch["inputs"][name], -3, 3))) for name in NAMES
  ]
  np.testing.assert_allclose(loss(1.0), np.mean(wanted), rtol=1e-5)


def test_features_are_pooled_until_they_are_few():
  assert decoders.pooled(np.ones((2, 8, 4))).shape == (2, 32)
  assert decoders.pooled(np.ones((2, 40, 32))).shape == (2, 32)
  assert decoders.pooled(np.ones((2, 5, 40, 32))).shape == (2, 32)
  mean, deviation = recipes.feature_statistics(
    np.array([[1.0, 5.0], [3.0, 5.0], [99.0, 0.0]]),
    np.array([True, True, False]),
  )
  np.testing.assert_allclose(mean, [2, 5])
  np.testing.assert_allclose(deviation, [1, 1])


@pytest.mark.parametrize(
  "options, message",
  [
    ({"fidelity": "corrected"}, "fidelity"),
    ({"collapse_weight": -1.0}, "collapse_weight"),
    ({"gate": "newton"}, "gate must be one of"),
    ({"gate": "none", "gate_options": {"tau": 0.1}}, "gate_options must be"),
    ({"gate_options": {"taw": 0.1}}, "Did you mean 'tau'"),
    ({"gate_options": {"tau": -1.0}}, "tau"),
    (
      {"gate": "fisher", "gate_options": {"per_example_loss_fn": 0}},
      "not take",
    ),
    ({"controller": controllers.uniform(2)}, "controller must have 3 arms"),
    ({"removal": "all"}, "removal"),
    ({"damage_rate": 1.5}, "damage_rate"),
    ({"damage_rate": 0.5, "damage_kinds": ["swap"]}, "damage_kinds"),
    ({"damage_rate": 0.5, "damage_kinds": []}, "damage_kinds"),
    ({"damage_rate": 0.5, "damage_kinds": ["token_drop"]}, "damage_kinds"),
    ({"damage_rate": 0.5, "noise_scale": -1.0}, "noise_scale"),
    ({"damage_rate": 0.5, "noise_scale": {"a": 1.0}}, "noise_scale"),
    ({"temperature": 0.0}, "temperature"),
    ({"outer_solver": "newton"}, "outer_solver"),
    ({"outer_steps": 3}, "outer_steps goes with"),
    ({"outer_solver": "neumann", "outer_steps": 0}, "outer_steps"),
    ({"outer_solver": "identity", "outer_steps": 3}, "outer_steps"),
    ({"damping_ratio": 0.0}, "damping_ratio"),
    ({"consistency_weight": -1.0}, "consistency_weight"),
    ({"feedback_weight": -1.0}, "feedback_weight"),
    ({"collapse_weight": 0.0, "adapt": True}, "adapt must be False"),
    ({"reconstruction_weight": 0.1}, "reconstruction_weight must be 0"),
    ({"features": {"d": ()}}, "features"),
    ({"warmup_steps": 50}, "warmup_steps must be below"),
  ],
)
def test_bad_arguments_are_refused_by_name(model, options, message):
  with pytest.raises(ValueError, match=message):
    make(model, **options)


def test_models_without_encoders_of_their_own_are_refused():
  alone = models.masked_fusion(
    {"a": encoders.mlp()}, 3, input_shapes={"a": (3,)}
  )
  with pytest.raises(ValueError, match="at least two modalities"):
    make(alone)
  plain = models.from_function(
    lambda w, inputs: inputs["a"] @ w + inputs["b"] @ w,
    jnp.eye(3),
    num_classes=3,
    input_shapes={"a": (3,), "b": (3,)},
  )
  with pytest.raises(ValueError, match=r"params\['encoders'\]\['a'\]"):
    make(plain)
