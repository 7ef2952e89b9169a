"""certification.md 11.7: attacks on a trained model, inside its radii."""

import dataclasses

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
EVERYTHING = ("left", "right")


@pytest.fixture(scope="module")
def trained():
  """(model, parameters, 200 test digits), trained for the radius."""
  part = {
    "name": "lipschitz_mlp",
    "block": "bjorck",
    "stem": 32,
    "width": 32,
    "num_blocks": 1,
    "embedding_dim": 16,
  }
  shapes = dict.fromkeys(EVERYTHING, (8, 4, 1))
  model = models.build(
    fusion="orthogonal",
    encoders=dict.fromkeys(EVERYTHING, part),
    num_classes=10,
    input_shapes=shapes,
  )
  batch = jax.tree.map(jnp.asarray, rmm.data.load("digits", split="train"))
  tx = optax.adam(optax.cosine_decay_schedule(3e-2, 150))

  def loss_fn(params):
    outputs, _ = model.apply(
      params, {}, batch["inputs"], batch["present"], train=True
    )
    sensitivity = certification.sensitivity(
      model.geometry(params), batch["label"], batch["present"]
    )
    return losses.certified_radius(
      outputs.logits, sensitivity, batch["label"], r0=0.6, temperature=0.1
    )

  params = fit(loss_fn, model.init, tx, num_steps=150)
  test = rmm.data.load("digits", split="test", limit=SIZE)
  return model, params, jax.tree.map(jnp.asarray, test)


@pytest.fixture(scope="module")
def flips(trained):
  """``flips(certificate, names)``: whom an attack inside its radius changes."""
  model, params, batch = trained
  attack = attacks.pgd(norm=2, budget=1.0, num_steps=60, num_restarts=4)

  @jax.jit
  def run(label, budget):
    def logits_fn(inputs):
      return model.apply(params, {}, inputs, batch["present"])[0].logits

    found = attack(
      jax.random.key(0), logits_fn, batch["inputs"], label, budget=budget
    )
    return jnp.argmax(logits_fn(found), axis=-1) != label

  def flipped(certificate, names):
    if names == EVERYTHING:
      radius = certificate.radius
      budget = 0.999 * radius
    else:
      radius = certificate.modality_radius[names[0]]
      budget = {
        name: 0.999 * radius if name in names else jnp.zeros(SIZE)
        for name in EVERYTHING
      }
    assert np.all(np.isfinite(radius))
    assert np.mean(np.asarray(radius) > 0) > 0.95
    return np.asarray(run(certificate.prediction, budget))

  return flipped


@pytest.mark.parametrize(
  "names", [EVERYTHING, ("left",), ("right",)], ids="+".join
)
def test_no_attack_of_a_trained_model_succeeds_inside_the_radius(
  trained, flips, names
):
  model, params, batch = trained
  found = rmm.certify(model, params, batch)
  assert np.mean(found.prediction == batch["label"]) > 0.9
  assert not np.any(flips(found, names))
  # The same attack refutes constants that are too small.
  tables = certification.sensitivity_tables(model, params)
  wrong = dataclasses.replace(
    tables, tables={m: 0.4 * t for m, t in tables.tables.items()}
  )
  cheat = rmm.certify(model, params, batch, tables=wrong)
  assert flips(cheat, names).mean() > 0.5
