"""The release check: does float64 confirm what a certificate says?"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import margins
from robust_mm._types import Batch
from robust_mm._types import Model
from robust_mm._types import Params
from robust_mm._types import State
from robust_mm.certification import batches
from robust_mm.certification import certificates
from robust_mm.certification import door
from robust_mm.certification import programs
from robust_mm.certification import relaxed
from robust_mm.certification.certificates import Certificate


def recheck_fp64(
  model: Model,
  params: Params,
  batch: Batch,
  certificate: Certificate,
  *,
  state: State = None,
) -> int:
  """Counts examples of which float64 arithmetic does not confirm everything.

  Everything (constants, tables, forward pass) is computed again in float64
  without slack. An example counts

  - when its prediction is another one and a radius is not 0;
  - when a margin is larger than there, or a sensitivity or drop smaller:
    ``covers``, ``frontier`` and every radius follow from these;
  - when its radius in any joint ball, of a modality alone, or without a
    modality is larger than there;
  - when a radius of ``balls`` is proved there neither by the linear relaxation
    nor by local constants. (A search may stop elsewhere in float64, so it is
    the stated ball that is tried.)

  Must be 0. Weights that a model makes of its parameters (orthonormal ones) are
  made again as well: of nearly singular parameters float64 makes other ones
  than float32, and what is certified is the network as float32 makes it.

  Raises:
    ValueError: for an estimated certificate, or a model that computes in
      float32 whatever its inputs.
  """
  if not certificate.sound:
    raise ValueError("certificate is estimated: there is nothing to recheck.")
  inputs = _widen(dict(batch["inputs"]))
  with jax.enable_x64(True):
    wide = jax.tree.map(
      jnp.asarray, (_widen(params), _widen({} if state is None else state))
    )
    # On one device, wherever it was made.
    stated = jax.tree.map(jnp.asarray, jax.device_get(certificate))
    polytope, exact = np.zeros(np.shape(stated.prediction), bool), None
    if stated.fusion != "ball":
      exact = door.certify(
        model,
        wide[0],
        {**batch, "inputs": inputs},
        state=wide[1],
        units={name: float(s) for name, s in stated.units.items()},
        norm=dict(stated.norm),
        slack=certificates.NO_SLACK,
      )
      _need_float64(exact.radius)
      polytope = _refuted_polytope(stated, exact)
    if stated.balls is None:
      return int((polytope | _refuted_radii(stated, exact)).sum())
    return int((polytope | _refuted_balls(model, *wide, inputs, stated)).sum())


def _refuted_polytope(stated: Certificate, exact: Certificate):
  """``bool [b]``: what the polytope says, entry by entry and as radii."""
  same = np.asarray(stated.prediction == exact.prediction)
  # An example that proves nothing may have any sensitivity.
  rival = np.isfinite(exact.margins)
  hopes = np.any(rival & (np.asarray(stated.margins) != 0), axis=-1)
  wrong = _larger(stated.margins, exact.margins)
  for name in stated.modalities:
    wrong |= _larger(exact.sensitivity[name], stated.sensitivity[name])
  for name, drop in (stated.drops or {}).items():
    # What is not bounded there can drop without limit.
    bound = (exact.drops or {}).get(name, np.where(rival, np.inf, 0))
    wrong |= _larger(bound, drop)
  wrong &= same & hopes
  alone = dataclasses.replace(stated, balls=None)
  for ball in margins.BALLS:
    wrong |= _above(alone.joint_radius(ball), exact.joint_radius(ball), same)
  if stated.contributions is not None and exact.contributions is not None:
    for name in stated.modalities if len(stated.modalities) > 1 else ():
      rest = exact.radius_without([name])
      wrong |= _above(alone.radius_without([name]), rest, same)
  return wrong


def _refuted_radii(stated: Certificate, exact: Certificate):
  """``bool [b]``: the radii a certificate without balls carries."""
  same = np.asarray(stated.prediction == exact.prediction)
  wrong = _above(stated.radius, exact.radius, same)
  for name, radius in stated.modality_radius.items():
    wrong |= _above(radius, exact.modality_radius[name], same)
  return wrong


def _refuted_balls(model, params, state, inputs, stated: Certificate):
  """``bool [b]``: balls not proved again, radii of nobody's."""
  present = batches.presence(
    {"inputs": inputs, "present": stated.present}, model.modalities
  )
  inputs = {name: jnp.asarray(inputs[name]) for name in present}
  logits = programs.evaluate(
    model, params, state, inputs, present, separate=False
  ).logits
  _need_float64(logits)
  problem = relaxed.Problem(
    params=params,
    state=state,
    inputs=inputs,
    present=present,
    prediction=jnp.argmax(logits, axis=-1),
    units={m: jnp.asarray(s, jnp.float64) for m, s in stated.units.items()},
  )
  network = relaxed.network_of(model, problem)
  world = stated.sensitivity if stated.fusion == "additive" else None
  balls = stated.balls
  # A network of one example knows nothing of what others do to it.
  explains = jax.jit(functools.partial(relaxed.explains, model, network))
  unlike = ~explains(problem, logits)
  claims = [(tuple(stated.modalities), balls.joint)]
  claims += [((name,), balls.alone[name]) for name in stated.modalities]
  # A radius is the larger one of the polytope's and the balls'.
  polytope = dataclasses.replace(stated, balls=None)
  wrong = _larger(
    stated.radius, np.maximum(polytope.joint_radius(), balls.joint)
  )
  ratios = margins.modality_ratios(
    stated.rival_margins(), stated.sensitivity, stated.drops
  )
  for name, radius in stated.modality_radius.items():
    own = margins.radii(ratios[name]) if stated.fusion != "ball" else 0
    wrong |= _larger(radius, np.maximum(own, balls.alone[name]))
  proves = relaxed.prover(network, problem, norm=stated.norm, sensitivity=world)
  for moving, radius in claims:
    proved = proves(moving, jnp.asarray(radius, jnp.float64))
    wrong |= np.asarray((radius > 0) & ~proved)
  other = unlike | (problem.prediction != stated.prediction)
  other &= stated.radius > 0
  return wrong | np.asarray(other)


def _larger(first, second):
  """``bool [b]``: somewhere the first is larger, or no number."""
  first = np.asarray(first, np.float64)
  found = ~(first <= np.asarray(second, np.float64))
  return found if found.ndim == 1 else np.any(found, axis=-1)


def _above(radius, bound, same):
  """``radius > bound``, and any radius of another prediction."""
  return _larger(radius, np.where(same, np.asarray(bound, np.float64), 0))


def _need_float64(value) -> None:
  if value.dtype != np.float64:
    raise ValueError("model computes in float32 whatever its inputs.")


def _widen(tree):
  def widen(leaf):
    if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      return np.asarray(leaf, np.float64)
    return leaf

  return jax.tree.map(widen, tree)
