"""MASD as a recipe: which rows count where, what teaches, what is kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes_models import concat_model
from recipes_models import make_batch

from robust_mm import distillation
from robust_mm import losses
from robust_mm import modalities
from robust_mm import recipes
from robust_mm.training import sharding
from robust_mm.training import state as state_lib

TX = optax.sgd(0.1)


def started(recipe, model, seed=0):
  """The state at the beginning of the last phase."""
  initial = state_lib.initializer(model, recipe.phases[-1])
  return initial(jax.random.key(seed))


def mixed_batch(size=16):
  """Labelled rows, of a alone, each followed by one without a label."""
  batch = make_batch(size=size)
  flag = np.arange(size) % 2 == 0
  batch["labelled"] = jnp.asarray(flag)
  batch["present"] = {
    "a": jnp.ones(size, bool),
    "b": jnp.asarray(~flag),
  }
  return batch


def one_step(batch, **options):
  model = concat_model()
  recipe = recipes.masd(
    model,
    num_steps=10,
    tx=TX,
    labelled=("a",),
    method="finetune",
    ramp=0.0,
    **options,
  )
  state = started(recipe, model)
  update = jax.jit(recipe.phases[-1].update)
  after, metrics = update(state, batch, jax.random.key(5))
  return model, state, after, metrics


def test_a_step_is_one_of_the_two_terms():
  batch = mixed_batch()
  model, state, after, metrics = one_step(batch, weight=2.0, temperature=3.0)
  draw, _ = jax.random.split(jax.random.key(5))
  subset = modalities.sample_subsets(draw, batch["present"], ("a",), "uniform")
  flag = batch["labelled"]

  def loss_fn(params):
    def logits(present):
      return model.apply(params, {}, batch["inputs"], present)[0].logits

    only = {"a": batch["present"]["a"], "b": jnp.zeros_like(flag)}
    entropy = losses.cross_entropy(logits(only), batch["label"])
    task = jnp.sum(jnp.where(flag, entropy, 0)) / jnp.sum(flag)
    seen = {m: batch["present"][m] & subset[m] for m in subset}
    teacher = jax.lax.stop_gradient(jax.nn.log_softmax(logits(only) / 3))
    student = jax.nn.log_softmax(logits(seen) / 3)
    apart = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return task + 2 * 9 * jnp.sum(jnp.where(flag, 0, apart)) / jnp.sum(~flag)

  loss, grads = jax.value_and_grad(loss_fn)(state.params)
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
  expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    after.params,
    expected,
  )
  assert float(metrics["distilled"]) == 8


def test_the_teacher_passes_rows_without_a_label_alone(monkeypatch):
  batch = mixed_batch()
  passed = []
  model = concat_model()
  apply = type(model).apply

  def watched(self, params, state, inputs, *args, **options):
    passed.append((options.get("train", False), len(inputs["a"])))
    return apply(self, params, state, inputs, *args, **options)

  monkeypatch.setattr(type(model), "apply", watched)
  found = {}
  for ratio in (0, 1):
    passed.clear()
    recipe = recipes.masd(
      model,
      num_steps=10,
      tx=TX,
      labelled=("a",),
      unlabelled_ratio=ratio,
      method="finetune",
      ramp=0.0,
    )
    state = started(recipe, model)
    update = recipe.phases[-1].update
    found[ratio] = update(state, batch, jax.random.key(5))
    assert passed == [(True, 16), (False, 16 // (1 + ratio))]
  (first, told), (second, same) = found.values()
  assert float(same["distilled"]) == 8
  for one, other in ((first.params, second.params), (told, same)):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, other
    )


def test_rows_beside_go_to_several_devices():
  """3 rows of a kind over 8 devices: groups lie across their borders."""
  mesh = sharding.make_mesh()
  batch = mixed_batch(size=24)
  batch["labelled"] = jnp.arange(24) % 3 == 0
  batch["present"]["b"] = ~batch["labelled"]
  *_, alone, _ = one_step(batch, unlabelled_ratio=2)
  spread = jax.device_put(batch, sharding.batch_sharding(mesh))
  *_, together, _ = one_step(spread, unlabelled_ratio=2)
  *_, anywhere, _ = one_step(batch)
  for other in (together, anywhere):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
      alone.params,
      other.params,
    )


def test_a_frozen_teacher_is_trained_on_labelled_rows_alone():
  model = concat_model()
  losses_of = []
  for ratio in (0, 1):
    recipe = recipes.masd(
      model,
      num_steps=10,
      tx=TX,
      labelled=("a",),
      unlabelled_ratio=ratio,
      method="finetune",
      teacher="frozen",
    )
    state = started(recipe, model)
    batch = {**mixed_batch(), "progress": jnp.asarray(0.5)}
    loss, _ = recipe.phases[0].loss(
      state.params, state.model_state, batch, key=jax.random.key(0)
    )
    losses_of.append(float(loss))
  np.testing.assert_allclose(*losses_of, rtol=1e-6)


def test_a_label_that_is_not_there_is_not_read():
  batch = mixed_batch()
  _, _, after, metrics = one_step(batch)
  poisoned = {
    **batch,
    "label": jnp.where(batch["labelled"], batch["label"], 2 - batch["label"]),
  }
  _, _, other, same = one_step(poisoned)
  jax.tree.map(np.testing.assert_array_equal, after.params, other.params)
  jax.tree.map(np.testing.assert_array_equal, metrics, same)


def test_unlabelled_modalities_of_labelled_rows_are_not_trained_with_labels():
  batch = mixed_batch()
  whole = {**batch, "present": dict.fromkeys("ab", jnp.ones(16, bool))}
  _, state, after, _ = one_step(whole, weight=0.0)
  moved = jax.tree.map(jnp.subtract, after.params, state.params)
  assert not any(
    np.any(leaf) for leaf in jax.tree.leaves(moved["encoders"]["b"])
  )
  assert any(np.any(leaf) for leaf in jax.tree.leaves(moved["encoders"]["a"]))


def test_without_rows_beside_every_row_teaches_too():
  batch = make_batch(size=16)
  assert "labelled" not in batch
  *_, metrics = one_step(batch)
  assert float(metrics["distilled"]) == 16


@pytest.mark.parametrize("teacher", ["ema", "frozen"])
def test_teachers_remember_other_parameters(teacher):
  model = concat_model()
  recipe = recipes.masd(
    model,
    num_steps=10,
    tx=TX,
    labelled=("a",),
    method="finetune",
    teacher=teacher,
    ramp=0.0,
    ema_decay=0.5,
  )
  names = [phase.name for phase in recipe.phases]
  assert names == (["teacher", "masd"] if teacher == "frozen" else ["masd"])
  state = started(recipe, model)
  update = jax.jit(recipe.phases[-1].update)
  first = state.extra["teacher"]
  moved = [state]
  for step in range(3):
    after, _ = update(moved[-1], mixed_batch(), jax.random.key(step))
    moved.append(after)
  last = moved[-1].extra["teacher"]
  if teacher == "frozen":
    jax.tree.map(np.testing.assert_array_equal, first, last)
    return
  expected = np.asarray(first["encoders"]["a"]["kernel"], np.float64)
  for count, state in enumerate(moved[1:], start=1):
    decay = min(0.5, (1 + count) / (10 + count))
    kernel = np.asarray(state.params["encoders"]["a"]["kernel"], np.float64)
    expected = decay * expected + (1 - decay) * kernel
  found = last["encoders"]["a"]["kernel"]
  np.testing.assert_allclose(found, expected, atol=1e-6)
  assert np.max(np.abs(found - first["encoders"]["a"]["kernel"])) > 1e-3


def test_the_term_rises_from_nothing():
  model = concat_model()
  recipe = recipes.masd(
    model, num_steps=10, tx=TX, labelled=("a",), method="finetune", ramp=0.4
  )
  state = started(recipe, model)
  update = jax.jit(recipe.phases[-1].update)
  found = []
  for step in range(6):
    state, metrics = update(state, mixed_batch(), jax.random.key(step))
    found.append(float(metrics["distillation_weight"]))
  np.testing.assert_allclose(found, [0, 0.25, 0.5, 0.75, 1, 1])


@pytest.mark.parametrize(
  "options, words",
  [
    ({"labelled": ("c",)}, "labelled"),
    ({"weight": -1.0}, "weight"),
    ({"unlabelled_ratio": -1}, "unlabelled_ratio"),
    ({"temperature": 0.0}, "temperature"),
    ({"ramp": 2.0}, "ramp"),
    ({"teacher": "other"}, "teacher"),
    ({"teacher_subset": "other"}, "teacher_subset"),
    ({"ema_decay": 1.0}, "ema_decay"),
    ({"distribution": "other"}, "distribution"),
    ({"method": "probe"}, "method"),
  ],
)
def test_bad_arguments_are_refused(options, words):
  given = {"method": "finetune", **options}
  with pytest.raises(ValueError, match=words):
    recipes.masd(concat_model(), num_steps=10, tx=TX, **given)


def test_one_modality_has_nothing_to_teach():
  model = dataclasses.replace(concat_model(), modalities=("a",))
  with pytest.raises(ValueError, match="two modalities"):
    recipes.masd(model, num_steps=10, tx=TX, method="finetune")
  assert distillation.TEACHERS == ("self", "ema", "frozen")
