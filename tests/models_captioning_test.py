"""Captioners: spelling, causality, absence, likelihoods, greedy decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recipes_models as helpers

from robust_mm import _compiling
from robust_mm import losses
from robust_mm import models
from robust_mm import recipes
from robust_mm.models import caption_words
from robust_mm.models import captioning
from robust_mm.models import encoders
from robust_mm.recipes.captioning import caption_loss
from robust_mm.recipes.captioning import shuffle
from robust_mm.training import state as state_lib
from robust_mm.training import steps

SHAPES = {"image": (4, 4, 1), "sound": (6,)}
WORDS = ("one", "two", "six")
ONCE = _compiling.options_for_once()
jit = functools.partial(jax.jit, compiler_options=ONCE)


@pytest.fixture(scope="module")
def model():
  vit = encoders.vit_tokens(
    size=None, width=8, depth=1, num_heads=2, patch_size=2, embedding_dim=8
  )
  return models.captioner(
    {"image": vit, "sound": encoders.mlp(hidden_sizes=(8,), embedding_dim=8)},
    3,
    input_shapes=SHAPES,
    words=WORDS,
    width=8,
    num_layers=1,
    num_heads=2,
  )


@pytest.fixture(scope="module")
def params(model):
  return jit(model.init)(jax.random.key(0))[0]


def make_batch(size=6, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "inputs": {
      m: jnp.asarray(rng.uniform(size=(size, *s)), jnp.float32)
      for m, s in SHAPES.items()
    },
    "present": {m: jnp.ones(size, bool) for m in SHAPES},
    "label": jnp.asarray(rng.integers(0, 3, size)),
    "id": jnp.arange(size),
  }


@pytest.fixture(scope="module")
def told(model, params):
  """(batch, embeddings, jitted logits of ids)."""
  batch = make_batch()
  embed = jit(lambda x, p: model.encode(params, {}, x, p)[0])
  embeddings = embed(batch["inputs"], batch["present"])
  logits = jit(
    lambda e, present, ids: model.captions.logits(params, e, present, ids)
  )
  return batch, embeddings, logits


def test_captions_are_spelled_and_read_back():
  speller = caption_words.Speller(("image", "sound"), WORDS)
  classes = {"image": jnp.array([0, 2, 1]), "sound": jnp.array([2, 2, 0])}
  present = {
    "image": jnp.array([True, False, True]),
    "sound": jnp.array([True, True, False]),
  }
  ids = speller.spell(classes, present)
  assert speller.texts(ids) == ["one six", "none six", "two none"]
  assert ids.shape == (3, speller.length)
  assert np.array_equal(speller.ids("one six"), ids[0])
  assert ids[0, -1] == ids[0, -2] == caption_words.PAD
  assert speller.vocabulary[:3] == ("", ".", " ")
  assert set(speller.vocabulary[3:]) == set("onetwsix")


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: caption_words.words_for(11), "words must name 11 classes"),
    (lambda: caption_words.Speller(("a",), ("One",)), "lower-case letters"),
    (lambda: caption_words.Speller(("a",), ("one", "none")), "must be diff"),
    (
      lambda: caption_words.Speller(tuple("abcdef"), caption_words.DIGITS),
      "at most 100000",
    ),
    (
      lambda: caption_words.Speller(("a",), WORDS).ids("zebra"),
      "text must be of the letters",
    ),
    (
      lambda: caption_words.Speller(("a",), WORDS).ids("sixsix"),
      "fewer than 5 letters",
    ),
    (lambda: models.captioning.CaptionFusion(3, num_heads=3), "num_heads must"),
  ],
)
def test_what_cannot_be_spelled_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_a_letter_depends_on_those_before_it_alone(model, told):
  batch, embeddings, logits = told
  classes = dict.fromkeys(SHAPES, batch["label"])
  ids = model.captions.spell(classes, batch["present"])
  before = logits(embeddings, batch["present"], ids)
  changed = ids.at[:, 3].set((ids[:, 3] + 1) % len(model.captions.vocabulary))
  after = logits(embeddings, batch["present"], changed)
  # What is said at place 3 comes before its letter is read.
  np.testing.assert_allclose(before[:, :4], after[:, :4], atol=1e-6)
  assert np.max(np.abs(before[:, 4:] - after[:, 4:])) > 1e-4


def test_an_absent_modality_has_no_way_in(model, params, told):
  batch, _, _ = told
  present = {**batch["present"], "sound": jnp.arange(6) > 2}
  poisoned = jnp.where(present["sound"][:, None], batch["inputs"]["sound"],
                       jnp.nan)  # fmt: skip

  def loss(inputs):
    return jnp.sum(model.apply(params, {}, inputs, present)[0].logits ** 2)

  grad_fn = jit(jax.value_and_grad(loss))
  clean, _ = grad_fn(batch["inputs"])
  value, grad = grad_fn({**batch["inputs"], "sound": poisoned})
  assert value == clean
  assert np.all(np.asarray(grad["sound"])[:3] == 0)
  assert np.all(np.isfinite(grad["sound"]))
  assert np.max(np.abs(np.asarray(grad["sound"])[3:])) > 0


def test_logits_are_log_likelihoods_of_captions(model, params, told):
  batch, embeddings, logits = told
  present = {**batch["present"], "image": jnp.arange(6) > 1}
  found = jit(model.fuse)(params, embeddings, present).logits
  for index in range(3):
    classes = dict.fromkeys(SHAPES, jnp.full(6, index))
    ids = np.asarray(model.captions.spell(classes, present))
    said = np.asarray(logits(embeddings, present, ids), np.float64)
    log_p = said - np.log(np.sum(np.exp(said), axis=-1, keepdims=True))
    each = np.take_along_axis(log_p, ids[..., None], axis=-1)[..., 0]
    expected = np.sum(np.where(ids != model.captions.pad, each, 0), axis=1)
    np.testing.assert_allclose(found[:, index], expected, rtol=1e-4)


def test_all_sentences_together_have_probability_one(model, params, told):
  """Of every string of a given length: the model is a distribution."""
  batch, embeddings, logits = told
  one = {m: e[:1] for m, e in embeddings.items()}
  here = {m: p[:1] for m, p in batch["present"].items()}
  number, length = len(model.captions.vocabulary), model.captions.length
  pairs = np.stack(np.meshgrid(*[np.arange(number)] * 2), -1).reshape(-1, 2)
  ids = np.zeros((len(pairs), length), np.int32)
  ids[:, :2] = pairs
  spread = lambda x: jnp.repeat(x, len(pairs), axis=0)  # noqa: E731
  said = logits(
    jax.tree.map(spread, one), jax.tree.map(spread, here), jnp.asarray(ids)
  )
  log_p = jax.nn.log_softmax(said, axis=-1)[:, :2]
  each = jnp.take_along_axis(log_p, jnp.asarray(ids)[:, :2, None], axis=-1)
  total = jnp.sum(jnp.exp(jnp.sum(each[..., 0], axis=1)))
  np.testing.assert_allclose(total, 1, rtol=1e-4)


def test_greedy_decoding_takes_the_best_letter_each_time(model, params, told):
  batch, embeddings, logits = told
  present, captions = batch["present"], model.captions
  found = np.asarray(jit(captions.generate)(params, embeddings, present))
  said = np.array(logits(embeddings, present, jnp.asarray(found)))
  said[..., captions.pad] = -np.inf
  best = said.argmax(-1)
  for row in range(6):
    ends = np.flatnonzero(found[row] == captions.end)
    stop = ends[0] + 1 if len(ends) else captions.length
    assert np.array_equal(found[row, :stop], best[row, :stop])
    assert np.all(found[row, stop:] == captions.pad)
  prompt = captions.spell(dict.fromkeys(SHAPES, batch["label"]), present)
  fixed = np.zeros(prompt.shape, bool)
  fixed[:, :4] = True
  led = jit(captions.generate)(params, embeddings, present, prompt, fixed)
  assert np.array_equal(led[:, :4], prompt[:, :4])


def test_shuffling_keeps_inputs_and_classes_together():
  batch = make_batch(size=16)
  mixed = shuffle(jax.random.key(3), None, None, batch)
  names = sorted(SHAPES)
  assert np.array_equal(mixed["classes"][names[0]], batch["label"])
  assert not np.array_equal(mixed["classes"][names[1]], batch["label"])
  for name in names:
    for row in range(16):
      source = np.flatnonzero(
        [np.array_equal(mixed["inputs"][name][row], x)
         for x in batch["inputs"][name]]
      )[0]  # fmt: skip
      assert mixed["classes"][name][row] == batch["label"][source]


def test_the_loss_is_that_of_letters_without_padding(model, params, told):
  batch, embeddings, logits = told
  present = batch["present"]
  ids = np.asarray(
    model.captions.spell(dict.fromkeys(SHAPES, batch["label"]), present)
  )
  said = np.asarray(logits(embeddings, present, ids), np.float64)
  log_p = said - np.log(np.sum(np.exp(said), axis=-1, keepdims=True))
  each = -np.take_along_axis(log_p, ids[..., None], axis=-1)[..., 0]
  valid = ids != model.captions.pad
  assert not valid.all()
  penalty = losses.topk_level(window=(0, 2))
  restraint = recipes.Restraint(penalty=penalty, weight=0.5, ramp=0.0)
  loss_fn = caption_loss(model, restraint)
  loss, (_, metrics) = jit(lambda p: loss_fn(p, {}, batch, key=None))(params)
  np.testing.assert_allclose(metrics["ce"], each[valid].mean(), rtol=1e-4)
  flat = jnp.asarray(said[valid], jnp.float32)
  spread = penalty(flat, jnp.asarray(ids[valid]))
  np.testing.assert_allclose(metrics["penalty"], spread, rtol=1e-3)
  np.testing.assert_allclose(loss, each[valid].mean() + 0.5 * spread, rtol=1e-4)
  assert metrics["num_valid"] == valid.sum()


def test_it_learns_to_spell_two_different_things(model):
  """Classes are in the mean of an image and the first entry of a sound."""
  rng = np.random.default_rng(0)
  batch = make_batch(size=48)
  label = np.asarray(batch["label"])
  image = label[:, None, None, None] / 2 + 0.05 * rng.normal(size=(48, 4, 4, 1))
  sound = np.eye(3)[label].repeat(2, axis=1)
  batch["inputs"] = {
    "image": jnp.asarray(image, jnp.float32),
    "sound": jnp.asarray(sound, jnp.float32),
  }
  recipe = recipes.captioning(model, num_steps=400, tx=optax.adam(1e-2))
  (phase,) = recipe.phases
  step = steps.make_train_step(phase)

  @jit
  def run(key):
    state = state_lib.initializer(model, phase)(key)
    body = lambda state, _: (step(state, batch, key)[0], None)  # noqa: E731
    return jax.lax.scan(body, state, length=400)[0].params

  params = run(jax.random.key(0))
  shuffled = shuffle(jax.random.key(9), None, None, batch)

  @jit
  def generate(params):
    embeddings, _ = model.encode(
      params, {}, shuffled["inputs"], shuffled["present"]
    )
    return model.captions.generate(params, embeddings, shuffled["present"])

  said = model.captions.texts(generate(params))
  meant = [
    f"{WORDS[a]} {WORDS[b]}"
    for a, b in zip(shuffled["classes"]["image"], shuffled["classes"]["sound"])
  ]
  assert np.mean([a == b for a, b in zip(said, meant)]) > 0.9
  assert len(set(meant)) > 5


def test_models_without_captions_are_refused():
  with pytest.raises(ValueError, match="captioning needs a model that spells"):
    recipes.captioning(helpers.concat_model(), num_steps=1, tx=helpers.TX)


def test_a_window_beyond_the_letters_is_refused(model):
  penalty = losses.topk_level(window=(0, 20))
  restraint = recipes.Restraint(penalty=penalty)
  with pytest.raises(
    ValueError, match="10 at most, the number of wrong letters"
  ):
    recipes.captioning(model, num_steps=1, tx=helpers.TX, restraint=restraint)
  assert captioning.CaptionFusion(3).num_classes == 3


@pytest.mark.parametrize(
  "penalty",
  [losses.topk_level(window=(0, 10)), losses.topk_dispersion(window=(4, 9))],
  ids=repr,
)
def test_a_window_may_go_beyond_the_classes(model, penalty):
  """Of three classes and eleven letters."""
  assert len(model.captions.vocabulary) == 11
  made = recipes.captioning(
    model,
    num_steps=1,
    tx=helpers.TX,
    restraint=recipes.Restraint(penalty=penalty),
  )
  assert made.phases[0].progress


def test_two_classes_have_letters_enough_for_a_dispersion():
  encoder = encoders.mlp(hidden_sizes=(), embedding_dim=8)
  two = models.captioner(
    {"sound": encoder},
    2,
    input_shapes={"sound": (6,)},
    words=WORDS[:2],
    width=8,
    num_layers=1,
    num_heads=2,
  )
  term = recipes.Restraint(penalty=losses.wrong_class_dispersion())
  recipes.captioning(two, num_steps=1, tx=helpers.TX, restraint=term)
  with pytest.raises(ValueError, match="at least three classes"):
    term.check(two)


def test_plain_and_published_losses_of_captions(model, params, told):
  """Plain: the mean over letters. Published: padding too, of rows with a
  modality."""
  batch, _, logits = told
  here = jnp.arange(6) > 1
  batch = {**batch, "present": dict.fromkeys(SHAPES, here)}
  embeddings, _ = model.encode(params, {}, batch["inputs"], batch["present"])
  classes = dict.fromkeys(SHAPES, batch["label"])
  ids = np.asarray(model.captions.spell(classes, batch["present"]))
  said = logits(embeddings, batch["present"], ids)
  each = np.asarray(losses.cross_entropy(said, ids))
  valid = (ids != model.captions.pad) & np.asarray(here)[:, None]
  term = recipes.Restraint(
    penalty=losses.wrong_class_dispersion(), weight=0.1, fidelity="published"
  )
  plain, published = (
    jit(lambda p, t=t: caption_loss(model, t)(p, {}, batch, key=None))(params)
    for t in (None, term)
  )
  np.testing.assert_allclose(plain[0], each[valid].mean(), rtol=1e-5)
  metrics = plain[1][1]
  assert metrics["ce"] == plain[0]
  assert metrics["num_valid"] == valid.sum()
  assert "penalty" not in metrics
  loss_fn = losses.restrained_softmax(term.penalty, 0.1, fidelity="published")
  expected, aux = loss_fn(said[2:], ids[2:])
  np.testing.assert_allclose(published[0], expected, rtol=1e-4)
  assert published[1][1]["num_valid"] == aux["num_valid"] == ids[2:].size
  assert valid[2:].sum() < ids[2:].size
