"""What a round says of its noise: of that which training draws, and no other.

Refusals of the data and of options that would be idle as well.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import robust_mm
from robust_mm import _compiling
from robust_mm import config as config_lib
from robust_mm import models
from robust_mm import nullspace
from robust_mm import recipes
from robust_mm import training
from robust_mm.models import encoders
from robust_mm.training import state as state_lib

EPS = 0.001
OPTIONS = {
  "num_steps": 4,
  "tx": optax.adam(1e-2),
  "segment_steps": 2,
  "eps": EPS,
  "solver_examples": 160,
  "solver_steps": 2,
  "solver_batch": 16,
  "num_bisections": 1,
  "num_members": 3,
  "start_radius": 0.05,
}


@pytest.fixture(scope="module")
def model():
  return models.concat_fusion(
    {
      "image": encoders.make(
        "vit", size=None, width=8, depth=1, num_heads=2, mlp_dim=8, patch_size=2
      )
    },
    num_classes=3,
    input_shapes={"image": (4, 4)},
  )


def batch(present=None):
  rng = np.random.default_rng(0)
  image = jnp.asarray(rng.uniform(size=(160, 4, 4)), jnp.float32)
  here = jnp.ones(160, bool) if present is None else present
  return {
    "inputs": {"image": image},
    "present": {"image": here},
    "label": jnp.asarray(rng.integers(0, 3, 160)),
    "id": jnp.arange(160),
  }


def played(model, given=None, rounds=1, **options):
  """(state, metrics) after some rounds."""
  options = {**OPTIONS, **options}
  if options.get("noise") == "published":
    del options["num_members"]  # it has one
  (phase,) = recipes.nullspace(model, **options).phases
  (job,) = phase.jobs
  run = jax.jit(job.run, compiler_options=_compiling.options_for_once())
  state = state_lib.initializer(model, phase)(jax.random.key(0))
  for number in range(rounds):
    state, metrics = run(
      state, batch() if given is None else given, jax.random.key(number)
    )
  return state, {k.removesuffix("_image"): v for k, v in metrics.items()}


def changed(model, state, noise):
  """The mean criterion of one noise on the hold-out half."""
  here = batch()
  inputs = {"image": here["inputs"]["image"][80:]}
  present = {"image": jnp.ones(80, bool)}
  tokens = model.embed(state.params, state.model_state, inputs, present)

  def encode(params, tokens):
    found = model.encode_tokens(
      params, state.model_state, {"image": tokens}, present
    )
    return model.fuse(params, found, present).logits

  values = nullspace.criterion(
    encode, state.params, tokens["image"], jnp.asarray(noise)
  )
  return float(jnp.mean(values))


SEARCHED = [
  ("bank", {"radius_factor": 6.0}),
  ("permuted", {"radius_factor": 6.0}),
  ("random_at_criterion", {"radius_factor": 6.0}),
  ("published", {}),
]


@pytest.mark.parametrize(("noise", "options"), SEARCHED)
def test_metrics_are_of_the_noise_that_training_draws(model, noise, options):
  # The second round, whose newest member is not the first of its bank.
  state, said = played(model, rounds=2, noise=noise, **options)
  bank = state.extra["shown"]["image"]
  newest = np.asarray(bank["noise"][int(np.argmax(bank["born"]))])
  factor = options.get("radius_factor", 1.0)
  criterion = changed(model, state, factor * newest)
  assert said["criterion"] == pytest.approx(criterion, rel=1e-3)
  assert bool(said["held"]) == (criterion <= EPS)
  # Six times as large as what was within eps is not.
  assert (noise == "published") or not said["held"]
  norm = np.linalg.norm(factor * newest)
  assert said["norm"] == pytest.approx(norm, rel=1e-4)
  assert norm > 0
  # Of the members as they are kept: what staleness is judged by.
  kept = changed(model, state, newest)
  stored = bank["criterion"][int(np.argmax(bank["born"]))]
  assert stored == pytest.approx(kept, rel=1e-3)


def test_what_was_found_within_eps_held(model):
  _, said = played(model, noise="bank")
  assert said["held"] == 1
  assert 0 < said["criterion"] <= EPS


@pytest.mark.parametrize("noise", ["bank", "random_at_criterion", "published"])
def test_without_examples_that_count_nothing_is_added(model, noise):
  here = jnp.arange(160) >= 157
  state, said = played(model, batch(here), noise=noise)
  bank = state.extra["shown"]["image"]
  # Three of them, all in the half that decides: fewer than 64, and none to
  # learn from.
  assert not np.any(bank["born"])
  assert not np.any(bank["noise"])
  assert (said["held"], said["radius"], said["norm"]) == (0, 0, 0)


def test_too_few_training_examples_are_refused_before_training(tmp_path):
  config = config_lib.load(
    "configs/nullspace.py:digits,smoke",
    ["--config.data.max_train_examples=100"],
  )
  lines = []
  with pytest.raises(
    robust_mm.UserError, match=r"noise job needs .* 128 .* solver_examples is"
  ):
    training.train(config, tmp_path, say=lines.append)
  assert not (tmp_path / "metrics.jsonl").exists()


def test_a_search_is_compiled_well(model):
  (phase,) = recipes.nullspace(model, **OPTIONS).phases
  assert all(job.heavy for job in phase.jobs)
