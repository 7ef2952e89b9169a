"""A certificate from plain arrays, for models of any framework."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from robust_mm import _validate
from robust_mm import margins
from robust_mm import modalities
from robust_mm.certification import certificates
from robust_mm.certification import tables as tables_lib
from robust_mm.certification.certificates import Certificate
from robust_mm.certification.certificates import Slack
from robust_mm.certification.tables import SensitivityTables

FIDELITIES = ("corrected", "published")
FUSIONS = ("additive", "joint")


def margin_certificate(
  contributions: Mapping[str, Array] | None,
  tables: SensitivityTables,
  present: Mapping[str, Any] | None = None,
  *,
  bias: Any = None,
  logits: Any = None,
  rounding: Any = None,
  units: Mapping[str, Any] | str | None = None,
  norm: Mapping[str, str] | str | None = None,
  sizes: Mapping[str, int] | None = None,
  slack: Slack = certificates.DEFAULT_SLACK,
  fidelity: str = "corrected",
  fusion: str = "additive",
) -> Certificate:
  r"""A certificate from arrays, for models of any framework.

  The logits must be :math:`\sum_m c_m + bias` where :math:`c_m` depends on
  modality m alone, and the change of :math:`c_m[y] - c_m[j]` per unit of l2
  distance must be bounded by ``tables.tables[m][y, j]``.

  With ``fusion="joint"`` (a Lipschitz trunk on the concatenated embeddings)
  only ``logits`` are needed and the tables bound
  :math:`L_m L_{trunk} \|V_y - V_j\|`.

  Args:
    contributions: ``{m: [b, k]}``, integration factors included.
    tables: sensitivities with their source and soundness.
    present: ``{m: bool[b]}``; all present where None.
    bias: ``[k]``, default 0.
    logits: ``[b, k]``, default the sum of contributions and bias; needed for
      joint fusion. Their argmax is the prediction.
    rounding: ``[b]``, the size of the terms the logits were made from, where
      that may be more than their own (inputs with large offsets), see
      ``Slack``.
    units: ``{m: s_m}``, default 1.
    norm: ``"l2"`` (default), ``"linf"`` or ``"l1"`` for all or ``{m: norm}``.
    sizes: ``{m: number of input elements}``, needed for ``"linf"``, because
      :math:`\|\delta\|_2 \le \sqrt n\,\|\delta\|_\infty`.
    slack: for floating point.
    fidelity: ``"published"`` looks at the runner-up class only, which is
      unsound and says so.
    fusion: ``"additive"`` or ``"joint"``.

  Returns:
    the certificate; see ``Certificate`` for the edge cases.
  """
  _validate.one_of(FIDELITIES, fidelity=fidelity)
  _validate.one_of(FUSIONS, fusion=fusion)
  _validate.non_negative(slack=slack.margin)
  _validate.non_negative(slack=slack.sensitivity)
  _validate.non_negative(slack=slack.rounding)
  known = modalities.names(tables.tables)
  if fusion == "joint":
    contributions = None  # the logits are no sum of them
  if contributions is None and (fusion == "additive" or logits is None):
    raise ValueError(
      "margin_certificate needs contributions (or joint logits)."
    )
  if contributions is not None:
    contributions, logits, scale = _assemble(
      contributions, known, present, bias, logits
    )
  else:
    logits = jnp.asarray(logits)
    scale = jnp.max(jnp.abs(logits), axis=-1)
  if not jnp.issubdtype(logits.dtype, jnp.floating) or (
    logits.dtype.itemsize < 4
  ):
    raise ValueError(f"logits must be float32 or float64, got {logits.dtype}.")
  loss = slack.margin * scale
  if rounding is not None:
    rounding = slack.rounding * jnp.asarray(rounding, scale.dtype)
    loss = jnp.maximum(loss, rounding)
  if present is None:
    present = {name: jnp.ones(logits.shape[:-1], bool) for name in known}
  return _build(
    logits,
    contributions,
    loss * float(jnp.finfo(logits.dtype).eps),
    tables,
    {name: jnp.asarray(present[name]) for name in known},
    _size_factors(known, units, norm, sizes, slack),
    units={
      name: jnp.asarray(value, logits.dtype)
      for name, value in tables_lib.check_units(units, known).items()
    },
    norm=tuple(norms(norm, known).items()),
    fusion=fusion,
    sound=tables.sound and fidelity == "corrected",
    rival="all" if fidelity == "corrected" else "runner_up",
  )


def _assemble(contributions, known, present, bias, logits):
  """Masked contributions, logits, and the size rounding errors refer to."""
  if modalities.names(contributions) != known:
    raise ValueError(
      f"contributions must have the modalities {', '.join(known)} of the "
      f"tables, got {', '.join(modalities.names(contributions))}."
    )
  masked = {}
  for name in known:
    value = jnp.asarray(contributions[name])
    if present is not None:
      here = jnp.asarray(present[name])[..., None]
      value = jnp.where(here, value, jnp.zeros_like(value))
    masked[name] = value
  total = sum(masked.values())
  if bias is None:
    bias = jnp.zeros(total.shape[-1:], total.dtype)
  bias = jnp.broadcast_to(jnp.asarray(bias, total.dtype), total.shape)
  size = sum(jnp.abs(value) for value in masked.values()) + jnp.abs(bias)
  logits = total + bias if logits is None else jnp.asarray(logits)
  return masked, logits, jnp.max(size, axis=-1)


def norms(norm, known) -> dict[str, str]:
  """``{m: norm}`` for every modality; ValueError for an unknown one."""
  if norm is None or isinstance(norm, str):
    norm = dict.fromkeys(known, norm or "l2")
  _validate.known(known, norm=norm)
  result = {name: norm.get(name, "l2") for name in known}
  for name, value in result.items():
    _validate.one_of(margins.BALLS, **{f"norm[{name!r}]": value})
  return result


def _size_factors(known, units, norm, sizes, slack):
  """What a raw l2 sensitivity is multiplied by, per modality."""
  units = tables_lib.check_units(units, known)
  factors = {}
  for name, kind in norms(norm, known).items():
    factor = 1.0 + slack.sensitivity
    if kind == "linf":
      if sizes is None or name not in sizes:
        raise ValueError(
          f"sizes must name modality {name!r}: its norm is linf."
        )
      factor = factor * float(np.sqrt(sizes[name]))
    factors[name] = units[name] * factor
  return factors


def _build(logits, contributions, scale, tables, present, factors, **static):
  known = modalities.names(tables.tables)
  dtype, num_classes = logits.dtype, logits.shape[-1]
  prediction = jnp.argmax(logits, axis=-1)
  chosen = margins.one_hot(prediction, num_classes)
  sensitivity = {}
  for name in known:
    table = jnp.asarray(tables.tables[name], dtype)
    rows = tables_lib.gather(table, prediction, present[name])
    sensitivity[name] = rows * jnp.asarray(factors[name], dtype)
  margin = margins.pairwise(logits, prediction) - scale[..., None]
  valid = jnp.any(modalities.stack(present, axis=-1), axis=-1)
  finite = _finite(margin, chosen, sensitivity, contributions)[..., None]
  # Nothing present: nothing to attack, whatever the biases are.
  margin = jnp.where(valid[..., None], margin, jnp.inf)
  # A margin of 0 is a tie: radius 0, covers False, and no NaN anywhere.
  margin = jnp.where(chosen, jnp.inf, jnp.where(finite, margin, 0))
  base = Certificate(
    prediction=prediction,
    radius=None,
    modality_radius=None,
    margins=margin,
    sensitivity=_where(finite, sensitivity),
    contributions=_where(finite, contributions),
    nearest_class=None,
    runner_up=jnp.argmax(jnp.where(chosen, -jnp.inf, logits), axis=-1),
    vulnerability=None,
    valid=valid,
    source=tables.source,
    **static,
  )
  return _reduce(base)


def _where(finite, tree):
  """Zeros in examples that cannot be trusted."""
  return jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), tree)


def _finite(margin, chosen, sensitivity, contributions):
  """Every value of the example can be trusted: finite, no negative bound."""
  good = jnp.isfinite(margin) | chosen
  for value in sensitivity.values():
    good = good & jnp.isfinite(value) & (value >= 0)
  for value in (contributions or {}).values():
    good = good & jnp.isfinite(value)
  return jnp.all(good, axis=-1)


def _reduce(base: Certificate) -> Certificate:
  """Fills in the minima over all rivals."""
  nearest = base.joint_nearest_class()
  ratios = margins.modality_ratios(base.rival_margins(), base.sensitivity)
  return dataclasses.replace(
    base,
    radius=base.joint_radius(),
    modality_radius={name: margins.radii(ratios[name]) for name in ratios},
    nearest_class=nearest,
    vulnerability=base.sensitivity_shares(nearest),
  )
