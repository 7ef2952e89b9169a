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
from robust_mm.visualization import ascent
from robust_mm.visualization import checks
from robust_mm.visualization import metrics
from robust_mm.visualization import objectives
from robust_mm.visualization import transforms as transforms_lib
from robust_mm.visualization import views

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
      finite, where the input stayed as it was before; ``num_steps`` where it is
      that of what the last step made; -1 for never.
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
  reference: Any = None,
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

  >>> weights = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
  >>> def score(params, inputs):
  ...   return jnp.einsum("bhwc,khwc->bk", inputs["image"], params)
  >>> found = class_visualization(
  ...   score, weights, "image", [2], key=jax.random.key(1), shape=(8, 8, 1),
  ...   transforms=transforms_lib.image(jitter=0.5), num_steps=30,
  ... )
  >>> found.inputs.shape
  (1, 3, 8, 8, 1)
  >>> bool(found.probability[..., -1].min() > found.probability[..., 0].max())
  True

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
    reference: what the l2 term pulls to, the start, and what lies outside a
      transformed input; likewise. 0 by default, or what of the range is nearest
      to it; 0.5 is better for photos.
    num_steps: of the ascent.
    num_transforms: draws in every step (expectation).
    learning_rate: of Adam (expectation).
    step_size: mean absolute change of a step, in units of the range (in place).
    every: steps between two transformations (in place).
    tv_weight: 10 by default; 1 with ``objective_scale="auto"``.
    l2_weight: 5 by default; 0.5 with ``"auto"``. For photos of some 224 pixels
      1 is better, with 512 steps of 8 draws: nothing here tells a photo.
    annealing: share of the steps, at the end, over which the transformations
      shrink to none; 0.2 by default.
    blur_every: steps between two Gaussian blurs of one pixel in the first half;
      0 for none.
    init_std: of the start, in pixels or their logits.
    objective_scale: the objective is divided by it; ``"auto"``: by the mean
      margin of ``items``, which makes one set of weights fit networks with
      logits of any size; by 1 where that is not positive.
    items: training items with labels, for ``"auto"``.
    held_out: ``{name: transform}`` to test with, or ``{name: {m: transform}}``
      of several modalities; ``transforms.held_out`` by default, with the
      reference outside: none of an identity that does not say of what.
    num_held_out: draws of each.
    seeds: pictures of every class.
    fidelity: ``"published"`` is our reconstruction of what was published:
      logit objective, rotation and scaling only, no annealing, no total
      variation, no blur, no Fourier coefficients, no automatic scale.
    state: of a model.

  Raises:
    ValueError: a bad argument, naming it.

  References:
    `Li et al. (2021) <https://arxiv.org/abs/2106.09982>`_, in our reading.
  """
  given = dict(locals())
  checks.check_numbers(given)
  view = views.make(
    apply_fn, params, modality, state=state, shape=shape, others=others
  )
  classes = views.classes(view, classes)
  chosen = metrics.as_mapping(transforms, view.names, "transforms")
  for name in view.names:
    chosen[name].check(view.shape(name), name=name)
  if fidelity == "published":
    chosen = checks.published(chosen, given)
    given |= {"objective": "logit", "tv_weight": 0.0, "annealing": 0.0}
  given["objective"] = given["objective"] or "margin"
  _validate.one_of(objectives.OBJECTIVES, objective=given["objective"])
  spaces = checks.spaces(view, chosen, given)
  if held_out is None:
    held_out = _held_out(chosen, view, spaces)
  divisor = checks.divisor(objective_scale, items, view, others)
  program = _program(given, chosen, view, spaces)
  # The key of the tests is never that of a step.
  loop_key, test_key = jax.random.split(key)
  lead = (len(classes), seeds)
  label = jnp.repeat(jnp.asarray(classes, jnp.int32), seeds)
  keys = jax.vmap(
    lambda c, s: jax.random.fold_in(jax.random.fold_in(loop_key, c), s)
  )(label, jnp.tile(jnp.arange(seeds), len(classes)))
  x, value, probability, bad_step = ascent.run(
    program, view, spaces, label, keys, divisor
  )
  inputs = {n: jnp.reshape(v, (*lead, *v.shape[1:])) for n, v in x.items()}
  measured = apply_fn, params, inputs, classes
  asked = {"modality": view.names, "state": state, "others": others}
  return Visualization(
    classes=classes,
    inputs=inputs if len(view.names) > 1 else inputs[view.names[0]],
    objective=jnp.reshape(value, (*lead, -1)),
    probability=jnp.reshape(probability, (*lead, -1)),
    first_bad_step=jnp.reshape(bad_step, lead),
    transforms_accuracy={
      name: metrics.transformation_accuracy(
        *measured,
        test,
        key=jax.random.fold_in(test_key, i),
        num=num_held_out,
        **asked,
      )
      for i, (name, test) in enumerate(held_out.items())
    },
    margins=metrics.modality_margins(*measured, **asked),
    settings={
      "modality": list(view.names),
      "classes": list(classes),
      "objective_divisor": float(divisor),
      **_settings(given, program, held_out),
    },
  )


def _held_out(chosen, view, spaces) -> dict:
  """Of one border for all modes and controls: the reference value.

  Of several modalities at once, where something is known of each.
  """
  tests = {
    name: transforms_lib.held_out(
      chosen[name], view.shape(name), fill=_outside(spaces[name])
    )
    for name in view.names
  }
  if len(tests) == 1:
    return tests[view.names[0]]
  known = set.intersection(*map(set, tests.values()))
  return {
    what: {name: test[what] for name, test in tests.items()}
    for what in ("near", "far")
    if what in known
  }


def _outside(space) -> float:
  return float(np.mean(space.reference))


def _program(given, chosen, view, spaces) -> ascent.Program:
  in_place = given["mode"] == "in_place"
  if not in_place:
    chosen = {n: t.filled(_outside(spaces[n])) for n, t in chosen.items()}
  # Copies of what never changes would be the same.
  still = all(transform.is_still() for transform in chosen.values())
  usual = USUAL_MARGIN if given["objective_scale"] == checks.AUTO else 1.0
  weights = {"tv_weight": TV_WEIGHT / usual, "l2_weight": L2_WEIGHT / usual}
  weights["annealing"] = ANNEALING
  weights |= {n: given[n] for n in weights if given[n] is not None}
  return ascent.Program(
    in_place=in_place,
    objective=given["objective"],
    transforms=tuple(sorted(chosen.items())),
    smooth=tuple(
      (name, chosen[name].smooth_axes(view.shape(name))) for name in view.names
    ),
    num_steps=given["num_steps"],
    num_transforms=1 if still else given["num_transforms"],
    step_size=given["step_size" if in_place else "learning_rate"],
    every=given["every"],
    blur_every=given["blur_every"],
    **weights,
  )


def _settings(given, program, held_out) -> dict:
  """What was asked and taken for granted, as plain values."""
  told = ("fidelity", "seeds", "mode", "objective", "parameterization")
  return {
    **{name: given[name] for name in told},
    "reconstruction": given["fidelity"] == "published",
    "others": _told(given["others"]),
    "transforms": {name: t.settings() for name, t in program.transforms},
    "held_out": {
      name: _plain_transforms(test) for name, test in held_out.items()
    },
    "num_held_out": given["num_held_out"],
    "num_steps": program.num_steps,
    **_of_mode(program),
    "tv_weight": program.tv_weight,
    "l2_weight": program.l2_weight,
    "annealing": program.annealing,
    "blur_every": program.blur_every,
    "init_std": given["init_std"],
  }


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
