"""Auto-PGD, minimum norm and Square: closed forms, and what each promises."""

import attacks_linear_test as linear
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import attacks
from robust_mm.attacks import ascent
from robust_mm.attacks import queries

KEY = jax.random.key(5)
ONE = dict.fromkeys(linear.DIMS, 1.0)


def _flips(attack, problem, distance):
  """Shares flipped a little inside the distance and a little beyond."""
  _, _, logits_fn, inputs, label = problem
  flipped = linear._flipping(attack, logits_fn, inputs, label)
  return [
    float(flipped(jnp.asarray(factor * distance, "f4")).mean())
    for factor in (1 - 1e-4, 1 + 1e-4)
  ]


def test_checkpoints_are_the_published_ones():
  (ends,) = np.nonzero(ascent.windows(100))
  assert (ends + 1).tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
  assert ascent.windows(100)[ends].tolist() == [22, 19, 16, 13, 10, 7, 6, 6]
  for num_steps in (1, 2, 3, 7, 1000):
    windows = ascent.windows(num_steps)
    assert len(windows) == num_steps
    assert windows.sum() < num_steps + 1


@pytest.mark.parametrize(
  "loss, norm, units",
  [
    ("dlr", "l2", linear.UNITS),
    ("dlr", "linf", None),
    ("margin", "linf", linear.UNITS),
  ],
)
def test_apgd_flips_exactly_beyond_the_distance(loss, norm, units):
  problem = linear._problem(seed=3)
  weights, logits, _, _, label = problem
  distance = linear._distance(
    weights, logits, label, norm=norm, scale=units or ONE, joint=True
  )
  attack = attacks.apgd(
    norm=norm,
    budget=1.0,
    loss=loss,
    targets="rivals",
    num_steps=100,
    units=units,
  )
  assert _flips(attack, problem, distance) == [0.0, 1.0]


def test_apgd_on_cross_entropy_reaches_the_only_boundary():
  problem = linear._problem(seed=2, num_classes=2)
  weights, logits, _, _, label = problem
  distance = linear._distance(
    weights, logits, label, norm="l2", scale=ONE, joint=True
  )
  attack = attacks.apgd(norm=2, budget=1.0, num_steps=100)
  assert _flips(attack, problem, distance) == [0.0, 1.0]


def test_apgd_halves_its_step_on_a_ridge():
  """Steps of twice the budget jump over the top; halving climbs it."""
  top = 0.123

  def logits_fn(inputs):
    # Right everywhere but on the ridge.
    height = 0.02 - jnp.abs(inputs["x"][:, 0] - top)
    return jnp.stack([jnp.zeros_like(height), height], axis=-1)

  inputs, label = {"x": jnp.zeros((8, 1))}, jnp.zeros(8, jnp.int32)

  def left(attack):
    run = jax.jit(
      lambda k: attacks.robust_accuracy(k, attack, logits_fn, inputs, label)
    )
    return float(run(KEY))

  common = {"norm": "linf", "budget": 1.0, "loss": "margin"}
  assert left(attacks.apgd(num_steps=100, **common)) == 0
  fixed = attacks.pgd(num_steps=100, num_restarts=1, step_size=2.0, **common)
  assert left(fixed) > 0.7


def test_targeted_dlr_has_the_published_denominator():
  logits = jnp.asarray([[5.0, 1.0, 3.0, -2.0, 0.0]])
  label, target = jnp.asarray([0]), jnp.asarray([2])
  dlr = attacks.losses.dlr
  # -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)
  expected = -(5 - 3) / (5 - (1 + 0) / 2)
  np.testing.assert_allclose(dlr(logits, label, target), [expected], rtol=1e-6)
  np.testing.assert_allclose(dlr(logits, label), [-2 / (5 - 1)], rtol=1e-6)
  any_target = jnp.asarray([attacks.losses.ANY])
  assert dlr(logits, label, any_target) == dlr(logits, label)
  for scale in (0.01, 100.0):
    np.testing.assert_allclose(
      dlr(scale * logits, label, target), [expected], rtol=1e-5
    )
  three = logits[:, :3]
  margin = attacks.losses.margin(three, label, target)
  assert dlr(three, label, target) == margin == -2


def test_dlr_is_blind_to_the_label_where_two_rivals_tie():
  label = jnp.asarray([0])

  def slope(z):
    return jax.grad(lambda z: attacks.losses.dlr(z, label)[0])(z)[0, 0]

  tied, apart = jnp.asarray([[5.0, 1, 1, 0]]), jnp.asarray([[5.0, 1, 0, 0, 0]])
  assert slope(tied) == 0
  np.testing.assert_allclose(slope(apart), -0.04, rtol=1e-5)


