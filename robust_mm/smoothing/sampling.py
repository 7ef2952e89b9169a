"""Counting classes under noise: the part that runs on the device.

Counts are integers and every random number belongs to an example's id and to
the number of its chunk, so they are the same however examples are batched or
sharded and however often the work is interrupted, bit by bit: the base
classifier is always called on ``chunk_size`` copies of one example.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Int
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm import modalities
from robust_mm._types import Inputs
from robust_mm._types import Present
from robust_mm.smoothing import noise as noise_lib

CHUNK_SIZE = 1000


def streams(key: PRNGKeyArray) -> tuple[PRNGKeyArray, PRNGKeyArray]:
  """The keys of the samples that select a class and that estimate it.

  The estimate is only honest on samples that the selection has not seen.
  """
  selection, estimation = jax.random.split(key)
  return selection, estimation


@functools.partial(
  jax.jit, static_argnames=("noise", "num_chunks", "chunk_size")
)
def count_classes(
  predict_fn,
  inputs: Inputs,
  present: Present,
  example_id: Int[Array, " b"],
  key: PRNGKeyArray,
  start,
  num_samples,
  *,
  noise: noise_lib.Noise,
  num_chunks: int,
  chunk_size: int = CHUNK_SIZE,
) -> Int[Array, "b k"]:
  """How often each class is predicted in some chunks of the noise.

  Add up what chunks ``0, 1, ..., ceil(num_samples / chunk_size) - 1`` give, in
  any order and grouping; chunks beyond that count nothing.

  Args:
    predict_fn: ``predict_fn(inputs {m: [s, ...]}, present {m: bool[s]}) ->
      logits [s, k]``, a ``jax.tree_util.Partial`` where it holds arrays.
    inputs: ``{m: [b, ...]}``.
    present: ``{m: bool[b]}``; absent inputs are zeros and stay so.
    example_id: with ``key`` and the chunk it decides the noise.
    key: of one of the two ``streams``.
    start: number of the first chunk.
    num_samples: samples of the whole job.
    noise: what is done to the inputs.
    num_chunks: chunks of this call.
    chunk_size: samples a chunk; another size draws other noise.

  Returns:
    int32 ``[b, k]``. Non-finite logits count for no class, and non-finite
    inputs give no counts at all. No gradient.
  """
  inputs = {name: jnp.asarray(value) for name, value in inputs.items()}
  present = {name: jnp.asarray(flag) for name, flag in present.items()}
  inputs = modalities.mask(inputs, present)
  chunks = start + jnp.arange(num_chunks)

  def one(example):
    values, here, usable, number = example
    example_key = jax.random.fold_in(key, number)
    copies = _repeat(values, chunk_size)
    flags = _repeat(here, chunk_size)

    def step(counts, chunk):
      chunk_key = jax.random.fold_in(example_key, chunk)
      noisy = noise_lib.apply(noise, chunk_key, copies)
      vote = _decide(predict_fn(modalities.mask(noisy, flags), flags))
      sample = chunk * chunk_size + jnp.arange(chunk_size)
      vote = jnp.where(sample < num_samples, vote, -1)
      return counts + _tally(vote, num_classes), None

    num_classes = _num_classes(predict_fn, noise, copies, flags)
    zero = jnp.zeros(num_classes, jnp.int32)
    counts, _ = jax.lax.scan(step, zero, chunks)
    return jnp.where(usable, counts, 0)

  return jax.lax.map(one, (inputs, present, _finite(inputs), example_id))


@functools.partial(jax.jit, static_argnames=("subsets",))
def count_votes(
  predict_fn, inputs: Inputs, present: Present, *, subsets: tuple
) -> Int[Array, "b s"]:
  """The class that each subset of the modalities votes for.

  Args:
    predict_fn: as in :func:`count_classes`.
    inputs: ``{m: [b, ...]}``.
    present: ``{m: bool[b]}``.
    subsets: names of the modalities that are left, each.

  Returns:
    int32 ``[b, s]``; -1, no vote, where a logit is not finite, where nothing of
    the subset is present, and for examples with non-finite inputs.
  """
  inputs = {name: jnp.asarray(value) for name, value in inputs.items()}
  names = modalities.names(inputs)
  usable = _finite(modalities.mask(inputs, present))

  def one(kept):
    left = {n: present[n] & kept[i] for i, n in enumerate(names)}
    vote = _decide(predict_fn(modalities.mask(inputs, left), left))
    some = jnp.any(modalities.stack(left), axis=0)
    return jnp.where(some & usable, vote, -1)

  kept = jnp.asarray([[n in subset for n in names] for subset in subsets])
  return jax.lax.map(one, kept).T


def _repeat(tree, size):
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape)), tree)


def _finite(inputs):
  """bool ``[b]``: every entry of every present modality is a number."""
  flags = [
    jnp.all(jnp.isfinite(jnp.reshape(value, (value.shape[0], -1))), axis=-1)
    for value in inputs.values()
  ]
  return jnp.all(jnp.stack(flags), axis=0)


def _num_classes(predict_fn, noise, copies, flags) -> int:
  def call(key, copies, flags):
    return predict_fn(noise_lib.apply(noise, key, copies), flags)

  key = jax.eval_shape(lambda: jax.random.key(0))
  logits = jax.eval_shape(call, key, copies, flags)
  check_logits(logits)
  return logits.shape[-1]


def check_logits(logits) -> None:
  """ValueError unless a base classifier returned ``[s, k]`` floats."""
  if not hasattr(logits, "dtype"):
    raise ValueError(
      "predict must return logits [s, k] as floats, got "
      f"{_validate.kind(logits)}."
    )
  if logits.ndim != 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
    raise ValueError(
      "predict must return logits [s, k] as floats, got shape "
      f"{logits.shape} of {logits.dtype}."
    )
  if logits.shape[-1] < 2:
    raise ValueError("predict must know at least two classes, got one.")


def _decide(logits):
  """The argmax, the first of equals; -1 where a logit is not finite."""
  check_logits(logits)
  finite = jnp.all(jnp.isfinite(logits), axis=-1)
  return jnp.where(finite, jnp.argmax(logits, axis=-1), -1).astype(jnp.int32)


def _tally(vote, num_classes: int):
  # -1 is no class and counts nowhere.
  hits = vote[:, None] == jnp.arange(num_classes)[None]
  return jnp.sum(hits, axis=0, dtype=jnp.int32)
