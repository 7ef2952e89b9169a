r"""Cross-entropy with a penalty of the wrong logits."""

import numbers
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from robust_mm import _validate
from robust_mm import margins
from robust_mm import modalities
from robust_mm.losses import entropies
from robust_mm.losses import levels
from robust_mm.losses import wrong
from robust_mm.losses.penalties import Penalty
from robust_mm.losses.penalties import total

FIDELITIES = ("published",)


def restrained_softmax(
  penalty: Penalty, weight: float | Array, *, fidelity: str | None = None
) -> Callable[..., tuple[Array, dict[str, Array]]]:
  r"""Cross-entropy plus ``weight`` times a penalty of the wrong logits.

  ``loss_fn(logits, labels, valid=None, *, valid_weights=None) -> (loss, aux)``:

  - ``logits`` [b, k], or [b, t, k] of tokens, in which an item is a token and
    the labels are the shifted targets;
  - ``labels`` int [b] or [b, t]; or soft ones [b, k], which ``logit_norm`` and
    ``confidence_penalty`` alone take;
  - ``valid`` bool, of the shape of int labels: False is padding. What is there,
    NaN and infinity included, is not looked at; labels may be anything;
  - ``valid_weights``, of that shape: how much each item counts in all means
    (:func:`weights_per_example`); one of weight 0 is as padding;
  - ``aux``: scalars ``ce``, ``penalty`` (not yet weighted), ``level_spread``
    (the deviation between items of the mean log-probability of the penalty's
    window of wrong classes, of the first four where it has none),
    ``wrong_dispersion`` (the mean of :math:`D / (C - 1)`), ``margin_mean``,
    ``logit_norm`` (the mean of :math:`\|z\|^2 / C`) and ``num_valid``; of soft
    labels those that need no label.

  All means are over valid items; under ``jit`` on a sharded batch over those of
  all devices. Under ``jit`` a batch without any has loss 0, and where logits
  are infinite or a label is no class the loss is NaN; logits of bfloat16 are
  cast to float32 first. NaN is passed on.

  Args:
    penalty: one of this module's.
    weight: at least 0.
    fidelity: None; or ``"published"``: the penalty as the release has it (of
      its window, everything else replaced: logits, the centre of D divided by
      C, sums over items, N log N kept), and padding counted in all means, so
      that its labels must be classes. ``valid_weights`` alone leave items out.

  Raises:
    ValueError: a bad weight or fidelity; a penalty that the release does not
      have, or only the release; from ``loss_fn`` bad shapes or labels, too few
      classes for the window, no valid item.

  >>> loss_fn = restrained_softmax(wrong_class_dispersion(), 0.5)
  >>> loss, aux = loss_fn(jnp.array([[2.0, 1.0, 3.0]]), jnp.array([0]))
  >>> round(float(loss - aux["ce"]), 6), float(aux["penalty"])
  (0.5, 1.0)
  """
  _check_weight(weight)
  published = fidelity is not None
  penalty = _meant(penalty, fidelity)

  def loss_fn(logits, labels, valid=None, *, valid_weights=None):
    _check_logits(logits, penalty.parts)
    soft = _is_soft(logits, labels)
    if soft and penalty.needs_label:
      raise ValueError(
        f"labels must be integer classes for the penalty {penalty.name!r}; "
        f"soft labels go with logit_norm and confidence_penalty."
      )
    logits = _float32(logits)
    if published:  # padding counts
      valid = None
    weights = _weights(logits, labels, valid, valid_weights, soft)
    logits, labels, weights = _flat(logits, labels, weights, soft=soft)
    counted = weights > 0
    # Selected before anything is computed: nothing of padding comes back.
    logits = jnp.where(counted[:, None], logits, jnp.zeros_like(logits))
    logits = wrong.finite_or_nan(logits)
    if not soft:
      labels = jnp.where(counted, labels, 0)
      known = (labels >= 0) & (labels < logits.shape[-1])
      logits = jnp.where(known[:, None], logits, jnp.nan)
    found = penalty(logits, None if soft else labels, weights)
    ce = _mean(_cross_entropy(logits, labels, soft), weights)
    aux = {
      "ce": ce,
      "penalty": found,
      **_seen(penalty, logits, labels, weights),
    }
    return ce + weight * found, aux

  return loss_fn


