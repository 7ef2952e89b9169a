"""The implicit function as a function: plain ``jax.grad`` goes through it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PRNGKeyArray
from jaxtyping import PyTree

from robust_mm.hypergrad import door
from robust_mm.hypergrad import engine
from robust_mm.hypergrad import products
from robust_mm.linalg import trees


def attach(
  inner: Callable,
  *,
  solver: Any = door.DEFAULT,
  operator: Any = door.DEFAULT,
  bounds: Any = door.DEFAULT,
) -> Callable:
  r"""``fn(theta, phi)`` is theta, with the derivative of a minimum of inner.

  .. math:: \bar\phi = -B^T A^{-1} \bar\theta, \qquad \text{nothing to } \theta

  Any code after it is differentiated by ``jax.grad``, the direct dependence on
  phi included: the gradient is that of :func:`hypergradient` with the same
  values and key. A backward pass has no place for evidence: nothing is skipped
  and nothing said where the solve is bad. ``jax.jacrev`` differentiates the
  truncated operator exactly with ``neumann`` only, which is linear.

  >>> inner = lambda theta, phi: 0.5 * ((theta - phi) ** 2).sum()
  >>> minimum = attach(inner, operator=ift())
  >>> theta = jnp.array([1.0, -2.0])
  >>> found = jax.grad(lambda phi: (minimum(theta, phi) ** 2).sum())(theta)
  >>> found.round(3).tolist()
  [2.0, -4.0]

  Args:
    inner: ``inner(theta, phi) -> scalar`` or ``inner(theta, phi, batch)``.
    solver: see :func:`hypergradient`, as the next two.
    operator: A.
    bounds: ends of the spectrum of the Hessian.

  Returns:
    ``fn(theta, phi, inner_batch=None, *, key=None) -> theta``. Without a key
    the random start of the bounds is always the same one: give a fresh key
    where their probability matters.

  Raises:
    ValueError: naming the argument that is wrong.

  References:
    `Lorraine et al. (2020) <https://arxiv.org/abs/1911.02590>`_.
  """
  solver, operator, bounds = door.values(solver, operator, bounds)

  @jax.custom_vjp
  def identify(theta, phi, batch, key):
    del phi, batch, key
    return theta

  def forward(theta, phi, batch, key):
    return theta, (theta, phi, batch, key)

  def backward(saved, cotangent):
    theta, phi, batch, key = saved
    problem = engine.pose(inner, _none, theta, phi, batch)
    (rhs,) = products.raise_precision(cotangent)
    with jax.default_matmul_precision("highest"):
      point = products.linearize(problem.inner, problem.theta, problem.phi)
      start = jax.random.split(key)[0]
      spectrum = engine.measure(bounds, point.hessian, problem.theta, start)
      system = operator(point.hessian, spectrum)
      found = engine.solve(solver, system, rhs)
      back = trees.scale(-1, point.mixed(found.x))
    back = jax.tree.map(lambda g, dtype: g.astype(dtype), back, problem.dtypes)
    return trees.zeros_like(theta), back, None, None

  identify.defvjp(forward, backward)

  @functools.wraps(identify, assigned=(), updated=())
  def minimum(
    theta: PyTree,
    phi: PyTree,
    inner_batch: Any = None,
    *,
    key: PRNGKeyArray | None = None,
  ) -> PyTree:
    trees.check_floating(theta=theta, phi=phi)
    key = jax.random.key(0) if key is None else key
    theta, phi = jax.tree.map(jax.numpy.asarray, (theta, phi))
    return identify(theta, phi, inner_batch, key)

  return minimum


def _none(theta, phi):
  del phi
  return sum(leaf.sum() for leaf in jax.tree.leaves(theta))
