"""What others call the parameters of a vision transformer."""

import dataclasses
import re

from robust_mm.models import safetensors

# Parts of models that are something else, by the piece of a name that tells.
REFUSED = {
  r"(^|\.)(dist_token|distillation_token|head_dist|cls_classifier)": (
    "a distillation token"
  ),
  r"(^|\.)(reg_token|register_tokens)": "register tokens",
  r"(^|\.)(ls[12]|gamma_[12]|layer_scale[12]?|lambda_?[12])(\.|$)": (
    "scales of its blocks"
  ),
  r"(^|\.)(q_norm|k_norm)\.": "norms of queries and keys",
  r"(^|\.)fc_norm\.": "a norm behind its pooling",
  r"(^|\.)norm_pre\.": "a norm before its blocks",
  r"rel(ative)?_pos": "relative positions",
  r"^deit\.": "the layout of DeiT",
}
IGNORED = r"^(vit\.)?pooler\."  # the classifier reads the class token


@dataclasses.dataclass(frozen=True)
class Naming:
  """How one library calls what is here called otherwise.

  Attributes:
    name: of the library.
    epsilon: of its norms, where no config.json says otherwise.
    prefix: of everything but the head.
    plain: ``{path here: name there}`` outside the blocks.
    block: ``{path here: names there}`` of a block; three names are query, key
      and value.
    blocks: where block ``{i}`` is.
    head: name of the head.
  """

  name: str
  epsilon: float
  prefix: str
  plain: dict[str, str]
  block: dict[str, tuple[str, ...]]
  blocks: str
  head: str


_HF_PLAIN = {
  "embed": "embeddings.patch_embeddings.projection",
  "cls": "embeddings.cls_token",
  "position": "embeddings.position_embeddings",
  "norm": "layernorm",
}
_HF_FILE = {
  "norm_attention": ("layernorm_before",),
  "qkv": tuple(
    f"attention.attention.{part}" for part in ("query", "key", "value")
  ),
  "out": ("attention.output.dense",),
  "norm_mlp": ("layernorm_after",),
  "expand": ("intermediate.dense",),
  "contract": ("output.dense",),
}
_HF_MEMORY = {
  "norm_attention": ("layernorm_before",),
  "qkv": tuple(f"attention.{part}_proj" for part in "qkv"),
  "out": ("attention.o_proj",),
  "norm_mlp": ("layernorm_after",),
  "expand": ("mlp.fc1",),
  "contract": ("mlp.fc2",),
}
_TIMM_PLAIN = {
  "embed": "patch_embed.proj",
  "cls": "cls_token",
  "position": "pos_embed",
  "norm": "norm",
}
_TIMM_BLOCK = {
  "norm_attention": ("norm1",),
  "qkv": ("attn.qkv",),
  "out": ("attn.proj",),
  "norm_mlp": ("norm2",),
  "expand": ("mlp.fc1",),
  "contract": ("mlp.fc2",),
}
_HF, _TIMM = "Hugging Face ViT", "timm VisionTransformer"


def _hugging_face(prefix: str, blocks: str, block: dict) -> Naming:
  return Naming(
    _HF, 1e-12, prefix, _HF_PLAIN, block, f"{blocks}.{{i}}", "classifier"
  )


NAMINGS = (
  *(
    _hugging_face(prefix, blocks, block)
    for prefix in ("vit.", "")
    for blocks, block in (("encoder.layer", _HF_FILE), ("layers", _HF_MEMORY))
  ),
  Naming(_TIMM, 1e-6, "", _TIMM_PLAIN, _TIMM_BLOCK, "blocks.{i}", "head"),
)


def recognise(file, tensors) -> Naming:
  """The naming of a file; ValueError where it is none of these."""
  for naming in NAMINGS:
    block = naming.prefix + naming.blocks.format(i=0) + "."
    patch = f"{naming.prefix}{naming.plain['embed']}.weight"
    if patch in tensors and any(name.startswith(block) for name in tensors):
      return naming
  raise ValueError(
    f"{file} is no vision transformer in the naming of Hugging Face or timm: "
    f"it has {safetensors.listed(tensors) or 'no tensors'}."
  )


def depth(naming: Naming, tensors) -> int:
  """One more than the highest number of a block.

  And at most one more than there are blocks: of a number that leaves a gap the
  first missing block is evidence enough.
  """
  start = re.escape(naming.prefix + naming.blocks.format(i="#"))
  pattern = re.compile(start.replace(r"\#", r"(\d+)") + r"\.")
  found = [pattern.match(name) for name in tensors]
  numbers = {int(match[1]) for match in found if match}
  return 1 + min(max(numbers), len(numbers))


def names(naming: Naming, depth: int, has_head: bool) -> list[str]:
  """Every tensor of a whole model."""
  layers = [naming.plain["embed"], naming.plain["norm"]]
  for index in range(depth):
    for parts in naming.block.values():
      layers += [f"{naming.blocks.format(i=index)}.{part}" for part in parts]
  found = [
    f"{naming.prefix}{layer}.{kind}"
    for layer in layers
    for kind in ("weight", "bias")
  ]
  found += [naming.prefix + naming.plain[part] for part in ("cls", "position")]
  if has_head:
    found += [f"{naming.head}.weight", f"{naming.head}.bias"]
  return found
