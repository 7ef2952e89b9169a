"""A fusion head that mixes modalities and still carries a certificate."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm import modalities
from robust_mm._types import Geometry
from robust_mm._types import Outputs
from robust_mm._types import Params
from robust_mm.models import functional
from robust_mm.models import fusion as fusion_lib
from robust_mm.models import lipschitz

BLOCKS = tuple(b for b in lipschitz.DENSE_BLOCKS if b != "projected")


@dataclasses.dataclass(frozen=True, eq=False)
class TrunkFusion:
  r"""A 1-Lipschitz perceptron over all embeddings, and orthonormal rows.

  .. math:: u = F([present_m \, \phi_m]_m), \qquad
    logits_k = a_k \langle W_k, u \rangle, \qquad W W^T = I

  Modalities interact, so the joint radius is that of one network on all inputs
  and often larger than a sum of per-modality scores has; and nothing is known
  about them one by one but their encoders' constants.

  Formal guarantees:
    - :math:`\|F(z) - F(z')\| \le \|z - z'\|`, so a logit difference moves by at
      most :math:`\|V_y - V_j\| \sqrt{\sum_m (L_m \|\delta_m\|)^2}`,
      :math:`V_k = a_k W_k`: the certificate is an ellipsoid of budgets
      (``fusion="joint"``).
    - Weaker than a late-fusion head where several modalities are attacked each
      to its limit, and of no use against removal (``covers(max_missing=...)``
      needs an additive head); a *known* absence is certified as any other.

  Attributes:
    num_classes: k, at most ``embedding_dim``.
    width, num_blocks, embedding_dim, block, stem, num_iters: of the perceptron,
      as in :func:`encoders.lipschitz_mlp`; ``block="projected"`` is for
      encoders only.

  Parameters: ``trunk/...`` of the perceptron, ``head/...`` of
  :class:`OrthogonalFusion` with one modality named ``trunk``.
  """

  num_classes: int
  width: int = 64
  num_blocks: int = 1
  embedding_dim: int = 64
  block: str = "bjorck"
  stem: int | None = None
  num_iters: int = 12

  def __post_init__(self):
    _validate.at_least(2, num_classes=self.num_classes)
    _validate.one_of(BLOCKS, block=self.block)
    self._encoder()  # refuses what does not fit, by name

  def init(
    self, key: PRNGKeyArray, embedding_dims: Mapping[str, int]
  ) -> dict[str, Any]:
    """Parameters of the perceptron and of the rows."""
    keys = jax.random.split(key)
    head = self._head().init(keys[0], {_TRUNK: self.embedding_dim})
    trunk, _ = self._functions(sum(embedding_dims.values())).init(keys[1])
    return {"head": head, _TRUNK: trunk}

  def __call__(
    self,
    params: Params,
    embeddings: Mapping[str, Array],
    present: Mapping[str, Array],
  ) -> Outputs:
    """Logits; there are no per-modality scores."""
    return self._outputs(self._head(), params, embeddings, present)

  def geometry(
    self, params: Params, constants: Mapping[str, Array | None]
  ) -> Geometry:
    """The rows and factors behind the trunk, the same for every modality."""
    stated = self._head().geometry(params["head"], {_TRUNK: None})
    names = modalities.names(constants)
    return Geometry(
      head=dict.fromkeys(names, stated.head[_TRUNK]),
      bias=stated.bias,
      lipschitz=dict(constants),
      factors=dict.fromkeys(names, stated.factors[_TRUNK]),
      fusion="joint",
    )

  def freeze(self, params: Params):
    """The same logits with orthonormal weights made once."""
    head, head_params = fusion_lib.freeze(self._head(), params["head"])
    total = self._inputs_of(params)
    functions, trunk = self._functions(total).freeze(params[_TRUNK])
    frozen = functools.partial(self._outputs, head, functions=functions)
    return frozen, {"head": head_params, _TRUNK: trunk}

  def _outputs(self, head, params, embeddings, present, functions=None):
    embeddings = modalities.mask(embeddings, present)
    x = jnp.concatenate(
      [embeddings[name] for name in modalities.names(embeddings)], axis=-1
    )
    functions = functions or self._functions(x.shape[-1])
    u, _ = functions.apply(params[_TRUNK], {}, x)
    everything = {_TRUNK: jnp.ones(u.shape[:-1], bool)}
    logits = head(params["head"], {_TRUNK: u}, everything).logits
    return Outputs(logits=logits, scores=None, embeddings=embeddings)

  def _inputs_of(self, params) -> int:
    """The size of all embeddings together, read off the first layer."""
    first = "first" if self.stem is None else "stem"
    return params[_TRUNK][first]["weight"].shape[-1]

  def _head(self) -> fusion_lib.OrthogonalFusion:
    return fusion_lib.OrthogonalFusion(
      self.num_classes, num_iters=self.num_iters
    )

  def _encoder(self):
    names = ("width", "num_blocks", "embedding_dim", "block", "stem")
    options = {name: getattr(self, name) for name in names}
    return lipschitz.lipschitz_mlp(**options, num_iters=self.num_iters)

  def _functions(self, size: int) -> functional.Functions:
    return _trunk_functions(self, size)


@functools.lru_cache(maxsize=64)
def _trunk_functions(fusion: TrunkFusion, size: int) -> functional.Functions:
  return functional.encoder_functions(fusion._encoder(), (size,))


_TRUNK = "trunk"
