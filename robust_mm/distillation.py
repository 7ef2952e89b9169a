r"""Self-distillation across sets of modalities (MASD).

What a model says of the labelled modalities T is the target for what it says of
other sets S of the same example, on data that need no label:

.. math:: \lambda(t)\; \operatorname{mean}_{w_i = 1}\; \tau^2\,
          \mathrm{KL}\bigl(\operatorname{softmax}(g(x_i) / \tau)\,\|\,
          \operatorname{softmax}(f(x_{i, S_i}) / \tau)\bigr)

:func:`masd` is the term without :math:`\lambda`, which is :func:`ramp`; its
parts stand alone. The teacher's logits g carry no gradient. Where S contains T
the minimiser is the teacher itself, so that a set beyond T gains nothing unless
the teacher sees more (``teacher_subset="supersets"``); where it does not, the
minimiser is the mean of the teacher given :math:`x_S`, which may be better than
the teacher.

References:
  `McKinzie et al. (2023) <https://arxiv.org/abs/2304.04385>`_ give the idea;
  formula, item weights, ramp and teachers are this project's reading of it.
"""

from collections.abc import Callable
from collections.abc import Iterable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float

from robust_mm import _validate
from robust_mm import modalities
from robust_mm._types import Params
from robust_mm._types import Present

TASKS = ("single_label", "multi_label", "regression")
TEACHERS = ("self", "ema", "frozen")
TEACHER_SUBSETS = ("labelled", "supersets")

LogitsFn = Callable[[Params, Present], Array]


class Distillation(NamedTuple):
  """What :func:`masd` gives.

  Attributes:
    loss: the mean over the items that count, ``[]``; 0 where none does.
    divergence: ``[b]``, of every item, 0 where it does not count.
    weight: ``[b]``, 1 where an item counts.
    subset: ``{m: bool[b]}``, what the student saw.
  """

  loss: Any
  divergence: Any
  weight: Any
  subset: Any


def divergence(
  teacher: Float[Array, "*b k"],
  student: Float[Array, "..."],
  *,
  task: str = "single_label",
  temperature: float | Array = 1.0,
) -> Float[Array, "*b"]:
  r"""How far a student is from its teacher, per item.

  ============  ==============================================================
  single_label  :math:`\tau^2 \mathrm{KL}(\operatorname{softmax}(g / \tau) \|
                \operatorname{softmax}(f / \tau))`
  multi_label   :math:`\frac{\tau^2}{k} \sum_c \mathrm{KL}(\sigma(g_c / \tau)
                \| \sigma(f_c / \tau))`, of Bernoulli variables
  regression    :math:`\frac12 \sum_c (g_c - f_c)^2`; without temperature
  ============  ==============================================================

  The gradient with respect to f is :math:`\tau (\operatorname{softmax}(f /
  \tau) - \operatorname{softmax}(g / \tau))`, :math:`\frac{\tau}{k}(\sigma(f /
  \tau) - \sigma(g / \tau))` and f - g; for large :math:`\tau` the first one
  tends to that of :math:`\|\text{centred}(f - g)\|^2 / 2k`. No gradient reaches
  ``teacher``.

  Computed in float32 where logits are narrower, from differences of
  log-probabilities: finite for any finite logits, and a class to which the
  teacher gives no chance at all (-inf) adds 0.

  >>> apart = divergence(jnp.array([0.0, 0.0]), jnp.array([0.0, 1.0]))
  >>> round(float(apart), 4)
  0.1201

  Args:
    teacher: g, ``[*b, k]`` logits, or predicted numbers.
    student: f, of the same shape.
    task: one of :data:`TASKS`.
    temperature: :math:`\tau`.

  Returns:
    ``[*b]``; of a regression in squared units of the predictions.

  Raises:
    ValueError: naming ``task``, ``temperature`` unless it is positive, or
      ``teacher`` if shapes differ.
  """
  _validate.one_of(TASKS, task=task)
  _validate.positive(temperature=temperature)
  if teacher.shape != student.shape:
    raise ValueError(
      f"teacher must have the shape of student {student.shape}, got "
      f"{teacher.shape}."
    )
  wide = jnp.promote_types(jnp.float32, student.dtype)
  g = jax.lax.stop_gradient(teacher).astype(wide)
  f = student.astype(wide)
  if task == "regression":
    return jnp.sum(jnp.square(g - f), axis=-1) / 2
  g, f = g / temperature, f / temperature
  if task == "single_label":
    found = _relative(jax.nn.log_softmax(g), jax.nn.log_softmax(f))
    found = jnp.sum(found, axis=-1)
  else:
    found = _relative(jax.nn.log_sigmoid(g), jax.nn.log_sigmoid(f))
    found += _relative(jax.nn.log_sigmoid(-g), jax.nn.log_sigmoid(-f))
    found = jnp.mean(found, axis=-1)
  return temperature**2 * found


