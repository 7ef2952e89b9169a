r"""A causal transformer that spells what the modalities show.

Its memory is what the encoders say: tokens ``[b, N, d]`` of a vision
transformer, or one embedding ``[b, d]``, which is one token.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm import modalities
from robust_mm._types import Captions
from robust_mm._types import Outputs
from robust_mm._types import Params
from robust_mm.models import caption_words
from robust_mm.models import masked
from robust_mm.models import vit_blocks

_DEVIATION = 0.02
_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionFusion:
  r"""A caption letter by letter, and through it a class.

  .. math:: p(w \mid x) = \prod_t p(w_t \mid w_{<t}, x), \qquad
            z_c = \log p(caption_c \mid x)

  with :math:`caption_c` the one that names class c in the slot of every present
  modality. So the logits of the model are log-likelihoods of whole sentences,
  and whatever attacks or evaluates a classifier attacks and evaluates these.
  They are no sum of per-modality terms: no scores, no geometry.

  Formal guarantees:
    - The letter at t depends on letters before t alone.
    - Tokens of an absent modality have weight 0 exactly, whatever they hold. A
      learnt first token is always there to attend to.

  Attributes:
    num_classes: k.
    words: one a class; those of digits where none are given.
    width: of the decoder.
    num_layers: blocks of causal attention, attention to the memory, perceptron.
    num_heads: divides the width.

  Parameters: ``enter/<m>``, ``kind/<m>`` [width], ``first`` [width], ``letter``
  [V, width], ``start`` [width], ``position`` [t, width], ``blocks/<i>/...``,
  ``norm`` and ``last``.
  """

  num_classes: int
  words: tuple[str, ...] = ()
  width: int = 64
  num_layers: int = 2
  num_heads: int = 4

  def __post_init__(self):
    _validate.at_least(2, num_classes=self.num_classes)
    _validate.at_least(
      1, width=self.width, num_layers=self.num_layers, num_heads=self.num_heads
    )
    caption_words.words_for(self.num_classes, self.words)
    if self.width % self.num_heads:
      raise ValueError(
        f"num_heads must divide width {self.width}, got {self.num_heads}."
      )

  def speller(self, names) -> caption_words.Speller:
    """Of these modalities."""
    words = caption_words.words_for(self.num_classes, self.words)
    return caption_words.Speller(modalities.names(names), words)

  def init(
    self, key: PRNGKeyArray, embedding_dims: Mapping[str, int]
  ) -> dict[str, Any]:
    """Parameters for encoders of these widths."""
    speller = self.speller(embedding_dims)
    width, number = self.width, len(speller.vocabulary)
    keys = iter(jax.random.split(key, 6 + 2 * len(embedding_dims)))
    draw = lambda *shape: _DEVIATION * jax.random.normal(next(keys), shape)  # noqa: E731
    block_keys = jax.random.split(next(keys), self.num_layers)
    return {
      "enter": {
        name: masked.dense(next(keys), embedding_dims[name], width)
        for name in speller.slots
      },
      "kind": {name: draw(width) for name in speller.slots},
      "first": draw(width),
      "letter": draw(number, width),
      "start": draw(width),
      "position": draw(speller.length, width),
      "blocks": {str(i): self._init_block(k) for i, k in enumerate(block_keys)},
      "norm": vit_blocks.init_norm(width),
      "last": masked.dense(next(keys), width, number),
    }

  def _init_block(self, key):
    own, memory = jax.random.split(key)
    read = vit_blocks.init(memory, self.width, self.num_heads, self.width)
    return {
      **vit_blocks.init(own, self.width, self.num_heads, 4 * self.width),
      "read": {k: read[k] for k in ("norm_attention", "qkv", "out")},
    }

  def __call__(
    self,
    params: Params,
    embeddings: Mapping[str, Array],
    present: Mapping[str, Array],
  ) -> Outputs:
    """The log-likelihood ``[b, k]`` of the caption of every class."""
    speller = self.speller(embeddings)
    memory = self._memory(params, embeddings, present)
    size = memory[0].shape[0]

    def one(index):
      classes = dict.fromkeys(speller.slots, jnp.full(size, index))
      ids = speller.spell(classes, present)
      letters = jnp.take(params["letter"], ids, axis=0)
      return log_likelihood(self._decode(params, memory, letters), ids)

    return Outputs(
      logits=jax.vmap(one, out_axes=1)(jnp.arange(self.num_classes)),
      scores=None,
      embeddings=modalities.mask(embeddings, present),
      mixed=True,
    )

  def captions(self, names) -> Captions:
    """What there is to train and to attack beside the logits."""
    speller = self.speller(names)
    return Captions(
      slots=speller.slots,
      words=speller.words,
      none=caption_words.NONE,
      vocabulary=speller.vocabulary,
      length=speller.length,
      pad=caption_words.PAD,
      end=caption_words.END,
      spell=speller.spell,
      texts=speller.texts,
      ids=speller.ids,
      logits=functools.partial(self._said, speller),
      generate=functools.partial(self._generate, speller),
      letters=lambda params: params["fusion"]["letter"],
      log_likelihood=log_likelihood,
    )

  def _said(self, speller, params, embeddings, present, ids, letters=None):
    del speller
    params = params["fusion"]
    if letters is None:
      letters = jnp.take(params["letter"], ids, axis=0)
    memory = self._memory(params, embeddings, present)
    return self._decode(params, memory, letters)

  def _generate(
    self, speller, params, embeddings, present, prompt=None, fixed=None
  ):
    """Greedy; ``prompt`` [b, t] holds where ``fixed`` bool[b, t] says so."""
    params = params["fusion"]
    memory = self._memory(params, embeddings, present)
    size = memory[0].shape[0]
    empty = jnp.full((size, speller.length), caption_words.PAD, jnp.int32)

    def letter(carry, place):
      ids, ended = carry
      letters = jnp.take(params["letter"], ids, axis=0)
      said = self._decode(params, memory, letters)
      # The padding is no letter that could be said.
      said = said.at[..., caption_words.PAD].set(-jnp.inf)
      chosen = jnp.argmax(jnp.take(said, place, axis=1), axis=-1)
      if prompt is not None:
        given = jnp.take(prompt, place, axis=1)
        chosen = jnp.where(jnp.take(fixed, place, axis=1), given, chosen)
      chosen = jnp.where(ended, caption_words.PAD, chosen).astype(ids.dtype)
      ids = ids.at[:, place].set(chosen)
      return (ids, ended | (chosen == caption_words.END)), None

    begin = (empty, jnp.zeros(size, bool))
    (ids, _), _ = jax.lax.scan(letter, begin, jnp.arange(speller.length))
    return ids

  def _memory(self, params, embeddings, present):
    """``([b, 1 + N, width], bool[b, 1 + N])``."""
    names = modalities.names(embeddings)
    size = present[names[0]].shape[0]
    shape = (size, 1, self.width)
    parts = [jnp.broadcast_to(params["first"][None, None], shape)]
    keep = [jnp.ones((size, 1), bool)]
    for name in names:
      x = embeddings[name]
      x = x[:, None] if x.ndim == 2 else x
      here = present[name][:, None]
      x = jnp.where(here[..., None], x, jnp.zeros_like(x))
      entered = vit_blocks.dense(params["enter"][name], x)
      parts.append(entered + params["kind"][name][None, None])
      keep.append(jnp.broadcast_to(here, x.shape[:2]))
    return jnp.concatenate(parts, axis=1), jnp.concatenate(keep, axis=1)

  def _decode(self, params, memory, letters):
    """Logits ``[b, t, V]`` of every letter, given those before it."""
    start = jnp.broadcast_to(
      params["start"][None, None], (letters.shape[0], 1, self.width)
    )
    x = jnp.concatenate([start.astype(letters.dtype), letters[:, :-1]], axis=1)
    x = x + params["position"][None, : x.shape[1]]
    for index in range(self.num_layers):
      x = self._block(params["blocks"][str(index)], x, *memory)
    x = vit_blocks.norm(params["norm"], x, _EPSILON)
    return vit_blocks.dense(params["last"], x)

  def _block(self, params, x, memory, keep):
    y = vit_blocks.norm(params["norm_attention"], x, _EPSILON)
    query, key, value = jnp.unstack(vit_blocks.dense(params["qkv"], y), axis=2)
    y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + vit_blocks.dense(params["out"], jnp.reshape(y, x.shape))
    read = params["read"]
    y = vit_blocks.norm(read["norm_attention"], x, _EPSILON)
    kernel, bias = read["qkv"]["kernel"], read["qkv"]["bias"]
    query = vit_blocks.dense({"kernel": kernel[:, 0], "bias": bias[0]}, y)
    pair = {"kernel": kernel[:, 1:], "bias": bias[1:]}
    key, value = jnp.unstack(vit_blocks.dense(pair, memory), axis=2)
    y = vit_blocks.attend(query, key, value, keep, "xla")
    x = x + vit_blocks.dense(read["out"], jnp.reshape(y, x.shape))
    y = vit_blocks.norm(params["norm_mlp"], x, _EPSILON)
    y = vit_blocks.gelu(vit_blocks.dense(params["expand"], y))
    return x + vit_blocks.dense(params["contract"], y)


def log_likelihood(logits: Array, ids) -> Array:
  """``[b]``: log p of sentences ``[b, t]`` under logits ``[b, t, V]``."""
  each = optax.losses.softmax_cross_entropy_with_integer_labels(logits, ids)
  return -jnp.sum(jnp.where(ids != caption_words.PAD, each, 0), axis=-1)
