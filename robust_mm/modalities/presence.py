"""Which modalities an example has: masks, and random subsets of them."""

from collections.abc import Iterable
from collections.abc import Mapping

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
from robust_mm._types import Present
from robust_mm.modalities.sets import as_subset
from robust_mm.modalities.sets import availability_sets
from robust_mm.modalities.sets import names
from robust_mm.modalities.sets import subsets

DISTRIBUTIONS = ("uniform", "size_first", "leave_one_out")


def stack(mapping: Mapping, axis: int = 0) -> Array:
  """Stacks per-modality arrays of one shape along ``axis``, sorted by name."""
  return jnp.stack([mapping[name] for name in names(mapping)], axis=axis)


def left_by_set(present: Present) -> dict[str, Bool[Array, "s b"]]:
  """Presence within each of :func:`availability_sets`, stacked."""
  sets = availability_sets(present)
  return {
    name: jnp.stack([flag & (name in subset) for subset in sets])
    for name, flag in present.items()
  }


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
  return _draw(key, jnp.where(allowed, 0.0, -jnp.inf), choices, ordered)


def sample_subsets(
  key: PRNGKeyArray,
  present: Mapping[str, Bool[Array, " b"]],
  labelled: Iterable[str],
  distribution: str = "uniform",
  *,
  include_labelled: bool = False,
) -> dict[str, Bool[Array, " b"]]:
  r"""One random set of modalities an example, for what learns without labels.

  Drawn among the non-empty subsets of what an example has, other than the part
  it has of T (that is where its teacher looks; a student there learns nothing):

  ===============  ======================================================
  uniform          every allowed subset alike
  size_first       every size that an allowed subset has alike, then every
                   allowed subset of that size
  leave_one_out    what the example has, without one of them, alike
  ===============  ======================================================

  An example without an allowed subset gets none: all of its entries are False,
  and ``distillation.item_weights`` is 0 there. The table of all
  :math:`2^n - 1` subsets is static, the draw happens inside ``jit``.

  Args:
    key: of the draw; examples are independent.
    present: ``{m: bool[b]}``, what every example has.
    labelled: T, static.
    distribution: one of :data:`DISTRIBUTIONS`.
    include_labelled: lets T be drawn too, where the distribution reaches it.

  Returns:
    ``{m: bool[b]}``, the subset of each example.

  Raises:
    ValueError: naming ``labelled`` if it is empty, has a name twice or an
      unknown one, or ``distribution``.
  """
  _validate.one_of(DISTRIBUTIONS, distribution=distribution)
  labelled = as_subset(labelled, argument="labelled")
  ordered = names(present)
  _validate.known(ordered, labelled=labelled)
  there = stack(present, axis=-1)
  table = np.array(
    [[name in subset for name in ordered] for subset in subsets(ordered)]
  )
  sizes = table.sum(axis=-1)
  allowed = jnp.all(~table[None] | there[:, None], axis=-1)
  if distribution == "leave_one_out":
    allowed &= sizes[None] == jnp.sum(there, axis=-1, keepdims=True) - 1
  if not include_labelled:
    seen = there & np.isin(ordered, labelled)[None]
    allowed &= jnp.any(table[None] != seen[:, None], axis=-1)
  logits = jnp.zeros(allowed.shape)
  if distribution == "size_first":
    alike = (sizes[:, None] == sizes[None]).astype(np.float32)
    # How many allowed subsets share the size; exact below 2^24.
    count = jnp.einsum("bs,st->bt", allowed.astype(jnp.float32), alike)
    logits = -jnp.log(jnp.maximum(count, 1))
  return _draw(key, jnp.where(allowed, logits, -jnp.inf), table, ordered)


def without(batch: Batch, name: str) -> dict:
  """Marks one modality as absent, but for examples that have no other.

  An example whose only modality is ``name`` keeps it: there is nothing to be
  learnt from, or measured on, an example with nothing.
  """
  _validate.known(names(batch["inputs"]), name=[name])
  present = batch["present"]
  left = {**present, name: present[name] & (_number(present) < 2)}
  return {**batch, "present": left, "inputs": mask(batch["inputs"], left)}


def recombine(batch: Batch, rows: Mapping) -> dict:
  """New examples, of each modality other rows of a batch.

  The result has ``classes`` {m: int[b]}, what each modality is of, beside the
  labels, which stay.

  Args:
    batch: ``{"inputs", "present", "label"}``, of NumPy or JAX arrays.
    rows: ``{m: int[b]}``.
  """
  return {
    **batch,
    "inputs": {m: batch["inputs"][m][chosen] for m, chosen in rows.items()},
    "present": {m: batch["present"][m][chosen] for m, chosen in rows.items()},
    "classes": {m: batch["label"][chosen] for m, chosen in rows.items()},
  }


def stagger(batch: Batch, step: int = 1) -> dict:
  """:func:`recombine`, modality i ``i * step`` examples on; 0 changes none."""
  rows = np.arange(batch["label"].shape[0])
  shifted = enumerate(names(batch["inputs"]))
  return recombine(batch, {m: np.roll(rows, i * step) for i, m in shifted})


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


def _number(present: Present) -> Array:
  """How many modalities every example has."""
  return jnp.sum(stack(present, axis=-1), axis=-1, dtype=int)


def _expand(flag, like):
  return jnp.reshape(flag, flag.shape + (1,) * (like.ndim - flag.ndim))


def _draw(key, logits, table, ordered) -> dict[str, Array]:
  """A row of the table an example; none where every logit is -inf."""
  anything = jnp.any(logits > -jnp.inf, axis=-1, keepdims=True)
  # A categorical over nothing but -inf silently returns 0.
  safe = jnp.where(anything, logits, 0.0)
  index = jax.random.categorical(key, safe, axis=-1)
  chosen = jnp.asarray(table)[index] & anything
  return {name: chosen[:, i] for i, name in enumerate(ordered)}
