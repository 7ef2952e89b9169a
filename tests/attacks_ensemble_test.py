"""The ensemble: under jit, on survivors, member by member."""

import json
import re

import evaluation_models as toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import attacks
from robust_mm.attacks import survivors

KEY = jax.random.key(2)
BUDGET = 0.4
MEMBERS = (
  "pgd",
  "apgd_ce",
  "apgd_dlr",
  "minimum_norm",
  "pgd_margin",
  "square",
)


@pytest.fixture(scope="module")
def problem():
  model = toy.linear_model()
  params, state = model.init(jax.random.key(0))
  batch = toy.make_batch(60)
  logits_fn = attacks.logits_fn(model, params, state, batch["present"])
  radii = toy.exact_radii(params, batch["inputs"])
  wrong = toy.logits(params, batch["inputs"]).argmax(-1) != batch["label"]
  return model, params, batch, logits_fn, np.where(wrong, 0, radii)


@pytest.fixture(scope="module")
def attack():
  return attacks.auto(norm=2, budget=BUDGET)


def _run(attack, problem, **arguments):
  _, _, batch, logits_fn, _ = problem
  return attacks.attack_survivors(
    KEY, attack, logits_fn, batch["inputs"], batch["label"], **arguments
  )


def test_survivors_are_those_beyond_the_budget(problem, attack):
  *_, radii = problem
  found = _run(attack, problem)
  np.testing.assert_array_equal(found.robust, radii > BUDGET)
  assert found.robust_accuracy == np.mean(radii > BUDGET)
  assert np.all((found.broken_by == -2) == (radii == 0))
  assert np.all((found.broken_by == -1) == found.robust)


def test_members_are_reported_and_see_survivors_only(problem, attack):
  found = _run(attack, problem)
  assert tuple(found.members) == tuple(attack.members) == MEMBERS
  left = int(np.sum(found.broken_by != -2))
  for number, count in enumerate(found.members.values()):
    assert count["tried"] == left
    assert count["broken"] == np.sum(found.broken_by == number)
    left -= count["broken"]
  assert left == found.robust.sum()


def test_inputs_are_the_points_that_broke_it(problem, attack):
  _, params, batch, _, _ = problem
  found = _run(attack, problem)
  predicted = toy.logits(params, found.inputs).argmax(-1)
  broken = found.broken_by >= 0
  assert np.all(predicted[broken] != batch["label"][broken])
  for m, x in batch["inputs"].items():
    np.testing.assert_array_equal(found.inputs[m][~broken], x[~broken])
  size = sum(
    np.sum(np.square(found.inputs[m].astype("f8") - x), 1)
    for m, x in batch["inputs"].items()
  )
  assert np.all(np.sqrt(size) <= BUDGET * (1 + 1e-6))
  assert np.all(size[broken] > 0)


def test_a_later_member_breaks_what_the_first_cannot(problem):
  """A wall without slope around the input: only queries cross it."""

  def logits_fn(inputs):
    x = jax.lax.stop_gradient(inputs["x"])
    return jnp.stack([jnp.full(x.shape[0], 3.0), jnp.sum(x, axis=-1)], axis=-1)

  inputs = {"x": np.zeros((16, 32), np.float32)}
  label = np.zeros(16, np.int32)
  attack = attacks.auto(norm="linf", budget=0.15)
  found = attacks.attack_survivors(KEY, attack, logits_fn, inputs, label)
  assert found.robust_accuracy == 0
  assert found.members["square"]["broken"] == 16
  assert [c["tried"] for c in found.members.values()] == [16] * 6


def test_plain_attack_under_jit_agrees(problem, attack):
  _, _, batch, logits_fn, radii = problem
  run = jax.jit(
    lambda k: attacks.survives(
      k, attack, logits_fn, batch["inputs"], batch["label"]
    )
  )
  np.testing.assert_array_equal(run(KEY), radii > BUDGET)


def test_budgets_of_examples_and_modalities(problem, attack):
  _, params, batch, _, radii = problem
  own = np.where(radii > 0, radii, 1.0).astype("f4")
  assert _run(attack, problem, budget=0.999 * own).robust.sum() == np.sum(
    radii > 0
  )
  assert not _run(attack, problem, budget=1.001 * own).robust.any()
  alone = toy.exact_radii(params, batch["inputs"], names=("left",))
  found = _run(attack, problem, budget={"left": BUDGET})
  np.testing.assert_array_equal(found.robust, (alone > BUDGET) & (radii > 0))
  np.testing.assert_array_equal(found.inputs["right"], batch["inputs"]["right"])


