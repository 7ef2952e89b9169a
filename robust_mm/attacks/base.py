"""What every attack shares: the value, its region, objective, bookkeeping."""

import copy
import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import _convolutions
from robust_mm.attacks import balls
from robust_mm.attacks import budgets
from robust_mm.attacks import losses


class Evaluation(NamedTuple):
  """A perturbation's ``loss`` [b] and whether the label has lost, [b]."""

  loss: Any
  broken: Any


def select(flag: Any, yes: Any, no: Any) -> Any:
  """Two trees of arrays ``[b, ...]``, example by example; ``flag`` is [b]."""
  return jax.tree.map(lambda a, b: balls.choose(flag, a, b), yes, no)


class Best(NamedTuple):
  """The best perturbation so far, example by example; a loop's carry."""

  delta: Any
  loss: Any
  broken: Any

  def updated(self, delta: Mapping, evaluation: Evaluation) -> "Best":
    """``delta`` where it is better: broken first, then the larger loss.

    A NaN loss is never larger.
    """
    same = evaluation.broken == self.broken
    better = (evaluation.broken & ~self.broken) | (
      same & (evaluation.loss > self.loss)
    )
    found = select(better, (delta, evaluation.loss), (self.delta, self.loss))
    return Best(*found, self.broken | evaluation.broken)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
  """What a search makes large, as a function of the perturbation.

  Attributes:
    region: where the perturbation may go.
    logits_fn: ``{m: [b, ...]} -> [b, k]``, over the modalities of the region.
    loss: one of ``attacks.losses``.
    label: ``[b]``.
  """

  region: balls.Region
  logits_fn: Callable[..., Any]
  loss: Callable[..., Any]
  label: Any

  def __call__(self, delta: Mapping, target: Any = None) -> Evaluation:
    """The loss of a perturbation; one forward pass."""
    _, evaluation = _convolutions.canonical(
      self._evaluate, self.region.inputs(delta), target
    )
    return jax.lax.stop_gradient(evaluation)

  def gradient(
    self, delta: Mapping, target: Any = None
  ) -> tuple[Evaluation, dict[str, Any]]:
    """The same, and the gradient in the inputs; one forward and backward.

    The projection on the valid range is outside the gradient: at its ends the
    slope of the model is seen, not that of a clip.
    """
    grad, evaluation = _convolutions.canonical(
      jax.grad(self._evaluate, has_aux=True), self.region.inputs(delta), target
    )
    return jax.lax.stop_gradient((evaluation, grad))

  def returned(self, delta: Mapping, target: Any = None) -> Evaluation:
    """The loss of what the caller will get, rounded and inside the ball."""
    _, evaluation = _convolutions.canonical(
      self._evaluate, self.region.finished(delta), target
    )
    return jax.lax.stop_gradient(evaluation)

  def rivals(self, number: int) -> Any:
    """Wrong classes, the best by clean logit first: ``int[number, b]``.

    With fewer than ``number`` of them they come again from the first.
    """
    logits = jax.lax.stop_gradient(self.logits_fn(self.region.clean))
    num_classes = logits.shape[-1]
    label = jax.nn.one_hot(self.label, num_classes, dtype=bool)
    ranked = jnp.argsort(jnp.where(label, -jnp.inf, logits), descending=True)
    return jnp.transpose(ranked)[np.arange(number) % (num_classes - 1)]

  def nearest(self, number: int) -> Any:
    r"""Wrong classes, the nearest to first order first: ``int[number, b]``.

    By :math:`(z_y - z_j) / \|\nabla_x (z_y - z_j)\|` at the clean input, in
    the dual norm of the ball and its units; one backward pass a class. With
    fewer than ``number`` of them they come again from the first.
    """
    zeros = self.region.zeros()
    otherwise = jax.tree.map(jnp.zeros_like, zeros)

    def gap(inputs, target):
      value = losses.margin(self.logits_fn(inputs), self.label, target)
      return jnp.sum(value), value

    def distance(target):
      target = jnp.full_like(self.label, target)
      slope, value = jax.grad(gap, has_aux=True)(
        self.region.inputs(zeros), target
      )
      # How fast the best direction of size 1 raises that class.
      best = self.region.steepest(zeros, slope, otherwise)
      rate = sum(
        jnp.sum(jnp.reshape(slope[m] * best[m], (len(target), -1)), axis=1)
        for m in best
      )
      far = jnp.where(rate > 0, -value / jnp.where(rate > 0, rate, 1), jnp.inf)
      return jnp.where(self.label == target, jnp.inf, far)

    num_classes = self.num_rivals() + 1
    far = jax.lax.map(distance, jnp.arange(num_classes))
    own = self.label[None] == jnp.arange(num_classes)[:, None]
    # The label comes last, whatever else is out of reach.
    ranked = jnp.lexsort((far, own), axis=0)
    ranked = ranked[np.arange(number) % (num_classes - 1)]
    return jax.lax.stop_gradient(ranked).astype(self.label.dtype)

  def num_rivals(self) -> int:
    """How many wrong classes there are."""
    return jax.eval_shape(self.logits_fn, self.region.clean).shape[-1] - 1

  def nothing_found(self) -> Best:
    """Where the bookkeeping starts: no perturbation, nothing broken."""
    zeros = self.region.zeros()
    dtype = jax.eval_shape(self, zeros).loss.dtype
    # Like the label, for its sharding.
    return Best(
      zeros,
      jnp.full_like(self.label, -jnp.inf, dtype),
      jnp.zeros_like(self.label, bool),
    )

  def _evaluate(self, inputs, target):
    logits = self.logits_fn(inputs)
    loss = self.loss(logits, self.label, target)
    broken = jnp.argmax(logits, axis=-1) != self.label
    return jnp.sum(loss), Evaluation(loss, broken)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Attack:
  """An attack as a value; made by a factory such as :func:`attacks.pgd`.

  Attributes:
    name: of its factory.
    norm: ``"l2"`` or ``"linf"``.
    budget: a number, or ``{m: number}``.
    loss: the name of a loss in ``attacks.losses``.
    valid_range: None, ``(low, high)`` or ``{m: (low, high)}``.
    units: None or ``{m: number}``.
    options: what else the factory was given.
    search: ``search(key, objective) -> delta``, the algorithm.
    members: of an ensemble, ``{name: attack}`` in the order they are tried;
      empty for all others.
  """

  name: str
  norm: str
  budget: Any
  loss: Any
  valid_range: Any
  units: Any
  options: Mapping[str, Any]
  search: Callable[..., Any]
  members: Mapping[str, "Attack"] = dataclasses.field(default_factory=dict)

  @property
  def settings(self) -> dict[str, Any]:
    """The attack exactly, in values JSON can hold."""
    return {
      "name": self.name,
      "norm": self.norm,
      "budget": _plain(self.budget),
      "loss": self.loss,
      "valid_range": _plain(self.valid_range),
      "units": _plain(self.units),
      **copy.deepcopy(dict(self.options)),
    }

  def __call__(
    self,
    key: Any,
    logits_fn: Callable[..., Any],
    inputs: Mapping[str, Any],
    label: Any,
    *,
    present: Mapping[str, Any] | None = None,
    budget: Any = None,
  ) -> dict[str, Any]:
    r"""Adversarial inputs for one batch.

    Pure; works under ``jit``, ``vmap`` and on a batch sharded over devices. Not
    differentiated: no gradient flows through it. Call it under ``jit``: outside
    every call compiles anew.

    Formal guarantees:
      - The size of the perturbation is at most budget (1 + 1e-6), and every
        entry stays in the valid range; one that starts outside it moves back
        or not at all.
      - A modality with budget 0, an integer modality and an absent modality of
        an example come back with the same bits; where that needs no traced
        value to be known, as the same array object.

    Args:
      key: a JAX key.
      logits_fn: ``{m: [b, ...]} -> [b, k]``, evaluation mode: an example's
        logits must not depend on the others. See :func:`attacks.logits_fn`.
      inputs: ``{m: [b, ...]}``.
      label: int ``[b]``.
      present: ``{m: bool[b]}``; None, or a modality left out, means present.
      budget: replaces the factory's. A number is one joint ball over all float
        modalities, a mapping one ball for each modality it names. Numbers are
        scalars or ``[b]``, one per example, and may be traced, so that one
        compilation serves a whole list of radii; traced values that are
        negative or NaN count as 0.

    Returns:
      ``{m: [b, ...]}`` with the keys, shapes and dtypes of ``inputs``.

    Raises:
      ValueError: an unknown modality, a bad shape or label, a negative budget,
        a positive one for an integer modality.
    """
    region = budgets.region(
      inputs,
      self.budget if budget is None else budget,
      norm=self.norm,
      units=self.units,
      valid_range=self.valid_range,
      present=present,
    )
    if not region.clean:
      return dict(inputs)
    objective = Objective(
      region=region,
      logits_fn=_moving_only(logits_fn, inputs, region),
      loss=losses.get(self.loss),
      label=checked_label(label, logits_fn, inputs),
    )
    moved = region.finished(self.search(key, objective))
    changed = {
      m: balls.choose(region.radius[m] > 0, x, jnp.asarray(inputs[m]))
      for m, x in moved.items()
    }
    return {**inputs, **jax.lax.stop_gradient(changed)}


