"""Stable rank, its derivatives, and the collapse loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import curvature
from robust_mm import spectrum

SHAPES = [(20, 6), (6, 20)]  # covariance, Gram matrix


def _random(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def _decaying(seed, *shape):
  """Rows with a spectrum that is spread out, and a mean."""
  Z = _random(seed, *shape) * 0.8 ** np.arange(shape[1])[None]
  return Z + 0.5


def _reference(Z):
  centred = Z - Z.mean(0)
  return np.sum(centred**2) / np.linalg.norm(centred, 2) ** 2


@pytest.mark.parametrize("shape", SHAPES)
def test_stable_rank_is_that_of_the_centred_rows(shape):
  Z = _decaying(0, *shape)
  rank = jax.jit(spectrum.stable_rank)
  found = rank(jnp.asarray(Z, jnp.float32))
  np.testing.assert_allclose(found, _reference(Z), rtol=1e-5)
  # Not that of the covariance, which is smaller.
  centred = Z - Z.mean(0)
  C = centred.T @ centred
  assert found > 1.05 * np.sum(C**2) / np.linalg.norm(C, 2) ** 2
  for factor in (1e-3, 1e3):
    scaled = rank(jnp.asarray(factor * Z, jnp.float32))
    np.testing.assert_allclose(scaled, found, rtol=1e-5)
  assert 1 <= found <= min(shape[1], shape[0] - 1)


def test_rank_one_is_one_and_half_precision_is_raised():
  line = jnp.outer(jnp.arange(9.0), jnp.linspace(1, 2, 5))
  np.testing.assert_allclose(spectrum.stable_rank(line), 1.0, rtol=1e-5)
  half = jnp.asarray(_random(0, 20, 6), jnp.bfloat16)
  found = spectrum.stable_rank(half)
  assert found.dtype == jnp.float32
  expected = _reference(np.asarray(half, np.float64))
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("target", ["expected", "sampled"])
def test_rows_of_weight_zero_are_as_good_as_removed(target):
  Z = jnp.asarray(_decaying(1, 24, 5), jnp.float32)
  keep = jnp.arange(24) % 3 > 0
  spoiled = jnp.where(keep[:, None], Z, jnp.nan)

  def run(Z, weights=None):
    return spectrum.collapse(
      Z,
      spectral_weight=0.3,
      weights=weights,
      adaptive=True,
      target=target,
      key=jax.random.key(0),
    )

  found = run(spoiled, keep)
  removed = run(Z[keep])
  np.testing.assert_allclose(found.stable_rank, removed.stable_rank, rtol=1e-6)
  np.testing.assert_allclose(
    spectrum.stable_rank(spoiled, weights=keep),
    spectrum.stable_rank(Z[keep]),
    rtol=1e-6,
  )
  if target == "expected":
    np.testing.assert_allclose(found.loss, removed.loss, rtol=1e-6)
  slope = jax.grad(lambda Z: run(Z, keep).loss)(spoiled)
  assert np.all(slope[~keep] == 0)
  assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_the_closed_form_and_cannot_shrink(shape):
  Z = _decaying(2, *shape)
  centred = Z - Z.mean(0)
  degrees = shape[0] - 1
  values, vectors = np.linalg.eigh(centred.T @ centred / degrees)
  top, v = values[-1], vectors[:, -1]
  expected = centred / top - values.sum() / top**2 * centred @ np.outer(v, v)
  expected *= 2 / degrees
  found = jax.jit(jax.grad(spectrum.stable_rank))(jnp.asarray(Z, jnp.float32))
  np.testing.assert_allclose(
    found, expected, atol=1e-5 * np.abs(expected).max()
  )
  along = abs(np.sum(found * centred))
  assert along < 1e-5 * np.linalg.norm(found) * np.linalg.norm(centred)


def test_gram_matrix_and_covariance_agree():
  Z = np.zeros((6, 20))
  Z[:, :5] = _decaying(3, 6, 5)  # columns of zeros change nothing
  wide, narrow = jnp.asarray(Z, jnp.float32), jnp.asarray(Z[:, :5], jnp.float32)
  both = jax.value_and_grad(spectrum.stable_rank)
  (value, slope), (other, other_slope) = both(wide), both(narrow)
  np.testing.assert_allclose(value, other, rtol=1e-5)
  np.testing.assert_allclose(slope[:, :5], other_slope, atol=1e-5)


def _held_eigenvector(Z):
  """What one would write first: right gradient, wrong Hessian."""
  centred = Z - jnp.mean(Z, axis=0)[None]
  C = centred.T @ centred
  u = jax.lax.stop_gradient(jnp.linalg.eigh(C)[1][:, -1])
  return jnp.trace(C) / (u @ C @ u)


@pytest.mark.parametrize("shape", SHAPES)
def test_second_derivative_agrees_with_differences_of_the_gradient(shape):
  with jax.enable_x64(True):
    Z, V = jnp.asarray(_decaying(4, *shape)), jnp.asarray(_random(5, *shape))
    slope = jax.jit(jax.grad(spectrum.stable_rank))
    step = 1e-5
    numeric = (slope(Z + step * V) - slope(Z - step * V)) / (2 * step)
    size = np.linalg.norm(numeric)

    def error(fn):
      product = jax.jit(lambda v: curvature.hvp(fn, Z)(v))
      return np.linalg.norm(product(V) - numeric) / size

    assert error(spectrum.stable_rank) < 1e-6
    # Negative control: the comparison can tell a wrong Hessian.
    held = jax.grad(_held_eigenvector)(Z)
    np.testing.assert_allclose(held, slope(Z), atol=1e-10)
    assert error(_held_eigenvector) > 0.3


_EDGES = {
  "zero": jnp.zeros((5, 3)),
  "constant": jnp.full((5, 3), 2.0),
  "rank one": jnp.outer(jnp.arange(5.0), jnp.ones(3)),
  "tied": jnp.eye(4) - 0.25,
  "one row": jnp.ones((1, 3)),
  "two rows": jnp.asarray([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]),
  "tiny": 1e-12 * jnp.asarray(_random(0, 6, 3), jnp.float32),
}


@pytest.mark.parametrize("case", _EDGES)
def test_derivatives_are_finite_where_the_spectrum_is_not_simple(case):
  Z = _EDGES[case]
  V = jnp.asarray(_random(1, *Z.shape), jnp.float32)
  collapse = functools.partial(
    spectrum.collapse, spectral_weight=0.1, adaptive=True
  )

  @jax.jit
  def run(Z):
    found = []
    for fn in (lambda Z: collapse(Z).loss, spectrum.stable_rank):
      found += [fn(Z), jax.grad(fn)(Z), curvature.hvp(fn, Z)(V)]
    return found

  assert all(np.all(np.isfinite(x)) for x in run(Z))


def test_fewer_than_two_rows_have_no_rank_and_no_row_no_loss():
  Z = jnp.asarray(_random(0, 4, 3), jnp.float32)

  def run(Z, weights):
    return spectrum.collapse(Z, spectral_weight=1.0, weights=weights)

  for weights in (jnp.zeros(4), jnp.asarray([0, 1.0, 0, 0])):
    assert run(Z, weights).stable_rank == 0
    slope = jax.grad(lambda Z, w=weights: run(Z, w).stable_rank)(Z)
    assert np.all(slope == 0)
  assert run(Z, jnp.zeros(4)).loss == 0
  assert np.all(jax.grad(lambda Z: run(Z, jnp.zeros(4)).loss)(Z) == 0)


def test_gradient_norm_stays_bounded_as_embeddings_vanish():
  Z = jnp.asarray(_decaying(1, 20, 6), jnp.float32)

  def slope(factor, fn):
    return float(jnp.linalg.norm(jax.grad(fn)(factor * Z)))

  rank = spectrum.stable_rank
  np.testing.assert_allclose(
    slope(0.1, rank) / slope(1.0, rank), 10.0, rtol=1e-3
  )
  guarded = lambda Z: spectrum.collapse(Z, spectral_weight=1.0).loss  # noqa: E731
  # The largest slope is where the eigenvalue is about 1e-8; it ends there.
  assert slope(1e-7, guarded) < 100 * slope(1.0, guarded)
  assert slope(1e-10, guarded) < slope(1.0, guarded)
  assert slope(1e-7, rank) > 1e6 * slope(1.0, rank)


def test_expected_target_is_the_mean_of_sampled_ones():
  n, d = 16, 8
  Z = jnp.asarray(_random(6, n, d), jnp.float32)

  @jax.jit
  def slopes(keys):
    loss = lambda Z, key: (  # noqa: E731
      spectrum.collapse(
        Z, spectral_weight=0.0, target="sampled", key=key
      ).gaussian
    )
    return jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))(Z, keys)

  values, drawn = slopes(jax.random.split(jax.random.key(0), 4000))
  closed_form = 2 * Z / (n * d)
  size = np.linalg.norm(closed_form)
  assert np.linalg.norm(jnp.mean(drawn, axis=0) - closed_form) < 0.03 * size
  assert np.linalg.norm(drawn[0] - closed_form) > 0.2 * size
  expected = spectrum.collapse(Z, spectral_weight=0.0)
  np.testing.assert_allclose(jnp.mean(values), expected.loss, rtol=0.01)
  scale = np.mean(np.square(Z))
  np.testing.assert_allclose(expected.loss, 2 * scale, rtol=1e-5)
  slope = jax.grad(lambda Z: spectrum.collapse(Z, spectral_weight=0.0).loss)(Z)
  np.testing.assert_allclose(slope, closed_form, atol=1e-6 * size)


@pytest.mark.parametrize("rows", [128, 512])
def test_isotropic_rank_is_what_gaussians_have(rows):
  rank = jax.jit(
    jax.vmap(
      lambda key: spectrum.stable_rank(jax.random.normal(key, (rows, 128)))
    )
  )
  mean = float(jnp.mean(rank(jax.random.split(jax.random.key(0), 20))))
  isotropic = float(spectrum.isotropic_stable_rank(rows, 128))
  assert abs(mean / isotropic - 1) < 0.06
  # The naive normaliser is far off, or the test would not tell them apart.
  assert abs(mean / min(128, rows - 1) - 1) > 0.3


def test_adaptive_factor_is_one_when_spread_and_zero_when_collapsed():
  def omega(Z):
    return float(spectrum.collapse(Z, spectral_weight=0.1, adaptive=True).omega)

  spread = jax.random.normal(jax.random.key(0), (64, 16))
  assert omega(spread) > 0.9
  assert omega(jnp.outer(spread[:, 0], spread[0])) < 0.01
  assert 0.1 < omega(spread * (1 / (1 + jnp.arange(16.0)))[None]) < 0.6
  assert omega(spread[:2]) == 0


def test_leading_eigenvalue_reads_the_symmetric_part():
  A = _random(0, 6, 6)
  found = spectrum.leading_eigenvalue(jnp.asarray(A, jnp.float32))
  expected = np.linalg.eigvalsh((A + A.T) / 2)[-1]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  with pytest.raises(ValueError, match="matrix must be square"):
    spectrum.leading_eigenvalue(jnp.ones((2, 3)))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("shape", [(24, 4), (8, 24)])
def test_rows_on_eight_devices_agree_with_one(kind, shape):
  mesh = jax.make_mesh(
    (8,), ("x",), axis_types=(getattr(jax.sharding.AxisType, kind),)
  )
  Z = jnp.asarray(_decaying(0, *shape), jnp.float32)

  def loss(Z):
    keywords = {"target": "sampled", "key": jax.random.key(0)}
    return spectrum.collapse(Z, spectral_weight=0.1, **keywords).loss

  run = jax.jit(
    lambda Z: (*jax.value_and_grad(loss)(Z), curvature.hvp(loss, Z)(Z))
  )
  alone = run(Z)
  sharding = jax.sharding.NamedSharding(mesh, jax.P("x", None))
  with jax.set_mesh(mesh):
    shared = run(jax.device_put(Z, sharding))
  for one, other in zip(alone, shared):
    np.testing.assert_allclose(other, one, atol=1e-5)


def test_bad_arguments_are_named():
  Z = jnp.ones((4, 3))
  for keywords, message in (
    ({"spectral_weight": -1.0}, "spectral_weight"),
    ({"spectral_weight": 1.0, "target": "noise"}, "target must be one of"),
    ({"spectral_weight": 1.0, "target": "sampled"}, "key must be given"),
    ({"spectral_weight": 1.0, "weights": -jnp.ones(4)}, "weights must be non"),
    ({"spectral_weight": 1.0, "weights": jnp.ones(3)}, "weights must have"),
  ):
    with pytest.raises(ValueError, match=message):
      spectrum.collapse(Z, **keywords)
  with pytest.raises(ValueError, match="eps"):
    spectrum.stable_rank(Z, eps=-1.0)
