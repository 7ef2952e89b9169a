"""A head that knows which modalities are missing: null vectors and an MLP."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm import modalities
from robust_mm._types import Outputs
from robust_mm._types import Params


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedFusion:
  r"""Two dense layers on embeddings, a learnt vector in place of absent ones.

  .. math:: u = [\,present_m \;?\; \phi_m : null_m\,]_m, \qquad
            logits = V\, gelu(W u + b) + c

  The logits are no sum of per-modality terms: no scores, no geometry; certify
  by smoothing.

  Formal guarantees:
    - Where a modality is absent neither a value nor a gradient of its embedding
      passes, NaN included: it is selected, not multiplied.

  Attributes:
    num_classes: k; 1 for the number of a regression.
    width: of the hidden layer.

  Parameters: ``null/<m>`` [d_m], ``hidden/kernel`` [sum d_m, width],
  ``hidden/bias``, ``last/kernel`` [width, k], ``last/bias``.
  """

  num_classes: int
  width: int = 128

  def __post_init__(self):
    _validate.at_least(1, num_classes=self.num_classes)
    _validate.at_least(1, width=self.width)

  def init(
    self, key: PRNGKeyArray, embedding_dims: Mapping[str, int]
  ) -> dict[str, Any]:
    """Layers with the variance of ``nnx.Linear``; null vectors of zeros."""
    first, second = jax.random.split(key)
    return {
      "null": {n: jnp.zeros(embedding_dims[n]) for n in embedding_dims},
      "hidden": dense(first, sum(embedding_dims.values()), self.width),
      "last": dense(second, self.width, self.num_classes),
    }

  def __call__(
    self,
    params: Params,
    embeddings: Mapping[str, Array],
    present: Mapping[str, Array],
  ) -> Outputs:
    """Logits only."""
    parts = [
      jnp.where(
        present[name][:, None],
        embeddings[name],
        params["null"][name][None].astype(embeddings[name].dtype),
      )
      for name in modalities.names(params["null"])
    ]
    hidden = apply(params["hidden"], jnp.concatenate(parts, axis=-1))
    return Outputs(
      logits=apply(params["last"], jax.nn.gelu(hidden)),
      scores=None,
      embeddings=modalities.mask(embeddings, present),
      mixed=True,
    )


def dense(key: PRNGKeyArray, size: int, width: int) -> dict[str, Array]:
  """Parameters of a dense layer: LeCun normal, zero bias."""
  kernel = jax.nn.initializers.lecun_normal()(key, (size, width))
  return {"kernel": kernel, "bias": jnp.zeros(width)}


def apply(layer: Params, x: Array) -> Array:
  """``x W + b``."""
  return jnp.einsum("bd,de->be", x, layer["kernel"]) + layer["bias"][None]
