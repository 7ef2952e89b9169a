"""Two noisy modalities: each has noise of its own, and both are drawn."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_mm import _compiling
from robust_mm import models
from robust_mm import nullspace
from robust_mm import recipes
from robust_mm.models import encoders
from robust_mm.recipes import noise_rounds
from robust_mm.training import state as state_lib

SHAPES = {"first": (4, 4), "second": (6, 4)}
OPTIONS = {
  "num_steps": 2,
  "tx": optax.adam(1e-2),
  "solver_examples": 160,
  "solver_steps": 2,
  "solver_batch": 16,
  "num_bisections": 1,
  "max_radius": 1.0,
  "noise": "corrected",
}


@pytest.fixture(scope="module")
def model():
  made = {
    name: encoders.make(
      "vit", size=None, width=8, depth=1, num_heads=2, mlp_dim=8, patch_size=2
    )
    for name in SHAPES
  }
  return models.concat_fusion(made, num_classes=3, input_shapes=SHAPES)


def batch(size):
  rng = np.random.default_rng(0)
  return {
    "inputs": {
      name: jnp.asarray(rng.uniform(size=(size, *shape)), jnp.float32)
      for name, shape in SHAPES.items()
    },
    "present": {name: jnp.ones(size, bool) for name in SHAPES},
    "label": jnp.asarray(rng.integers(0, 3, size)),
    "id": jnp.arange(size),
  }


def test_each_of_two_modalities_has_noise_of_its_own(model):
  (phase,) = recipes.nullspace(model, **OPTIONS).phases

  @jax.jit(compiler_options=_compiling.options_for_once())
  def run(key):
    state = state_lib.initializer(model, phase)(key)
    return phase.jobs[0].run(state, batch(160), key)

  state, metrics = run(jax.random.key(0))
  shown = state.extra["shown"]
  assert {name: bank["noise"].shape for name, bank in shown.items()} == {
    "first": (1, 4, 8),
    "second": (1, 6, 8),
  }
  for name in SHAPES:
    assert np.any(shown[name]["noise"])
    assert metrics[f"held_{name}"] == 1
  first, second = (shown[name]["noise"][0] for name in SHAPES)
  assert abs(float(jnp.vdot(first, second[:4]))) < 0.9 * float(
    jnp.linalg.norm(first) * jnp.linalg.norm(second[:4])
  )


def test_items_of_a_model_are_what_it_says_of_them(model):
  params, state = model.init(jax.random.key(0))
  data = batch(9)
  data["present"]["first"] = jnp.arange(9) < 7
  items, encode = nullspace.items_of(model, params, state, data, "first")
  outputs, _ = model.apply(params, state, data["inputs"], data["present"])
  said = encode(params, items.tokens, items.context)
  np.testing.assert_allclose(said, outputs.logits, atol=1e-5)
  np.testing.assert_array_equal(items.counted, np.arange(9) < 7)
  # Noise reaches whom it is put on, and no one that is without the modality.
  noise = jax.random.normal(jax.random.key(1), items.tokens.shape[1:])
  moved = encode(params, items.tokens + noise[None], items.context)
  assert np.all(np.any(moved[:7] != said[:7], axis=-1))
  np.testing.assert_array_equal(moved[7:], said[7:])


def test_items_of_one_modality_need_no_context():
  """``encode(params, tokens)``, as ``nullspace.encoder_noise`` calls it."""
  vit = encoders.make(
    "vit", size=None, width=8, depth=1, num_heads=2, mlp_dim=8, patch_size=2
  )
  alone = models.concat_fusion(
    {"first": vit}, num_classes=3, input_shapes={"first": SHAPES["first"]}
  )
  params, state = alone.init(jax.random.key(0))
  data = {
    part: {"first": batch(5)[part]["first"]} for part in ("inputs", "present")
  }
  items, encode = nullspace.items_of(alone, params, state, data, "first")
  assert items.context is None
  outputs, _ = alone.apply(params, state, data["inputs"], data["present"])
  np.testing.assert_allclose(
    encode(params, items.tokens), outputs.logits, atol=1e-5
  )


def test_items_of_no_tokens_are_refused(model):
  params, state = model.init(jax.random.key(0))
  with pytest.raises(ValueError, match="modality must be one of"):
    nullspace.items_of(model, params, state, batch(3), "third")
  plain = models.concat_fusion(
    {"vector": encoders.make("mlp", embedding_dim=8)},
    num_classes=3,
    input_shapes={"vector": (6,)},
  )
  with pytest.raises(ValueError, match="split at its tokens"):
    nullspace.items_of(plain, {}, {}, batch(3), "vector")


def test_noise_is_drawn_on_those_that_are_named(model):
  for named in (("first",), ("second",), ("first", "second")):
    (phase,) = recipes.nullspace(model, noisy=named, **OPTIONS).phases
    extra = phase.extra(None, None)
    assert set(extra["shown"]) == set(named)


def test_members_of_two_banks_are_drawn_independently(model):
  settings = dict(OPTIONS, noise="bank", num_members=2)
  (phase,) = recipes.nullspace(model, **settings).phases
  shown = {}
  for name, bank in phase.extra(None, None)["shown"].items():
    noise = jnp.stack([jnp.full(bank["noise"].shape[1:], v) for v in (1.0, 2)])
    shown[name] = {**bank, "noise": noise, "born": jnp.array([1, 2])}
  update = inspect.unwrap(phase.update)
  made = next(
    cell.cell_contents
    for cell in update.__closure__
    if isinstance(cell.cell_contents, noise_rounds.Settings)
  )
  drawn = noise_rounds.draw(made, shown, jax.random.key(0), 400)
  scales = np.stack([np.asarray(drawn[name][:, 0, 0]) for name in SHAPES])
  assert abs(np.corrcoef(scales)[0, 1]) < 0.2
