r"""Hessian, mixed and outer products; nothing is ever formed or ravelled.

With ``inner(theta, phi)`` and ``outer(theta, phi)``:

.. math:: H = \partial^2_{\theta\theta} inner, \quad
  B = \partial^2_{\theta\phi} inner, \quad v = \partial_\theta outer, \quad
  d = \partial_\phi outer

Forward over reverse throughout.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import PRNGKeyArray
from jaxtyping import PyTree

from robust_mm import _convolutions
from robust_mm import linalg
from robust_mm.linalg import trees

# Of the Lanczos iteration for ||B||.
MIXED_STEPS = 8
MIXED_FAILURE = 1e-3


class Linearized(NamedTuple):
  """``inner`` at one point.

  Attributes:
    gradient: of inner in theta.
    hessian: ``t -> H t``.
    mixed: ``t -> B^T t``, like phi.
  """

  gradient: PyTree
  hessian: Callable[[PyTree], PyTree]
  mixed: Callable[[PyTree], PyTree]


def prepare(name: str, function: Callable, batch: Any = None) -> Callable:
  """``(theta, phi) -> scalar``, the batch bound if there is one.

  Raises:
    ValueError: at the call, naming ``name``, if it is not a real scalar.
  """

  def bound(theta: PyTree, phi: PyTree) -> Array:
    rest = () if batch is None else (batch,)
    value = function(theta, phi, *rest)
    shape = jnp.shape(value)
    if shape != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
      raise ValueError(
        f"{name} must return one floating-point scalar, got shape {shape} of "
        f"{jnp.result_type(value)}."
      )
    return value

  return bound


def raise_precision(*arguments: Any) -> tuple:
  """Floating leaves in float32 at least, cut off from differentiation."""

  def up(leaf):
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf
    return jax.lax.stop_gradient(leaf.astype(trees.solve_dtype(leaf)))

  return tuple(jax.tree.map(up, argument) for argument in arguments)


def linearize(inner: Callable, theta: PyTree, phi: PyTree) -> Linearized:
  """One linearisation gives both products; the compiler drops what is unused.

  What one gradient keeps for its backward pass is kept while they are in use.
  """
  gradients = jax.grad(inner, argnums=(0, 1))
  (gradient, _), push = jax.linearize(lambda t: gradients(t, phi), theta)
  return Linearized(
    gradient=gradient,
    hessian=lambda vector: _convolutions.canonical(push, vector)[0],
    mixed=lambda vector: _convolutions.canonical(push, vector)[1],
  )


def columns(
  inner: Callable, theta: PyTree, phi: PyTree
) -> Callable[[PyTree], PyTree]:
  """``f -> B f``, like theta."""
  gradient = jax.grad(inner)
  _, push = jax.linearize(lambda f: gradient(theta, f), phi)
  return lambda vector: _convolutions.canonical(push, vector)


def basis_vector(index: Array, like: PyTree) -> PyTree:
  """1 in the scalar number ``index`` of a small pytree, 0 elsewhere."""
  leaves, structure = jax.tree.flatten(like)
  made, offset = [], 0
  for leaf in leaves:
    hot = jnp.arange(offset, offset + leaf.size) == index
    hot = jnp.reshape(hot, leaf.shape).astype(leaf.dtype)
    made.append(trees.sharded_as(hot, leaf))
    offset += leaf.size
  return jax.tree.unflatten(structure, made)


def unravel(values: Array, like: PyTree) -> PyTree:
  """``[N]`` numbers as a pytree like a small ``like``."""
  leaves, structure = jax.tree.flatten(like)
  made, offset = [], 0
  for leaf in leaves:
    part = jnp.reshape(values[offset : offset + leaf.size], leaf.shape)
    made.append(trees.sharded_as(part, leaf))
    offset += leaf.size
  return jax.tree.unflatten(structure, made)


def column_norms(push: Callable, phi: PyTree) -> Float[Array, " n"]:
  """``||B e_j||`` for every scalar of phi, one column at a time."""
  return jax.lax.map(
    lambda j: trees.norm(push(basis_vector(j, phi))),
    jnp.arange(trees.size(phi)),
  )


def lanczos_mixed_norm(
  push: Callable,
  mixed: Callable,
  phi: PyTree,
  key: PRNGKeyArray,
  failure_probability: float,
) -> Float[Array, ""]:
  """A bound of ``||B||`` by the spectrum of ``B^T B``."""
  found = linalg.spectral_bounds(
    lambda f: mixed(push(f)),
    phi,
    key,
    num_steps=MIXED_STEPS,
    failure_probability=failure_probability,
    positive=True,
  )
  return jnp.sqrt(found.upper)


def mixed_norm(
  inner: Callable,
  theta: PyTree,
  phi: PyTree,
  key: PRNGKeyArray,
  *,
  failure_probability: float = MIXED_FAILURE,
) -> Float[Array, ""]:
  r"""An upper bound of ``||B||``, the norm of the mixed second derivative.

  From 8 steps of Lanczos iteration on :math:`B^T B`, or fewer where phi has
  fewer scalars.

  Formal guarantees: it holds with probability ``1 - failure_probability`` over
  the start vector, in exact arithmetic.

  >>> inner = lambda theta, phi: theta @ (jnp.array([3.0, 4.0]) * phi)
  >>> key = jax.random.key(0)
  >>> round(float(mixed_norm(inner, jnp.zeros(2), jnp.array(1.0), key)), 2)
  5.0

  Args:
    inner: ``inner(theta, phi) -> scalar``.
    theta: floating pytree.
    phi: floating pytree.
    key: of the start.
    failure_probability: in (0, 1).

  Raises:
    ValueError: naming the argument.
  """
  trees.check_floating(theta=theta, phi=phi)
  theta, phi = raise_precision(theta, phi)
  bound = prepare("inner", inner)
  with jax.default_matmul_precision("highest"):
    push = columns(bound, theta, phi)
    mixed = linearize(bound, theta, phi).mixed
    return lanczos_mixed_norm(push, mixed, phi, key, failure_probability)


def asymmetry(
  inner: Callable,
  theta: PyTree,
  phi: PyTree,
  key: PRNGKeyArray,
  inner_batch: Any = None,
) -> Float[Array, ""]:
  r"""How far the product with H is from symmetric; for debugging.

  .. math:: |\langle a, Hb\rangle - \langle b, Ha\rangle| / (\|a\| \|Hb\|)

  for two Gaussian vectors. More than 1e-4 in float32 says that the product is
  no Hessian, or that its arithmetic is too coarse: a custom derivative that is
  not one, noise that changes between calls, low-precision products.

  >>> inner = lambda theta, phi: phi * (theta**4).sum()
  >>> args = jnp.arange(3.0), jnp.array(1.0), jax.random.key(0)
  >>> bool(asymmetry(inner, *args) < 1e-4)
  True
  """
  trees.check_floating(theta=theta, phi=phi)
  theta, phi, inner_batch = raise_precision(theta, phi, inner_batch)
  first, second = jax.random.split(key)
  with jax.default_matmul_precision("highest"):
    products = linearize(prepare("inner", inner, inner_batch), theta, phi)
    a = trees.random_normal(first, theta)
    b = trees.random_normal(second, theta)
    image = products.hessian(b)
    gap = trees.dot(a, image) - trees.dot(b, products.hessian(a))
    return jnp.abs(gap) / (trees.norm(a) * trees.norm(image))
