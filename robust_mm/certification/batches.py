"""What a batch must look like, and the sizes that are read off one."""

from collections.abc import Mapping

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

Shapes = Mapping[str, tuple[int, ...]]


def presence(
  batch: Batch, names: tuple[str, ...], shapes: Shapes | None = None
) -> dict[str, Array]:
  """``present`` as arrays; everything is present where it is not given.

  Args:
    batch: ``inputs`` and perhaps ``present``.
    names: the modalities of the model.
    shapes: ``{m: shape}`` of one input, where the model states them.

  Raises:
    ValueError: naming the array that is missing or has a wrong shape.
  """
  _validate.batch(batch)
  if not names:
    raise ValueError("the model must have at least one modality.")
  inputs = batch["inputs"]
  for name in names:
    if name not in inputs:
      raise ValueError(f"batch['inputs'] has no modality {name!r}.")
    _check_input(name, jnp.shape(inputs[name]), (shapes or {}).get(name))
  rows = {name: jnp.shape(inputs[name])[0] for name in names}
  if len(set(rows.values())) > 1:
    raise ValueError(
      "batch['inputs'] must have as many examples of every modality, got "
      f"{_listed(rows)}."
    )
  given = batch.get("present")
  if given is None:
    return {name: jnp.ones(rows[name], bool) for name in names}
  for name in names:
    if name not in given:
      raise ValueError(f"batch['present'] has no modality {name!r}.")
    check_present(f"batch['present'][{name!r}]", given[name], (rows[name],))
  return {name: jnp.asarray(given[name]) for name in names}


def check_present(argument: str, given, shape: tuple[int, ...]) -> None:
  """ValueError unless ``given`` is bool of that shape.

  Numbers are refused: 0.5, or the 2 of a count, is no presence.
  """
  if jnp.shape(given) != shape:
    raise ValueError(
      f"{argument} must be bool of shape {shape}, one for each example, got "
      f"shape {jnp.shape(given)}."
    )
  dtype = given.dtype if hasattr(given, "dtype") else np.asarray(given).dtype
  if dtype != np.bool_:
    raise ValueError(
      f"{argument} must be bool of shape {shape}, one for each example, got "
      f"{dtype}."
    )


def _check_input(name, shape, expected) -> None:
  if not shape:
    raise ValueError(
      f"batch['inputs'][{name!r}] must have a first axis of examples, got one "
      "number."
    )
  if expected is not None and shape[1:] != tuple(expected):
    wanted = ", ".join(str(size) for size in ("b", *expected))
    raise ValueError(
      f"batch['inputs'][{name!r}] has shape {shape}, but the model was made "
      f"for ({wanted})."
    )


def explain(
  model: Model, params: Params, state: State, inputs: Mapping, present: Mapping
) -> ValueError | None:
  """Why ``encode`` of a model without ``input_shapes`` refuses these inputs.

  None where it takes them, or the model states its shapes.
  """
  if model.input_shapes is not None:
    return None

  def encode(params, state, inputs, present):
    return model.encode(params, state, inputs, present, train=False)[0]

  try:
    jax.eval_shape(encode, params, state, inputs, present)
  except (TypeError, ValueError) as error:
    shapes = {name: jnp.shape(value) for name, value in inputs.items()}
    return ValueError(
      f"the encoders of the model refuse batch['inputs'] with shapes "
      f"{_listed(shapes)}: {str(error).strip()}"
    )
  return None


_ORDERS = {"l2": 2, "linf": np.inf, "l1": 1}


def relative_units(batch: Batch, norm: str | float = "l2") -> dict[str, float]:
  r"""Units in which a typical input has size 1.

  .. math:: s_m = \mathrm{median}\, \|x_m - \bar x_m\|

  over the examples of training data that have modality m. Host-side.

  Args:
    batch: training data.
    norm: ``"l2"``, ``"linf"`` or ``"l1"`` (or 2, ``inf``, 1), the one that
      sizes are measured in.

  Raises:
    ValueError: for another norm; naming a modality that is never present or
      constant.
  """
  norm = margins.norm_name(norm)
  _validate.batch(batch)
  names = tuple(sorted(batch["inputs"]))
  present = presence(batch, names)
  units = {}
  for name in names:
    values = np.asarray(batch["inputs"][name], np.float64)
    values = values[np.asarray(present[name])].reshape(-1, values[0].size)
    distances = (
      np.linalg.norm(values - values.mean(axis=0), _ORDERS[norm], axis=-1)
      if len(values)
      else np.zeros(1)
    )
    units[name] = float(np.median(distances))
    if not units[name] > 0:
      raise ValueError(
        f"units of modality {name!r} cannot be relative: it is constant or "
        "never present."
      )
  return units


def _listed(values: Mapping) -> str:
  return ", ".join(f"{name} {value}" for name, value in values.items())
