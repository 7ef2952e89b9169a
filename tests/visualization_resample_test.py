"""One resampling, and the transformations that are made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from robust_mm.visualization import resample
from robust_mm.visualization import transforms

KEY = jax.random.key(7)
EVERY = {
  "depth": (transforms.depth(), (4, 8, 9, 1)),
  "identity": (transforms.identity(), (5,)),
  "image": (transforms.image(), (10, 9, 2)),
  "inertial": (transforms.inertial(), (24, 6)),
  "log_mel": (transforms.log_mel(), (16, 10)),
  "lucid": (transforms.lucid(), (30, 31, 1)),
  "shifts": (transforms.shifts(offsets=((0, 1), (2, 0))), (6, 7, 1)),
  "skeleton": (transforms.skeleton(), (12, 60)),
  "vector": (transforms.vector(), (11,)),
}


@pytest.fixture(scope="module")
def turned():
  """Compiled once: angle, scale and shift of an image, edges held."""
  return jax.jit(
    lambda x, angle, scale, shift: resample(
      x, angle=angle, scale=scale, shift=shift
    )
  )


def smooth(size, sigma=6.0):
  place = np.arange(size) - (size - 1) / 2
  rows, columns = np.meshgrid(place - 3.0, place + 2.0, indexing="ij")
  return jnp.asarray(
    np.exp(-(rows**2 + columns**2) / (2 * sigma**2))[..., None], jnp.float32
  )


@pytest.mark.parametrize("shape", [(28, 28, 1), (27, 29, 3), (1, 5, 1)])
@pytest.mark.parametrize("fill", [None, 0.5])
def test_identity_is_the_identity_bit_by_bit(shape, fill):
  x = jax.random.normal(KEY, shape)
  same = jax.jit(lambda x, angle: resample(x, angle=angle, fill=fill))(x, 0.0)
  np.testing.assert_array_equal(same, x)


def test_quarter_turn_is_rot90_and_whole_shifts_are_exact(turned):
  x = jax.random.normal(KEY, (28, 28, 1))
  quarter = turned(x, jnp.pi / 2, 1.0, jnp.zeros(2))
  np.testing.assert_allclose(quarter, jnp.rot90(x, 1), atol=1e-4)
  assert np.abs(quarter - jnp.rot90(x, -1)).max() > 1  # the sign matters
  moved = resample(x, shift=jnp.array([2.0, -3.0]), fill=-1.0)
  np.testing.assert_array_equal(moved[2:, :-3], x[:-2, 3:])
  assert np.all(moved[:2] == -1)
  assert np.all(moved[:, -3:] == -1)


def test_turning_back_gives_a_smooth_image_back(turned):
  x = smooth(64)
  there = turned(x, 0.4, 1.0, jnp.zeros(2))
  back = turned(there, -0.4, 1.0, jnp.zeros(2))
  inside = np.s_[12:-12, 12:-12]
  np.testing.assert_allclose(back[inside], x[inside], atol=2e-2)
  assert np.abs(there[inside] - x[inside]).max() > 0.1


def test_gradient_is_the_adjoint_and_the_map_is_linear():
  where = {"angle": 0.3, "scale": jnp.array([1.2, 0.9]), "shift": 0.7}

  def move(x):
    return resample(x, **where, fill=0.0)

  g, v, other = jax.random.normal(KEY, (3, 20, 21, 1))
  moved, pull = jax.vjp(move, v)
  np.testing.assert_allclose(
    jnp.vdot(g, moved), jnp.vdot(pull(g)[0], v), rtol=1e-5
  )
  np.testing.assert_allclose(
    move(2 * v - 3 * other), 2 * moved - 3 * move(other), atol=1e-5
  )
  # The transpose is not the opposite rotation.
  turned_back = resample(g, angle=-0.3, scale=1 / where["scale"], shift=-0.7)
  assert abs(jnp.vdot(turned_back, v) / jnp.vdot(g, moved) - 1) > 1e-3


def test_gradients_of_angle_and_scale_are_central_differences(turned):
  x, step = smooth(48), 5e-3
  weights = jax.random.normal(KEY, x.shape)
  weights = resample(weights, angle=0.5, scale=4.0)  # smooth as well

  def total(angle, scale):
    return jnp.sum(weights * turned(x, angle, scale, jnp.zeros(2)))

  for argument in (0, 1):
    at = [0.21, 1.07]
    slope = jax.grad(total, argnums=argument)(*at)
    values = []
    for sign in (1, -1):
      moved = list(at)
      moved[argument] += sign * step
      values.append(total(*moved))
    difference = (values[0] - values[1]) / (2 * step)
    larger = max(abs(slope), abs(difference))
    assert abs(slope - difference) < 2e-2 * larger


def test_one_resampling_blurs_once_and_two_blur_twice(turned):
  noise = jax.random.normal(KEY, (256, 256, 1))
  inside = np.s_[60:-60, 60:-60]
  angles = 0.3, 0.31
  once = turned(noise, sum(angles), 1.0, jnp.zeros(2))
  twice = turned(
    turned(noise, angles[0], 1.0, jnp.zeros(2)), angles[1], 1.0, jnp.zeros(2)
  )
  first, second = (float(jnp.var(x[inside])) for x in (once, twice))
  whole = float(jnp.var(noise[inside]))
  assert abs(first / whole - 4 / 9) < 0.02
  assert abs(second / whole - 0.247) < 0.02
  assert not abs(second / whole - 4 / 9) < 0.02


def drawn(transform, number=10_000):
  keys = jax.random.split(KEY, number)
  return jax.tree.map(np.asarray, jax.vmap(transform.sample)(keys))


def test_draws_follow_the_stated_laws_and_no_wider_ones():
  draws = drawn(transforms.image(rotation=20, scale=(0.8, 1.3), jitter=2))
  low, high = np.log([0.8, 1.3])
  middle, half = (low + high) / 2, (high - low) / 2
  for values, size in (
    (np.degrees(draws["angle"]), 20),
    (np.log(draws["scale"]) - middle, half),
    (draws["shift"][:, 0], 2),
    (draws["shift"][:, 1], 2),
  ):
    for factor, fits in ((1.0, True), (1.2, False)):
      law = scipy.stats.uniform(-factor * size, 2 * factor * size)
      p = scipy.stats.kstest(values, law.cdf).pvalue
      assert p > 1e-3 if fits else p < 1e-6


def test_lucid_draws_its_published_table():
  draws = drawn(transforms.lucid())
  degrees = np.rint(np.degrees(draws["angle"])).astype(int)
  np.testing.assert_allclose(np.degrees(draws["angle"]), degrees, atol=1e-4)
  counts = np.bincount(degrees + 10, minlength=21)
  expected = np.full(21, 10_000 / 26)
  expected[10] *= 6  # zero and five more zeros
  assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3
  even = np.full(21, 10_000 / 21)
  assert scipy.stats.chisquare(counts, even).pvalue < 1e-6
  assert set(np.rint(draws["scale"] * 100)) == set(range(90, 111, 2))
  assert set(draws["roll"].ravel()) == set(range(-4, 5))
  assert set(draws["shift"].ravel()) == set(range(-2, 3))


@pytest.mark.parametrize("name", EVERY)
def test_every_transformation_keeps_shape_and_is_nothing_at_strength_zero(
  name,
):
  transform, shape = EVERY[name]
  x = jax.random.normal(KEY, shape)
  transform.check(shape)
  apply = jax.jit(lambda key, x, strength: transform(key, x, strength=strength))
  whole, none = apply(KEY, x, 1.0), apply(KEY, x, 0.0)
  assert whole.shape == shape
  np.testing.assert_allclose(none, x, atol=1e-6)
  if name != "identity":
    assert np.abs(whole - x).max() > 1e-3
  assert np.array_equal(whole, apply(KEY, x, 1.0))
  assert transform == EVERY[name][0].replace()
  assert hash(transform) == hash(transform.replace())


@pytest.mark.parametrize("name", [n for n in EVERY if n != "identity"])
def test_draws_of_a_step_are_all_distinct(name):
  transform, shape = EVERY[name]
  if name == "shifts":
    transform = transforms.shifts(offsets=[(i, -i) for i in range(8)])
  draws = transform.draws(KEY, 8, shape)
  rows = np.concatenate(
    [np.reshape(d, (8, -1)).astype(float) for d in jax.tree.leaves(draws)], 1
  )
  assert len(np.unique(rows, axis=0)) == 8
  other = transform.draws(jax.random.key(8), 8, shape)
  assert any(
    not np.array_equal(a, b)
    for a, b in zip(jax.tree.leaves(draws), jax.tree.leaves(other))
  )


def test_triads_of_a_sensor_turn_together():
  transform = transforms.inertial(
    amplitude=(1, 1), time_shift=0, stretch=(1, 1), rotation=90
  )
  x = jax.random.normal(KEY, (5, 6))
  y = transform(KEY, x)
  # Lengths and angles between the two triads are kept.
  for a, b in ((0, 0), (0, 3), (3, 3)):
    np.testing.assert_allclose(
      jnp.einsum("ti,ti->t", y[:, a : a + 3], y[:, b : b + 3]),
      jnp.einsum("ti,ti->t", x[:, a : a + 3], x[:, b : b + 3]),
      atol=1e-5,
    )


def test_skeleton_turns_about_the_vertical_of_its_own_centre():
  transform = transforms.skeleton(scale=(1, 1), time_shift=0, stretch=(1, 1))
  x = jax.random.normal(KEY, (4, 20, 3))
  y = transform(KEY, x)
  np.testing.assert_allclose(y[..., 1], x[..., 1], atol=1e-5)
  np.testing.assert_allclose(y.mean((0, 1)), x.mean((0, 1)), atol=1e-5)
  far = transform(KEY, x + 10.0)
  np.testing.assert_allclose(far, y + 10.0, atol=1e-4)
  flat = transform(KEY, x.reshape(4, 60))
  np.testing.assert_allclose(flat.reshape(4, 20, 3), y, atol=1e-6)


def test_time_moves_by_whole_frames_exactly():
  x = jnp.arange(10.0)[:, None] * jnp.ones((1, 3))
  transform = transforms.inertial()
  draw = {
    "rotation": jnp.zeros(3),
    "amplitude": jnp.ones(()),
    "time_shift": jnp.asarray(2.0),
    "stretch": jnp.ones(()),
  }
  y = transform.apply(x, draw)
  np.testing.assert_allclose(y[2:], x[:-2], atol=1e-5)
  np.testing.assert_array_equal(y[:2], x[:1].repeat(2, 0))


@pytest.mark.parametrize(
  "make, sentence",
  [
    (lambda: transforms.image(rotation=-1), "rotation"),
    (lambda: transforms.image(scale=(0.0, 1.0)), "scale"),
    (lambda: transforms.image(scale=(1.2, 1.0)), "scale"),
    (lambda: transforms.image(scale=(0.1, 1.0)), "scale must be at least 0.5"),
    (lambda: transforms.depth(scale=(0.4, 1.0)), "scale must be at least 0.5"),
    (lambda: transforms.identity(of="picture"), "of must be one of"),
    (lambda: resample(jnp.ones((4, 4)), scale=0.0), "scale"),
    (lambda: transforms.depth(rotation=20), "rotation"),
    (lambda: transforms.shifts(offsets=()), "offsets"),
    (lambda: transforms.vector(std=(1.0, -1.0)), "std"),
    (lambda: transforms.skeleton(vertical=3), "vertical"),
    (lambda: transforms.image(fill=float("nan")), "fill"),
    (lambda: transforms.image().check((64, 40)), "transforms: image"),
    (lambda: transforms.image().check((20,), name="v"), "'v'"),
    (lambda: transforms.inertial().check((9, 4)), "inertial"),
    (lambda: transforms.log_mel().check((9, 4, 3)), "log_mel"),
    (lambda: transforms.vector(std=(1, 2)).check((3,)), "std"),
    (
      lambda: transforms.identity().check((9,), jnp.int32, name="words"),
      "'words' holds int32",
    ),
  ],
)
def test_what_a_transformation_is_not_for_is_refused_by_name(make, sentence):
  with pytest.raises(ValueError, match=sentence):
    make()


def test_held_out_ranges_and_controls_are_those_of_the_sheet():
  none = transforms.identity(of="image")
  near, far = transforms.held_out(none, (28, 28, 1)).values()
  assert dict(near.options)["rotation"] == 15
  assert dict(far.options)["scale"] == (1 / 1.3, 1.3)
  assert dict(far.options)["jitter"] == 3
  # The range of the training plays no role.
  wide = transforms.image(rotation=45, scale=(0.5, 2.0))
  assert transforms.held_out(wide, (28, 28, 1))["near"] == near
  found = transforms.controls(transforms.image())
  assert list(found) == ["none", "shifts only", "sub-pixel shifts"]
  below = dict(found["sub-pixel shifts"].options)
  assert (below["rotation"], below["scale"], below["jitter"]) == (
    0,
    (1, 1),
    0.5,
  )
  mel = transforms.held_out(transforms.log_mel(), (64, 40))["far"]
  assert dict(mel.options)["mel_shift"] == 2


def test_nothing_of_a_kind_that_is_not_known_is_tested_with_nothing():
  for shape in ((9,), (64, 40, 1), (28, 28, 1)):
    assert transforms.held_out(transforms.identity(), shape) == {}
  mel = transforms.controls(transforms.log_mel())["none"]
  assert transforms.held_out(mel, (64, 40, 1)) == transforms.held_out(
    transforms.log_mel(), (64, 40, 1)
  )
  # Along joints nothing is smooth, with transformations or without.
  body = transforms.skeleton()
  still = transforms.controls(body)["none"]
  assert still.smooth_axes((32, 20, 3)) == body.smooth_axes((32, 20, 3)) == (0,)


def test_what_lies_outside_a_held_out_test_is_what_was_said():
  chosen = transforms.image(), transforms.lucid(), transforms.log_mel()
  for transform in (*chosen, transforms.identity(of="image")):
    for fill in (None, 0.25):
      tests = transforms.held_out(transform, (28, 28, 1), fill=fill)
      assert {dict(t.options)["fill"] for t in tests.values()} == {fill}
  told = transforms.held_out(transforms.image(fill=1.0), (28, 28, 1), fill=0.2)
  assert dict(told["near"].options)["fill"] == 1.0


@pytest.mark.parametrize(
  "transform, shifts",
  [
    (transforms.image(), 2.0),
    (transforms.image(jitter=0), None),
    (transforms.image(jitter=0.2), 0.2),
    (transforms.lucid(), 6.0),  # its jitters are of 4 and of 2 to a side
  ],
)
def test_controls_shift_as_far_as_the_whole_and_always_blur(transform, shifts):
  found = transforms.controls(transform)
  assert ("shifts only" in found) == (shifts is not None)
  if shifts is not None:
    only = dict(found["shifts only"].options)
    assert (only["rotation"], only["scale"], only["jitter"]) == (
      *(0, (1, 1)),
      shifts,
    )
  below = dict(found["sub-pixel shifts"].options)
  assert (below["rotation"], below["scale"], below["jitter"]) == (
    *(0, (1, 1)),
    0.5,
  )


def test_lucid_leaves_its_border_open_as_the_others_do():
  draw = {
    "angle": jnp.asarray(0.3),
    "scale": jnp.asarray(0.9),
    "roll": jnp.array([3, -2]),
    "shift": jnp.zeros(2),
  }
  flat = jnp.full((30, 30, 1), 0.8)
  kept = transforms.lucid().apply(flat, draw)
  np.testing.assert_allclose(kept, 0.8, atol=1e-6)
  filled = transforms.lucid().filled(0.2)
  assert dict(filled.options)["fill"] == 0.2
  assert filled.apply(flat, draw).min() < 0.3
