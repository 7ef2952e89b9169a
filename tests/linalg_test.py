import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import linalg

SHAPES = [(2, 32), (10, 64), (27, 64), (31, 512), (101, 512)]


def _random(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def _orthonormal(seed, k, d):
  return np.linalg.qr(_random(seed, d, k))[0].T


def _polar(Z):
  U, _, V = np.linalg.svd(np.asarray(Z, np.float64), full_matrices=False)
  return U @ V


def _with_condition(seed, k, d, condition):
  U, _, V = np.linalg.svd(_random(seed, k, d), full_matrices=False)
  return U * np.geomspace(1, 1 / condition, k) @ V


@pytest.mark.parametrize("k,d", SHAPES)
def test_rows_are_orthonormal_and_the_polar_factor(k, d):
  Z = _random(0, k, d).astype(np.float32)
  W = np.asarray(jax.jit(linalg.newton_schulz)(jnp.asarray(Z)), np.float64)
  assert np.max(np.abs(W @ W.T - np.eye(k))) < 1e-5
  np.testing.assert_allclose(W, _polar(Z), atol=1e-5)


def _rank_deficient():
  Z = _random(1, 5, 16)
  Z[3] = Z[2]
  Z[1] = 0
  return Z


def _hard_cases():
  """Matrices of one shape, so that one compilation serves them all."""
  return np.stack(
    [
      _random(2, 32, 64),
      np.ones((32, 64)),
      np.pad(_rank_deficient(), ((0, 27), (0, 48))),
      _with_condition(4, 32, 64, 1e5),
      1e8 * _random(5, 32, 64),
      1e-8 * _random(5, 32, 64),
      _orthonormal(6, 32, 64),
    ]
  )


@pytest.mark.parametrize("num_iters", [1, 2, 5, 12, 40])
def test_norm_is_at_most_one_at_every_step(num_iters):
  polar = jax.jit(lambda z: linalg.newton_schulz(z, num_iters=num_iters))
  cases = [*_hard_cases(), _random(2, 101, 512), _random(3, 64, 64)]
  for Z in cases:
    W = np.asarray(polar(jnp.asarray(Z, jnp.float32)), np.float64)
    assert np.linalg.norm(W, 2) <= 1 + 1e-6


@pytest.mark.parametrize("condition,num_iters", [(10, 12), (100, 20)])
def test_ill_conditioned_rows_converge(condition, num_iters):
  Z = jnp.asarray(_with_condition(0, 30, 64, condition), jnp.float32)
  W = linalg.newton_schulz(Z, num_iters=num_iters)
  assert linalg.defect(W) < 1e-5
  # Without enough steps the same claim fails.
  assert linalg.defect(linalg.newton_schulz(Z, num_iters=4)) > 1e-2


def test_two_equal_rows_keep_a_defect_of_one_half():
  Z = _random(0, 4, 9)
  Z[1] = Z[0]
  W = linalg.newton_schulz(jnp.asarray(Z, jnp.float32))
  np.testing.assert_allclose(linalg.defect(W), 0.5, atol=1e-4)


def test_gradient_at_orthonormal_rows_has_the_closed_form():
  Z = jnp.asarray(_orthonormal(0, 10, 64), jnp.float32)
  G = jnp.asarray(_random(1, 10, 64), jnp.float32)
  gradient = jax.jit(jax.grad(lambda z: jnp.vdot(G, linalg.newton_schulz(z))))
  expected = G - (G @ Z.T + Z @ G.T) @ Z / 2
  np.testing.assert_allclose(gradient(Z), expected, atol=1e-5)


def _unrolled(Z, num_iters=60):
  def step(X, _):
    return 1.5 * X - 0.5 * X @ X.T @ X, None

  X, _ = jax.lax.scan(step, Z / jnp.linalg.norm(Z), length=num_iters)
  return X


def test_derivatives_equal_those_of_the_unrolled_iteration():
  with jax.enable_x64(True):
    Z = jnp.asarray(_with_condition(0, 6, 15, 20))
    G = jnp.asarray(_random(1, 6, 15))

    def loss(function):
      return lambda z: jnp.vdot(G, jnp.sin(2 * function(z)))

    own = loss(lambda z: linalg.newton_schulz(z, num_iters=30))
    other = loss(_unrolled)
    gradient = jax.jit(jax.grad(own))(Z)
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(other))(Z), atol=1e-9)
    assert abs(jnp.vdot(gradient, Z)) < 1e-9

    def hvp(loss):
      return jax.jit(lambda z: jax.jvp(jax.grad(loss), (z,), (G,))[1])(Z)

    def twice(loss):
      gradient = jax.grad(loss)
      return jax.jit(jax.grad(lambda z: jnp.vdot(G, gradient(z))))(Z)

    expected = hvp(other)
    np.testing.assert_allclose(hvp(own), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(twice(own), expected, rtol=1e-6, atol=1e-6)


def test_gradient_agrees_with_finite_differences():
  with jax.enable_x64(True):
    Z = jnp.asarray(_random(0, 5, 12))
    G = jnp.asarray(_random(1, 5, 12))
    V = jnp.asarray(_random(2, 5, 12))
    loss = jax.jit(lambda z: jnp.vdot(G, linalg.newton_schulz(z)))
    step = 1e-6
    numeric = (loss(Z + step * V) - loss(Z - step * V)) / (2 * step)
    exact = jnp.vdot(jax.jit(jax.grad(loss))(Z), V)
    np.testing.assert_allclose(exact, numeric, atol=1e-6)


def test_gradient_is_orthogonal_to_the_proxy_in_float32():
  Z = jnp.asarray(_random(0, 10, 64), jnp.float32)
  G = jnp.asarray(_random(1, 10, 64), jnp.float32)
  gradient = jax.jit(jax.grad(lambda z: jnp.vdot(G, linalg.newton_schulz(z))))(
    Z
  )
  scale = jnp.linalg.norm(gradient) * jnp.linalg.norm(Z)
  assert abs(jnp.vdot(gradient, Z)) < 1e-6 * scale


@pytest.mark.parametrize("Z", [_rank_deficient(), np.zeros((3, 7))])
def test_gradients_of_degenerate_rows_are_finite(Z):
  Z = jnp.asarray(Z, jnp.float32)
  loss = lambda z: jnp.sum(jnp.sin(3 * linalg.newton_schulz(z)))  # noqa: E731
  gradient = jax.jit(jax.grad(loss))(Z)
  assert jnp.all(jnp.isfinite(gradient))


def test_vmap_and_batches_agree_with_single_matrices():
  Z = jnp.asarray(_random(0, 3, 4, 9), jnp.float32)
  Z = Z.at[1].set(jnp.asarray(_orthonormal(0, 4, 9)))
  G = jnp.asarray(_random(1, 3, 4, 9), jnp.float32)

  def gradient(z, g):
    return jax.grad(lambda z: jnp.vdot(g, linalg.newton_schulz(z)))(z)

  jitted = jax.jit(gradient)
  single = jnp.stack([jitted(z, g) for z, g in zip(Z, G)])
  np.testing.assert_allclose(
    jax.jit(jax.vmap(gradient))(Z, G), single, atol=2e-6
  )
  np.testing.assert_allclose(jitted(Z, G), single, atol=2e-6)


def test_half_precision_is_computed_and_returned_in_float32():
  Z = jnp.asarray(_random(0, 4, 9), jnp.bfloat16)
  W = linalg.newton_schulz(Z)
  assert W.dtype == jnp.float32
  assert linalg.defect(W) < 1e-6


def test_random_orthonormal_rows_are_exact_and_spread_evenly():
  W = linalg.random_orthonormal(jax.random.key(0), (400, 3, 6))
  assert jnp.max(linalg.defect(W)) < 1e-6
  # Haar: entries have mean 0 and variance 1 / d.
  assert jnp.max(jnp.abs(jnp.mean(W, axis=0))) < 0.1
  np.testing.assert_allclose(jnp.mean(W**2, axis=0), 1 / 6, atol=0.05)
  square = linalg.random_orthonormal(jax.random.key(1), (64, 64))
  assert linalg.defect(square) < 1e-5


def test_tall_matrices_get_orthonormal_columns():
  Z = jnp.asarray(_random(0, 9, 4), jnp.float32)
  W = linalg.newton_schulz(Z)
  np.testing.assert_allclose(W.T @ W, np.eye(4), atol=1e-6)
  assert linalg.defect(W) < 1e-6


def test_not_finite_rows_give_nan_not_a_wrong_answer():
  Z = jnp.asarray(_random(0, 4, 9), jnp.float32).at[0, 0].set(jnp.nan)
  assert jnp.isnan(linalg.defect(linalg.newton_schulz(Z)))


def test_num_iters_must_be_positive():
  with pytest.raises(ValueError, match="num_iters"):
    linalg.newton_schulz(jnp.eye(2), num_iters=0)


@pytest.mark.parametrize("num_iters", [0, 1, 6, 16])
@pytest.mark.parametrize("k,d", [(1, 5), (30, 64), (512, 512)])
def test_gram_norm_is_an_upper_bound_with_the_stated_excess(k, d, num_iters):
  W = _random(k, k, d).astype(np.float32)
  exact = np.linalg.norm(W.astype(np.float64), 2)
  norm = jax.jit(lambda w: linalg.gram_norm(w, num_iters=num_iters))
  bound = norm(jnp.asarray(W))
  rank = min(k, d)
  assert float(bound) >= exact
  assert bound <= exact * rank**0.5 ** (num_iters + 1) * (1 + 4e-6)


def test_gram_norm_of_orthonormal_rows_attains_its_worst_case():
  W = jnp.asarray(_orthonormal(0, 32, 64), jnp.float32)
  for num_iters in (2, 6):
    bound = linalg.gram_norm(W, num_iters=num_iters)
    expected = 32**0.5 ** (num_iters + 1)
    np.testing.assert_allclose(bound, expected, rtol=4e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_gram_norm_is_homogeneous(scale):
  W = jnp.asarray(_random(0, 6, 4), jnp.float32)
  np.testing.assert_allclose(
    linalg.gram_norm(scale * W), scale * linalg.gram_norm(W), rtol=1e-4
  )


def test_gram_norm_gradient_is_that_of_the_largest_singular_value():
  W = jnp.asarray(_random(0, 6, 4), jnp.float32)
  U, _, V = np.linalg.svd(W)
  np.testing.assert_allclose(
    jax.jit(jax.grad(linalg.gram_norm))(W), np.outer(U[:, 0], V[0]), atol=1e-4
  )
  zero = jnp.zeros((3, 2))
  assert linalg.gram_norm(zero) == 0
  assert jnp.all(jax.jit(jax.grad(linalg.gram_norm))(zero) == 0)


def test_gram_norm_takes_batches():
  W = jnp.asarray(_random(0, 3, 6, 4), jnp.float32)
  single = jnp.stack([linalg.gram_norm(w) for w in W])
  np.testing.assert_allclose(linalg.gram_norm(W), single, rtol=1e-5)
  np.testing.assert_allclose(jax.vmap(linalg.gram_norm)(W), single, rtol=1e-5)


def test_power_iteration_is_a_lower_bound_and_gram_norm_is_not():
  W = _random(0, 200, 200).astype(np.float32)
  exact = np.linalg.norm(W.astype(np.float64), 2)
  estimate = linalg.power_iteration(jnp.asarray(W), num_iters=5)
  assert 0.8 * exact < estimate < 0.999 * exact
  assert linalg.gram_norm(jnp.asarray(W)) > estimate
  more = linalg.power_iteration(jnp.asarray(W), num_iters=300)
  np.testing.assert_allclose(more, exact, rtol=1e-3)
  assert linalg.power_iteration(jnp.zeros((2, 3))) == 0


@pytest.mark.parametrize("k,d", [(6, 6), (9, 4), (4, 9)])
def test_cayley_is_orthonormal_for_any_parameters(k, d):
  for scale in (0.0, 0.1, 10.0):
    V = jnp.asarray(scale * _random(0, k, d), jnp.float32)
    W = linalg.cayley(V)
    assert W.shape == (k, d)
    assert linalg.defect(W) < 1e-5
  loss = lambda v: jnp.sum(jnp.sin(linalg.cayley(v)))  # noqa: E731
  gradient = jax.jit(jax.grad(loss))(V)
  assert jnp.all(jnp.isfinite(gradient))


def test_cayley_norm_is_at_most_one_where_the_inverse_is_inaccurate():
  for scale in (30, 1e3, 1e6):
    V = jnp.asarray(scale * _random(0, 9, 6), jnp.float32)
    W = np.asarray(linalg.cayley(V), np.float64)
    assert np.linalg.norm(W, 2) <= 1 + 1e-6


def test_cayley_gradient_equals_that_of_a_direct_solve():
  with jax.enable_x64(True):
    V = jnp.asarray(_random(0, 7, 4))
    G = jnp.asarray(_random(1, 7, 4))

    def direct(V):
      U, Y = V[:4], V[4:]
      A = U - U.T + Y.T @ Y
      inverse = jnp.linalg.inv(jnp.eye(4) + A)
      return jnp.concatenate([(jnp.eye(4) - A) @ inverse, -2 * Y @ inverse])

    def gradient(function):
      return jax.jit(jax.grad(lambda V: jnp.vdot(G, jnp.sin(function(V)))))(V)

    np.testing.assert_allclose(
      gradient(linalg.cayley), gradient(direct), atol=1e-10
    )


def test_cayley_matches_its_formula():
  V = _random(0, 7, 3)
  U, Y = V[:3], V[3:]
  A = U - U.T + Y.T @ Y
  inverse = np.linalg.inv(np.eye(3) + A)
  expected = np.concatenate([(np.eye(3) - A) @ inverse, -2 * Y @ inverse])
  np.testing.assert_allclose(
    linalg.cayley(jnp.asarray(V, jnp.float32)), expected, atol=1e-5
  )
