"""Fine-tuning with noise: arms, absence, resumption, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_mm import _compiling
from robust_mm import config as config_lib
from robust_mm import models
from robust_mm import recipes
from robust_mm import training
from robust_mm.models import encoders
from robust_mm.recipes import noise_rounds
from robust_mm.training import checkpoints
from robust_mm.training import recipe as recipe_lib
from robust_mm.training import setup as setup_lib
from robust_mm.training import state as state_lib
from robust_mm.training import steps

SHAPES = {"image": (4, 4), "vector": (6,)}
TX = optax.adam(1e-2)
OPTIONS = {
  "num_steps": 4,
  "tx": TX,
  "segment_steps": 2,
  "solver_examples": 160,
  "solver_steps": 2,
  "solver_batch": 16,
  "num_bisections": 1,
  "max_radius": 1.0,
}


@pytest.fixture(scope="module")
def model():
  return models.concat_fusion(
    {
      "image": encoders.make(
        "vit", size=None, width=8, depth=1, num_heads=2, mlp_dim=8, patch_size=2
      ),
      "vector": encoders.make("mlp", hidden_sizes=(), embedding_dim=8),
    },
    num_classes=3,
    input_shapes=SHAPES,
  )


def make_batch(size, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "inputs": {
      name: jnp.asarray(rng.uniform(size=(size, *shape)), jnp.float32)
      for name, shape in SHAPES.items()
    },
    "present": {name: jnp.ones(size, bool) for name in SHAPES},
    "label": jnp.asarray(rng.integers(0, 3, size)),
    "id": jnp.arange(size),
  }


def absent(batch, name):
  return {
    **batch,
    "present": {**batch["present"], name: jnp.zeros_like(batch["label"], bool)},
  }


@pytest.fixture(scope="module")
def start(model):
  """``arm -> (phase, state after one round)``."""
  done = {}

  def begin(noise, **options):
    key = (noise, *options.items())
    if key not in done:
      recipe = recipes.nullspace(model, noise=noise, **{**OPTIONS, **options})
      phase = recipe.phases[-1]

      @jax.jit(compiler_options=_compiling.options_for_once())
      def run(key):
        state = state_lib.initializer(model, phase)(key)
        metrics = {}
        for job in phase.jobs:
          state, metrics = job.run(state, make_batch(160), key)
        return state, metrics

      done[key] = (phase, *run(jax.random.key(0)))
    return done[key]

  return begin


def step(phase, state, batch, key=0):
  run = jax.jit(
    steps.make_train_step(phase),
    compiler_options=_compiling.options_for_once(),
  )
  return run(state, batch, jax.random.key(key))


def test_split_models_are_the_models(model):
  params, state = model.init(jax.random.key(0))
  batch = make_batch(5)
  flag = jnp.arange(5) != 2
  present = {**batch["present"], "image": flag}
  whole, _ = model.encode(params, state, batch["inputs"], present)
  tokens = model.embed(params, state, batch["inputs"], present)
  assert set(tokens) == {"image"}
  assert tokens["image"].shape == (5, 4, 8)
  parts = model.encode_tokens(params, state, tokens, present)
  np.testing.assert_array_equal(parts["image"], whole["image"])
  far = model.encode_tokens(
    params, state, {"image": tokens["image"] + 100.0}, present
  )
  assert not np.any(far["image"][2])  # absent
  assert np.any(far["image"][0] != whole["image"][0])


@pytest.mark.parametrize("noise", noise_rounds.ARMS)
def test_every_arm_takes_its_steps(noise, start):
  phase, state, metrics = start(noise)
  assert bool(phase.jobs) == (noise not in noise_rounds.CLEAN)
  after, seen = step(phase, state, make_batch(16))
  assert np.isfinite(seen["loss"])
  assert jnp.any(
    after.params["encoders"]["image"]["embed"]["kernel"]
    != state.params["encoders"]["image"]["embed"]["kernel"]
  )
  if phase.jobs:
    shown = state.extra["shown"]["image"]
    assert int(jnp.sum(shown["born"] > 0)) == 1
    assert np.any(shown["noise"])
    assert metrics["radius_image"] > 0
    assert phase.jobs[0].source == "train"


def test_arms_have_the_noise_they_say(start):
  def member(noise):
    _, state, metrics = start(noise)
    return np.asarray(state.extra["shown"]["image"]["noise"][0]), metrics

  learnt, of_learnt = member("bank")
  drawn, of_drawn = member("random")
  # The same search: the same radius, another direction.
  assert of_drawn["radius_image"] == pytest.approx(
    float(of_learnt["radius_image"]), rel=1e-4
  )
  lengths = np.linalg.norm(drawn, axis=-1)
  np.testing.assert_allclose(
    lengths, np.linalg.norm(learnt, axis=-1), rtol=1e-4
  )
  assert abs(np.sum(drawn * learnt)) < 0.9 * np.sum(learnt**2)
  permuted, _ = member("permuted")
  _, state, _ = start("permuted")
  kept = np.asarray(state.extra["bank"]["image"]["noise"][0])
  np.testing.assert_array_equal(np.sort(permuted, None), np.sort(kept, None))
  np.testing.assert_allclose(kept, learnt, rtol=1e-5)
  assert not np.array_equal(permuted, kept)
  small, of_small = member("random_at_criterion")
  assert of_small["criterion_image"] <= 0.03
  assert np.any(small)


def test_noise_on_an_absent_modality_changes_no_bit(start):
  phase, state, _ = start("bank")
  batch = absent(make_batch(16), "image")
  larger = jax.tree.map(lambda x: x, state.extra)
  bank = larger["shown"]["image"]
  larger["shown"]["image"] = {**bank, "noise": 100 * bank["noise"]}
  other = dataclasses.replace(state, extra=larger)
  first, _ = step(phase, state, batch)
  second, _ = step(phase, other, batch)
  for a, b in zip(*map(jax.tree.leaves, (first.params, second.params))):
    np.testing.assert_array_equal(a, b)
  # Where it is present it does.
  first, _ = step(phase, state, make_batch(16))
  second, _ = step(phase, other, make_batch(16))
  heads = (first.params["fusion"], second.params["fusion"])
  assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, heads)))


def test_absent_examples_do_not_count_in_a_search(model, start):
  phase, _, _ = start("bank")
  state = state_lib.initializer(model, phase)(jax.random.key(0))
  run = jax.jit(
    phase.jobs[0].run, compiler_options=_compiling.options_for_once()
  )
  batch = make_batch(160)
  here = jnp.arange(160) % 8 != 0
  batch["present"] = {**batch["present"], "image": here}
  poisoned = dict(batch)
  poisoned["inputs"] = {
    **batch["inputs"],
    "image": jnp.where(here[:, None, None], batch["inputs"]["image"], jnp.nan),
  }
  found = [run(state, b, jax.random.key(3))[1] for b in (batch, poisoned)]
  assert found[0]["radius_image"] > 0
  for word, value in found[0].items():
    np.testing.assert_array_equal(value, found[1][word])


def test_twice_clean_has_two_views_where_inputs_are_augmented(model):
  recipe = recipes.nullspace(model, noise="twice_clean", **OPTIONS)
  assert [phase.views for phase in recipe.phases] == [2]
  phase = recipe.phases[0]
  state = state_lib.initializer(model, phase)(jax.random.key(0))
  batch = make_batch(16)
  _, once = step(phase, state, batch)
  np.testing.assert_allclose(once["clean_loss"], once["noisy_loss"], rtol=1e-6)
  other = {**batch, "second_inputs": make_batch(16, seed=1)["inputs"]}
  _, twice = step(phase, state, other)
  np.testing.assert_allclose(twice["clean_loss"], once["clean_loss"], rtol=1e-6)
  assert abs(twice["noisy_loss"] - once["noisy_loss"]) > 1e-4


def configured(arm, *settings):
  """Parameters after two updates of the last phase of ``digits``."""
  config = config_lib.load(
    f"configs/nullspace.py:digits,{arm},smoke",
    ["--config.recipe.options.pretrain_steps=0", *settings],
  )
  setup = setup_lib.prepare(config)
  (phase,) = recipe_lib.make(config, setup).phases
  state = state_lib.initializer(setup.model, phase)(jax.random.key(0))
  batch = jax.tree.map(jnp.asarray, setup.train.limit(16).batch())
  run = jax.jit(
    steps.make_train_step(phase),
    compiler_options=_compiling.options_for_once(),
  )
  for _ in range(2):
    state, _ = run(state, batch, jax.random.key(1))
  return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(state.params)])


def test_a_second_clean_view_is_another_one_in_the_configuration():
  def apart(*settings):
    arms = [configured(arm, *settings) for arm in ("clean", "twice_clean")]
    return float(jnp.mean(jnp.abs(arms[0] - arms[1])))

  # Of images that are not moved it is the first one, which says nothing: twice
  # the gradient, which AdamW does not see.
  still = [
    f"--config.augmentation.{name}.move.{word}=0"
    for name in ("left", "right")
    for word in ("scale", "shift")
  ]
  moved, unmoved = apart(), apart(*still)
  assert moved > 1e-4
  assert unmoved < moved / 50


def test_random_noise_goes_by_age_and_nothing_found_adds_nothing(model):
  def rounds(noise, **options):
    recipe = recipes.nullspace(model, noise=noise, **{**OPTIONS, **options})
    phase = recipe.phases[-1]
    run = jax.jit(
      phase.jobs[0].run, compiler_options=_compiling.options_for_once()
    )
    state = state_lib.initializer(model, phase)(jax.random.key(0))
    for number in range(4):
      state, metrics = run(state, make_batch(160), jax.random.key(number))
    return state.extra["shown"]["image"], metrics

  # Random noise far above 2 eps: learnt members as bad would go first.
  bank, metrics = rounds("random", eps=1e-4, start_radius=1.0, num_members=3)
  assert metrics["criterion_image"] > 0
  assert sorted(np.asarray(bank["born"]).tolist()) == [2, 3, 4]
  bank, metrics = rounds("bank", eps=1e-12)
  assert metrics["held_image"] == 0
  assert not np.any(bank["born"])


REFUSED = [
  ({"noise": "banks"}, "noise must be one of .* Did you mean 'bank'"),
  ({"noisy": ("vector",)}, "noisy names the modality 'vector', whose encoder"),
  ({"noisy": ("sound",)}, "noisy names the unknown modality"),
  ({"noisy": "vector"}, "noisy names the modality 'vector', whose encoder"),
  ({"noisy": ("image", "image")}, "noisy must name a modality once"),
  ({"solver_steps": 0}, "^solver_steps must be"),
  ({"solver_batch": 0}, "^solver_batch must be"),
  ({"solver_lr": 0.0}, "^solver_lr must be"),
  ({"noise": "published", "published_batches": 0}, "published_batches must be"),
  ({"noise": "published", "published_objective": "kl"}, "published_objective"),
  ({"eps": 0.0}, "eps must be positive"),
  ({"num_members": 0}, "num_members must be"),
  ({"radius_factor": -1.0}, "radius_factor must be"),
  ({"noise": "permuted", "permuted": "rows"}, "permuted must be one of"),
  ({"profile": "flat"}, "profile must be one of"),
  ({"pretrain_steps": -1}, "pretrain_steps must be"),
  ({"solver_examples": 127}, "solver_examples must be"),
  ({"consistency_weight": -1.0}, "consistency_weight must be"),
]


IDLE = [
  ("clean", {"consistency_weight": 1.0}),
  ("clean", {"radius_factor": 3.0}),
  ("twice_clean", {"noisy": ("image",)}),
  ("bank", {"limit": 1.0}),
  ("bank", {"permuted": "tokens"}),
  ("bank", {"published_lr": 0.03}),
  ("published", {"num_members": 3}),
  ("published", {"objective": "kl"}),
  ("corrected", {"convex_pairs": True}),
]


@pytest.mark.parametrize(("noise", "options"), IDLE)
def test_an_option_that_would_change_nothing_is_refused(model, noise, options):
  (name,) = options
  with pytest.raises(ValueError, match=f"^{name} changes nothing with noise="):
    recipes.nullspace(model, noise=noise, **{**OPTIONS, **options})


def test_one_modality_is_named_without_a_list(model):
  recipe = recipes.nullspace(model, noisy="image", **OPTIONS)
  extra = recipe.phases[0].extra(None, None)
  assert set(extra["shown"]) == {"image"}


@pytest.mark.parametrize("dataset", ["av_digits", "digits"])
def test_published_noise_of_the_configuration_is_as_published(dataset):
  """Three passes over a tenth of the training set, the rate over all of it."""
  options = config_lib.load(
    f"configs/nullspace.py:{dataset},published"
  ).recipe.options
  size = {"av_digits": 55_000, "digits": 1_293}[dataset]
  assert options.published_batches == round(size // 64 / 10)
  assert options.get("solver_examples", 1024) >= 2 * 64 * (
    options.published_batches
  )


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_the_recipe_refuses_by_name(model, options, message):
  with pytest.raises(ValueError, match=message):
    recipes.nullspace(model, **{**OPTIONS, **options})


def test_a_model_without_tokens_is_refused():
  plain = models.concat_fusion(
    {"vector": encoders.make("mlp", embedding_dim=8)},
    num_classes=3,
    input_shapes={"vector": (6,)},
  )
  with pytest.raises(ValueError, match="whose encoder can be split"):
    recipes.nullspace(plain, **OPTIONS)
  assert recipes.nullspace(plain, noise="clean", **OPTIONS).num_steps == 4


def smoke(arguments, folder):
  config = config_lib.load(
    f"configs/nullspace.py:{arguments}",
    ["--config.mesh.data=1", "--config.data.modalities=left"],
  )
  with config.unlocked():
    del config.augmentation.right
  return training.train(config, folder, say=lambda line: None)


def stored(folder):
  rolling = checkpoints.Checkpoints(
    folder / checkpoints.FOLDER / "state", keep=2
  )
  step = rolling.latest_step
  rolling.close()
  return step


def test_a_killed_run_goes_on_bit_by_bit(tmp_path, monkeypatch):
  whole = tmp_path / "whole"
  assert smoke("digits,smoke", whole).finished
  stopped = tmp_path / "stopped"
  # Killed after the second update of the last phase.
  original = checkpoints.Checkpoints.save

  def save(self, step, tree, **options):
    original(self, step, tree, **options)
    if "extra" in tree and step == 4:
      raise KeyboardInterrupt

  monkeypatch.setattr(checkpoints.Checkpoints, "save", save)
  with pytest.raises(KeyboardInterrupt):
    smoke("digits,smoke", stopped)
  monkeypatch.undo()
  assert stored(stopped) == 4
  assert smoke("digits,smoke", stopped).finished
  _, first, _, _ = training.load(whole)
  _, second, _, _ = training.load(stopped)
  for a, b in zip(*map(jax.tree.leaves, (first, second))):
    np.testing.assert_array_equal(a, b)
