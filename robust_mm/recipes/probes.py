r"""Unimodal probes: what one modality's embeddings say by themselves.

Negative feedback (our reading of the article): a probe learns the label from
:math:`Z_m` alone, and the encoder of the attacked modality climbs the loss that
its probe descends. While a probe is at chance there is nothing to climb.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import modalities
from robust_mm.models import masked
from robust_mm.recipes import objectives


def init(key, embedding_dims: Mapping[str, int], num_classes: int) -> dict:
  """``{m: one dense layer}``."""
  return {
    name: masked.dense(
      jax.random.fold_in(key, i), embedding_dims[name], num_classes
    )
    for i, name in enumerate(modalities.names(embedding_dims))
  }


def losses(probes, embeddings, present, label):
  """``[M]`` cross-entropies over the rows that have the modality."""
  return jnp.stack(
    [
      objectives.classification(
        masked.apply(probes[name], embeddings[name]),
        {"label": label, "present": {name: present[name]}},
      )
      for name in modalities.names(probes)
    ]
  )


def bounded(probes, embeddings, present, label):
  """``[M]`` losses, at most chance, ``log k``; none reaches the probes."""
  found = losses(jax.lax.stop_gradient(probes), embeddings, present, label)
  size = next(iter(probes.values()))["bias"].size
  return jnp.minimum(found, np.log(size).astype(np.float32))


def feedback(probes, embeddings, present, label, arm):
  """Minus the bounded loss of the attacked modality; 0 beyond the last arm."""
  found = bounded(probes, embeddings, present, label)
  return -jnp.sum(jnp.where(jnp.arange(len(found)) == arm, found, 0))
