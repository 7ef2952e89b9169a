"""Gradient ascent on an input, against fixed points in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from robust_mm import models
from robust_mm import visualization
from robust_mm._types import Model
from robust_mm._types import Outputs
from robust_mm.visualization import objectives
from robust_mm.visualization import parameterizations
from robust_mm.visualization import transforms

KEY = jax.random.key(3)
SHAPE = (6, 5, 1)
NUM_CLASSES = 4
WEIGHTS = jax.random.normal(jax.random.key(11), (NUM_CLASSES, *SHAPE))
BIAS = jnp.array([0.5, 0.0, -0.5, 1.0])
L2 = 0.7


def linear(params, inputs):
  logits = jnp.einsum(
    "bhwc,khwc->bk", inputs["image"], params, precision="highest"
  )
  return logits + BIAS[None]


def make(fn=linear, params=WEIGHTS, classes=(0, 2), **options):
  options = {
    "transforms": transforms.identity(),
    "shape": SHAPE,
    "key": KEY,
    "held_out": {},
    "seeds": 2,
    "num_steps": 12,
    **options,
  }
  return visualization.class_visualization(
    fn, params, "image", classes, **options
  )


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


def additive():
  """A sum of scores of two modalities, the image's not linear."""
  heads = {
    "image": WEIGHTS,
    "sound": jax.random.normal(jax.random.key(5), (NUM_CLASSES, 3)),
  }

  def encode(params, state, inputs, present, *, train=False, key=None):
    return {
      name: jnp.where(
        present[name].reshape((-1,) + (1,) * (x.ndim - 1)), x, 0.0
      )
      for name, x in inputs.items()
    }, state

  def fuse(params, embeddings, present):
    scores = {
      "image": jnp.einsum(
        "bhwc,khwc->bk", jnp.tanh(embeddings["image"]), params["image"]
      ),
      "sound": embeddings["sound"] @ params["sound"].T,
    }
    embeddings = {name: x.reshape(len(x), -1) for name, x in embeddings.items()}
    logits = scores["image"] + scores["sound"]
    return Outputs(logits=logits, scores=scores, embeddings=embeddings)

  return Model(
    modalities=("image", "sound"),
    num_classes=NUM_CLASSES,
    init=lambda key: (heads, {}),
    encode=encode,
    fuse=fuse,
    input_shapes={"image": SHAPE, "sound": (3,)},
  ), heads


@pytest.fixture(scope="module")
def late():
  return additive()


ITEMS = jax.random.normal(jax.random.key(6), (4, 3)) * 2


@pytest.mark.parametrize("objective", ["logit", "margin"])
def test_other_modalities_move_a_late_fusion_by_its_margin_alone(
  late, objective
):
  model, params = late
  found = [
    make(model, params, shape=None, others=others, objective=objective).inputs
    for others in ("absent", {"sound": ITEMS[0]}, {"sound": 3 * ITEMS[1]})
  ]
  for other in found[1:]:
    apart = np.abs(found[0] - other).max()
    assert apart <= 1e-6 if objective == "logit" else apart > 1e-4


def test_what_an_absent_modality_holds_reaches_nothing(late):
  model, params = late
  poisoned = {
    "inputs": {"sound": jnp.full((1, 3), jnp.nan)},
    "present": {"sound": np.array([False])},
  }
  clean = make(model, params, shape=None)
  other = make(model, params, shape=None, others=poisoned)
  np.testing.assert_array_equal(clean.inputs, other.inputs)
  np.testing.assert_array_equal(clean.objective, other.objective)
  heard = {**poisoned, "present": {"sound": np.array([True])}}
  third = make(model, params, shape=None, others=heard)
  assert np.all(third.first_bad_step == 0)


def test_a_batch_of_others_is_averaged_over(late):
  model, params = late
  both = make(
    model, params, shape=None, others={"sound": ITEMS[:2]}, num_steps=1
  )
  each = [
    make(model, params, shape=None, others={"sound": item}, num_steps=1)
    for item in ITEMS[:2]
  ]
  np.testing.assert_allclose(
    both.objective, np.mean([e.objective for e in each], 0), rtol=1e-5
  )


def test_joint_synthesis_makes_every_modality_and_says_whose_the_margin_is(
  late,
):
  model, params = late
  found = make(
    model,
    params,
    shape=None,
    others="joint",
    transforms={"image": transforms.image(), "sound": transforms.vector()},
    value_range={"image": (0.0, 1.0), "sound": (-2.0, 2.0)},
    num_steps=60,
  )
  assert found.inputs["image"].shape == (2, 2, *SHAPE)
  assert found.inputs["sound"].shape == (2, 2, 3)
  assert found.objective[..., -1].min() > found.objective[..., 0].max()
  for m, parts in found.margins.items():
    assert parts.shape == (2, 2), m
  scores = np.einsum("csd,kd->csk", found.inputs["sound"], params["sound"])
  rivals = np.where(np.eye(4, dtype=bool)[[0, 2]][:, None], -np.inf, scores)
  mine = np.stack([scores[0, :, 0], scores[1, :, 2]])
  np.testing.assert_allclose(
    found.margins["sound"], mine - rivals.max(-1), rtol=1e-4, atol=1e-5
  )


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


