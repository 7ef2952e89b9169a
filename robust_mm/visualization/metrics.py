"""What can be said about synthesised inputs in numbers.

Scores come from the network that made the picture unless another one is given:
that circle is why transfer to other networks is measured.
"""

import functools
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm import margins
from robust_mm._types import Batch
from robust_mm.visualization import objectives
from robust_mm.visualization import parameterizations
from robust_mm.visualization import transforms as transforms_lib
from robust_mm.visualization import views

TINY = 1e-12
LEAST_SPECTRUM = 4  # pixels: two rings of frequencies


def transformation_accuracy(
  apply_fn: Any,
  params: Any,
  inputs: Any,
  classes: Sequence[int],
  transforms: Any,
  *,
  modality: str | Sequence[str],
  key: PRNGKeyArray,
  num: int = 64,
  state: Any = None,
  others: Any = views.ABSENT,
) -> Float[Array, "c s"]:
  """How often an input keeps its class under fresh transformations.

  Give another network's ``apply_fn`` and ``params`` for transfer.

  Args:
    apply_fn: as of ``class_visualization``.
    params: its parameters.
    inputs: ``[class, seed, ...]``, or ``{m: ...}`` of several modalities.
    classes: of the first axis.
    transforms: a ``Transform``, or ``{m: Transform}``.
    modality: the name of the inputs, or names.
    key: one that the synthesis did not have.
    num: of transformations, the same for every input.
    state: of a model.
    others: as of ``class_visualization``.

  Returns:
    The share ``[class, seed]`` of draws, and of other items.
  """
  _validate.at_least(1, num=num)
  view, flat, shape = _viewed(
    apply_fn, params, inputs, modality, state, others, classes
  )
  chosen = as_mapping(transforms, view.names, "transforms")
  for name in view.names:
    chosen[name].check(view.shape(name), flat[name].dtype, name=name)
  label = jnp.repeat(jnp.asarray(classes, jnp.int32), shape[1])
  pairs = tuple(sorted(chosen.items()))
  return jnp.reshape(_kept(pairs, num, view, flat, label, key), shape)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _kept(transforms, num, view, flat, label, key):
  def one(key):
    moved = {}
    for i, (name, transform) in enumerate(transforms):
      keys = jax.random.split(jax.random.fold_in(key, i), label.shape[0])
      moved[name] = jax.vmap(transform)(keys, flat[name])
    best = jnp.argmax(view.logits(moved), axis=-1)
    return jnp.mean((best == label[:, None]).astype(jnp.float32), axis=1)

  return jnp.mean(jax.lax.map(one, jax.random.split(key, num)), axis=0)


def class_probability(
  apply_fn: Any,
  params: Any,
  inputs: Any,
  classes: Sequence[int],
  *,
  modality: str | Sequence[str],
  state: Any = None,
  others: Any = views.ABSENT,
) -> Float[Array, "c s"]:
  """The probability ``[class, seed]`` of the class, untransformed.

  Arguments as of ``transformation_accuracy``.
  """
  view, flat, shape = _viewed(
    apply_fn, params, inputs, modality, state, others, classes
  )
  label = jnp.repeat(jnp.asarray(classes, jnp.int32), shape[1])[:, None]
  label = jnp.broadcast_to(label, (label.shape[0], view.num_others))
  found = objectives.objective("log_prob", _logits(view, flat), label)
  return jnp.reshape(jnp.mean(jnp.exp(found), axis=1), shape)


@jax.jit
def _logits(view, flat):
  return view.logits(flat)


@jax.jit
def _features(view, flat):
  return view.features(flat)


@jax.jit
def _scores(view, flat):
  return view(flat).scores


def modality_margins(
  apply_fn: Any,
  params: Any,
  inputs: Any,
  classes: Sequence[int],
  *,
  modality: str | Sequence[str],
  state: Any = None,
  others: Any = views.ABSENT,
) -> dict[str, Array] | None:
  r"""The part of the margin that is each modality's, of a late fusion.

  :math:`s_{m,c} - \max_{k \ne c} s_{m,k}` of its scores, ``{m: [class,
  seed]}``, averaged over other items; None of a model without scores. Arguments
  as of ``transformation_accuracy``.
  """
  view, flat, shape = _viewed(
    apply_fn, params, inputs, modality, state, others, classes
  )
  scores = _scores(view, flat)
  if scores is None:
    return None
  label = np.repeat(np.asarray(classes, np.int32), shape[1] * view.num_others)
  found = {}
  for name, value in scores.items():
    ahead = margins.smallest(margins.pairwise(value, label))
    found[name] = jnp.mean(jnp.reshape(ahead, (*shape, -1)), axis=-1)
  return found


def naturalness(
  apply_fn: Any,
  params: Any,
  inputs: Any,
  classes: Sequence[int],
  items: Batch,
  *,
  modality: str,
  smooth_axes: Sequence[int] = (0, 1),
  state: Any = None,
  others: Any = views.ABSENT,
) -> dict[str, Array]:
  """How far synthesised inputs are from real ones.

  Args:
    apply_fn: the network whose penultimate features are compared.
    params: its parameters.
    inputs: ``[class, seed, ...]``.
    classes: of the first axis.
    items: real ones, with labels; every class needs two where ``modality`` is
      present.
    modality: a name.
    smooth_axes: axes of one input, for total variation.
    state: of a model.
    others: as of ``class_visualization``.

  Returns:
    ``[class, seed]`` each: ``total_variation``; ``feature_distance``, the mean
    distance to features of real items of the class divided by the mean distance
    between those (NaN where all of those are alike); and of images
    ``spectral_slope``, see ``spectral_slope``.
  """
  if not isinstance(modality, str):
    raise ValueError(f"modality must be one name, got {modality!r}.")
  view, flat, shape = _viewed(
    apply_fn, params, inputs, modality, state, others, classes
  )
  x = flat[modality]
  for axis in smooth_axes:
    _validate.whole_up_to(x.ndim - 2, smooth_axes=axis)
  found = {
    "total_variation": jnp.reshape(
      jax.vmap(
        lambda v: parameterizations.total_variation(v, tuple(smooth_axes))
      )(x),
      shape,
    ),
    "feature_distance": _distances(
      jnp.reshape(_features(view, flat), (*shape, -1)),
      classes,
      view,
      items,
    ),
  }
  if x.ndim >= 3 and min(x.shape[1:3]) >= LEAST_SPECTRUM:
    found["spectral_slope"] = jnp.reshape(jax.vmap(spectral_slope)(x), shape)
  return found


