"""From measurements to the documented dictionary and the rows per example."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import certification
from robust_mm import modalities
from robust_mm.evaluation import batches
from robust_mm.evaluation import bounds as bounds_lib
from robust_mm.evaluation import matrix
from robust_mm.evaluation import protocol as protocol_lib

CURVE_POINTS = 33
REGION_POINTS = 50
# Rounding of x + delta in float32 makes a perturbation look this much larger.
SIZE_TOLERANCE = 1e-3


def share(hits: np.ndarray, counted: np.ndarray) -> dict:
  """``{"accuracy", "interval", "num_examples"}`` of the counted examples.

  The interval is Wilson's, 95 %.
  """
  total = int(counted.sum())
  successes = int((hits & counted).sum())
  return {
    "accuracy": successes / total if total else None,
    "interval": _interval(successes, total),
    "num_examples": total,
  }


def right(data: batches.Data, prediction: np.ndarray, counted) -> dict:
  """The :func:`share` of the counted examples whose class is predicted."""
  return share(prediction == data.label, counted)


def _interval(successes: int, total: int) -> list[float]:
  if not total:
    return [0.0, 1.0]
  low, high = certification.wilson_interval(successes, total)
  return [float(low), float(high)]


def curve_grid(radii: Sequence[float], reach: np.ndarray) -> np.ndarray:
  """Radii of a certified curve: even steps and the attack radii, exactly.

  Args:
    radii: the attack radii, the largest of which ends the curve.
    reach: certified radii ``[n]``; they end the curve where there is no attack.
  """
  finite = reach[np.isfinite(reach)]
  if len(radii):
    end = max(radii)
  elif finite.size and finite.max() > 0:
    end = float(np.quantile(finite, 0.99)) or float(finite.max())
  else:
    end = 1.0
  even = np.linspace(0.0, end, CURVE_POINTS)
  # An even step next to an attack radius, apart by rounding only, is dropped.
  apart = [all(abs(e - r) > 1e-9 * end for r in radii) for e in even]
  return np.sort(np.concatenate([even[apart], np.asarray(radii, float)]))


def certified_at(
  correct: np.ndarray, reach: np.ndarray, radius: float
) -> np.ndarray:
  """Right, and no perturbation up to and with ``radius`` can change it.

  Certified balls are open, so a radius counts below ``reach``; nothing moves
  at radius 0.
  """
  return correct & ((reach > radius) | (radius == 0))


def bound_entries(
  bounds: bounds_lib.Bounds | None,
  protocol: protocol_lib.Protocol,
  correct: np.ndarray,
  data: batches.Data,
) -> dict:
  """The entries that rest on a certificate; empty ones without."""
  if bounds is None:
    return {"certified": [], "region": None, "vulnerability": None}
  # A radius is about the prediction of the pass that computed it.
  right = correct & (bounds.prediction == data.label)
  return {
    "certified": certified_rows(bounds, protocol, right, data),
    "region": region(bounds, right, data),
    "vulnerability": vulnerability(bounds, data),
  }


def certified_rows(
  bounds: bounds_lib.Bounds,
  protocol: protocol_lib.Protocol,
  correct: np.ndarray,
  data: batches.Data,
) -> list[dict]:
  """The ``"certified"`` entries: the joint curve, then one a modality."""
  curves = [(data.names, protocol.radii, bounds.radius)]
  if len(data.names) > 1:
    curves += [
      ((name,), protocol.modality_grid(name), bounds.modality_radius[name])
      for name in data.names
    ]
  rows = []
  for names, radii, reach in curves:
    for radius in curve_grid(radii, reach[data.counted]):
      hits = certified_at(correct, reach, radius)
      rows.append(
        {
          "radius": float(radius),
          "modalities": list(names),
          **share(hits, data.counted),
          "source": bounds.source,
          "sound": bounds.sound,
          "norm": protocol_lib.jsonable(bounds.norm),
        }
      )
  return rows


def attacked_rows(
  cells: Sequence[matrix.Cell],
  protocol: protocol_lib.Protocol,
  data: batches.Data,
) -> list[dict]:
  """The ``"attacked"`` entries, one a cell."""
  return [
    {
      "attack": cell.attack,
      "norm": protocol_lib.jsonable(protocol.norm),
      "radius": cell.radius,
      "modalities": list(cell.modalities),
      **share(cell.robust, data.counted),
      "largest_size": cell.size,
      **({"broken_by": dict(cell.broken_by)} if cell.broken_by else {}),
    }
    for cell in cells
  ]


def region(
  bounds: bounds_lib.Bounds, correct: np.ndarray, data: batches.Data
) -> dict | None:
  r"""Certified accuracy against two separate budgets, for two modalities.

  An example is held at :math:`(e_1, e_2)` when it is right and its certificate
  covers both sizes at once, measured in the norm of the bounds: what
  ``Certificate.covers`` says, bounded embeddings and balls included.

  Returns:
    ``{"modalities", "radii": [first, second], "accuracy": [[...]]}``, rows
    along the first modality; None unless there are exactly two.
  """
  if len(data.names) != 2:
    return None
  rows = np.flatnonzero(data.counted)
  first, second = data.names
  counted = jax.tree.map(lambda x: jnp.asarray(x[rows]), bounds.certificate)
  grids = [_region_grid(counted, name) for name in data.names]
  held = _held(counted, jnp.asarray(correct[rows]), *map(jnp.asarray, grids))
  accuracy = np.asarray(held, np.float64) / max(len(rows), 1)
  return {
    "modalities": [first, second],
    "radii": [grid.tolist() for grid in grids],
    "accuracy": accuracy.round(6).tolist(),
    "source": bounds.source,
    "sound": bounds.sound,
    "norm": protocol_lib.jsonable(bounds.norm),
  }


@jax.jit
def _held(certificate, correct, one, two):
  """How many are right and covered, at each of ``one`` and ``two``."""
  first, second = certificate.modalities

  def count(sizes):
    covered = certificate.covers({first: sizes[0], second: sizes[1]})
    return jnp.sum(covered & correct)

  pairs = jnp.stack(jnp.meshgrid(one, two, indexing="ij"), axis=-1)
  # One pair at a time: all at once are as many margins of every class.
  found = jax.lax.map(count, jnp.reshape(pairs, (-1, 2)))
  return jnp.reshape(found, (len(one), len(two)))


def _region_grid(
  certificate: certification.Certificate, name: str
) -> np.ndarray:
  """Sizes up to where most examples fall, or have spent their whole drop."""
  reach = np.asarray(certificate.modality_radius[name])
  drops = (certificate.drops or {}).get(name)
  if drops is not None:
    slope = np.asarray(certificate.sensitivity[name])
    spent = np.asarray(drops) / np.where(slope > 0, slope, np.inf)
    # Beyond the largest such size more of this modality costs nothing more.
    reach = np.where(np.isfinite(reach), reach, 1.25 * spent.max(axis=-1))
  finite = reach[np.isfinite(reach)]
  end = float(np.quantile(finite, 0.95)) if finite.size else 0.0
  return np.linspace(0.0, end or 1.0, REGION_POINTS)


def vulnerability(bounds: bounds_lib.Bounds, data: batches.Data) -> dict:
  """Mean share of each modality in the sensitivity at the nearest class."""
  return {
    name: float(np.mean(values[data.counted]))
    for name, values in bounds.vulnerability.items()
  }


def example_columns(
  data: batches.Data,
  prediction: np.ndarray,
  cells: Sequence[matrix.Cell],
  bounds: bounds_lib.Bounds | None,
) -> dict[str, Any]:
  """The columns of examples.csv; :func:`column_help` says what they mean."""
  correct = (prediction == data.label) & data.counted
  columns = {
    "id": data.id,
    "label": data.label,
    "prediction": prediction,
    "correct": correct,
    "counted": data.counted,
  }
  for name in data.names:
    columns[f"present/{name}"] = data.present[name]
  if bounds is not None:
    word = radius_word(bounds.sound)
    columns[word] = bounds.radius
    for name in data.names:
      columns[f"{word}/{name}"] = bounds.modality_radius[name]
    columns["nearest_class"] = bounds.nearest_class
    for name in data.names:
      columns[f"vulnerability/{name}"] = bounds.vulnerability[name]
  for cell in cells:
    subset = modalities.subset_name(cell.modalities)
    columns[f"robust/{cell.attack}/{subset}/{cell.radius:g}"] = cell.robust
  return columns


def radius_word(sound: bool) -> str:
  """The column name of a radius: what is no guarantee says so."""
  return "certified_radius" if sound else "estimated_radius"


def example_entry(data: batches.Data, columns: Mapping[str, Any]) -> dict:
  """The ``"examples"`` entry: how many, and what their columns mean."""
  return {
    "num_examples": data.size,
    "num_left_out": int((~data.counted).sum()),
    "columns": column_help(list(columns)),
  }


def column_help(columns: Sequence[str]) -> dict[str, str]:
  """One sentence for each column of examples.csv."""
  kinds = {
    "id": "the example's id in the data set, or its row number",
    "label": "the true class",
    "prediction": "the predicted class; -1 if an output was not finite",
    "correct": "1 if the prediction is the label",
    "counted": "1 if at least one modality is present; 0 is in no average",
    "present": "1 if this modality is present",
    "certified_radius": (
      "no perturbation below this size changes the prediction (proven), in "
      "the norm and units of the results; of all modalities in one ball, or of "
      "the named one alone"
    ),
    "estimated_radius": (
      "an estimate of that size from slopes seen on data: no guarantee"
    ),
    "smoothed_prediction": (
      "the class of the smoothed classifier; -1 where it abstains"
    ),
    "smoothed_p_lower": "lower bound of how often the base classifier says so",
    "smoothed_radius": (
      "no change below this size alters the smoothed prediction, with "
      "probability 1 - alpha for each example: in l2 and units, or the number "
      "of modified elements; of all modalities, or of the named one alone"
    ),
    "nearest_class": "the class whose boundary the radius belongs to",
    "vulnerability": "this modality's share of the squared sensitivity there",
    "robust": (
      "robust/<attack>/<modalities>/<radius>: 1 if right and not broken by "
      "this or a smaller contained attack"
    ),
  }
  return {name: kinds[name.split("/")[0]] for name in columns}


def checks(
  cells: Sequence[matrix.Cell],
  bounds: bounds_lib.Bounds | None,
  correct: np.ndarray,
  data: batches.Data,
) -> list[dict]:
  """What must hold between the numbers, with what was found.

  Returns:
    ``[{"name", "passed", "required", "message"}]``; a check that fails although
    ``required`` means that the numbers must not be believed.
  """
  worst = max(
    (cell.size / cell.radius for cell in cells if cell.size), default=0.0
  )
  found = []
  if cells:
    found.append(
      {
        "name": "attacks_within_budget",
        "passed": worst <= 1 + SIZE_TOLERANCE,
        "required": True,
        "message": (
          f"The largest perturbation was {worst:.4f} times its budget."
        ),
      }
    )
  if not cells or bounds is None:
    return found
  return [*found, _certified_check(cells, bounds, correct, data)]


def _certified_check(cells, bounds, correct, data) -> dict:
  refuted, lines = np.zeros(data.size, bool), []
  for cell in cells:
    reach = bounds.radius
    if len(cell.modalities) < len(data.names):
      reach = bounds.modality_radius[cell.modalities[0]]
    held = certified_at(correct, reach, cell.radius) & data.counted
    bad = held & ~cell.robust
    if bad.any():
      subset = modalities.subset_name(cell.modalities)
      lines.append(f"{subset} at {cell.radius:g}: {int(bad.sum())}")
    refuted |= bad
  count = int(refuted.sum())
  if not count:
    kind = "certified" if bounds.sound else "estimated"
    message = f"No attack succeeded inside any {kind} radius."
  elif bounds.sound:
    message = (
      f"THE CERTIFICATE IS WRONG: attacks broke {count} examples inside "
      f"their certified radius ({'; '.join(lines)}). Do not use these numbers."
    )
  else:
    message = (
      f"Attacks broke {count} examples inside their estimated radius "
      f"({'; '.join(lines)}): an estimate is no guarantee."
    )
  return {
    "name": "certified_at_most_attacked",
    "passed": count == 0,
    "required": bool(bounds.sound),
    "message": message,
    "violations": count,
  }


def tightness_checks(found: Mapping | None) -> list[dict]:
  """No attack of at most the radius of an example may flip its class."""
  if found is None:
    return []
  pairs = zip(found["factors"], found["flipped"])
  worst = max(
    (flipped for factor, flipped in pairs if factor <= 1), default=0.0
  )
  message = f"Attacks at the radius itself flipped {worst:.1%} of predictions."
  if worst and found["sound"]:
    message += " THE CERTIFICATE IS WRONG. Do not use these numbers."
  return [
    {
      "name": "nothing_flips_inside_the_radius",
      "passed": worst == 0,
      "required": found["sound"],
      "message": message,
    }
  ]


def subset_rows(
  predictions: Mapping[tuple[str, ...], Any], data: batches.Data
) -> dict[str, dict]:
  """The ``"subsets"`` entries: ``{"left+right": {"accuracy", ...}}``."""
  return {
    modalities.subset_name(subset): share(prediction == data.label, counted)
    for subset, (prediction, counted) in predictions.items()
  }
