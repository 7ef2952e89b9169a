"""On linear models every attack has a closed form; it must be reached."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import attacks

DIMS = {"audio": (7,), "image": (3, 4)}
UNITS = {"audio": 0.5, "image": 3.0}
NUM_CLASSES = 4


def _problem(seed=0, num_examples=40, num_classes=NUM_CLASSES):
  """A random linear model with inputs it classifies as their label."""
  rng = np.random.default_rng(seed)
  weights = {
    m: rng.normal(size=(int(np.prod(shape)), num_classes))
    for m, shape in DIMS.items()
  }
  bias = rng.normal(size=num_classes)
  inputs = {
    m: rng.normal(size=(num_examples, *shape)) for m, shape in DIMS.items()
  }

  def logits_fn(inputs):
    parts = [
      jnp.reshape(inputs[m], (inputs[m].shape[0], -1)) @ jnp.asarray(w, "f4")
      for m, w in weights.items()
    ]
    total = sum(parts)
    return total + jnp.broadcast_to(jnp.asarray(bias, "f4"), total.shape)

  flat = {m: x.reshape(num_examples, -1) for m, x in inputs.items()}
  logits = sum(flat[m] @ weights[m] for m in weights) + bias
  inputs = {m: jnp.asarray(x, "f4") for m, x in inputs.items()}
  return weights, logits, logits_fn, inputs, logits.argmax(-1)


def _distance(weights, logits, label, *, norm, scale, joint):
  """Per example, the factor on the budget at which the label loses.

  ``scale`` are the units (joint) or units times relative budgets (separate).
  """
  num_classes = logits.shape[-1]
  best = np.full(len(label), np.inf)
  for row, y in enumerate(label):
    for j in set(range(num_classes)) - {y}:
      normals = {m: w[:, j] - w[:, y] for m, w in weights.items()}
      if norm == "l2":
        parts = [scale[m] * np.linalg.norm(n) for m, n in normals.items()]
        reach = np.linalg.norm(parts) if joint else np.sum(parts)
      else:
        reach = np.sum([scale[m] * abs(n).sum() for m, n in normals.items()])
      margin = logits[row, y] - logits[row, j]
      best[row] = min(best[row], margin / reach)
  return best


def _flipping(attack, logits_fn, inputs, label):
  """``budget -> bool[b]``, compiled once."""

  @jax.jit
  def run(budget):
    adversarial = attack(
      jax.random.key(0), logits_fn, inputs, label, budget=budget
    )
    return jnp.argmax(logits_fn(adversarial), -1) != label

  return run


@pytest.mark.parametrize("units", [None, UNITS])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_joint_ball_flips_exactly_beyond_the_distance(norm, units):
  weights, logits, logits_fn, inputs, label = _problem()
  scale = units or dict.fromkeys(DIMS, 1.0)
  distance = _distance(
    weights, logits, label, norm=norm, scale=scale, joint=True
  )
  attack = attacks.pgd(norm=norm, budget=1.0, num_steps=30, units=units)
  flipped = _flipping(attack, logits_fn, inputs, label)
  for factor, expected in ((1 - 1e-4, 0.0), (1 + 1e-4, 1.0)):
    budget = jnp.asarray(factor * distance, "f4")
    assert flipped(budget).mean() == expected


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_separate_balls_flip_exactly_beyond_the_distance(norm):
  weights, logits, logits_fn, inputs, label = _problem(seed=1)
  share = {"audio": 2.0, "image": 0.3}
  scale = {m: share[m] * UNITS[m] for m in share}
  distance = _distance(
    weights, logits, label, norm=norm, scale=scale, joint=False
  )
  attack = attacks.pgd(norm=norm, budget=1.0, num_steps=30, units=UNITS)
  flipped = _flipping(attack, logits_fn, inputs, label)
  for factor, expected in ((1 - 1e-4, 0.0), (1 + 1e-4, 1.0)):
    budget = {m: jnp.asarray(factor * share[m] * distance, "f4") for m in share}
    assert flipped(budget).mean() == expected


@pytest.mark.parametrize(
  # With a third class the point of largest cross-entropy is another one.
  "loss, num_classes",
  [("cross_entropy", 2), ("dlr", 2), ("dlr", 3)],
)
def test_other_losses_reach_the_distance_too(loss, num_classes):
  weights, logits, logits_fn, inputs, label = _problem(
    seed=2, num_classes=num_classes
  )
  distance = _distance(
    weights,
    logits,
    label,
    norm="l2",
    scale=dict.fromkeys(DIMS, 1.0),
    joint=True,
  )
  attack = attacks.pgd(norm=2, budget=1.0, num_steps=30, loss=loss)
  flipped = _flipping(attack, logits_fn, inputs, label)
  for factor, expected in ((1 - 1e-4, 0.0), (1 + 1e-4, 1.0)):
    budget = jnp.asarray(factor * distance, "f4")
    assert flipped(budget).mean() == expected


def test_half_the_reach_is_noticed():
  """The same test with a weaker attack fails: it can refute."""
  weights, logits, logits_fn, inputs, label = _problem()
  distance = _distance(
    weights,
    logits,
    label,
    norm="l2",
    scale=dict.fromkeys(DIMS, 1.0),
    joint=True,
  )
  attack = attacks.pgd(norm=2, budget=1.0, num_steps=5, step_size=1e-3)
  budget = jnp.asarray((1 + 1e-4) * distance, "f4")
  flipped = _flipping(attack, logits_fn, inputs, label)
  assert flipped(budget).mean() < 0.5


def test_fgm_is_the_closed_form_step():
  weights, _, logits_fn, inputs, label = _problem(num_classes=2)
  grad = {m: (w[:, 1 - label] - w[:, label]).T for m, w in weights.items()}
  total = np.sqrt(
    sum(np.sum((UNITS[m] * g) ** 2, axis=1) for m, g in grad.items())
  )
  for norm in ("l2", "linf"):
    attack = attacks.fgm(norm=norm, budget=0.3, units=UNITS)
    adversarial = jax.jit(lambda k, a=attack: a(k, logits_fn, inputs, label))(
      jax.random.key(0)
    )
    for m, g in grad.items():
      step = UNITS[m] * np.sign(g)
      if norm == "l2":
        step = UNITS[m] ** 2 * g / total[:, None]
      expected = np.reshape(inputs[m], g.shape) + 0.3 * step
      np.testing.assert_allclose(
        np.reshape(adversarial[m], g.shape), expected, atol=2e-6
      )


def _box_optimum(x, normal, eps, low, high):
  """The largest linear gain in a box cut with an l2 ball, by bisection."""
  at = lambda t: np.clip(x + t * normal, low, high) - x  # noqa: E731
  small, large = 0.0, 1e4
  if np.linalg.norm(at(large)) <= eps:
    return at(large) @ normal
  for _ in range(80):
    middle = (small + large) / 2
    if np.linalg.norm(at(middle)) > eps:
      large = middle
    else:
      small = middle
  return at(small) @ normal


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_valid_range_and_ball_together_are_used_up(norm):
  """Many entries start at an end of the range, as dark pixels do."""
  rng = np.random.default_rng(3)
  x = rng.uniform(size=(30, 20)) * (rng.uniform(size=(30, 20)) > 0.5)
  normal = rng.normal(size=20)
  weights = jnp.asarray(np.stack([0 * normal, normal], axis=1), "f4")
  logits_fn = lambda inputs: inputs["x"] @ weights  # noqa: E731
  label = jnp.zeros(30, int)
  eps = {"l2": 1.2, "linf": 0.25}[norm]
  attack = attacks.pgd(
    norm=norm, budget=eps, num_steps=50, valid_range={"x": (0.0, 1.0)}
  )
  inputs = {"x": jnp.asarray(x, "f4")}
  adversarial = jax.jit(lambda key: attack(key, logits_fn, inputs, label))(
    jax.random.key(0)
  )
  gain = (np.asarray(adversarial["x"], "f8") - x) @ normal
  if norm == "linf":
    best = (np.clip(x + eps * np.sign(normal), 0, 1) - x) @ normal
  else:
    best = np.array([_box_optimum(row, normal, eps, 0, 1) for row in x])
  assert np.all(gain <= best * (1 + 1e-5))
  assert np.all(gain >= best * (1 - 0.01))
