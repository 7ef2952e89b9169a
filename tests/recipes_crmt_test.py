"""Step 1 of CRMT: losses by their formulas, attacks, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recipes_models as helpers

from robust_mm import attacks
from robust_mm import certification
from robust_mm import models
from robust_mm import recipes
from robust_mm.models import encoders


@pytest.mark.parametrize("variant", ["JT", "AT", "Mix"])
@pytest.mark.parametrize("fidelity", ["corrected", "published"])
def test_step_one_lowers_its_loss_on_a_batch(variant, fidelity):
  model = (
    helpers.lipschitz_model()
    if fidelity == "corrected"
    else helpers.ordinary_model()
  )
  recipe = recipes.crmt(
    model,
    num_steps=40,
    tx=helpers.TX,
    variant=variant,
    fidelity=fidelity,
    integration_steps=0,
  )
  _, history = helpers.run(recipe, model, helpers.make_batch(), 40)
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
  state, _ = helpers.run(recipe, model, batch, 300)
  certificate = certification.certify(model, state.params, batch)
  np.testing.assert_array_equal(certificate.prediction, label)
  assert np.min(certificate.radius) > 0.5


def test_corrected_crmt_refuses_encoders_without_constants():
  with pytest.raises(ValueError, match=r"'a' states no Lipschitz.*published"):
    recipes.crmt(helpers.ordinary_model(), num_steps=1, tx=helpers.TX)


def test_crmt_refuses_a_model_that_mixes_modalities():
  model = models.token_fusion(
    {
      name: encoders.mlp(hidden_sizes=(8,), embedding_dim=8)
      for name in helpers.SHAPES
    },
    num_classes=3,
    input_shapes=helpers.SHAPES,
  )
  with pytest.raises(ValueError, match="sum of per-modality scores"):
    recipes.crmt(model, num_steps=1, tx=helpers.TX, fidelity="published")


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
    recipes.crmt(
      helpers.lipschitz_model(), tx=helpers.TX, **{"num_steps": 1, **arguments}
    )


@pytest.mark.parametrize("rho, integration_steps", [(1.0, 0), (0.0, 5)])
def test_corrected_crmt_refuses_heads_that_are_not_orthonormal(
  rho, integration_steps
):
  message = "integration factors|orthonormal rows"
  for model in (
    helpers.concat_model(),
    helpers.lipschitz_model(orthogonality="rowwise"),
  ):
    with pytest.raises(ValueError, match=message):
      recipes.crmt(
        model,
        num_steps=1,
        tx=helpers.TX,
        rho=rho,
        integration_steps=integration_steps,
      )
    recipes.certified_radius(model, num_steps=1, tx=helpers.TX)


def test_units_of_some_modalities_are_one_elsewhere():
  model = helpers.lipschitz_model()
  batch = helpers.make_batch()
  values = []
  for units in ({"a": 2.0}, {"a": 2.0, "b": 1.0}, None):
    recipe = recipes.crmt(
      model, num_steps=1, tx=helpers.TX, units=units, variant="AT"
    )
    values.append(helpers.evaluate(recipe.phases[0].loss, model, batch)[1])
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
    recipes.crmt(
      helpers.lipschitz_model(), num_steps=1, tx=helpers.TX, **arguments
    )


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
      helpers.lipschitz_model(),
      num_steps=1,
      tx=helpers.TX,
      variant="AT",
      fidelity=fidelity,
      integration_steps=0,
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
  model = helpers.lipschitz_model()
  batch = helpers.make_batch()
  attacked = {**batch, "inputs": jax.tree.map(lambda x: -x, batch["inputs"])}
  both = {**attacked, "clean_inputs": batch["inputs"]}
  values = {}
  for weight in (0.0, 0.25):
    recipe = recipes.crmt(
      model, num_steps=1, tx=helpers.TX, variant="AT", clean_weight=weight
    )
    values[weight] = helpers.evaluate(recipe.phases[0].loss, model, both)[1]
  plain = recipes.crmt(model, num_steps=1, tx=helpers.TX).phases[0].loss
  clean = helpers.evaluate(plain, model, batch)[1]
  np.testing.assert_allclose(
    values[0.25], 0.75 * values[0.0] + 0.25 * clean, rtol=1e-5
  )
  assert abs(clean - values[0.0]) > 1e-3


@pytest.mark.parametrize("fidelity", ["corrected", "published"])
def test_mixed_losses_equal_their_formulas(fidelity):
  model = helpers.lipschitz_model()
  recipe = recipes.crmt(
    model,
    num_steps=1,
    tx=helpers.TX,
    variant="Mix",
    fidelity=fidelity,
    rho=2.0,
    integration_steps=0,
  )
  loss = recipe.phases[0].loss
  mix = 0.3
  batch = helpers.make_batch()
  other = jnp.roll(batch["label"], 1)
  mixed = {**batch, "other_label": other, "mix": jnp.asarray(mix)}
  params, value, _ = helpers.evaluate(loss, model, mixed)
  if fidelity == "corrected":
    first = helpers.evaluate(loss, model, batch)[1]
    second = helpers.evaluate(loss, model, {**batch, "label": other})[1]
    expected = mix * first + (1 - mix) * second
  else:
    outputs, _ = model.apply(params, {}, batch["inputs"], batch["present"])
    expected = _published_mixture(outputs, batch["label"], other, mix)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  # Labels that agree: the loss of one label, whatever the mixture.
  same = {**batch, "other_label": batch["label"], "mix": jnp.asarray(mix)}
  np.testing.assert_allclose(
    helpers.evaluate(loss, model, same)[1],
    helpers.evaluate(loss, model, batch)[1],
    rtol=1e-5,
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
  model = helpers.lipschitz_model(integration_init=0.5)
  recipe = recipes.crmt(
    model, num_steps=1, tx=helpers.TX, fidelity=fidelity, integration_steps=0
  )
  batch = helpers.make_batch()
  _, _, metrics = helpers.evaluate(recipe.phases[0].loss, model, batch)
  assert metrics["orthogonality_defect"] < 1e-4
  for name in helpers.SHAPES:
    np.testing.assert_allclose(metrics[f"mean_factor_{name}"], 0.5, rtol=1e-6)
  params, _ = jax.jit(model.init)(jax.random.key(0))
  proxy = params["fusion"]["proxy"]
  proxy["b"] = proxy["b"].at[1].set(proxy["b"][0])
  _, (_, metrics) = recipe.phases[0].loss(params, {}, batch, key=None)
  assert metrics["orthogonality_defect"] > 0.4
