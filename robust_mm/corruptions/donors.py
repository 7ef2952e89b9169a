"""Whose sample an example gets in a swap."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from robust_mm._types import Batch


def swapped(
  keys: Mapping[str, Array], id: Array, label: Any, donors: Batch
) -> dict[str, tuple[Array, Array]]:
  """Another sample for every example and modality.

  Every pair of an example and a donor has a score that is drawn from both ids;
  the highest wins among the donors that have the modality and another label,
  or, where there is none, among those that have it and another id.

  Args:
    keys: ``{m: keys [b]}``, one an example.
    id: ``uint32[b]``.
    label: ``[b]``, or ``[b, k]``, where one other entry is another label.
    donors: ``inputs``, ``present``, ``label`` and ``id`` of n samples.

  Returns:
    ``{m: (inputs [b, ...], bool[b])}``, False where nobody has the modality.

  Raises:
    ValueError: naming ``label`` or ``donors`` if something is missing.
  """
  if label is None:
    raise ValueError("label is missing; swap looks for a different one.")
  for part in ("inputs", "present", "label", "id"):
    if part not in donors or donors[part] is None:
      raise ValueError(f"donors must have {part!r}.")
  donor_id = jnp.asarray(donors["id"]).astype(jnp.uint32)
  donor_label = jnp.asarray(donors["label"])
  label = jnp.asarray(label)
  other = donor_id[None, :] != id[:, None]
  unlike = donor_label[None, :] != label[:, None]
  if unlike.ndim == 3:
    unlike = jnp.any(unlike, axis=-1)
  differs = other & unlike
  return {
    name: _chosen(
      own,
      donor_id,
      jnp.asarray(donors["inputs"][name]),
      differs & jnp.asarray(donors["present"][name])[None, :],
      other & jnp.asarray(donors["present"][name])[None, :],
    )
    for name, own in keys.items()
  }


def _chosen(keys, donor_id, values, preferred, possible):
  allowed = jnp.where(
    jnp.any(preferred, axis=-1, keepdims=True), preferred, possible
  )

  def score(key):
    pair = jax.vmap(lambda number: jax.random.fold_in(key, number))(donor_id)
    return jax.vmap(jax.random.uniform)(pair)

  scores = jnp.where(allowed, jax.vmap(score)(keys), -1.0)
  best = jnp.argmax(scores, axis=-1)
  return _rows(values, best), jnp.any(allowed, axis=-1)


def _rows(values, index):
  """``values[index]``, laid out like the index."""
  spec = jax.typeof(index).sharding.spec
  if not any(spec):
    return jnp.take(values, index, axis=0)
  # On explicit axes a gather has to be told; elsewhere the spec is empty.
  whole = jax.sharding.PartitionSpec(*spec, *[None] * (values.ndim - 1))
  return values.at[index].get(out_sharding=whole)
