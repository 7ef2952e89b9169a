"""Every shipped configuration takes its steps on real data."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import _validate
from robust_mm import config as config_lib
from robust_mm import training
from robust_mm.recipes import noise_rounds
from robust_mm.training import recipe as recipe_lib
from robust_mm.training import setup as setup_lib

PREPARED = ("utd_mhad", "mfeat", "mosi", "av_digits")


def smoke(spec, workdir, path=""):
  config = config_lib.load(
    f"{spec},smoke",
    ["--config.mesh.data=1", f"--config.data.path={path}"],
  )
  result = training.train(config, workdir, say=lambda line: None)
  assert result.finished
  if "diabetes" in spec:
    assert 0 < result.metrics["mae"] < 400
  else:
    assert 0 <= result.metrics["accuracy"] <= 1


def variants(file, *combined):
  """What a file says it knows, each alone, and some together."""
  path, _ = config_lib.find(f"configs/{file}.py")
  alone = set(runpy.run_path(str(path))["VARIANTS"]) - {"smoke"}
  return [f"configs/{file}.py:digits,{v}" for v in (*sorted(alone), *combined)]


@pytest.mark.parametrize(
  "spec",
  [
    "configs/joint.py:digits",
    *variants("joint", "noise,token"),
    "configs/joint.py:diabetes",
    "configs/joint.py:diabetes,dropout",
    "configs/joint.py:diabetes,noise,token",
    "configs/crmt.py:digits",
    *variants("crmt", "published,Mix"),
    "configs/restrained_softmax.py:digits",
    "configs/restrained_softmax.py:digits,prsl,published",
    "configs/restrained_softmax.py:digits,prsl,scores",
    "configs/restrained_softmax.py:digits,topk_margin",
    "configs/restrained_softmax.py:digits,ce",
    "configs/captioning.py:digits",
    "configs/captioning.py:digits,prsl",
    "configs/captioning.py:digits,prsl,published",
    "configs/captioning.py:digits,logit_norm",
  ],
)
def test_every_variant_takes_its_steps(spec, tmp_path):
  smoke(spec, tmp_path)


@pytest.mark.parametrize("name", PREPARED)
@pytest.mark.parametrize("file", ["joint", "crmt"])
def test_every_data_set_takes_its_steps(file, name, data_dir, tmp_path):
  smoke(f"configs/{file}.py:{name}", tmp_path, data_dir)


@pytest.mark.parametrize(
  "spec",
  [
    "restrained_softmax.py:av_digits",
    "restrained_softmax.py:utd_mhad,complement_kl",
    "captioning.py:av_digits,drsl",
  ],
)
def test_penalties_take_their_steps_on_other_sets(spec, data_dir, tmp_path):
  smoke(f"configs/{spec}", tmp_path, data_dir)


def test_every_penalty_of_a_configuration_exists():
  for file in ("restrained_softmax", "captioning"):
    path, _ = config_lib.find(f"configs/{file}.py")
    for variant, (name, _) in runpy.run_path(str(path))["PENALTIES"].items():
      config = config_lib.load(f"configs/{file}.py:digits,{variant}")
      assert config.penalty.name == name
      if name:
        assert recipe_lib.restraint(config).penalty.name == name


def test_restrained_softmax_is_attacked_where_its_benchmark_is(monkeypatch):
  path = pathlib.Path(__file__).parents[1] / "benchmarks"
  # As ``python benchmarks/NAME.py`` has it.
  monkeypatch.syspath_prepend(path)
  radii = runpy.run_path(str(path / "restrained_softmax.py"))["RADIUS"]
  for dataset in ("digits", "av_digits"):  # the others are relative there
    config = config_lib.load(f"configs/restrained_softmax.py:{dataset}")
    assert config.evaluation.norm == "linf"
    assert len(config.evaluation.radii) == 3
    assert config.evaluation.radii[1] == radii[dataset]
  config = config_lib.load("configs/restrained_softmax.py:digits")
  assert config.evaluation.attack == "auto"
  assert config.evaluation.masking_thorough


# Every variant is in one of them; the first has every part.
IMMUNE = (
  "digits",
  "digits,published,no_spectral,no_reconstruction",
  "digits,no_collapse,fixed,no_consistency,no_damage",
  "digits,l2,no_gate,fixed",
  "digits,no_gate,uniform,fixed",
  "digits,leave_one_out",
  "digits,random_subset",
  "digits,joint",
  "diabetes,every_subset",
  "mfeat,damage_alone",
  "mfeat,fixed",
  "utd_mhad,no_gate",
  "av_digits,fixed",
  "mosi,no_gate",
  "diabetes",
)


@pytest.mark.parametrize("argument", IMMUNE)
def test_modal_immune_takes_its_steps(argument, data_dir, tmp_path):
  path = "" if argument.startswith(("digits", "diabetes")) else data_dir
  smoke(f"configs/modal_immune.py:{argument}", tmp_path, path)


def test_every_variant_of_modal_immune_is_run_above():
  path, _ = config_lib.find("configs/modal_immune.py")
  known = runpy.run_path(str(path))
  words = {word for argument in IMMUNE for word in argument.split(",")}
  words |= set(known["LARGE"])  # cli_multi_label_test, data_large_test
  assert words == {*known["VARIANTS"], *known["DATASETS"]} - {"smoke"}


@pytest.mark.parametrize(
  "argument", ["av_digits,multimodal,permuted", "digits,twice_clean"]
)
def test_nullspace_takes_its_steps(argument, data_dir, tmp_path):
  path = "" if argument.startswith("digits") else data_dir
  smoke(f"configs/nullspace.py:{argument}", tmp_path, path)


def test_every_variant_of_nullspace_is_an_arm_of_the_recipe():
  path, _ = config_lib.find("configs/nullspace.py")
  arms = runpy.run_path(str(path))["ARMS"]
  assert {*arms, "bank"} == set(noise_rounds.ARMS)  # run in recipes_nullspace
  for arm in arms:
    config = config_lib.load(f"configs/nullspace.py:av_digits,{arm}")
    assert config.recipe.options.noise == arm
  bank = config_lib.load("configs/nullspace.py:av_digits,far").recipe.options
  assert (bank.noise, bank.radius_factor) == ("bank", 3.0)


def descent(tx, num_steps):
  """Parameters of a gradient of 1, beginning at 1: [num_steps]."""

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jnp.ones(()), state, params)
    return (params + updates, state), params + updates

  params = jnp.ones(())
  _, path = jax.lax.scan(step, (params, tx.init(params)), length=num_steps)
  return np.asarray(path)


def published_descent(rates, *, decay, restart):
  """SGD of momentum 0.9 that starts anew every ``restart`` steps."""
  params, velocity, path = 1.0, 0.0, []
  for step, rate in enumerate(rates):
    kept = 0.9 * velocity if step % restart else 0.0
    velocity = kept + 1 + decay * params
    params -= rate * velocity
    path.append(params)
  return np.asarray(path)


def test_published_schedule_is_the_published_one():
  """crmt.md 8: both steps, update by update, on the 1,293 digits."""
  config = config_lib.load("configs/crmt.py:digits,published")
  setup = setup_lib.prepare(config)
  recipe = recipe_lib.make(config, setup)
  assert config.data.batch_size == 64
  assert config.recipe.options.rho == 2.0
  head = config.model.fusion_options
  assert head.use_bias
  assert head.centre_rows
  assert head.integration_init == 0.1
  assert config.selection.metric == "accuracy"
  epoch = len(setup.train) // 64
  margins, integration = recipe.phases
  assert margins.num_steps == 140 * epoch
  assert integration.num_steps == 45 * epoch

  rates = 1e-3 * 0.1 ** (np.arange(140).repeat(epoch) // 60)
  np.testing.assert_allclose(
    descent(margins.tx, margins.num_steps),
    published_descent(rates, decay=1e-4, restart=len(rates)),
    rtol=1e-4,
    atol=1e-5,
  )
  rates = np.full(45 * epoch, 3e-5)
  path = descent(integration.tx, integration.num_steps)
  published = published_descent(rates, decay=1e-2, restart=epoch)
  np.testing.assert_allclose(path, published, rtol=1e-5)
  unbroken = published_descent(rates, decay=1e-2, restart=len(rates))
  assert np.max(np.abs(path - unbroken)) > 0.01


def test_a_variant_that_changes_nothing_is_refused():
  with pytest.raises(_validate.UserError, match="fixed changes nothing"):
    config_lib.load("configs/modal_immune.py:utd_mhad,fixed")
  for argument in ("mosi,fixed", "mosi,uniform", "utd_mhad,uniform"):
    with pytest.raises(_validate.UserError, match="changes nothing on"):
      config_lib.load(f"configs/modal_immune.py:{argument}")
  # A control has none of the parts: it must not pass for a new arm, nor lose
  # the one that it is named for.
  for argument in ("damage_alone,no_damage", "joint,uniform"):
    with pytest.raises(_validate.UserError, match="exclude each other"):
      config_lib.load(f"configs/modal_immune.py:digits,{argument}")
  published = config_lib.load("configs/modal_immune.py:utd_mhad,published")
  assert "adapt" not in published.recipe.options
