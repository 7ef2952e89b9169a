"""What an optimiser gets to see of a destructive gradient."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

POLICIES = ("mask", "separate", "freeze")
# The group of parameters without a gate.
_ALWAYS = "(always open)"


class Separate(NamedTuple):
  """``inner_state`` of policy "separate"."""

  inner: Any
  destructive: Any


def dtype_kept(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Updates with the dtypes of the gradient, state with those it had.

  ``lax.cond`` wants equal types in both branches, and a state whose types drift
  compiles twice.
  """
  inner = optax.with_extra_args_support(inner)

  def update_fn(updates, state, params=None, **extra):
    given = updates
    updates, after = inner.update(updates, state, params, **extra)
    return _like(updates, given), _like(after, state)

  return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _like(tree: PyTree, reference: PyTree) -> PyTree:
  def cast(leaf, other):
    dtype = getattr(other, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
      return leaf
    return jnp.asarray(leaf, dtype)

  return jax.tree.map(cast, tree, reference)


def gated_by_block(
  inner: optax.GradientTransformation, labels: PyTree, gated: tuple[str, ...]
) -> optax.GradientTransformationExtraArgs:
  """``inner`` block by block; a closed one has zero updates, its state rests.

  ``update(..., gates={label: bool})`` says which are open. Parameters without a
  gate go together into one more ``inner``.
  """

  def held(label):
    return optax.transforms.conditionally_mask(
      inner,
      lambda step, *, gates, **_: gates[label],
      forward_extra_args=True,
    )

  transforms = {label: held(label) for label in gated}
  transforms[_ALWAYS] = inner
  groups = jax.tree.map(
    lambda label: label if label in gated else _ALWAYS, labels
  )
  return optax.partition(transforms, groups)