@pytest.mark.parametrize("targets", ["rivals", "any"])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_minimum_norm_is_the_distance_of_a_linear_model(norm, joint, targets):
  weights, logits, logits_fn, inputs, label = linear._problem(seed=4)
  share = {"audio": 2.0, "image": 0.3}
  scale = {m: share[m] * linear.UNITS[m] for m in share}
  expected = linear._distance(
    weights,
    logits,
    label,
    norm=norm,
    scale=linear.UNITS if joint else scale,
    joint=joint,
  )
  budget = 1e6 if joint else {m: 1e4 * s for m, s in share.items()}
  attack = attacks.minimum_norm(
    norm=norm, budget=budget, units=linear.UNITS, targets=targets
  )
  run = jax.jit(
    lambda k: attacks.distances(k, attack, logits_fn, inputs, label)
  )
  found = np.asarray(run(KEY), "f8") * (1 if joint else 1e4)
  assert np.all(found >= expected * (1 - 1e-4))
  if targets == "rivals":
    np.testing.assert_allclose(found, expected, rtol=3e-3)
  else:  # the boundary it meets need not be the nearest one
    assert np.mean(found < 1.003 * expected) > 0.7


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_minimum_norm_inside_a_range_is_the_exact_projection(norm):
  rng = np.random.default_rng(0)
  x, weight = rng.uniform(size=(20, 12)), rng.normal(size=12)
  weight[0] = 30.0  # most of the slope, and soon at its end
  x[:, 0] = 0.999
  offset = x @ weight + 2.0

  def logits_fn(inputs):
    gain = inputs["x"] @ jnp.asarray(weight, "f4")
    return jnp.stack([jnp.zeros_like(gain), gain], axis=-1) - jnp.stack(
      [jnp.zeros_like(gain), jnp.asarray(offset, "f4")], axis=-1
    )

  # Bisection on the length along the steepest path, in fp64.
  expected = []
  direction = weight if norm == "l2" else np.sign(weight)
  for row in x:
    low, high = 0.0, 10.0
    for _ in range(60):
      middle = (low + high) / 2
      move = np.clip(row + middle * direction, 0, 1) - row
      low, high = (middle, high) if move @ weight < 2 else (low, middle)
    move = np.clip(row + high * direction, 0, 1) - row
    expected.append(np.linalg.norm(move, 2 if norm == "l2" else np.inf))
  attack = attacks.minimum_norm(norm=norm, valid_range=(0.0, 1.0))
  label = jnp.zeros(20, jnp.int32)
  inputs = {"x": jnp.asarray(x, "f4")}
  found = jax.jit(
    lambda k: attacks.distances(k, attack, logits_fn, inputs, label)
  )(KEY)
  np.testing.assert_allclose(found, expected, rtol=5e-3)
  assert np.all(found >= np.asarray(expected) * (1 - 1e-4))


def test_distances_say_zero_wrong_and_nothing_found():
  def logits_fn(inputs):
    x = inputs["x"][:, 0]
    return jnp.stack([jnp.ones_like(x), jnp.where(x < 5, 0.0, 2.0) + 0 * x], -1)

  inputs = {"x": jnp.asarray([[0.0], [6.0], [jnp.nan]])}
  attack = attacks.minimum_norm(norm=2, budget=1.0)
  found = attacks.distances(
    KEY, attack, logits_fn, inputs, jnp.asarray([0, 0, 0])
  )
  assert found[0] == np.inf
  assert found[1] == 0
  tokens = {"x": jnp.ones((1, 1), jnp.int32)}
  still = attacks.distances(KEY, attack, logits_fn, tokens, jnp.asarray([0]))
  assert still[0] == np.inf


def test_distances_do_not_read_what_is_absent():
  weights, _, logits_fn, inputs, _ = linear._problem(seed=5)
  flag = jnp.arange(40) % 2 > 0
  present = {"audio": flag}

  def masked_fn(inputs):
    audio = jnp.where(flag[:, None], inputs["audio"], 0)
    return logits_fn({**inputs, "audio": audio})

  poisoned = jnp.where(flag[:, None], inputs["audio"], jnp.nan)
  poisoned = {**inputs, "audio": poisoned}
  logits = np.asarray(masked_fn(poisoned), "f8")
  label = logits.argmax(-1)
  expected = linear._distance(
    weights, logits, label, norm="l2", scale=ONE, joint=True
  )
  alone = linear._distance(
    weights, logits, label, norm="l2", scale={**ONE, "audio": 0}, joint=True
  )
  attack = attacks.minimum_norm(norm=2)
  found = jax.jit(
    lambda k: attacks.distances(
      k, attack, masked_fn, poisoned, label, present=present
    )
  )(KEY)
  np.testing.assert_allclose(found, np.where(flag, expected, alone), rtol=3e-3)


def test_minimum_norm_inside_a_ball_flips_what_lies_nearer():
  problem = linear._problem(seed=6)
  weights, logits, logits_fn, inputs, label = problem
  distance = linear._distance(
    weights, logits, label, norm="l2", scale=ONE, joint=True
  )
  budget = float(np.median(distance))
  attack = attacks.minimum_norm(norm=2, budget=budget)
  run = jax.jit(lambda k: attacks.survives(k, attack, logits_fn, inputs, label))
  near = np.abs(distance / budget - 1) > 5e-3
  np.testing.assert_array_equal(
    np.asarray(run(KEY))[near], (distance > budget)[near]
  )


