"""Phases, what they train, and the joint recipe."""

import jax
import numpy as np
import pytest
import recipes_models as helpers

from robust_mm import recipes
from robust_mm.recipes import objectives
from robust_mm.training import state as state_lib


def test_frozen_parameters_stay_bit_identical():
  model = helpers.lipschitz_model()
  phase = recipes.Phase(
    name="x",
    num_steps=1,
    loss=objectives.cross_entropy_loss(model),
    tx=helpers.TX,
    trainable="fusion/",
  )
  recipe = recipes.Recipe(name="x", phases=(phase,))
  params, _ = jax.jit(model.init)(jax.random.key(0))
  state, _ = helpers.run(recipe, model, helpers.make_batch(), 3)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    after = state.params
    for part in name.split("/"):
      after = after[part]
    same = np.array_equal(leaf, after)
    assert same == (not name.startswith("fusion/")), name


def test_trainable_that_matches_nothing_is_refused():
  with pytest.raises(ValueError, match=r"'zzz' matches no parameter.*alpha"):
    state_lib.split({"alpha": 1.0}, "zzz")


def test_split_and_merge_are_inverse():
  params = {"a": {"x": 1.0, "y": 2.0}, "b": 3.0}
  chosen, frozen = state_lib.split(params, "a/x|b")
  assert chosen == {"a": {"x": 1.0, "y": None}, "b": 3.0}
  assert state_lib.merge(chosen, frozen) == params


def test_absent_examples_do_not_count_in_the_joint_loss():
  model = helpers.ordinary_model()
  params, state = jax.jit(model.init)(jax.random.key(0))
  batch = helpers.make_batch()
  loss = objectives.cross_entropy_loss(model)
  whole, _ = loss(params, state, batch, key=None)
  gone = {
    name: flag.at[8:].set(False) for name, flag in batch["present"].items()
  }
  half, _ = loss(params, state, {**batch, "present": gone}, key=None)
  first = jax.tree.map(lambda x: x[:8], batch)
  alone, _ = loss(params, state, first, key=None)
  np.testing.assert_allclose(half, alone, rtol=1e-6)
  assert abs(half - whole) > 1e-6


def test_joint_refuses_by_name():
  for arguments, message in (
    ({"units": {"c": 1.0}}, "units"),
    ({"clean_weight": 0.5}, "clean_weight must be 0 unless"),
  ):
    with pytest.raises(ValueError, match=message):
      recipes.joint(
        helpers.ordinary_model(), num_steps=1, tx=helpers.TX, **arguments
      )
