"""Weights of vision transformers from elsewhere, under the names used here.

Read are checkpoints of ``ViTForImageClassification`` and ``ViTModel`` of
Hugging Face transformers, with the names of their files and with those that
newer versions have in memory, and of timm's ``VisionTransformer``.
"""

import contextlib
import dataclasses
import math
import pathlib
import re
from typing import Any

import numpy as np

from robust_mm import _validate
from robust_mm.models import safetensors
from robust_mm.models import vit_arguments
from robust_mm.models import vit_namings

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"  # of Hugging Face
_GELU = ("gelu", "gelu (erf)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """A vision transformer as a file has it.

  Attributes:
    path: of the file.
    naming: "Hugging Face ViT" or "timm VisionTransformer".
    params: parameters as of ``vit.VisionTransformer``, float32 on the host;
      without ``head`` where the file has none.
    width: d.
    depth: blocks.
    num_heads: of ``config.json``, as given, or the usual one for the width.
    mlp_dim: of the perceptrons.
    patch_size: (rows, columns).
    channels: of an image.
    grid: (rows, columns) of patches that its positions are for.
    num_classes: k of its head, or None.
    epsilon: of the norms, by ``config.json`` or by the naming.
    dtype: that its patch projection is stored in: ``float32``, ``float16`` or
      ``bfloat16``; ``params`` are wider, and no more exact.
    preprocess: (mean, std) of its images as the files beside it say; None where
      they are mute.
    pool: "cls" or "mean", likewise.
  """

  path: pathlib.Path
  naming: str
  params: dict[str, Any]
  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  patch_size: tuple[int, int]
  channels: int
  grid: tuple[int, int]
  num_classes: int | None
  epsilon: float
  dtype: str
  preprocess: Any = None
  pool: str | None = None


def read(path, *, num_heads: int | None = None) -> Checkpoint:
  """A pretrained vision transformer, from a file or folder.

  ``config.json`` beside the file counts where it is there: heads, blocks,
  epsilon of the norms, size of the images. Without one a file that lacks its
  last blocks altogether cannot be told from a shallower model.

  Args:
    path: see ``safetensors.read``.
    num_heads: which tensors do not show; by default that of ``config.json``, or
      3, 6, 12 and 16 for the widths 192, 384, 768 and 1024.

  Raises:
    ValueError: one sentence naming the file: no vision transformer of a known
      naming, missing and surplus tensors (up to ten each), one of a wrong shape
      or with values that are not finite, parts that are not built here
      (distillation tokens, block scales, ...), a contradiction.
  """
  file = safetensors.locate(path)
  tensors = safetensors.read(file)
  for pattern, part in vit_namings.REFUSED.items():
    names = [name for name in tensors if re.search(pattern, name)]
    if names:
      raise ValueError(
        f"{file} is a model with {part}, which is not read: "
        f"{safetensors.listed(names)}."
      )
  tensors = {
    n: t for n, t in tensors.items() if not re.search(vit_namings.IGNORED, n)
  }
  naming = vit_namings.recognise(file, tensors)
  config = _config(file)
  # One block more than there are is enough to be missed.
  depth = vit_namings.depth(naming, tensors)
  if config["depth"]:
    depth = min(config["depth"], depth + 1)
  has_head = any(name.startswith(f"{naming.head}.") for name in tensors)
  expected = vit_namings.names(naming, depth, has_head)
  safetensors.compare(file, tensors, expected, f"a whole {naming.name}")
  source = _Source(file, naming, tensors)
  sizes = _sizes(source, config["image_size"])
  num_heads = _num_heads(file, sizes["width"], num_heads, config["num_heads"])
  num_classes = None
  if has_head:
    (num_classes,) = source.shape(f"{naming.head}.bias", 1)
  epsilon = config["epsilon"]
  return Checkpoint(
    path=file,
    naming=naming.name,
    params=_params(source, sizes, depth, num_heads, num_classes),
    depth=depth,
    num_heads=num_heads,
    num_classes=num_classes,
    epsilon=naming.epsilon if epsilon is None else epsilon,
    dtype=tensors[f"{source.name('embed')}.weight"].dtype.name,
    preprocess=config["preprocess"],
    pool=config["pool"],
    **sizes,
  )


class _Source:
  """Tensors by name, checked when they are taken."""

  def __init__(self, file, naming: vit_namings.Naming, tensors):
    self.file, self.naming, self.tensors = file, naming, tensors

  def name(self, part: str) -> str:
    return self.naming.prefix + self.naming.plain[part]

  def shape(self, name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that fixes sizes rather than having to fit."""
    shape = self.tensors[name].shape
    if len(shape) != rank or 0 in shape:
      raise ValueError(
        f"{self.file}: tensor {name} must have {rank} axes, none of them "
        f"empty, got shape {shape}."
      )
    return shape

  def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of a known shape as float32, in memory."""
    tensor = self.tensors[name]
    if tensor.shape != shape:
      raise ValueError(
        f"{self.file}: tensor {name} must have shape {shape}, got "
        f"{tensor.shape}."
      )
    tensor = np.array(tensor, np.float32)
    if not np.all(np.isfinite(tensor)):
      raise ValueError(f"{self.file}: tensor {name} is not finite.")
    return tensor

  def linear(self, name: str, out: int, size: int) -> dict[str, np.ndarray]:
    kernel = self.take(f"{name}.weight", (out, size))
    return {
      "kernel": np.ascontiguousarray(kernel.T),
      "bias": self.take(f"{name}.bias", (out,)),
    }

  def norm(self, name: str, size: int) -> dict[str, np.ndarray]:
    return {
      "scale": self.take(f"{name}.weight", (size,)),
      "bias": self.take(f"{name}.bias", (size,)),
    }


def _config(file: pathlib.Path) -> dict[str, Any]:
  """What config.json says, in either library's words; None where it is mute."""
  path = file.parent / CONFIG
  given = safetensors.read_json(path) if path.is_file() else {}
  arguments = given.get("model_args")
  given |= arguments if isinstance(arguments, dict) else {}
  say = lambda *names: next(  # noqa: E731
    (given[n] for n in names if given.get(n) is not None), None
  )
  activation = say("hidden_act", "act")
  if activation is not None and activation not in _GELU:
    raise ValueError(
      f"{path}: the activation must be gelu, by the error function; it is "
      f"{activation!r}."
    )
  said = {
    "num_heads": say("num_attention_heads", "num_heads"),
    "depth": say("num_hidden_layers", "depth"),
    "epsilon": say("layer_norm_eps", "norm_eps"),
    "image_size": say("image_size", "img_size"),
    "preprocess": _preprocess(file, given),
    "pool": {"token": "cls", "avg": "mean"}.get(str(say("global_pool"))),
  }
  with _blame(path):
    for name in ("num_heads", "depth"):
      if said[name] is not None:
        _validate.at_least(1, **{name: said[name]})
    if said["epsilon"] is not None:
      _validate.positive(epsilon=said["epsilon"])
    if said["image_size"] is not None:
      said["image_size"] = vit_arguments.pair(said["image_size"])
  return said


def _preprocess(file: pathlib.Path, given: dict[str, Any]):
  """(mean, std) that either library states beside a file, or None."""
  there = file.parent / PREPROCESSOR
  said = safetensors.read_json(there) if there.is_file() else {}
  path, pair = there, (said.get("image_mean"), said.get("image_std"))
  if said.get("do_normalize") is False or None in pair:
    own = given.get("pretrained_cfg")
    own = own if isinstance(own, dict) else given
    path, pair = file.parent / CONFIG, (own.get("mean"), own.get("std"))
  if None in pair:
    return None
  with _blame(path):
    return vit_arguments.preprocess(pair)


def check_use(found: Checkpoint, preprocess, pool: str, keeps_head: bool):
  """ValueError where a model is to be used otherwise than the files say.

  Images that come normalised (``preprocess`` None) are nobody's business here,
  and a fresh head may look at anything.
  """
  stated = None not in (preprocess, found.preprocess)
  if stated and not vit_arguments.same_preprocess(preprocess, found.preprocess):
    raise ValueError(
      f"preprocess must be {found.preprocess} as the files beside {found.path} "
      f"say, got {preprocess}."
    )
  if keeps_head and found.pool not in (None, pool):
    raise ValueError(
      f"pool must be {found.pool!r} for the head of {found.path}, as the "
      f"{CONFIG} beside it says, got {pool!r}."
    )


@contextlib.contextmanager
def _blame(path):
  try:
    yield
  except (TypeError, ValueError) as error:
    raise ValueError(f"{path}: {error}") from error


def _sizes(source: _Source, image_size) -> dict[str, Any]:
  naming = source.naming
  embed = f"{source.name('embed')}.weight"
  width, channels, *patch = source.shape(embed, 4)
  position = source.name("position")
  number = source.shape(position, 3)[1] - 1
  block = naming.prefix + naming.blocks.format(i=0)
  expand = f"{block}.{naming.block['expand'][0]}.weight"
  if image_size is None:
    side = math.isqrt(max(number, 0))
    grid = (side, side)
  else:
    grid = tuple(size // side for size, side in zip(image_size, patch))
  if number < 1 or math.prod(grid) != number:
    raise ValueError(
      f"{source.file}: tensor {position} has {number} positions beside the "
      f"class token's, which is no "
      + ("square." if image_size is None else f"grid of {grid} as in {CONFIG}.")
    )
  return {
    "width": width,
    "mlp_dim": source.shape(expand, 2)[0],
    "patch_size": tuple(patch),
    "channels": channels,
    "grid": grid,
  }


def _num_heads(file, width: int, given: int | None, said: int | None) -> int:
  if given is not None and said is not None and given != said:
    raise ValueError(
      f"num_heads must be {said} as in the {CONFIG} beside {file}, got {given}."
    )
  if given is not None:
    _validate.at_least(1, num_heads=given)
  usual = {size[0]: size[2] for size in vit_arguments.SIZES.values()}
  number = given or said or usual.get(width)
  if number is None:
    raise ValueError(
      f"num_heads must be given for {file}: it is {width} wide, and there is "
      f"no {CONFIG} beside it."
    )
  if width % number:
    raise ValueError(f"num_heads must divide width {width}, got {number}.")
  return number


def _params(source, sizes, depth, num_heads, num_classes) -> dict[str, Any]:
  width, naming = sizes["width"], source.naming
  patch, channels = sizes["patch_size"], sizes["channels"]
  embed = source.name("embed")
  kernel = source.take(f"{embed}.weight", (width, channels, *patch))
  number = 1 + math.prod(sizes["grid"])
  params = {
    "embed": {
      # Rows of a flattened patch: (row, column, channel).
      "kernel": np.reshape(np.transpose(kernel, (2, 3, 1, 0)), (-1, width)),
      "bias": source.take(f"{embed}.bias", (width,)),
    },
    "cls": source.take(source.name("cls"), (1, 1, width))[0, 0],
    "position": source.take(source.name("position"), (1, number, width))[0],
    "blocks": {
      str(index): _block(source, index, width, sizes["mlp_dim"], num_heads)
      for index in range(depth)
    },
    "norm": source.norm(source.name("norm"), width),
  }
  if num_classes is not None:
    params["head"] = source.linear(naming.head, num_classes, width)
  return params


def _block(source, index, width, mlp_dim, num_heads) -> dict[str, Any]:
  naming = source.naming
  start = naming.prefix + naming.blocks.format(i=index)
  names = {
    part: [f"{start}.{name}" for name in given]
    for part, given in naming.block.items()
  }
  if len(names["qkv"]) == 1:
    qkv = source.linear(names["qkv"][0], 3 * width, width)
  else:
    parts = [source.linear(name, width, width) for name in names["qkv"]]
    qkv = {
      key: np.concatenate([part[key] for part in parts], axis=-1)
      for key in ("kernel", "bias")
    }
  heads = (3, num_heads, width // num_heads)
  return {
    "norm_attention": source.norm(names["norm_attention"][0], width),
    "qkv": {
      "kernel": np.reshape(qkv["kernel"], (width, *heads)),
      "bias": np.reshape(qkv["bias"], heads),
    },
    "out": source.linear(names["out"][0], width, width),
    "norm_mlp": source.norm(names["norm_mlp"][0], width),
    "expand": source.linear(names["expand"][0], mlp_dim, width),
    "contract": source.linear(names["contract"][0], width, mlp_dim),
  }
