"""A small model of three modalities and its ModalImmune recipe."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robust_mm import modalities
from robust_mm import models
from robust_mm import recipes
from robust_mm.models import encoders
from robust_mm.recipes import destruction
from robust_mm.training import state as state_lib

SHAPES = {"a": (6,), "b": (3, 2), "c": (5,)}
NAMES = tuple(SHAPES)
FEATURES = {
  name: (np.zeros(np.prod(s), np.float32), np.ones(np.prod(s), np.float32))
  for name, s in SHAPES.items()
}
DROPOUT = {
  "collapse_weight": 0.0,
  "controller": "uniform",
  "gate": "none",
  "clip": None,
  "guard_tolerance": None,
}


def small():
  """A fusion of three modalities whose encoders are perceptrons."""
  encoder = encoders.mlp(hidden_sizes=(6,), embedding_dim=4, activation="gelu")
  return models.masked_fusion(
    dict.fromkeys(SHAPES, encoder), 3, input_shapes=SHAPES, width=8
  )


def make_batch(seed=0, size=24, missing=0.3):
  rng = np.random.default_rng(seed)
  present = {n: jnp.asarray(rng.random(size) >= missing) for n in SHAPES}
  inputs = {
    name: jnp.asarray(rng.normal(size=(size, *shape)), jnp.float32)
    for name, shape in SHAPES.items()
  }
  return {
    "inputs": modalities.mask(inputs, present),
    "present": present,
    "label": jnp.asarray(rng.integers(0, 3, size)),
    "id": jnp.arange(size),
  }


def make(model, *, num_steps=50, tx=None, **options):
  recipe = recipes.modal_immune(
    model, num_steps=num_steps, tx=tx or optax.sgd(1.0), **options
  )
  return recipe.phases[0]


def begin(model, phase):
  return jax.jit(state_lib.initializer(model, phase))(jax.random.key(0))


def settings_of(monkeypatch, model, **options):
  """What the arguments have been made into."""
  found = []
  real = destruction.make_update

  def spy(settings, tx):
    found.append(settings)
    return real(settings, tx)

  monkeypatch.setattr(destruction, "make_update", spy)
  make(model, **options)
  return found[0]
