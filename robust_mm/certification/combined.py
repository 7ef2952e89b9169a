"""Certificates from balls, and the best of every source per example."""

import dataclasses

import jax
import jax.numpy as jnp

from robust_mm import margins
from robust_mm import modalities
from robust_mm._types import Model
from robust_mm.certification import balls as balls_lib
from robust_mm.certification import programs
from robust_mm.certification import relaxed
from robust_mm.certification.balls import Balls
from robust_mm.certification.certificates import Certificate


def from_balls(
  model: Model,
  params,
  state,
  inputs,
  present,
  *,
  units,
  norm: tuple,
  source: str,
) -> Certificate:
  """What bounds inside balls prove; any model there is a relaxation for.

  Args:
    model: need not have a geometry.
    params: its parameters.
    state: its state.
    inputs: ``{m: [b, ...]}``.
    present: ``{m: bool[b]}``.
    units: ``{m: s_m}``.
    norm: ``((m, norm), ...)``.
    source: "local", "relaxation" or "best" (the larger of both).

  Raises:
    ValueError: naming the operation there is no relaxation for.
  """
  outputs = programs.evaluate(
    model, params, state, inputs, present, separate=False
  )
  logits = outputs.logits
  problem = _problem(
    params, state, inputs, present, units, jnp.argmax(logits, axis=-1)
  )
  network = relaxed.network_of(model, problem)
  methods = relaxed.METHODS if source == "best" else (source,)
  found = [
    relaxed.balls(network, problem, method=method, norm=norm)
    for method in methods
  ]
  margin, slopes = relaxed.first_order(network, problem, norm)
  chosen = margins.one_hot(problem.prediction, logits.shape[-1])
  valid = jnp.any(modalities.stack(present, axis=-1), axis=-1)
  sure = jnp.all(jnp.isfinite(margin), axis=-1)[..., None]
  margin = jnp.where(sure, margin, 0)
  margin = jnp.where(chosen | ~valid[..., None], jnp.inf, margin)
  base = Certificate(
    prediction=problem.prediction,
    radius=None,
    modality_radius=None,
    margins=margin,
    sensitivity={
      name: jnp.where(sure & ~chosen, slope, 0)
      for name, slope in slopes.items()
    },
    contributions=None,
    nearest_class=None,
    runner_up=jnp.argmax(jnp.where(chosen, -jnp.inf, logits), axis=-1),
    vulnerability=None,
    valid=valid,
    present=present,
    units={m: jnp.asarray(s, logits.dtype) for m, s in units.items()},
    fusion="ball",
    source=source,
    sound=True,
    rival="all",
    norm=norm,
  )
  nearest = base.joint_nearest_class()
  base = dataclasses.replace(
    base,
    nearest_class=nearest,
    vulnerability=base.sensitivity_shares(nearest),
  )
  nothing = Balls(
    jnp.zeros_like(found[0].joint),
    jax.tree.map(jnp.zeros_like, found[0].alone),
  )
  return _with_balls(base, nothing, found, methods)


def best_of_all(
  certificate: Certificate,
  network,
  params,
  state,
  inputs,
  present,
) -> Certificate:
  """A global certificate, widened by the balls of every other source."""
  problem = _problem(
    params, state, inputs, present, certificate.units, certificate.prediction
  )
  found = [
    relaxed.balls(
      network,
      problem,
      method=method,
      norm=certificate.norm,
      sensitivity=(
        certificate.sensitivity if certificate.fusion == "additive" else None
      ),
    )
    for method in relaxed.METHODS
  ]
  # Logits that the geometry does not explain carry no certificate at all: all
  # margins but the infinite one of the prediction are 0 then.
  rival = ~margins.one_hot(
    certificate.prediction, certificate.margins.shape[-1]
  )
  trusted = jnp.any(rival & (certificate.margins != 0), axis=-1)
  found = [jax.tree.map(lambda r: jnp.where(trusted, r, 0), f) for f in found]
  start = Balls(certificate.radius, certificate.modality_radius)
  widened = _with_balls(
    certificate, start, found, (certificate.source, *relaxed.METHODS)
  )
  return dataclasses.replace(widened, source="best")


def network_or_reason(
  model: Model, params, state, inputs, present, units, prediction
):
  """``(network, None)``, or None and why the model has no relaxation."""
  problem = _problem(params, state, inputs, present, units, prediction)
  try:
    return relaxed.network_of(model, problem), None
  except ValueError as error:
    return None, error


def _problem(params, state, inputs, present, units, prediction):
  return relaxed.Problem(
    params=params,
    state=state,
    inputs=inputs,
    present=present,
    prediction=prediction,
    units=units,
  )


def _with_balls(base, start: Balls, found, names) -> Certificate:
  """Radii and their source; ties go to the earlier name."""
  joint = [start.joint, *(f.joint for f in found)]
  if len(names) == len(found):
    joint = joint[1:]
  stacked = jnp.stack(joint)
  union = jax.tree.map(lambda *r: jnp.max(jnp.stack(r), axis=0), *found)
  alone = {
    name: jnp.maximum(start.alone[name], union.alone[name])
    for name in start.alone
  }
  return dataclasses.replace(
    base,
    radius=jnp.max(stacked, axis=0),
    modality_radius=alone,
    balls=balls_lib.Balls(union.joint, union.alone),
    radius_source=jnp.argmax(stacked, axis=0).astype(jnp.int32),
    sources=tuple(names),
  )
