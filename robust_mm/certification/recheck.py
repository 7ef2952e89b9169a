"""The release check: does float64 confirm every radius?"""

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm._types import Batch
from robust_mm._types import Model
from robust_mm._types import Params
from robust_mm._types import State
from robust_mm.certification import certificates
from robust_mm.certification import door
from robust_mm.certification.certificates import Certificate


def recheck_fp64(
  model: Model,
  params: Params,
  batch: Batch,
  certificate: Certificate,
  *,
  state: State = None,
) -> int:
  """Counts examples with a radius that float64 arithmetic does not confirm.

  Everything (constants, tables, forward pass) is computed again in float64
  without slack; an example counts when its joint or any modality radius is
  larger than there, or when its prediction is another one. Must be 0.

  Raises:
    ValueError: for an estimated certificate, or a model that computes in
      float32 whatever its inputs.
  """
  if not certificate.sound:
    raise ValueError("certificate is estimated: there is nothing to recheck.")
  with jax.enable_x64(True):
    units = {name: float(value) for name, value in certificate.units.items()}
    exact = door.certify(
      model,
      _widen(params),
      {**batch, "inputs": _widen(dict(batch["inputs"]))},
      state=_widen({} if state is None else state),
      units=units,
      norm=dict(certificate.norm),
      slack=certificates.NO_SLACK,
    )
    if exact.radius.dtype != np.float64:
      raise ValueError("model computes in float32 whatever its inputs.")
    exact = jax.device_get(exact)
  same = np.asarray(certificate.prediction) == exact.prediction
  pairs = [(certificate.radius, exact.radius)]
  for name in certificate.modalities:
    pairs.append(
      (certificate.modality_radius[name], exact.modality_radius[name])
    )
  wrong = np.zeros(same.shape, bool)
  for ours, reference in pairs:
    wrong |= np.asarray(ours, np.float64) > np.where(same, reference, 0)
  return int(wrong.sum())


def _widen(tree):
  def widen(leaf):
    if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      return jnp.asarray(np.asarray(leaf), np.float64)
    return leaf

  return jax.tree.map(widen, tree)
