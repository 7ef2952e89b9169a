"""Products with Hessians, Fisher diagonals and exact order statistics."""

import functools
import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from robust_mm import curvature
from robust_mm import linalg

SIZES = (6, 5, 3)


def _network(seed=0, sizes=SIZES):
  rng = np.random.default_rng(seed)
  return {
    f"layer{i}": {
      "kernel": jnp.asarray(rng.normal(size=(a, b)) / a**0.5),
      "bias": jnp.asarray(rng.normal(size=b) * 0.1),
    }
    for i, (a, b) in enumerate(itertools.pairwise(sizes))
  }


def _apply(params, x):
  layers = [params[name] for name in sorted(params)]
  for layer in layers[:-1]:
    x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
  return x @ layers[-1]["kernel"] + layers[-1]["bias"][None]


def _loss(params, x, label):
  logits = _apply(params, x)
  picked = jnp.sum(logits * jax.nn.one_hot(label, logits.shape[-1]), axis=-1)
  return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def _data(seed=1, number=12, sizes=SIZES):
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.normal(size=(number, sizes[0])))
  return x, jnp.asarray(rng.integers(0, sizes[-1], number))


def _flat(fn, params):
  flat, unravel = ravel_pytree(params)
  return flat, unravel, lambda v: fn(unravel(v))


@pytest.mark.parametrize("recompute", [False, True])
def test_products_are_those_of_the_dense_hessian(recompute):
  with jax.enable_x64(True):
    params = _network()
    fn = functools.partial(_loss, x=_data()[0], label=_data()[1])
    flat, unravel, on_flat = _flat(fn, params)
    dense = jax.jit(jax.hessian(on_flat))(flat)
    matvec = curvature.hvp(fn, params, recompute=recompute)
    vector = jnp.asarray(np.random.default_rng(3).normal(size=flat.size))
    found = ravel_pytree(jax.jit(matvec)(unravel(vector)))[0]
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, dense @ vector, atol=1e-12)


def test_gauss_newton_is_dense_gauss_newton_and_not_the_hessian():
  with jax.enable_x64(True):
    params, (x, label) = _network(), _data()
    flat, unravel, model = _flat(lambda p: _apply(p, x), params)
    picked = jax.nn.one_hot(label, 3)

    def loss(logits):
      entropy = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(logits * picked, -1)
      return jnp.mean(entropy)

    jacobian = jax.jacobian(model)(flat).reshape(-1, flat.size)
    curved = jax.hessian(loss)(model(flat)).reshape(36, 36)
    dense = jacobian.T @ curved @ jacobian
    matvec = curvature.ggn_vp(lambda p: _apply(p, x), loss, params)
    vector = jnp.asarray(np.random.default_rng(3).normal(size=flat.size))
    image = ravel_pytree(jax.jit(matvec)(unravel(vector)))[0]
    np.testing.assert_allclose(image, dense @ vector, atol=1e-12)
    hessian = jax.jit(jax.hessian(lambda v: loss(model(v))))(flat)
    assert np.linalg.eigvalsh(dense)[0] > -1e-12
    assert np.linalg.eigvalsh(hessian)[0] < -1e-3
    assert np.linalg.norm(hessian @ vector - image) > 0.1


def test_half_precision_parameters_have_single_precision_curvature():
  params = {"w": jnp.asarray([0.5, -1.0, 2.0], jnp.bfloat16)}
  matvec = curvature.hvp(lambda p: jnp.sum(p["w"] ** 4), params)
  found = matvec({"w": jnp.ones(3, jnp.bfloat16)})["w"]
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, [3.0, 12.0, 48.0], rtol=1e-6)
  with pytest.raises(ValueError, match=r"params\['n'\] must be floating"):
    curvature.hvp(lambda p: 0.0, {"n": jnp.zeros(3, jnp.int32)})


