"""The front door: ``certify`` a model."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from robust_mm import _validate
from robust_mm import margins
from robust_mm._types import Batch
from robust_mm._types import Model
from robust_mm._types import Params
from robust_mm._types import State
from robust_mm.certification import arrays
from robust_mm.certification import batches
from robust_mm.certification import certificates
from robust_mm.certification import combined
from robust_mm.certification import empirical
from robust_mm.certification import geometries
from robust_mm.certification import given
from robust_mm.certification import programs
from robust_mm.certification import tables as tables_lib
from robust_mm.certification.certificates import Certificate
from robust_mm.certification.certificates import Slack
from robust_mm.certification.tables import SensitivityTables

BALL_SOURCES = ("local", "relaxation", "best")
"""Sources that bound every example by itself, inside balls."""
_HINT = "This model has a geometry: source='global' may certify it."
SOURCES = ("global", *BALL_SOURCES, "empirical")


def certify(
  model: Model,
  params: Params,
  batch: Batch,
  *,
  state: State = None,
  source: str = "global",
  tables: SensitivityTables | None = None,
  units: Mapping[str, Any] | str | None = None,
  norm: Mapping[str, Any] | str | float | None = None,
  slack: Slack = certificates.DEFAULT_SLACK,
  fidelity: str = "corrected",
) -> Certificate:
  r"""How far every example may move before its prediction can change.

  .. math:: R = \min_{j \ne y} \frac{M_j}{\sqrt{\sum_m S_{m,j}^2}}, \qquad
            R_m = \min_{j \ne y} \frac{M_j}{S_{m,j}}

  with margins :math:`M_j` of the prediction y and sensitivities
  :math:`S_{m,j} = s_m L_m \|V_m[y] - V_m[j]\|`, 0 where m is absent. The
  minimum is over all classes: the runner-up is often not the nearest.

  Where a modality's embedding is bounded (``encoders.bounded``) no change of it
  costs a margin more than ``drops``; the radii use that and may be infinite.

  Formal guarantees:
    - With ``source="global"``, ``"local"``, ``"relaxation"`` or ``"best"``: no
      perturbation of the present arrays of
      ``batch["inputs"]`` inside the certified set changes the prediction of
      this network, evaluation mode, in real arithmetic with these parameters.
    - With ``source="empirical"`` or ``fidelity="published"``: none; the
      certificate has ``sound=False`` and ``kind == "estimated"``.
    - Weights that a model makes of its parameters (orthonormal ones) are those
      that float32 makes; of ill-conditioned parameters exact arithmetic makes
      visibly other ones.
    - Nothing about correctness (``certified_accuracy``), about raw data before
      preprocessing, or about other threats.

  Pure: works under jit, vmap and with the batch axis sharded. Make ``tables``
  once per parameter set when certifying many batches.

  Args:
    model: with a geometry (late fusion, or a Lipschitz trunk); for ``"local"``,
      ``"relaxation"`` and ``"best"`` any that is affine between known
      activations.
    params: its parameters, float32 or float64.
    batch: ``inputs`` and (default: all) ``present``; others are not read.
      Integers that are no tokens are certified as they are: radii are then in
      grey levels, and a warning says so unless ``units`` name the modality.
    state: the model's state.
    source: where the bounds come from.

      ================  ====================================================
      ``"global"``      constants of the encoders, valid everywhere
      ``"local"``       constants inside a ball around the example, and the
                        global ones where the model states them
      ``"relaxation"``  a linear lower bound of the margin inside a ball
      ``"best"``        the largest radius of these, example by example
      ``"empirical"``   slopes seen in data: an estimate, never a certificate
      ================  ====================================================

      ``"global"`` costs a forward pass; the others some hundred, and grow with
      the square of the width: use small batches. Ignored where ``tables`` are
      given, but for ``"best"`` and ``"local"``, which take sound ones.
    tables: from ``sensitivity_tables`` or ``empirical_tables``. Without them
      ``"empirical"`` estimates on this very batch.
    units: ``{m: s_m}``, the size that counts as 1; ``relative_units`` makes
      them from data. A joint radius means nothing without its units.
    norm: how :math:`\|\delta_m\|` is measured: ``"l2"`` (default), ``"linf"``
      or ``"l1"``, or 2, ``inf``, 1; for all or ``{m: norm}``.
    slack: for floating point.
    fidelity: ``"corrected"``, or ``"published"``: split denominator, estimated
      constants, runner-up only.

  Returns:
    a ``Certificate``. Non-finite logits or sensitivities have radius 0 and
    cover nothing; an example with nothing present has an infinite radius and
    ``valid=False``.

  Raises:
    ValueError: naming the argument that is none of the above; for a regression;
      naming the array of the batch that has a wrong shape; naming the
      modality whose encoder states no bound, or reads another modality; for
      models that mix modalities before their scores; for a geometry that does
      not reproduce the logits or states an embedding radius that an example
      exceeds (inside jit: radius 0); for 16-bit arithmetic and
      products at less than full precision; outside jit, on one example only,
      for encoders that read other examples of the batch.
  """
  given.check(model, params, batch)
  model.need_classes("certify")
  norm = tuple(arrays.norms(norm, model.modalities).items())
  _validate.one_of(SOURCES, source=source)
  _validate.one_of(arrays.FIDELITIES, fidelity=fidelity)
  if fidelity == "published" and source in BALL_SOURCES:
    raise ValueError(
      f"fidelity must be 'corrected' with source={source!r}; the published "
      "form rests on estimated constants."
    )
  if source in BALL_SOURCES and tables is not None and not tables.sound:
    tables = None  # estimates have no place beside balls that are proved
  additive = _is_additive(model, params, source)
  if additive:
    geometries.need_geometry(model)
  present = batches.presence(batch, model.modalities, model.input_shapes)
  inputs = {name: jnp.asarray(batch["inputs"][name]) for name in present}
  state = {} if state is None else state
  named = units
  units = tables_lib.check_units(units, model.modalities)
  given.warn_of_integers(model, inputs, named)
  if not additive:
    certificate, alone = _certify_balls(
      params,
      inputs,
      present,
      state,
      units,
      model=model,
      source=source,
      norm=norm,
    )
    if margins.known_values(alone) and not np.all(np.asarray(alone)):
      raise ValueError(
        "the model reads other examples of the batch (batch statistics?): the "
        "logits of an example must depend on that example alone, or there is "
        "no certificate."
      )
    return certificate
  try:
    certificate, agree, inside, embeddings, sizes = _certify(
      params,
      inputs,
      present,
      state,
      tables,
      units,
      model=model,
      source=source,
      norm=norm,
      slack=slack,
      fidelity=fidelity,
    )
  except (TypeError, ValueError) as error:
    reason = batches.explain(model, params, state, inputs, present)
    if reason is None:
      raise
    raise reason from error
  for name, value in inside.items():
    if margins.known_values(value) and not np.all(np.asarray(value)):
      raise ValueError(
        f"geometry.embedding_radius[{name!r}] is too small: the embedding of "
        "an example of this batch is longer."
      )
  if margins.known_values(agree) and not np.all(np.asarray(agree)):
    raise ValueError(
      "geometry does not explain the logits: they must be the sum over "
      "present modalities of head[m] @ embedding[m], plus bias, or with "
      "geometry.fusion='joint' move no faster with the embeddings than the "
      "rows of the head differ."
    )
  if certificate.sound and margins.known_values(*inputs.values(), agree):
    programs.check_rows(
      model, params, state, inputs, present, embeddings, sizes
    )
  return certificate


# Compiled here as well, so that a notebook pays for a trace once per model and
# not at every call; inside somebody's jit it is part of theirs.
@functools.partial(
  jax.jit, static_argnames=("model", "source", "norm", "slack", "fidelity")
)
def _certify(
  params,
  inputs,
  present,
  state,
  tables,
  units,
  *,
  model,
  source,
  norm,
  slack,
  fidelity,
):
  outputs = programs.evaluate(model, params, state, inputs, present)
  geometry = geometries.model_geometry(model, params)
  if tables is None:
    batch = {"inputs": inputs, "present": present}
    tables = _tables(model, params, batch, state, geometry, source, fidelity)
  if tables.lipschitz is not None:
    # Cached: what computes the constants of the encoders is then dead code.
    geometry = dataclasses.replace(geometry, lipschitz=tables.lipschitz)
  contributions = None
  if geometry.fusion == "additive":
    contributions = _contributions(geometry, outputs, present)
  sizes = _sizes(geometry, outputs, inputs, present)
  rounding = sum(
    size * jnp.max(margins.norm(geometry.head[name]))
    for name, size in sizes.items()
  )
  if contributions is None:
    agree = programs.trunk_keeps(model, params, geometry, outputs, present)
  else:
    agree = _agreement(geometry, outputs, contributions, present, rounding)
  inside = _inside(geometry, outputs, present)
  # What refutes the geometry carries no certificate.
  trusted = functools.reduce(jnp.logical_and, inside.values(), agree)
  contributions = jax.tree.map(
    lambda value: jnp.where(trusted[..., None], value, jnp.nan), contributions
  )
  # Of a trunk there are none to say so by: endless rounding says it.
  rounding = jnp.where(trusted, rounding, jnp.inf)
  certificate = arrays.margin_certificate(
    contributions,
    tables,
    present,
    bias=geometry.bias,
    logits=outputs.logits,
    rounding=rounding,
    units=units,
    norm=dict(norm),
    sizes={name: int(np.prod(x.shape[1:])) for name, x in inputs.items()},
    slack=slack,
    fidelity=fidelity,
    fusion=geometry.fusion,
    reduction=geometry.reduction,
  )
  if source in ("best", "local") and certificate.sound:
    network, reason = combined.network_or_reason(
      model, params, state, inputs, present, units, certificate.prediction
    )
    if network is None and source == "local":
      raise ValueError(f"{reason} {_HINT}") from reason
    if network is not None:
      certificate = combined.widened(
        certificate,
        model,
        network,
        params,
        state,
        inputs,
        present,
        logits=outputs.logits,
        source=source,
      )
  return certificate, agree, inside, outputs.embeddings, sizes


@functools.partial(jax.jit, static_argnames=("model", "source", "norm"))
def _certify_balls(
  params, inputs, present, state, units, *, model, source, norm
):
  try:
    return combined.from_balls(
      model,
      params,
      state,
      inputs,
      present,
      units=units,
      norm=norm,
      source=source,
    )
  except ValueError as error:
    if model.geometry is None:
      raise
    raise ValueError(f"{error} {_HINT}") from error


def _is_additive(model, params, source) -> bool:
  """Whether the certificate rests on what the encoders state."""
  if source == "relaxation":
    return False
  if source not in ("best", "local"):
    return True
  if model.geometry is None:
    return False
  stated = geometries.abstract_geometry(model, params)
  return not geometries.missing_constants(stated, bounded=True)


def _tables(model, params, batch, state, geometry, source, fidelity):
  if source == "empirical" or fidelity == "published":
    form = "split" if fidelity == "published" else "difference"
    return empirical.empirical_tables(
      model, params, batch, state=state, form=form
    )
  return tables_lib.global_tables(geometry)


def _contributions(geometry, outputs, present):
  return {
    name: jnp.where(
      present[name][..., None],
      jnp.einsum(
        "...d,kd->...k",
        outputs.embeddings[name],
        geometry.head[name],
        precision="highest",
      ),
      0,
    )
    for name in present
  }


def _sizes(geometry, outputs, inputs, present):
  r"""``{m: [b]}``: :math:`\|\phi_m\| + L_m \|x_m\|`.

  What the rounding of an embedding is relative to. A bias that cancels an
  offset of the input leaves a small embedding, made from large terms.
  """
  sizes = {}
  for name, here in present.items():
    embedding = outputs.embeddings[name]
    size = margins.norm(jnp.where(here[..., None], embedding, 0))
    bound = geometry.lipschitz.get(name)
    if bound is not None:
      flat = jnp.reshape(inputs[name], (*here.shape, -1)).astype(size.dtype)
      flat = jnp.where(here[..., None], flat, 0)
      bound = jnp.asarray(bound, size.dtype)
      # An infinite constant says nothing, as a missing one.
      bound = jnp.where(jnp.isposinf(bound), 0, bound)
      size = size + bound * margins.norm(flat)
    sizes[name] = jax.lax.stop_gradient(size)
  return sizes


def _agreement(geometry, outputs, contributions, present, rounding) -> Array:
  """Whether contributions and bias add up to the logits, per example."""
  bias = jnp.broadcast_to(geometry.bias, outputs.logits.shape)
  terms = contributions
  if geometry.reduction == "mean":
    terms = tables_lib.averaged(terms, present)
  total = bias + sum(terms.values())
  scale = sum(jnp.abs(value) for value in contributions.values())
  scale = jnp.max(scale + jnp.abs(bias), axis=-1)
  return arrays.adds_up(total, outputs.logits, scale, rounding)


def _inside(geometry, outputs, present) -> dict[str, Array]:
  """Per modality, whether the embeddings keep the radius that is stated."""
  found = {}
  for name, radius in (geometry.embedding_radius or {}).items():
    if radius is not None and name in present:
      here = present[name][..., None]
      size = margins.norm(jnp.where(here, outputs.embeddings[name], 0))
      # NaN is inside: the certificate deals with it.
      found[name] = ~(size > jnp.asarray(radius, size.dtype) * (1 + 1e-5))
  return found
