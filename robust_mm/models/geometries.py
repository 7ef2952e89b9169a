"""The geometry of a model, gathered from its encoders and its head."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from robust_mm.models import functional


def make(parts, fusion, encoders, normalizers, shapes) -> Callable | None:
  """``geometry(params)`` of a model; None where the head has none."""
  if not hasattr(fusion, "geometry"):
    return None
  radii = {name: encoders[name].embedding_radius for name in parts}

  def constant(name: str, params) -> Array | None:
    value = functional.encoder_constant(
      encoders[name], parts[name], params["encoders"][name]
    )
    return None if value is None else value * normalizers[name].constant

  def nominal(name: str) -> Array | None:
    # Of others only their own bound is known, projected or not.
    if parts[name].project is None or not encoders[name].one_lipschitz:
      return None
    return jnp.asarray(normalizers[name].constant, jnp.float32)

  def chain(name: str, params):
    found = functional.encoder_chain(
      encoders[name], parts[name], params["encoders"][name]
    )
    return (
      None if found is None else normalizers[name].before(found, shapes[name])
    )

  def linear(name: str, params, chain):
    if chain is not None:
      return chain
    found = functional.encoder_linear(parts[name], params["encoders"][name])
    if found is None:
      return None
    first, *rest = found
    return (first * normalizers[name].constant, *rest)

  def geometry(params):
    constants = {name: constant(name, params) for name in parts}
    stated = fusion.geometry(params["fusion"], constants)
    after = {name: nominal(name) for name in parts}
    if any(value is not None for value in after.values()):
      stated = dataclasses.replace(stated, nominal=after)
    chains = dict.fromkeys(parts)
    if stated.fusion == "additive":  # a chain ends in the rows of the head
      chains = {name: chain(name, params) for name in parts}
    if any(layers is not None for layers in chains.values()):
      stated = dataclasses.replace(stated, chain=chains)
    maps = {name: linear(name, params, chains[name]) for name in parts}
    if any(matrices is not None for matrices in maps.values()):
      stated = dataclasses.replace(stated, linear=maps)
    if not any(radii.values()):
      return stated
    bounds = {
      name: None if radius is None else jnp.asarray(radius, jnp.float32)
      for name, radius in radii.items()
    }
    return dataclasses.replace(stated, embedding_radius=bounds)

  return geometry
