"""Each operation against a closed form or an independent library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from scipy import stats
from scipy.spatial import transform

from robust_mm import augmentations
from robust_mm.augmentations import transforms

KEY = jax.random.key(11)
RNG = np.random.default_rng(2)
MANY = 2000


def apply(augmentation, value, key=KEY):
  """To a batch in which everything is present."""
  value = np.asarray(value, np.float32)
  present = np.ones(len(value), bool)
  call = jax.jit(lambda key, x: augmentation(key, x, present))
  return np.asarray(call(key, value))


def draws(shape):
  return RNG.normal(size=shape).astype(np.float32)


def assert_normal(sample, deviation):
  """Each refused once in 10,000 keys if the law is right."""
  sample = sample / deviation
  assert stats.kstest(sample, "norm").pvalue > 1e-4
  assert abs(np.std(sample) - 1) < 4 / np.sqrt(2 * len(sample))
  assert abs(np.mean(sample)) < 4 / np.sqrt(len(sample))


# ---- warp_time


@pytest.mark.parametrize("steps", [-4, -1, 1, 3])
def test_a_shift_of_whole_frames_is_a_slice_with_held_ends(steps):
  x = draws((17, 5))
  offset = jnp.float32(2 * steps / 16)
  found = transforms.frames_at(jnp.asarray(x), jnp.float32(1), offset)
  inside = np.roll(x, -steps, axis=0)
  if steps > 0:
    inside[-steps:] = x[-1]
  else:
    inside[:-steps] = x[0]
  np.testing.assert_allclose(found, inside, atol=1e-5)


@pytest.mark.parametrize("factor, offset", [(1.3, 0.2), (0.6, -0.5), (1, 3)])
@pytest.mark.parametrize("length", [2, 31])
def test_warping_is_numpy_interp(factor, offset, length):
  x = draws((length, 2, 3))
  unit = np.linspace(-1, 1, length)
  place = (unit * factor + offset + 1) / 2 * (length - 1)
  index = np.arange(length)
  expected = np.stack(
    [np.interp(place, index, column) for column in x.reshape(length, 6).T], -1
  ).reshape(x.shape)
  found = transforms.frames_at(
    jnp.asarray(x), jnp.float32(factor), jnp.float32(offset)
  )
  np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_single_frame_stays():
  x = draws((3, 1, 4))
  found = apply(augmentations.warp_time(scale=2.0, shift=1.0), x)
  np.testing.assert_array_equal(found, x)


def test_scale_and_shift_of_time_have_the_stated_laws():
  half = 50
  ramp = np.arange(2 * half + 1.0)[None, :, None].repeat(MANY, 0)
  found = apply(augmentations.warp_time(scale=1.5, shift=0.2), ramp)[..., 0]
  # In the middle no end is held: the read place is a line.
  slope = (found[:, half + 20] - found[:, half - 20]) / 40
  offset = found[:, half] / half - 1
  log = np.log(slope) / np.log(1.5)
  for sample in (log, offset / 0.2):
    assert 0.98 < np.max(np.abs(sample)) <= 1 + 1e-4
    law = stats.uniform(-1, 2)
    assert stats.kstest(sample, law.cdf).pvalue > 1e-4
  assert abs(np.corrcoef(log, offset)[0, 1]) < 4 / np.sqrt(MANY)


def test_all_pixels_of_a_video_are_warped_alike():
  ramp = np.arange(9.0)[None, :, None, None, None] + np.zeros((4, 9, 3, 2, 1))
  found = apply(augmentations.warp_time(scale=1.5, shift=0.5), ramp)
  np.testing.assert_array_equal(found, found[..., :1, :1, :] + 0 * found)


# ---- rotate


@pytest.mark.parametrize("axis", [None, "x", "y", "z"])
def test_rotations_keep_lengths_and_angles_of_all_vectors(axis):
  x = draws((20, 7, 12))
  found = apply(augmentations.rotate(angle=1.0, axis=axis), x)
  before = x.reshape(20, 28, 3)
  after = found.reshape(20, 28, 3)
  assert np.all(np.abs(after - before).max((1, 2)) > 1e-3)
  gram = np.einsum("bnj,bmj->bnm", before, before)
  turned = np.einsum("bnj,bmj->bnm", after, after)
  np.testing.assert_allclose(turned, gram, atol=2e-5)
  # No reflections.
  triple = np.linalg.det(before[:, :3])
  np.testing.assert_allclose(np.linalg.det(after[:, :3]), triple, atol=1e-4)
  if axis:
    kept = "xyz".index(axis)
    np.testing.assert_allclose(after[..., kept], before[..., kept], atol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 1e-3, 1.0, np.pi, 7.0])
def test_the_formula_is_scipys_and_finite_at_zero(size):
  vector = draws((5, 3))
  vector *= size / np.linalg.norm(vector, axis=-1, keepdims=True)
  found = transforms.rotation(jnp.asarray(vector))
  expected = transform.Rotation.from_rotvec(vector).as_matrix()
  np.testing.assert_allclose(found, expected, atol=1e-6)
  if size == 0:
    np.testing.assert_array_equal(found, np.eye(3)[None].repeat(5, 0))


def test_angles_have_the_stated_deviation():
  basis = np.eye(3)[None].repeat(MANY, 0)
  turned = apply(augmentations.rotate(angle=0.4, axis="y"), basis)
  angle = np.arctan2(turned[:, 2, 0], turned[:, 2, 2])
  assert_normal(angle, 0.4)
  turned = apply(augmentations.rotate(angle=0.4), basis)
  matrices = np.swapaxes(turned, 1, 2)
  vectors = transform.Rotation.from_matrix(matrices).as_rotvec()
  for entry in vectors.T:
    assert_normal(entry, 0.4)
  corner = np.corrcoef(vectors.T)[np.triu_indices(3, 1)]
  assert np.all(np.abs(corner) < 4 / np.sqrt(MANY))


def test_groups_of_vectors_have_rotations_of_their_own():
  vectors = np.tile(np.array([1.0, 2.0, 3.0]), 4)[None].repeat(6, 0)
  alone = apply(augmentations.rotate(angle=1.0), vectors).reshape(6, 4, 3)
  np.testing.assert_allclose(alone, alone[:, :1] + 0 * alone, atol=1e-6)
  found = apply(augmentations.rotate(angle=1.0, groups=2), vectors)
  found = found.reshape(6, 2, 2, 3)
  np.testing.assert_allclose(found, found[:, :, :1] + 0 * found, atol=1e-6)
  assert np.all(np.abs(found[:, 0] - found[:, 1]).max((1, 2)) > 1e-2)


# ---- scale, brighten, noise, erase


@pytest.mark.parametrize("per, number", [("example", 1), ("axis", 3)])
def test_factors_are_log_normal_and_shared_as_said(per, number):
  found = apply(
    augmentations.scale(deviation=0.3, per=per), np.full((MANY, 2, 6), -2.0)
  )
  logs = np.log(found / -2.0)
  parts = logs[:, 0, :number]
  expected = np.tile(parts, 6 // number)[:, None].repeat(2, 1)
  np.testing.assert_allclose(logs, expected, atol=1e-6)
  for entry in parts.T:
    assert_normal(entry, 0.3)
  if number > 1:
    corner = np.corrcoef(parts.T)[np.triu_indices(3, 1)]
    assert np.all(np.abs(corner) < 4 / np.sqrt(MANY))


def test_every_channel_has_a_factor_of_its_own():
  found = apply(
    augmentations.scale(deviation=0.3, per="channel"), np.ones((MANY, 3, 2, 5))
  )
  np.testing.assert_array_equal(found, found[:, :1, :1] + 0 * found)
  logs = np.log(found[:, 0, 0])
  assert_normal(logs.reshape(-1), 0.3)
  corner = np.corrcoef(logs.T)[np.triu_indices(5, 1)]
  assert np.all(np.abs(corner) < 4 / np.sqrt(MANY))


def test_noise_is_white_and_of_the_stated_size():
  found = apply(augmentations.noise(deviation=0.7), np.ones((200, 5, 4)))
  noise = (found - 1).reshape(200, 20)
  assert_normal(noise.reshape(-1), 0.7)
  assert np.abs(np.corrcoef(noise.T) - np.eye(20)).max() < 5 / np.sqrt(200)


@pytest.mark.parametrize("where", ["foreground", "everywhere"])
def test_one_offset_is_added_where_said(where):
  value = np.array([-1.0, 0.0, 0.5, 2.0], np.float32)
  x = value[None].repeat(MANY, 0)
  found = apply(augmentations.brighten(deviation=0.4, where=where), x)
  offset = found[:, 3:] - 2
  lit = value > 0 if where == "foreground" else np.ones(4, bool)
  np.testing.assert_allclose(found, x + np.where(lit, offset, 0), atol=1e-6)
  np.testing.assert_array_equal(found[:, ~lit], x[:, ~lit])
  assert_normal(offset[:, 0], 0.4)


def test_a_box_of_the_stated_share_is_erased_in_all_frames():
  x = np.ones((50, 3, 20, 20, 2))
  gone = apply(augmentations.erase(share=0.25), x) == 0
  np.testing.assert_array_equal(
    gone, gone[:, :1, ..., :1] + np.zeros_like(gone)
  )
  flat = gone[:, 0, :, :, 0]
  assert np.all(flat.sum((1, 2)) == 100)
  rows, columns = flat.any(2), flat.any(1)
  assert np.all(rows.sum(1) == 10)
  assert np.all(columns.sum(1) == 10)
  assert len({tuple(row) for row in rows}) > 5


# ---- move


@pytest.mark.parametrize("down, right", [(0, 0), (2, 0), (-1, 3), (0, -4)])
def test_a_move_by_whole_pixels_is_a_shifted_array_with_zeros(down, right):
  height, width = 9, 7
  x = draws((2, height, width, 3))
  # Read above, and the picture comes down.
  offset = np.array([-2 * down / (height - 1), -2 * right / (width - 1)])
  found = transforms.pixels_at(
    jnp.asarray(x), jnp.ones(2), jnp.asarray(offset, jnp.float32)
  )
  expected = np.zeros_like(x)
  for i in range(height):
    for j in range(width):
      if 0 <= i - down < height and 0 <= j - right < width:
        expected[:, i, j] = x[:, i - down, j - right]
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("factor", [(1.0, 1.0), (1.4, 0.7)])
@pytest.mark.parametrize("offset", [(0.0, 0.0), (0.31, -0.6)])
def test_moving_is_scipys_bilinear_interpolation(factor, offset):
  height, width = 11, 8
  x = draws((height, width, 2))
  places = [
    (np.linspace(-1, 1, n) * s + o + 1) / 2 * (n - 1)
    for n, s, o in zip((height, width), factor, offset)
  ]
  grid = np.meshgrid(*places, indexing="ij")
  expected = np.stack(
    [
      ndimage.map_coordinates(x[..., c], grid, order=1, mode="grid-constant")
      for c in range(2)
    ],
    axis=-1,
  )
  found = transforms.pixels_at(
    jnp.asarray(x), jnp.float32(factor), jnp.float32(offset)
  )
  np.testing.assert_allclose(found, expected, atol=2e-5)


def test_stretch_and_shift_of_space_have_the_stated_laws():
  half = 12
  size = 2 * half + 1
  index = np.arange(size, dtype=np.float32)
  image = np.stack(np.meshgrid(index, index, indexing="ij"), -1)
  found = apply(
    augmentations.move(scale=0.1, shift=0.05), image[None].repeat(MANY, 0)
  )
  # Rows are read off channel 0 in the middle column, columns off channel 1.
  lines = (found[:, :, half, 0], found[:, half, :, 1])
  laws = []
  for line in lines:
    laws.append(np.log((line[:, half + 5] - line[:, half - 5]) / 10) / 0.1)
    laws.append((line[:, half] / half - 1) / 0.05)
  for sample in laws:
    assert_normal(sample, 1.0)
  corner = np.corrcoef(laws)[np.triu_indices(4, 1)]
  assert np.all(np.abs(corner) < 4 / np.sqrt(MANY))


def test_all_frames_and_channels_move_alike():
  frame = draws((3, 1, 8, 8, 1))
  video = frame.repeat(4, 1).repeat(2, 4)
  found = apply(augmentations.move(scale=0.2, shift=0.3), video)
  np.testing.assert_allclose(found, found[:, :1, ..., :1] + 0 * found, 0, 1e-6)
