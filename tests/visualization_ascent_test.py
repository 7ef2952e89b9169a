"""Gradient ascent on an input, against fixed points in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from visualization_models import KEY
from visualization_models import NUM_CLASSES
from visualization_models import SHAPE
from visualization_models import WEIGHTS
from visualization_models import linear
from visualization_models import make

from robust_mm import models
from robust_mm.visualization import objectives
from robust_mm.visualization import parameterizations
from robust_mm.visualization import transforms

L2 = 0.7
FIXED = {
  "objective": "logit",
  "parameterization": "unbounded",
  "tv_weight": 0.0,
  "l2_weight": L2,
  "num_steps": 2000,
  "learning_rate": 0.1,
  "reference": 0.3,
}


def test_linear_model_reaches_its_fixed_point():
  found = make(**FIXED).inputs
  wanted = 0.3 + WEIGHTS[jnp.array([0, 2])] * 30 / (2 * L2)
  for seed in range(2):
    np.testing.assert_allclose(found[:, seed], wanted, rtol=1e-3, atol=1e-3)
  other = 0.3 + WEIGHTS[jnp.array([0, 2])] * 30 / (2 * 1.2 * L2)
  assert np.abs(found[:, 0] - other).max() > 1


def test_expectation_over_shifts_averages_the_shifted_weights():
  offsets = ((-1, 0), (0, 0), (1, 0))
  shifting = transforms.shifts(offsets=offsets, fill=0.0)
  found = make(
    **{**FIXED, "reference": 0.0},
    transforms=shifting,
    num_transforms=6,
    annealing=0.0,
  ).inputs
  padded = jnp.pad(WEIGHTS, ((0, 0), (1, 1), (0, 0), (0, 0)))
  mean = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3
  wanted = mean[jnp.array([0, 2])] * 30 / (2 * L2)
  np.testing.assert_allclose(found[:, 0], wanted, rtol=1e-3, atol=1e-3)
  alone = WEIGHTS[jnp.array([0, 2])] * 30 / (2 * L2)
  assert np.abs(found[:, 0] - alone).max() > 1


DOWN = transforms.shifts(offsets=((1, 0),), fill=0.0)
STILL = {
  "objective": "logit",
  "tv_weight": 0.0,
  "l2_weight": 0.0,
  "learning_rate": 1e-12,
  "step_size": 1e-12,
}


@pytest.mark.parametrize(
  ("annealing", "first_still"), [(None, 9), (0.0, 10), (1.0, 5)]
)
def test_transformations_shrink_to_none_in_the_share_of_annealing(
  annealing, first_still
):
  found = make(**STILL, transforms=DOWN, annealing=annealing, num_steps=10)
  moved = jnp.pad(found.inputs, ((0, 0),) * 2 + ((1, 0), *((0, 0),) * 2))
  for row, label in enumerate((0, 2)):
    still, shifted = (
      linear(WEIGHTS, {"image": x[row]})[:, label, None]
      for x in (found.inputs, moved[:, :, :-1])
    )
    # A shift by a whole pixel is none once its range is half of one.
    wanted = jnp.where(jnp.arange(10) < first_still, shifted, still)
    np.testing.assert_allclose(found.objective[row], wanted, atol=1e-4)
    assert np.abs(still - shifted).min() > 1e-2


def test_in_place_moves_at_the_stated_steps_and_not_in_the_last_block():
  options = {**STILL, "mode": "in_place", "annealing": 0.0, "num_steps": 9}
  start = make(**options).inputs
  found = make(**options, transforms=DOWN, every=3).inputs
  # After steps 3 and 6; after 9 nobody would look at it again.
  np.testing.assert_allclose(found[:, :, 2:], start[:, :, :-2], atol=1e-6)
  assert np.abs(found[:, :, 1:] - start[:, :, :-1]).max() > 1e-3


def test_held_out_tests_are_the_same_for_every_mode_and_control():
  settings = [
    make(
      held_out=None, num_held_out=1, num_steps=1, reference=0.5, **options
    ).settings["held_out"]
    for options in (
      {"transforms": transforms.identity(of="image")},
      {"transforms": transforms.image()},
      {"transforms": transforms.image(), "mode": "in_place"},
    )
  ]
  assert settings[0] == settings[1] == settings[2]
  assert settings[0]["far"]["rotation"] == 30
  # What turns in from outside is the reference, as in synthesis.
  assert {test["fill"] for test in settings[0].values()} == {0.5}


def test_gradient_of_the_margin_is_the_stated_one():
  logits = jax.random.normal(KEY, (3, 5)) * 4
  label = jnp.array([1, 4, 0])

  def total(z):
    return jnp.sum(objectives.objective("margin", z, label))

  mine = jax.nn.one_hot(label, 5)
  rivals = jax.nn.softmax(jnp.where(mine > 0, -jnp.inf, logits))
  np.testing.assert_allclose(jax.grad(total)(logits), mine - rivals, atol=1e-5)
  # log_prob saturates where the margin does not.
  sure = jnp.array([[30.0, 0.0]])
  slopes = [
    jax.grad(
      lambda z, name=name: objectives.objective(name, z, jnp.array([0])).sum()
    )(sure)
    for name in ("log_prob", "margin", "logit")
  ]
  assert np.abs(slopes[0]).max() < 1e-6
  assert np.abs(slopes[1]).max() == 1
  np.testing.assert_array_equal(slopes[2], [[1.0, 0.0]])


def test_one_key_gives_one_picture_and_two_keys_two():
  options = {"transforms": transforms.image(fill=0.0)}
  first, again = make(**options), make(**options)
  np.testing.assert_array_equal(first.inputs, again.inputs)
  other = make(**options, key=jax.random.key(4))
  assert np.abs(first.inputs - other.inputs).max() > 1e-4
  assert np.abs(first.inputs[:, 0] - first.inputs[:, 1]).max() > 1e-4
  # What else is asked for plays no role.
  alone = make(**options, classes=2, seeds=1)
  np.testing.assert_allclose(alone.inputs[0, 0], first.inputs[1, 0], atol=1e-6)


def curved(params, inputs):
  return jnp.einsum("bhwc,khwc->bk", jnp.sin(3 * inputs["image"]), params)


IN_PLACE = {
  "mode": "in_place",
  "every": 3,
  "tv_weight": 0.0,
  "l2_weight": 0.0,
  "num_steps": 20,
}


def test_in_place_with_the_identity_is_plain_gradient_ascent():
  found = make(curved, **IN_PLACE)
  still = transforms.image(rotation=0, scale=(1, 1), jitter=0)
  resampled = make(curved, **IN_PLACE, transforms=still)
  np.testing.assert_array_equal(found.inputs, resampled.inputs)
  never = make(curved, **{**IN_PLACE, "every": 100})
  np.testing.assert_array_equal(found.inputs, never.inputs)
  moved = make(curved, **IN_PLACE, transforms=transforms.image())
  assert np.abs(found.inputs - moved.inputs).max() > 1e-3

  @jax.jit
  def ascend(x):
    def value(x):
      logits = curved(WEIGHTS, {"image": x[None]})
      return objectives.objective("margin", logits, jnp.array([2]))[0]

    def step(x, _):
      slope = jax.grad(value)(x)
      x = x + 0.02 * slope / (jnp.mean(jnp.abs(slope)) + 1e-8)
      return jnp.clip(x, 0, 1), None

    return jax.lax.scan(step, x, length=20)[0]

  short = make(curved, **{**IN_PLACE, "num_steps": 1}, classes=2, seeds=1)
  noise = make(
    curved,
    **{**IN_PLACE, "num_steps": 1},
    step_size=1e-12,
    classes=2,
    seeds=1,
  )
  start = noise.inputs[0, 0]
  plain = ascend(start)
  full = make(curved, **IN_PLACE, classes=2, seeds=1)
  np.testing.assert_allclose(full.inputs[0, 0], plain, atol=1e-6)
  assert np.abs(short.inputs[0, 0] - start).max() > 1e-3


def test_in_place_stays_in_range_and_fills_from_the_border():
  found = make(
    curved,
    **{**IN_PLACE, "num_steps": 40},
    transforms=transforms.image(jitter=3),
    value_range=(-1.0, 2.0),
    step_size=0.2,
  )
  assert found.inputs.min() == -1
  assert found.inputs.max() == 2


@pytest.mark.parametrize("shape", [(28, 28, 1), (27, 29, 1)])
@pytest.mark.parametrize("init_std", [0.01, 0.5])
def test_fourier_begins_with_the_stated_deviation(shape, init_std):
  space = parameterizations.Parameterization(
    name="fourier",
    shape=shape,
    low=np.zeros((1, 1, 1), np.float32),
    high=np.ones((1, 1, 1), np.float32),
    reference=np.full((1, 1, 1), 0.5, np.float32),
    init_std=init_std,
  )
  u = space.init(KEY)
  assert abs(float(jnp.std(space.spatial(u))) / init_std - 1) < 0.05
  assert space.decode(u).shape == shape
  # Unit coefficients have a deviation of 1, by the sum of their powers.
  many = jax.vmap(lambda k: space.spatial(jax.random.normal(k, u.shape)))(
    jax.random.split(KEY, 300)
  )
  assert abs(float(jnp.sqrt(jnp.mean(many**2))) - 1) < 0.05
  # Low frequencies are strong: neighbours are alike.
  apart = np.diff(np.asarray(many), axis=2)
  assert np.sqrt(np.mean(apart**2)) < 1.0 < np.sqrt(2)  # white noise has that


def test_fourier_and_range_of_channels_reach_the_class():
  found = make(
    curved,
    parameterization="fourier",
    num_steps=40,
    value_range=(np.array([-1.0]), np.array([3.0])),
    tv_weight=0.1,
    l2_weight=0.1,
  )
  assert np.all(found.probability[..., -1] > 0.5)
  assert found.inputs.min() >= -1
  assert found.inputs.max() <= 3


def test_blur_is_a_gaussian_with_held_ends_in_the_first_half():
  x = jax.random.uniform(KEY, (9, 7, 2))
  wanted = scipy.ndimage.gaussian_filter(
    x, (1, 1, 0), mode="nearest", truncate=3
  )
  np.testing.assert_allclose(
    parameterizations.blur(x, (0, 1)), wanted, atol=1e-6
  )
  # A start of large noise that no step moves: after two of four, one blur.
  options = {**STILL, "init_std": 1.0, "transforms": transforms.image()}
  start, blurred = (
    make(**options, num_steps=4, blur_every=every).inputs for every in (0, 2)
  )
  for found, x in zip(blurred[:, 0], start[:, 0]):
    np.testing.assert_allclose(
      found, parameterizations.blur(x, (0, 1)), atol=1e-5
    )


def test_a_value_that_is_not_finite_freezes_its_input_alone():
  def breaks(params, inputs):
    logits = linear(params, inputs)
    gone = logits[:, 2:3] > 1.5  # what class 2 climbs to
    return jnp.where(gone, jnp.nan, logits)

  options = {
    "num_steps": 30,
    "learning_rate": 0.05,
    "tv_weight": 0.0,
    "l2_weight": 0.0,
    "classes": (1, 2),
  }
  found = make(breaks, **options)
  whole = make(linear, **options)
  np.testing.assert_array_equal(whole.first_bad_step, -1)
  np.testing.assert_array_equal(found.first_bad_step[0], -1)
  np.testing.assert_allclose(found.inputs[0], whole.inputs[0], atol=1e-6)
  assert np.all(found.first_bad_step[1] > 0)
  step = int(found.first_bad_step[1, 0])
  stopped = make(linear, **{**options, "num_steps": step})
  # At its last finite value: one step before the one that broke.
  values = np.asarray(found.objective[1, 0])
  assert np.all(np.isfinite(values))
  assert np.all(values[step:] == values[step - 1])
  assert np.all(np.isfinite(breaks(WEIGHTS, {"image": found.inputs[1]})))
  assert np.all(np.isnan(breaks(WEIGHTS, {"image": stopped.inputs[1, :1]})))
  # Nobody but the end looks at what the last step made.
  ended = make(breaks, **{**options, "num_steps": step})
  assert ended.first_bad_step[1, 0] == step
  np.testing.assert_allclose(ended.inputs[1, 0], found.inputs[1, 0], atol=1e-6)


def test_published_mode_says_that_it_is_a_reconstruction():
  found = make(fidelity="published", transforms=transforms.image())
  told = found.settings
  assert told["reconstruction"] is True
  assert told["objective"] == "logit"
  assert told["tv_weight"] == told["annealing"] == 0
  assert told["transforms"]["image"]["jitter"] == 0
  assert told["transforms"]["image"]["rotation"] == 15
  assert make().settings["reconstruction"] is False
  for bad in (
    {"objective": "margin"},
    {"tv_weight": 1.0},
    {"annealing": 0.1},
    {"parameterization": "fourier"},
    {"blur_every": 4},
    {"objective_scale": "auto"},
  ):
    with pytest.raises(ValueError, match=next(iter(bad))):
      make(fidelity="published", transforms=transforms.image(), **bad)
  with pytest.raises(ValueError, match="transforms"):
    make(fidelity="published")


def test_a_flax_model_is_synthesised_with_held_out_numbers():
  model = models.late_fusion(
    {"image": models.encoders.mlp(hidden_sizes=(8,), embedding_dim=4)},
    num_classes=NUM_CLASSES,
    input_shapes={"image": SHAPE},
  )
  params, state = model.init(KEY)
  found = make(
    model,
    params,
    state=state,
    transforms=transforms.identity(of="image"),
    held_out=None,
    num_held_out=8,
    blur_every=4,
  )
  assert set(found.transforms_accuracy) == {"near", "far"}
  for value in found.transforms_accuracy.values():
    assert value.shape == (2, 2)
    assert np.all((value >= 0) & (value <= 1))
  assert found.inputs.shape == (2, 2, *SHAPE)
  again = make(model, params, state=state, blur_every=0)
  assert np.abs(found.inputs - again.inputs).max() > 1e-4
