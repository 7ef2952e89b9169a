"""A penalty of wrong logits inside recipes: how much, where, who takes it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes_models as helpers
import scipy.special

from robust_mm import _compiling
from robust_mm import losses
from robust_mm import models
from robust_mm import recipes
from robust_mm._types import Target
from robust_mm.models import encoders
from robust_mm.recipes import destruction
from robust_mm.recipes import immunity
from robust_mm.recipes import objectives
from robust_mm.training import state as state_lib
from robust_mm.training import steps

WEIGHT = 0.7


def restraint(name="wrong_class_dispersion", **given):
  options = given.pop("options", {})
  return recipes.Restraint(
    penalty=losses.penalty(name, **options), weight=WEIGHT, **given
  )


def dispersion(logits, label):
  """D / (C - 1) of every row, in float64."""
  logits = np.asarray(logits, np.float64)
  mask = np.arange(logits.shape[1])[None] != np.asarray(label)[:, None]
  return np.var(logits[mask].reshape(len(logits), -1), axis=1)


def cross_entropy(logits, label):
  logits = np.asarray(logits, np.float64)
  log_p = scipy.special.log_softmax(logits, axis=1)
  return -log_p[np.arange(len(logits)), np.asarray(label)]


@pytest.fixture(scope="module")
def concat():
  """(model, params, batch, outputs)."""
  model = helpers.concat_model()
  params, _ = jax.jit(model.init)(jax.random.key(0))
  batch = helpers.make_batch()
  outputs, _ = model.apply(params, {}, batch["inputs"], batch["present"])
  return model, params, batch, outputs


def test_loss_is_cross_entropy_and_the_weighted_penalty(concat):
  model, _, batch, outputs = concat
  loss_fn = objectives.cross_entropy_loss(model, restraint=restraint())
  _, loss, metrics = helpers.evaluate(loss_fn, model, batch)
  ce = np.mean(cross_entropy(outputs.logits, batch["label"]))
  spread = np.mean(dispersion(outputs.logits, batch["label"]))
  np.testing.assert_allclose(loss, ce + WEIGHT * spread, rtol=1e-5)
  np.testing.assert_allclose(metrics["ce"], ce, rtol=1e-5)
  np.testing.assert_allclose(metrics["penalty"], spread, rtol=1e-5)
  np.testing.assert_allclose(metrics["penalty_weight"], WEIGHT, rtol=1e-6)
  assert {"level_spread", "margin_mean", "logit_norm"} <= set(metrics)
  assert spread > 1e-3


@pytest.mark.parametrize(
  "given, at, expected",
  [
    ({}, 0.0, 0.0),
    ({}, 0.025, 0.5),
    ({}, 0.05, 1.0),
    ({}, 0.9, 1.0),
    ({"ramp": 0.5}, 0.25, 0.5),
    ({"ramp": 0.0}, 0.0, 1.0),
    ({"fidelity": "published"}, 0.0, 1.0),
  ],
)
def test_the_weight_rises_over_the_first_steps(concat, given, at, expected):
  _, _, batch, outputs = concat
  batch = {**batch, "progress": jnp.float32(at)}
  term, metrics = jax.jit(restraint(**given).term)(outputs.logits, batch)
  np.testing.assert_allclose(
    metrics["penalty_weight"], expected * WEIGHT, rtol=1e-5
  )
  np.testing.assert_allclose(
    term, expected * WEIGHT * metrics["penalty"], rtol=1e-5
  )


def test_a_step_says_how_far_its_phase_is(concat):
  """Of a phase that begins at update 10 of a run and has 40."""
  model, _, batch, _ = concat
  recipe = recipes.joint(
    model, num_steps=40, tx=helpers.TX, restraint=restraint()
  )
  (phase,) = recipe.phases
  step = jax.jit(steps.make_train_step(phase, start=10))
  state = jax.jit(state_lib.initializer(model, phase))(jax.random.key(0))
  found = []
  for done in (10, 11, 12, 30):
    at = dataclasses.replace(state, step=jnp.asarray(done))
    found.append(step(at, batch, jax.random.key(0))[1]["penalty_weight"])
  np.testing.assert_allclose(
    found, WEIGHT * np.array([0, 0.5, 1, 1]), rtol=1e-5
  )


def test_examples_without_a_modality_do_not_count(concat):
  _, _, batch, outputs = concat
  here = np.arange(16) > 4
  batch = {**batch, "present": {m: jnp.asarray(here) for m in "ab"}}
  _, metrics = jax.jit(restraint().term)(outputs.logits, batch)
  expected = dispersion(outputs.logits, batch["label"])[here].mean()
  np.testing.assert_allclose(metrics["penalty"], expected, rtol=1e-5)
  assert metrics["num_valid"] == here.sum()


def test_both_labels_of_mixup_are_restrained(concat):
  _, _, batch, outputs = concat
  other = jnp.flip(batch["label"])
  mixed = {**batch, "other_label": other, "mix": jnp.float32(0.3)}
  _, metrics = jax.jit(restraint().term)(outputs.logits, mixed)
  expected = 0.3 * np.mean(dispersion(outputs.logits, batch["label"]))
  expected += 0.7 * np.mean(dispersion(outputs.logits, other))
  np.testing.assert_allclose(metrics["penalty"], expected, rtol=1e-5)


def test_scores_of_present_modalities_are_restrained(concat):
  _, _, batch, outputs = concat
  here = {"a": np.arange(16) > 4, "b": np.arange(16) < 9}
  batch = {**batch, "present": jax.tree.map(jnp.asarray, here)}
  term = restraint(on="scores").term
  _, metrics = jax.jit(term)(outputs.logits, batch, outputs.scores)
  each = {m: dispersion(outputs.scores[m], batch["label"]) for m in "ab"}
  total = sum(here[m] * each[m] for m in "ab") / (here["a"] + 0.0 + here["b"])
  np.testing.assert_allclose(metrics["penalty"], total.mean(), rtol=1e-5)
  _, fused = jax.jit(restraint().term)(outputs.logits, batch)
  assert abs(fused["penalty"] - metrics["penalty"]) > 1e-3


def one_step(recipe, model, batch):
  """Metrics of the first update of the first phase."""
  phase, once = recipe.phases[0], _compiling.options_for_once()
  create = state_lib.initializer(model, phase)
  state = jax.jit(create, compiler_options=once)(jax.random.key(0))
  step = jax.jit(steps.make_train_step(phase), compiler_options=once)
  return step(state, batch, jax.random.key(0))[1]


def token_model():
  return models.token_transformer(
    helpers.SHAPES, 3, width=8, num_layers=1, num_heads=2
  )


def masked_model():
  encoder = encoders.mlp(hidden_sizes=(6,), embedding_dim=4)
  return models.masked_fusion(
    dict.fromkeys(helpers.SHAPES, encoder),
    3,
    input_shapes=helpers.SHAPES,
    width=8,
  )


CLEAN = {"noise": "clean"}
RECIPES = {
  "joint": (helpers.concat_model, recipes.joint, {}, "loss"),
  "crmt": (
    helpers.ordinary_model,
    recipes.crmt,
    {"fidelity": "published", "integration_steps": 0},
    "loss",
  ),
  "finetune": (token_model, recipes.finetune, {"method": "probe"}, "loss"),
  "masd": (
    helpers.concat_model,
    recipes.masd,
    {"method": "finetune"},
    "task_loss",
  ),
  "modal_immune": (
    masked_model,
    recipes.modal_immune,
    {"gate": "none", "collapse_weight": 0.0},
    "clean_loss",
  ),
  "nullspace": (helpers.concat_model, recipes.nullspace, CLEAN, "loss"),
  "pretrain": (
    helpers.concat_model,
    recipes.nullspace,
    {**CLEAN, "pretrain_steps": 2},
    "loss",
  ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_with_cross_entropy_adds_it(name):
  make_model, make, options, loss = RECIPES[name]
  model, batch = make_model(), helpers.make_batch()
  if name == "finetune":
    # What the probe sees; its head begins at zero, where all logits are alike.
    rng = np.random.default_rng(0)
    batch = {
      "features": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32),
      "mean": jnp.zeros(8),
      "deviation": jnp.ones(8),
      "label": batch["label"],
      "present": batch["present"],
    }
  term = restraint("label_smoothing", ramp=0.0)
  both = [
    one_step(
      make(model, num_steps=2, tx=helpers.TX, restraint=given, **options),
      model,
      batch,
    )
    for given in (None, term)
  ]
  added = float(both[1][loss] - both[0][loss])
  penalty = float(both[1].get("penalty", added / WEIGHT))
  if name == "finetune":
    penalty = np.log(3)
  np.testing.assert_allclose(added, WEIGHT * penalty, rtol=1e-4, atol=1e-6)
  assert added > 1e-4
  assert "penalty" not in both[0]


def test_the_inner_loss_of_modal_immune_has_it_too(monkeypatch):
  found, real = [], destruction.make_update

  def spy(settings, tx):
    found.append(settings)
    return real(settings, tx)

  monkeypatch.setattr(destruction, "make_update", spy)
  model, batch = masked_model(), helpers.make_batch(2)
  once = _compiling.options_for_once()
  params, _ = jax.jit(model.init, compiler_options=once)(jax.random.key(0))
  for term in (None, restraint()):
    recipes.modal_immune(
      model,
      num_steps=50,
      tx=helpers.TX,
      removal="every",
      gate="none",
      collapse_weight=0.0,
      restraint=term,
    )
  given = {
    "batch": batch,
    "state": {},
    "p": jnp.array([0.5, 0.5]),
    "decoders": {},
  }
  sets = [("a",), ("b",), ("a", "b")]

  @functools.partial(jax.jit, compiler_options=once)
  def everything(params):
    inner = [
      immunity.expected_loss(settings, params, settings.phi(), given)
      for settings in found
    ]
    flags = [
      {m: f & (m in names) for m, f in batch["present"].items()}
      for names in sets
    ]
    said = [
      model.apply(params, {}, batch["inputs"], present)[0].logits
      for present in flags
    ]
    return inner, said

  inner, said = everything(params)
  each = [np.mean(dispersion(logits, batch["label"])) for logits in said]
  expected = WEIGHT * (each[-1] + np.mean(each))
  np.testing.assert_allclose(inner[1] - inner[0], expected, rtol=1e-3)


def test_what_does_not_fit_is_refused_by_name():
  given = {"num_steps": 2, "tx": helpers.TX}
  with pytest.raises(ValueError, match="penalty must be left out of recipe"):
    recipes.crmt(helpers.lipschitz_model(), restraint=restraint(), **given)
  with pytest.raises(ValueError, match="on must be 'fused' here"):
    recipes.masd(token_model(), restraint=restraint(on="scores"), **given)
  with pytest.raises(ValueError, match="on must be 'fused' here"):
    recipes.joint(token_model(), restraint=restraint(on="scores"), **given)
  with pytest.raises(ValueError, match="window must end at 2 at most"):
    recipes.joint(
      helpers.concat_model(), restraint=restraint("topk_level"), **given
    )
  number = dataclasses.replace(
    helpers.concat_model(), target=Target(mean=0.0, deviation=1.0)
  )
  with pytest.raises(ValueError, match="penalty must be left out for a model"):
    recipes.joint(number, restraint=restraint(), **given)
  with pytest.raises(ValueError, match="on must be 'fused' with fidelity"):
    restraint(on="scores", fidelity="published")
  with pytest.raises(ValueError, match="on must be one of"):
    restraint(on="logits")
  with pytest.raises(ValueError, match="needs fidelity='published'"):
    restraint("sorted_slice_dispersion", options={"top_n": 3})
