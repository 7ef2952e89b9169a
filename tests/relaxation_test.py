"""Linear relaxation: exact where it must be, sound everywhere, refutable."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from robust_mm import relaxation
from robust_mm.relaxation import lines

ACTIVATIONS = {
  "relu": jax.nn.relu,
  "leaky": functools.partial(jax.nn.leaky_relu, negative_slope=0.2),
  "steep": lambda z: jnp.where(z < 0, 2.0 * z, 0.5 * z),
  "abs": jnp.abs,
  "tanh": jnp.tanh,
  "sigmoid": jax.nn.sigmoid,
  "maxmin": lambda z: jnp.concatenate(
    [
      jnp.maximum(z[: len(z) // 2], z[len(z) // 2 :]),
      jnp.minimum(z[: len(z) // 2], z[len(z) // 2 :]),
    ]
  ),
}


def dense(params, inputs, activation=jax.nn.relu):
  """Two late-fused perceptrons with a residual connection in the first."""
  total = params["bias"]
  for index, name in enumerate(sorted(inputs)):
    first, second, head = params[name]
    h = activation(first @ inputs[name] + 0.3)
    h = activation(second @ h - 0.1) + (h if index == 0 else 0)
    total = total + head @ h
  return total


def dense_params(seed, width=8):
  keys = iter(jax.random.split(jax.random.key(seed), 8))
  params = {"bias": jax.random.normal(next(keys), (3,))}
  for name, size in (("a", 5), ("b", 4)):
    params[name] = tuple(
      jax.random.normal(next(keys), shape) / shape[1] ** 0.5
      for shape in ((width, size), (width, width), (3, width))
    )
  return params


def a_ball(seed, radius, joint=True, sizes=None, norm=()):
  first, second = jax.random.split(jax.random.key(100 + seed))
  center = {
    "a": jax.random.normal(first, (5,)),
    "b": jax.random.normal(second, (4,)),
  }
  sizes = {"a": 1.0, "b": 1.0} if sizes is None else sizes
  return relaxation.Ball(
    center=center,
    radius=jnp.asarray(radius, jnp.float32),
    sizes={m: jnp.asarray(s, jnp.float32) for m, s in sizes.items()},
    joint=joint,
    norm=norm,
  )


def points(ball, key, count):
  """Points of the ball, most of them on its surface."""
  norms = dict(ball.norm)
  directions = {}
  for index, (name, x) in enumerate(sorted(ball.center.items())):
    drawn = jax.random.normal(jax.random.fold_in(key, index), (count, *x.shape))
    flat = jnp.reshape(drawn, (count, -1))
    order = {"l2": 2, "linf": np.inf, "l1": 1}[norms.get(name, "l2")]
    size = jnp.linalg.norm(flat, order, axis=-1)
    size = jnp.reshape(size, (count,) + (1,) * x.ndim)
    directions[name] = drawn / size * ball.sizes[name]
  share = jax.random.uniform(jax.random.fold_in(key, 77), (count, 2))
  if ball.joint:
    share = share / jnp.linalg.norm(share, axis=-1, keepdims=True)
  return {
    name: x[None]
    + ball.radius
    * directions[name]
    * jnp.reshape(share[:, i], (count,) + (1,) * x.ndim)
    for i, (name, x) in enumerate(sorted(ball.center.items()))
  }


def check_sound(fn, params, ball, rows, intermediate="both", count=2000):
  network = relaxation.trace(fn, params, ball.center)

  @jax.jit
  def run(params, ball):
    bound = relaxation.lower(
      network.bind(params), ball, rows, intermediate=intermediate
    )
    xs = points(ball, jax.random.key(5), count)
    values = jax.vmap(lambda x: fn(params, x))(xs)
    return bound, jnp.min(values @ rows.T, axis=0)

  bound, smallest = run(params, ball)
  assert np.all(np.asarray(bound) <= np.asarray(smallest))
  return np.asarray(bound), np.asarray(smallest)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("intermediate", ["crown", "interval", "both"])
def test_no_point_of_the_ball_is_below_the_bound(name, intermediate):
  fn = functools.partial(dense, activation=ACTIVATIONS[name])
  rows = jnp.eye(3) - jnp.roll(jnp.eye(3), 1, axis=1)
  for seed in range(3):
    check_sound(fn, dense_params(seed), a_ball(seed, 0.7), rows, intermediate)


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
@pytest.mark.parametrize("joint", [True, False])
def test_balls_of_other_shapes(norm, joint):
  ball = a_ball(3, 1.0, joint, {"a": 0.5, "b": 0.2}, (("a", norm), ("b", norm)))
  check_sound(dense, dense_params(3), ball, jnp.eye(3))


def test_bound_tends_to_the_value():
  rows = jnp.eye(3)
  bound, smallest = check_sound(dense, dense_params(1), a_ball(1, 1e-3), rows)
  assert np.all(smallest - bound < 5e-3)


def test_linear_function_is_exact_and_tight():
  matrix = jax.random.normal(jax.random.key(0), (3, 5))
  ball = a_ball(0, 0.8)

  def fn(params, inputs):
    return params @ inputs["a"] + 2.0 * jnp.sum(inputs["b"])

  network = relaxation.trace(fn, matrix, ball.center)
  found = relaxation.lower(network.bind(matrix), ball, jnp.eye(3))
  reach = np.sqrt(np.sum(np.asarray(matrix) ** 2, axis=1) + 4 * 4)
  exact = np.asarray(fn(matrix, ball.center)) - 0.8 * reach
  np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4)
  # The worst point of a ball 1.2 times as large lies below the bound.
  direction = {"a": matrix[0], "b": 2.0 * jnp.ones(4)}
  worst = jax.tree.map(
    lambda x, d: x - 1.2 * 0.8 * d / reach[0], dict(ball.center), direction
  )
  assert fn(matrix, worst)[0] < found[0]


@pytest.mark.parametrize("net", ["digits_plain", "mfeat_plain"])
def test_margins_equal_an_established_library(shared_path, net):
  with np.load(shared_path / f"reference/certificates/{net}.npz") as file:
    stored = dict(file)
  names = [str(m) for m in stored["modalities"]]
  items = slice(0, None, 9)
  with jax.enable_x64(True):
    params = {
      m: [
        (
          jnp.asarray(stored[f"params/{m}/dense_{i}/kernel"], jnp.float64),
          jnp.asarray(stored[f"params/{m}/dense_{i}/bias"], jnp.float64),
        )
        for i in (0, 1)
      ]
      for m in names
    }
    head = {
      m: jnp.asarray(stored[f"params/head/{m}/kernel"], jnp.float64)
      for m in names
    }
    bias = jnp.asarray(stored["params/head/bias"], jnp.float64)

    def fn(constants, inputs):
      params, head, bias = constants
      for m in names:
        h = inputs[m]
        for kernel, shift in params[m]:
          h = jax.nn.relu(h @ kernel + shift)
        bias = bias + h @ head[m]
      return bias

    inputs = {
      m: jnp.asarray(stored[f"inputs/{m}"][items], jnp.float64) for m in names
    }
    constants = (params, head, bias)
    network = relaxation.trace(
      fn, constants, {m: x[0] for m, x in inputs.items()}
    )

    @functools.partial(jax.jit, static_argnames="intermediate")
    def lower(constants, inputs, prediction, radius, intermediate):
      bound = network.bind(constants)

      def one(x, y):
        rows = jax.nn.one_hot(y, 10)[None] - jnp.eye(10)
        ball = relaxation.Ball(
          center=x,
          radius=radius,
          sizes={m: jnp.ones(()) for m in names},
        )
        return relaxation.lower(bound, ball, rows, intermediate=intermediate)

      return jax.vmap(one)(inputs, prediction)

    prediction = stored["prediction"][items]
    for intermediate, key in (("crown", "crown"), ("interval", "crown_ibp")):
      for index, radius in enumerate(stored["relaxation_eps"]):
        found = lower(constants, inputs, prediction, radius, intermediate)
        reference = stored[f"margin_lower/{key}"][index, items]
        rivals = np.isfinite(reference)
        np.testing.assert_allclose(
          np.asarray(found)[rivals], reference[rivals], rtol=1e-8, atol=1e-8
        )


class Conv(nnx.Module):
  """Convolutions with strides, pooling and a dense layer."""

  def __init__(self, rngs):
    self.first = nnx.Conv(1, 3, (3, 3), strides=2, rngs=rngs)
    self.second = nnx.Conv(3, 4, (3, 3), padding="VALID", rngs=rngs)
    self.last = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.first((x - 0.5) / 0.3))
    x = nnx.leaky_relu(self.second(x))
    x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
    return self.last(jnp.reshape(x, (x.shape[0], -1)))


@pytest.mark.parametrize("intermediate", ["crown", "interval"])
def test_convolutions_of_a_flax_module(intermediate):
  graph, params = nnx.split(Conv(nnx.Rngs(0)))
  center = {"image": jax.random.uniform(jax.random.key(2), (8, 8, 1))}
  ball = relaxation.Ball(
    center=center, radius=jnp.float32(0.2), sizes={"image": jnp.float32(1)}
  )

  def fn(params, inputs):
    return nnx.merge(graph, params)(inputs["image"][None])[0]

  def ball_points(key, count):
    drawn = jax.random.normal(key, (count, 64))
    drawn = 0.2 * drawn / jnp.linalg.norm(drawn, axis=-1, keepdims=True)
    return center["image"][None] + jnp.reshape(drawn, (count, 8, 8, 1))

  network = relaxation.trace(fn, params, center)
  rows = jnp.eye(3)

  @jax.jit
  def run(params):
    bound = relaxation.lower(
      network.bind(params), ball, rows, intermediate=intermediate
    )
    xs = ball_points(jax.random.key(9), 1000)
    values = jax.vmap(lambda x: fn(params, {"image": x}))(xs)
    gradient = jax.jacrev(lambda x: fn(params, {"image": x}))(center["image"])
    return bound, jnp.min(values, axis=0), gradient

  bound, smallest, gradient = run(params)
  assert np.all(np.asarray(bound) <= np.asarray(smallest))
  # Against the gradient, a point of a larger ball lies below.
  reach = 0.6 if intermediate == "crown" else 1.2
  for row in range(3):
    step = gradient[row] / jnp.linalg.norm(gradient[row])
    far = {"image": center["image"] - reach * step}
    assert fn(params, far)[row] < bound[row]


@settings(max_examples=60, deadline=None)
@given(
  low=st.floats(-6, 6, width=32),
  width=st.floats(0, 8, width=32),
  kind=st.sampled_from(
    [
      ("tanh", (0.0, 1.0)),
      ("piecewise", (0.0, 1.0)),
      ("piecewise", (-1.0, 1.0)),
      ("piecewise", (2.0, 0.5)),
    ]
  ),
)
def test_lines_enclose_the_activation(low, width, kind):
  low, high = np.float32(low), np.float32(low + width)
  z = np.linspace(low, high, 401, dtype=np.float32)
  drawn = lines.of(*kind, jnp.asarray(low), jnp.asarray(high))
  value = np.asarray(lines.value(*kind, jnp.asarray(z)))
  below = np.asarray(drawn.lower_slope) * z + float(drawn.lower_shift or 0)
  above = np.asarray(drawn.upper_slope) * z + float(drawn.upper_shift or 0)
  tolerance = 2e-5
  assert np.all(below <= value + tolerance)
  assert np.all(above >= value - tolerance)
  # Each line touches: lifted by little it would cut the curve.
  assert np.min(value - below) < 0.02 + 1e-2 * width**2
  assert np.min(above - value) < 0.02 + 1e-2 * width**2


def test_local_sensitivity_is_a_bound_that_starts_at_the_gradient():
  params, rows = dense_params(4), jnp.eye(3)
  ball = a_ball(4, 0.0)
  network = relaxation.trace(dense, params, ball.center)

  @jax.jit
  def at(radius):
    bound = network.bind(params)
    inside = relaxation.inside(bound, a_ball(4, radius))
    return relaxation.sensitivity(bound, rows, inside)

  gradient = jax.jacrev(lambda x: dense(params, x))(dict(ball.center))
  for name, found in at(1e-6).items():
    exact = jnp.linalg.norm(gradient[name], axis=-1)
    np.testing.assert_allclose(found, exact, rtol=1e-4)
  before = None
  for radius in (1e-6, 0.1, 0.5, 2.0):
    found = at(radius)
    xs = points(a_ball(4, radius), jax.random.key(8), 300)
    slopes = jax.vmap(jax.jacrev(lambda x: dense(params, x)))(xs)
    for name in found:
      steepest = jnp.max(jnp.linalg.norm(slopes[name], axis=-1), axis=0)
      assert np.all(np.asarray(steepest) <= np.asarray(found[name]) * 1.00001)
    if before is not None:
      for name in found:
        assert np.all(np.asarray(found[name]) >= np.asarray(before[name]))
    before = found


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), offset=st.sampled_from([0.0, 1e2, 1e4]))
def test_float32_never_exceeds_float64(seed, offset):
  params = dense_params(seed)
  ball = a_ball(seed, 0.3)

  def fn(params, inputs):
    # An offset of the input that the first layer takes away again.
    return dense(params, {m: (x + offset) - offset for m, x in inputs.items()})

  def bound(params, ball):
    network = relaxation.trace(fn, params, ball.center)
    return relaxation.lower(
      network.bind(params), ball, jnp.eye(3, dtype=ball.radius.dtype)
    )

  single = np.asarray(jax.jit(bound)(params, ball))

  def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)

  with jax.enable_x64(True):
    double = np.asarray(jax.jit(bound)(wide(params), wide(ball)))
  slack = 32 * np.finfo(np.float64).eps * 1e5
  assert np.all(single <= double + slack)


def test_search_returns_confirmed_radii_only():
  limit = jnp.asarray([0.3, 5.0, 0.0])
  tried = []

  def holds(radius):
    tried.append(radius)
    return radius < limit

  found = relaxation.largest(holds, jnp.ones(3), num_steps=20)
  assert np.all(np.asarray(found) <= np.asarray(limit))
  np.testing.assert_allclose(found, limit, atol=1e-4)


@pytest.mark.parametrize(
  ("fn", "word"),
  [
    (lambda c, x: jnp.exp(x["a"]), "exp"),
    (lambda c, x: x["a"] * x["a"][::-1], "mul"),
    (lambda c, x: jnp.where(x["a"] > 0.5, x["a"], 0.0), "gt"),
    (lambda c, x: x["a"].astype(jnp.bfloat16), "bfloat16"),
    (lambda c, x: jnp.where(x["a"] > 0, c, x["a"]), "select_n"),
  ],
)
def test_what_has_no_rule_is_refused_by_name(fn, word):
  with pytest.raises(ValueError, match=word):
    relaxation.trace(fn, jnp.ones(5), {"a": jnp.ones(5)})
