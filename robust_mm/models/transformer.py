r"""A transformer over the tokens of all modalities; absent ones are no keys.

Zeros in place of an absent modality would be an input that the network has
opinions about. Here its tokens are masked out of every attention and of the
pooling, so that what is computed is what the physically shorter sequence gives.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm import modalities
from robust_mm._types import Outputs
from robust_mm._types import Params
from robust_mm.models import functional
from robust_mm.models import masked

POOLINGS = ("cls", "mean")


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerFusion:
  r"""Pre-norm transformer over a class token and all present tokens.

  .. math:: [c, t_1, \dots, t_N] \to blocks \to norm \to pool \to V z + b

  with :math:`t` the tokens ``[b, N_m, d]`` of every modality (encoders
  ``patches``) and d their common ``embedding_dim``. The logits are no sum of
  per-modality terms: no scores, no geometry; certify by smoothing.

  Formal guarantees:
    - Absent tokens (those of an absent modality, and tokens of zeros, which are
      padding) have attention weight 0 exactly: logits are bit-identical for
      any content of theirs, NaN included, and its gradient is exactly 0.
    - Logits equal those of the sequence without these tokens, up to rounding.
    - The class token is always a key, so an item without any modality is
      finite.
    - What is present is data: one compiled function serves all subsets.

  Attributes:
    num_classes: k; 1 for the number of a regression.
    num_layers: transformer blocks.
    num_heads: attention heads; divides d.
    pooling: "cls", the class token; or "mean", over it and all present tokens.

  Parameters: ``cls`` [d], ``blocks/<i>/...``, ``norm/...`` and ``last/kernel``
  [d, k], ``last/bias`` [k]: the linear head on the pooled features.

  References:
    `McKinzie et al. (2023) <https://arxiv.org/abs/2304.04385>`_.
  """

  num_classes: int
  num_layers: int = 4
  num_heads: int = 4
  pooling: str = "cls"

  def __post_init__(self):
    _validate.at_least(1, num_classes=self.num_classes)
    _validate.at_least(1, num_layers=self.num_layers, num_heads=self.num_heads)
    _validate.one_of(POOLINGS, pooling=self.pooling)

  def init(
    self, key: PRNGKeyArray, embedding_dims: Mapping[str, int]
  ) -> dict[str, Any]:
    """Parameters; ValueError where the widths of modalities differ."""
    widths = set(embedding_dims.values())
    if len(widths) > 1:
      raise ValueError(
        f"embedding_dim must be the same for all modalities of a transformer, "
        f"got {dict(embedding_dims)}."
      )
    width = widths.pop()
    if width % self.num_heads:
      raise ValueError(
        f"num_heads must divide embedding_dim {width}, got {self.num_heads}."
      )
    body_key, head_key = jax.random.split(key)
    body, _ = _functions(self, width).init(body_key)
    return {**body, "last": masked.dense(head_key, width, self.num_classes)}

  def __call__(
    self,
    params: Params,
    embeddings: Mapping[str, Array],
    present: Mapping[str, Array],
  ) -> Outputs:
    """Logits only."""
    pooled = self.features(params, embeddings, present)
    return Outputs(
      logits=masked.apply(params["last"], pooled),
      scores=None,
      embeddings=modalities.mask(embeddings, present),
      mixed=True,
    )

  def features(
    self,
    params: Params,
    embeddings: Mapping[str, Array],
    present: Mapping[str, Array],
  ) -> Array:
    """``[b, d]``: what the linear head ``last`` sees."""
    return self.attend(params, embeddings, real(embeddings, present))[0]

  def attend(
    self,
    params: Params,
    tokens: Mapping[str, Array],
    keep: Mapping[str, Array],
  ) -> tuple[Array, dict[str, Array]]:
    """The transformer without its head.

    Args:
      params: of this fusion.
      tokens: ``{m: [b, N_m, d]}``, of any modalities: those that are not there
        take no time.
      keep: ``{m: bool[b, N_m]}``: which tokens exist.

    Returns:
      ``(pooled [b, d], {m: [b, N_m, d]})``; what is said at tokens that do not
      exist means nothing.
    """
    names = modalities.names(tokens)
    width = tokens[names[0]].shape[-1]
    kept = {
      n: jnp.where(keep[n][..., None], tokens[n], jnp.zeros_like(tokens[n]))
      for n in names
    }
    body = {name: value for name, value in params.items() if name != "last"}
    (pooled, out), _ = _functions(self, width).apply(
      body,
      {},
      jnp.concatenate([kept[n] for n in names], axis=1),
      jnp.concatenate([keep[n] for n in names], axis=1),
    )
    ends = [
      sum(kept[n].shape[1] for n in names[: i + 1]) for i in range(len(names))
    ]
    return pooled, dict(zip(names, jnp.split(out, ends[:-1], axis=1)))


def real(
  tokens: Mapping[str, Array], present: Mapping[str, Array]
) -> dict[str, Array]:
  """``{m: bool[b, N_m]}``: tokens of present modalities that are not zeros."""
  return {
    name: present[name][:, None] & jnp.any(value != 0, axis=-1)
    for name, value in tokens.items()
  }


class Block(nnx.Module):
  """Pre-norm self-attention and a perceptron, ``[b, n, d]``."""

  def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
    self.num_heads = num_heads
    self.norm_attention = nnx.LayerNorm(width, rngs=rngs)
    self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
    self.out = nnx.Linear(width, width, rngs=rngs)
    self.norm_mlp = nnx.LayerNorm(width, rngs=rngs)
    self.expand = nnx.Linear(width, 4 * width, rngs=rngs)
    self.contract = nnx.Linear(4 * width, width, rngs=rngs)

  def __call__(self, x, keep):
    """``keep`` is ``bool[b, n]``: who may be attended to."""
    batch, number, width = x.shape
    parts = jnp.split(self.qkv(self.norm_attention(x)), 3, axis=-1)
    shape = (batch, number, self.num_heads, width // self.num_heads)
    query, key, value = (jnp.reshape(part, shape) for part in parts)
    # Masked logits are a large finite number and the softmax is in float32
    # whatever the inputs are: a masked key has weight 0, never NaN.
    attended = jax.nn.dot_product_attention(
      query, key, value, mask=keep[:, None, None, :], implementation="xla"
    )
    x = x + self.out(jnp.reshape(attended, x.shape))
    return x + self.contract(nnx.gelu(self.expand(self.norm_mlp(x))))


class _Network(nnx.Module):
  def __init__(self, fusion: TransformerFusion, width: int, rngs: nnx.Rngs):
    self.pooling = fusion.pooling
    self.cls = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,)))
    self.blocks = nnx.List(
      [
        Block(width, fusion.num_heads, rngs=rngs)
        for _ in range(fusion.num_layers)
      ]
    )
    self.norm = nnx.LayerNorm(width, rngs=rngs)

  def __call__(self, tokens, keep):
    x, keep = with_class_token(self.cls[...], tokens, keep)
    for block in self.blocks:
      x = block(x, keep)
    x = self.norm(x)
    if self.pooling == "cls":
      return x[:, 0], x[:, 1:]
    total = jnp.sum(jnp.where(keep[..., None], x, jnp.zeros_like(x)), axis=1)
    count = jnp.sum(keep, axis=1, keepdims=True)  # at least 1, the class token
    return total / count.astype(x.dtype), x[:, 1:]


def with_class_token(cls, tokens, keep):
  """``[b, 1 + n, d]`` and ``bool[b, 1 + n]``, the class token kept."""
  first = jnp.broadcast_to(
    cls[None, None].astype(tokens.dtype), (tokens.shape[0], 1, cls.shape[0])
  )
  always = jnp.ones((keep.shape[0], 1), bool)
  x = jnp.concatenate([first, tokens], axis=1)
  keep = jnp.concatenate([always, keep], axis=1)
  # A row without any key has no softmax: here the first is always one.
  if keep.shape != x.shape[:2]:
    raise ValueError(f"keep must have shape {x.shape[:2]}, got {keep.shape}.")
  return x, keep


@functools.lru_cache(maxsize=64)
def _functions(fusion: TransformerFusion, width: int) -> functional.Functions:
  build = lambda rngs: _Network(fusion, width, rngs)  # noqa: E731
  return functional.from_module(build)
