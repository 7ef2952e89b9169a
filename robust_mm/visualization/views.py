"""A model as a function of the modalities that are synthesised."""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import _validate
from robust_mm._types import Model
from robust_mm._types import Outputs

ABSENT, JOINT = "absent", "joint"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class View:
  """What a model says of some modalities while the others are as told.

  Attributes:
    function: a ``Model`` or ``fn(params, inputs) -> logits``; static.
    names: of the modalities that vary; static.
    shapes: ``((name, shape of one input), ...)`` of those; static.
    params: of the function.
    state: of a model.
    others: ``{m: [n, ...]}`` inputs of the other modalities.
    present: ``{m: bool[n]}`` of those.
    num_others: n, items that every input is shown with; static.
  """

  function: Any = dataclasses.field(metadata={"static": True})
  names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
  shapes: tuple = dataclasses.field(metadata={"static": True})
  params: Any
  state: Any
  others: Any
  present: Any
  num_others: int = dataclasses.field(metadata={"static": True})

  def shape(self, name: str) -> tuple[int, ...]:
    """Of one input."""
    return dict(self.shapes)[name]

  def __call__(self, inputs: Mapping[str, Any]) -> Outputs:
    """Outputs of inputs ``{m: [b, ...]}`` with every item: ``[b * n, ...]``."""
    batch = next(iter(inputs.values())).shape[0]
    whole, present = self._whole(inputs, batch)
    if isinstance(self.function, Model):
      return self.function.apply(self.params, self.state, whole, present)[0]
    logits = self.function(self.params, whole)
    return Outputs(logits=logits, scores=None, embeddings=None)

  def logits(self, inputs: Mapping[str, Any]) -> Any:
    """``[b, n, k]``."""
    found = self(inputs).logits
    return jnp.reshape(found, (-1, self.num_others, found.shape[-1]))

  def features(self, inputs: Mapping[str, Any]) -> Any:
    """Embeddings of the modalities that vary, ``[b, d]``; logits without any.

    Tokens are averaged.
    """
    found = self(inputs)
    if found.embeddings is None:
      parts = [found.logits]
    else:
      parts = [found.embeddings[name] for name in self.names]
    parts = [jnp.mean(p, axis=1) if p.ndim == 3 else p for p in parts]
    joined = jnp.concatenate(parts, axis=-1)
    return jnp.mean(
      jnp.reshape(joined, (-1, self.num_others, joined.shape[-1])), axis=1
    )

  def _whole(self, inputs, batch):
    size = batch * self.num_others
    varied = {
      name: jnp.repeat(inputs[name], self.num_others, axis=0)
      for name in self.names
    }
    tiled = {
      name: jnp.tile(x, (batch,) + (1,) * (x.ndim - 1))
      for name, x in self.others.items()
    }
    present = {
      name: jnp.tile(flag, (batch,)) for name, flag in self.present.items()
    }
    present |= {name: jnp.ones((size,), bool) for name in self.names}
    return {**tiled, **varied}, present


def make(
  apply_fn: Any,
  params: Any,
  modality: str | Sequence[str],
  *,
  state: Any = None,
  shape: Any = None,
  others: Any = ABSENT,
) -> View:
  """The view of a model or function; arguments as ``class_visualization``.

  Raises:
    ValueError: an unknown modality or one of integers, a shape that is not the
      model's, others that cannot be.
  """
  is_model = isinstance(apply_fn, Model)
  if is_model:
    apply_fn.need_classes("class_visualization")
  elif not callable(apply_fn):
    raise ValueError(
      f"apply_fn must be a Model or fn(params, inputs) -> logits, got "
      f"{_validate.kind(apply_fn)}."
    )
  names = (modality,) if isinstance(modality, str) else tuple(modality)
  shapes = _shapes(apply_fn, names, shape)
  for name in names if not is_model else ():
    _known_shape(shapes, name)
  known = apply_fn.modalities if is_model else tuple(sorted(shapes))
  if isinstance(others, Mapping):
    given = others.get("inputs", others)
    known = known if is_model else tuple(sorted({*known, *given}))
    _validate.known(known, others=given)
  _validate.known(known, modality=names)
  if isinstance(others, str):
    _validate.one_of((ABSENT, JOINT), others=others)
  if isinstance(others, str) and others == JOINT:
    names = known
  _check_kinds(apply_fn, names)
  rest = tuple(name for name in known if name not in names)
  inputs, present, number = _others(apply_fn, rest, shapes, others)
  return View(
    function=apply_fn,
    names=names,
    shapes=tuple((name, _known_shape(shapes, name)) for name in names),
    params=params,
    state={} if state is None else state,
    others=inputs,
    present=present,
    num_others=number,
  )


