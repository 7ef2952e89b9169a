"""Ritz values and the intervals made of them, against dense eigenvalues."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_mm import linalg
from robust_mm.linalg import trees

LIKE = {"a": jnp.zeros((4, 5)), "b": jnp.zeros(10)}


def _symmetric(seed, size, values=None):
  rng = np.random.default_rng(seed)
  values = rng.normal(size=size) if values is None else values
  Q, _ = np.linalg.qr(rng.normal(size=(size, size)))
  return (Q * values) @ Q.T


def _as_tree_map(matrix):
  """A dense symmetric map on vectors shaped like ``LIKE``."""
  matrix = jnp.asarray(matrix, jnp.float32)

  def matvec(tree):
    flat = jnp.concatenate([jnp.ravel(tree["a"]), tree["b"]])
    out = jnp.matmul(matrix, flat, precision="highest")
    return {"a": jnp.reshape(out[:20], (4, 5)), "b": out[20:]}

  return matvec


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_as_many_steps_as_scalars_are_exact(reorthogonalize):
  for seed in range(3):
    matrix = _symmetric(seed, 30)
    matvec = _as_tree_map(matrix)
    run = jax.jit(
      functools.partial(
        linalg.lanczos,
        matvec,
        LIKE,
        num_steps=50,
        reorthogonalize=reorthogonalize,
      )
    )
    ritz = run(jax.random.key(seed))
    assert ritz.values.shape == (30,)
    exact = np.linalg.eigvalsh(matrix)
    found = ritz.values[jnp.array([0, -1])]
    np.testing.assert_allclose(found, exact[[0, -1]], rtol=1e-5)
    if reorthogonalize:
      np.testing.assert_allclose(ritz.values, exact, atol=2e-5)


def test_ritz_values_lie_inside_and_residuals_bound_their_error():
  matrix = _symmetric(5, 888, np.r_[-0.5, np.linspace(0, 3, 886), 7.0])
  exact = np.linalg.eigvalsh(matrix)
  matrix = jnp.asarray(matrix, jnp.float32)
  matvec = lambda x: jnp.matmul(matrix, x, precision="highest")  # noqa: E731
  like = jnp.zeros(888)
  for steps in (10, 40):
    run = jax.jit(
      functools.partial(linalg.lanczos, matvec, like, num_steps=steps)
    )
    ritz = run(jax.random.key(0))
    assert ritz.values[0] >= exact[0] - 1e-4
    assert ritz.values[-1] <= exact[-1] + 1e-4
    nearest = np.min(np.abs(np.asarray(ritz.values)[:, None] - exact), axis=1)
    assert np.all(nearest <= ritz.residuals + 1e-4)
  np.testing.assert_allclose(ritz.values[0], exact[0], atol=1e-3)
  np.testing.assert_allclose(ritz.values[-1], exact[-1], atol=1e-3)


@pytest.mark.parametrize("values", [[2.0] * 30, [3.0] + [1.0] * 29, [0.0] * 30])
def test_an_exhausted_space_plants_no_zero(values):
  run = jax.jit(
    functools.partial(
      linalg.lanczos,
      _as_tree_map(_symmetric(1, 30, np.array(values))),
      LIKE,
      num_steps=12,
    )
  )
  ritz = run(jax.random.key(3))
  assert np.all(np.isfinite(ritz.values))
  low, high = min(values), max(values)
  assert np.all(ritz.values >= low - 1e-4)
  assert np.all(ritz.values <= high + 1e-4)
  np.testing.assert_allclose(ritz.values[-1], high, atol=1e-4)
  assert np.any(np.isinf(ritz.residuals))


def test_blocks_in_one_loop_are_runs_of_their_own():
  sizes = {"a": 40, "b": 60, "c": 5}
  dense = {
    name: jnp.asarray(_symmetric(seed, size), jnp.float32)
    for seed, (name, size) in enumerate(sizes.items())
  }

  def matvec(tree):
    return {
      name: jnp.matmul(dense[name], tree[name], precision="highest")
      for name in tree
    }

  like = {name: jnp.zeros(size) for name, size in sizes.items()}
  labels = {name: name.upper() for name in sizes}
  run = jax.jit(
    functools.partial(linalg.block_lanczos, matvec, like, labels, num_steps=20)
  )
  together = run(jax.random.key(0))
  for name, size in sizes.items():
    exact = np.linalg.eigvalsh(np.asarray(dense[name], np.float64))
    ritz = together[name.upper()]
    assert ritz.values.shape == (min(20, size),)
    if size <= 20:
      np.testing.assert_allclose(ritz.values, exact, atol=1e-5)
      continue
    start = trees.random_normal(jax.random.key(0), like)[name]
    alone = _reference(np.asarray(dense[name], np.float64), start, 20)
    np.testing.assert_allclose(ritz.values, alone, atol=1e-4)


def _reference(matrix, start, steps):
  """Ritz values by a projection on the Krylov space, in float64."""
  basis = []
  vector = np.asarray(start, np.float64)
  for _ in range(steps):
    for row in basis * 2:
      vector = vector - row * (row @ vector)
    basis.append(vector / np.linalg.norm(vector))
    vector = matrix @ basis[-1]
  basis = np.array(basis)
  return np.linalg.eigvalsh(basis @ matrix @ basis.T)


def test_error_shares_are_those_of_the_theorem():
  # margin / spread = share / (1 - 2 share), the table of the method.
  for size, steps, margin in [
    (1_000, 20, 0.10),
    (100_000, 20, 0.15),
    (10**7, 30, 0.08),
    (10**9, 40, 0.06),
  ]:
    share = linalg.error_share(size, steps, 1e-3)
    assert abs(share / (1 - 2 * share) - margin) < 0.006
  assert linalg.error_share(30, 30, 1e-3) == 0
  for size, least in ((10**3, 8), (10**5, 9), (10**7, 10), (10**9, 11)):
    linalg.error_share(size, least, 1e-3)
    with pytest.raises(ValueError, match=f"num_steps must be at least {least}"):
      linalg.error_share(size, least - 1, 1e-3)
  with pytest.raises(ValueError, match="failure_probability"):
    linalg.error_share(100, 20, 1.0)


def test_bounds_fail_as_seldom_as_stated_and_not_more_seldom_by_far():
  """The spectrum that the theorem is tight for; a vacuous bound fails too."""
  size, steps, p, starts = 400, 8, 0.2, 2000
  share = linalg.error_share(size, steps, p)
  nodes = np.cos(np.arange(1, size) % (2 * steps - 1) * np.pi / (2 * steps - 1))
  values = np.r_[1.0, (1 - share) * (1 - nodes**2)]
  diagonal = jnp.asarray(values, jnp.float32)

  @jax.jit
  def missed(keys):
    def one(key):
      bounds = linalg.spectral_bounds(
        lambda x: diagonal * x,
        jnp.zeros(size),
        key,
        num_steps=steps,
        failure_probability=p,
      )
      top = (1 - bounds.largest) > share * 1.0
      return top, (bounds.upper < 1) | (bounds.lower > 0)

    return jax.lax.map(one, keys, batch_size=100)

  top, either = missed(jax.random.split(jax.random.key(0), starts))
  one_sided = p / 2
  error = 3 * np.sqrt(one_sided * (1 - one_sided) / starts)
  assert 0.02 < np.mean(top) <= one_sided + error
  assert np.mean(either) <= p


def test_intervals_hold_random_spectra():
  holds = []
  for seed in range(20):
    matrix = _symmetric(seed, 30)
    exact = np.linalg.eigvalsh(matrix)
    bounds = jax.jit(
      functools.partial(
        linalg.spectral_bounds,
        _as_tree_map(matrix),
        LIKE,
        num_steps=10,
        failure_probability=0.02,
      )
    )(jax.random.key(seed))
    holds.append(bounds.lower <= exact[0] and exact[-1] <= bounds.upper)
    assert bounds.smallest >= exact[0] - 1e-5
    assert bounds.largest <= exact[-1] + 1e-5
  assert np.mean(holds) > 0.9


def test_positive_maps_have_one_end_to_prove():
  matrix = _symmetric(2, 30, np.linspace(0, 4, 30))
  run = functools.partial(
    linalg.spectral_bounds, _as_tree_map(matrix), LIKE, jax.random.key(0)
  )
  one = run(num_steps=12, positive=True)
  both = run(num_steps=12)
  assert one.lower == 0
  assert 4 <= one.upper <= both.upper


def test_half_precision_is_raised_and_bad_leaves_are_named():
  like = {"w": jnp.zeros((3, 4), jnp.bfloat16)}
  seen = []

  def matvec(tree):
    seen.append(tree["w"].dtype)
    return tree

  linalg.lanczos(matvec, like, jax.random.key(0), num_steps=3)
  assert set(seen) == {jnp.dtype(jnp.float32)}
  for leaf, message in (
    (jnp.zeros(3, jnp.int32), r"like\['w'\] must be floating point"),
    (jnp.zeros(3, jnp.float16), "float16"),
    (jnp.zeros((0, 2)), "must not be empty"),
  ):
    with pytest.raises(ValueError, match=message):
      linalg.lanczos(matvec, {"w": leaf}, jax.random.key(0), num_steps=3)
  with pytest.raises(ValueError, match="at least one array"):
    linalg.lanczos(matvec, {}, jax.random.key(0), num_steps=3)


def test_a_map_that_is_not_finite_gives_no_verdict():
  ritz = linalg.lanczos(
    lambda x: x * jnp.nan, jnp.zeros(8), jax.random.key(0), num_steps=4
  )
  assert not np.any(np.isfinite(ritz.values))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_vectors_stay_sharded_and_give_the_same_values(kind):
  if jax.device_count() < 8:
    pytest.skip("needs 8 devices")
  mesh = jax.make_mesh(
    (8,), ("x",), axis_types=(getattr(jax.sharding.AxisType, kind),)
  )
  weights = jnp.linspace(-1, 2, 16 * 3).reshape(16, 3)
  sharding = jax.sharding.NamedSharding(mesh, jax.P("x", None))
  run = jax.jit(
    lambda w, key: linalg.lanczos(lambda x: x * w, w, key, num_steps=12).values
  )
  alone = run(weights, jax.random.key(0))
  with jax.set_mesh(mesh):
    placed = jax.device_put(weights, sharding)
    together = run(placed, jax.random.key(0))
    text = run.lower(placed, jax.random.key(0)).compile().as_text()
  np.testing.assert_allclose(together, alone, atol=1e-5)
  assert "all-gather" not in text
