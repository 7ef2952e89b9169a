"""Certificates of a whole data set, from the soundest source there is."""

import dataclasses
import math
import time
from typing import Any

import jax
import numpy as np

from robust_mm import certification
from robust_mm._types import Batch
from robust_mm._types import Model
from robust_mm.evaluation import batches

_REASONS = {
  "local": "Slopes are bounded inside a ball around every example.",
  "relaxation": "The margin is bounded inside a ball around every example.",
  "best": "Every example has the largest radius that any sound source gives.",
}
BALL_BATCH = 64
"""Examples at once: such bounds take some hundred times the memory of a forward
pass."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
  """A certificate of every example, as NumPy arrays.

  Attributes:
    prediction: ``[n]``.
    radius: ``[n]``, joint, in units; the ball is that of an attack of ``norm``.
    modality_radius: ``{m: [n]}``.
    nearest_class: ``[n]``, the rival that sets ``radius``.
    vulnerability: ``{m: [n]}`` shares.
    certificate: the certificates themselves, arrays ``[n, ...]``, to be asked
      for other budgets; without units, which all sizes here are in.
    source: one of ``certification.SOURCES``.
    sound: False: the numbers are estimates.
    norm: 2 or ``math.inf``, of every modality and of the joint ball.
  """

  prediction: Any
  radius: Any
  modality_radius: Any
  nearest_class: Any
  vulnerability: Any
  certificate: certification.Certificate
  source: str
  sound: bool
  norm: float


class Refused(ValueError):
  """The library will not certify a model; the message says why."""


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
  if wanted == "smoothing":
    return None, (
      "The smoothed classifier is certified instead, in rows of its own."
    )
  if wanted in certification.BALL_SOURCES:
    return wanted, _REASONS[wanted]
  if mixed or model.geometry is None:
    reason = (
      "The fusion mixes modalities, so there is no margin certificate; "
      "randomised smoothing is the way to certify such a model."
    )
    if wanted != "auto":
      raise ValueError(f"certificate={wanted!r} cannot be had. {reason}")
    return None, reason
  stated = certification.abstract_geometry(model, params)
  without = certification.missing_constants(stated, bounded=True)
  if not without and wanted != "empirical":
    what = "a sound Lipschitz constant"
    if certification.missing_constants(stated):
      what += " or the radius of its embeddings"
    return "global", f"Every encoder states {what}."
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
  norm: float,
  reference: Batch | None,
) -> tuple[Bounds, dict[str, float]]:
  r"""Certificates of every example, and seconds spent on parts of the work.

  An attack of size r changes the inputs by at most r in :math:`\ell_2`, all
  modalities together, or every entry of every modality by at most r. The joint
  radius is of the same ball, so that the two can be compared.

  Tables, where there are any, are built once. Seconds: ``table_seconds``,
  compilation included, and one compiled call on a chunk,
  ``certify_chunk_seconds``.

  Raises:
    Refused: the library will not certify this model.
  """
  ball = "linf" if norm == math.inf else "l2"

  def certify(params, state, chunk, tables):
    certificate = certification.certify(
      model,
      params,
      chunk,
      state=state,
      source=source,
      tables=tables,
      units=units,
      norm=ball,
    )
    nearest = certificate.joint_nearest_class(ball)
    return {
      "prediction": certificate.prediction,
      "radius": certificate.joint_radius(ball),
      "modality_radius": certificate.modality_radius,
      "nearest_class": nearest,
      "vulnerability": certificate.sensitivity_shares(nearest),
      "certificate": dataclasses.replace(
        certificate, contributions=None, units={}
      ),
    }

  tables = None
  if source in certification.BALL_SOURCES:
    size = device.chunk_size(min(size, BALL_BATCH))
  rows = np.arange(min(size, data.size))
  start = time.perf_counter()
  try:
    if source not in certification.BALL_SOURCES:
      tables = jax.block_until_ready(
        make_tables(model, params, state, source=source, reference=reference)
      )
    seconds = {"table_seconds": time.perf_counter() - start}
    # A refusal is met while tracing; an error of a run is none.
    jax.eval_shape(certify, params, state, data.chunk(rows), tables)
  except ValueError as error:
    raise Refused(str(error)) from error
  extra = (device.replicate(tables),)
  compiled = device.compile(certify)

  def run(rows):
    return device.map(compiled, data, rows, size, extra=lambda number: extra)

  arrays = run(np.arange(data.size))
  start = time.perf_counter()
  run(rows)
  seconds["certify_chunk_seconds"] = time.perf_counter() - start
  sound = arrays["certificate"].sound
  bounds = Bounds(**arrays, source=source, sound=sound, norm=norm)
  return bounds, seconds


def make_tables(
  model: Model,
  params,
  state,
  *,
  source: str,
  reference: Batch | None,
  form: str = "difference",
) -> certification.SensitivityTables:
  """Tables of a source; ``reference`` and ``form`` are of the estimate.

  Raises:
    ValueError: an encoder states no constant, or a bad one.
  """
  if source == "empirical":
    return certification.empirical_tables(
      model, params, reference, state=state, form=form
    )
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