def num_classes(view: View) -> int:
  """k; of a function, what it returns."""
  if isinstance(view.function, Model):
    return view.function.num_classes
  one = {
    name: jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    for name, shape in view.shapes
  }
  try:
    logits = jax.eval_shape(view, one).logits
  except (TypeError, ValueError) as error:
    told = {name: list(shape) for name, shape in view.shapes}
    raise ValueError(
      f"shape: apply_fn does not take inputs {told}: {error}"
    ) from error
  if logits.shape[:1] != (view.num_others,) or logits.ndim != 2:
    raise ValueError(
      f"apply_fn must give logits [b, k], got {list(logits.shape)} of "
      f"{view.num_others} inputs."
    )
  return logits.shape[-1]


def classes(view: View, asked: Any, *, length: int | None = None) -> tuple:
  """``asked`` as whole numbers that the model knows.

  Args:
    view: of the model.
    asked: one class, or several.
    length: of them; any number by default.

  Raises:
    ValueError: naming ``classes``.
  """
  count = num_classes(view)
  found = tuple(np.atleast_1d(np.asarray(asked)).ravel().tolist())
  for one in found:
    whole = isinstance(one, int) and not isinstance(one, bool)
    if not whole or not 0 <= one < count:
      raise ValueError(
        f"classes must be whole numbers in 0..{count - 1}, got {one!r}."
      )
  if not found:
    raise ValueError("classes must name at least one class.")
  if length is not None and len(found) != length:
    raise ValueError(
      f"classes must name one for each of the {length} rows of inputs, got "
      f"{len(found)}."
    )
  return found


def _shapes(apply_fn, names, shape) -> dict[str, tuple[int, ...]]:
  """All shapes that are known."""
  known = getattr(apply_fn, "input_shapes", None) or {}
  known = {name: tuple(known[name]) for name in known}
  if shape is None:
    return known
  if not isinstance(shape, Mapping):
    if len(names) > 1:
      raise ValueError(
        f"shape must map modalities to shapes for {', '.join(names)}, got "
        f"{shape}."
      )
    shape = {names[0]: shape}
  given = {name: _sizes(shape[name]) for name in shape}
  for name, value in given.items():
    if known.get(name, value) != value:
      raise ValueError(
        f"shape says {value} for {name!r}, the model takes {known[name]}."
      )
  return {**known, **given}


def _sizes(shape) -> tuple[int, ...]:
  try:
    return tuple(int(size) for size in shape)
  except (TypeError, ValueError):
    raise ValueError(
      f"shape must be the sizes of one input, got {shape!r}."
    ) from None


def _known_shape(shapes, name) -> tuple[int, ...]:
  if name not in shapes:
    raise ValueError(
      f"shape must say that of one input of {name!r}, which is not known."
    )
  return shapes[name]


def _check_kinds(apply_fn, names) -> None:
  for name in names:
    if name in (getattr(apply_fn, "tokens", None) or ()):
      raise ValueError(
        f"modality: {name!r} holds integer tokens, which have no gradient; use "
        "a modality of features."
      )


def _others(apply_fn, rest, shapes, others):
  """Inputs, presence and number of what the varied ones are shown with."""
  if not isinstance(others, Mapping):
    others = {}
  masked = others.get("present", {}) if "inputs" in others else {}
  given = others.get("inputs", others)
  tokens = getattr(apply_fn, "tokens", None) or ()
  inputs, present, sizes = {}, {}, {}
  for name in rest:
    if name in given:
      inputs[name] = _items(given[name], shapes.get(name), name)
      sizes[name] = len(inputs[name])
      continue
    if not isinstance(apply_fn, Model):
      raise ValueError(
        f"others must have an entry for {name!r}: a plain function cannot "
        "leave a modality out (models.from_function makes a model that can)."
      )
    dtype = jnp.int32 if name in tokens else jnp.float32
    inputs[name] = jnp.zeros((1, *_known_shape(shapes, name)), dtype)
    present[name] = np.zeros(1, bool)
  number = max(sizes.values(), default=1)
  for name, size in sizes.items():
    if size not in (1, number):
      raise ValueError(
        f"others must have as many items of every modality, got {size} of "
        f"{name!r} and {number} of another."
      )
  for name in rest:
    flag = np.asarray(masked.get(name, present.get(name, name in given)), bool)
    present[name] = jnp.broadcast_to(jnp.asarray(flag), (number,))
    inputs[name] = jnp.broadcast_to(
      inputs[name], (number, *inputs[name].shape[1:])
    )
  return inputs, present, number


def _items(value, shape, name):
  """An item, or items, as a batch."""
  value = jnp.asarray(value)
  if shape is None:
    return value[None]  # of an unknown shape it is taken for one item
  if value.shape == shape:
    return value[None]
  if value.shape[1:] == shape and value.shape[0]:
    return value
  raise ValueError(
    f"others[{name!r}] must be an item {list(shape)} or a batch of them, got "
    f"{list(value.shape)}."
  )