def score_penalty(
  penalty: Penalty,
  scores: Mapping[str, Any],
  label,
  present: Mapping[str, Any],
) -> Array:
  r"""A penalty of each modality's own scores, averaged over present ones.

  .. math:: \operatorname{mean}_i \operatorname{mean}_{m\ \text{present}}
            R(s_{i,m})

  over examples with at least one modality. The row of an absent modality has
  weight 0, whatever it holds.

  Args:
    penalty: of means, not of sums.
    scores: ``{m: [b, k]}`` of a late-fusion head.
    label: int ``[b]``.
    present: ``{m: bool[b]}``.

  Raises:
    ValueError: a summed penalty, or a modality that ``present`` lacks.
  """
  if penalty.summed:
    raise ValueError(
      f"penalty must be a mean over items for scores; {penalty.name!r} is a "
      f"sum here."
    )
  names = modalities.names(scores)
  for name in names:
    if name not in present:
      raise ValueError(
        f"present must say of every modality where it is; {name!r} is missing."
      )
  flags = jnp.stack([jnp.asarray(present[name]) for name in names])
  number = jnp.sum(flags, axis=0)
  dtype = jnp.promote_types(scores[names[0]].dtype, jnp.float32)
  weights = flags / jnp.maximum(number, 1)[None].astype(dtype)
  terms = [
    jnp.sum(w) * penalty(scores[name], label, w)
    for name, w in zip(names, weights)
  ]
  return sum(terms) / jnp.maximum(jnp.sum(number > 0), 1)


def weights_per_example(valid) -> Array:
  """``[b, t]``: every example counts alike, however many tokens it has.

  >>> weights_per_example(jnp.array([[True, True], [True, False]])).tolist()
  [[0.5, 0.5], [1.0, 0.0]]
  """
  valid = jnp.asarray(valid)
  number = jnp.sum(valid, axis=-1, keepdims=True)
  return valid / jnp.maximum(number, 1).astype(jnp.result_type(float))


def mean_weight(
  penalty: Penalty, published_weight: float, num_items: int, num_classes: int
) -> float:
  """The weight on a mean that is as strong as one on the published sum.

  :math:`b N (C - 1)` for ``wrong_class_dispersion``, :math:`b N` for
  ``topk_level`` (of which N log N is a constant).

  Args:
    penalty: which.
    published_weight: b.
    num_items: N, of a batch: examples, or tokens with the padding.
    num_classes: C.

  Raises:
    ValueError: another penalty, or one that was never published; a negative
      weight, no items, too few classes.

  >>> round(mean_weight(wrong_class_dispersion(), 1e-3, 128, 10), 6)
  1.152
  """
  factors = {"wrong_class_dispersion": num_classes - 1, "topk_level": 1}
  if penalty.name not in factors:
    raise ValueError(
      f"penalty must be one of {', '.join(factors)}, got {penalty.name!r}."
    )
  if penalty.published is None:
    raise ValueError(
      f"penalty must be one that was published, got {penalty!r}."
    )
  _validate.non_negative(published_weight=published_weight)
  _validate.at_least(1, num_items=num_items)
  penalty.check(num_classes)
  return published_weight * num_items * factors[penalty.name]


def _meant(penalty, fidelity) -> Penalty:
  """The penalty, or what the release has in its place."""
  if not isinstance(penalty, Penalty):
    raise ValueError(
      f"penalty must be a losses.Penalty, such as losses.topk_level(); got "
      f"{_validate.kind(penalty)}."
    )
  if fidelity is None:
    if penalty.fidelity_only:
      raise ValueError(
        f"the penalty {penalty.name!r} needs fidelity='published': nothing but "
        f"the release is a reason to take it."
      )
    return penalty
  _validate.one_of(FIDELITIES, fidelity=fidelity)
  if penalty.published is None:
    raise ValueError(
      f"fidelity must be None for the penalty {penalty!r}, which was never "
      f"published."
    )
  return penalty.published()


def _check_weight(weight) -> None:
  scalar = hasattr(weight, "dtype") and jnp.shape(weight) == ()
  if not (scalar or isinstance(weight, numbers.Real)):
    raise ValueError(f"weight must be one number, got {weight!r}.")
  _validate.non_negative(weight=weight)


