"""``class_visualization``: what is asked is checked, made and measured."""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm._types import Batch
from robust_mm._types import Model
from robust_mm.visualization import ascent
from robust_mm.visualization import metrics
from robust_mm.visualization import objectives
from robust_mm.visualization import parameterizations
from robust_mm.visualization import transforms as transforms_lib
from robust_mm.visualization import views

MODES = ("expectation", "in_place")
PARAMETERIZATIONS = ("pixels", "fourier", "unbounded")
FIDELITIES = ("corrected", "published")
AUTO = "auto"
# Sizes up to some 64 pixels, where margins of training items are about 10.
TV_WEIGHT, L2_WEIGHT = 10.0, 5.0
USUAL_MARGIN = 10.0
ANNEALING = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Visualization:
  """What ``class_visualization`` made, and what it is worth.

  ``[class, seed]`` are the leading axes of all arrays.

  Attributes:
    classes: ``(class, ...)``.
    inputs: ``[class, seed, ...]`` in the units of the modality; ``{m: ...}``
      where several were synthesised.
    objective: ``[class, seed, step]``, with regularisers.
    probability: ``[class, seed, step]``, of the class, of what the network was
      shown in that step.
    first_bad_step: ``[class, seed]``, the step at which the objective was not
      finite, where the input stayed as it was before; -1 for never.
    transforms_accuracy: ``{"near": [class, seed], "far": ...}``: the share of
      held-out transformations under which the input keeps its class.
    margins: ``{m: [class, seed]}``, each modality's part of the margin; None
      of a model whose logits are no sum.
    settings: all of them, as plain values.
  """

  classes: tuple[int, ...]
  inputs: Any
  objective: Any
  probability: Any
  first_bad_step: Any
  transforms_accuracy: Any
  margins: Any
  settings: Any


