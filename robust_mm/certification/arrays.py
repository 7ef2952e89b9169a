"""A certificate from plain arrays, for models of any framework."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from robust_mm import _extremes
from robust_mm import _validate
from robust_mm import margins
from robust_mm import modalities
from robust_mm.certification import batches
from robust_mm.certification import certificates
from robust_mm.certification import geometries
from robust_mm.certification import tables as tables_lib
from robust_mm.certification.certificates import Certificate
from robust_mm.certification.certificates import Slack
from robust_mm.certification.tables import SensitivityTables

FIDELITIES = ("corrected", "published")


def margin_certificate(
  contributions: Mapping[str, Array] | None,
  tables: SensitivityTables,
  present: Mapping[str, Any] | None = None,
  *,
  bias: Any = None,
  logits: Any = None,
  rounding: Any = None,
  units: Mapping[str, Any] | str | None = None,
  norm: Mapping[str, Any] | str | float | None = None,
  sizes: Mapping[str, int] | None = None,
  slack: Slack = certificates.DEFAULT_SLACK,
  fidelity: str = "corrected",
  fusion: str = "additive",
  reduction: str = "sum",
) -> Certificate:
  r"""A certificate from arrays, for models of any framework.

  The logits must be :math:`\sum_m c_m + bias` where :math:`c_m` depends on
  modality m alone, and the change of :math:`c_m[y] - c_m[j]` per unit of l2
  distance must be bounded by ``tables.tables[m][y, j]``. With ``tables.reach``,
  :math:`c_m[y] - c_m[j] \ge -reach_m[y, j]` whatever the input, and no change
  of it costs more than

  .. math:: drop_{m,j} = c_m[y] - c_m[j] + reach_m[y, j].

  With ``fusion="joint"`` (a Lipschitz trunk on the concatenated embeddings)
  only ``logits`` are needed and the tables bound
  :math:`L_m L_{trunk} \|V_y - V_j\|`.

  Args:
    contributions: ``{m: [b, k]}``, integration factors included.
    tables: sensitivities with their source and soundness.
    present: ``{m: bool[b]}``; all present where None.
    bias: ``[k]``, default 0.
    logits: ``[b, k]``, default the sum of contributions and bias, and the same
      up to rounding; needed for joint fusion. Their argmax is the prediction.
    rounding: ``[b]``, the size of the terms the logits were made from, where
      that may be more than their own (inputs with large offsets), see
      ``Slack``.
    units: ``{m: s_m}``, default 1.
    norm: ``"l2"`` (default), ``"linf"`` or ``"l1"`` for all or ``{m: norm}``;
      2, ``inf`` and 1 mean the same.
    sizes: ``{m: number of input elements}``, needed for ``"linf"``, because
      :math:`\|\delta\|_2 \le \sqrt n\,\|\delta\|_\infty`.
    slack: for floating point.
    fidelity: ``"published"`` looks at the runner-up class only, which is
      unsound and says so.
    fusion: ``"additive"`` or ``"joint"``.
    reduction: ``"mean"`` where the logits are the mean of the contributions of
      present modalities rather than their sum, plus bias. ``contributions`` and
      ``tables`` are those before the division.

  Returns:
    the certificate; see ``Certificate`` for the edge cases.

  Raises:
    ValueError: naming the argument; for ``logits`` that are not what the
      contributions add up to (inside jit: radius 0).
  """
  _check_settings(fidelity, fusion, reduction, slack)
  known = modalities.names(tables.tables)
  if fusion == "joint":
    contributions = None  # the logits are no sum of them
  if contributions is None and (fusion == "additive" or logits is None):
    raise ValueError(
      "margin_certificate needs contributions (or joint logits)."
    )
  present = _presence(present, known, _rows_of(contributions, logits, known))
  if contributions is not None:
    contributions, logits, scale = _assemble(
      contributions, known, present, bias, logits, reduction, rounding
    )
  else:
    logits = jnp.asarray(logits)
    scale = _extremes.largest(jnp.abs(logits))
  _check_width(logits)
  loss = slack.margin * scale
  if rounding is not None:
    rounding = slack.rounding * jnp.asarray(rounding, scale.dtype)
    loss = jnp.maximum(loss, rounding)
  return _build(
    logits,
    contributions,
    loss * float(jnp.finfo(logits.dtype).eps),
    tables,
    present,
    _size_factors(known, units, norm, sizes, slack),
    units={
      name: jnp.asarray(value, logits.dtype)
      for name, value in tables_lib.check_units(units, known).items()
    },
    norm=tuple(norms(norm, known).items()),
    fusion=fusion,
    sound=tables.sound and fidelity == "corrected",
    rival="all" if fidelity == "corrected" else "runner_up",
    reduction=reduction,
    slack=slack,
  )


def _check_settings(fidelity, fusion, reduction, slack):
  _validate.one_of(FIDELITIES, fidelity=fidelity)
  _validate.one_of(margins.FUSIONS, fusion=fusion)
  _validate.one_of(geometries.REDUCTIONS, reduction=reduction)
  if fusion == "joint" and reduction != "sum":
    raise ValueError("reduction must be 'sum' with fusion='joint'.")
  for value in slack:
    _validate.non_negative(slack=value)


def _check_width(logits):
  if not jnp.issubdtype(logits.dtype, jnp.floating) or (
    logits.dtype.itemsize < 4
  ):
    raise ValueError(f"logits must be float32 or float64, got {logits.dtype}.")


def _rows_of(contributions, logits, known):
  """The shape of the batch."""
  if not known:
    raise ValueError("tables must have at least one modality.")
  if contributions is None:
    return jnp.shape(logits)[:-1]
  if modalities.names(contributions) != known:
    raise ValueError(
      f"contributions must have the modalities {', '.join(known)} of the "
      f"tables, got {', '.join(modalities.names(contributions))}."
    )
  return jnp.shape(contributions[known[0]])[:-1]


def _presence(present, known, shape):
  """``present`` as arrays of the shape of the batch."""
  if present is None:
    return {name: jnp.ones(shape, bool) for name in known}
  for name in known:
    if name not in present:
      raise ValueError(f"present has no modality {name!r}.")
    batches.check_present(f"present[{name!r}]", present[name], shape)
  return {name: jnp.asarray(present[name]) for name in known}


def _assemble(contributions, known, present, bias, logits, reduction, rounding):
  """Masked contributions, logits, and the size rounding errors refer to.

  That size is the one before a mean divides: it bounds the errors of the mean
  over every subset that a removal may leave.
  """
  masked = {}
  for name in known:
    value = jnp.asarray(contributions[name])
    here = present[name][..., None]
    masked[name] = jnp.where(here, value, jnp.zeros_like(value))
  size = sum(jnp.abs(value) for value in masked.values())
  if reduction == "mean":
    masked = tables_lib.averaged(masked, present)
  total = sum(masked.values())
  if bias is None:
    bias = jnp.zeros(total.shape[-1:], total.dtype)
  bias = jnp.broadcast_to(jnp.asarray(bias, total.dtype), total.shape)
  scale = _extremes.largest(size + jnp.abs(bias))
  if logits is None:
    return masked, total + bias, scale
  logits = jnp.asarray(logits)
  _check_width(logits)
  agree = adds_up(total + bias, logits, scale, rounding)
  if margins.known_values(agree) and not np.all(np.asarray(agree)):
    raise ValueError(
      f"logits must be the {reduction} of the contributions of present "
      "modalities, plus bias."
    )
  # Inside jit such an example is not certified.
  masked = {
    name: jnp.where(agree[..., None], value, jnp.nan)
    for name, value in masked.items()
  }
  return masked, logits, scale


def adds_up(total, logits, scale, rounding=None) -> Array:
  """Whether logits are the ``total`` of their terms, up to rounding: ``[b]``.

  Args:
    total: ``[b, k]``.
    logits: ``[b, k]``.
    scale: ``[b]``, the largest sum of absolute terms.
    rounding: ``[b]``, as in ``margin_certificate``.
  """
  difference = jnp.max(jnp.abs(total - logits), axis=-1)
  # A margin is wrong by twice the difference; the default slack is at least
  # twice the limit. NaN agrees: the certificate deals with it.
  allowed = certificates.DEFAULT_SLACK
  limit = allowed.margin * scale
  if rounding is not None:
    limit = limit + allowed.rounding * jnp.asarray(rounding, scale.dtype)
  return ~(difference > float(jnp.finfo(logits.dtype).eps) / 4 * limit)


def norms(norm, known) -> dict[str, str]:
  """``{m: norm}`` for every modality; ValueError for an unknown one."""
  if not isinstance(norm, Mapping):
    found = margins.norm_name("l2" if norm is None else norm)
    return dict.fromkeys(known, found)
  _validate.known(known, norm=norm)
  return {
    name: margins.norm_name(norm.get(name, "l2"), f"norm[{name!r}]")
    for name in known
  }


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


def _build(
  logits, contributions, loss, tables, present, factors, *, slack, **static
):
  known = modalities.names(tables.tables)
  dtype, num_classes = logits.dtype, logits.shape[-1]
  prediction = jnp.argmax(logits, axis=-1)
  chosen = margins.one_hot(prediction, num_classes)
  rows = functools.partial(
    _rows,
    prediction=prediction,
    present=present,
    dtype=dtype,
    reduction=static["reduction"],
  )
  sensitivity = {
    name: value * jnp.asarray(factors[name], dtype)
    for name, value in rows({m: tables.tables[m] for m in known}).items()
  }
  drops = None
  if tables.reach and contributions is not None:
    reach = {
      name: value * (1 + slack.sensitivity) + loss[..., None]
      for name, value in rows(tables.reach).items()
    }
    drops = _drops(contributions, reach, chosen, present)
  margin = margins.pairwise(logits, prediction) - loss[..., None]
  valid = jnp.any(modalities.stack(present, axis=-1), axis=-1)
  finite = _finite(margin, chosen, sensitivity, contributions, drops)
  finite = finite[..., None]
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
    drops=_where(finite, drops),
    nearest_class=None,
    runner_up=jnp.argmax(jnp.where(chosen, -jnp.inf, logits), axis=-1),
    vulnerability=None,
    valid=valid,
    present=present,
    source=tables.source,
    **static,
  )
  return _reduce(base)


def _rows(tables, prediction, present, dtype, reduction):
  """Rows of the tables at the prediction, as the logits weigh them."""
  rows = {
    name: tables_lib.gather(
      jnp.asarray(table, dtype), prediction, present[name]
    )
    for name, table in tables.items()
  }
  if reduction == "mean":
    rows = tables_lib.averaged(rows, present)
  return rows


def _drops(contributions, reach, chosen, present):
  """The most any input can take from the margins: down to ``-reach``."""
  drops = {}
  for name, bound in reach.items():
    term = contributions[name]
    drop = jnp.maximum(margins.pick(term, chosen) - term + bound, 0)
    attackable = ~chosen & present[name][..., None]
    drops[name] = jnp.where(attackable, drop, jnp.zeros_like(drop))
  return drops


def _where(finite, tree):
  """Zeros in examples that cannot be trusted."""
  return jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), tree)


def _finite(margin, chosen, sensitivity, contributions, drops):
  """Every value of the example can be trusted: finite, no negative bound."""
  good = jnp.isfinite(margin) | chosen
  for name, value in sensitivity.items():
    # Without limit, but never more than a finite drop.
    capped = jnp.isposinf(value) & (name in (drops or {}))
    good = good & (jnp.isfinite(value) | capped) & (value >= 0)
  for value in (*(contributions or {}).values(), *(drops or {}).values()):
    good = good & jnp.isfinite(value)
  return jnp.all(good, axis=-1)


def _reduce(base: Certificate) -> Certificate:
  """Fills in the minima over all rivals."""
  nearest = base.joint_nearest_class()
  ratios = margins.modality_ratios(
    base.rival_margins(), base.sensitivity, base.drops
  )
  return dataclasses.replace(
    base,
    radius=base.joint_radius(),
    modality_radius={name: margins.radii(ratios[name]) for name in ratios},
    nearest_class=nearest,
    vulnerability=base.sensitivity_shares(nearest),
  )
