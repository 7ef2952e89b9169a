"""Certificates of a whole data set, from the soundest source there is."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from robust_mm import certification
from robust_mm._types import Batch
from robust_mm._types import Model
from robust_mm.evaluation import batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
  """A certificate of every example, as NumPy arrays.

  Attributes:
    prediction: ``[n]``.
    radius: ``[n]``, joint, in units.
    modality_radius: ``{m: [n]}``.
    nearest_class: ``[n]``.
    vulnerability: ``{m: [n]}`` shares.
    margins: ``[n, k]``.
    sensitivity: ``{m: [n, k]}``.
    source: ``"global"`` or ``"empirical"``.
    sound: False: the numbers are estimates.
  """

  prediction: Any
  radius: Any
  modality_radius: Any
  nearest_class: Any
  vulnerability: Any
  margins: Any
  sensitivity: Any
  source: str
  sound: bool


def is_mixed(model: Model, params, state, data: batches.Data) -> bool:
  """Whether the model says that its scores read other modalities as well."""
  chunk = data.chunk(np.arange(1))

  def forward(params, state):
    return model.apply(params, state, chunk["inputs"], chunk["present"])[0]

  return jax.eval_shape(forward, params, state).mixed


def choose_source(
  model: Model,
  params,
  wanted: str | None,
  *,
  has_reference: bool,
  mixed: bool = False,
) -> tuple[str | None, str]:
  """``(source or None, the reason in words)`` of the certificate.

  Raises:
    ValueError: a certificate was asked for by name and cannot be had.
  """
  if wanted is None:
    return None, "The protocol asks for no certificate."
  if mixed or model.geometry is None:
    reason = (
      "The fusion mixes modalities, so there is no margin certificate; "
      "randomised smoothing is the way to certify such a model."
    )
    if wanted != "auto":
      raise ValueError(f"certificate={wanted!r} cannot be had. {reason}")
    return None, reason
  without = certification.missing_constants(
    certification.abstract_geometry(model, params)
  )
  if not without and wanted != "empirical":
    return "global", "Every encoder states a sound Lipschitz constant."
  if wanted == "global":
    raise ValueError(
      "certificate='global' needs a sound Lipschitz constant of every "
      f"encoder; {', '.join(without)} has none."
    )
  if not has_reference:
    reason = "Estimated constants need reference data and none was given."
    if wanted == "empirical":
      raise ValueError(f"reference is missing. {reason}")
    return None, reason
  return "empirical", (
    "The constants are the largest slopes seen on the reference data: "
    "estimates, no guarantee."
  )


def certified(
  model: Model,
  device: batches.Device,
  data: batches.Data,
  size: int,
  *,
  params,
  state,
  source: str,
  units,
  reference: Batch | None,
) -> tuple[Bounds, dict[str, float]]:
  """Certificates of every example, and seconds spent on parts of the work.

  The tables are built once. Seconds: ``table_seconds``, compilation included,
  and one compiled call on a chunk, ``certify_chunk_seconds``.
  """
  start = time.perf_counter()
  if source == "empirical":
    tables = certification.empirical_tables(
      model, params, reference, state=state
    )
  else:
    tables = _global_tables(model, params)
  tables = jax.block_until_ready(tables)
  seconds = {"table_seconds": time.perf_counter() - start}

  def certify(params, state, chunk, tables):
    certificate = certification.certify(
      model,
      params,
      chunk,
      state=state,
      source=source,
      tables=tables,
      units=units,
    )
    return {name: getattr(certificate, name) for name in _BOUND_FIELDS}

  compiled = device.compile(certify)

  def run(rows):
    extra = (tables,)
    return device.map(compiled, data, rows, size, extra=lambda number: extra)

  arrays = run(np.arange(data.size))
  start = time.perf_counter()
  run(np.arange(min(size, data.size)))
  seconds["certify_chunk_seconds"] = time.perf_counter() - start
  return Bounds(**arrays, source=source, sound=tables.sound), seconds


_BOUND_FIELDS = (
  "prediction",
  "radius",
  "modality_radius",
  "nearest_class",
  "vulnerability",
  "margins",
  "sensitivity",
)


def _global_tables(model, params) -> certification.SensitivityTables:
  # Many small operations one by one take seconds to compile.
  tables = jax.jit(
    lambda params: certification.sensitivity_tables(model, params)
  )(params)
  for name, table in tables.tables.items():
    # Traced values are not validated there.
    if not np.all(np.asarray(table) >= 0):
      raise ValueError(
        f"geometry.lipschitz[{name!r}] must be a non-negative number."
      )
  return tables
