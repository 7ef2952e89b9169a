"""Losses over a batch that recipes share: the task's, penalties, means."""

from collections.abc import Callable

import jax.numpy as jnp

from robust_mm import _tasks
from robust_mm import _validate
from robust_mm import certification
from robust_mm import linalg
from robust_mm import losses
from robust_mm import modalities
from robust_mm._types import Model
from robust_mm.certification import tables
from robust_mm.recipes import restraints


def cross_entropy_loss(
  model: Model,
  *,
  clean_weight: float = 0.0,
  label_smoothing: float = 0.0,
  restraint: restraints.Restraint | None = None,
) -> Callable:
  """Cross-entropy, mixed labels and a clean term where the batch has them.

  And a penalty of wrong logits, where there is one.

  Of another task its :func:`task_loss`.

  Raises:
    ValueError: ``label_smoothing`` is not in [0, 1), or not 0 for another task;
      a ``restraint`` that does not fit the model.
  """
  _validate.below_one(label_smoothing=label_smoothing)
  check_off(model, label_smoothing=label_smoothing)
  if restraint is not None:
    restraint.check(model)
  metric = score_name(model)

  def loss_fn(params, state, batch, *, key):
    outputs, new_state = model.apply(
      params, state, batch["inputs"], batch["present"], train=True, key=key
    )
    loss = task_loss(
      model, outputs.logits, batch, label_smoothing=label_smoothing
    )
    metrics = {metric: score(model, outputs.logits, batch)}
    if restraint is not None:
      added, seen = restraint.term(outputs.logits, batch, outputs.scores)
      loss, metrics = loss + added, {**metrics, **seen}
    return loss, (new_state, metrics)

  return with_clean_term(loss_fn, clean_weight)


def with_clean_term(loss_fn: Callable, clean_weight: float) -> Callable:
  """``loss_fn``, mixed with itself on ``batch["clean_inputs"]``.

  State and metrics are those of the changed inputs.
  """
  if not clean_weight:
    return loss_fn

  def mixed(params, state, batch, *, key):
    loss, aux = loss_fn(params, state, batch, key=key)
    clean_batch = {**batch, "inputs": batch["clean_inputs"]}
    clean, _ = loss_fn(params, state, clean_batch, key=key)
    return (1 - clean_weight) * loss + clean_weight * clean, aux

  return mixed


def with_spectral_penalty(
  loss_fn: Callable, model: Model, weight: float
) -> Callable:
  r"""``loss_fn`` plus ``weight`` times the sum of all layers' spectral norms.

  Of the dense layers and convolutions of every encoder (normalisation included;
  of convolutions the bound of ``lipschitz.conv_matrix``) and of the rows of the
  head. It makes what multiplies up in a certificate small where the task
  does not need it: ordinary encoders become certifiable.

  Raises:
    ValueError: naming the modality whose encoder has other layers.
  """
  _validate.non_negative(spectral_penalty=weight)
  if not weight:
    return loss_fn
  model.need_classes("spectral_penalty")
  stated = certification.abstract_geometry(model)
  for name in model.modalities:
    if (stated.linear or {}).get(name) is None:
      raise ValueError(
        f"spectral_penalty must be 0 for the encoder of modality {name!r}, "
        "whose layers it cannot read: it takes mlp, cnn and temporal_cnn."
      )

  def penalised(params, state, batch, *, key):
    loss, (state, metrics) = loss_fn(params, state, batch, key=key)
    geometry = model.geometry(params)
    matrices = [
      matrix
      for name in model.modalities
      for matrix in (*geometry.linear[name], geometry.head[name])
    ]
    total = sum(
      linalg.gram_norm(matrix, num_iters=tables.TRAINING_ITERS)
      for matrix in matrices
    )
    return loss + weight * total, (state, {**metrics, "spectral_norms": total})

  return penalised


def check_off(model: Model, **weights: float) -> None:
  """ValueError for a weight above 0 of what is about one class an example."""
  for name, value in weights.items():
    if value and not model.classifies:
      raise ValueError(
        f"{name} must be 0 for a model that predicts "
        f"{_tasks.PREDICTS[model.task]}."
      )


def task_loss(
  model: Model,
  logits,
  batch,
  *,
  label_smoothing: float = 0.0,
  restraint: restraints.Restraint | None = None,
):
  """What a recipe minimises: cross-entropy of classes, else `each_loss`.

  With a ``restraint`` of the fused logits.
  """
  if model.classifies:
    loss = classification(logits, batch, label_smoothing=label_smoothing)
    return (
      loss if restraint is None else loss + restraint.term(logits, batch)[0]
    )
  each = each_loss(model, logits, batch["label"])
  return counted_mean(each, batch["present"])


def each_loss(model: Model, logits, label):
  """``[b]``: L1 of a number in deviations, sigmoid cross-entropy of labels."""
  if model.task == _tasks.MULTI_LABEL:
    return losses.binary_cross_entropy(logits, label)
  return jnp.abs(model.said(logits) - label) / model.target.deviation


def score(model: Model, logits, batch):
  """What a training step reports beside its loss: :func:`score_name`."""
  if model.classifies:
    return accuracy(logits, batch)
  if model.task == _tasks.MULTI_LABEL:
    return hit_at_1(logits, batch)
  return absolute_error(logits, batch)


def score_name(model: Model) -> str:
  """``accuracy``; ``mae`` in units of the label; ``hit_at_1`` of multi-label.

  The mean average precision is of a whole set: validation has it.
  """
  return {_tasks.MULTI_LABEL: "hit_at_1"}.get(
    model.task, _tasks.MAIN[model.task]
  )


def absolute_error(logits, batch):
  """Mean of ``|prediction - label|``, examples with at least one modality."""
  error = jnp.abs(logits[..., 0] - batch["label"])
  return counted_mean(error, batch["present"])


def hit_at_1(logits, batch):
  """Share of examples whose class of the largest logit is one they have."""
  top = jnp.argmax(logits, axis=-1)[..., None]
  hit = jnp.take_along_axis(batch["label"], top, axis=-1)[..., 0]
  return counted_mean(hit.astype(logits.dtype), batch["present"])


def classification(logits, batch, *, label_smoothing: float = 0.0):
  """Mean cross-entropy over examples with at least one modality."""

  def entropy(label):
    return losses.cross_entropy(logits, label, label_smoothing=label_smoothing)

  per_example = entropy(batch["label"])
  if "mix" in batch:
    other = entropy(batch["other_label"])
    per_example = batch["mix"] * per_example + (1 - batch["mix"]) * other
  return counted_mean(per_example, batch["present"])


def accuracy(logits, batch):
  """Share of examples whose larger label is predicted."""
  label = batch["label"]
  if "mix" in batch:
    label = jnp.where(batch["mix"] >= 0.5, label, batch["other_label"])
  right = (jnp.argmax(logits, axis=-1) == label).astype(logits.dtype)
  return counted_mean(right, batch["present"])


def counted_mean(per_example, present):
  """Mean over the examples that have at least one modality; 0 without any."""
  counted = jnp.any(modalities.stack(present), axis=0)
  total = jnp.sum(jnp.where(counted, per_example, 0))
  return total / jnp.maximum(jnp.sum(counted), 1)
