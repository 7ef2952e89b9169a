"""A penalty inside recipes: as published, of two labels, of two terms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes_models as helpers

from robust_mm import _compiling
from robust_mm import losses
from robust_mm import recipes
from robust_mm.recipes import objectives
from robust_mm.training import state as state_lib
from robust_mm.training import steps

WEIGHT = 0.7


def restraint(name="wrong_class_dispersion", **given):
  options = given.pop("options", {})
  return recipes.Restraint(
    penalty=losses.penalty(name, **options), weight=WEIGHT, ramp=0.0, **given
  )


@pytest.fixture(scope="module")
def given():
  """(batch, logits [16, 3])."""
  logits = np.random.default_rng(0).normal(size=(16, 3))
  return helpers.make_batch(), jnp.asarray(logits, jnp.float32)


def first_update(recipe, model, batch):
  phase, once = recipe.phases[0], _compiling.options_for_once()
  create = state_lib.initializer(model, phase)
  state = jax.jit(create, compiler_options=once)(jax.random.key(0))
  step = jax.jit(steps.make_train_step(phase), compiler_options=once)
  return step(state, batch, jax.random.key(0))[1]


def test_what_is_logged_of_mixup_is_of_both_labels(given):
  batch, logits = given
  other = jnp.flip(batch["label"])
  mixed = {**batch, "other_label": other, "mix": jnp.float32(0.3)}
  term = restraint("complement_kl").term
  _, found = term(logits, mixed)
  each = [
    term(logits, {**batch, "label": y})[1] for y in (batch["label"], other)
  ]
  for name in ("ce", "margin_mean", "wrong_dispersion", "penalty"):
    expected = 0.3 * each[0][name] + 0.7 * each[1][name]
    np.testing.assert_allclose(found[name], expected, rtol=1e-5, err_msg=name)
    assert abs(found[name] - each[0][name]) > 1e-3, name
  np.testing.assert_allclose(
    found["ce"], objectives.classification(logits, mixed), rtol=1e-5
  )
  assert found["num_valid"] == 16


@pytest.mark.parametrize("name", ["wrong_class_dispersion", "topk_level"])
def test_published_sums_leave_out_examples_without_a_modality(given, name):
  batch, logits = given
  options = {"window": (0, 2)} if name == "topk_level" else {}
  term = jax.jit(restraint(name, fidelity="published", options=options).term)
  here = np.arange(16) > 4
  some = {**batch, "present": dict.fromkeys("ab", jnp.asarray(here))}
  rest = {
    "label": batch["label"][here],
    "present": dict.fromkeys("ab", jnp.ones(11, bool)),
  }
  expected, _ = term(logits[here], rest)
  poisoned = jnp.where(here[:, None], logits, 1e3)
  strange = jnp.where(here, batch["label"], -1)
  found, metrics = term(poisoned, {**some, "label": strange})
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert metrics["num_valid"] == 11
  assert abs(term(logits, batch)[0] - expected) > 1e-2


def test_published_sums_of_masd_are_of_rows_with_a_label(given):
  """Rows without one are labelled 0, which is no class of theirs."""
  batch, _ = given
  model = helpers.concat_model()
  flag = jnp.asarray(np.arange(16) % 2 == 0)
  made = recipes.masd(
    model,
    num_steps=2,
    tx=helpers.TX,
    method="finetune",
    restraint=restraint(fidelity="published"),
  )
  found = [
    first_update(
      made,
      model,
      {**batch, "labelled": flag, "label": jnp.where(flag, batch["label"], y)},
    )["task_loss"]
    for y in (0, 2)
  ]
  assert found[0] == found[1]
  whole = first_update(made, model, batch)["task_loss"]
  assert abs(whole - found[0]) > 1e-2


def test_nullspace_restrains_both_of_its_terms(given):
  """Without dropout the second view is the first one again."""
  batch, model = given[0], helpers.concat_model()
  found = [
    first_update(
      recipes.nullspace(
        model,
        num_steps=2,
        tx=helpers.TX,
        noise="twice_clean",
        restraint=term,
      ),
      model,
      batch,
    )
    for term in (None, restraint("label_smoothing"))
  ]
  added = found[1]["loss"] - found[0]["loss"]
  np.testing.assert_allclose(added, 2 * WEIGHT * found[1]["penalty"], rtol=1e-4)
  assert added > 0.1
  assert "penalty" not in found[0]
