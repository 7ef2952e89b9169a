"""Subsets of modalities, presence masks, what each of them is worth."""

import itertools
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm._types import Batch
from robust_mm._types import Inputs
from robust_mm._types import Params
from robust_mm._types import Present

GAINS = ("hinge", "squared")


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


def availability_sets(
  modalities: Iterable[str], *, most: int = 6
) -> tuple[tuple[str, ...], ...]:
  """What a model is asked to do without: every non-empty subset.

  Of more than ``most`` modalities only each alone, all but each, and all.

  >>> len(availability_sets("abcdef")), len(availability_sets("abcdefg"))
  (63, 15)
  """
  ordered = names(modalities)
  if len(ordered) <= most:
    return subsets(ordered)
  return tuple(
    s
    for k in (1, len(ordered) - 1, len(ordered))
    for s in itertools.combinations(ordered, k)
  )


def left_by_set(present: Present) -> dict[str, Bool[Array, "s b"]]:
  """Presence within each of :func:`availability_sets`, stacked."""
  sets = availability_sets(present)
  return {
    name: jnp.stack([flag & (name in subset) for subset in sets])
    for name, flag in present.items()
  }


def subset_name(subset: Iterable[str]) -> str:
  """The name of a subset in reports and files: ``"left+right"``."""
  return "+".join(names(subset))


def check_sizes(
  argument: str, sizes: Any, known: tuple[str, ...], shape: tuple[int, ...]
) -> None:
  """ValueError unless ``{m: size}`` has numbers, one or one an example.

  Args:
    argument: what the sentence calls them.
    sizes: that were given.
    known: modalities.
    shape: of one number an example, ``[b]``.
  """
  if not isinstance(sizes, Mapping):
    raise ValueError(
      f"{argument} must map modalities to sizes, such as "
      f"{{{known[0]!r}: 0.1}}; got {sizes!r}."
    )
  _validate.known(known, **{argument: sizes})
  for name, size in sizes.items():
    value = size if hasattr(size, "dtype") else np.asarray(size)
    label = f"{argument}[{name!r}]"
    if not jnp.issubdtype(value.dtype, jnp.number):
      raise ValueError(f"{label} must be a number, got {size!r}.")
    if value.shape not in ((), shape):
      raise ValueError(
        f"{label} must be one number, or one for each example of shape "
        f"{shape}; got shape {value.shape}."
      )


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
  return 1 / jnp.maximum(_number(present), 1).astype(jnp.result_type(float))


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


def without(batch: Batch, name: str) -> dict:
  """Marks one modality as absent, but for examples that have no other.

  An example whose only modality is ``name`` keeps it: there is nothing to be
  learnt from, or measured on, an example with nothing.
  """
  _validate.known(names(batch["inputs"]), name=[name])
  present = batch["present"]
  left = {**present, name: present[name] & (_number(present) < 2)}
  return {**batch, "present": left, "inputs": mask(batch["inputs"], left)}


def removed(present: Present, arm: int | Array) -> dict[str, Bool[Array, " b"]]:
  """``present`` without modality number ``arm`` in sorted order.

  :func:`without` for a number that may be traced: an example whose only
  modality it is keeps it, and a number beyond the last removes none.
  """
  many = _number(present) > 1
  return {
    name: present[name] & ~((arm == index) & many)
    for index, name in enumerate(names(present))
  }


def leave_one_out(
  loss_fn: Callable[[Params, Batch], Array], params: Params, batch: Batch
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  r"""The loss of a batch, and the loss without each modality in turn.

  All of them in one vectorised evaluation, without gradients. Ask for it on a
  held-out batch, in evaluation mode.

  >>> def loss_fn(params, batch):
  ...   return sum(jnp.mean(x) for x in batch["inputs"].values())
  >>> batch = {
  ...   "inputs": {"a": jnp.full((2, 1), 3.0), "b": jnp.full((2, 1), 5.0)},
  ...   "present": {"a": jnp.ones(2, bool), "b": jnp.ones(2, bool)},
  ... }
  >>> full, left_out = leave_one_out(loss_fn, None, batch)
  >>> float(full), {m: float(loss) for m, loss in left_out.items()}
  (8.0, {'a': 5.0, 'b': 3.0})

  Args:
    loss_fn: ``loss_fn(params, batch) -> scalar``.
    params: handed to it.
    batch: ``inputs`` and ``present``, and what else the loss reads.

  Returns:
    ``(full, {m: loss without m})``; an example that has only m keeps it.

  Raises:
    ValueError: naming ``batch`` if it has fewer than two modalities.
  """
  ordered = names(batch["inputs"])
  if len(ordered) < 2:
    raise ValueError(
      f"batch must have at least two modalities, got {', '.join(ordered)}."
    )
  every = [batch["present"]]
  every += [without(batch, name)["present"] for name in ordered]
  every = [{name: one[name] for name in ordered} for one in every]
  stacked = jax.tree.map(lambda *flags: jnp.stack(flags), *every)

  def evaluate(present):
    inputs = mask(batch["inputs"], present)
    return loss_fn(params, {**batch, "present": present, "inputs": inputs})

  found = jax.lax.stop_gradient(jax.vmap(evaluate)(stacked))
  return found[0], {name: found[i + 1] for i, name in enumerate(ordered)}


def information_gain(
  full: float | Array,
  left_out: Mapping[str, float | Array],
  *,
  mode: str = "hinge",
) -> dict[str, Array]:
  r"""How much a loss rises without each modality.

  .. math:: G_m = \max(0, \ell_{-m} - \ell) \quad \text{(hinge)}, \qquad
            I_m = (\ell_{-m} - \ell)^2 \quad \text{(squared)}

  Neither is a conditional mutual information or a causal effect: it is what
  *this* model predicts worse. The squared form, as published, also rewards a
  modality whose removal improves the loss.

  >>> gains = information_gain(1.0, {"helps": 1.5, "harms": 0.5})
  >>> {m: float(gain) for m, gain in gains.items()}
  {'helps': 0.5, 'harms': 0.0}

  Args:
    full: the loss with everything, as :func:`leave_one_out` gives it.
    left_out: ``{m: loss without m}``.
    mode: ``"hinge"`` or ``"squared"``.

  Returns:
    ``{m: gain}``, non-negative; a NaN stays one, and has reward 0 in
    ``controllers.scale_gains``.
  """
  _validate.one_of(GAINS, mode=mode)
  rise = {name: jnp.asarray(loss) - full for name, loss in left_out.items()}
  if mode == "squared":
    return {name: jnp.square(value) for name, value in rise.items()}
  return {name: jnp.maximum(value, 0) for name, value in rise.items()}


def _number(present: Present) -> Array:
  """How many modalities every example has."""
  return jnp.sum(stack(present, axis=-1), axis=-1, dtype=int)


def _expand(flag, like):
  return jnp.reshape(flag, flag.shape + (1,) * (like.ndim - flag.ndim))