def _distances(features, classes, view, items):
  (name,) = view.names
  label = np.asarray(items["label"])
  present = items.get("present", {}).get(name, np.ones(label.shape, bool))
  found = []
  for row, chosen in enumerate(classes):
    rows = np.flatnonzero((label == chosen) & np.asarray(present))
    if len(rows) < 2:
      raise ValueError(
        f"items must have two examples of class {chosen} with {name!r}, got "
        f"{len(rows)}."
      )
    real = _features(view, {name: jnp.asarray(items["inputs"][name][rows])})
    among = _pairwise(real, real)
    among = jnp.sum(among) / (len(rows) * (len(rows) - 1))
    among = jnp.where(among > 0, among, jnp.nan)
    found.append(jnp.mean(_pairwise(features[row], real), axis=1) / among)
  return jnp.stack(found)


def _pairwise(a, b):
  return jnp.linalg.norm(a[:, None] - b[None], axis=-1)


def spectral_slope(x: Float[Array, "h w *c"]) -> Float[Array, ""]:
  """The slope of log power over log radial frequency, averaged over channels.

  Natural images have about -2, white noise 0; more negative is smoother.

  Raises:
    ValueError: less than four pixels, of which there is no slope.
  """
  height, width = x.shape[:2]
  if min(height, width) < LEAST_SPECTRUM:
    raise ValueError(
      f"x must have at least {LEAST_SPECTRUM} pixels each way, got "
      f"{[height, width]}."
    )
  flat = jnp.reshape(x, (height, width, -1))
  power = jnp.mean(jnp.abs(jnp.fft.fft2(flat, axes=(0, 1))) ** 2, axis=-1)
  frequency = np.sqrt(
    np.fft.fftfreq(height)[:, None] ** 2 + np.fft.fftfreq(width)[None] ** 2
  )
  size = min(height, width)
  ring = np.rint(frequency * size).astype(int)
  count = size // 2
  weight = np.stack([ring == r + 1 for r in range(count)]).astype(np.float64)
  weight /= weight.sum((1, 2), keepdims=True)
  mean = jnp.einsum("rhw,hw->r", weight.astype(np.float32), power)
  across = np.log(np.einsum("rhw,hw->r", weight, frequency))
  across = (across - across.mean()) / np.var(across) / count
  return jnp.dot(jnp.log(mean + TINY), across.astype(np.float32))


def diversity(
  apply_fn: Any,
  params: Any,
  inputs: Any,
  *,
  modality: str | Sequence[str],
  state: Any = None,
  others: Any = views.ABSENT,
) -> Float[Array, " c"]:
  """The mean distance of penultimate features of two seeds, by class.

  NaN with a single seed. Arguments as of ``transformation_accuracy``.
  """
  view, flat, shape = _viewed(apply_fn, params, inputs, modality, state, others)
  features = jnp.reshape(_features(view, flat), (*shape, -1))
  total = jnp.sum(jax.vmap(lambda f: _pairwise(f, f))(features), axis=(1, 2))
  return (
    total / (shape[1] * (shape[1] - 1)) if shape[1] > 1 else total * jnp.nan
  )


def as_mapping(value: Any, names: Sequence[str], argument: str) -> dict:
  """``{m: value}``, of one value for a single modality.

  Raises:
    ValueError: naming the argument, where a modality has none.
  """
  if not isinstance(value, Mapping):
    if len(names) > 1:
      raise ValueError(
        f"{argument} must map each of {', '.join(names)} to its own."
      )
    value = {names[0]: value}
  _validate.known(names, **{argument: value})
  for name in names:
    if name not in value:
      raise ValueError(f"{argument} must name the modality {name!r}.")
  if argument == "transforms":
    for one in value.values():
      if not isinstance(one, transforms_lib.Transform):
        raise ValueError(
          f"transforms must be made by visualization.transforms, got "
          f"{_validate.kind(one)}."
        )
  return dict(value)


def _viewed(apply_fn, params, inputs, modality, state, others, classes=None):
  """The view, inputs ``{m: [class * seed, ...]}``, and (classes, seeds)."""
  names = (modality,) if isinstance(modality, str) else tuple(modality)
  inputs = as_mapping(inputs, names, "inputs")
  inputs = {name: jnp.asarray(inputs[name]) for name in names}
  lead = inputs[names[0]].shape[:2]
  for name, x in inputs.items():
    if x.ndim < 3 or x.shape[:2] != lead:
      raise ValueError(
        f"inputs must be [class, seed, ...] of {name!r}, got {list(x.shape)}."
      )
  shapes = {name: tuple(x.shape[2:]) for name, x in inputs.items()}
  view = views.make(
    apply_fn, params, names, state=state, shape=shapes, others=others
  )
  if classes is not None:
    views.classes(view, classes, length=lead[0])
  flat = {n: jnp.reshape(x, (-1, *x.shape[2:])) for n, x in inputs.items()}
  return view, flat, lead