def class_visualization(
  apply_fn: Any,
  params: Any,
  modality: str | Sequence[str],
  classes: int | Sequence[int],
  *,
  key: PRNGKeyArray,
  transforms: Any,
  shape: Any = None,
  mode: str = "expectation",
  objective: str | None = None,
  others: Any = views.ABSENT,
  parameterization: str = "pixels",
  value_range: Any = (0.0, 1.0),
  reference: Any = 0.0,
  num_steps: int = 256,
  num_transforms: int = 4,
  learning_rate: float = 0.05,
  step_size: float = 0.02,
  every: int = 8,
  tv_weight: float | None = None,
  l2_weight: float | None = None,
  annealing: float | None = None,
  blur_every: int = 0,
  init_std: float = 0.01,
  objective_scale: float | str = 1.0,
  items: Batch | None = None,
  held_out: Mapping[str, Any] | None = None,
  num_held_out: int = 64,
  seeds: int = 3,
  fidelity: str = "corrected",
  state: Any = None,
) -> Visualization:
  r"""The input of a modality that most activates a class, by gradient ascent.

  .. math:: \max_u \frac{1}{n} \sum_{i=1}^n o(T_i x(u)) - w_{tv} TV(x)
            - w_{l2}\,\mathrm{mean}\,(x - x_{ref})^2

  with fresh transformations :math:`T_i` in every step (``mode="expectation"``,
  Adam on u), or with x itself transformed every few steps (``"in_place"``,
  normalised gradient ascent on x). Regularisers are means, in units of
  ``value_range``.

  What may be claimed of the result: under the stated transformations it keeps
  its class in so many draws. Not that it is what the network "sees", nor that
  it is realistic: on digits synthesised inputs keep their class more often
  than real ones.

  >>> found = class_visualization(
  ...   model, params, "image", [3], key=jax.random.key(0),
  ...   transforms=transforms.image(),
  ... )                                                       # doctest: +SKIP
  >>> found.inputs.shape                                      # doctest: +SKIP
  (1, 3, 28, 28, 1)

  Args:
    apply_fn: a ``Model``, in evaluation mode, or ``fn(params, inputs) ->
      logits [b, k]`` of inputs ``{m: [b, ...]}``, example by example.
    params: its parameters.
    modality: what is synthesised: a name, or several.
    classes: one class or several, in 0..k-1.
    key: of everything random; a class and seed alone decide a picture, not
      what else is asked for.
    transforms: of ``visualization.transforms``; ``{m: transform}`` for several
      modalities.
    shape: of one input, or ``{m: shape}``; a ``Model`` knows it.
    mode: ``"expectation"`` or ``"in_place"``.
    objective: ``"margin"`` (default), ``"logit"`` or ``"log_prob"``.
    others: the other modalities: ``"absent"``; an item ``{m: [...]}`` or items
      ``{m: [n, ...]}``, over which the objective is averaged; a ``Batch``,
      whose presence counts; ``"joint"``: all are synthesised. What an item does
      not name is absent.
    parameterization: ``"pixels"`` (a sigmoid into the range), ``"fourier"``, or
      ``"unbounded"`` (x = u, no range).
    value_range: ``(low, high)``, numbers or arrays that broadcast against one
      input; ``{m: ...}`` for several modalities.
    reference: what the l2 term pulls to, and the start; likewise. 0 for digits
      and the floor of a spectrogram, 0.5 for photos.
    num_steps: of the ascent.
    num_transforms: draws in every step (expectation).
    learning_rate: of Adam (expectation).
    step_size: mean absolute change of a step, in units of the range (in place).
    every: steps between two transformations (in place).
    tv_weight: 10 by default; 1 with ``objective_scale="auto"``.
    l2_weight: 5 by default, 1 for photos; 0.5 with ``"auto"``.
    annealing: share of the steps, at the end, over which the transformations
      shrink to none; 0.2 by default.
    blur_every: steps between two Gaussian blurs of one pixel in the first half;
      0 for none.
    init_std: of the start, in pixels or their logits.
    objective_scale: the objective is divided by it; ``"auto"``: by the mean
      margin of ``items``, which makes one set of weights fit networks with
      logits of any size; by 1 where that is not positive.
    items: training items with labels, for ``"auto"``.
    held_out: ``{name: transform}`` to test with; ``transforms.held_out`` of a
      single modality by default.
    num_held_out: draws of each.
    seeds: pictures of every class.
    fidelity: ``"published"`` is our reconstruction of what was published:
      logit objective, rotation and scaling only, no annealing, no total
      variation.
    state: of a model.

  Raises:
    ValueError: a bad argument, naming it.

  References:
    `Li et al. (2021) <https://arxiv.org/abs/2106.09982>`_, in our reading.
  """
  _check_numbers(locals())
  view = views.make(
    apply_fn, params, modality, state=state, shape=shape, others=others
  )
  classes = _classes(classes, views.num_classes(view))
  chosen = metrics.as_mapping(transforms, view.names, "transforms")
  if fidelity == "published":
    chosen, objective = _published(chosen, objective, tv_weight, annealing)
    tv_weight, annealing = 0.0, 0.0
  objective = objective or "margin"
  _validate.one_of(objectives.OBJECTIVES, objective=objective)
  spaces = _spaces(
    view, mode, parameterization, value_range, reference, init_std
  )
  if held_out is None and len(view.names) == 1:
    # Of the border as it was given: alike for all modes and controls.
    (name,) = view.names
    held_out = transforms_lib.held_out(chosen[name], view.shape(name))
  for name in view.names:
    chosen[name].check(view.shape(name), name=name)
    if mode == "expectation":
      chosen[name] = chosen[name].filled(float(np.mean(spaces[name].reference)))
  usual = USUAL_MARGIN if objective_scale == AUTO else 1.0
  divisor = _divisor(objective_scale, items, view, others)
  program = ascent.Program(
    in_place=mode == "in_place",
    objective=objective,
    transforms=tuple(sorted(chosen.items())),
    smooth=tuple(
      (name, chosen[name].smooth_axes(view.shape(name))) for name in view.names
    ),
    num_steps=num_steps,
    num_transforms=num_transforms,
    step_size=step_size if mode == "in_place" else learning_rate,
    tv_weight=TV_WEIGHT / usual if tv_weight is None else tv_weight,
    l2_weight=L2_WEIGHT / usual if l2_weight is None else l2_weight,
    every=every,
    annealing=ANNEALING if annealing is None else annealing,
    blur_every=blur_every,
  )
  # The key of the tests is never that of a step.
  loop_key, test_key = jax.random.split(key)
  label = jnp.repeat(jnp.asarray(classes, jnp.int32), seeds)
  keys = jax.vmap(
    lambda c, s: jax.random.fold_in(jax.random.fold_in(loop_key, c), s)
  )(label, jnp.tile(jnp.arange(seeds), len(classes)))
  x, value, probability, bad_step = ascent.run(
    program, view, spaces, label, keys, divisor
  )
  lead = (len(classes), seeds)
  inputs = {n: jnp.reshape(v, (*lead, *v.shape[1:])) for n, v in x.items()}
  asked = {
    "modality": view.names,
    "state": state,
    "others": others,
  }
  several = len(view.names) > 1
  return Visualization(
    classes=classes,
    inputs=inputs if several else inputs[view.names[0]],
    objective=jnp.reshape(value, (*lead, -1)),
    probability=jnp.reshape(probability, (*lead, -1)),
    first_bad_step=jnp.reshape(bad_step, lead),
    transforms_accuracy={
      name: metrics.transformation_accuracy(
        apply_fn,
        params,
        inputs,
        classes,
        test,
        key=jax.random.fold_in(test_key, i),
        num=num_held_out,
        **asked,
      )
      for i, (name, test) in enumerate((held_out or {}).items())
    },
    margins=metrics.modality_margins(
      apply_fn, params, inputs, classes, **asked
    ),
    settings={
      "fidelity": fidelity,
      "reconstruction": fidelity == "published",
      "modality": list(view.names),
      "classes": list(classes),
      "seeds": seeds,
      "mode": mode,
      "objective": objective,
      "objective_divisor": float(divisor),
      "parameterization": parameterization,
      "others": _told(others),
      "transforms": {name: t.settings() for name, t in program.transforms},
      "held_out": {
        name: _plain_transforms(test) for name, test in (held_out or {}).items()
      },
      "num_held_out": num_held_out,
      "num_steps": num_steps,
      **_of_mode(program),
      "tv_weight": program.tv_weight,
      "l2_weight": program.l2_weight,
      "annealing": program.annealing,
      "blur_every": blur_every,
      "init_std": init_std,
    },
  )


