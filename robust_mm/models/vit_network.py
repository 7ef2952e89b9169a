"""The network of a vision transformer, split where noise can be added."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm._types import Params
from robust_mm.models import masked
from robust_mm.models import patches
from robust_mm.models import residual
from robust_mm.models import vit_arguments
from robust_mm.models import vit_blocks

POOLS = ("cls", "mean")
REMATS = ("none", "blocks", "dots")
_DEVIATION = 0.02  # of a fresh class token and of fresh positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionTransformer:
  r"""A pre-norm vision transformer, split where noise can be added.

  .. math::
    u = patches((x - mean) / std)\, W + e, \qquad
    f(u) = head(pool(norm(blocks([c, u] + positions))))

  ``embed`` gives u and is affine; ``encode`` is all the rest; ``apply`` is
  their composition. Make one with ``vit.vision_transformer`` or
  ``vit.load_safetensors``.

  Formal guarantees:
    - ``embed`` is affine in the image; patches do not overlap.
    - Absent tokens have attention weight 0 exactly, and are left out of the
      mean: results are bit-identical for any content of theirs, NaN included,
      and its gradient is exactly 0.
    - The class token is always a key: an item without tokens is finite.

  Attributes:
    width: d.
    depth: blocks.
    num_heads: divides the width.
    mlp_dim: width of the perceptrons.
    patch_size: of a square patch, or (rows, columns), which it then is.
    num_classes: k; None for pooled features and no head.
    pool: "cls", the class token; "mean", over present patch tokens, without
      the class token (zeros where there is none).
    preprocess: (mean, std), each of one number or one a channel; None for
      none. Part of the network: images stay in [0, 1].
    dtype: of the products inside ``encode``, "bfloat16" or "float32"; None
      for that of the tokens. Parameters keep theirs, ``embed`` runs in it, and
      what ``encode`` returns is float32 at least.
    remat: what the backward pass computes again: "none"; "blocks", all but the
      input of each block; "dots", all but products with a matrix of weights:
      those inside the attention, which have a batch, are computed again.
    dropout: rate, in training alone.
    epsilon: of all norms.
    pad: whether sides that a patch does not divide are filled up with zeros at
      their end, after ``preprocess``; they are refused otherwise.
    implementation: of the attention: "xla" or "cudnn" (flash attention on GPUs,
      with dtype "bfloat16"; heads of more than 128 features need Hopper or
      later; a key drops other units than with "xla"), both by
      ``jax.nn.dot_product_attention``; "plain", two products and a softmax, is
      faster on CPUs.

  Parameters: ``embed/kernel`` [p, d], ``embed/bias``; ``cls`` [d]; ``position``
  [1 + N, d], that of the class token first; ``blocks/<i>/`` with
  ``norm_attention``, ``qkv`` (kernel [d, 3, heads, d / heads]), ``out``,
  ``norm_mlp``, ``expand``, ``contract``; ``norm/scale``, ``norm/bias``;
  ``head/kernel`` [d, k], ``head/bias``.

  References:
    `Dosovitskiy et al. (2021) <https://arxiv.org/abs/2010.11929>`_.
  """

  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  patch_size: Any
  num_classes: int | None = None
  pool: str = "cls"
  preprocess: Any = None
  dtype: Any = None
  remat: str = "none"
  dropout: float = 0.0
  epsilon: float = 1e-6
  pad: bool = False
  implementation: str = "xla"

  def __post_init__(self):
    _validate.at_least(
      1,
      width=self.width,
      depth=self.depth,
      num_heads=self.num_heads,
      mlp_dim=self.mlp_dim,
    )
    object.__setattr__(self, "patch_size", vit_arguments.pair(self.patch_size))
    object.__setattr__(
      self, "preprocess", vit_arguments.preprocess(self.preprocess)
    )
    if self.width % self.num_heads:
      raise ValueError(
        f"num_heads must divide width {self.width}, got {self.num_heads}."
      )
    if self.num_classes is not None:
      _validate.at_least(1, num_classes=self.num_classes)
    _validate.one_of(POOLS, pool=self.pool)
    if self.dtype is not None:
      # "bfloat16" and jnp.bfloat16 are the same network.
      object.__setattr__(self, "dtype", vit_arguments.dtype(self.dtype))
    _validate.one_of(REMATS, remat=self.remat)
    _validate.below_one(dropout=self.dropout)
    _validate.positive(epsilon=self.epsilon)
    _validate.one_of(
      vit_blocks.IMPLEMENTATIONS, implementation=self.implementation
    )
    if self.implementation == "cudnn" and self.dtype != "bfloat16":
      raise ValueError(
        f"dtype must be 'bfloat16' with implementation='cudnn', got "
        f"{self.dtype!r}."
      )
    head = self.width // self.num_heads
    if self.implementation == "cudnn" and (head % 8 or head > 256):
      raise ValueError(
        f"num_heads must leave a multiple of 8, at most 256, of width "
        f"{self.width} to each with implementation='cudnn', got "
        f"{self.num_heads}."
      )

  @property
  def output_dim(self) -> int:
    """What ``encode`` returns for an item: k numbers, or d."""
    return self.width if self.num_classes is None else self.num_classes

  def grid(self, image_shape: Sequence[int]) -> tuple[int, int]:
    """Patches along both sides of an image ``[h, w]`` or ``[h, w, c]``.

    Raises:
      ValueError: ``image_shape`` is no image, or has sides that ``patch_size``
        does not divide (without ``pad``).
    """
    shape = vit_arguments.image(image_shape)
    for size, side in zip(shape, self.patch_size):
      if side > size:
        raise ValueError(
          f"patch_size {self.patch_size} must not exceed the image "
          f"{tuple(image_shape)}."
        )
      if size % side and not self.pad:
        raise ValueError(
          f"patch_size {self.patch_size} must divide the sides of the image "
          f"{tuple(image_shape)}; pad=True fills them up with zeros."
        )
    rows, columns = (
      -(-size // side) for size, side in zip(shape, self.patch_size)
    )
    return rows, columns

  def num_tokens(self, image_shape: Sequence[int]) -> int:
    """N of an image ``[h, w]`` or ``[h, w, c]``, without the class token."""
    return math.prod(self.grid(image_shape))

  def init(
    self, key: PRNGKeyArray, image_shape: Sequence[int]
  ) -> dict[str, Any]:
    """Random parameters for images ``[h, w]`` or ``[h, w, c]``, float32.

    Kernels are uniform by fan-in plus fan-out, patches normal by fan-in; the
    class token and positions are normal with deviation 0.02.
    """
    number = self.num_tokens(image_shape)
    channels = vit_arguments.image(image_shape)[2]
    vit_arguments.channels(self.preprocess, channels)
    size = math.prod(self.patch_size) * channels
    keys = jax.random.split(key, 5)
    draw = jax.random.normal
    blocks = {
      str(index): vit_blocks.init(
        block_key, self.width, self.num_heads, self.mlp_dim
      )
      for index, block_key in enumerate(jax.random.split(keys[3], self.depth))
    }
    params = {
      "embed": {
        "kernel": draw(keys[0], (size, self.width)) / math.sqrt(size),
        "bias": jnp.zeros(self.width),
      },
      "cls": _DEVIATION * draw(keys[1], (self.width,)),
      "position": _DEVIATION * draw(keys[2], (1 + number, self.width)),
      "blocks": blocks,
      "norm": vit_blocks.init_norm(self.width),
    }
    if self.num_classes is not None:
      params["head"] = masked.dense(keys[4], self.width, self.num_classes)
    return params

  def patch_weight(self, params: Params) -> Array:
    """W ``[p, d]``; rows in the order of a flattened patch, (row, column, c).

    A view of ``params["embed"]["kernel"]``. In front of it the pixels are
    divided by the ``std`` of ``preprocess``, channel by channel: what images it
    does not see is told by ``nullspace.embedding_kernel``.
    """
    return params["embed"]["kernel"]

  def embed(self, params: Params, images: Array) -> Array:
    """Tokens ``[b, N, d]``: preprocessing, linear patch projection, bias.

    Args:
      params: of :meth:`init`.
      images: floats in [0, 1], ``[b, h, w]`` or ``[b, h, w, c]``.

    Returns:
      Tokens, those of a row of patches one after another, in the dtype of the
      parameters (or of the images, if that is wider).
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
      raise ValueError(
        f"images must be floats in [0, 1], got {images.dtype}; divide uint8 "
        f"pixels by 255."
      )
    shape = images.shape[1:]
    self.grid(shape)
    shape = vit_arguments.image(shape)
    kernel, bias = params["embed"]["kernel"], params["embed"]["bias"]
    size = math.prod(self.patch_size) * shape[2]
    if kernel.shape != (size, self.width):
      raise ValueError(
        f"params have a patch projection of shape {kernel.shape}; patches of "
        f"the images {images.shape} need {(size, self.width)}."
      )
    dtype = jnp.promote_types(images.dtype, kernel.dtype)
    x = jnp.reshape(images, (images.shape[0], *shape)).astype(dtype)
    if self.preprocess is not None:
      vit_arguments.channels(self.preprocess, shape[2])
      mean, std = (
        jnp.broadcast_to(jnp.asarray(value, dtype), x.shape)
        for value in self.preprocess
      )
      x = (x - mean) / std
    pieces = patches.Tokenizer(patch=self.patch_size).cut(x, shape)
    return vit_blocks.dense({"kernel": kernel, "bias": bias}, pieces)

  def encode(
    self,
    params: Params,
    tokens: Array,
    present: Array | None = None,
    *,
    train: bool = False,
    key: PRNGKeyArray | None = None,
  ) -> Array:
    """Logits ``[b, k]``, or pooled features ``[b, d]`` without a head.

    Args:
      params: of :meth:`init`.
      tokens: ``[b, N, d]`` of :meth:`embed`, whatever was added to them.
      present: ``bool[b]``, which items have the image at all, or ``bool[b, N]``
        for their tokens; None for all.
      train: whether there is dropout.
      key: of dropout; none is dropped without.
    """
    features = self.features(params, tokens, present, train=train, key=key)
    if self.num_classes is None:
      return features
    return masked.apply(params["head"], features)

  def features(
    self,
    params: Params,
    tokens: Array,
    present: Array | None = None,
    *,
    train: bool = False,
    key: PRNGKeyArray | None = None,
  ) -> Array:
    """Pooled features ``[b, d]``, what the head sees; see :meth:`encode`."""
    x = self.sequence(params, tokens, present, train=train, key=key)
    if self.pool == "cls":
      return x[:, 0]
    return vit_blocks.mean(x[:, 1:], vit_arguments.keep(tokens, present))

  def sequence(
    self,
    params: Params,
    tokens: Array,
    present: Array | None = None,
    *,
    train: bool = False,
    key: PRNGKeyArray | None = None,
  ) -> Array:
    """``[b, 1 + N, d]`` after the last norm, the class token first."""
    position = params["position"]
    if tokens.ndim != 3 or tokens.shape[1:] != (
      position.shape[0] - 1,
      self.width,
    ):
      raise ValueError(
        f"tokens must have shape [b, {position.shape[0] - 1}, {self.width}], "
        f"as the positions of params have; got {tokens.shape}. Other "
        f"resolutions need vit.resize_positions."
      )
    if self.implementation == "cudnn" and jax.default_backend() != "gpu":
      raise _validate.UserError(
        f"implementation must be 'xla' or 'plain' on a "
        f"{jax.default_backend()}: 'cudnn' runs on GPUs alone."
      )
    keep = vit_arguments.keep(tokens, present)
    if keep is not None:
      tokens = jnp.where(keep[..., None], tokens, jnp.zeros_like(tokens))
      keep = jnp.pad(keep, ((0, 0), (1, 0)), constant_values=True)
    cls = jnp.broadcast_to(
      params["cls"].astype(tokens.dtype), (tokens.shape[0], 1, self.width)
    )
    x = jnp.concatenate([cls, tokens], axis=1)
    x = x + jnp.broadcast_to(position.astype(x.dtype), x.shape)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if self.dtype is not None:
      x = x.astype(self.dtype)
    keys = vit_blocks.keys(key if train and self.dropout else None, self.depth)
    x = residual.dropped(x, self.dropout, keys[0])
    number = x.shape[1]
    x, keep, length = self._filled(x, keep)
    block = self._block(length)
    # Not lax.scan over stacked blocks: ViT-S/16 then takes as long to compile.
    for index in range(self.depth):
      x = block(params["blocks"][str(index)], x, keep, keys[1 + index])
    x = x[:, :number].astype(wide)
    return vit_blocks.norm(params["norm"], x, self.epsilon)

  def apply(
    self,
    params: Params,
    images: Array,
    present: Array | None = None,
    *,
    train: bool = False,
    key: PRNGKeyArray | None = None,
  ) -> Array:
    """``encode(embed(images))``, see there."""
    tokens = self.embed(params, images)
    return self.encode(params, tokens, present, train=train, key=key)

  def _filled(self, x, keep):
    """Tokens, who is kept, and how many are real, None for all of them.

    JAX (0.10 to 0.12) refuses the gradient of cuDNN's attention for sequences
    of odd length: they get a token more, to which nobody attends.
    """
    number = x.shape[1]
    if self.implementation != "cudnn" or number % 2 == 0:
      return x, keep, None
    if keep is not None:
      keep = jnp.pad(keep, ((0, 0), (0, 1)))
    return jnp.pad(x, ((0, 0), (0, 1), (0, 0))), keep, number

  def _block(self, length):
    block = functools.partial(
      vit_blocks.block,
      epsilon=self.epsilon,
      dropout=self.dropout,
      implementation=self.implementation,
      length=length,
    )
    if self.remat == "none":
      return block
    policies = jax.checkpoint_policies
    policy = {
      "blocks": policies.nothing_saveable,
      "dots": policies.dots_with_no_batch_dims_saveable,
    }[self.remat]
    return jax.checkpoint(block, policy=policy)
