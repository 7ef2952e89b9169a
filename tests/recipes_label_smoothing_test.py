"""Label smoothing, against its closed form; what it must not touch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recipes_models as helpers

import robust_mm
from robust_mm import cli
from robust_mm import config as config_lib
from robust_mm import losses
from robust_mm import models
from robust_mm import recipes
from robust_mm import training
from robust_mm.models import encoders
from robust_mm.recipes import destruction
from robust_mm.recipes import immunity
from robust_mm.recipes import objectives
from robust_mm.training import setup as setup_lib
from robust_mm.training import state as state_lib
from robust_mm.training import steps
from robust_mm.training import writers

SMOOTHING = 0.2


def by_hand(logits, label, smoothing):
  """-(1 - s) log p_y - s/k sum_j log p_j, of every row, in float64."""
  logits = np.asarray(logits, np.float64)
  log_p = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
  right = np.take_along_axis(log_p, np.asarray(label)[:, None], 1)[:, 0]
  return -(1 - smoothing) * right - smoothing * np.mean(log_p, -1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_smoothed_cross_entropy_is_the_closed_form(smoothing):
  rng = np.random.default_rng(0)
  logits = jnp.asarray(3 * rng.normal(size=(20, 4)), jnp.float32)
  label = rng.integers(0, 4, 20)
  found = losses.cross_entropy(logits, label, label_smoothing=smoothing)
  expected = by_hand(logits, label, smoothing)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_best_logits_are_those_of_the_smoothed_label():
  """At p_y = 1 - s + s/k and p_j = s/k the gradient is zero; 0.1 off, not."""
  target = np.full((1, 4), 0.05) + 0.8 * np.eye(4)[:1]
  grad = jax.grad(
    lambda x: losses.cross_entropy(x, jnp.array([0]), label_smoothing=0.2)[0]
  )
  best = jnp.asarray(np.log(target), jnp.float32)
  np.testing.assert_allclose(grad(best), 0, atol=1e-6)
  assert np.max(np.abs(grad(best.at[0, 0].add(0.1)))) > 1e-2


@pytest.mark.parametrize("smoothing", [1.0, -0.1])
def test_a_share_out_of_range_is_refused(smoothing):
  options = {"num_steps": 1, "tx": helpers.TX, "label_smoothing": smoothing}
  sentence = r"label_smoothing must lie in \[0, 1\)"
  with pytest.raises(ValueError, match=sentence):
    recipes.joint(helpers.concat_model(), **options)
  with pytest.raises(ValueError, match=sentence):
    recipes.modal_immune(helpers.concat_model(), **options)
  with pytest.raises(ValueError, match=sentence):
    losses.cross_entropy(
      jnp.zeros((1, 2)), jnp.array([0]), label_smoothing=smoothing
    )


def test_joint_smooths_the_loss_it_reports():
  model = helpers.concat_model()
  recipe = recipes.joint(
    model, num_steps=1, tx=helpers.TX, label_smoothing=SMOOTHING
  )
  (phase,) = recipe.phases
  state = jax.jit(state_lib.initializer(model, phase))(jax.random.key(0))
  batch = helpers.make_batch()
  logits = model.apply(state.params, {}, batch["inputs"], batch["present"])[
    0
  ].logits
  step = jax.jit(steps.make_train_step(phase))
  _, metrics = step(state, batch, jax.random.key(0))
  expected = np.mean(by_hand(logits, batch["label"], SMOOTHING))
  np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
  assert abs(expected - np.mean(by_hand(logits, batch["label"], 0.0))) > 1e-3


def test_both_labels_of_mixup_are_smoothed():
  rng = np.random.default_rng(1)
  logits = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
  batch = {
    "label": rng.integers(0, 3, 8),
    "other_label": rng.integers(0, 3, 8),
    "mix": jnp.float32(0.7),
    "present": {"a": np.arange(8) > 1},
  }
  found = objectives.classification(logits, batch, label_smoothing=SMOOTHING)
  first = by_hand(logits, batch["label"], SMOOTHING)
  other = by_hand(logits, batch["other_label"], SMOOTHING)
  expected = np.mean((0.7 * first + 0.3 * other)[2:])
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_validation_stays_plain(tmp_path):
  config = config_lib.load(
    "configs/joint.py:digits,mixup,smoke",
    [
      "--config.mesh.data=1",
      f"--config.recipe.options.label_smoothing={SMOOTHING}",
    ],
  )
  training.train(config, tmp_path, say=lambda line: None)
  model, params, state, _ = robust_mm.load(tmp_path)
  batch = setup_lib.open_split(config, "validation").batch()
  outputs, _ = model.apply(params, state, batch["inputs"], batch["present"])
  rows = [r for r in writers.read(tmp_path) if "validation_loss" in r]
  found = rows[-1]["validation_loss"]
  plain = np.mean(by_hand(outputs.logits, batch["label"], 0.0))
  smoothed = np.mean(by_hand(outputs.logits, batch["label"], SMOOTHING))
  np.testing.assert_allclose(found, plain, rtol=1e-5)
  assert abs(found - smoothed) > 1e-4


@pytest.fixture(scope="module")
def immune():
  """(model, settings by share, phase by share)."""
  encoder = encoders.mlp(hidden_sizes=(6,), embedding_dim=4, activation="gelu")
  model = models.masked_fusion(
    dict.fromkeys(helpers.SHAPES, encoder),
    3,
    input_shapes=helpers.SHAPES,
    width=8,
  )
  settings, phases = {}, {}
  real = destruction.make_update
  with pytest.MonkeyPatch.context() as patch:
    for share in (0.0, SMOOTHING):

      def spy(found, tx, share=share):
        settings[share] = found
        return real(found, tx)

      patch.setattr(destruction, "make_update", spy)
      recipe = recipes.modal_immune(
        model,
        num_steps=50,
        tx=optax.adam(1e-2),
        removal="every",
        gate="none",
        label_smoothing=share,
      )
      phases[share] = recipe.phases[0]
  return model, settings, phases


def mean_by_hand(model, params, batch, smoothing, sets):
  """Mean over availability sets of the mean smoothed cross-entropy."""
  found = []
  for names in sets:
    present = {
      name: flag & (name in names) for name, flag in batch["present"].items()
    }
    logits = model.apply(params, {}, batch["inputs"], present)[0].logits
    found.append(np.mean(by_hand(logits, batch["label"], smoothing)))
  return np.mean(found)


FULL = [("a", "b")]
SETS = [("a",), ("b",), ("a", "b")]


def test_modal_immune_smooths_what_it_trains_on(immune):
  model, _, phases = immune
  phase = phases[SMOOTHING]
  state = jax.jit(state_lib.initializer(model, phase))(jax.random.key(0))
  batch = helpers.make_batch()
  step = jax.jit(steps.make_train_step(phase))
  _, metrics = step(state, batch, jax.random.key(0))
  for name, sets in (("clean_loss", FULL), ("attacked_loss", SETS)):
    expected = mean_by_hand(model, state.params, batch, SMOOTHING, sets)
    np.testing.assert_allclose(metrics[name], expected, rtol=1e-5)
  total = metrics["clean_loss"] + metrics["attacked_loss"]
  np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)


def test_modal_immune_judges_validation_batches_plainly(immune):
  model, settings, phases = immune
  phase = phases[SMOOTHING]
  state = jax.jit(state_lib.initializer(model, phase))(jax.random.key(0))
  batch = helpers.make_batch(1)
  probe = next(job for job in phase.jobs if job.name == "probe")
  _, metrics = jax.jit(probe.run)(state, batch, jax.random.key(0))
  plain = mean_by_hand(model, state.params, batch, 0.0, FULL)
  np.testing.assert_allclose(metrics["loss"], plain, rtol=1e-5)
  given = {"batch": batch, "state": {}}
  found = immunity.outer_loss(settings[SMOOTHING], state.params, {}, given)
  plain = mean_by_hand(model, state.params, batch, 0.0, SETS)
  np.testing.assert_allclose(found, plain, rtol=1e-5)


def test_the_inner_loss_is_the_one_that_is_trained(immune):
  """Its difference to the plain one is that of clean and attacked loss."""
  model, settings, phases = immune
  batch = helpers.make_batch(2)
  state = jax.jit(state_lib.initializer(model, phases[0.0]))(jax.random.key(0))
  given = {
    "batch": batch,
    "state": {},
    "p": jnp.array([0.5, 0.5]),
    "decoders": {},
  }
  phi = settings[0.0].phi()
  found = [
    immunity.expected_loss(settings[share], state.params, phi, given)
    for share in (SMOOTHING, 0.0)
  ]
  expected = sum(
    mean_by_hand(model, state.params, batch, SMOOTHING, sets)
    - mean_by_hand(model, state.params, batch, 0.0, sets)
    for sets in (FULL, SETS)
  )
  np.testing.assert_allclose(found[0] - found[1], expected, atol=1e-5)
  assert abs(expected) > 1e-4


def test_a_bad_share_is_one_sentence_on_the_command_line(tmp_path, capsys):
  code = cli.main(
    [
      "train",
      "--config=configs/joint.py:digits,smoke",
      f"--workdir={tmp_path / 'run'}",
      "--config.recipe.options.label_smoothing=1.5",
    ]
  )
  _, err = capsys.readouterr()
  assert code == 2
  assert err.count("\n") == 1
  assert "label_smoothing must lie in [0, 1), got 1.5" in err
