"""Recipes and interventions: what they change, what they leave alone."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from robust_mm import attacks
from robust_mm import certification
from robust_mm import models
from robust_mm import recipes
from robust_mm.models import encoders
from robust_mm.recipes import interventions
from robust_mm.recipes import objectives
from robust_mm.training import state as state_lib
from robust_mm.training import steps

SHAPES = {"a": (6,), "b": (3, 2)}


class Linear(nnx.Module):
  """1-Lipschitz by its Frobenius norm: compiles in no time."""

  def __init__(self, input_shape, rngs):
    size = math.prod(input_shape)
    self.kernel = nnx.Param(jax.random.normal(rngs.params(), (size, 8)))

  def __call__(self, x):
    kernel = self.kernel[...]
    return x.reshape(len(x), -1) @ kernel / jnp.linalg.norm(kernel)


def lipschitz_model(**options):
  encoder = models.custom(Linear, 8, lipschitz=1.0)
  return models.late_fusion(
    dict.fromkeys(SHAPES, encoder),
    num_classes=3,
    input_shapes=SHAPES,
    num_iters=3,
    **options,
  )


def ordinary_model(**options):
  return models.late_fusion(
    dict.fromkeys(SHAPES, models.custom(Linear, 8)),
    num_classes=3,
    input_shapes=SHAPES,
    num_iters=3,
    **options,
  )


def concat_model(lipschitz=1.0):
  return models.concat_fusion(
    dict.fromkeys(SHAPES, models.custom(Linear, 8, lipschitz=lipschitz)),
    num_classes=3,
    input_shapes=SHAPES,
  )


def make_batch(seed=0, size=16):
  rng = np.random.default_rng(seed)
  return {
    "inputs": {
      name: jnp.asarray(rng.normal(size=(size, *shape)), jnp.float32)
      for name, shape in SHAPES.items()
    },
    "present": {name: jnp.ones(size, bool) for name in SHAPES},
    "label": jnp.asarray(rng.integers(0, 3, size)),
    "id": jnp.arange(size),
  }


def run(recipe, model, batch, num_steps):
  phase = recipe.phases[0]
  key = jax.random.key(0)
  state = jax.jit(state_lib.initializer(model, phase))(key)
  return repeat(phase, state, batch, num_steps)


def repeat(phase, state, batch, num_steps):
  """(the last state, losses [num_steps]), all steps in one call."""
  step = steps.make_train_step(phase)

  @jax.jit
  def all_steps(state):
    return jax.lax.scan(
      lambda state, _: step(state, batch, jax.random.key(0)),
      state,
      length=num_steps,
    )

  state, metrics = all_steps(state)
  return state, metrics["loss"]


TX = optax.adam(1e-2)


@pytest.mark.parametrize("variant", ["JT", "AT", "Mix"])
@pytest.mark.parametrize("fidelity", ["corrected", "published"])
def test_step_one_lowers_its_loss_on_a_batch(variant, fidelity):
  model = lipschitz_model() if fidelity == "corrected" else ordinary_model()
  recipe = recipes.crmt(
    model,
    num_steps=40,
    tx=TX,
    variant=variant,
    fidelity=fidelity,
    integration_steps=0,
  )
  _, history = run(recipe, model, make_batch(), 40)
  assert np.all(np.isfinite(history))
  assert np.mean(history[-5:]) < np.mean(history[:5])


def test_corrected_step_one_reaches_its_radius_by_overfitting():
  """crmt.md 13.14: class means of norm 2, noise .1, 300 Adam steps at 1e-3."""
  rng = np.random.default_rng(0)
  means = rng.normal(size=(2, 4, 8))
  means *= 2 / np.linalg.norm(means, axis=-1, keepdims=True)
  label = np.arange(64) % 4
  batch = {
    "inputs": {
      name: jnp.asarray(
        means[i][label] + 0.1 * rng.normal(size=(64, 8)), jnp.float32
      )
      for i, name in enumerate("ab")
    },
    "present": {name: jnp.ones(64, bool) for name in "ab"},
    "label": jnp.asarray(label),
    "id": jnp.arange(64),
  }
  model = models.late_fusion(
    {
      n: encoders.lipschitz_mlp(width=16, embedding_dim=8, block="aol")
      for n in "ab"
    },
    num_classes=4,
    input_shapes={"a": (8,), "b": (8,)},
  )
  recipe = recipes.crmt(
    model,
    num_steps=300,
    tx=optax.adam(1e-3),
    r0=0.3,
    temperature=0.05,
    integration_steps=0,
  )
  state, _ = run(recipe, model, batch, 300)
  certificate = certification.certify(model, state.params, batch)
  np.testing.assert_array_equal(certificate.prediction, label)
  assert np.min(certificate.radius) > 0.5


def test_corrected_crmt_refuses_encoders_without_constants():
  with pytest.raises(ValueError, match=r"'a' states no Lipschitz.*published"):
    recipes.crmt(ordinary_model(), num_steps=1, tx=TX)


def test_crmt_refuses_a_model_that_mixes_modalities():
  model = models.token_fusion(
    {name: encoders.mlp(hidden_sizes=(8,), embedding_dim=8) for name in SHAPES},
    num_classes=3,
    input_shapes=SHAPES,
  )
  with pytest.raises(ValueError, match="sum of per-modality scores"):
    recipes.crmt(model, num_steps=1, tx=TX, fidelity="published")


@pytest.mark.parametrize(
  "arguments, name",
  [
    ({"variant": "XX"}, "variant"),
    ({"fidelity": "XX"}, "fidelity"),
    ({"rho": -1.0}, "rho"),
    ({"r0": -1.0}, "r0"),
    ({"temperature": 0.0}, "temperature"),
    ({"integration_steps": -1}, "integration_steps"),
    ({"num_steps": 0}, "num_steps"),
  ],
)
def test_crmt_names_the_bad_argument(arguments, name):
  with pytest.raises(ValueError, match=name):
    recipes.crmt(lipschitz_model(), tx=TX, **{"num_steps": 1, **arguments})


def test_frozen_parameters_stay_bit_identical():
  model = lipschitz_model()
  phase = recipes.Phase(
    name="x",
    num_steps=1,
    loss=objectives.cross_entropy_loss(model),
    tx=TX,
    trainable="fusion/",
  )
  recipe = recipes.Recipe(name="x", phases=(phase,))
  params, _ = jax.jit(model.init)(jax.random.key(0))
  state, _ = run(recipe, model, make_batch(), 3)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    after = state.params
    for part in name.split("/"):
      after = after[part]
    same = np.array_equal(leaf, after)
    assert same == (not name.startswith("fusion/")), name


def test_trainable_that_matches_nothing_is_refused():
  with pytest.raises(ValueError, match=r"'zzz' matches no parameter.*alpha"):
    state_lib.split({"alpha": 1.0}, "zzz")


def test_split_and_merge_are_inverse():
  params = {"a": {"x": 1.0, "y": 2.0}, "b": 3.0}
  chosen, frozen = state_lib.split(params, "a/x|b")
  assert chosen == {"a": {"x": 1.0, "y": None}, "b": 3.0}
  assert state_lib.merge(chosen, frozen) == params


def test_adversarial_batch_has_a_larger_loss_inside_the_budget():
  model = lipschitz_model()
  params, state = jax.jit(model.init)(jax.random.key(0))
  batch = make_batch()
  attack = attacks.pgd(norm=2, budget=0.5, num_steps=5, num_restarts=1)
  out = jax.jit(interventions.adversarial(model, attack))(
    jax.random.key(1), params, state, batch
  )
  size = sum(
    jnp.sum((out["inputs"][n] - batch["inputs"][n]).reshape(16, -1) ** 2, -1)
    for n in SHAPES
  )
  assert np.all(np.sqrt(size) <= 0.5 * (1 + 1e-5))
  loss = objectives.cross_entropy_loss(model)
  loss = jax.jit(loss)
  clean, _ = loss(params, state, batch, key=None)
  attacked, _ = loss(params, state, out, key=None)
  assert attacked > clean


def test_mixup_is_linear_and_skips_what_either_lacks():
  batch = make_batch()
  batch["present"]["a"] = batch["present"]["a"].at[:5].set(False)
  out = interventions.mixup(alpha=1.0)(jax.random.key(0), None, None, batch)
  mix = out["mix"]
  assert 0 <= mix <= 1
  order = np.array(
    [
      next(
        j
        for j in range(16)
        if np.allclose(
          out["inputs"]["b"][i],
          mix * batch["inputs"]["b"][i] + (1 - mix) * batch["inputs"]["b"][j],
          atol=1e-5,
        )
      )
      for i in range(16)
    ]
  )
  assert sorted(order) == list(range(16))
  np.testing.assert_array_equal(out["other_label"], batch["label"][order])
  expected = batch["present"]["a"] & batch["present"]["a"][order]
  np.testing.assert_array_equal(out["present"]["a"], expected)
  assert not np.any(out["inputs"]["a"][~expected])


def test_mixup_refuses_tokens_by_name():
  batch = {
    "inputs": {"words": jnp.zeros((2, 3), jnp.int32)},
    "present": {"words": jnp.ones(2, bool)},
    "label": jnp.zeros(2, jnp.int32),
  }
  with pytest.raises(ValueError, match="integer modality 'words'"):
    interventions.mixup()(jax.random.key(0), None, None, batch)


def test_dropout_rate_zero_changes_nothing_and_one_keeps_a_modality():
  batch = make_batch(size=512)
  none = interventions.modality_dropout(rate=0.0)
  out = none(jax.random.key(0), None, None, batch)
  for name in SHAPES:
    np.testing.assert_array_equal(out["present"][name], True)
  every = interventions.modality_dropout(rate=1.0)
  out = every(jax.random.key(0), None, None, batch)
  kept = out["present"]["a"].astype(int) + out["present"]["b"]
  assert np.min(kept) == 1
  # {a}, {b}, {a, b} are equally likely.
  assert abs(np.mean(kept == 2) - 1 / 3) < 0.08


def test_absent_examples_do_not_count_in_the_joint_loss():
  model = ordinary_model()
  params, state = jax.jit(model.init)(jax.random.key(0))
  batch = make_batch()
  loss = objectives.cross_entropy_loss(model)
  whole, _ = loss(params, state, batch, key=None)
  gone = {
    name: flag.at[8:].set(False) for name, flag in batch["present"].items()
  }
  half, _ = loss(params, state, {**batch, "present": gone}, key=None)
  first = jax.tree.map(lambda x: x[:8], batch)
  alone, _ = loss(params, state, first, key=None)
  np.testing.assert_allclose(half, alone, rtol=1e-6)
  assert abs(half - whole) > 1e-6


def evaluate(loss, model, batch):
  params, state = jax.jit(model.init)(jax.random.key(0))
  value, (_, metrics) = jax.jit(
    lambda params, batch: loss(params, state, batch, key=jax.random.key(1))
  )(params, batch)
  return params, value, metrics


def integrate(recipe, model, num_steps):
  """Step 2 on scores of 13.10, correct and incorrect: (before, after, loss)."""
  batch = make_batch(size=64)
  rng = np.random.default_rng(0)
  own = np.arange(3) == np.asarray(batch["label"])[:, None]
  scores = {
    name: np.where(own, 0.5, -0.15) + 0.2 * rng.normal(size=own.shape)
    for name in SHAPES
  }
  cached = {**batch, "scores": jax.tree.map(jnp.float32, scores)}
  phase = recipe.phases[1]
  state = jax.jit(state_lib.initializer(model, phase))(jax.random.key(0))
  before = state.params
  data = phase.prepare(before, {}, cached, batch)
  state, history = repeat(phase, state, data, num_steps)
  return before, state.params, history


@pytest.mark.parametrize("orthogonality", ["polar", "rowwise"])
def test_published_step_two_moves_the_factors_alone(orthogonality):
  model = ordinary_model(
    orthogonality=orthogonality, integration="softplus", use_bias=True
  )
  recipe = recipes.crmt(model, num_steps=1, tx=TX, fidelity="published")
  before, after, history = integrate(recipe, model, 5)
  alpha = [p["fusion"].pop("integration")["alpha"] for p in (before, after)]
  assert not np.array_equal(*alpha)
  jax.tree.map(np.testing.assert_array_equal, before, after)
  assert history[-1] < history[0]


def test_step_two_turns_to_the_less_exposed_modality():
  """crmt.md 13.11, with ``lipschitz`` for a changed threat."""
  model = lipschitz_model()
  recipe = recipes.crmt(
    model, num_steps=1, tx=TX, integration_lr=0.1, lipschitz={"a": 9, "b": 1}
  )
  _, after, history = integrate(recipe, model, 60)
  factors = model.geometry(after).integration
  assert jnp.mean(factors["b"]) > 2 * jnp.mean(factors["a"])
  assert history[-1] < history[0]


def test_step_two_is_accepted_for_more_certified_and_kept_accuracy():
  accept = (
    recipes.crmt(lipschitz_model(), num_steps=1, tx=TX, clean_tolerance=0.01)
    .phases[1]
    .accept
  )
  before = {"accuracy": 0.98, "certified_accuracy": 0.5}
  for accuracy, certified, expected in (
    (0.97, 0.6, True),
    (0.96, 0.6, False),
    (0.99, 0.5, False),
  ):
    after = {"accuracy": accuracy, "certified_accuracy": certified}
    assert accept(before, after)[0] is expected


@pytest.mark.parametrize("rho, integration_steps", [(1.0, 0), (0.0, 5)])
def test_corrected_crmt_refuses_heads_that_are_not_orthonormal(
  rho, integration_steps
):
  message = "integration factors|orthonormal rows"
  for model in (concat_model(), lipschitz_model(orthogonality="rowwise")):
    with pytest.raises(ValueError, match=message):
      recipes.crmt(
        model,
        num_steps=1,
        tx=TX,
        rho=rho,
        integration_steps=integration_steps,
      )
    recipes.certified_radius(model, num_steps=1, tx=TX)


def test_published_crmt_on_a_dense_head_has_no_step_two():
  model = concat_model(lipschitz=None)
  with pytest.raises(ValueError, match="integration_steps must be 0"):
    recipes.crmt(model, num_steps=1, tx=TX, fidelity="published")
  recipe = recipes.crmt(
    model, num_steps=1, tx=TX, fidelity="published", integration_steps=0
  )
  _, _, metrics = evaluate(recipe.phases[0].loss, model, make_batch())
  assert "orthogonality_defect" not in metrics


def test_units_of_some_modalities_are_one_elsewhere():
  model = lipschitz_model()
  batch = make_batch()
  values = []
  for units in ({"a": 2.0}, {"a": 2.0, "b": 1.0}, None):
    recipe = recipes.crmt(model, num_steps=1, tx=TX, units=units, variant="AT")
    values.append(evaluate(recipe.phases[0].loss, model, batch)[1])
    cached = {"scores": {}, "label": None, "present": None}
    params, _ = jax.jit(model.init)(jax.random.key(0))
    data = recipe.phases[1].prepare(params, {}, cached, None)
    expected = 2.0 if units else 1.0
    assert data["lipschitz"] == {"a": expected, "b": 1.0}
  assert values[0] == values[1] != values[2]


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"units": {"c": 1.0}}, "units"),
    ({"units": {"a": 0.0}}, "units"),
    ({"lipschitz": {"a": 1.0}}, "lipschitz has no constant for modality 'b'"),
    ({"lipschitz": {"a": 1.0, "b": -1.0}}, "lipschitz"),
    ({"clean_weight": 0.5}, "clean_weight must be 0 unless"),
    ({"clean_weight": 2.0, "variant": "AT"}, "clean_weight"),
    ({"attack_loss": "x", "variant": "AT"}, "loss must be one of"),
    ({"attack_steps": 0, "variant": "AT"}, "attack_steps"),
  ],
)
def test_crmt_refuses_by_name(arguments, message):
  with pytest.raises(ValueError, match=message):
    recipes.crmt(lipschitz_model(), num_steps=1, tx=TX, **arguments)


def test_joint_refuses_by_name():
  for arguments, message in (
    ({"units": {"c": 1.0}}, "units"),
    ({"clean_weight": 0.5}, "clean_weight must be 0 unless"),
  ):
    with pytest.raises(ValueError, match=message):
      recipes.joint(ordinary_model(), num_steps=1, tx=TX, **arguments)


def test_attacks_of_the_two_fidelities_are_as_stated(monkeypatch):
  """crmt.md 6: 5 steps of .02 along cross-entropy from the clean input."""
  made = []
  real = attacks.pgd

  def spy(**options):
    made.append(real(**options))
    return made[-1]

  monkeypatch.setattr(attacks, "pgd", spy)
  for fidelity in ("published", "corrected"):
    recipes.crmt(
      lipschitz_model(), num_steps=1, tx=TX, variant="AT", fidelity=fidelity
    )
  published, corrected = (attack.settings for attack in made)
  assert published["loss"] == "cross_entropy"
  assert published["random_start"] is False
  assert published["num_steps"] == 5
  np.testing.assert_allclose(published["step_size"], 0.02)
  assert corrected["loss"] == "margin"
  assert corrected["random_start"] is True
  assert corrected["step_size"] is None


def test_clean_weight_mixes_the_losses_of_both_inputs():
  model = lipschitz_model()
  batch = make_batch()
  attacked = {**batch, "inputs": jax.tree.map(lambda x: -x, batch["inputs"])}
  both = {**attacked, "clean_inputs": batch["inputs"]}
  values = {}
  for weight in (0.0, 0.25):
    recipe = recipes.crmt(
      model, num_steps=1, tx=TX, variant="AT", clean_weight=weight
    )
    values[weight] = evaluate(recipe.phases[0].loss, model, both)[1]
  plain = recipes.crmt(model, num_steps=1, tx=TX).phases[0].loss
  clean = evaluate(plain, model, batch)[1]
  np.testing.assert_allclose(
    values[0.25], 0.75 * values[0.0] + 0.25 * clean, rtol=1e-5
  )
  assert abs(clean - values[0.0]) > 1e-3


@pytest.mark.parametrize("fidelity", ["corrected", "published"])
def test_mixed_losses_equal_their_formulas(fidelity):
  model = lipschitz_model()
  recipe = recipes.crmt(
    model, num_steps=1, tx=TX, variant="Mix", fidelity=fidelity, rho=2.0
  )
  loss = recipe.phases[0].loss
  mix = 0.3
  batch = make_batch()
  other = jnp.roll(batch["label"], 1)
  mixed = {**batch, "other_label": other, "mix": jnp.asarray(mix)}
  params, value, _ = evaluate(loss, model, mixed)
  if fidelity == "corrected":
    first = evaluate(loss, model, batch)[1]
    second = evaluate(loss, model, {**batch, "label": other})[1]
    expected = mix * first + (1 - mix) * second
  else:
    outputs, _ = model.apply(params, {}, batch["inputs"], batch["present"])
    expected = _published_mixture(outputs, batch["label"], other, mix)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  # Labels that agree: the loss of one label, whatever the mixture.
  same = {**batch, "other_label": batch["label"], "mix": jnp.asarray(mix)}
  np.testing.assert_allclose(
    evaluate(loss, model, same)[1], evaluate(loss, model, batch)[1], rtol=1e-5
  )


def _published_mixture(outputs, label, other, mix):
  """CE mixed by lambda + 2 L1mix, in float64, example by example."""
  logits = np.asarray(outputs.logits, np.float64)
  margins = []
  cross_entropies = []
  for i, (y, z) in enumerate(zip(np.asarray(label), np.asarray(other))):
    normalizer = np.log(np.sum(np.exp(logits[i])))
    own = mix * logits[i, y] + (1 - mix) * logits[i, z]
    cross_entropies.append(normalizer - own)
    total = 1e-5
    for score in outputs.scores.values():
      s = np.asarray(score[i], np.float64)
      rivals = sum(np.exp(s[j]) for j in range(3) if j not in (y, z))
      total += rivals / np.exp(mix * s[y] + (1 - mix) * s[z])
    margins.append(np.log(total))
  return np.mean(cross_entropies) + 2 * np.mean(margins)


@pytest.mark.parametrize("fidelity", ["corrected", "published"])
def test_step_one_logs_the_defect_and_the_mean_factors(fidelity):
  model = lipschitz_model(integration_init=0.5)
  recipe = recipes.crmt(model, num_steps=1, tx=TX, fidelity=fidelity)
  batch = make_batch()
  _, _, metrics = evaluate(recipe.phases[0].loss, model, batch)
  assert metrics["orthogonality_defect"] < 1e-4
  for name in SHAPES:
    np.testing.assert_allclose(metrics[f"mean_factor_{name}"], 0.5, rtol=1e-6)
  params, _ = jax.jit(model.init)(jax.random.key(0))
  proxy = params["fusion"]["proxy"]
  proxy["b"] = proxy["b"].at[1].set(proxy["b"][0])
  _, (_, metrics) = recipe.phases[0].loss(params, {}, batch, key=None)
  assert metrics["orthogonality_defect"] > 0.4
