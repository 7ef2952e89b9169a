"""Against other people's attacks: stored outcomes, and foolbox live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import attacks

# Another seed moves single items (1 / 360 each).
SLACK = 0.005


def _dense(arrays, name, x):
  bias = arrays[f"params/{name}/bias"]
  return x @ arrays[f"params/{name}/kernel"] + np.broadcast_to(
    bias, (x.shape[0], len(bias))
  )


@pytest.fixture(scope="module")
def mlp(shared_path):
  path = shared_path / "reference" / "attacks" / "digits_mlp.npz"
  with np.load(path, allow_pickle=False) as file:
    arrays = dict(file)

  def logits_fn(inputs):
    x = jax.nn.relu(_dense(arrays, "dense_0", inputs["x"]))
    x = jax.nn.relu(_dense(arrays, "dense_1", x))
    return _dense(arrays, "dense_2", x)

  return arrays, logits_fn, {"x": jnp.asarray(arrays["inputs"])}


@pytest.fixture(scope="module")
def late_fusion(shared_path):
  folder = shared_path / "reference"
  with np.load(folder / "attacks" / "digits_late_fusion.npz") as file:
    outcomes = dict(file)
  with np.load(folder / "certificates" / "digits_plain.npz") as file:
    arrays = dict(file)

  def logits_fn(inputs):
    total = np.broadcast_to(
      arrays["params/head/bias"], (inputs["top"].shape[0], 10)
    )
    for m in ("top", "bottom"):
      x = jax.nn.relu(_dense(arrays, f"{m}/dense_0", inputs[m]))
      x = jax.nn.relu(_dense(arrays, f"{m}/dense_1", x))
      total = total + x @ arrays[f"params/head/{m}/kernel"]
    return total

  inputs = {m: jnp.asarray(arrays[f"inputs/{m}"]) for m in ("top", "bottom")}
  return outcomes, logits_fn, inputs


def _survivors(attack, logits_fn, inputs, label):
  @jax.jit
  def run(key, budget):
    return attacks.survives(
      key, attack, logits_fn, inputs, label, budget=budget
    )

  return lambda budget: np.asarray(run(jax.random.key(0), np.float32(budget)))


def _check(robust, outcomes, suffix, foolbox):
  strongest = outcomes[f"robust/autoattack_{suffix}"]
  assert robust.mean() <= strongest.mean() + SLACK
  assert robust.mean() < outcomes[f"robust/{foolbox}"].mean()
  # Items that the reference broke and this attack did not.
  assert np.sum(robust & ~strongest) <= 2


@pytest.mark.parametrize(
  "norm, budget, foolbox",
  [
    ("l2", 0.3, "foolbox_l2_pgd50_eps0.3"),
    ("linf", 0.1, "foolbox_linf_pgd40_eps0.1"),
  ],
)
def test_as_strong_as_autoattack_on_the_mlp(mlp, norm, budget, foolbox):
  arrays, logits_fn, inputs = mlp
  np.testing.assert_allclose(
    logits_fn(inputs), arrays["logits"], atol=1e-4, rtol=1e-4
  )
  attack = attacks.pgd(norm=norm, budget=budget, valid_range=(0.0, 1.0))
  robust = _survivors(attack, logits_fn, inputs, arrays["labels"])(budget)
  _check(robust, arrays, f"{norm}_eps{budget}", foolbox)


def test_as_strong_as_autoattack_on_late_fusion(late_fusion):
  outcomes, logits_fn, inputs = late_fusion
  attack = attacks.pgd(norm=2, budget=1.0, valid_range=(0.0, 1.0))
  survivors = _survivors(attack, logits_fn, inputs, outcomes["labels"])
  for budget in (0.2, 0.4, 0.6):
    robust = survivors(budget)
    suffix = f"l2_eps{budget}"
    _check(robust, outcomes, suffix, f"foolbox_l2_pgd50_eps{budget}")


def _check_auto(problem, norm, budget):
  outcomes, logits_fn, inputs = problem
  attack = attacks.auto(norm=norm, budget=budget, valid_range=(0.0, 1.0))
  found = attacks.attack_survivors(
    jax.random.key(0), attack, logits_fn, inputs, outcomes["labels"]
  )
  strongest = outcomes[f"robust/autoattack_{norm}_eps{budget}"]
  assert found.robust_accuracy <= strongest.mean() + SLACK
  assert np.sum(found.robust & ~strongest) <= 1
  # Nothing is claimed that the model does not confirm.
  logits = np.asarray(logits_fn(found.inputs))
  lost = np.argmax(logits, -1) != outcomes["labels"]
  np.testing.assert_array_equal(lost, ~found.robust)


def test_auto_misses_at_most_one_item_of_autoattack(mlp, late_fusion):
  _check_auto(mlp, "linf", 0.1)
  _check_auto(late_fusion, "l2", 0.4)


def test_minimum_norm_is_within_two_percent_of_the_best_known(late_fusion):
  outcomes, logits_fn, inputs = late_fusion
  attack = attacks.minimum_norm(norm=2, valid_range=(0.0, 1.0))
  found = jax.jit(
    lambda key: attacks.distances(
      key, attack, logits_fn, inputs, outcomes["labels"]
    )
  )(jax.random.key(0))
  best = outcomes["min_l2/best"]
  np.testing.assert_array_equal(np.asarray(found) == 0, best == 0)
  assert np.mean(found) <= 1.02 * best.mean()
  # A distance far below the best of five attacks would be a wrong one.
  assert np.all(np.asarray(found) >= 0.97 * best)


def test_nothing_flips_inside_the_certified_radius(shared_path, late_fusion):
  _, logits_fn, inputs = late_fusion
  path = shared_path / "reference" / "certificates" / "digits_plain.npz"
  with np.load(path, allow_pickle=False) as file:
    prediction = file["prediction"]
    radius = {k: file[k] for k in ("radius/crown/joint", "upper/joint")}
  attack = attacks.pgd(norm=2, budget=1.0)

  @jax.jit
  def run(key, budget):
    moved = attack(key, logits_fn, inputs, prediction, budget=budget)
    return jnp.argmax(logits_fn(moved), -1) != prediction

  key = jax.random.key(1)
  inside = run(key, jnp.asarray(0.999 * radius["radius/crown/joint"], "f4"))
  assert inside.sum() == 0
  # The nearest known adversarial point, and a little further.
  outside = run(key, jnp.asarray(1.02 * radius["upper/joint"], "f4"))
  assert outside.mean() > 0.97


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm, budget", [("l2", 0.3), ("linf", 0.1)])
def test_at_least_as_strong_as_foolbox_live(mlp, norm, budget):
  foolbox = pytest.importorskip("foolbox")
  arrays, logits_fn, inputs = mlp
  forward = jax.jit(lambda x: logits_fn({"x": x}))
  model = foolbox.JAXModel(forward, bounds=(0, 1))
  kinds = {"l2": foolbox.attacks.L2PGD, "linf": foolbox.attacks.LinfPGD}
  rows = slice(0, 60)
  label = jnp.asarray(arrays["labels"][rows])
  x = inputs["x"][rows]
  _, _, broken = kinds[norm](steps=20)(model, x, label, epsilons=budget)
  attack = attacks.pgd(
    norm=norm, budget=budget, num_steps=20, valid_range=(0.0, 1.0)
  )
  robust = _survivors(attack, logits_fn, {"x": x}, label)(budget)
  assert robust.mean() <= 1 - np.mean(broken)