def make_attack(
  name: str,
  *,
  norm: Any,
  budget: Any,
  loss: str,
  valid_range: Any,
  units: Any,
  options: Mapping[str, Any],
  search: Callable[..., Any],
  members: Mapping[str, Attack] | None = None,
) -> Attack:
  """The value of a factory, once the arguments common to all are checked."""
  losses.get(loss)
  budgets.check_budget(budget)
  budgets.check_units(units)
  budgets.check_range(valid_range)
  return Attack(
    name=name,
    norm=budgets.norm_name(norm),
    budget=budget,
    loss=loss,
    valid_range=valid_range,
    units=units,
    options=options,
    search=search,
    members=members or {},
  )


def _moving_only(logits_fn, inputs, region):
  still = {m: x for m, x in inputs.items() if m not in region.clean}
  return lambda moving: logits_fn({**still, **moving})


def checked_label(label: Any, logits_fn: Callable, inputs: Mapping) -> Any:
  """The label as an array; ValueError where it is none of the classes."""
  logits = jax.eval_shape(logits_fn, dict(inputs))
  if logits.ndim != 2 or logits.shape[1] < 2:
    raise ValueError(
      "logits_fn must return logits [b, k] of at least two classes, got shape "
      f"{list(logits.shape)}."
    )
  if not isinstance(label, jax.Array):
    label = np.asarray(label)
  integer = jnp.issubdtype(label.dtype, jnp.integer)
  if not integer or label.shape != logits.shape[:1]:
    raise ValueError(
      f"label must be integer class indices [{logits.shape[0]}], got "
      f"{label.dtype}{list(label.shape)}."
    )
  if not isinstance(label, jax.core.Tracer):
    # NumPy, because under jit jax would trace the minimum of known values too.
    values = np.asarray(label)
    low, high = np.min(values, initial=0), np.max(values, initial=0)
    if low < 0 or high >= logits.shape[1]:
      raise ValueError(
        f"label must lie in 0..{logits.shape[1] - 1}, got {low}..{high}."
      )
  return jnp.asarray(label)


def _plain(value):
  if isinstance(value, Mapping):
    return {name: _plain(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if isinstance(value, jax.core.Tracer):
    return "traced"
  return value.tolist() if hasattr(value, "tolist") else value
