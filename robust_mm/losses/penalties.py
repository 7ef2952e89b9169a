r"""Penalties of the logits of wrong classes, as values.

Symbols: :math:`z` the logits of an item with label :math:`y` and :math:`C`
classes, :math:`n` the :math:`C - 1` wrong ones, :math:`\mu` their mean,
:math:`q = softmax(n)`, :math:`m` the mean over a window of ranks (the *level*).

What they are and what they are not: a flat set of wrong logits lifts the
smallest margin for a given mean, and says nothing of how fast logits move with
the input. It also makes cross-entropy and the logit ratio poor guides for an
attacker. Judge a model that was trained with one by
``evaluation.masking_report(thorough=True)``.

References:
  `Wang et al. (2023) <https://arxiv.org/abs/2303.12363>`_ (DRSL);
  `Wang et al. (2024) <https://arxiv.org/abs/2402.03627>`_ (PRSL).
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from robust_mm import margins

REDUCTIONS = ("mean", "sum_as_published")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Penalty:
  """A number for a batch of items, from their logits and labels.

  Its ``repr`` is the call that made it.

  Attributes:
    name: of its factory.
    options: what the factory was given.
    items: ``items(logits [n, k], label [n]) -> [n]``, in float32 or better.
    combine: ``combine(items [n], weights [n]) -> scalar``; weights sum to 1 (a
      mean), or are all 1 with ``summed``.
    check: ``check(num_classes, word="classes")``; ValueError where there are
      too few, naming them by the word.
    needs_label: False of those that soft labels have, too.
    window: the ranks it looks at, or None.
    parts: equal parts of a batch that are compared each for itself.
    summed: over items, as in the release, in place of the mean.
    published: the penalty as the release has it, or None where it has none.
    fidelity_only: whether nothing but the published mode offers it.
  """

  name: str
  options: Mapping[str, Any]
  items: Callable[..., Any]
  combine: Callable[..., Any]
  check: Callable[..., None]
  needs_label: bool = True
  window: tuple[int, int] | None = None
  parts: int = 1
  summed: bool = False
  published: Callable[[], "Penalty"] | None = None
  fidelity_only: bool = False

  def __repr__(self) -> str:
    given = ", ".join(f"{name}={x!r}" for name, x in self.options.items())
    return f"{self.name}({given})"

  def __call__(self, logits: Array, label=None, weights=None) -> Array:
    """The penalty of items ``[n, k]``.

    Args:
      logits: ``[n, k]``.
      label: int ``[n]``; None where ``needs_label`` is False.
      weights: ``[n]``, at least 0, how much every item counts; None for all
        alike. What items of weight 0 hold, NaN included, is not looked at.

    Returns:
      A scalar; 0 where no item counts.

    Raises:
      ValueError: too few classes, or a bad label.
    """
    self.check(logits.shape[-1])
    if self.needs_label:
      margins.check_label(label, logits.shape[-1], logits.shape[:-1])
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    logits = logits.astype(dtype)
    if weights is None:
      weights = jnp.ones(logits.shape[:-1], dtype)
    weights = jnp.asarray(weights, dtype)
    counted = weights > 0
    logits = jnp.where(counted[..., None], logits, jnp.zeros_like(logits))
    if not self.summed:
      total = jnp.sum(weights)
      weights = weights / jnp.where(total > 0, total, 1)
    return self.combine(self.items(logits, label), weights)


def label_smoothing() -> Penalty:
  r""":math:`-\frac1C \sum_j \log p_j`, a control.

  With weight w the minimiser is that of labels smoothed by :math:`w / (1 +
  w)`.
  """
  return _control(
    "label_smoothing",
    lambda logits: -jnp.mean(jax.nn.log_softmax(logits, axis=-1), axis=-1),
    needs_label=True,
  )


def confidence_penalty() -> Penalty:
  r"""Minus the entropy, :math:`\sum_j p_j \log p_j`, a control."""

  def negative_entropy(logits):
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

  return _control("confidence_penalty", negative_entropy)


def logit_norm() -> Penalty:
  r""":math:`\|z\|^2 / C`, a control."""
  return _control(
    "logit_norm", lambda logits: jnp.mean(jnp.square(logits), axis=-1)
  )


def _control(name: str, each: Callable, *, needs_label: bool = False):
  def items(logits, label):
    del label
    return each(logits)

  return Penalty(
    name=name,
    options={},
    items=items,
    combine=total,
    check=lambda number, word="classes": None,
    needs_label=needs_label,
  )


def total(items: Array, weights: Array) -> Array:
  zero = jnp.zeros_like(items)
  return jnp.sum(weights * jnp.where(weights > 0, items, zero))