def choose_teacher(
  kind: str, params: Params, *, ema: Params = None, frozen: Params = None
) -> Params:
  """The teacher's parameters, cut off from every gradient.

  Args:
    kind: ``"self"``: the student's own, as they are; ``"ema"``: their moving
      average (``weights.moving_average``, usually with decay 0.999);
      ``"frozen"``: of a model that was fine-tuned before.
    params: the student's.
    ema: of that kind; keep it out of the differentiated arguments too.
    frozen: of that kind.

  Raises:
    ValueError: naming ``kind``, or the tree it needs if that is None.
  """
  _validate.one_of(TEACHERS, kind=kind)
  chosen = {"self": params, "ema": ema, "frozen": frozen}[kind]
  if chosen is None:
    raise ValueError(f"{kind} is None; the teacher {kind!r} needs parameters.")
  return jax.lax.stop_gradient(chosen)


def teacher_logits(
  logits_fn: LogitsFn,
  params: Params,
  present: Present,
  labelled: Iterable[str],
  *,
  subset: str = "labelled",
) -> Float[Array, "b k"]:
  r"""What a teacher says, without gradient.

  .. math:: g(x) = f(x_T), \qquad \text{or the mean of } f(x_{S'})
            \text{ over all } T \subseteq S' \subseteq \text{avail}(x)

  An example that lacks a part of T has the rest of it in the place of T. The
  mean is one of logits, and takes :math:`2^{n - |T|}` passes, one after the
  other.

  Args:
    logits_fn: ``logits_fn(params, present) -> [b, k]``, inputs closed over; it
      reads nothing of a modality that ``present`` denies.
    params: the teacher's, see :func:`choose_teacher`.
    present: ``{m: bool[b]}``, what every example has.
    labelled: T.
    subset: ``"labelled"`` or ``"supersets"``.

  Returns:
    ``[b, k]``; without meaning where an example has nothing of T
    (:func:`item_weights` is 0 there).

  Raises:
    ValueError: naming ``subset``, or ``labelled`` if it is empty or unknown.
  """
  _validate.one_of(TEACHER_SUBSETS, subset=subset)
  labelled, ordered = _labelled(labelled, present)
  params = jax.lax.stop_gradient(params)
  if subset == "labelled":
    return jax.lax.stop_gradient(logits_fn(params, _within(present, labelled)))
  others = [name for name in ordered if name not in labelled]
  extras = [(), *modalities.subsets(others)]
  table = np.array([[m in {*labelled, *e} for m in ordered] for e in extras])
  shape = jax.eval_shape(logits_fn, params, dict(present))
  wide = jnp.promote_types(jnp.float32, shape.dtype)

  def add(total, wanted):
    seen = {m: present[m] & wanted[i] for i, m in enumerate(ordered)}
    return total + logits_fn(params, seen).astype(wide), None

  # Each modality that an example lacks repeats all of its sets once more, so
  # the mean over all of them is the one over those it has.
  total, _ = jax.lax.scan(add, jnp.zeros(shape.shape, wide), jnp.asarray(table))
  return jax.lax.stop_gradient((total / len(extras)).astype(shape.dtype))


def item_weights(
  present: Present, labelled: Iterable[str], subset: Present
) -> Float[Array, " b"]:
  """1 where an item has a teacher and a student, else 0.

  Args:
    present: ``{m: bool[b]}``, what every example has.
    labelled: T; the teacher needs one of them.
    subset: ``{m: bool[b]}``, what the student sees:
      ``modalities.sample_subsets``, empty where nothing was allowed.

  Raises:
    ValueError: naming ``labelled`` if it is empty or unknown.
  """
  labelled, _ = _labelled(labelled, present)
  taught = jnp.any(
    jnp.stack([jnp.asarray(present[name]) for name in labelled]), axis=0
  )
  asked = jnp.any(modalities.stack(subset), axis=0)
  return (taught & asked).astype(jnp.float32)


