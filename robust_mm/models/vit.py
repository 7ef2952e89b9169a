r"""Vision transformers as values: tokens first, everything else after them.

>>> net = vision_transformer("tiny", patch_size=7, num_classes=10)
>>> params = net.init(jax.random.key(0), (28, 28, 1))
>>> tokens = net.embed(params, jnp.zeros((2, 28, 28, 1)))
>>> tokens.shape, net.encode(params, tokens).shape
((2, 16, 192), (2, 10))
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm.models import masked
from robust_mm.models import pretrained
from robust_mm.models import vit_arguments
from robust_mm.models import vit_blocks
from robust_mm.models import vit_network

SIZES = vit_arguments.SIZES
# (mean, std) that pretrained models were trained with.
HALF = (0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_MLP_RATIO = 4

VisionTransformer = vit_network.VisionTransformer
resize_positions = vit_blocks.resize_positions


def vision_transformer(
  size: str | None = None,
  *,
  width: int | None = None,
  depth: int | None = None,
  num_heads: int | None = None,
  mlp_dim: int | None = None,
  patch_size: Any = 16,
  **options,
) -> VisionTransformer:
  """A vision transformer of a known size, or of your own.

  >>> vision_transformer("small", patch_size=16).mlp_dim
  1536
  >>> vision_transformer(width=32, depth=2, num_heads=2, patch_size=7).depth
  2

  Args:
    size: "tiny", "small", "base" or "large"; None where width, depth and
      num_heads are given.
    width: d, in place of the size's.
    depth: blocks, in place of the size's.
    num_heads: in place of the size's.
    mlp_dim: of the perceptrons; 4 d by default.
    patch_size: of a square patch, or its (rows, columns).
    **options: further attributes of :class:`VisionTransformer`.

  Raises:
    ValueError: naming the argument.
  """
  given = {"width": width, "depth": depth, "num_heads": num_heads}
  if size is not None:
    _validate.one_of(SIZES, size=size)
    given = {
      name: known if own is None else own
      for (name, own), known in zip(given.items(), SIZES[size])
    }
  for name, value in given.items():
    if value is None:
      raise ValueError(f"{name} must be given where there is no size.")
    _validate.at_least(1, **{name: value})
  if mlp_dim is None:
    mlp_dim = _MLP_RATIO * given["width"]
  return VisionTransformer(
    **given, mlp_dim=mlp_dim, patch_size=patch_size, **options
  )


def load_safetensors(
  path,
  *,
  preprocess: Any,
  num_heads: int | None = None,
  image_shape: Any = None,
  num_classes: int | None = None,
  key: PRNGKeyArray | None = None,
  **options,
) -> tuple[VisionTransformer, dict[str, Any]]:
  """A pretrained vision transformer and its parameters, float32.

  From a file of Hugging Face's ``ViTForImageClassification`` (names of files or
  of memory) or of timm's ``VisionTransformer``. No network, no pickles.

  Args:
    path: a ``.safetensors`` file, an ``.index.json`` of several, or the folder
      with one of them; ``config.json`` beside it counts, see
      ``pretrained.read``.
    preprocess: (mean, std) of the images in [0, 1] that it was trained on:
      ``HALF`` for those of Google and augreg, ``IMAGENET`` for DeiT and DINO;
      None where the images come normalised. A wrong pair costs accuracy, which
      any fine-tuning wins back: there is no default. Another pair than the
      files beside it state (``pretrained_cfg`` of timm,
      ``preprocessor_config.json`` of Hugging Face) is refused.
    num_heads: where neither ``config.json`` nor the width says it.
    image_shape: of images of another size, ``(h, w)`` or ``(h, w, c)``; the
      grid of positions is interpolated, see :func:`resize_positions`.
    num_classes: k; the file's head is kept where it has as many, and is
      otherwise drawn afresh. None for the head of the file, or for pooled
      features where it has none.
    key: of a fresh head; ``jax.random.key(0)`` by default.
    **options: further attributes of :class:`VisionTransformer`; not those that
      the file decides: ``width``, ``depth``, ``mlp_dim``, ``patch_size`` and
      ``epsilon``.

  Returns:
    ``(net, params)``.

  Raises:
    ValueError: naming the file and what is wrong with it, see
      ``pretrained.read``, or the argument.
  """
  found = pretrained.read(path, num_heads=num_heads)
  if num_classes is None:
    num_classes = found.num_classes
  for name in ("epsilon", "width", "depth", "mlp_dim", "patch_size"):
    if name in options:
      raise ValueError(f"{name} must be left out: the file decides it.")
  net = VisionTransformer(
    width=found.width,
    depth=found.depth,
    num_heads=found.num_heads,
    mlp_dim=found.mlp_dim,
    patch_size=found.patch_size,
    num_classes=num_classes,
    preprocess=preprocess,
    epsilon=found.epsilon,
    **options,
  )
  if image_shape is None:
    image_shape = tuple(
      n * side for n, side in zip(found.grid, found.patch_size)
    )
  vit_arguments.image(image_shape)
  if len(tuple(image_shape)) == 2:
    image_shape = (*image_shape, found.channels)
  return net, _adapt(found, net, image_shape, key)


def pretrained_params(
  net: VisionTransformer,
  path,
  image_shape: Sequence[int],
  *,
  key: PRNGKeyArray | None = None,
) -> dict[str, Any]:
  """Parameters of a file for a network that is already described.

  Args:
    net: of the file's sizes, heads and epsilon; its head is the file's where
      that has as many outputs, and is otherwise drawn afresh.
    path: see :func:`load_safetensors`.
    image_shape: ``(h, w)`` or ``(h, w, c)``.
    key: of a fresh head; ``jax.random.key(0)`` by default.

  Raises:
    ValueError: naming the file and the attribute in which it is another
      network, or see ``pretrained.read``.
  """
  found = pretrained.read(path, num_heads=net.num_heads)
  for name in ("width", "depth", "mlp_dim", "patch_size", "epsilon"):
    here, there = getattr(net, name), getattr(found, name)
    if here != there:
      raise ValueError(
        f"{name} must be {there} for the weights of {found.path}, got {here}."
      )
  return _adapt(found, net, image_shape, key)


def _adapt(found, net, image_shape, key) -> dict[str, Any]:
  """Positions for the images, the head for the outputs."""
  channels = vit_arguments.image(image_shape)[2]
  if channels != found.channels:
    raise ValueError(
      f"image_shape must have the {found.channels} channels of {found.path}, "
      f"got {tuple(image_shape)}."
    )
  vit_arguments.channels(net.preprocess, channels)
  keeps_head = None not in (net.num_classes, found.num_classes)
  keeps_head = keeps_head and net.num_classes == found.num_classes
  pretrained.check_use(found, net.preprocess, net.pool, keeps_head)
  params = jax.tree.map(jnp.asarray, found.params)
  params["position"] = resize_positions(
    params["position"], found.grid, net.grid(image_shape)
  )
  if net.num_classes != found.num_classes:
    params.pop("head", None)
    if net.num_classes is not None:
      key = jax.random.key(0) if key is None else key
      params["head"] = masked.dense(key, net.width, net.num_classes)
  return params