def _check_numbers(given) -> None:
  for name in ("num_steps", "num_transforms", "every", "seeds", "num_held_out"):
    _validate.at_least(1, **{name: given[name]})
  _validate.at_least(0, blur_every=given["blur_every"])
  for name in ("learning_rate", "step_size", "init_std"):
    _validate.positive(**{name: given[name]})
  for name in ("tv_weight", "l2_weight", "annealing"):
    if given[name] is not None:
      _validate.non_negative(**{name: given[name]})
  if given["annealing"] is not None:
    _validate.in_unit_interval(annealing=given["annealing"])
  _validate.one_of(MODES, mode=given["mode"])
  _validate.one_of(
    PARAMETERIZATIONS, parameterization=given["parameterization"]
  )
  _validate.one_of(FIDELITIES, fidelity=given["fidelity"])
  if given["parameterization"] == "fourier":
    if given["mode"] == "in_place":
      raise ValueError("parameterization must be 'pixels' in place.")
    if given["blur_every"]:
      raise ValueError("blur_every must be 0 with Fourier coefficients.")


def _classes(classes, count: int) -> tuple[int, ...]:
  found = tuple(np.atleast_1d(np.asarray(classes)).tolist())
  for one in found:
    if not isinstance(one, int) or not 0 <= one < count:
      raise ValueError(f"classes must lie in 0..{count - 1}, got {one}.")
  if not found:
    raise ValueError("classes must name at least one class.")
  return found