def ramp(
  step: Any, num_steps: int, *, weight: float = 1.0, fraction: float = 0.1
) -> Float[Array, ""]:
  r"""The weight :math:`\lambda` of a term: linear from 0, then constant.

  An untrained teacher is not distilled.

  >>> [round(float(ramp(t, 100, weight=2.0)), 4) for t in (0, 5, 10, 99)]
  [0.0, 1.0, 2.0, 2.0]

  Args:
    step: updates done, may be traced.
    num_steps: of the whole training.
    weight: :math:`\lambda` in the end.
    fraction: of ``num_steps`` until then; 0 for no ramp (as published).

  Raises:
    ValueError: naming ``num_steps``, ``weight`` or ``fraction``.
  """
  _validate.at_least(1, num_steps=num_steps)
  _validate.non_negative(weight=weight)
  _validate.in_unit_interval(fraction=fraction)
  done = jnp.asarray(step, jnp.float32)
  length = fraction * num_steps
  share = jnp.minimum(done / length, 1) if length else jnp.ones_like(done)
  return weight * share


def masd(
  logits_fn: LogitsFn,
  params: Params,
  present: Present,
  labelled: Iterable[str],
  *,
  key: Any = None,
  subset: Present | None = None,
  teacher: Params = None,
  teacher_fn: LogitsFn | None = None,
  teacher_subset: str = "labelled",
  task: str = "single_label",
  temperature: float | Array = 1.0,
  distribution: str = "uniform",
  include_labelled: bool = False,
) -> Distillation:
  r"""The self-distillation term of a batch that needs no labels.

  Draws a set S for every example, lets the teacher see T and the student S, and
  takes the mean of :func:`divergence` over the items that count
  (:func:`item_weights`): one that has nothing of T, or no set other than T,
  changes neither the sum nor the mean.

  At S = T with a teacher of the same parameters the value and its gradient are
  0 up to rounding; use it without dropout, or give ``teacher_fn`` its own key.

  Args:
    logits_fn: ``logits_fn(params, present) -> [b, k]``, inputs closed over.
    params: the student's.
    present: ``{m: bool[b]}``, what every example has.
    labelled: T, static.
    key: of the draw; may be None where ``subset`` is given.
    subset: ``{m: bool[b]}``, S instead of a draw.
    teacher: parameters of :func:`choose_teacher`; None for the student's own.
    teacher_fn: in the place of ``logits_fn`` for the teacher.
    teacher_subset: ``"labelled"`` (as published) or ``"supersets"``.
    task: one of :data:`TASKS`.
    temperature: :math:`\tau`.
    distribution: of S, see ``modalities.sample_subsets``.
    include_labelled: lets S be T.

  Raises:
    ValueError: naming the argument, also ``key`` if that and ``subset`` are
      None, or ``subset`` if it names other modalities than ``present``.
  """
  labelled, ordered = _labelled(labelled, present)
  present = {name: jnp.asarray(present[name]) for name in ordered}
  if subset is None:
    if key is None:
      raise ValueError("key is None; masd needs it to draw subsets.")
    subset = modalities.sample_subsets(
      key, present, labelled, distribution, include_labelled=include_labelled
    )
  elif modalities.names(subset) != ordered:
    raise ValueError(
      f"subset must be of the modalities {', '.join(ordered)}, got "
      f"{', '.join(modalities.names(subset))}."
    )
  seen = {name: present[name] & subset[name] for name in ordered}
  target = teacher_logits(
    teacher_fn or logits_fn,
    params if teacher is None else teacher,
    present,
    labelled,
    subset=teacher_subset,
  )
  weight = item_weights(present, labelled, seen)
  student = logits_fn(params, seen)
  # Equal where an item does not count, so that not even NaN gets through.
  counts = (weight > 0)[:, None]
  target, student = (jnp.where(counts, x, 0) for x in (target, student))
  found = divergence(target, student, task=task, temperature=temperature)
  loss = jnp.sum(found) / jnp.maximum(jnp.sum(weight), 1)
  return Distillation(loss, found, weight, seen)


def _relative(log_p: Array, log_q: Array) -> Array:
  """``p (log p - log q)``, 0 where p is."""
  p = jnp.exp(log_p)
  some = p > 0
  # Selected before and after: 0 * inf must reach neither value nor gradient.
  apart = jnp.where(some, log_p, 0) - jnp.where(some, log_q, 0)
  return p * apart


def _within(present: Present, subset: tuple[str, ...]) -> dict:
  return {
    name: jnp.asarray(flag) & (name in subset) for name, flag in present.items()
  }


def _labelled(labelled, present) -> tuple[tuple[str, ...], tuple[str, ...]]:
  ordered = modalities.names(present)
  labelled = modalities.as_subset(labelled, argument="labelled")
  _validate.known(ordered, labelled=labelled)
  return labelled, ordered
