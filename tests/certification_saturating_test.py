"""What the largest gradient over the training set is worth: nothing.

An encoder that saturates has hardly any gradient at the data and a steep slope
between them. The published estimate then claims radii that an attack refutes;
sound bounds of such a network withstand it.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from certification_models import fit
from flax import nnx

import robust_mm as rmm
from robust_mm import attacks
from robust_mm import certification
from robust_mm import losses
from robust_mm import models

SIZE = 60
SHAPE = (8, 4, 1)


def _model(gain):
  class Saturating(nnx.Module):
    def __init__(self, input_shape, rngs):
      size = math.prod(input_shape)
      self.first = nnx.Linear(size, 32, rngs=rngs)
      self.last = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
      x = jnp.reshape(x, (x.shape[0], -1))
      return self.last(jnp.tanh(gain * self.first(x)))

  return models.late_fusion(
    dict.fromkeys(("left", "right"), models.custom(Saturating, 16)),
    num_classes=10,
    input_shapes=dict.fromkeys(("left", "right"), SHAPE),
  )


@pytest.fixture(scope="module")
def trained():
  """(parameters, training set, test images): trained while smooth."""
  smooth = _model(1.0)
  batch = jax.tree.map(
    jnp.asarray, rmm.data.load("digits", split="train", limit=200)
  )
  tx = optax.adam(optax.cosine_decay_schedule(3e-2, 120))

  def loss_fn(params):
    outputs, _ = smooth.apply(params, {}, batch["inputs"], batch["present"])
    return jnp.mean(losses.cross_entropy(outputs.logits, batch["label"]))

  params = fit(loss_fn, smooth.init, tx, num_steps=120)
  test = rmm.data.load("digits", split="test", limit=SIZE)
  return params, batch, jax.tree.map(jnp.asarray, test)


def _broken(model, params, batch, prediction, radius):
  """Share whose prediction the ensemble changes within its own radius."""
  outcome = attacks.attack_survivors(
    jax.random.key(1),
    attacks.auto(norm=2, budget=1.0),
    attacks.logits_fn(model, params, {}, batch["present"]),
    batch["inputs"],
    prediction,
    budget=radius,
  )
  return 1 - outcome.robust_accuracy


def test_published_radii_are_refuted(trained):
  params, reference, batch = trained
  model = _model(1e6)
  tables = certification.empirical_tables(
    model, params, reference, form="split"
  )
  claimed = rmm.certify(
    model,
    params,
    batch,
    source="empirical",
    tables=tables,
    fidelity="published",
  )
  assert claimed.kind == "estimated"
  right = np.mean(np.asarray(claimed.prediction) == batch["label"])
  assert right > 0.7
  # A digit is about 4 long, and the claim is larger than that.
  assert np.median(claimed.radius) > 4
  radius = jnp.minimum(0.99 * claimed.radius, 4.0)
  assert _broken(model, params, batch, claimed.prediction, radius) > 0.9


def test_sound_radii_of_a_steep_network_are_not(trained):
  params, _, batch = trained
  model = _model(30.0)
  proved = jax.jit(
    lambda params, batch: rmm.certify(model, params, batch, source="relaxation")
  )(params, batch)
  assert proved.sound
  assert np.median(proved.radius) > 1e-3
  assert (
    _broken(model, params, batch, proved.prediction, 0.99 * proved.radius) == 0
  )
