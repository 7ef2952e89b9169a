"""A penalty of wrong logits as a term of whatever recipe has cross-entropy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from robust_mm import _tasks
from robust_mm import _validate
from robust_mm import losses
from robust_mm import modalities
from robust_mm._types import Model

PLACES = ("fused", "scores")
RAMP = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Restraint:
  """What ``losses.restrained_softmax`` adds to cross-entropy, in a recipe.

  Wherever a recipe trains on cross-entropy it is added, with labels mixed as
  cross-entropy mixes them; validation stays plain.

  Attributes:
    penalty: of ``robust_mm.losses``.
    weight: at least 0.
    on: ``"fused"`` logits; or ``"scores"``, those of each modality alone of a
      late-fusion head, averaged over present ones.
    ramp: share of the updates of a phase in which the weight rises from 0; None
      for 0.05, or 0 as published.
    fidelity: None or ``"published"``, see ``losses.restrained_softmax``: its
      sums grow with the batch, and so should be trained without clipping.
    scale: of the weight, now; set by :meth:`at`.

  Raises:
    ValueError: naming the argument that is wrong.
  """

  penalty: losses.Penalty
  weight: float = 1.0
  on: str = "fused"
  ramp: float | None = None
  fidelity: str | None = None
  scale: Any = 1.0

  def __post_init__(self):
    _validate.one_of(PLACES, on=self.on)
    if self.ramp is not None:
      _validate.in_unit_interval(ramp=self.ramp)
    if self.on == "scores" and self.fidelity is not None:
      raise ValueError(
        "on must be 'fused' with fidelity='published', which knew one modality."
      )
    self._loss_fn()

  def check(
    self, model: Model, *, scores: bool = True, letters: int | None = None
  ) -> None:
    """Refuses a model that it does not fit.

    Args:
      model: to be trained.
      scores: whether the recipe has scores to offer, where the model does.
      letters: how many there are, where an item is one; None where it is an
        example, of the classes of the model.

    Raises:
      ValueError: one sentence.
    """
    if not model.classifies:
      raise ValueError(
        f"penalty must be left out for a model that predicts "
        f"{_tasks.PREDICTS[model.task]}."
      )
    if letters is None:
      self.penalty.check(model.num_classes)
    else:
      self.penalty.check(letters, "letters")
    if self.on == "scores" and (not scores or model.geometry is None):
      raise ValueError(
        "on must be 'fused' here: 'scores' needs a recipe that trains on the "
        "scores of each modality and a late-fusion head, which has them."
      )

  def at(self, batch) -> "Restraint":
    """As strong as it is at the ``progress`` of a batch, where that is said."""
    progress = batch.get("progress")
    ramp = self.ramp
    if ramp is None:
      ramp = 0.0 if self.fidelity else RAMP
    if progress is None or not ramp:
      return dataclasses.replace(self, ramp=0.0)
    scale = self.scale * jnp.minimum(progress / ramp, 1)
    return dataclasses.replace(self, ramp=0.0, scale=scale)

  def term(self, logits, batch, scores=None) -> tuple[Any, dict[str, Any]]:
    """(what is added to the loss, metrics) of a batch."""
    now = self.at(batch)
    value, seen = now._of_label(logits, scores, batch, batch["label"])
    if "mix" in batch:
      mix = batch["mix"]
      other = now._of_label(logits, scores, batch, batch["other_label"])
      number = seen["num_valid"]  # one for both
      value, seen = jax.tree.map(
        lambda a, b: mix * a + (1 - mix) * b, (value, seen), other
      )
      seen = {**seen, "num_valid": number}
    weight = self.weight * now.scale
    metrics = {**seen, "penalty": value, "penalty_weight": weight}
    return weight * value, {k: jnp.asarray(v) for k, v in metrics.items()}

  def tokens(self, logits, ids, valid, batch) -> tuple[Any, dict[str, Any]]:
    """The same of tokens: ``[b, t, V]``, int and bool ``[b, t]``.

    As published padding counts; an example without any modality never does.
    """
    now = self.at(batch)
    counted = jnp.any(modalities.stack(batch["present"]), axis=0)
    rows = jnp.broadcast_to(counted[:, None], ids.shape)
    _, seen = self._loss_fn()(logits, ids, valid, valid_weights=rows)
    weight = jnp.asarray(self.weight * now.scale)
    return weight * seen["penalty"], {**seen, "penalty_weight": weight}

  def _of_label(self, logits, scores, batch, label):
    present = batch["present"]
    counted = jnp.any(modalities.stack(present), axis=0)
    # Weights, which the published mode does not take for padding.
    _, seen = self._loss_fn()(logits, label, valid_weights=counted)
    value = seen["penalty"]
    if self.on == "scores":
      if scores is None:
        raise ValueError("on must be 'fused': the model has no scores.")
      value = losses.score_penalty(self.penalty, scores, label, present)
    return value, seen

  def _loss_fn(self):
    return losses.restrained_softmax(
      self.penalty, self.weight, fidelity=self.fidelity
    )
