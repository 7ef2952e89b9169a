"""Losses against closed forms, limits and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_mm import losses
from robust_mm import margins


def _sample(seed, batch=7, classes=5, names=("a", "b"), scale=1.0):
  rng = np.random.default_rng(seed)
  scores = {
    m: jnp.asarray(scale * rng.normal(size=(batch, classes)), jnp.float32)
    for m in names
  }
  label = rng.integers(0, classes, batch)
  present = {m: jnp.ones(batch, bool) for m in names}
  return scores, label, present


def _sensitivity(seed, label, batch=7, classes=5, names=("a", "b")):
  rng = np.random.default_rng(seed)
  chosen = np.asarray(margins.one_hot(label, classes))
  return {
    m: jnp.asarray(
      np.where(chosen, 0, rng.uniform(0.5, 2, (batch, classes))), jnp.float32
    )
    for m in names
  }


def test_cross_entropy_equals_optax_and_its_soft_form():
  scores, label, _ = _sample(0)
  found = losses.cross_entropy(scores["a"], label)
  expected = optax.softmax_cross_entropy_with_integer_labels(
    scores["a"], jnp.asarray(label)
  )
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  soft = losses.soft_cross_entropy(scores["a"], jax.nn.one_hot(label, 5))
  np.testing.assert_allclose(soft, expected, rtol=1e-5)


def test_offset_cross_entropy_is_cross_entropy_of_shifted_logits():
  scores, label, _ = _sample(1)
  found = losses.offset_cross_entropy(
    scores["a"], label, offset=1.4, temperature=0.25
  )
  shifted = scores["a"] - 1.4 * jax.nn.one_hot(label, 5)
  expected = 0.25 * jnp.mean(losses.cross_entropy(shifted / 0.25, label))
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_unimodal_margin_lies_in_its_sandwich():
  scores, label, present = _sample(2, scale=3.0)
  for row in range(7):
    one = {m: s[row : row + 1] for m, s in scores.items()}
    here = {m: p[:1] for m, p in present.items()}
    value = losses.unimodal_margin(one, label[row : row + 1], here, floor=None)
    worst = min(
      float(margins.smallest(margins.pairwise(s, label[row : row + 1]))[0])
      for s in one.values()
    )
    assert -worst - 1e-5 <= value <= -worst + np.log(2 * 4) + 1e-5


def test_unimodal_margin_is_a_plain_logsumexp():
  scores, label, present = _sample(3)
  expected = []
  for row in range(7):
    terms = [
      np.exp(np.float64(s[row, j]) - np.float64(s[row, label[row]]))
      for s in scores.values()
      for j in range(5)
      if j != label[row]
    ]
    expected.append(np.log(sum(terms) + 1e-5))
  found = losses.unimodal_margin(scores, label, present)
  np.testing.assert_allclose(found, np.mean(expected), rtol=1e-5)


@pytest.mark.parametrize("floor", [1e-5, None])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_unimodal_margin_is_finite_for_huge_margins(size, floor):
  scores = {"a": jnp.asarray([[size, 0.0, 0.0]])}
  value, grad = jax.value_and_grad(
    lambda s: losses.unimodal_margin(
      s, np.array([0]), {"a": jnp.ones(1, bool)}, floor=floor
    )
  )(scores)
  assert jnp.isfinite(value)
  assert jnp.all(jnp.isfinite(grad["a"]))


def _two_margins(first, second, classes=31, floor=None):
  """Gradients wrt the score of the label of two modalities."""

  def loss(own):
    scores = {
      m: jnp.zeros((1, classes)).at[0, 0].set(own[i])
      for i, m in enumerate("ab")
    }
    present = {m: jnp.ones(1, bool) for m in "ab"}
    return losses.unimodal_margin(scores, np.array([0]), present, floor=floor)

  return jax.grad(loss)(jnp.asarray([first, second], jnp.float32))


def test_gradient_goes_to_the_smaller_margin():
  np.testing.assert_allclose(_two_margins(3.0, 3.0), [-0.5, -0.5], atol=1e-5)
  small, large = np.asarray(_two_margins(2.0, 8.0))
  assert small / (small + large) > 0.99


@pytest.mark.parametrize(
  "margin, expected", [(12, -0.487), (14, -0.417), (16, -0.202), (18, -0.042)]
)
def test_published_floor_fades_but_never_cancels(margin, expected):
  grad = _two_margins(float(margin), float(margin), floor=1e-5)
  np.testing.assert_allclose(grad, [expected] * 2, atol=1e-3)


def test_ratio_of_exponentials_loses_the_gradient_that_ours_keeps():
  def ratio_form(own):
    scores = jnp.zeros(31).at[0].set(own)
    return jnp.log(
      2 * (jnp.sum(jnp.exp(scores)) - jnp.exp(own)) / jnp.exp(own) + 1e-5
    )

  assert jax.grad(ratio_form)(jnp.float32(18.0)) == 0
  assert jnp.all(_two_margins(18.0, 18.0, floor=1e-5) < -0.04)


def test_floor_equals_the_published_formula_for_moderate_margins():
  scores, label, present = _sample(4, scale=1.5)
  plain = losses.unimodal_margin(
    {"a": scores["a"][:1]}, label[:1], {"a": present["a"][:1]}, floor=None
  )
  floored = losses.unimodal_margin(
    {"a": scores["a"][:1]}, label[:1], {"a": present["a"][:1]}
  )
  np.testing.assert_allclose(
    floored, np.log(np.exp(np.float64(plain)) + 1e-5), rtol=1e-6
  )


_LOSSES = {
  "margin": lambda s, y, p: losses.unimodal_margin(s, y, p),
  "unfloored": lambda s, y, p: losses.unimodal_margin(s, y, p, floor=None),
  "mixup": lambda s, y, p: losses.mixup_margin(s, y, (y + 1) % 5, 0.3, p),
  "radius": lambda s, y, p: losses.unimodal_radius(
    s, y, p, {"a": 1.0, "b": 2.0}, r0=0.3, temperature=0.05
  ),
}


@pytest.mark.parametrize("name", _LOSSES)
def test_absent_modality_equals_the_model_without_it(name):
  loss = _LOSSES[name]
  scores, label, present = _sample(5)
  poisoned = {**scores, "b": jnp.full_like(scores["b"], jnp.nan)}
  gone = {**present, "b": jnp.zeros(7, bool)}
  value, grad = jax.value_and_grad(loss)(poisoned, label, gone)
  without, grad_without = jax.value_and_grad(loss)(
    {"a": scores["a"]}, label, {"a": present["a"]}
  )
  np.testing.assert_allclose(value, without, rtol=1e-6)
  np.testing.assert_allclose(grad["a"], grad_without["a"], atol=1e-6)
  assert jnp.all(grad["b"] == 0)


@pytest.mark.parametrize("name", _LOSSES)
def test_examples_with_nothing_present_are_not_counted(name):
  loss = _LOSSES[name]
  scores, label, present = _sample(6)
  some = {m: p.at[3:].set(False) for m, p in present.items()}
  first = jax.tree.map(lambda x: x[:3], (scores, jnp.asarray(label), present))
  np.testing.assert_allclose(loss(scores, label, some), loss(*first), rtol=1e-6)
  nothing = {m: jnp.zeros(7, bool) for m in present}
  value, grad = jax.value_and_grad(loss)(scores, label, nothing)
  assert value == 0
  assert all(jnp.all(g == 0) for g in grad.values())


@pytest.mark.parametrize("name", _LOSSES)
def test_modality_order_does_not_matter(name):
  scores, label, present = _sample(7)
  swapped = dict(reversed(scores.items()))
  assert _LOSSES[name](scores, label, present) == _LOSSES[name](
    swapped, label, present
  )


def test_mixup_margin_with_equal_labels_is_the_unimodal_margin():
  scores, label, present = _sample(8)
  for mix in (1.0, 0.4):
    np.testing.assert_allclose(
      losses.mixup_margin(scores, label, label, mix, present),
      losses.unimodal_margin(scores, label, present),
      rtol=1e-5,
    )


def test_mixup_margin_equals_the_formula():
  scores, label, present = _sample(9)
  other, mix = (label + 2) % 5, np.linspace(0.1, 0.9, 7)
  expected = []
  for row in range(7):
    y, z = label[row], other[row]
    total = sum(
      sum(np.exp(np.float64(s[row, j])) for j in range(5) if j not in (y, z))
      / np.exp(mix[row] * s[row, y] + (1 - mix[row]) * s[row, z])
      for s in scores.values()
    )
    expected.append(np.log(total))
  found = losses.mixup_margin(
    scores, label, other, jnp.asarray(mix), present, floor=None
  )
  np.testing.assert_allclose(found, np.mean(expected), rtol=1e-5)


@pytest.mark.parametrize("floor", [1e-5, None])
def test_mixup_margin_of_two_different_classes_of_two_is_zero(floor):
  scores, _, present = _sample(10, classes=2)
  label = np.zeros(7, int)
  value, grad = jax.value_and_grad(
    lambda s: losses.mixup_margin(
      s, label, 1 - label, 0.5, present, floor=floor
    )
  )(scores)
  assert value == 0
  assert all(jnp.all(g == 0) for g in grad.values())


def test_unimodal_radius_equals_the_formula():
  scores, label, present = _sample(11)
  constants = {"a": 1.0, "b": 3.0}
  expected = []
  for row in range(7):
    total = 1.0
    for m, s in scores.items():
      for j in range(5):
        if j != label[row]:
          gap = float(s[row, label[row]]) - float(s[row, j])
          rho = gap / (constants[m] * np.sqrt(2))
          total += np.exp((0.3 - rho) / 0.1)
    expected.append(0.1 * np.log(total))
  found = losses.unimodal_radius(
    scores, label, present, constants, r0=0.3, temperature=0.1
  )
  np.testing.assert_allclose(found, np.mean(expected), rtol=1e-5)


def test_certified_radius_gradient_equals_finite_differences():
  with jax.enable_x64(True):
    rng = np.random.default_rng(12)
    logits = jnp.asarray(rng.normal(size=(3, 4)))
    label = np.argmax(np.asarray(logits), -1)
    spread = {m: jnp.asarray(rng.uniform(0.5, 2, (3, 4))) for m in ("a", "b")}

    def loss(logits, spread):
      return losses.certified_radius(
        logits, spread, label, r0=0.5, temperature=0.1
      )

    grads = jax.grad(loss, (0, 1))(logits, spread)
    step = 1e-6
    for index in np.ndindex(3, 4):
      up = loss(logits.at[index].add(step), spread)
      down = loss(logits.at[index].add(-step), spread)
      numeric = (up - down) / (2 * step)
      np.testing.assert_allclose(grads[0][index], numeric, rtol=1e-3, atol=1e-8)
      up = loss(logits, {**spread, "a": spread["a"].at[index].add(step)})
      down = loss(logits, {**spread, "a": spread["a"].at[index].add(-step)})
      numeric = (up - down) / (2 * step)
      np.testing.assert_allclose(
        grads[1]["a"][index], numeric, rtol=1e-3, atol=1e-8
      )


def test_certified_radius_tends_to_the_hinge():
  scores, label, _ = _sample(13)
  spread = _sensitivity(13, label)
  hinge = losses.hinge_radius(scores["a"], spread, label, r0=0.4)
  smooth = losses.certified_radius(
    scores["a"], spread, label, r0=0.4, temperature=1e-4
  )
  np.testing.assert_allclose(smooth, hinge, atol=1e-3)
  assert hinge > 0


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_certified_radius_is_finite_for_huge_margins(size):
  logits = jnp.asarray([[size, 0.0, 0.0]])
  spread = {"a": jnp.asarray([[0.0, 1.0, 1.0]])}
  value, grad = jax.value_and_grad(losses.certified_radius)(
    logits, spread, np.array([0]), r0=0.3, temperature=0.05
  )
  assert jnp.isfinite(value)
  assert jnp.all(jnp.isfinite(grad))


def test_certified_radius_is_free_of_the_scale_on_correct_examples():
  scores, _, _ = _sample(14)
  logits = scores["a"]
  label = np.argmax(np.asarray(logits), -1)
  spread = _sensitivity(14, label)

  def loss(scale):
    return losses.certified_radius(
      scale * logits,
      {m: scale * s for m, s in spread.items()},
      label,
      r0=0.5,
      temperature=0.1,
    )

  value, slope = jax.value_and_grad(loss)(jnp.float32(1.0))
  assert value > 0.01
  assert abs(slope) < 1e-6


def test_a_wrong_example_gains_nothing_by_a_larger_denominator():
  logits = jnp.asarray([[0.0, 1.0, 0.5]])
  spread = {"a": jnp.asarray([[0.0, 1.0, 1.0]])}
  grad = jax.grad(
    lambda s: losses.certified_radius(
      logits, s, np.array([0]), r0=0.3, temperature=0.05
    )
  )(spread)
  assert jnp.all(grad["a"] == 0)


def test_budget_form_asks_for_the_factor_one():
  scores, label, _ = _sample(15)
  spread = _sensitivity(15, label)
  budgets = {"a": 0.2, "b": 0.1}
  found = losses.hinge_radius(
    scores["a"], spread, label, r0=1.0, budgets=budgets
  )
  ratios = margins.budget_ratios(
    margins.pairwise(scores["a"], label), spread, budgets
  )
  expected = jnp.mean(jnp.maximum(1 - jnp.min(ratios, axis=-1), 0))
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
  "call, name",
  [
    (dict(r0=-0.1, temperature=0.1), "r0"),
    (dict(r0=0.1, temperature=0.0), "temperature"),
  ],
)
def test_bad_numbers_are_refused_by_name(call, name):
  scores, label, present = _sample(16)
  with pytest.raises(ValueError, match=name):
    losses.certified_radius(scores["a"], _sensitivity(0, label), label, **call)
  with pytest.raises(ValueError, match=name):
    losses.unimodal_radius(scores, label, present, {"a": 1.0, "b": 1.0}, **call)


def test_missing_constants_floor_and_labels_are_refused_by_name():
  scores, label, present = _sample(17)
  with pytest.raises(ValueError, match="lipschitz"):
    losses.unimodal_radius(
      scores, label, present, {"a": 1.0, "b": None}, r0=0.3, temperature=0.1
    )
  with pytest.raises(ValueError, match="floor"):
    losses.unimodal_margin(scores, label, present, floor=0.0)
  with pytest.raises(ValueError, match="other_label"):
    losses.mixup_margin(scores, label, label + 9, 0.5, present)
  with pytest.raises(ValueError, match="label"):
    losses.unimodal_margin(scores, jax.nn.one_hot(label, 5), present)


def test_losses_work_under_jit_and_vmap():
  scores, label, present = _sample(18)
  stacked = jax.tree.map(lambda x: jnp.stack([x, x]), (scores, present))
  labels = jnp.stack([jnp.asarray(label)] * 2)
  found = jax.jit(jax.vmap(losses.unimodal_margin))(
    stacked[0], labels, stacked[1]
  )
  expected = losses.unimodal_margin(scores, label, present)
  np.testing.assert_allclose(found, [expected] * 2, rtol=1e-6)
