"""Contrasts between modalities: whose features belong together."""

import itertools
import math
from collections.abc import Mapping
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import PRNGKeyArray

from robust_mm import losses
from robust_mm import modalities
from robust_mm._types import Model
from robust_mm.models import masked

_SMALLEST = 1e-12


def init(
  key: PRNGKeyArray, names: Sequence[str], width: int, projection_dim: int
) -> dict:
  """``{"projection": {m: dense}, "log_scale": []}``.

  The logarithm of the scale counts from where it begins: weight decay pulls it
  there and not to a scale of 1.
  """
  made = {
    name: masked.dense(jax.random.fold_in(key, index), width, projection_dim)
    for index, name in enumerate(modalities.names(names))
  }
  return {"projection": made, "log_scale": jnp.zeros(())}


def scale(params: Mapping, temperature: float, max_scale: float) -> Array:
  r""":math:`\min(e^t, max)`, t beginning at ``log(1 / temperature)``."""
  begun = jnp.exp(params["log_scale"]) / temperature
  return jnp.minimum(begun, max_scale)


def clip(params: Mapping, temperature: float, max_scale: float) -> dict:
  """The logarithm back below its maximum, beyond which it has no gradient."""
  most = math.log(max_scale * temperature)
  return {**params, "log_scale": jnp.minimum(params["log_scale"], most)}


def embed(
  model: Model, params, projection: Mapping, tokens: Mapping, present: Mapping
) -> dict[str, Array]:
  """``{m: [b, c]}`` of length 1: each modality alone, pooled and projected."""
  parts = model.token_parts
  real = parts.real(tokens, present)
  found = {}
  for name in modalities.names(tokens):
    pooled, _ = parts.attend(params, {name: tokens[name]}, {name: real[name]})
    z = masked.apply(projection[name], pooled)
    square = jnp.sum(jnp.square(z), axis=-1, keepdims=True)
    found[name] = z * jax.lax.rsqrt(jnp.maximum(square, _SMALLEST))
  return found


def loss(
  model: Model,
  params,
  contrast: Mapping,
  tokens: Mapping[str, Array],
  present: Mapping[str, Array],
  factor: Array,
) -> Array:
  """The mean over pairs of modalities of ``losses.info_nce``.

  Args:
    model: of tokens.
    params: of the model.
    contrast: from :func:`init`.
    tokens: ``{m: [b, N_m, d]}`` of the encoders.
    present: ``{m: bool[b]}``.
    factor: the scale.
  """
  z = embed(model, params, contrast["projection"], tokens, present)
  terms = [
    losses.info_nce(
      z[first],
      z[second],
      scale=factor,
      present=present[first] & present[second],
    )
    for first, second in itertools.combinations(modalities.names(z), 2)
  ]
  return sum(terms) / len(terms)
