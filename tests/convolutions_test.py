"""Convolutions inside loops: the layout that is fast on a CPU, same numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_mm import _convolutions
from robust_mm import curvature
from robust_mm import hypergrad
from robust_mm import masking


def layouts(program, *args) -> set[str]:
  """Of the kernels of all convolutions of a compiled program."""
  text = jax.jit(program).lower(*args).compile().as_text()
  labels = re.findall(r" convolution\(.*dim_labels=(\S+?)[, ]", text)
  assert labels
  return {label.split("_")[1].split("-")[0] for label in labels}


def network(params, x):
  x = jax.lax.conv_general_dilated(
    x, params["first"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
  )
  x = jax.lax.conv_general_dilated(
    jnp.tanh(x),
    params["last"],
    (1,),
    "SAME",
    dimension_numbers=("NWC", "WIO", "NWC"),
  )
  return jnp.mean(x, axis=1)


@pytest.fixture(name="problem")
def _problem():
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), "f4")

  params = {"first": draw(3, 2, 4), "last": draw(3, 4, 5)}
  return params, draw(6, 12, 2)


@pytest.mark.parametrize(
  "numbers", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")]
)
def test_canonical_convolutions_change_no_number(numbers):
  rng = np.random.default_rng(0)
  kernel = jnp.asarray(rng.normal(size=(3, 2, 4, 6)), "f4")
  x = jnp.asarray(rng.normal(size=(5, 9, 8, 4)), "f4")
  if numbers[0] == "NCHW":
    kernel, x = jnp.transpose(kernel, (3, 2, 0, 1)), jnp.moveaxis(x, -1, 1)

  @jax.jit
  def loss(kernel, x):
    y = jax.lax.conv_general_dilated(
      x, kernel, (2, 1), "SAME", dimension_numbers=numbers
    )
    return jnp.sum(jnp.sin(y)), y

  both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  expected = both(kernel, x)
  actual = jax.jit(lambda *a: _convolutions.canonical(both, *a))(kernel, x)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4),
    actual,
    expected,
  )

  def step(x, _):
    return _convolutions.canonical(both, kernel, x)[1][1], None

  program = jax.jit(lambda x: jax.lax.scan(step, x, None, length=2)[0])
  text = program.lower(x).compile().as_text()
  layouts = set(re.findall(r" convolution\(.*dim_labels=(\S+?)[, ]", text))
  assert layouts
  assert all(layout.split("_")[1][:3] == "01i" for layout in layouts)


def test_products_of_a_hessian_stay_fast_in_a_loop(problem):
  params, x = problem

  def ends(params, key):
    return curvature.spectrum_ends(
      lambda p: jnp.sum(network(p, x) ** 2), params, key, num_steps=8
    )

  assert layouts(ends, params, jax.random.key(0)) == {"0io"}


def test_a_gate_stays_fast_behind_its_condition(problem):
  params, x = problem
  tx = masking.curvature_mask(
    optax.sgd(0.1),
    lambda params: jax.tree.map(lambda _: "a", params),
    gate=masking.hessian_gate(num_steps=10),
  )
  state = tx.init(params)

  def step(params, state):
    return tx.update(
      params,
      state,
      params,
      destructive=params,
      value_fn=lambda p: jnp.sum(network(p, x) ** 2),
    )

  assert layouts(step, params, state) == {"0io"}


def test_a_hypergradient_stays_fast_in_its_solver(problem):
  params, x = problem

  def inner(theta, phi):
    penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(theta))
    return jnp.sum(network(theta, x) ** 2) + jnp.exp(phi) * penalty

  fn = hypergrad.hypergradient(
    inner, lambda theta, phi: jnp.sum(network(theta, x) ** 4)
  )
  found = layouts(
    lambda theta, key: fn(theta, jnp.zeros(()), key=key),
    params,
    jax.random.key(0),
  )
  assert found == {"0io"}