def test_automatic_scale_is_the_mean_margin_and_makes_weights_portable(late):
  model, params = late
  label = jnp.array([0, 1, 2, 3])
  items = {
    "inputs": {"image": 0.2 * WEIGHTS, "sound": ITEMS},
    "present": {"image": np.ones(4, bool), "sound": np.ones(4, bool)},
    "label": label,
  }
  options = {"shape": None, "objective_scale": "auto", "items": items}
  found = make(model, params, **options)
  logits = jnp.einsum("bhwc,khwc->bk", jnp.tanh(0.2 * WEIGHTS), WEIGHTS)
  margin = objectives.objective("margin", logits, label).mean()
  assert found.settings["objective_divisor"] == pytest.approx(
    float(margin), rel=1e-4
  )
  wrong = {**items, "label": jnp.roll(label, 1)}
  lost = make(model, params, **{**options, "items": wrong, "num_steps": 1})
  assert lost.settings["objective_divisor"] == 1
  with pytest.raises(ValueError, match="items"):
    make(model, params, shape=None, objective_scale="auto")
  # Logits twice as large: the logit objective divided by twice as much.
  logit = {**options, "objective": "logit"}
  large = make(model, jax.tree.map(lambda w: 50 * w, params), **logit)
  larger = make(model, jax.tree.map(lambda w: 100 * w, params), **logit)
  np.testing.assert_allclose(large.inputs, larger.inputs, atol=1e-4)


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


TOKENS = {"shape": {"image": SHAPE, "words": (4,)}}


@pytest.mark.parametrize(
  "options, sentence",
  [
    ({"classes": 4}, "classes"),
    ({"classes": -1}, "classes"),
    ({"classes": ()}, "classes"),
    ({"num_steps": 0}, "num_steps"),
    ({"num_transforms": 0}, "num_transforms"),
    ({"seeds": 0}, "seeds"),
    ({"tv_weight": -1.0}, "tv_weight"),
    ({"l2_weight": -1.0}, "l2_weight"),
    ({"learning_rate": 0.0}, "learning_rate"),
    ({"annealing": 2.0}, "annealing"),
    ({"mode": "inplace"}, "mode"),
    ({"objective": "logits"}, "objective"),
    ({"parameterization": "pixel"}, "parameterization"),
    ({"fidelity": "exact"}, "fidelity"),
    ({"others": "gone"}, "others"),
    ({"others": {"sound": ITEMS[0], "smell": ITEMS[0]}}, "others"),
    ({"others": {"sound": ITEMS[:, :2]}}, "others"),
    ({"transforms": transforms.vector()}, "transforms: vector"),
    ({"transforms": {"sound": transforms.vector()}}, "transforms"),
    ({"transforms": "image"}, "transforms"),
    ({"shape": (5, 6, 1)}, "shape"),
    ({"value_range": (1.0, 0.0)}, "value_range"),
    ({"value_range": (0.0, np.inf)}, "value_range"),
    ({"reference": np.zeros(7)}, "reference"),
    ({"objective_scale": 0.0}, "objective_scale"),
    ({"objective_scale": "automatic"}, "objective_scale"),
    ({"parameterization": "fourier", "mode": "in_place"}, "parameterization"),
    ({"parameterization": "fourier", "blur_every": 2}, "blur_every"),
  ],
)
def test_bad_input_is_refused_by_name(late, options, sentence):
  model, params = late
  with pytest.raises(ValueError, match=f"^{sentence}"):
    make(model, params, **{"shape": None, **options})


def test_modalities_that_cannot_be_are_refused_by_name(late):
  model, params = late

  def ask(model, name, **options):
    return visualization.class_visualization(
      model,
      params,
      name,
      0,
      key=KEY,
      transforms=transforms.identity(),
      **options,
    )

  with pytest.raises(ValueError, match="'imag'"):
    ask(model, "imag")
  with pytest.raises(ValueError, match="'sound' holds integer tokens"):
    ask(dataclasses.replace(model, tokens=("sound",)), "sound")
  shapes = {"shape": {"image": SHAPE, "sound": (3,)}}
  with pytest.raises(ValueError, match=r"others .* 'sound'"):
    ask(linear, "image", **shapes)
  with pytest.raises(ValueError, match="shape"):
    ask(linear, "image")
  with pytest.raises(ValueError, match="apply_fn"):
    ask("model", "image")
