"""What ``certify`` was given, refused by name before anything is computed."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from robust_mm import _validate
from robust_mm._types import Model


def check(model: Any, params: Any, batch: Any) -> None:
  """ValueError unless these are a model, its parameters and a batch."""
  if not isinstance(model, Model):
    raise ValueError(
      "model must be a robust_mm Model: models.from_function makes one of a "
      "function, models.late_fusion of encoders, models.custom an encoder of "
      f"an nnx module and models.encoders.from_linen of a linen one; got "
      f"{_validate.kind(model)}."
    )
  _validate.batch(batch)
  nothing = not jax.tree.leaves(params)
  pair = isinstance(params, tuple) and len(params) == 2
  # Tracing init takes time; another mistake shows when the model is called.
  if nothing or pair:
    _check_structure(model, params, pair and not nothing)


def _check_structure(model, params, pair) -> None:
  wanted, _ = jax.eval_shape(model.init, jax.random.key(0))
  if jax.tree.structure(wanted) == jax.tree.structure(params):
    return
  got = "a pair" if pair else repr(params)
  raise ValueError(
    f"params must be what init returns first, got {got}: params, state = "
    "model.init(key) are passed apart, certify(model, params, batch, "
    "state=state)."
  )


def warn_of_integers(model: Model, inputs: Mapping, units: Any) -> None:
  """Warns where radii are in raw integers, unless units say how large one is.

  Tokens are no sizes; of a model that does not say which inputs are tokens
  only unsigned ones are taken for pixels.
  """
  pixels = []
  for name in inputs:
    dtype = np.dtype(inputs[name].dtype)
    kinds = "u" if model.tokens is None else "ui"
    is_token = name in (model.tokens or ())
    if dtype.kind in kinds and not is_token and name not in (units or {}):
      pixels.append(f"{name!r} ({dtype})")
  if pixels:
    warnings.warn(
      f"batch['inputs'] has integers in {', '.join(pixels)}: they are "
      "certified as they are, so radii and budgets are in grey levels or raw "
      "integers. Divide the inputs, or name their units.",
      stacklevel=3,
    )
