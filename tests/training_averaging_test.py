"""Averaged parameters in the one loop: what is kept, resumed, sharded."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recipes_models as helpers
from killed_runs import Killed
from killed_runs import load
from killed_runs import train
from run_checkpoints import assert_same
from run_checkpoints import kept
from run_checkpoints import named
from run_checkpoints import stored

import robust_mm
from robust_mm import recipes
from robust_mm import weights
from robust_mm.recipes import objectives
from robust_mm.training import recipe as recipe_lib
from robust_mm.training import runs
from robust_mm.training import setup as setup_lib
from robust_mm.training import sharding
from robust_mm.training import state as state_lib
from robust_mm.training import steps
from robust_mm.training import writers

DECAY = 0.15  # the first early decay is 0.18, the second 0.25
ON = f"training.average_decay={DECAY}"
EVERY = ("training.checkpoint_every=1", "training.keep_checkpoints=99")
JOINT = "configs/joint.py:digits,smoke"


def losses(workdir):
  return [row["loss"] for row in writers.read(workdir) if "loss" in row]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("plain")
  train(load(JOINT, *EVERY), workdir)
  return workdir


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("averaged")
  train(load(JOINT, ON, *EVERY), workdir)
  return workdir


def test_what_is_kept_is_the_average_of_the_parameters_trained(plain, averaged):
  """Closed form, from the raw parameters of a run that averages nothing."""
  np.testing.assert_allclose(losses(averaged), losses(plain), rtol=1e-5)
  model, last, _, config = robust_mm.load(plain)
  key, _ = jax.random.split(jax.random.key(config.seed))
  path = [model.init(key)[0]]
  path += [stored(plain, step)["params"] for step in (1, 2, 3)]
  path = [named(params) for params in [*path, last]]
  found = kept(averaged)
  for name, average in path[0].items():
    for params in path[1:]:
      average = DECAY * average + (1 - DECAY) * params[name]
    np.testing.assert_allclose(
      found[name], average, rtol=1e-4, atol=1e-6, err_msg=name
    )
    assert np.max(np.abs(path[-1][name] - average)) > 1e-5, name


def test_raw_parameters_go_on_beside_the_average(averaged, plain):
  state, before = stored(averaged, 3), stored(plain, 3)
  for name, value in named(state["params"]).items():
    np.testing.assert_allclose(
      value, named(before["params"])[name], rtol=1e-4, atol=1e-6
    )
  assert "average" not in before
  assert named(state["average"]).keys() == named(state["params"]).keys()


def test_validation_is_of_the_average(averaged):
  model, params, state, config = robust_mm.load(averaged)
  source = setup_lib.open_split(config, "validation")
  predict = steps.make_predict(model, certified=False)
  rows = predict(params, state, source.batch())
  said = [row for row in writers.read(averaged) if "validation_loss" in row]
  np.testing.assert_allclose(
    said[-1]["validation_loss"], np.mean(rows["loss"]), rtol=1e-5
  )


@pytest.mark.parametrize("kill_at", [2, 4])
def test_killed_run_resumes_bit_identically(tmp_path, averaged, kill_at):
  config = load(JOINT, ON, *EVERY, "training.log_every=1")
  whole = tmp_path / "whole"
  train(config, whole)
  with pytest.raises(Killed):
    train(config, tmp_path / "killed", kill_at)
  assert train(config, tmp_path / "killed").finished
  assert_same(kept(tmp_path / "killed"), kept(whole))
  assert_same(kept(whole), kept(averaged))
  assert writers.read(tmp_path / "killed") == writers.read(whole)


@pytest.mark.parametrize("variant", ["", ",published"])
def test_phases_hand_the_average_on_and_are_judged_by_it(tmp_path, variant):
  spec = f"configs/crmt.py:digits{variant},smoke"
  whole = tmp_path / "whole"
  train(load(spec, ON), whole)
  with pytest.raises(Killed):
    train(load(spec, ON), tmp_path / "killed", kill_at=4)
  assert train(load(spec, ON), tmp_path / "killed").finished
  assert_same(kept(tmp_path / "killed"), kept(whole))
  margins, last = kept(whole, "margins"), kept(whole)
  for name, value in margins.items():
    if name != "fusion/integration/alpha":
      np.testing.assert_array_equal(value, last[name], err_msg=name)
  verdict = runs.describe(whole)["finished"]["integration"]["verdict"]
  assert "accuracy at radius" in verdict


def test_a_step_two_that_keeps_its_best_is_not_averaged():
  tx = optax.sgd(1.0)
  model = helpers.lipschitz_model()
  first, second = recipes.crmt(
    model, num_steps=1, tx=tx, integration_steps=2
  ).phases
  assert first.averaged
  assert not second.averaged


def test_eight_devices_keep_the_average_where_the_parameters_are(
  tmp_path, averaged
):
  rule = "mesh.rules=(('encoders/left/dense_0/kernel', ('data', None)),)"
  config = load(JOINT, ON, *EVERY, "mesh.data=8", rule)
  with pytest.raises(Killed):
    train(config, tmp_path, kill_at=2)
  assert train(config, tmp_path).finished
  one, eight = kept(averaged), kept(tmp_path)
  for name, value in one.items():
    np.testing.assert_allclose(eight[name], value, atol=1e-4, err_msg=name)


def frozen_phase(model):
  return recipes.Phase(
    name="x",
    num_steps=4,
    loss=objectives.cross_entropy_loss(model),
    tx=optax.adam(0.1),
    trainable="encoders/a",
  )


def test_shardings_of_the_average_are_those_of_what_is_trained():
  model = helpers.concat_model()
  phase = frozen_phase(model)
  mesh = sharding.make_mesh(data=2, model=1)
  rules = [("kernel", ("data", None))]
  abstract = jax.eval_shape(
    state_lib.initializer(model, phase, average=True), jax.random.key(0)
  )
  found = sharding.state_shardings(abstract, mesh, rules, phase)
  expected, _ = state_lib.split(found.params, phase.trainable)
  assert found.average == expected
  specs = {s.spec for s in jax.tree.leaves(found.average)}
  assert specs == {jax.sharding.PartitionSpec("data", None)}


def test_frozen_parameters_are_bit_identical_in_the_average():
  model = helpers.concat_model()
  phase = frozen_phase(model)
  key = jax.random.key(0)
  state = jax.jit(state_lib.initializer(model, phase, average=True))(key)
  before = named(state.params)
  step = jax.jit(steps.make_train_step(phase, average_decay=0.9))
  average = weights.start_average(state.params["encoders"]["a"])
  for count in range(1, 5):
    state, _ = step(state, helpers.make_batch(), key)
    average = weights.moving_average(
      average, state.params["encoders"]["a"], decay=0.9, count=count
    )
  choose = steps.candidate(model, phase, average=True)
  after = named(jax.jit(choose)(state.params, state.average))
  moved = {n for n, v in after.items() if not np.array_equal(v, before[n])}
  assert moved == {n for n in before if n.startswith("encoders/a/")}
  for name, value in named(average).items():
    np.testing.assert_allclose(after[f"encoders/a/{name}"], value, rtol=1e-6)


def test_a_later_phase_counts_its_own_updates():
  model = helpers.concat_model()
  phase = frozen_phase(model)
  params, model_state = jax.jit(model.init)(jax.random.key(0))
  state = state_lib.create(
    jnp.int32(100), params, model_state, phase, jax.random.key(0), average=True
  )
  step = steps.make_train_step(phase, average_decay=0.99, start=100)
  state, _ = jax.jit(step)(state, helpers.make_batch(), jax.random.key(0))
  for name, value in named(state.average).items():
    old, new = named(params)[name], named(state.params)[name]
    np.testing.assert_allclose(value, (2 * old + 9 * new) / 11, rtol=1e-5)


def test_jobs_see_raw_parameters(tmp_path, monkeypatch):
  def look(state, batch, key):
    del batch, key
    return state, {
      "raw": optax.tree.norm(state.params),
      "average": optax.tree.norm(state.average),
    }

  def make_recipe(config, setup):
    phase = recipes.Phase(
      name="x",
      num_steps=4,
      loss=objectives.cross_entropy_loss(setup.model),
      tx=optax.adam(0.1),
      jobs=(
        recipes.Job(name="look", run=look, period=1, start=1, batch_size=8),
      ),
    )
    return recipes.Recipe(name="tiny", phases=(phase,))

  monkeypatch.setattr(recipe_lib, "make", make_recipe)
  train(load(JOINT, ON, *EVERY), tmp_path)
  rows = writers.read(tmp_path)
  trained = [r["parameter_norm"] for r in rows if "parameter_norm" in r]
  looks = [row for row in rows if "look_raw" in row]
  np.testing.assert_allclose([r["look_raw"] for r in looks], trained, 1e-6)
  assert all(r["look_average"] != r["look_raw"] for r in looks)


def test_projected_weights_are_projected_after_averaging(tmp_path):
  config = load(
    "configs/crmt.py:digits",
    "model.encoders.default.block=projected",
    "num_steps=5",
    "optimizer.lr=0.1",
    "optimizer.warmup_steps=0",
    "data.max_train_examples=64",
    "data.batch_size=16",
    "training.average_decay=0.5",
    "recipe.options.integration_steps=0",
  )
  train(config, tmp_path)
  _, params, _, _ = robust_mm.load(tmp_path)
  for part in params["encoders"]["left"].values():
    for matrix in np.asarray(part["weight"], np.float64):
      assert abs(np.linalg.norm(matrix, 2) - 1) < 1e-5


def test_a_run_from_before_there_were_averages_goes_on(tmp_path, plain):
  with pytest.raises(Killed):
    train(load(JOINT, *EVERY), tmp_path, kill_at=2)
  path = tmp_path / runs.CONFIG_FILE
  tree = json.loads(path.read_text())
  del tree["training"]["average_decay"]
  path.write_text(json.dumps(tree))
  with pytest.raises(
    robust_mm.UserError,
    match=r"config.training.average_decay is 0.0 there and 0.15 here",
  ):
    train(load(JOINT, ON, *EVERY), tmp_path)
  assert train(load(JOINT, *EVERY), tmp_path).finished
  assert_same(kept(tmp_path), kept(plain))
