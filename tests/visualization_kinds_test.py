"""What the transformations of each kind do, against references of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.spatial

from robust_mm.visualization import transforms

KEY = jax.random.key(17)


def array(*shape):
  return np.asarray(jax.random.normal(KEY, shape))


def later_and_longer(x, shift, stretch):
  """Every column of ``[t, d]`` by linear interpolation; ends are held."""
  middle = (len(x) - 1) / 2
  place = (np.arange(len(x)) - middle - shift) / stretch + middle
  return np.stack(
    [np.interp(place, np.arange(len(x)), column) for column in x.T], axis=1
  )


def resampled(x, angle, scale, shift, fill=None):
  """``[h, w]`` by SciPy: out(p) = x(A^-1 (p - c - d) + c)."""
  turn = np.array(
    [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
  )
  back = np.linalg.inv(scale * turn)
  centre = (np.array(x.shape) - 1) / 2
  offset = centre - back @ (centre + shift)
  edge = {"mode": "nearest"}
  if fill is not None:
    edge = {"mode": "grid-constant", "cval": fill}
  return scipy.ndimage.affine_transform(x, back, offset, order=1, **edge)


def draw(**values):
  return {
    name: jnp.asarray(value, jnp.float32) for name, value in values.items()
  }


@pytest.mark.parametrize("shift, stretch", [(0.0, 1.3), (2.5, 0.8)])
def test_spectrograms_move_in_time_and_pitch_and_grow_by_a_term(shift, stretch):
  x = array(17, 9)
  given = draw(shift=[shift, 0.0], stretch=stretch, gain=0.3)
  found = transforms.log_mel().apply(jnp.asarray(x), given)
  wanted = later_and_longer(x, shift, stretch) + 0.3
  np.testing.assert_allclose(found, wanted, atol=1e-4)
  higher = transforms.log_mel().apply(
    jnp.asarray(x), draw(shift=[0.0, 2.0], stretch=1.0, gain=0.0)
  )
  np.testing.assert_allclose(higher[:, 2:], x[:, :-2], atol=1e-6)
  np.testing.assert_allclose(higher[:, :2], x[:, :1].repeat(2, 1), atol=1e-6)


def test_signals_turn_move_and_grow_by_a_factor():
  x = array(21, 6)
  vector = np.array([0.2, -0.4, 0.1])
  given = draw(rotation=vector, amplitude=1.3, time_shift=1.5, stretch=1.2)
  found = transforms.inertial().apply(jnp.asarray(x), given)
  matrix = scipy.spatial.transform.Rotation.from_rotvec(vector).as_matrix()
  turned = np.concatenate([x[:, :3] @ matrix.T, x[:, 3:] @ matrix.T], axis=1)
  wanted = 1.3 * later_and_longer(turned, 1.5, 1.2)
  np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_bodies_turn_and_grow_about_their_centre_and_move_in_time():
  x = array(13, 4, 3)
  vector = np.array([0.0, 0.5, 0.0])
  given = draw(rotation=vector, scale=1.2, time_shift=-2.0, stretch=0.9)
  found = transforms.skeleton().apply(jnp.asarray(x), given)
  matrix = scipy.spatial.transform.Rotation.from_rotvec(vector).as_matrix()
  centre = x.mean((0, 1))
  turned = centre + 1.2 * (x - centre) @ matrix.T
  wanted = later_and_longer(turned.reshape(13, 12), -2.0, 0.9)
  np.testing.assert_allclose(found, wanted.reshape(x.shape), atol=1e-4)


@pytest.mark.parametrize("fill", [None, 0.5])
def test_depth_moves_every_frame_alike_and_all_in_time(fill):
  x = array(6, 9, 8, 1)
  given = draw(angle=0.1, scale=1.1, shift=[1.0, -0.5], time_shift=2.0)
  found = transforms.depth(fill=fill).apply(jnp.asarray(x), given)
  frames = [
    resampled(frame[..., 0], 0.1, 1.1, np.array([1.0, -0.5]), fill)
    for frame in x
  ]
  wanted = np.stack([frames[max(t - 2, 0)] for t in range(6)])
  np.testing.assert_allclose(found[..., 0], wanted, atol=1e-4)
  # A motion map has no time.
  flat = transforms.depth(fill=fill).apply(jnp.asarray(x[0, ..., 0]), given)
  np.testing.assert_allclose(flat, frames[0], atol=1e-4)


@pytest.mark.parametrize("fill", [None, 0.5])
def test_lucid_pads_rolls_resamples_once_and_crops(fill):
  x = array(20, 18, 1)
  given = draw(angle=-0.15, scale=0.94, shift=[2.0, -1.0])
  given["roll"] = jnp.array([-3, 4])
  found = transforms.lucid(fill=fill).apply(jnp.asarray(x), given)
  frame = {"mode": "edge"}
  if fill is not None:
    frame = {"constant_values": fill}
  padded = np.roll(np.pad(x[..., 0], 12, **frame), (-3, 4), (0, 1))
  wanted = resampled(padded, -0.15, 0.94, np.array([2.0, -1.0]))[12:-12, 12:-12]
  np.testing.assert_allclose(found[..., 0], wanted, atol=1e-4)


def test_noise_of_features_has_the_stated_deviation_in_each():
  std = (0.5, 1.0, 4.0)
  transform = transforms.vector(deviation=0.2, std=std)
  x = jnp.array([1.0, -2.0, 3.0])
  moved = jax.vmap(lambda key: transform(key, x))(jax.random.split(KEY, 20_000))
  np.testing.assert_allclose(moved.mean(0), x, atol=0.03)
  np.testing.assert_allclose(moved.std(0), 0.2 * np.array(std), rtol=0.03)


def test_listed_shifts_move_by_whole_pixels_and_fill():
  x = array(5, 6, 1)
  transform = transforms.shifts(offsets=((1, -2),), fill=7.0)
  found = transform(KEY, jnp.asarray(x))
  np.testing.assert_array_equal(found[1:, :-2], x[:-1, 2:])
  assert np.all(found[:1] == 7)
  assert np.all(found[:, -2:] == 7)