def test_lanczos_of_a_network_finds_the_ends_of_its_dense_spectrum():
  sizes = (32, 24, 4)  # 892 parameters
  params = jax.tree.map(lambda a: a.astype(jnp.float32), _network(2, sizes))
  x, label = _data(4, 30, sizes)
  fn = functools.partial(_loss, x=x, label=label)
  flat, _, on_flat = _flat(fn, params)
  dense = np.asarray(jax.jit(jax.hessian(on_flat))(flat), np.float64)
  exact = np.linalg.eigvalsh(dense)
  run = jax.jit(
    lambda p, key: curvature.lanczos(curvature.hvp(fn, p), p, key, num_steps=40)
  )
  ritz = run(params, jax.random.key(0))
  assert exact[0] < -1e-3
  np.testing.assert_allclose(ritz.values[0], exact[0], atol=1e-3)
  np.testing.assert_allclose(ritz.values[-1], exact[-1], atol=1e-3)
  gaps = np.abs(np.asarray(ritz.values)[:, None] - exact[None])
  assert np.all(np.min(gaps, axis=1) <= ritz.residuals + 1e-5)
  assert np.max(np.min(gaps, axis=1)) > 1e-4  # so the residuals say something
  ends = jax.jit(functools.partial(curvature.spectrum_ends, fn, num_steps=30))(
    params, jax.random.key(1)
  )
  assert ends.lower <= exact[0] <= ends.smallest + 1e-5
  assert ends.largest - 1e-5 <= exact[-1] <= ends.upper


def test_as_many_steps_as_parameters_give_every_eigenvalue():
  rng = np.random.default_rng(0)
  A = rng.normal(size=(24, 24))
  A = jnp.asarray(A + A.T, jnp.float32)
  fn = lambda p: jnp.dot(p["w"], jnp.matmul(A, p["w"])) / 2  # noqa: E731
  params = {"w": jnp.zeros(24)}
  ritz = curvature.lanczos(
    curvature.hvp(fn, params), params, jax.random.key(0), num_steps=24
  )
  exact = np.linalg.eigvalsh(np.asarray(A, np.float64))
  np.testing.assert_allclose(
    ritz.values, exact, atol=1e-5 * np.abs(exact).max()
  )


def test_fisher_is_the_mean_of_squared_gradients_of_a_linear_model():
  rng = np.random.default_rng(5)
  W, x = rng.normal(size=(4, 3)), rng.normal(size=(37, 4))
  y = rng.normal(size=(37, 3))

  def loss(params, example):
    residual = jnp.matmul(example["x"], params["w"]) - example["y"]
    return jnp.sum(residual**2) / 2

  slopes = x[:, :, None] * (x @ W - y)[:, None, :]
  closed_form = np.mean(slopes**2, axis=0)
  batch = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
  params = {"w": jnp.asarray(W, jnp.float32)}
  # 37 leaves a remainder, 1 and 100 are the ends.
  for chunk_size in (1, 16, 100):
    run = jax.jit(
      functools.partial(curvature.fisher_diagonal, loss, chunk_size=chunk_size)
    )
    found = run(params, batch)["w"]
    np.testing.assert_allclose(found, closed_form, rtol=2e-6)
  of_batch = np.mean(slopes, axis=0) ** 2
  wrong = np.linalg.norm(of_batch - closed_form) / np.linalg.norm(closed_form)
  assert wrong > 0.5


def test_fisher_refuses_batches_without_examples():
  run = functools.partial(
    curvature.fisher_diagonal, lambda p, e: jnp.sum(p * e), jnp.ones(2)
  )
  for batch in (jnp.ones((0, 2)), {}, (jnp.ones((3, 2)), jnp.ones((2, 2)))):
    with pytest.raises(ValueError, match="batch must hold"):
      run(batch)
  with pytest.raises(ValueError, match="chunk_size"):
    run(jnp.ones((3, 2)), chunk_size=0)


