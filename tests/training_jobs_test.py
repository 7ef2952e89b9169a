"""Recipes with a state, an update and jobs of their own, in the one loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from killed_runs import Killed
from killed_runs import load
from killed_runs import train

import robust_mm
from robust_mm import recipes
from robust_mm.recipes import objectives
from robust_mm.training import recipe as recipe_lib
from robust_mm.training import setup as setup_lib
from robust_mm.training import state as state_lib
from robust_mm.training import writers

SMOKE = "configs/joint.py:digits,smoke"


def make_phase(model, name, tx):
  """Counts, in its extra state, and decays the loss by what jobs have seen."""
  loss_fn = objectives.cross_entropy_loss(model)

  def extra(params, key):
    del params
    return {
      "noise": jax.random.normal(key, (3,)),
      "seen": jnp.zeros((), jnp.int32),
      "scale": jnp.ones(()),
      "key": key,
    }

  def update(state, batch, key):
    def scaled(params):
      loss, aux = loss_fn(params, state.model_state, batch, key=key)
      return loss * state.extra["scale"], aux

    grads, (_, metrics) = jax.grad(scaled, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    noise = state.extra["noise"] + jax.random.normal(key, (3,))
    return dataclasses.replace(
      state,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
      extra={**state.extra, "noise": noise},
    ), {"loss": jnp.sum(noise), **metrics}

  def look(state, batch, key):
    fresh, used = batch
    extra = {
      **state.extra,
      "seen": state.extra["seen"] + jnp.sum(fresh["id"]).astype(jnp.int32),
      "scale": state.extra["scale"] * jax.random.uniform(key),
    }
    state = dataclasses.replace(state, extra=extra)
    return state, {
      "ids": jnp.sum(fresh["id"]),
      "trained": jnp.sum(used["id"]),
      "rows": jnp.asarray(len(fresh["id"])),
    }

  def count(state, batch, key):
    del key
    return state, {"rows": jnp.asarray(len(batch["id"]))}

  return recipes.Phase(
    name=name,
    num_steps=6,
    tx=tx,
    extra=extra,
    update=update,
    jobs=(
      recipes.Job(
        name="look",
        run=look,
        period=2,
        start=1,
        batch_size=8,
        with_training=True,
      ),
      recipes.Job(name="count", run=count, period=3, start=3, batch_size=999),
      recipes.Job(
        name="learn",
        run=count,
        period=3,
        start=3,
        batch_size=999,
        source="train",
      ),
    ),
  )


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
  def make_recipe(config, setup):
    phases = [
      make_phase(setup.model, name, optax.adam(1e-2))
      for name in ("first", "second")
    ]
    return recipes.Recipe(name="tiny", phases=tuple(phases))

  monkeypatch.setattr(recipe_lib, "make", make_recipe)


def leaves(workdir):
  _, params, _, _ = robust_mm.load(workdir)
  return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def rows(workdir):
  return writers.read(workdir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  return tmp_path_factory.mktemp("whole")


@pytest.fixture
def undisturbed(whole):
  if not rows(whole):
    train(load(SMOKE), whole)
  return whole


@pytest.mark.parametrize("kill_at", [2, 6, 8])
def test_killed_run_resumes_bit_identically(tmp_path, undisturbed, kill_at):
  with pytest.raises(Killed):
    train(load(SMOKE), tmp_path, kill_at)
  assert train(load(SMOKE), tmp_path).finished
  for a, b in zip(leaves(tmp_path), leaves(undisturbed), strict=True):
    np.testing.assert_array_equal(a, b)
  assert rows(tmp_path) == rows(undisturbed)


def test_jobs_are_due_when_they_say_and_see_batches_of_their_split(undisturbed):
  looks = [row for row in rows(undisturbed) if "look_ids" in row]
  assert [row["step"] for row in looks] == [1, 3, 5, 7, 9, 11]
  assert {row["look_rows"] for row in looks} == {8}
  # Each phase sees the same stream from its beginning.
  ids = [row["look_ids"] for row in looks]
  assert ids[:3] == ids[3:]
  assert len(set(ids[:3])) == 3
  counts = [row for row in rows(undisturbed) if "count_rows" in row]
  assert [row["step"] for row in counts] == [3, 6, 9, 12]
  # More than there are: all of them.
  assert {row["count_rows"] for row in counts} == {32}
  learns = [row for row in rows(undisturbed) if "learn_rows" in row]
  assert {row["learn_rows"] for row in learns} == {64}


def test_eight_devices_do_the_same_work(tmp_path, undisturbed):
  with pytest.raises(Killed):
    train(load(SMOKE, "mesh.data=8"), tmp_path, 4)
  assert train(load(SMOKE, "mesh.data=8"), tmp_path).finished
  for one, eight in zip(rows(undisturbed), rows(tmp_path), strict=True):
    assert one.keys() == eight.keys()
    for name, value in one.items():
      if not isinstance(value, str):
        np.testing.assert_allclose(eight[name], value, rtol=1e-4, atol=1e-5)


def test_extra_is_drawn_anew_for_every_phase():
  config = load(SMOKE)
  setup = setup_lib.prepare(config)
  phase = make_phase(setup.model, "x", optax.adam(1e-2))
  key = jax.random.key(0)
  first = state_lib.initializer(setup.model, phase)(key)
  later = state_lib.create(
    jnp.int32(6), first.params, first.model_state, phase, key
  )
  assert np.all(first.extra["noise"] != later.extra["noise"])


def test_phases_refuse_what_they_cannot_run():
  job = recipes.Job(name="a", run=print, period=1, start=1, batch_size=1)
  common = {"name": "x", "num_steps": 1, "tx": optax.sgd(1.0)}
  with pytest.raises(ValueError, match="trainable must be"):
    recipes.Phase(**common, update=lambda *_: None, trainable="head")
  with pytest.raises(ValueError, match="different names"):
    recipes.Phase(**common, loss=print, jobs=(job, job))
  for both in ({}, {"loss": print, "update": print}):
    with pytest.raises(ValueError, match="either a loss or an update"):
      recipes.Phase(**common, **both)
  with pytest.raises(ValueError, match="period"):
    dataclasses.replace(job, period=0)


def test_too_few_validation_examples_for_the_mesh_are_refused(tmp_path):
  config = load(SMOKE, "mesh.data=8", "data.max_eval_examples=4")
  with pytest.raises(robust_mm.UserError, match="look job needs at least 8"):
    train(config, tmp_path)
