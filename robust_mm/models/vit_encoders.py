"""Vision transformers as encoders of multimodal models."""

from typing import Any

import jax
from flax import nnx

from robust_mm import _validate
from robust_mm.models import vit as vit_lib
from robust_mm.models.functional import Encoder


def vit(
  *,
  size: str | None = "tiny",
  patch_size: Any = 7,
  embedding_dim: int | None = None,
  width: int | None = None,
  depth: int | None = None,
  num_heads: int | None = None,
  mlp_dim: int | None = None,
  pool: str = "cls",
  preprocess: Any = None,
  dtype: Any = None,
  remat: str = "none",
  dropout: float = 0.0,
  epsilon: float = 1e-6,
  pad: bool = False,
  implementation: str = "xla",
  weights: str | None = None,
) -> Encoder:
  """A vision transformer for images ``h w c`` (or ``h w``).

  The encoder has ``embed`` and ``encode_tokens`` besides, see
  :class:`functional.Encoder`: noise can be added to its tokens.

  Args:
    size: "tiny", "small", "base" or "large"; None where width, depth and
      num_heads are given.
    patch_size: of a square patch, or its (rows, columns).
    embedding_dim: d of the embedding, by a linear layer on the pooled
      features; None for these features themselves.
    width: in place of the size's, as are depth, num_heads and mlp_dim.
    depth: blocks.
    num_heads: divides the width.
    mlp_dim: 4 widths by default.
    pool: "cls" or "mean".
    preprocess: (mean, std) inside the encoder, for images in [0, 1]; the
      model's own normalisation then leaves this modality alone.
    dtype: of the products, "bfloat16" or "float32"; None for that of the input.
    remat: "none", "blocks" or "dots".
    dropout: rate, in training alone.
    epsilon: of all norms.
    pad: whether sides that a patch does not divide are filled up with zeros.
    implementation: of the attention, "xla", "cudnn" or "plain".
    weights: what a fresh model begins with in place of random numbers, the path
      of a pretrained file, see ``vit.load_safetensors``. It must be of the
      sizes, heads and epsilon that are stated here (1e-12 for models of Hugging
      Face), and ``preprocess`` must be theirs. A run that has been trained
      needs it no longer.

  Raises:
    ValueError: naming the argument; where a model is built, also the file.
  """
  net = vit_lib.vision_transformer(
    size,
    width=width,
    depth=depth,
    num_heads=num_heads,
    mlp_dim=mlp_dim,
    patch_size=patch_size,
    num_classes=embedding_dim,
    pool=pool,
    preprocess=preprocess,
    dtype=dtype,
    remat=remat,
    dropout=dropout,
    epsilon=epsilon,
    pad=pad,
    implementation=implementation,
  )
  check_weights(weights, preprocess)
  return encoder(net, weights=weights)


def check_weights(weights: str | None, preprocess: Any) -> None:
  """ValueError for weights without the numbers that their images had."""
  if weights is not None and preprocess is None:
    raise ValueError(
      "preprocess must be given with weights: (0.5, 0.5) for models of Google, "
      "mean and standard deviation of ImageNet for DeiT and DINO."
    )


def encoder(
  net: vit_lib.VisionTransformer, *, weights: str | None = None
) -> Encoder:
  """The encoder of a vision transformer; what it returns is the embedding.

  Args:
    net: of any kind; with a head, its outputs are the embedding.
    weights: path of pretrained parameters, see :func:`vit`.
  """
  _validate.at_least(1, embedding_dim=net.output_dim)

  def embed(params, state, x):
    del state
    return net.embed(params, x)

  def encode_tokens(params, state, tokens, present, *, train=False, key=None):
    return net.encode(params, tokens, present, train=train, key=key), state

  def pretrained(input_shape, key):
    return vit_lib.pretrained_params(net, weights, input_shape, key=key)

  return Encoder(
    name="vit",
    embedding_dim=net.output_dim,
    build=lambda input_shape, rngs: Network(net, input_shape, rngs),
    normalizes=net.preprocess is not None,
    embed=embed,
    encode_tokens=encode_tokens,
    pretrained=None if weights is None else pretrained,
  )


class Network(nnx.Module):
  """Parameters of a vision transformer as nnx variables, same paths."""

  def __init__(self, net, input_shape, rngs):
    self.net = net
    tree = net.init(rngs.params(), input_shape)
    for name, value in tree.items():
      setattr(self, name, _variables(value))

  def params(self):
    """Parameters as the functions of the network take them."""
    _, state = nnx.split(self)
    return jax.tree.map(lambda leaf: leaf, nnx.to_pure_dict(state))

  def __call__(self, x, train=False, key=None):
    return self.net.apply(self.params(), x, train=train, key=key)


def _variables(tree):
  if not isinstance(tree, dict):
    return nnx.Param(tree)
  return nnx.Dict({name: _variables(value) for name, value in tree.items()})
