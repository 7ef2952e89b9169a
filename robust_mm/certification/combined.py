"""Certificates from balls, alone or around a global one, per example."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool

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
) -> tuple[Certificate, Bool[Array, " b"]]:
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

  Returns:
    the certificate, and whether each example alone has the logits it has in
    this batch; one that has not has radius 0.

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
  _need_classes(logits)
  network = relaxed.network_of(model, problem)
  alone = relaxed.explains(model, network, problem, logits)
  methods = _methods(source)
  found = [
    relaxed.balls(network, problem, method=method, norm=norm)
    for method in methods
  ]
  margin, slopes = relaxed.first_order(network, problem, norm)
  chosen = margins.one_hot(problem.prediction, logits.shape[-1])
  valid = jnp.any(modalities.stack(present, axis=-1), axis=-1)
  found = [_trusted(balls, alone) for balls in found]
  sure = (alone & jnp.all(jnp.isfinite(margin), axis=-1))[..., None]
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
  return _with_balls(base, nothing, found, methods), alone


def widened(
  certificate: Certificate,
  model: Model,
  network,
  params,
  state,
  inputs,
  present,
  *,
  logits,
  source: str,
) -> Certificate:
  """A global certificate and the balls of other sources around it.

  Args:
    certificate: from global constants.
    model: whose certificate it is.
    network: of the model, see ``network_or_reason``.
    params, state, inputs, present: the batch.
    logits: ``[b, k]``, as the batch gave them.
    source: "best", or "local" for local constants beside the global ones.
  """
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
    for method in _methods(source)
  ]
  # Logits that the geometry does not explain carry no certificate at all: all
  # margins but the infinite one of the prediction are 0 then.
  rival = ~margins.one_hot(
    certificate.prediction, certificate.margins.shape[-1]
  )
  trusted = jnp.any(rival & (certificate.margins != 0), axis=-1)
  trusted &= relaxed.explains(model, network, problem, logits)
  found = [_trusted(balls, trusted) for balls in found]
  start = Balls(certificate.radius, certificate.modality_radius)
  names = (certificate.source, *_methods(source))
  made = _with_balls(certificate, start, found, names)
  return dataclasses.replace(made, source=source)


def network_or_reason(
  model: Model, params, state, inputs, present, units, prediction
):
  """``(network, None)``, or None and why the model has no relaxation."""
  problem = _problem(params, state, inputs, present, units, prediction)
  try:
    return relaxed.network_of(model, problem), None
  except ValueError as error:
    return None, error


def _methods(source: str) -> tuple[str, ...]:
  return relaxed.METHODS if source == "best" else (source,)


def _trusted(balls: Balls, good) -> Balls:
  """No ball around an example that is not ``good``."""
  return jax.tree.map(lambda radius: jnp.where(good, radius, 0), balls)


def _need_classes(logits) -> None:
  if logits.shape[-1] < 2:
    raise ValueError(
      f"logits must have at least two classes, got {logits.shape[-1]}."
    )


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