def _opaque(logits_fn, num_classes=linear.NUM_CLASSES):
  """The same numbers from the host: asking for a gradient is an error."""

  def fn(inputs):
    shape = (next(iter(inputs.values())).shape[0], num_classes)
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.pure_callback(jax.jit(logits_fn), result, inputs)

  return fn


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_square_needs_no_gradient(norm, joint):
  weights, logits, logits_fn, inputs, label = linear._problem(seed=7)
  distance = linear._distance(
    weights, logits, label, norm=norm, scale=linear.UNITS, joint=joint
  )
  opaque = _opaque(logits_fn)
  attack = attacks.square(
    norm=norm, budget=1.0, num_queries=600, units=linear.UNITS
  )

  @jax.jit
  def run(budget):
    budget = budget if joint else dict.fromkeys(linear.DIMS, budget)
    return attacks.survives(KEY, attack, opaque, inputs, label, budget=budget)

  assert run(jnp.asarray(0.999 * distance, "f4")).all()
  # Far weaker than a gradient, far better than noise.
  assert run(jnp.asarray(1.5 * distance, "f4")).mean() < 0.1
  pgd = attacks.pgd(norm=norm, budget=1.0, num_steps=1)
  with pytest.raises(ValueError, match="callback"):
    pgd(KEY, opaque, inputs, label)


def test_square_sees_through_a_stopped_gradient():
  _, _, logits_fn, inputs, label = linear._problem(seed=8)

  def masked_fn(inputs):
    return logits_fn(jax.tree.map(jax.lax.stop_gradient, inputs))

  def left(attack):
    run = jax.jit(
      lambda k: attacks.robust_accuracy(k, attack, masked_fn, inputs, label)
    )
    return float(run(KEY))

  common = {"norm": "linf", "budget": 0.4}
  assert left(attacks.square(num_queries=300, **common)) < 0.3
  assert left(attacks.pgd(num_steps=20, num_restarts=1, **common)) > 0.5


def test_blocks_are_squares_of_images_and_stretches_of_sequences():
  image, sequence = jnp.zeros((50, 9, 16, 3)), jnp.zeros((50, 40, 6))
  numbers = jax.random.uniform(KEY, (2, 50))
  squares = np.asarray(queries._block(numbers, image, 0.25))
  assert np.all(squares == squares[..., :1])
  rows, columns = squares[..., 0].any(2).sum(1), squares[..., 0].any(1).sum(1)
  assert np.all(rows == 6)
  assert np.all(columns == 6)
  stretch = np.asarray(queries._block(numbers, sequence, 0.25))[..., 0]
  assert np.all(stretch.sum(1) == 10)
  assert np.all(np.abs(np.diff(stretch.astype(int), axis=1)).sum(1) <= 2)
  assert len({row.tobytes() for row in stretch}) > 10
  four = numbers[:, :4]
  whole = queries._block(four, jnp.zeros((4, 2)), 1.0)
  assert whole.all()
  assert queries._block(four, jnp.zeros(4), 0.5).shape == (4,)


def test_square_spends_its_whole_budget():
  _, _, logits_fn, inputs, label = linear._problem(seed=9)
  attack = attacks.square(norm=2, budget=0.05, num_queries=50)
  moved = jax.jit(lambda k: attack(k, logits_fn, inputs, label))(KEY)
  size = sum(
    np.sum(np.square(np.asarray(moved[m] - inputs[m], "f8")).reshape(40, -1), 1)
    for m in inputs
  )
  np.testing.assert_allclose(np.sqrt(size), 0.05, rtol=1e-4)


@pytest.mark.parametrize(
  "factory, arguments, message",
  [
    ("apgd", {"targets": "all"}, "targets must be one of"),
    ("apgd", {"num_steps": 0}, "num_steps must be an integer of at least 1"),
    ("apgd", {"num_targets": 0}, "num_targets must be an integer"),
    ("apgd", {"loss": "hinge"}, "loss must be one of"),
    ("minimum_norm", {"num_restarts": 0}, "num_restarts must be an integer"),
    ("minimum_norm", {"budget": float("inf")}, "budget must be non-negative"),
    ("square", {"num_queries": 0}, "num_queries must be an integer"),
    ("square", {"share": 1.5}, r"share must lie in \[0, 1\]"),
    ("square", {"share": 0.0}, "share must be positive"),
    ("auto", {"strength": 0}, "strength must be an integer of at least 1"),
    ("auto", {"norm": 1}, "norm must be one of"),
  ],
)
def test_bad_arguments_are_refused_by_name(factory, arguments, message):
  with pytest.raises(ValueError, match=message):
    attacks.make(factory, **{"norm": 2, "budget": 1.0, **arguments})
