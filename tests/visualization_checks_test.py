"""What is asked of visualisations: refused by name, drawn anew, in parts."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import visualization
from robust_mm.visualization import ascent
from robust_mm.visualization import checks
from robust_mm.visualization import door
from robust_mm.visualization import metrics
from robust_mm.visualization import transform as transform_lib
from robust_mm.visualization import transforms
from robust_mm.visualization import views

KEY = jax.random.key(23)
SHAPE = (6, 6, 1)
WEIGHTS = jax.random.normal(jax.random.key(2), (4, *SHAPE))
# Moves so little that only what is drawn differs from step to step.
STILL = {"learning_rate": 1e-12, "step_size": 1e-12, "annealing": 0.0}


def linear(params, inputs):
  return jnp.einsum("bhwc,khwc->bk", inputs["image"], params)


def make(fn=linear, classes=(0, 2), **options):
  options = {
    "transforms": transforms.image(),
    "shape": SHAPE,
    "key": KEY,
    "held_out": {},
    "seeds": 2,
    "num_steps": 3,
    **options,
  }
  return visualization.class_visualization(
    fn, WEIGHTS, "image", classes, **options
  )


def test_every_step_draws_its_own_transformations():
  found = make(**STILL, init_std=1.0, num_steps=6).objective
  for values in np.asarray(found).reshape(-1, 6):
    assert np.abs(np.diff(np.sort(values))).min() > 1e-5
  still = make(
    **STILL, init_std=1.0, num_steps=6, transforms=transforms.identity()
  )
  np.testing.assert_allclose(np.ptp(still.objective, axis=-1), 0, atol=1e-6)


def test_tests_are_drawn_by_keys_that_no_step_had(monkeypatch):
  steps, tests = [], []

  def run(program, view, spaces, label, keys, divisor):
    steps.append(keys)
    return before(program, view, spaces, label, keys, divisor)

  def measured(*given, key, **options):
    tests.append(key)
    return jnp.zeros((4, 2))

  before = ascent.run
  monkeypatch.setattr(ascent, "run", run)
  monkeypatch.setattr(metrics, "transformation_accuracy", measured)
  still = transforms.identity()
  chosen = {"near": transforms.image(), "far": transforms.image()}
  make(classes=range(4), held_out=chosen, num_steps=1, transforms=still)

  def plain(key):
    return tuple(jax.random.key_data(key).ravel().tolist())

  mine = {plain(key) for key in steps[0]}
  assert len(mine) == 8
  # Neither a key of a class and seed, nor what those are folded of.
  assert len({plain(key) for key in tests}) == 2
  for key in tests:
    below = {plain(jax.random.fold_in(key, i)) for i in range(8)}
    assert not mine & (below | {plain(key)})


def test_many_inputs_are_made_in_parts_and_are_the_same(monkeypatch):
  whole = make(classes=range(4), seeds=2)
  parts = []

  def run_part(program, view, spaces, label, keys, divisor):
    parts.append(len(label))
    return before(program, view, spaces, label, keys, divisor)

  before = ascent.run_part
  monkeypatch.setattr(ascent, "run_part", run_part)
  monkeypatch.setattr(ascent, "MOST_INPUTS", 13)  # of four draws, three at once
  found = make(classes=range(4), seeds=2)
  assert parts == [3, 3, 3]
  np.testing.assert_allclose(found.inputs, whole.inputs, atol=1e-6)
  np.testing.assert_allclose(found.objective, whole.objective, atol=1e-4)
  np.testing.assert_array_equal(found.first_bad_step, -1)
  monkeypatch.setattr(ascent, "MOST_NUMBERS", 4 * 36)
  del parts[:]
  make(classes=range(2), seeds=1)
  assert parts == [1, 1]


def test_what_never_changes_is_drawn_once():
  still = make(transforms=transforms.identity(of="image"), num_transforms=8)
  assert still.settings["num_transforms"] == 1
  assert make(num_transforms=8).settings["num_transforms"] == 8


def test_reference_is_what_of_the_range_is_nearest_to_nothing():
  given = {**STILL, "num_steps": 1, "init_std": 1e-6, "l2_weight": 1.0}
  given |= {"tv_weight": 0.0, "value_range": (2.0, 3.0)}
  found = make(**given)
  np.testing.assert_allclose(found.inputs, 2.1, atol=1e-3)
  assert make(**given, reference=2.5).inputs.min() > 2.4


ITEMS = {"inputs": {"image": np.zeros((2, *SHAPE))}, "label": np.array([0, 1])}


@pytest.mark.parametrize(
  "options, sentence",
  [
    ({"value_range": 1.0}, "value_range"),
    ({"value_range": (0, 1, 2)}, "value_range"),
    ({"value_range": {"imgae": (0, 1)}}, "value_range names .*'imgae'"),
    ({"reference": {"imgae": 0.5}}, "reference names .*'imgae'"),
    ({"reference": 5.0}, "reference must lie in the value_range"),
    ({"shape": "ab"}, "shape"),
    ({"shape": (5, 5, 1)}, "shape"),
    (
      {
        "objective_scale": "auto",
        "items": {**ITEMS, "inputs": {"image": np.zeros((2, 5, 5, 1))}},
      },
      "items",
    ),
    (
      {"objective_scale": "auto", "items": {"inputs": ITEMS["inputs"]}},
      "objective_scale='auto' needs items",
    ),
    ({"fn": lambda params, inputs: inputs["image"]}, "apply_fn must give"),
    (
      {"parameterization": "fourier", "transforms": transforms.inertial()},
      "transforms|parameterization",
    ),
  ],
)
def test_bad_input_is_refused_by_name(options, sentence):
  with pytest.raises(ValueError, match=f"^{sentence}"):
    make(**options)


def test_what_annotations_refuse_in_tests_is_refused_without_them():
  given = {
    "key": KEY,
    "held_out": None,
    **dict.fromkeys(("tv_weight", "l2_weight", "annealing")),
    **dict.fromkeys(("learning_rate", "step_size", "init_std"), 1.0),
    **dict.fromkeys(("num_steps", "num_transforms", "every", "seeds"), 1),
    **{"num_held_out": 1, "blur_every": 0, "mode": "expectation"},
    **{"parameterization": "pixels", "fidelity": "corrected"},
  }
  checks.check_numbers(given)
  with pytest.raises(ValueError, match=r"^key must be"):
    checks.check_numbers({**given, "key": 3})
  with pytest.raises(ValueError, match=r"^held_out must map"):
    checks.check_numbers({**given, "held_out": transforms.image()})
  view = views.make(linear, WEIGHTS, "image", shape=SHAPE)
  with pytest.raises(ValueError, match=r"^objective_scale must be a number"):
    checks.divisor(None, None, view, "absent")
  for asked, told in (("3", "'3'"), (1.5, "1.5"), (True, "True")):
    with pytest.raises(ValueError, match=rf"^classes must be .* got {told}"):
      views.classes(view, asked)
  for scale in ("ab", 1.2, (1.0,), (1.0, 1.1, 1.2)):
    with pytest.raises(ValueError, match=r"^scale must be the least"):
      transform_lib.make("image", factors={"scale": scale})


@pytest.mark.parametrize(
  "shape, chosen",
  [
    ((12, 6), transforms.inertial()),
    ((12, 5, 3), transforms.skeleton()),
    ((4, 8, 8), transforms.depth()),
    ((12, 6), transforms.identity(of="inertial")),
  ],
)
def test_frequencies_are_of_images_and_spectrograms_alone(shape, chosen):
  def summed(params, inputs):
    flat = inputs["image"].reshape(len(inputs["image"]), -1)
    return flat[:, :4]

  asked = {"parameterization": "fourier", "shape": shape}
  with pytest.raises(ValueError, match=r"^parameterization"):
    make(summed, **asked, transforms=chosen)
  for fits in (transforms.identity(), transforms.identity(of="log_mel")):
    found = make(summed, **asked, transforms=fits, num_steps=1)
    assert found.inputs.shape == (2, 2, *shape)


MADE = np.zeros((2, 3, *SHAPE), np.float32)
SCORES = {
  "class_probability": {},
  "modality_margins": {},
  "transformation_accuracy": {"transforms": transforms.image(), "key": KEY},
  "naturalness": {"items": ITEMS},
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize(
  "classes, inputs, sentence",
  [
    ([0, 9], MADE, "classes must be whole numbers in 0..3, got 9"),
    ([0], MADE, "classes must name one for each of the 2 rows"),
    ([0, 1], [1.0], "inputs"),
  ],
)
def test_scores_are_of_classes_that_are_there(name, classes, inputs, sentence):
  score = getattr(visualization, name)
  asked = {"modality": "image", **SCORES[name]}
  with pytest.raises(ValueError, match=f"^{sentence}"):
    score(linear, WEIGHTS, inputs, classes, **asked)


def test_naturalness_is_of_axes_and_items_that_say_something():
  asked = linear, WEIGHTS, MADE, [0, 1]
  with pytest.raises(ValueError, match=r"^smooth_axes"):
    visualization.naturalness(*asked, ITEMS, modality="image", smooth_axes=(5,))
  with pytest.raises(ValueError, match=r"^x must have at least 4 pixels"):
    visualization.spectral_slope(jnp.ones((2, 2)))
  # Real items that are all alike are no measure.
  alike = {
    "inputs": {"image": np.zeros((4, *SHAPE), np.float32)},
    "label": np.array([0, 0, 1, 1]),
  }
  found = visualization.naturalness(*asked, alike, modality="image")
  assert np.all(np.isnan(found["feature_distance"]))


@pytest.mark.parametrize(
  "draw, sentence",
  [
    (lambda: visualization.tile([], 2), "pictures"),
    (
      lambda: visualization.tile(
        [np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8)], 2
      ),
      "pictures",
    ),
    (
      lambda: visualization.grid(
        np.zeros((1, 2, 2)), 1, value_range=(0, np.inf)
      ),
      "value_range",
    ),
    (lambda: visualization.grid(np.zeros((1, 2, 2), np.int32), 1), "inputs"),
  ],
)
def test_pictures_that_cannot_be_are_refused_by_name(draw, sentence):
  with pytest.raises(ValueError, match=f"^{sentence}"):
    draw()


def test_several_modalities_at_once_are_tested_at_once():
  def both(params, inputs):
    sound = jnp.pad(inputs["sound"], ((0, 0), (0, 1)))
    return linear(params, inputs) + sound

  found = visualization.class_visualization(
    both,
    WEIGHTS,
    ("image", "sound"),
    [1],
    key=KEY,
    shape={"image": SHAPE, "sound": (3,)},
    transforms={"image": transforms.image(), "sound": transforms.vector()},
    others="joint",
    seeds=1,
    num_steps=1,
    num_held_out=2,
  )
  assert set(found.transforms_accuracy) == {"near", "far"}
  told = found.settings["held_out"]["far"]
  assert told["image"]["rotation"] == 30
  assert told["sound"]["deviation"] == pytest.approx(0.2)


def test_doctests():
  found = doctest.testmod(door)
  assert found.attempted == 5
  assert found.failed == 0