def _check_logits(logits, parts: int) -> None:
  if getattr(logits, "ndim", 0) not in (2, 3):
    raise ValueError(
      f"logits must be an array [b, k], or [b, t, k] of tokens; got "
      f"{_validate.kind(logits)}"
      f"{list(logits.shape) if hasattr(logits, 'shape') else ''}."
    )
  # By examples: the tokens of one are not compared apart from each other.
  if logits.shape[0] % parts:
    raise ValueError(
      f"level_scope must divide the {logits.shape[0]} items of a batch, got "
      f"{parts}; an example with all of its tokens is in one part."
    )


def _is_soft(logits, labels) -> bool:
  shape = jnp.shape(labels)
  dtype = labels.dtype if hasattr(labels, "dtype") else np.asarray(labels).dtype
  return (
    logits.ndim == 2
    and shape == logits.shape
    and jnp.issubdtype(dtype, jnp.floating)
  )


def _float32(logits):
  return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _weights(logits, labels, valid, valid_weights, soft) -> Array:
  """``[*n]``: how much each item counts, 0 where it is padding."""
  shape = logits.shape[:-1]
  weights = jnp.ones(shape, logits.dtype)
  if valid_weights is not None:
    if jnp.shape(valid_weights) != shape:
      raise ValueError(
        f"valid_weights must have shape {shape}, got "
        f"{jnp.shape(valid_weights)}."
      )
    weights = jnp.asarray(valid_weights, logits.dtype)
    if margins.known_values(weights):
      found = np.asarray(weights)
      if not np.all((found >= 0) & np.isfinite(found)):
        raise ValueError("valid_weights must be non-negative and finite.")
  if valid is not None:
    if jnp.shape(valid) != shape or jnp.asarray(valid).dtype != bool:
      raise ValueError(
        f"valid must be bool of shape {shape}, got "
        f"{jnp.asarray(valid).dtype}{list(jnp.shape(valid))}."
      )
    weights = jnp.where(jnp.asarray(valid), weights, jnp.zeros_like(weights))
  if margins.known_values(weights) and not np.any(np.asarray(weights) > 0):
    raise ValueError("valid must be True somewhere: no item is left.")
  if not soft:
    _check_labels(labels, weights, logits.shape[-1])
  return weights


def _check_labels(labels, weights, num_classes) -> None:
  """Those of items that count; the others may be anything."""
  if not hasattr(labels, "dtype"):
    labels = np.asarray(labels)
  known = margins.known_values(labels, weights)
  integer = jnp.issubdtype(labels.dtype, jnp.integer)
  if known and integer and labels.shape == weights.shape:
    labels = np.where(np.asarray(weights) > 0, np.asarray(labels), 0)
  margins.check_label(labels, num_classes, weights.shape, argument="labels")


def _flat(logits, labels, weights, *, soft):
  num_classes = logits.shape[-1]
  if not soft:
    labels = jnp.reshape(jnp.asarray(labels), (-1,))
  return (
    jnp.reshape(logits, (-1, num_classes)),
    jnp.asarray(labels),
    jnp.reshape(weights, (-1,)),
  )


def _cross_entropy(logits, labels, soft):
  if soft:
    return entropies.soft_cross_entropy(logits, labels.astype(logits.dtype))
  return entropies.cross_entropy(logits, labels)


def _mean(values, weights):
  summed = jnp.sum(weights)
  return total(values, weights) / jnp.where(summed > 0, summed, 1)


def _seen(penalty, logits, labels, weights) -> dict[str, Any]:
  """What is logged beside the loss, without gradient."""
  logits, weights = jax.lax.stop_gradient((logits, weights))
  num_classes = logits.shape[-1]
  found = {
    "logit_norm": _mean(jnp.mean(jnp.square(logits), axis=-1), weights),
    "num_valid": jnp.sum(weights > 0),
  }
  if labels.ndim == 2:
    return found
  window = penalty.window or (0, min(wrong.FIRST_FOUR[1], num_classes - 1))
  heights = levels.level(logits, labels, window)
  mean = _mean(heights, weights)
  variance = _mean(jnp.square(heights - mean), weights)
  values = wrong.everything(logits, labels)
  margin = margins.smallest(margins.pairwise(logits, labels))
  return {
    "level_spread": jnp.sqrt(variance),
    "wrong_dispersion": _mean(values.dispersion() / values.number, weights),
    "margin_mean": _mean(margin, weights),
    **found,
  }
