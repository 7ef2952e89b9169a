"""Vectors that are pytrees: nothing is ravelled, every leaf stays sharded.

Only scalars are reduced over devices. Leaves keep their own dtype in a model;
the vectors of a solver are float32 (float64 for float64 leaves).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import PRNGKeyArray
from jaxtyping import PyTree


def dot(left: PyTree, right: PyTree) -> Float[Array, ""]:
  """The sum of ``left * right`` over all leaves."""
  # Sums, not vdot: contractions over explicitly sharded axes are refused.
  terms = jax.tree.map(lambda a, b: jnp.sum(a * b), left, right)
  return sum(jax.tree.leaves(terms))


def norm(tree: PyTree) -> Float[Array, ""]:
  """The l2 norm over all leaves."""
  return jnp.sqrt(dot(tree, tree))


def scale(factor, tree: PyTree) -> PyTree:
  """``factor * tree``, leaf by leaf, in the dtype of the leaves."""
  return jax.tree.map(lambda a: jnp.asarray(factor, a.dtype) * a, tree)


def axpy(factor, x: PyTree, y: PyTree) -> PyTree:
  """``factor * x + y``, leaf by leaf, in the dtype of ``y``."""
  return jax.tree.map(
    lambda a, b: jnp.asarray(factor, b.dtype) * a.astype(b.dtype) + b, x, y
  )


def zeros_like(tree: PyTree) -> PyTree:
  """Zeros with the shapes, dtypes and shardings of ``tree``."""
  return jax.tree.map(jnp.zeros_like, tree)


def upcast(tree: PyTree) -> PyTree:
  """Floating leaves in float32 at least; float64 stays."""
  return jax.tree.map(lambda a: a.astype(solve_dtype(a)), tree)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
  """``tree`` with the dtypes of ``like``."""
  return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, like)


def solve_dtype(leaf) -> jnp.dtype:
  """float32, or float64 where the leaf is that."""
  return jnp.promote_types(leaf.dtype, jnp.float32)


def size(tree: PyTree) -> int:
  """How many scalars the leaves hold."""
  return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(tree))


def random_normal(key: PRNGKeyArray, like: PyTree) -> PyTree:
  """Standard normal in every scalar, sharded as ``like``, float32 at least."""
  leaves, structure = jax.tree.flatten(like)
  keys = jax.random.split(key, max(len(leaves), 1))
  drawn = [
    sharded_as(jax.random.normal(key, leaf.shape, solve_dtype(leaf)), leaf)
    for key, leaf in zip(keys, leaves)
  ]
  return jax.tree.unflatten(structure, drawn)


def sharded_as(array: Array, leaf: Array) -> Array:
  """``array`` with the sharding in the type of ``leaf``.

  On meshes with automatic axes, and on one device, the type has none and
  nothing happens.
  """
  sharding = jax.typeof(leaf).sharding
  if jax.typeof(array).sharding == sharding or sharding.mesh.empty:
    return array
  return jax.sharding.reshard(array, sharding)


def check_floating(**trees: PyTree) -> None:
  """Every leaf must be float32, float64 or bfloat16 and not empty.

  Raises:
    ValueError: naming the argument and the path of the leaf.
  """
  for name, tree in trees.items():
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
      raise ValueError(f"{name} must have at least one array.")
    for path, leaf in leaves:
      where = f"{name}{jax.tree_util.keystr(path)}"
      dtype = jnp.result_type(leaf)
      if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{where} must be floating point, got {dtype}.")
      if dtype == jnp.float16:
        raise ValueError(
          f"{where} must be bfloat16, float32 or float64, got float16: "
          "products of small numbers vanish in it."
        )
      if math.prod(np.shape(leaf)) == 0:
        raise ValueError(f"{where} must not be empty, got {np.shape(leaf)}.")
