"""Exact kernels: nullspace.md 15, lines 1 to 5."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from robust_mm import nullspace
from robust_mm.models import vit

# (p, d, dimension, that of the published code): the table of section 3.
TABLE = [
  (768, 384, 384, 0),
  (768, 768, 0, 0),
  (768, 1024, 0, 0),
  (3072, 384, 2688, 1920),
  (3072, 768, 2304, 768),
  (3072, 1024, 2048, 0),
  (49, 32, 17, 17),
]


def gaussian(*shape, seed=0, dtype=np.float64):
  return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.mark.parametrize(("p", "d", "dim", "published"), TABLE)
def test_dimensions_are_those_of_the_table(p, d, dim, published):
  weight = gaussian(p, d)
  kernel = nullspace.patch_kernel(weight)
  assert kernel.dim == dim
  assert kernel.rank == p - dim
  channels = 1 if p == 49 else 3
  single = nullspace.patch_kernel(
    weight, fidelity="published", channels=channels
  )
  assert single.dim == published
  basis = kernel.basis
  np.testing.assert_allclose(basis.T @ basis, np.eye(dim), atol=1e-12)
  if dim:
    delta = basis @ gaussian(dim, 3, seed=1)
    lengths = np.linalg.norm(delta, axis=0)
    # |W| is some 90: relative to what generic noise of that norm does.
    assert np.all(
      np.linalg.norm(delta.T @ weight, axis=1)
      < 1e-12 * lengths * np.linalg.norm(weight, 2)
    )
    outside = gaussian(p, 3, seed=2)
    change = np.linalg.norm(outside.T @ weight, axis=1)
    assert np.all(change > 0.1 * np.linalg.norm(outside, axis=0))


def test_rank_survives_rounding_and_nothing_is_invented():
  low = gaussian(768, 300) @ gaussian(300, 384, seed=1) / 300
  kernel = nullspace.patch_kernel(low.astype(np.float32))
  assert kernel.rank == 300
  assert kernel.gap > 1e4
  assert kernel.dimensions[1e-5] == 468  # over orders of magnitude
  assert kernel.dimensions[1e-3] == 468
  assert kernel.dimensions[1e-8] < 468  # what rounding has left counts there
  trivial, invented = 0, 0
  for seed in range(30):
    weight = gaussian(768, 768, seed=seed, dtype=np.float32)
    values = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
    small = values[-1] / values[0]
    trivial += small > 8 * np.finfo(np.float32).eps
    invented += small <= 768 * np.finfo(np.float32).eps
    if seed < 2:
      found = nullspace.patch_kernel(weight)
      assert found.dim == int(small <= 8 * np.finfo(np.float32).eps)
  assert trivial >= 29
  assert invented >= 2  # what the published tolerance finds


def test_the_kernel_of_single_channels_is_part_of_the_joint_one():
  weight = gaussian(7, 7, 3, 32)
  joint = nullspace.patch_kernel(weight)
  single = nullspace.patch_kernel(weight, per_channel=True)
  assert (joint.dim, single.dim) == (147 - 32, 3 * 17)
  inside = joint.basis @ (joint.basis.T @ single.basis)
  np.testing.assert_allclose(inside, single.basis, atol=1e-12)
  matrix = weight.reshape(147, 32)
  assert np.abs(single.basis.T @ matrix).max() < 1e-12 * 100
  # And not the other way round.
  back = single.basis @ (single.basis.T @ joint.basis)
  assert np.abs(back - joint.basis).max() > 1e-2


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.4)


@pytest.fixture(scope="module")
def network():
  """(net, params, images [8, 28, 28, 3]), normalised inside."""
  net = vit.vision_transformer(
    width=32, depth=2, num_heads=2, patch_size=7, num_classes=10,
    preprocess=(MEAN, STD),
  )  # fmt: skip
  params = net.init(jax.random.key(0), (28, 28, 3))
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.uniform(0.2, 0.8, (8, 28, 28, 3)), jnp.float32)
  return net, params, images


@pytest.fixture(scope="module")
def largest(network):
  net, params, images = network
  kernel = nullspace.patch_kernel(net.patch_weight(params), std=STD)
  direction = jax.random.normal(jax.random.key(1), images.shape)
  return kernel, nullspace.largest_kernel_noise(kernel, images, direction)


def test_the_kernel_of_a_network_is_that_of_its_embedding_in_pixels(
  network, largest
):
  net, params, _ = network
  kernel, _ = largest
  found = nullspace.embedding_kernel(net, params)
  assert found.patch_shape == (7, 7, 3)
  inside = kernel.project(jnp.asarray(found.basis.T, jnp.float32))
  np.testing.assert_allclose(inside, found.basis.T, atol=1e-5)
  assert found.dim == kernel.dim == 147 - 32
  single = nullspace.embedding_kernel(net, params, fidelity="published")
  assert single.dim == 3 * (49 - 32)
  plain = nullspace.embedding_kernel(
    dataclasses.replace(net, preprocess=None), params
  )
  raw = nullspace.patch_kernel(net.patch_weight(params))
  np.testing.assert_array_equal(plain.basis, raw.basis)


def test_with_std_the_kernel_is_that_of_pixels(network, largest):
  net, params, images = network
  kernel, _ = largest
  raw = nullspace.patch_kernel(net.patch_weight(params))

  def moved(kernel):
    delta = kernel.basis @ gaussian(kernel.dim, 16)
    delta = 0.1 * delta / np.abs(delta).max()
    patches = delta.T.reshape(4, 4, 7, 7, 3).transpose(0, 2, 1, 3, 4)
    noise = jnp.asarray(patches.reshape(1, 28, 28, 3), jnp.float32)
    tokens = net.embed(params, images)
    return float(
      jnp.max(jnp.abs(net.embed(params, images + noise) - tokens))
      / jnp.max(jnp.abs(tokens))
    )

  assert moved(kernel) < 1e-6
  assert moved(raw) > 1e-2


def test_kernel_noise_changes_nothing_that_the_network_says(network, largest):
  net, params, images = network
  _, noise = largest
  apply = jax.jit(net.apply)
  clean = apply(params, images)
  norm = jnp.linalg.norm(noise)
  assert norm / np.sqrt(noise.size) > 0.05  # not small
  generic = jax.random.normal(jax.random.key(2), noise.shape)
  generic = generic * norm / jnp.linalg.norm(generic)
  # Random logits are small: relative to their spread.
  unit = jnp.std(clean)
  assert jnp.max(jnp.abs(apply(params, images + noise) - clean)) < 1e-4 * unit
  assert jnp.max(jnp.abs(apply(params, images + generic) - clean)) > (
    1e-2 * unit
  )


def test_pgd_inside_the_kernel_changes_no_prediction(network, largest):
  net, params, images = network
  kernel, noise = largest
  said = net.apply(params, images)
  label = jnp.argmax(said, axis=-1)
  top = jnp.sort(said, axis=-1)
  margin = top[:, -1] - top[:, -2]

  def to_patches(x):
    return (
      x.reshape(8, 4, 7, 4, 7, 3)
      .transpose(0, 1, 3, 2, 4, 5)
      .reshape(8, 16, 147)
    )

  def to_images(x):
    x = x.reshape(8, 4, 4, 7, 7, 3).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(8, 28, 28, 3)

  def loss(delta):
    logits = net.apply(params, images + delta)
    chosen = jnp.take_along_axis(logits, label[:, None], axis=-1)
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - chosen[:, 0])

  def attack(restrict):
    def step(delta, _):
      delta = delta + 0.05 * jnp.sign(jax.grad(loss)(delta))
      if restrict:
        delta = to_images(kernel.project(to_patches(delta)))
      return delta, None

    delta, _ = jax.lax.scan(step, jnp.zeros_like(images), length=20)
    return jnp.argmax(net.apply(params, images + delta), axis=-1) == label

  inside, outside = jax.jit(lambda: (attack(True), attack(False)))()
  assert jnp.all(inside | (margin <= 1e-3))
  assert not jnp.all(outside)
  del noise


@pytest.fixture(scope="module")
def patches():
  """(weight [192, 40], x [4, 192], g [4, 192])."""
  rng = np.random.default_rng(0)
  return (
    rng.normal(size=(192, 40)),
    rng.uniform(0, 1, (4, 192)).astype(np.float32),
    rng.normal(size=(4, 192)).astype(np.float32),
  )


def test_largest_noise_is_nearly_that_of_the_linear_programme(patches):
  weight, x, g = patches
  kernel = nullspace.linear_kernel(weight)
  noise = nullspace.largest_kernel_noise(kernel, x, g, num_rounds=0)
  noise = np.asarray(noise, np.float64)
  assert np.all(x + noise >= -1e-6)
  assert np.all(x + noise <= 1 + 1e-6)
  size = np.linalg.norm(noise, axis=1)
  moved = np.linalg.norm(noise @ weight, axis=1)
  assert np.all(moved < 1e-6 * np.linalg.norm(weight, 2) * size)
  naive = np.asarray(kernel.project(jnp.asarray(g)), np.float64)
  room = np.where(naive > 0, 1 - x, x) / np.abs(naive)
  naive *= room.min(axis=1, keepdims=True)
  for row in range(4):
    best = scipy.optimize.linprog(
      -g[row],
      A_eq=weight.T,
      b_eq=np.zeros(40),
      bounds=np.stack([-x[row], 1 - x[row]], axis=1),
    )
    reached = g[row] @ noise[row]
    assert 0.98 * -best.fun <= reached <= (1 + 1e-5) * -best.fun
    assert reached > 1.5 * (g[row] @ naive[row])


def test_ascent_makes_the_norm_larger(patches):
  weight, x, g = patches
  kernel = nullspace.linear_kernel(weight)
  lengths = [
    jnp.linalg.norm(
      nullspace.largest_kernel_noise(kernel, x, g, num_rounds=rounds), axis=1
    )
    for rounds in (0, 3)
  ]
  assert jnp.all(lengths[1] >= lengths[0])
  assert jnp.mean(lengths[1]) > 1.02 * jnp.mean(lengths[0])


def test_pixels_at_their_bound_stay_there_and_others_move(patches):
  weight, x, g = patches
  x = np.where(np.arange(192) < 60, 0, x).astype(np.float32)
  kernel = nullspace.linear_kernel(weight)
  noise = np.asarray(nullspace.largest_kernel_noise(kernel, x, g), np.float64)
  assert np.all(x + noise >= 0)
  moved = np.linalg.norm(noise @ weight, axis=1)
  size = np.linalg.norm(noise, axis=1)
  assert np.all(size > 1)
  assert np.all(moved < 1e-5 * np.linalg.norm(weight, 2) * size)


def test_rounding_to_8_bits_leaves_the_kernel(network, largest):
  net, params, images = network
  kernel, noise = largest
  exact = jnp.linalg.norm(
    net.embed(params, images + noise) - net.embed(params, images)
  )
  stored = jnp.round(255 * (images + noise)) / 255
  rounded = jnp.linalg.norm(
    net.embed(params, stored) - net.embed(params, images)
  )
  assert rounded > 100 * exact
  del kernel


def test_projection_of_an_overlapping_convolution_is_the_kernel_of_it():
  weight = jnp.asarray(gaussian(5, 5, 1, 2), jnp.float32)

  def matvec(x):
    return jax.lax.conv_general_dilated(
      x[None],
      weight,
      (2, 2),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[0]

  delta = jnp.asarray(gaussian(14, 14, 1, seed=3), jnp.float32)
  transpose = jax.linear_transpose(matvec, delta)
  found = nullspace.project_kernel(delta, matvec, lambda y: transpose(y)[0])
  assert jnp.max(jnp.abs(matvec(found))) < 1e-4 * jnp.max(
    jnp.abs(matvec(delta))
  )
  # The nearest one: what was removed is orthogonal to the kernel.
  matrix = np.asarray(jax.jacobian(matvec)(delta), np.float64).reshape(98, 196)
  flat = np.asarray(delta, np.float64).reshape(-1)
  closed = flat - np.linalg.pinv(matrix) @ (matrix @ flat)
  np.testing.assert_allclose(np.asarray(found).reshape(-1), closed, atol=1e-4)


def test_stems_and_heads_have_their_kernels():
  assert nullspace.linear_kernel(gaussian(240, 64)).dim == 176
  head = gaussian(32, 10)
  kernel = nullspace.head_kernel(head)
  assert kernel.dim == 23  # d - (k - 1)
  moved = kernel.basis.T @ head
  assert np.abs(moved - moved.mean(axis=1, keepdims=True)).max() < 1e-12
  # d - k of them move no logit at all; one moves all alike.
  assert np.linalg.matrix_rank(moved, tol=1e-9) == 1


BAD = [
  (lambda: nullspace.patch_kernel(np.ones(3)), "weight must be 2-D or 4-D"),
  (
    lambda: nullspace.patch_kernel(np.full((4, 2), np.nan)),
    "weight must be fin",
  ),
  (lambda: nullspace.patch_kernel(np.ones((4, 2)), std=0.0), "std must be pos"),
  (lambda: nullspace.patch_kernel(np.ones((5000, 2))), "project_kernel needs"),
  (
    lambda: nullspace.patch_kernel(np.ones((4, 2)), channels=3),
    "channels must",
  ),
  (
    lambda: nullspace.patch_kernel(np.ones((2, 2, 3, 2)), std=(1, 2)),
    "std must be a number or one of each of 3",
  ),
  (
    lambda: nullspace.patch_kernel(np.ones((4, 2)), tolerance=-1.0),
    "tolerance must",
  ),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_kernels_refuse_by_name(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_largest_noise_refuses_by_name(patches):
  weight, x, g = patches
  kernel = nullspace.linear_kernel(weight)
  largest = nullspace.largest_kernel_noise
  with pytest.raises(ValueError, match="bounds must be finite and rising"):
    largest(kernel, x, g, bounds=(1.0, 0.0))
  with pytest.raises(ValueError, match="images must be within bounds"):
    largest(kernel, x + 1, g)
  with pytest.raises(ValueError, match="direction must have the shape"):
    largest(kernel, x, g[:1])
  with pytest.raises(ValueError, match="images"):
    largest(kernel, x[:, :7], g[:, :7])
  full = nullspace.linear_kernel(gaussian(192, 200))
  assert full.dim == 0  # no error: nothing there
  assert not np.any(largest(full, x, g))
