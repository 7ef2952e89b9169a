"""Vision transformers in NumPy, and their files, for the tests of ViT."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def forward(net, params, images, keep=None):
  """Hidden states and pooled features in float64, one head at a time.

  Args:
    net: a VisionTransformer.
    params: its parameters.
    images: ``[b, h, w, c]``.
    keep: ``bool[b, N]``; what is not kept is not in the sequence at all.
  """
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  x = np.asarray(images, np.float64)
  if net.preprocess is not None:
    mean, std = (np.asarray(v) for v in net.preprocess)
    x = (x - mean) / std
  rows, columns = net.patch_size
  items = []
  for index, image in enumerate(x):
    pieces = [
      image[i : i + rows, j : j + columns].ravel()
      for i in range(0, image.shape[0], rows)
      for j in range(0, image.shape[1], columns)
    ]
    tokens = np.stack(pieces) @ p["embed"]["kernel"] + p["embed"]["bias"]
    tokens = tokens + p["position"][1:]
    if keep is not None:
      tokens = tokens[keep[index]]
    sequence = np.concatenate([[p["cls"] + p["position"][0]], tokens])
    items.append(_encode(net, p, sequence))
  return items


def logits(net, params, images, keep=None):
  """``[b, k]`` of the class token, or of the mean over the others."""
  found = []
  for sequence in forward(net, params, images, keep):
    pooled = sequence[0] if net.pool == "cls" else sequence[1:].mean(axis=0)
    head = params["head"]
    found.append(
      pooled @ np.asarray(head["kernel"], np.float64)
      + np.asarray(head["bias"], np.float64)
    )
  return np.stack(found)


def _encode(net, p, x):
  for index in range(net.depth):
    block = p["blocks"][str(index)]
    y = _norm(block["norm_attention"], x, net.epsilon)
    heads = []
    for head in range(net.num_heads):
      query, key, value = (
        y @ block["qkv"]["kernel"][:, part, head]
        + block["qkv"]["bias"][part, head]
        for part in range(3)
      )
      scores = query @ key.T / np.sqrt(query.shape[-1])
      heads.append(scipy.special.softmax(scores, axis=-1) @ value)
    x = x + _dense(block["out"], np.concatenate(heads, axis=-1))
    y = _dense(block["expand"], _norm(block["norm_mlp"], x, net.epsilon))
    y = y * 0.5 * (1 + scipy.special.erf(y / np.sqrt(2)))
    x = x + _dense(block["contract"], y)
  return _norm(p["norm"], x, net.epsilon)


def _dense(layer, x):
  return x @ layer["kernel"] + layer["bias"]


def _norm(layer, x, epsilon):
  deviation = np.sqrt(x.var(axis=-1, keepdims=True) + epsilon)
  return (x - x.mean(axis=-1, keepdims=True)) / deviation * layer[
    "scale"
  ] + layer["bias"]


def random_params(net, image_shape, seed=0):
  """Every parameter random, so that a forgotten or swapped one shows."""
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), image_shape))
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    scale = 0.3 if leaf.ndim == 1 else 1 / np.sqrt(leaf.shape[0])
    value = scale * rng.normal(size=leaf.shape)
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return jnp.asarray(value + name.endswith("scale"), jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def timm(net, params):
  """``{name: array}`` as timm has it."""
  blocks = {}
  for index, block in params["blocks"].items():
    for here, there in (
      ("norm_attention", "norm1"),
      ("norm_mlp", "norm2"),
      ("out", "attn.proj"),
      ("expand", "mlp.fc1"),
      ("contract", "mlp.fc2"),
    ):
      blocks |= _layer(f"blocks.{index}.{there}", block[here])
    blocks |= _layer(f"blocks.{index}.attn.qkv", _flat(block["qkv"]))
  tensors = {
    "cls_token": np.asarray(params["cls"])[None, None],
    "pos_embed": np.asarray(params["position"])[None],
    **_patch(net, "patch_embed.proj", params),
    **blocks,
    **_layer("norm", params["norm"]),
  }
  return tensors | (_layer("head", params["head"]) if "head" in params else {})


CLASSIC = {
  "norm_attention": "layernorm_before",
  "norm_mlp": "layernorm_after",
  "out": "attention.output.dense",
  "expand": "intermediate.dense",
  "contract": "output.dense",
  "qkv": [f"attention.attention.{n}" for n in ("query", "key", "value")],
}
NEWER = {
  "norm_attention": "layernorm_before",
  "norm_mlp": "layernorm_after",
  "out": "attention.o_proj",
  "expand": "mlp.fc1",
  "contract": "mlp.fc2",
  "qkv": [f"attention.{n}_proj" for n in "qkv"],
}


def hugging_face(net, params, *, newer=False, prefix="vit."):
  """As transformers writes it, or as newer versions have it in memory."""
  layer = prefix + ("layers" if newer else "encoder.layer")
  blocks = {}
  for index, block in params["blocks"].items():
    for here, there in (NEWER if newer else CLASSIC).items():
      if here != "qkv":
        blocks |= _layer(f"{layer}.{index}.{there}", block[here])
        continue
      for part, name in enumerate(there):
        kernel = np.asarray(block["qkv"]["kernel"])[:, part]
        bias = np.asarray(block["qkv"]["bias"])[part]
        one = {"kernel": kernel.reshape(len(kernel), -1), "bias": bias.ravel()}
        blocks |= _layer(f"{layer}.{index}.{name}", one)
  embeddings = f"{prefix}embeddings"
  tensors = {
    f"{embeddings}.cls_token": np.asarray(params["cls"])[None, None],
    f"{embeddings}.position_embeddings": np.asarray(params["position"])[None],
    **_patch(net, f"{embeddings}.patch_embeddings.projection", params),
    **blocks,
    **_layer(f"{prefix}layernorm", params["norm"]),
  }
  if "head" in params:
    tensors |= _layer("classifier", params["head"])
  return tensors


def _flat(qkv):
  kernel = np.asarray(qkv["kernel"])
  bias = np.asarray(qkv["bias"]).ravel()
  return {"kernel": kernel.reshape(len(kernel), -1), "bias": bias}


def _layer(name, layer):
  if "scale" in layer:
    weight = np.asarray(layer["scale"])
  else:
    weight = np.asarray(layer["kernel"]).T
  return {f"{name}.weight": weight, f"{name}.bias": np.asarray(layer["bias"])}


def _patch(net, name, params):
  kernel = np.asarray(params["embed"]["kernel"])
  kernel = kernel.reshape(*net.patch_size, -1, net.width)
  return {
    f"{name}.weight": kernel.transpose(3, 2, 0, 1),
    f"{name}.bias": np.asarray(params["embed"]["bias"]),
  }


def save(path, tensors, change=lambda header: None):
  """A safetensors file; ``change`` alters its header in place."""
  header, offset = {"__metadata__": {"format": "pt"}}, 0
  for name, value in tensors.items():
    header[name] = {
      "dtype": DTYPES[value.dtype.name],
      "shape": list(value.shape),
      "data_offsets": [offset, offset + value.nbytes],
    }
    offset += value.nbytes
  change(header)
  text = json.dumps(header).encode()
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for value in tensors.values():
      file.write(np.ascontiguousarray(value).tobytes())
  return path