def _wide(seed, number):
  rng = np.random.default_rng(seed)
  values = 10.0 ** rng.uniform(-25, 5, number)
  values[rng.permutation(number)[: number // 10]] = 0
  return values.astype(np.float32)


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_threshold_is_the_sorted_order_statistic_bit_for_bit(quantile):
  values = _wide(0, 1530)
  values[100:160] = values[99]  # ties
  tree = {"a": jnp.asarray(values[:1500].reshape(50, 30)), "b": values[1500:]}
  tree["b"] = jnp.asarray(tree["b"])
  found = jax.jit(
    functools.partial(curvature.quantile_threshold, quantile=quantile)
  )(tree)
  rank = math.ceil(Fraction(str(quantile)) * values.size)
  expected = np.sort(values)[rank - 1]
  assert np.asarray(found).tobytes() == expected.tobytes()
  assert np.sum(values <= expected) >= rank > np.sum(values < expected)


def test_threshold_orders_any_float():
  values = np.array([np.inf, -1.0, -0.0, 0.0, 1e-42, np.nan, -np.inf, 3.0])
  values = values.astype(np.float32)
  ordered = [-np.inf, -1.0, -0.0, 0.0, 1e-42, 3.0, np.inf, np.nan]
  for i, expected in enumerate(np.float32(ordered)):
    found = curvature.quantile_threshold(jnp.asarray(values), (i + 1) / 8)
    assert np.asarray(found).tobytes() == expected.tobytes()
  # 0.1 * 30 is above 3 in binary floating point.
  ranks = jnp.arange(1.0, 31.0)
  assert curvature.quantile_threshold(ranks, 0.1) == 3
  half = curvature.quantile_threshold(ranks.astype(jnp.bfloat16), 0.5)
  assert half == 15
  assert half.dtype == jnp.float32
  with jax.enable_x64(True):
    wide = jnp.asarray([1e-300, 1.0, 1 + 1e-15], jnp.float64)
    assert curvature.quantile_threshold(wide, 0.3) == 1e-300
    assert curvature.quantile_threshold(wide, 1.0) == 1 + 1e-15
  for bad in (0.0, -0.1, 1.1):
    with pytest.raises(ValueError, match="quantile must lie in"):
      curvature.quantile_threshold(ranks, bad)


def test_coupled_blocks_are_refused_and_separate_ones_are_not():
  params = {"a": jnp.ones(5), "b": jnp.ones((2, 2))}
  labels = {"a": "a", "b": "b"}
  key = jax.random.key(0)

  def apart(p):
    return jnp.sum(p["a"] ** 3) + jnp.sum(jnp.sin(p["b"]))

  def together(p):
    return apart(p) + 1e-3 * jnp.sum(p["a"]) * jnp.sum(p["b"])

  check = functools.partial(
    curvature.check_separable, like=params, labels=labels, key=key
  )
  check(curvature.hvp(apart, params))
  with pytest.raises(ValueError, match="separable must be False"):
    check(curvature.hvp(together, params))
  assert curvature.coupling(lambda x: x, params, labels, key) == 0
  found = linalg.block_lanczos(
    curvature.hvp(apart, params), params, labels, key, num_steps=10
  )
  np.testing.assert_allclose(found["a"].values, 6.0, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_eight_devices_agree_with_one(kind):
  mesh = jax.make_mesh(
    (8,), ("x",), axis_types=(getattr(jax.sharding.AxisType, kind),)
  )
  rng = np.random.default_rng(0)
  params = {"w": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)}
  batch = jnp.asarray(rng.normal(size=(48, 8)), jnp.float32)

  def loss(params, x):
    return jnp.sum(jnp.tanh(jnp.sum(x[:, None] * params["w"], axis=0)) ** 2)

  def fn(params):
    return jnp.sum(params["w"] ** 3)

  @jax.jit
  def run(params, batch):
    fisher = curvature.fisher_diagonal(loss, params, batch, chunk_size=16)
    key = jax.random.key(0)
    ends = curvature.spectrum_ends(fn, params, key, num_steps=12)
    return fisher, curvature.quantile_threshold(params, 0.3), ends

  alone = run(params, batch)
  rows = jax.sharding.NamedSharding(mesh, jax.P("x", None))
  everywhere = jax.sharding.NamedSharding(mesh, jax.P())
  with jax.set_mesh(mesh):
    shared = run(
      jax.device_put(params, everywhere), jax.device_put(batch, rows)
    )
    placed = jax.device_put(params, rows)
    split = jax.jit(lambda p: curvature.quantile_threshold(p, 0.3))
    text = split.lower(placed).compile().as_text()
    assert split(placed) == alone[1]
  assert "all-gather" not in text
  for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(shared)):
    np.testing.assert_allclose(other, one, atol=1e-5)
