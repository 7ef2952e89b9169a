"""Penalties of how far wrong logits are from each other, item by item."""

import functools
import math
from collections.abc import Sequence

import jax

from robust_mm import _validate
from robust_mm.losses import wrong
from robust_mm.losses.penalties import REDUCTIONS
from robust_mm.losses.penalties import Penalty
from robust_mm.losses.penalties import total

KINDS = ("drsl1", "drsl2")


def wrong_class_dispersion(
  *, space: str = "logit", center: str = "mean", reduction: str = "mean"
) -> Penalty:
  r"""DRSL: how far the wrong logits are from their mean.

  .. math:: \frac1N \sum_i \frac{D_i}{C - 1}, \qquad
            D_i = \sum_{j \ne y_i} (z_{ij} - \mu_i)^2

  - The gradient of D is :math:`2 (z_j - \mu)` at wrong logits and 0 at the
    label's; a shift of all logits changes nothing.
  - Its minimum, all wrong logits alike, is that of label smoothing as well.
  - It grows with the square of the logits: for large vocabularies or logits
    take :func:`complement_kl`, which is :math:`D / (2 (C - 1))` for small ones.

  Args:
    space: ``"logit"``; or ``"prob"``, probabilities around :math:`(1 - p_y) /
      (C - 1)`, which vanishes on confident items.
    center: ``"mean"``; or ``"published"``: the sum of wrong logits divided by
      C in place of C - 1, which pulls :math:`\mu` towards 0 by a further
      :math:`(C - 1) \mu^2 / C^2`.
    reduction: ``"mean"`` over items, of :math:`D / (C - 1)`; or
      ``"sum_as_published"``, :math:`\sum_i D_i`, whose strength grows with the
      batch. See :func:`mean_weight`.

  Raises:
    ValueError: an unknown word; fewer than three classes, once called.

  >>> penalty = wrong_class_dispersion()
  >>> float(penalty(jnp.array([[5.0, 1.0, 3.0]]), jnp.array([0])))
  1.0
  """
  if space == "log_prob":
    raise ValueError(
      "space must be 'logit' or 'prob': a log-softmax shifts all logits of an "
      "item alike, so that 'log_prob' would be 'logit' by another name."
    )
  _validate.one_of(("logit", "prob"), space=space)
  _validate.one_of(("mean", "published"), center=center)
  _validate.one_of(REDUCTIONS, reduction=reduction)
  if space == "prob" and center != "mean":
    raise ValueError("center must be 'mean' where space is 'prob'.")
  summed = reduction != "mean"

  def items(logits, label):
    if space == "prob":
      logits = jax.nn.softmax(logits, axis=-1)
    values = wrong.everything(logits, label)
    centre = None
    if center == "published":
      centre = values.mean() * (values.number / logits.shape[-1])
    found = values.dispersion(centre)
    return found if summed else found / values.number

  return Penalty(
    name="wrong_class_dispersion",
    options={"space": space, "center": center, "reduction": reduction},
    items=items,
    combine=total,
    check=functools.partial(wrong.need_spread, "wrong_class_dispersion"),
    summed=summed,
    # Of probabilities nothing was published.
    published=None if space == "prob" else _released_dispersion,
  )


def _released_dispersion() -> Penalty:
  return wrong_class_dispersion(
    center="published", reduction="sum_as_published"
  )


def complement_kl() -> Penalty:
  r"""How far the wrong classes are from uniform among themselves.

  .. math:: KL(u \,\|\, q_i) = \log \sum_{j \ne y} e^{z_j} - \mu_i - \log(C - 1)

  The gradient :math:`q_j - 1 / (C - 1)` never exceeds 1: safe for 50,000
  classes and for logits of a million.
  """

  def items(logits, label):
    mean = jax.lax.stop_gradient(wrong.everything(logits, label).mean())
    # Of what is left of a million float32 keeps nothing: centred first.
    values = wrong.everything(logits - mean[..., None], label)
    spread = values.logsumexp() - values.mean()
    return spread - math.log(logits.shape[-1] - 1)

  return Penalty(
    name="complement_kl",
    options={},
    items=items,
    combine=total,
    check=functools.partial(wrong.need_spread, "complement_kl"),
  )


def sorted_slice_dispersion(*, top_n: int, kind: str = "drsl1") -> Penalty:
  """Dispersion of ranks 2 to ``top_n``, for ``fidelity="published"`` alone.

  Two variants of the release that drop the largest logit, hoping that it is
  the label's.

  Args:
    top_n: of the sorted logits, ``z[-top_n:-1]``: ``top_n - 1`` values.
    kind: ``"drsl1"``, of all logits; ``"drsl2"``, of the wrong ones, where the
      largest wrong logit, the one that matters, is what is dropped.

  Raises:
    ValueError: ``top_n`` below 3 (fewer than two values) or, once called,
      beyond what there is; an unknown kind.
  """
  _validate.at_least(3, top_n=top_n)
  _validate.one_of(KINDS, kind=kind)
  window = (1, int(top_n))

  def check(num_classes, word="classes"):
    there = num_classes if kind == "drsl1" else num_classes - 1
    if top_n > there:
      raise ValueError(
        f"top_n must be at most {there} here (kind {kind!r}, {num_classes} "
        f"{word}), got {top_n}."
      )

  def items(logits, label):
    if kind == "drsl1":
      return wrong.largest(logits, window).dispersion()
    return wrong.ranked(logits, label, window).dispersion()

  def make():
    return Penalty(
      name="sorted_slice_dispersion",
      options={"top_n": int(top_n), "kind": kind},
      items=items,
      combine=total,
      check=check,
      window=window if kind == "drsl2" else None,
      summed=True,
      published=make,
      fidelity_only=True,
    )

  return make()


def topk_dispersion(*, window: Sequence[int] = wrong.FIRST_FOUR) -> Penalty:
  """The variance of a window of wrong logits, within every item.

  :func:`wrong_class_dispersion` restricted to the window, and equal to it for
  ``(0, C - 1)``.

  Raises:
    ValueError: a window of fewer than two ranks; fewer than three classes, or
      a window beyond the wrong ones, once called.
  """
  window = wrong.check_window(window, at_least=2)

  def check(num_classes, word="classes"):
    wrong.need_spread("topk_dispersion", num_classes, word)
    wrong.check_fits(window, num_classes, word)

  def items(logits, label):
    values = wrong.ranked(logits, label, window)
    return values.dispersion() / values.number

  return Penalty(
    name="topk_dispersion",
    options={"window": window},
    items=items,
    combine=total,
    check=check,
    window=window,
  )
