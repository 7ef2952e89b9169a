"""A plain function as a model."""

import math
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from robust_mm import _validate
from robust_mm import modalities
from robust_mm._types import Model
from robust_mm._types import Outputs


def from_function(
  fn: Callable[[Any, Mapping[str, Any]], Any],
  params: Any,
  *,
  num_classes: int,
  input_shapes: Mapping[str, Sequence[int]],
) -> Model:
  """Any ``fn(params, inputs) -> logits`` as a model.

  It has no geometry: ``certify(..., source="relaxation")`` or randomised
  smoothing certify it, and every attack and protocol takes it. An absent
  modality is zeros to ``fn``, whatever its array holds.

  >>> model = from_function(
  ...   lambda w, inputs: inputs["x"] @ w,
  ...   jnp.eye(3),
  ...   num_classes=3,
  ...   input_shapes={"x": (3,)},
  ... )
  >>> model.modalities
  ('x',)

  Args:
    fn: ``{m: [b, ...]} -> [b, k]``, in evaluation mode, with ``params``; an
      example's logits must not depend on the others.
    params: a pytree; what ``model.init`` returns.
    num_classes: k, the number of logits; another one is refused when the model
      is called.
    input_shapes: ``{m: shape}`` of one input.
  """
  _validate.at_least(2, num_classes=num_classes)
  shapes = {name: tuple(input_shapes[name]) for name in input_shapes}
  if not shapes:
    raise ValueError("input_shapes must name at least one modality.")

  def encode(params, state, inputs, present, *, train=False, key=None):
    del params, train, key
    masked = modalities.mask(
      {name: inputs[name] for name in shapes},
      {name: present[name] for name in shapes},
    )
    flat = {
      name: jnp.reshape(x, (x.shape[0], math.prod(shapes[name])))
      for name, x in masked.items()
    }
    return flat, state

  def fuse(params, embeddings, present):
    del present
    inputs = {
      name: jnp.reshape(x, (x.shape[0], *shapes[name]))
      for name, x in embeddings.items()
    }
    logits = fn(params, inputs)
    _check_logits(logits, num_classes)
    return Outputs(
      logits=logits, scores=None, embeddings=embeddings, mixed=True
    )

  return Model(
    modalities=modalities.names(shapes),
    num_classes=num_classes,
    init=lambda key: (params, {}),
    encode=encode,
    fuse=fuse,
    geometry=None,
    input_shapes=shapes,
  )


def _check_logits(logits, num_classes: int) -> None:
  shape = getattr(logits, "shape", None)
  if shape is None or shape[-1:] != (num_classes,):
    found = "returns " + _validate.kind(logits)
    if shape is not None:
      found = f"returns logits of shape {tuple(shape)}"
    raise ValueError(
      f"num_classes={num_classes} must be the number of logits, but fn {found}."
    )