def _published(chosen, objective, tv_weight, annealing):
  """Rotation and scaling alone; what contradicts it is refused."""
  for name, value, wanted in (
    ("objective", objective, "logit"),
    ("tv_weight", tv_weight, 0.0),
    ("annealing", annealing, 0.0),
  ):
    if value is not None and value != wanted:
      raise ValueError(
        f"{name} must be {wanted} with fidelity='published', got {value!r}."
      )
  for name, transform in chosen.items():
    if transform.kind != "image":
      raise ValueError(
        f"transforms must be those of images with fidelity='published', got "
        f"{transform.kind} for {name!r}."
      )
  return {n: t.replace(jitter=0.0) for n, t in chosen.items()}, "logit"


def _spaces(view, mode, parameterization, value_range, reference, init_std):
  if not isinstance(reference, Mapping):
    reference = dict.fromkeys(view.names, reference)
  bounded = parameterization != "unbounded"
  if not isinstance(value_range, Mapping):
    value_range = dict.fromkeys(view.names, value_range)
  found = {}
  for name in view.names:
    shape = view.shape(name)
    if parameterization == "fourier" and len(shape) < 2:
      raise ValueError(
        f"parameterization must be 'pixels' for {name!r} of shape {shape}: "
        "Fourier coefficients are of images."
      )
    low = high = None
    if bounded:
      if value_range.get(name) is None:
        raise ValueError(
          f"value_range must name {name!r}, unless parameterization is "
          "'unbounded'."
        )
      low, high = (_like(v, shape, "value_range") for v in value_range[name])
      if not np.all(low <= high) or not np.any(low < high):
        raise ValueError(f"value_range must be (low, high) for {name!r}.")
    center = _like(reference.get(name, 0.0), shape, "reference")
    kind = parameterization
    if mode == "in_place" and bounded:
      kind = "projected"
    found[name] = parameterizations.Parameterization(
      name=kind,
      shape=shape,
      low=low,
      high=high,
      reference=center,
      init_std=float(init_std),
    )
  return found


def _like(value, shape, argument: str) -> np.ndarray:
  """Finite float32 that broadcasts against one input, of its rank."""
  value = np.asarray(value)
  if np.issubdtype(value.dtype, np.number):
    value = value.astype(np.float32)
    fits = value.ndim <= len(shape) and all(
      mine in (1, whole) for mine, whole in zip(value.shape[::-1], shape[::-1])
    )
    if fits and np.all(np.isfinite(value)):
      return value.reshape((1,) * (len(shape) - value.ndim) + value.shape)
  raise ValueError(
    f"{argument} must be finite numbers that broadcast against one input of "
    f"shape {shape}."
  )


def _divisor(scale, items, view, others) -> Any:
  if not isinstance(scale, str):
    _validate.positive(objective_scale=scale)
    return jnp.asarray(scale, jnp.float32)
  _validate.one_of((AUTO,), objective_scale=scale)
  if items is None:
    raise ValueError("objective_scale='auto' needs items with labels.")
  rest = {m: x for m, x in items["inputs"].items() if m not in view.names}
  alone = isinstance(others, str)
  if isinstance(view.function, Model):
    present = dict(items["present"])
    if alone:
      present |= {m: np.zeros(len(items["label"]), bool) for m in rest}
    outputs = view.function.apply(
      view.params, view.state, items["inputs"], present
    )[0]
    logits = outputs.logits
  else:
    logits = view.function(view.params, items["inputs"])
  mean = jnp.mean(
    objectives.objective("margin", logits, jnp.asarray(items["label"]))
  )
  # Of a network that does not know their classes it says nothing.
  return jnp.where(mean > 0, mean, 1.0)


def _of_mode(program) -> dict:
  if program.in_place:
    return {"step_size": program.step_size, "every": program.every}
  return {
    "learning_rate": program.step_size,
    "num_transforms": program.num_transforms,
  }


def _told(others) -> Any:
  if isinstance(others, str):
    return others
  given = others.get("inputs", others)
  return {name: list(np.shape(value)) for name, value in given.items()}


def _plain_transforms(test) -> Any:
  if isinstance(test, Mapping):
    return {name: one.settings() for name, one in test.items()}
  return test.settings()
