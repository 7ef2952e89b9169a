"""Parameters by block: the leaves with one label."""

from collections.abc import Callable
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from robust_mm import _validate
from robust_mm.linalg import trees

REST = "rest"


class Blocks:
  """Where the leaves of every block are.

  Attributes:
    names: sorted labels.
    gated: those that may close, sorted.
    labels: pytree of str like the parameters.
  """

  def __init__(
    self, params: PyTree, labels: PyTree, gated: Collection[str] | None
  ):
    self.labels = labels
    leaves, self._structure = jax.tree.flatten(params)
    of_leaf, structure = jax.tree.flatten(self.labels)
    # optax.tree.map_params initialises with a tree without leaves.
    if leaves and structure != self._structure:
      raise ValueError(
        f"labels must have the structure of params, {self._structure}; got "
        f"{structure}."
      )
    self.names = tuple(sorted(set(of_leaf)))
    if gated is None:
      self.gated = tuple(name for name in self.names if name != REST)
    else:
      self.gated = tuple(sorted(set(gated)))
    for name in self.gated:
      if name not in self.names:
        raise ValueError(
          f"gated names the label {name!r}, which no parameter has; there are "
          f"{', '.join(self.names)}.{_validate.suggestion(name, self.names)}"
        )
    self._of_leaf = of_leaf
    if leaves and self.gated:
      trees.check_floating(params=self.take(params, self.gated))

  def take(self, tree: PyTree, names: Collection[str]) -> dict[str, list]:
    """``{label: its leaves}``."""
    leaves = jax.tree.leaves(tree)
    return {
      name: [a for a, label in zip(leaves, self._of_leaf) if label == name]
      for name in names
    }

  def put(self, tree: PyTree, parts: dict[str, list]) -> PyTree:
    """``tree`` with the leaves of some blocks replaced."""
    rows = {name: iter(part) for name, part in parts.items()}
    leaves = [
      next(rows[label]) if label in rows else leaf
      for leaf, label in zip(jax.tree.leaves(tree), self._of_leaf)
    ]
    return jax.tree.unflatten(self._structure, leaves)

  def map(self, fn: Callable, *trees: PyTree) -> PyTree:
    """``fn(label, *leaves)`` for every leaf."""
    rows = zip(self._of_leaf, *map(jax.tree.leaves, trees))
    leaves = [fn(*row) for row in rows]
    return jax.tree.unflatten(self._structure, leaves)

  def upcast(self, params: PyTree) -> PyTree:
    """Floating leaves in float32 at least; others as they are."""

    def raised(leaf):
      if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
      return leaf.astype(trees.solve_dtype(leaf))

    return jax.tree.map(raised, params)

  def check_like(self, tree: PyTree, updates: PyTree) -> None:
    """A destructive gradient must be shaped like the ordinary one."""
    if jax.tree.structure(tree) != jax.tree.structure(updates):
      raise ValueError(
        "destructive must have the structure of the gradient, "
        f"{jax.tree.structure(updates)}; got {jax.tree.structure(tree)}."
      )
    pairs = zip(
      jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(updates)
    )
    for (path, leaf), other in pairs:
      if jnp.shape(leaf) != jnp.shape(other):
        raise ValueError(
          f"destructive{jax.tree_util.keystr(path)} must have shape "
          f"{jnp.shape(other)}, got {jnp.shape(leaf)}."
        )


def largest(leaves: list) -> Any:
  """The largest modulus over a block, in float32 at least; NaN stays."""
  found = [jnp.max(jnp.abs(a.astype(trees.solve_dtype(a)))) for a in leaves]
  return jnp.max(jnp.stack(found))


def length(leaves: list) -> Any:
  """The l2 norm of a block; neither overflow nor underflow of squares."""
  peak = largest(leaves)
  safe = jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1)
  return safe * quick_length(
    [a.astype(trees.solve_dtype(a)) / safe for a in leaves]
  )


def quick_length(leaves: list) -> Any:
  """The l2 norm of a block, for every step; inf from about 1e19 on."""
  return jnp.sqrt(sum(map(_square, leaves)))


def _square(leaf) -> Any:
  # A product of vectors: the sum of squares takes ten times as long on a CPU.
  leaf = jnp.asarray(leaf, trees.solve_dtype(leaf))
  axes = tuple(range(leaf.ndim))
  mesh = jax.typeof(leaf).sharding.mesh
  everywhere = jax.sharding.NamedSharding(mesh, jax.P())
  return jax.lax.dot_general(
    leaf,
    leaf,
    ((axes, axes), ((), ())),
    precision="highest",
    out_sharding=None if mesh.empty else everywhere,
  )
