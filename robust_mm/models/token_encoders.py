"""Encoders that say something of every part of an input."""

from typing import Any

import jax
from flax import nnx

from robust_mm import _validate
from robust_mm.models import functional
from robust_mm.models import vit as vit_lib
from robust_mm.models import vit_encoders
from robust_mm.models.functional import Encoder


def vit_tokens(
  *,
  size: str | None = "tiny",
  patch_size: Any = 7,
  embedding_dim: int = 64,
  width: int | None = None,
  depth: int | None = None,
  num_heads: int | None = None,
  mlp_dim: int | None = None,
  preprocess: Any = None,
  dtype: Any = None,
  remat: str = "none",
  dropout: float = 0.0,
  epsilon: float = 1e-6,
  pad: bool = False,
  implementation: str = "xla",
  weights: str | None = None,
) -> Encoder:
  """All tokens of a vision transformer, ``[b, 1 + N, d]``, the class's first.

  For ``fusion="captioner"``, which attends to them.

  Args:
    size: "tiny", "small", "base" or "large"; None where width, depth and
      num_heads are given.
    patch_size: of a square patch, or its (rows, columns).
    embedding_dim: d, by a linear layer.
    width: in place of the size's, as are depth, num_heads and mlp_dim.
    depth: blocks.
    num_heads: divides the width.
    mlp_dim: 4 widths by default.
    preprocess: (mean, std) inside the encoder, for images in [0, 1].
    dtype: of the products, "bfloat16" or "float32".
    remat: "none", "blocks" or "dots".
    dropout: rate, in training alone.
    epsilon: of all norms.
    pad: whether sides that a patch does not divide are filled up with zeros.
    implementation: of the attention, "xla", "cudnn" or "plain".
    weights: path of a pretrained file that the transformer begins with, without
      its head, as for :func:`vit`.

  Raises:
    ValueError: naming the argument; where a model is built, also the file.
  """
  _validate.at_least(1, embedding_dim=embedding_dim)
  net = vit_lib.vision_transformer(
    size,
    width=width,
    depth=depth,
    num_heads=num_heads,
    mlp_dim=mlp_dim,
    patch_size=patch_size,
    num_classes=None,
    preprocess=preprocess,
    dtype=dtype,
    remat=remat,
    dropout=dropout,
    epsilon=epsilon,
    pad=pad,
    implementation=implementation,
  )
  vit_encoders.check_weights(weights, preprocess)

  def build(shape, rngs):
    return _Tokens(net, shape, embedding_dim, rngs)

  def pretrained(shape, key):
    own, trunk = jax.random.split(key)
    fresh, _ = functional.from_module(lambda rngs: build(shape, rngs)).init(own)
    found = vit_lib.pretrained_params(net, weights, shape, key=trunk)
    return {**fresh, "trunk": found}

  return Encoder(
    name="vit_tokens",
    embedding_dim=embedding_dim,
    build=build,
    normalizes=net.preprocess is not None,
    pretrained=None if weights is None else pretrained,
  )


class _Tokens(nnx.Module):
  def __init__(self, net, input_shape, embedding_dim, rngs):
    self.net = net
    self.trunk = vit_encoders.Network(net, input_shape, rngs)
    self.leave = nnx.Linear(net.width, embedding_dim, rngs=rngs)

  def __call__(self, x, train=False, key=None):
    params = self.trunk.params()
    tokens = self.net.embed(params, x)
    return self.leave(self.net.sequence(params, tokens, train=train, key=key))
