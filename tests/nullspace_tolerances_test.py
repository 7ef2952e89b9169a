"""What counts as zero in a stem: narrow weights, single channels, bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from robust_mm import nullspace
from robust_mm.models import vit


def gaussian(*shape, seed=0, dtype=np.float64):
  return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_no_kernel_is_invented_in_weights_of_any_dtype(dtype):
  for seed in range(3):
    weight = gaussian(256, 256, seed=seed).astype(jnp.dtype(dtype))
    kernel = nullspace.patch_kernel(weight)
    assert kernel.dim == 0
    assert nullspace.head_kernel(weight).dim == 1  # what moves all alike


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_is_found_changes_no_token_in_any_dtype(dtype):
  weight = gaussian(192, 40).astype(jnp.dtype(dtype))
  kernel = nullspace.patch_kernel(weight)
  assert kernel.dim == 152
  matrix = weight.astype(np.float64)
  moved = np.linalg.norm(kernel.basis.T @ matrix, axis=1)
  assert moved.max() < 1e-6 * np.linalg.norm(matrix, 2)


def test_a_tolerance_that_counts_everything_as_zero_is_refused():
  weight = gaussian(768, 768).astype(jnp.bfloat16)
  with pytest.raises(ValueError, match="tolerance must lie in"):
    nullspace.patch_kernel(weight, fidelity="published", channels=3)
  for call in (nullspace.patch_kernel, nullspace.head_kernel):
    with pytest.raises(ValueError, match="tolerance must lie in"):
      call(np.ones((4, 2)), tolerance=1.0)


def test_the_default_tolerance_stands_between_rounding_and_what_is_there():
  """It is refuted both ways: by what rounding leaves, and by what is small."""
  eps = float(np.finfo(np.float32).eps)
  left = np.linalg.qr(gaussian(32, 32))[0]
  right = np.linalg.qr(gaussian(32, 32, seed=1))[0]

  def dim(last):
    values = np.ones(32)
    values[-1] = last
    kernel = nullspace.patch_kernel((left * values) @ right)
    single = nullspace.patch_kernel(
      ((left * values) @ right).astype(np.float32)
    )
    return kernel.dim, single.dim

  # Stored in float32: below 8 eps counts as zero, above does not.
  assert dim(4 * eps)[1] == 1
  assert dim(16 * eps)[1] == 0
  assert dim(4 * eps)[0] == 0  # of float64 it is there


def test_single_channels_of_a_matrix_need_their_number():
  weight = gaussian(147, 32)
  for options in ({"fidelity": "published"}, {"per_channel": True}):
    with pytest.raises(ValueError, match=r"^channels must be given"):
      nullspace.patch_kernel(weight, **options)
    with pytest.raises(ValueError, match=r"^channels must be given"):
      nullspace.patch_kernel(weight, std=0.5, **options)
    found = nullspace.patch_kernel(weight, channels=3, **options)
    assert found.dim == 51
    assert nullspace.patch_kernel(weight, std=(0.5, 1, 2), **options).dim == 51


def test_the_published_tolerance_is_that_of_one_channel():
  weight = gaussian(16, 16, 3, 40)
  single = nullspace.patch_kernel(weight, fidelity="published")
  eps = np.finfo(np.float64).eps
  assert single.tolerance == pytest.approx(256 * eps)
  assert nullspace.patch_kernel(
    gaussian(4, 4, 3, 40), fidelity="published"
  ).tolerance == pytest.approx(40 * eps)
  # As scipy.linalg.null_space of each.
  parts = [scipy.linalg.null_space(weight[:, :, c].reshape(256, 40).T)
           for c in range(3)]  # fmt: skip
  assert single.dim == sum(part.shape[1] for part in parts)


def test_dimensions_of_single_channels_are_relative_to_their_own():
  """A faint channel is no kernel."""
  weight = gaussian(5, 5, 3, 20)
  weight[:, :, 2] *= 1e-5
  kernel = nullspace.patch_kernel(weight, per_channel=True)
  assert kernel.dim == 15
  assert set(kernel.dimensions.values()) == {15}


NET = vit.vision_transformer(width=8, depth=1, num_heads=2, patch_size=4)


def test_std_is_that_of_the_network_or_of_what_is_before_it():

  params = NET.init(jax.random.key(0), (8, 8, 3))
  std = (0.2, 0.3, 0.4)
  outside = nullspace.embedding_kernel(NET, params, std=std)
  own = dataclasses.replace(NET, preprocess=(0.5, std))
  inside = nullspace.embedding_kernel(own, params)
  np.testing.assert_array_equal(outside.basis, inside.basis)
  with pytest.raises(ValueError, match="std must be left out"):
    nullspace.embedding_kernel(own, params, std=0.5)


KERNEL = nullspace.patch_kernel(gaussian(16, 4))
HALF = np.full((1, 8, 8, 1), 0.5)
BAD = [
  (lambda: nullspace.patch_kernel(gaussian(48, 1, 8, 8)), "transpose"),
  (lambda: nullspace.patch_kernel(gaussian(4, 4) + 1j), "weight must be real"),
  (lambda: KERNEL.project(np.ones((2, 16), int)), "delta must be floats"),
  (lambda: KERNEL.project(1.0), "delta must end"),
  (
    lambda: nullspace.largest_kernel_noise(KERNEL, np.nan * HALF, HALF),
    "images must be within bounds",
  ),
  (
    lambda: nullspace.largest_kernel_noise(KERNEL, HALF, np.nan * HALF),
    "direction must be finite",
  ),
  (
    lambda: nullspace.largest_kernel_noise(KERNEL, HALF, HALF, bounds=None),
    "bounds must be",
  ),
  (
    lambda: nullspace.largest_kernel_noise(KERNEL, HALF, HALF, bounds=(0,)),
    "bounds must be",
  ),
  (
    lambda: nullspace.largest_kernel_noise(KERNEL, HALF[:0], HALF[:0]),
    "images must not be empty",
  ),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_refused_by_name(call, message):
  with pytest.raises(ValueError, match=message):
    call()
