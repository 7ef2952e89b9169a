"""Aimed attacks: restrained_softmax.md 14.11, and the nearest class."""

import evaluation_models as toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import attacks
from robust_mm.attacks import base


def _nearest(params, batch, norm):
  """The exact distance of every example to its nearest wrong class."""
  exact = toy.exact_radii if norm == 2 else toy.exact_linf_radii
  return exact(params, batch["inputs"])


@pytest.mark.parametrize("norm", [2, "linf"])
@pytest.mark.parametrize("targets", ["rivals", "adaptive"])
def test_aimed_pgd_reaches_the_boundary_of_a_linear_model(norm, targets):
  """Broken at 1.001 of the exact distance, and never at 0.999 of it."""
  model, batch = toy.linear_model(), toy.make_batch(40)
  params, state = model.init(jax.random.key(0))
  logits_fn = attacks.logits_fn(model, params, state, batch["present"])
  label = jnp.argmax(logits_fn(batch["inputs"]), axis=-1)
  distance = _nearest(params, batch, 2 if norm == 2 else "linf")
  attack = attacks.pgd(
    norm=norm, budget=1.0, num_steps=50, num_restarts=3, targets=targets
  )
  survives = jax.jit(
    lambda budget: attacks.survives(
      jax.random.key(0),
      attack,
      logits_fn,
      batch["inputs"],
      label,
      budget=budget,
    )
  )
  assert not np.any(survives(jnp.asarray(1.001 * distance, jnp.float32)))
  assert np.all(survives(jnp.asarray(0.999 * distance, jnp.float32)))


def test_adaptive_targets_are_the_best_and_the_nearest_class():
  """Three rivals: the best one is far away, the nearest has a steep row."""
  weight = np.array([[0.0, 0], [1, 0], [0, 50.0], [-1, -1]])
  bias = np.array([3.0, 2.0, 0.0, -5.0])

  def logits_fn(inputs):
    rows = inputs["x"] @ jnp.asarray(weight.T, jnp.float32)
    return rows + jnp.asarray(bias, jnp.float32)[None]

  inputs = {"x": jnp.zeros((2, 2))}
  label = jnp.zeros(2, int)
  seen = []
  real = base.Objective.nearest

  def spy(self, number):
    seen.append(np.asarray(real(self, number)))
    return real(self, number)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(base.Objective, "nearest", spy)
    attack = attacks.pgd(
      norm=2, budget=0.1, num_restarts=4, num_steps=10, targets="adaptive"
    )
    moved = attack(jax.random.key(0), logits_fn, inputs, label)
  # Distances of 1 (by slope 1), 3 / 50 and 8 / sqrt(2).
  assert seen[0].tolist() == [[2, 2], [1, 1], [3, 3]]
  assert np.all(np.argmax(logits_fn(moved), axis=-1) == 2)
  plain = attacks.pgd(
    norm=2, budget=0.1, num_restarts=2, num_steps=10, random_start=False
  )
  # Raising the best wrong class alone, as one without a first look does.
  one = attacks.pgd(norm=2, budget=0.1, num_steps=10, targets="adaptive",
                    num_restarts=1)  # fmt: skip
  moved = one(jax.random.key(0), logits_fn, inputs, label)
  assert np.all(np.argmax(logits_fn(moved), axis=-1) == 0)
  assert plain.settings["targets"] == "rivals"


@pytest.mark.parametrize(
  "norm, dual", [(2, 2), ("linf", 1)], ids=("l2", "linf")
)
def test_the_nearest_class_is_so_in_the_ball_and_its_units(norm, dual):
  """Of a linear model the distance is a quotient, whatever the units."""
  rng = np.random.default_rng(3)
  units = {"x": 0.1, "y": 4.0}
  rows = {m: rng.normal(size=(5, 3)) for m in units}
  bias = np.array([4.0, 1.0, 0.0, -1.0, 0.5])

  def logits_fn(inputs):
    said = sum(inputs[m] @ jnp.asarray(rows[m].T, jnp.float32) for m in rows)
    return said + jnp.asarray(bias, jnp.float32)[None]

  inputs = {m: jnp.zeros((1, 3)) for m in rows}
  seen, real = [], base.Objective.nearest

  def spy(self, number):
    seen.append(np.asarray(real(self, number))[:, 0].tolist())
    return real(self, number)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(base.Objective, "nearest", spy)
    attacks.pgd(
      norm=norm, budget=0.1, num_restarts=5, num_steps=1, targets="adaptive",
      units=units,
    )(jax.random.key(0), logits_fn, inputs, jnp.zeros(1, int))  # fmt: skip

  def order(units, dual):
    slope = np.concatenate(
      [units[m] * (rows[m][1:] - rows[m][0]) for m in rows], axis=1
    )
    distance = (bias[0] - bias[1:]) / np.linalg.norm(slope, dual, axis=1)
    return (1 + np.argsort(distance)).tolist()

  assert seen[0] == order(units, dual)
  assert seen[0] != order(dict.fromkeys(units, 1.0), dual)
