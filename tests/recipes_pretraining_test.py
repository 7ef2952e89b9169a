"""Masked autoencoding and contrasts, without labels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recipes_models as helpers

from robust_mm import _compiling
from robust_mm import models
from robust_mm import recipes
from robust_mm.models import decoding
from robust_mm.recipes import contrasts
from robust_mm.recipes import reconstruction
from robust_mm.training import state as state_lib
from robust_mm.training import steps

SHAPES = {"a": (6,), "b": (16, 3), "image": (8, 8, 1)}
TX = optax.adamw(1e-2, weight_decay=0.1)
OPTIONS = {"decoder_width": 8, "decoder_heads": 2, "projection_dim": 4}


@pytest.fixture(scope="module")
def model():
  return models.token_transformer(
    SHAPES,
    3,
    width=16,
    num_layers=1,
    num_heads=2,
    patch={"image": (2, 2)},
  )


@pytest.fixture(scope="module")
def params(model):
  return jax.jit(model.init)(jax.random.key(0))[0]


def make_batch(size=8, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "inputs": {
      n: jnp.asarray(rng.normal(size=(size, *s)), jnp.float32)
      for n, s in SHAPES.items()
    },
    "present": {n: jnp.ones(size, bool) for n in SHAPES},
    "label": jnp.asarray(rng.integers(0, 3, size)),
    "id": jnp.arange(size),
  }


def masking(mask_ratio=0.75, hide_rate=0.3):
  return reconstruction.Masking(mask_ratio=mask_ratio, hide_rate=hide_rate)


def test_masked_content_changes_no_bit_of_the_encoder(model, params):
  batch = make_batch()
  parts = model.token_parts

  @jax.jit
  def encoded(inputs, visible):
    tokens, _ = model.encode(params, {}, inputs, batch["present"])
    return parts.attend(params, tokens, visible)

  tokens, _ = model.encode(params, {}, batch["inputs"], batch["present"])
  real = parts.real(tokens, batch["present"])
  visible = masking(hide_rate=0.0).draw(jax.random.key(3), real)
  before = encoded(batch["inputs"], visible)
  # Pixels of the image whose patch is hidden: [b, 4, 4] patches of 2 x 2.
  shown = np.asarray(visible["image"]).reshape(8, 4, 4)
  pixels = shown.repeat(2, axis=1).repeat(2, axis=2)[..., None]
  for content in (1e6, np.nan):
    image = jnp.where(pixels, batch["inputs"]["image"], content)
    after = encoded({**batch["inputs"], "image": image}, visible)
    jax.tree.map(np.testing.assert_array_equal, before, after)
  # The test can fail: what is visible does matter.
  image = jnp.where(pixels, 2.0, batch["inputs"]["image"])
  after = encoded({**batch["inputs"], "image": image}, visible)
  assert np.all(np.asarray(after[0]) != np.asarray(before[0]))


def test_perfect_reconstruction_is_nothing():
  targets = {
    "a": jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 6))),
    "ids": jnp.array([[1, 2, 3]] * 4),
  }
  hidden = {"a": jnp.ones((4, 5), bool), "ids": jnp.ones((4, 3), bool)}
  exact = np.asarray(targets["a"])
  apart = exact - exact.mean(-1, keepdims=True)
  told = {
    "a": apart / np.sqrt(exact.var(-1, keepdims=True) + 0.01),
    "ids": 100.0 * jax.nn.one_hot(targets["ids"], 7),
  }
  told = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), told)
  found = reconstruction.error(told, targets, hidden, variance_floor=0.01)
  np.testing.assert_allclose(found, 0, atol=1e-10)
  # Nothing known: 1 for ids, and for patches their variance over that and 0.01.
  nothing = jax.tree.map(jnp.zeros_like, told)
  variance = exact.var(-1)
  wanted = (np.mean(variance / (variance + 0.01)) + 1) / 2
  found = reconstruction.error(nothing, targets, hidden, variance_floor=0.01)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_each_modality_has_the_same_share_of_equal_errors():
  """One with 2 tokens of 3 numbers, one with 50 of 40, one with no target."""
  sizes = {"few": (4, 2, 3), "many": (4, 50, 40), "none": (4, 1, 5)}
  targets = {n: jnp.zeros(s) for n, s in sizes.items()}
  hidden = {n: jnp.full(s[:2], n != "none") for n, s in sizes.items()}

  def total(told):
    return reconstruction.error(told, targets, hidden, variance_floor=1.0)

  told = {n: jnp.full(s, 0.5) for n, s in sizes.items()}
  value, grads = jax.value_and_grad(total)(told)
  np.testing.assert_allclose(value, 0.25, rtol=1e-6)
  # d/ds of an error s^2 / 2 in each of the two: their sums are alike.
  for name in ("few", "many"):
    np.testing.assert_allclose(np.sum(grads[name]), 0.5, rtol=1e-5)
  assert np.all(grads["none"] == 0)
  alone = {**told, "few": jnp.full(sizes["few"], 1.5)}
  np.testing.assert_allclose(total(alone), (2.25 + 0.25) / 2, rtol=1e-6)


def test_the_law_of_what_is_hidden():
  size = 4000
  real = {
    "a": jnp.ones((size, 1), bool),
    "b": jnp.ones((size, 8), bool),
    "c": jnp.arange(size)[:, None] + jnp.zeros((1, 4), int) >= size // 2,
  }
  visible = masking(0.75, 0.3).draw(jax.random.key(0), real)
  some = {n: np.any(v, axis=1) for n, v in visible.items()}
  for name, kept in (("a", 1), ("b", 2), ("c", 1)):
    counts = np.sum(np.asarray(visible[name]), axis=1)
    assert set(counts) == {0, kept}
  assert np.all(some["a"] | some["b"] | some["c"])
  assert not np.any(some["c"][: size // 2])
  # Shown with 0.7, or as the one of n that are left where all n were drawn.
  for rows, n in ((slice(0, size // 2), 2), (slice(size // 2, None), 3)):
    wanted = 0.7 + 0.3**n / n
    deviation = np.sqrt(wanted * (1 - wanted) / (size // 2))
    for name in ("a", "b", "c")[:n]:
      assert abs(np.mean(some[name][rows]) - wanted) < 4 * deviation
  # Every place of b is as likely as any other.
  share = np.mean(np.asarray(visible["b"])[some["b"]], axis=0)
  np.testing.assert_allclose(share, 0.25, atol=0.04)


def test_padding_takes_no_place_of_what_can_be_seen():
  real = {"ids": jnp.arange(16)[None] < jnp.array([[16], [6], [3], [0]])}
  visible = masking(0.75, 0.0).draw(jax.random.key(1), real)["ids"]
  np.testing.assert_array_equal(np.sum(visible, axis=1), [4, 4, 3, 0])
  assert not np.any(visible & ~real["ids"])


def one_step(model, batch, **options):
  recipe = recipes.pretrain(model, num_steps=9, tx=TX, **{**OPTIONS, **options})
  phase = recipe.phases[0]
  once = _compiling.options_for_once()
  create = state_lib.initializer(model, phase)
  state = jax.jit(create, compiler_options=once)(jax.random.key(0))
  step = jax.jit(steps.make_train_step(phase), compiler_options=once)
  return state, step(state, batch, jax.random.key(1)), step


def test_a_step_reads_no_label_and_leaves_the_head_alone(model):
  batch = make_batch()
  batch["present"]["b"] = jnp.arange(8) < 3
  before, (after, metrics), step = one_step(model, batch, objective="both")
  gone = jnp.arange(8)[:, None, None] >= 3
  other = {
    **batch,
    "label": jnp.full(8, -7),
    "inputs": {
      **batch["inputs"],
      "b": jnp.where(gone, jnp.nan, batch["inputs"]["b"]),
    },
  }
  again, _ = step(before, other, jax.random.key(1))
  jax.tree.map(np.testing.assert_array_equal, after, again)
  jax.tree.map(
    np.testing.assert_array_equal,
    after.params["fusion"]["last"],
    before.params["fusion"]["last"],
  )
  moved = jax.tree.map(
    lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))),
    {"encoders": after.params["encoders"], "side": after.extra["side"]},
    {"encoders": before.params["encoders"], "side": before.extra["side"]},
  )
  assert all(jax.tree.leaves(moved))
  np.testing.assert_allclose(
    metrics["loss"],
    metrics["reconstruction_loss"] + metrics["contrastive_loss"],
    rtol=1e-6,
  )
  np.testing.assert_allclose(metrics["scale"], 1 / 0.07, rtol=1e-5)


@pytest.mark.parametrize("objective", ["mae", "contrastive"])
def test_pretraining_learns_one_batch(model, objective):
  recipe = recipes.pretrain(
    model, num_steps=60, tx=optax.adam(1e-2), objective=objective, **OPTIONS
  )
  batch = make_batch(seed=2)
  state, losses = helpers.run(recipe, model, batch, 60)
  assert np.mean(losses[-5:]) < (0.9 if objective == "mae" else 0.5) * losses[0]
  assert set(state.extra["side"]) == {
    {"mae": "decoder", "contrastive": "contrast"}[objective]
  }


def test_the_scale_is_bounded_and_comes_back_from_its_bound():
  options = {"temperature": 0.5, "max_scale": 2.5}
  begun = {"log_scale": jnp.zeros(())}
  np.testing.assert_allclose(contrasts.scale(begun, **options), 2.0, rtol=1e-6)
  beyond = {"log_scale": jnp.asarray(9.0)}
  assert contrasts.scale(beyond, **options) == 2.5
  assert jax.grad(contrasts.scale)(beyond, **options)["log_scale"] == 0
  clipped = contrasts.clip(beyond, **options)
  np.testing.assert_allclose(
    jnp.exp(clipped["log_scale"]) / 0.5, 2.5, rtol=1e-6
  )
  assert jax.grad(contrasts.scale)(clipped, **options)["log_scale"] > 0


def test_validation_rows_that_fill_up_do_not_count(model):
  recipe = recipes.pretrain(
    model, num_steps=9, tx=TX, objective="contrastive", **OPTIONS
  )
  phase = recipe.phases[0]
  state = jax.jit(state_lib.initializer(model, phase))(jax.random.key(0))
  batch = make_batch()
  filled = {**batch, "id": jnp.where(jnp.arange(8) < 5, batch["id"], -1)}
  short = jax.tree.map(lambda x: x[:5], batch)
  evaluate = jax.jit(phase.evaluate)
  np.testing.assert_allclose(
    evaluate(state, filled)["loss"], evaluate(state, short)["loss"], atol=1e-5
  )
  assert abs(
    evaluate(state, batch)["loss"] - evaluate(state, short)["loss"]
  ) > (1e-2)


def test_the_decoder_reads_nothing_of_hidden_places(model, params):
  decoder = decoding.for_model(model, width=8, num_heads=2)
  made = jax.jit(decoder.init)(jax.random.key(0))
  rng = np.random.default_rng(0)
  numbers = model.token_parts.num_tokens
  encoded = {
    n: jnp.asarray(rng.normal(size=(2, k, 16))) for n, k in numbers.items()
  }
  visible = {
    n: jnp.arange(k)[None] % 2 < jnp.array([[1], [1]])
    for n, k in numbers.items()
  }
  real = {n: jnp.full((2, k), n != "a") for n, k in numbers.items()}
  call = jax.jit(decoder.__call__)
  pooled = jnp.asarray(rng.normal(size=(2, 16)))
  before = call(made, pooled, encoded, visible, real)
  poisoned = {
    n: jnp.where(visible[n][..., None], x, jnp.nan) for n, x in encoded.items()
  }
  poisoned["a"] = jnp.zeros_like(poisoned["a"])  # not there at all
  after = call(made, pooled, poisoned, visible, real)
  for name in ("b", "image"):
    np.testing.assert_array_equal(before[name], after[name])
    assert before[name].shape == (
      2,
      numbers[name],
      model.token_parts.sizes[name],
    )


@pytest.mark.parametrize(
  "options,message",
  [
    ({"mask_ratio": 0.0}, r"mask_ratio must lie in \(0, 1\), got 0.0"),
    ({"mask_ratio": 1.0}, r"mask_ratio must lie in \(0, 1\), got 1.0"),
    ({"hide_rate": 1.0}, r"hide_rate must lie in \[0, 1\)"),
    ({"objective": "bert"}, "objective must be one of 'mae'"),
    ({"variance_floor": 0.0}, "variance_floor must be positive"),
    ({"contrastive_weight": 0.0}, "contrastive_weight must be positive"),
    ({"temperature": 0.0}, "temperature must be positive"),
    ({"temperature": 0.001}, "temperature must be at least 1 / max_scale"),
    ({"decoder_layers": 0}, "decoder_layers must be an integer of at least 1"),
    ({"decoder_heads": 5}, "decoder_heads must divide decoder_width 64"),
    ({"projection_dim": 0}, "projection_dim must be an integer of at least 1"),
  ],
)
def test_bad_arguments_are_refused_by_name(model, options, message):
  with pytest.raises(ValueError, match=message):
    recipes.pretrain(model, num_steps=3, tx=TX, **options)


def test_models_it_cannot_train_are_refused():
  with pytest.raises(ValueError, match="pretrain needs a model of tokens"):
    recipes.pretrain(helpers.concat_model(), num_steps=3, tx=TX)
  small = {"width": 8, "num_heads": 2, "num_layers": 1}
  one = models.token_transformer({"b": (16, 3)}, 3, **small)
  recipes.pretrain(one, num_steps=3, tx=TX)
  with pytest.raises(ValueError, match="needs at least two, got b"):
    recipes.pretrain(one, num_steps=3, tx=TX, objective="contrastive")
  vectors = models.token_transformer({"a": (5,), "b": (4,)}, 3, **small)
  recipes.pretrain(vectors, num_steps=3, tx=TX)
  with pytest.raises(ValueError, match="hide_rate must be positive"):
    recipes.pretrain(vectors, num_steps=3, tx=TX, hide_rate=0.0)
