r"""Fusion heads as values: init, logits, and the geometry of a certificate.

A head is a frozen object with ``init(key, embedding_dims) -> params`` and
``head(params, embeddings, present) -> Outputs``. Late-fusion heads, whose
logits are a sum of per-modality terms, also have ``geometry(params,
constants)``.
"""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm import linalg
from robust_mm import modalities
from robust_mm._types import Geometry
from robust_mm._types import Outputs
from robust_mm._types import Params
from robust_mm.models import functional
from robust_mm.models import networks

ORTHOGONALITIES = ("polar", "rowwise")
INTEGRATIONS = ("simplex", "softplus")
REDUCTIONS = ("sum", "mean")


@dataclasses.dataclass(frozen=True, eq=False)
class OrthogonalFusion:
  r"""The CRMT head: orthonormal rows and one factor per class and modality.

  .. math:: s_m = \phi_m W_m^T, \qquad
    logits = \sum_m present_m \, a_m \odot s_m + bias, \qquad W_m W_m^T = I

  Every pair of classes then has :math:`\|W_y - W_j\| = \sqrt 2`: margins live
  in the embeddings and ``W``, the weight of a modality in ``a``.

  Formal guarantees:
    - ``orthogonality="polar"``: ``||W_m||_2 <= 1`` (plus 6e-7), converged or
      not, so ``geometry`` states the factors and the certificate may use
      :math:`\sqrt{a_y^2 + a_j^2}`. The published "rowwise" has unit rows only
      and states them as ``integration`` alone.
    - ``a >= 0``; "simplex" keeps its mean at ``integration_init`` exactly.

  Attributes:
    num_classes: k; at most the smallest embedding size (one less if centred).
    orthogonality: "polar" or "rowwise" (what the authors' released layer does).
    integration: "simplex": ``a = c k M softmax(alpha)`` over all modalities and
      classes, only the direction is learnt; "softplus" (published): ``a =
      softplus(alpha)``, the scale of the logits is learnt as well.
    num_iters: Newton-Schulz steps at most; 20 when k = d.
    centre_rows: subtract the mean of every row of the proxy first (published:
      True); ``W 1 = 0`` then ignores the mean direction of the features.
    use_bias: (published: True).
    integration_init: c, or the initial ``a`` (published: 0.1).
    reduction: "sum", or "mean": the sum over modalities is divided by the
      number of present ones, so that logits keep their size when some are
      missing.

  Parameters: ``proxy/<m>`` [k, d_m], ``integration/alpha`` [M, k] in sorted
  order of modalities, ``bias`` [k] if used.

  References:
    `Yang et al. (2024) <https://arxiv.org/abs/2402.06244>`_.
  """

  num_classes: int
  orthogonality: str = "polar"
  integration: str = "simplex"
  num_iters: int = 12
  centre_rows: bool = False
  use_bias: bool = False
  integration_init: float = 1.0
  reduction: str = "sum"

  def __post_init__(self):
    _validate.at_least(1, num_iters=self.num_iters)
    _validate.at_least(2, num_classes=self.num_classes)
    _validate.one_of(ORTHOGONALITIES, orthogonality=self.orthogonality)
    _validate.one_of(INTEGRATIONS, integration=self.integration)
    _validate.one_of(REDUCTIONS, reduction=self.reduction)
    _validate.positive(integration_init=self.integration_init)

  def init(
    self, key: PRNGKeyArray, embedding_dims: Mapping[str, int]
  ) -> dict[str, Any]:
    """Parameters with orthonormal proxies and equal factors."""
    names = modalities.names(embedding_dims)
    limit = self.num_classes + self.centre_rows
    for name in names:
      if embedding_dims[name] < limit:
        raise ValueError(
          f"embedding_dim of modality {name!r} must be at least {limit} for "
          f"{self.num_classes} orthonormal "
          f"{'centred ' if self.centre_rows else ''}rows, got "
          f"{embedding_dims[name]}."
        )
    proxies = {
      name: linalg.random_orthonormal(
        jax.random.fold_in(key, index),
        (self.num_classes, embedding_dims[name]),
      )
      for index, name in enumerate(names)
    }
    start = 0.0
    if self.integration == "softplus":
      start = jnp.log(jnp.expm1(self.integration_init))
    alpha = jnp.full((len(names), self.num_classes), start, jnp.float32)
    params = {"proxy": proxies, "integration": {"alpha": alpha}}
    if self.use_bias:
      params["bias"] = jnp.zeros(self.num_classes)
    return params

  def rows(self, params: Params) -> dict[str, Float[Array, "k d"]]:
    """``{m: W_m}``; proxies of one shape are orthonormalised together."""
    proxies = {
      name: proxy.astype(jnp.promote_types(proxy.dtype, jnp.float32))
      for name, proxy in params["proxy"].items()
    }
    if self.centre_rows:
      proxies = {
        name: proxy - jnp.mean(proxy, axis=-1, keepdims=True)
        for name, proxy in proxies.items()
      }
    if self.orthogonality == "rowwise":
      return {name: _unit_rows(proxy) for name, proxy in proxies.items()}
    if len({proxy.shape for proxy in proxies.values()}) == 1:
      stacked = linalg.newton_schulz(
        modalities.stack(proxies), num_iters=self.num_iters
      )
      return dict(zip(modalities.names(proxies), stacked))
    return {
      name: linalg.newton_schulz(proxy, num_iters=self.num_iters)
      for name, proxy in proxies.items()
    }

  def factors(self, params: Params) -> dict[str, Float[Array, " k"]]:
    """``{m: a_m}``, the integration factors, never negative."""
    alpha = params["integration"]["alpha"]
    if self.integration == "softplus":
      factors = jax.nn.softplus(alpha)
    else:
      share = jax.nn.softmax(jnp.reshape(alpha, -1))
      factors = self.integration_init * alpha.size * share
      factors = jnp.reshape(factors, alpha.shape)
    return dict(zip(modalities.names(params["proxy"]), factors))

  def __call__(
    self,
    params: Params,
    embeddings: Mapping[str, Array],
    present: Mapping[str, Array],
  ) -> Outputs:
    """Logits, and the raw scores without factors."""
    embeddings = modalities.mask(embeddings, present)
    rows = self.rows(params)
    scores = {
      name: _scores(embeddings[name], rows[name])
      for name in modalities.names(rows)
    }
    terms = {
      name: jnp.einsum("bk,k->bk", scores[name], factor)
      for name, factor in self.factors(params).items()
    }
    logits = _reduce(terms, present, self.reduction)
    if self.use_bias:
      logits = logits + params["bias"][None]
    return Outputs(logits=logits, scores=scores, embeddings=embeddings)

  def geometry(
    self, params: Params, constants: Mapping[str, Array | None]
  ) -> Geometry:
    """Head rows and factors, with the encoders' constants."""
    rows = self.rows(params)
    factors = self.factors(params)
    bias = params["bias"] if self.use_bias else jnp.zeros(self.num_classes)
    return Geometry(
      head={
        name: jnp.einsum("k,kd->kd", factors[name], row)
        for name, row in rows.items()
      },
      bias=bias,
      lipschitz=dict(constants),
      factors=factors if self.orthogonality == "polar" else None,
      integration=factors,
      positivity=self.integration,
      reduction=self.reduction,
    )

  def defect(self, params: Params) -> dict[str, Float[Array, ""]]:
    """``{m: max |W_m W_m^T - I|}``, of this head's or a model's parameters.

    1 for a zero proxy, NaN for one that is not finite.
    """
    rows = self.rows(params.get("fusion", params))
    return {name: linalg.defect(row) for name, row in rows.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class ConcatFusion:
  r"""A dense layer on concatenated embeddings: the plain joint head.

  ``logits = sum_m present_m phi_m V_m^T + bias``. Additive, so its scores are
  the contributions and the certificate's general form applies.

  Attributes:
    num_classes: k; 1 for the number of a regression.
    reduction: "sum", or "mean": the sum over modalities is divided by the
      number of present ones.

  Parameters: ``head/<m>`` [k, d_m] and ``bias`` [k].
  """

  num_classes: int
  reduction: str = "sum"

  def __post_init__(self):
    _validate.at_least(1, num_classes=self.num_classes)
    _validate.one_of(REDUCTIONS, reduction=self.reduction)

  def init(
    self, key: PRNGKeyArray, embedding_dims: Mapping[str, int]
  ) -> dict[str, Any]:
    """Rows with the variance of one dense layer over all embeddings."""
    deviation = sum(embedding_dims.values()) ** -0.5
    head = {
      name: deviation
      * jax.random.normal(
        jax.random.fold_in(key, index),
        (self.num_classes, embedding_dims[name]),
      )
      for index, name in enumerate(modalities.names(embedding_dims))
    }
    return {"head": head, "bias": jnp.zeros(self.num_classes)}

  def __call__(
    self,
    params: Params,
    embeddings: Mapping[str, Array],
    present: Mapping[str, Array],
  ) -> Outputs:
    """Logits and their per-modality terms."""
    embeddings = modalities.mask(embeddings, present)
    scores = {
      name: _scores(embeddings[name], params["head"][name])
      for name in modalities.names(params["head"])
    }
    logits = _reduce(scores, present, self.reduction) + params["bias"][None]
    return Outputs(logits=logits, scores=scores, embeddings=embeddings)

  def geometry(
    self, params: Params, constants: Mapping[str, Array | None]
  ) -> Geometry:
    """The rows as they are; no factors."""
    return Geometry(
      head=dict(params["head"]),
      bias=params["bias"],
      lipschitz=dict(constants),
      reduction=self.reduction,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFusion:
  """A transformer over one token per modality and a class token.

  Every embedding is projected to a token and gets a learnt modality vector;
  absent modalities are masked out of the attention; the class token is read
  out. (One token per modality rather than per frame: it takes any encoder, and
  its cost does not depend on sequence lengths.) The logits are no sum of
  per-modality terms: no scores, no geometry; certify by smoothing.

  Attributes:
    num_classes: k; 1 for the number of a regression.
    width: of tokens.
    num_layers: transformer blocks.
    num_heads: attention heads; divides ``width``.
  """

  num_classes: int
  width: int = 64
  num_layers: int = 2
  num_heads: int = 4

  def __post_init__(self):
    _validate.at_least(1, num_classes=self.num_classes)
    _validate.at_least(
      1,
      width=self.width,
      num_layers=self.num_layers,
      num_heads=self.num_heads,
    )
    if self.width % self.num_heads:
      raise ValueError(
        f"num_heads must divide width {self.width}, got {self.num_heads}."
      )

  def init(
    self, key: PRNGKeyArray, embedding_dims: Mapping[str, int]
  ) -> dict[str, Any]:
    """Parameters of the transformer."""
    return self._functions(embedding_dims).init(key)[0]

  def __call__(
    self,
    params: Params,
    embeddings: Mapping[str, Array],
    present: Mapping[str, Array],
  ) -> Outputs:
    """Logits only."""
    embeddings = modalities.mask(embeddings, present)
    dims = {name: value.shape[-1] for name, value in embeddings.items()}
    logits, _ = self._functions(dims).apply(params, {}, embeddings, present)
    return Outputs(
      logits=logits, scores=None, embeddings=embeddings, mixed=True
    )

  def _functions(self, dims: Mapping[str, int]) -> functional.Functions:
    return _token_functions(self, tuple(sorted(dims.items())))


class _TokenNetwork(nnx.Module):
  def __init__(self, fusion: TokenFusion, dims, rngs: nnx.Rngs):
    width = fusion.width
    self.names = tuple(name for name, _ in dims)
    self.project = nnx.Dict(
      {name: nnx.Linear(dim, width, rngs=rngs) for name, dim in dims}
    )
    shape = (len(dims) + 1, width)
    self.kind = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
    self.blocks = nnx.List(
      [
        networks.TransformerBlock(width, fusion.num_heads, rngs=rngs)
        for _ in range(fusion.num_layers)
      ]
    )
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.last = nnx.Linear(width, fusion.num_classes, rngs=rngs)

  def __call__(self, embeddings, present):
    tokens = [self.project[name](embeddings[name]) for name in self.names]
    # The class token comes first, starts at 0 and is always attended to, so
    # an example with nothing present is still finite.
    tokens = jnp.stack([jnp.zeros_like(tokens[0]), *tokens], axis=1)
    x = tokens + self.kind[...][None]
    flags = [present[name] for name in self.names]
    keep = jnp.stack([jnp.ones_like(flags[0]), *flags], axis=1)
    for block in self.blocks:
      x = block(x, keep)
    return self.last(self.norm(x[:, 0]))


@functools.lru_cache(maxsize=64)
def _token_functions(fusion: TokenFusion, dims: tuple) -> functional.Functions:
  build: Callable = lambda rngs: _TokenNetwork(fusion, dims, rngs)  # noqa: E731
  return functional.from_module(build)


def freeze(fusion: Any, params: Params) -> tuple[Any, Params]:
  """The same logits from rows that are made once: ``(head, its params)``."""
  if hasattr(fusion, "freeze"):
    return fusion.freeze(params)
  if not hasattr(fusion, "geometry"):
    return fusion, params
  stated = jax.jit(lambda p: fusion.geometry(p, {}))(params)
  head = ConcatFusion(fusion.num_classes, stated.reduction)
  return head, {"head": stated.head, "bias": stated.bias}


def head_defect(geometry: Geometry) -> dict[str, Float[Array, ""]]:
  """The defect of a head with integration factors, read off its geometry.

  {} where the head has none. A row whose factor is 0 counts as a zero row.
  """
  factors = geometry.integration or geometry.factors
  if factors is None:
    return {}
  inverse = {
    name: jnp.where(factor > 0, 1 / jnp.where(factor > 0, factor, 1), 0)
    for name, factor in factors.items()
  }
  return {
    name: linalg.defect(jnp.einsum("k,kd->kd", inverse[name], rows))
    for name, rows in geometry.head.items()
  }


def _scores(embedding: Array, rows: Array) -> Array:
  return jnp.einsum("bd,kd->bk", embedding, rows, precision="highest")


def _reduce(terms, present, reduction: str) -> Array:
  """The sum of the terms, or their mean over present modalities."""
  total = sum(terms.values())
  if reduction == "sum":
    return total
  share = modalities.share({name: present[name] for name in terms})
  return jnp.einsum("bk,b->bk", total, share.astype(total.dtype))


def _unit_rows(proxy: Array) -> Array:
  square = jnp.sum(jnp.square(proxy), axis=-1, keepdims=True)
  return proxy * jax.lax.rsqrt(jnp.where(square == 0, 1.0, square))