def test_presence_follows_the_survivors(problem, attack):
  model, params, batch, _, _ = problem
  present = {
    "left": np.arange(60) % 3 > 0,
    "right": np.ones(60, bool),
  }
  poisoned = {
    **batch["inputs"],
    "left": np.where(present["left"][:, None], batch["inputs"]["left"], np.nan),
  }
  logits_fn = attacks.logits_fn(model, params, {}, present)
  found = attacks.attack_survivors(
    KEY, attack, logits_fn, poisoned, batch["label"], present=present
  )
  clean = {
    **batch["inputs"],
    "left": np.where(present["left"][:, None], batch["inputs"]["left"], 0),
  }
  right = toy.logits(params, clean).argmax(-1) == batch["label"]
  names = ("right",)
  radii = np.where(
    present["left"],
    toy.exact_radii(params, clean),
    toy.exact_radii(params, clean, names=names),
  )
  np.testing.assert_array_equal(found.robust, right & (radii > BUDGET))
  assert np.all(np.isnan(found.inputs["left"][~present["left"]]))


def test_new_budgets_keys_and_parameters_compile_nothing(
  problem, attack, caplog
):
  model, params, batch, _, _ = problem
  _run(attack, problem)
  other = jax.tree.map(lambda x: 1.0 * x, params)
  logits_fn = attacks.logits_fn(model, other, {}, batch["present"])
  with jax.log_compiles():
    attacks.attack_survivors(
      jax.random.key(9),
      attack,
      logits_fn,
      batch["inputs"],
      batch["label"],
      budget=BUDGET + 1e-3,
    )
  compiled = [r for r in caplog.messages if re.match("Compiling.*_attacked", r)]
  assert not compiled


def test_sizes_are_few_and_hold_every_number():
  assert survivors.sizes(360)[:4] == [360, 270, 180, 135]
  for size in (1, 2, 3, 7, 360, 512):
    sizes = survivors.sizes(size)
    assert len(sizes) <= 12
    assert sizes[0] == size
    for number in range(1, size + 1):
      padded = survivors.padded_size(number, size)
      assert number <= padded <= max(2 * number, size // 32 + 1)


def test_any_attack_has_one_member(problem):
  *_, radii = problem
  found = _run(attacks.pgd(norm=2, budget=BUDGET), problem)
  assert list(found.members) == ["pgd"]
  np.testing.assert_array_equal(found.robust, radii > BUDGET)


def test_settings_name_every_member(attack):
  settings = json.loads(json.dumps(attack.settings))
  assert tuple(settings["members"]) == MEMBERS
  assert settings["members"]["apgd_dlr"]["num_targets"] == 9
  twice = attacks.auto(norm=2, budget=1.0, strength=2).settings["members"]
  assert twice["square"]["num_queries"] == (
    2 * settings["members"]["square"]["num_queries"]
  )


def test_a_range_for_each_example_is_refused(problem):
  _, _, batch, _, _ = problem
  ends = {"left": (batch["inputs"]["left"] - 1, 10.0)}
  attack = attacks.auto(norm=2, budget=0.1, valid_range=ends)
  with pytest.raises(ValueError, match="valid_range of 'left' has a row"):
    _run(attack, problem)


@pytest.mark.parametrize(
  "budget, message",
  [
    (-1.0, "budget must be non-negative"),
    ({"up": 1.0}, "budget names the unknown modality 'up'"),
    (np.ones(3), "budget has 3 numbers for 60 examples"),
  ],
)
def test_bad_budgets_are_refused_though_the_device_would_not_see(
  problem, attack, budget, message
):
  with pytest.raises(ValueError, match=message):
    _run(attack, problem, budget=budget)


def test_model_as_a_torch_function():
  torch = pytest.importorskip("torch")

  @jax.jit
  def fn(x):
    return jnp.stack([jnp.sum(x**2, axis=-1), jnp.sum(x, axis=-1)], axis=-1)

  # The lines of the docstring, as they stand there.
  lines = re.search(r"::\n\n(.*?)\n\n", attacks.__doc__, re.DOTALL)[1]
  scope = {"fn": fn, "torch": torch, "jax": jax, "np": np}
  exec(re.sub("(?m)^  ", "", lines), scope)
  x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], requires_grad=True)
  logits = scope["Logits"].apply(x)
  np.testing.assert_allclose(logits.detach(), [[5, 3], [10, 2]])
  logits[:, 0].sum().backward()
  np.testing.assert_allclose(x.grad, 2 * x.detach())
