"""Units that sizes of changes are measured in: raw, relative, or given."""

import ml_collections
import numpy as np

from robust_mm import _validate
from robust_mm import certification

NORMS = ("l2", "linf", "l1")  # in which the typical size of inputs is kept


def key(norm: str) -> str:
  """The fact that has typical sizes in a norm."""
  return "relative_units" + ("" if norm == "l2" else f"_{norm}")


def typical(reference: dict, norm: str) -> dict[str, float | None]:
  """Median distance to the mean by modality; None where it is 0 or unknown."""
  sizes = {}
  for name, value in reference["inputs"].items():
    if np.issubdtype(value.dtype, np.floating):
      alone = {
        "inputs": {name: value},
        "present": {name: reference["present"][name]},
      }
      try:
        sizes[name] = float(certification.relative_units(alone, norm)[name])
      except ValueError:
        sizes[name] = None
  return sizes


def of_evaluation(
  config: ml_collections.ConfigDict, facts: dict, norm: str = "l2"
):
  """``{modality: size of one unit}`` of the evaluation, or None for raw."""
  return resolve(
    config.evaluation.units, facts, "config.evaluation.units", norm
  )


def resolve(value, facts: dict, argument: str, norm: str = "l2"):
  """``raw``, ``relative``, or ``{modality: size}`` with 1 where not named.

  What is typical is measured in the ``norm`` that sizes are.
  """
  if isinstance(value, str):
    _validate.one_of(("raw", "relative"), **{argument: value})
    if value == "raw":
      return None
    sizes = facts.get(key(norm))
    if sizes is None:
      raise _validate.UserError(
        f"{argument}='relative' with the norm {norm}: this run was trained "
        f"before typical sizes were measured in it; use 'raw', or train again."
      )
    for name, kind in facts["kinds"].items():
      if kind == "float" and sizes.get(name) is None:
        raise _validate.UserError(
          f"{argument}='relative': modality {name!r} is constant over the "
          f"training data and has no size; use 'raw'."
        )
    return sizes
  _validate.known(tuple(facts["input_shapes"]), **{argument: value})
  _validate.positive(
    **{f"{argument}.{name}": size for name, size in value.items()}
  )
  return {name: float(value.get(name, 1.0)) for name in facts["input_shapes"]}
