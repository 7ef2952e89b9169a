"""Subsets of modalities, presence masks, stacking in one fixed order."""

import itertools
from collections.abc import Iterable
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm._types import Batch
from robust_mm._types import Inputs
from robust_mm._types import Present


def names(mapping: Iterable[str]) -> tuple[str, ...]:
  """Modality names in the one order everything is stacked in: sorted.

  Pytree maps return dicts sorted by key while models may build them in another
  order, so nothing in the project relies on insertion order.
  """
  return tuple(sorted(mapping))


def stack(mapping: Mapping, axis: int = 0) -> Array:
  """Stacks per-modality arrays of one shape along ``axis``, sorted by name."""
  return jnp.stack([mapping[name] for name in names(mapping)], axis=axis)


def subsets(
  modalities: Iterable[str], *, min_size: int = 1
) -> tuple[tuple[str, ...], ...]:
  """All subsets with at least ``min_size`` modalities, small ones first.

  >>> subsets(["b", "a"])
  (('a',), ('b',), ('a', 'b'))
  """
  ordered = names(modalities)
  return tuple(
    subset
    for size in range(min_size, len(ordered) + 1)
    for subset in itertools.combinations(ordered, size)
  )


def subset_name(subset: Iterable[str]) -> str:
  """The name of a subset in reports and files: ``"left+right"``."""
  return "+".join(names(subset))


def select(tree: Mapping, subset: Iterable[str]) -> dict:
  """The entries of ``subset``; ValueError for an unknown name."""
  subset = names(subset)
  _validate.known(names(tree), modalities=subset)
  return {name: tree[name] for name in subset}


def restrict(batch: Batch, subset: Iterable[str]) -> dict:
  """Marks every modality outside ``subset`` as absent and zeroes its input."""
  subset = names(subset)
  _validate.known(names(batch["inputs"]), modalities=subset)
  keep = {name: name in subset for name in batch["inputs"]}
  present = {
    name: value & keep[name] for name, value in batch["present"].items()
  }
  return {**batch, "present": present, "inputs": mask(batch["inputs"], present)}


def mask(inputs: Inputs, present: Present) -> dict:
  """Inputs with absent examples replaced by zeros, NaN in them included.

  ``jnp.where`` selects, it does not multiply: neither the value nor the
  gradient of an absent input reaches the result.
  """
  return {
    name: jnp.where(_expand(present[name], value), value, jnp.zeros_like(value))
    for name, value in inputs.items()
  }


def share(present: Mapping[str, Bool[Array, " b"]]) -> Float[Array, " b"]:
  """The weight of a modality in a mean: 1 / number present, 1 with none."""
  number = jnp.sum(stack(present, axis=-1), axis=-1, dtype=int)
  return 1 / jnp.maximum(number, 1).astype(jnp.result_type(float))


def random_presence(
  key: PRNGKeyArray, present: Mapping[str, Bool[Array, " b"]]
) -> dict[str, Bool[Array, " b"]]:
  """A random non-empty subset of the present modalities, per example.

  Every non-empty subset of the modalities an example has is equally likely;
  an example with none keeps none.
  """
  ordered = names(present)
  present_matrix = stack(present, axis=-1)
  choices = jnp.array(
    [[name in subset for name in ordered] for subset in subsets(ordered)]
  )
  # A choice is allowed when it asks only for modalities the example has.
  allowed = jnp.all(~choices[None] | present_matrix[:, None], axis=-1)
  logits = jnp.where(allowed, 0.0, -jnp.inf)
  anything = jnp.any(present_matrix, axis=-1)
  logits = jnp.where(anything[:, None], logits, 0.0)
  index = jax.random.categorical(key, logits, axis=-1)
  chosen = choices[index] & present_matrix
  return {name: chosen[:, i] for i, name in enumerate(ordered)}


def _expand(flag, like):
  return jnp.reshape(flag, flag.shape + (1,) * (like.ndim - flag.ndim))
