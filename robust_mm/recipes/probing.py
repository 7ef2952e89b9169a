r"""From a representation to a classifier: linear probe, fine-tuning, both.

The probe learns a linear head with everything else frozen; fine-tuning goes on
from that head (LP-FT), so that a fresh one does not distort what was learnt.

References:
  `Kumar et al. (2022) <https://arxiv.org/abs/2202.10054>`_.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robust_mm import _validate
from robust_mm._types import Model
from robust_mm.recipes import interventions
from robust_mm.recipes import objectives
from robust_mm.recipes import phases
from robust_mm.recipes import restraints

METHODS = ("lp_ft", "probe", "finetune")
_SMALLEST = 1e-6


def finetune(
  model: Model,
  *,
  num_steps: int,
  tx: optax.GradientTransformation,
  method: str = "lp_ft",
  trainable: str = ".*",
  dropout_rate: float = 0.0,
  label_smoothing: float = 0.0,
  restraint: restraints.Restraint | None = None,
  l2_sp: float = 0.0,
  probe_steps: int = 1000,
  probe_lr: float = 1e-2,
  probe_decay: float = 0.05,
) -> phases.Recipe:
  r"""A classifier (or regression) on the features of a pretrained model.

  - ``probe``: the head alone, :math:`z = W (f - \mu) / \sigma + b`, on pooled
    features f that are computed once; :math:`\mu` and :math:`\sigma` of the
    training set as training sees it (``config.data.labelled``), and the same
    ones ever after.
  - ``finetune``: all parameters, from the head as it is.
  - ``lp_ft``: first one, then the other.

  Formal guarantees:
    - The phase ``probe`` leaves every parameter but the head bit-identical.
    - Its standardisation is folded into the head: :math:`W / \sigma` and
      :math:`b - W \mu / \sigma`; the model that is kept has no other parts, and
      fine-tuning begins at exactly what the probe predicts.

  Encoders of modalities without labels get no gradient in fine-tuning; weight
  decay shrinks them all the same.

  Args:
    model: with ``features`` (``fusion="transformer"``).
    num_steps: updates of fine-tuning; unused by ``probe``.
    tx: optimiser of fine-tuning.
    method: ``lp_ft``, ``probe`` or ``finetune``.
    trainable: regex over the parameters that fine-tuning changes.
    dropout_rate: share of the examples of which fine-tuning sees a random
      non-empty subset of the modalities they have; 0 for none.
    label_smoothing: share of every label that is spread over all classes.
    restraint: a penalty of wrong logits, in both phases
      (``recipes.Restraint``), or None.
    l2_sp: weight of half the squared distance to where fine-tuning began
      (L2-SP); 0 for none.
    probe_steps: updates of the probe, each on all training examples.
    probe_lr: of AdamW for the probe, falling along a cosine.
    probe_decay: weight decay of that, on standardised features.

  Raises:
    ValueError: naming the argument that is wrong.
  """
  _validate.one_of(METHODS, method=method)
  if model.features is None:
    raise ValueError(
      "finetune needs a model with pooled features: "
      "config.model.fusion='transformer', or models.token_transformer."
    )
  _validate.in_unit_interval(dropout_rate=dropout_rate)
  _validate.below_one(label_smoothing=label_smoothing)
  objectives.check_off(model, label_smoothing=label_smoothing)
  if restraint is not None:
    restraint.check(model, scores=False)
  _validate.at_least(1, probe_steps=probe_steps)
  _validate.positive(probe_lr=probe_lr)
  _validate.non_negative(probe_decay=probe_decay, l2_sp=l2_sp)
  probe = _probe(
    model,
    num_steps=probe_steps,
    tx=optax.adamw(
      optax.cosine_decay_schedule(probe_lr, probe_steps),
      weight_decay=probe_decay,
    ),
    label_smoothing=label_smoothing,
    restraint=restraint,
  )
  if method == "probe":
    return phases.Recipe(name="probe", phases=(probe,))
  tune = phases.Phase(
    name="finetune",
    num_steps=num_steps,
    tx=optax.chain(pull_to_start(l2_sp), tx) if l2_sp else tx,
    trainable=trainable,
    loss=objectives.cross_entropy_loss(
      model, label_smoothing=label_smoothing, restraint=restraint
    ),
    progress=restraint is not None,
    interventions=(interventions.modality_dropout(rate=dropout_rate),)
    if dropout_rate
    else (),
  )
  before = (probe,) if method == "lp_ft" else ()
  return phases.Recipe(name=method, phases=(*before, tune))


def pull_to_start(weight: float) -> optax.GradientTransformation:
  r"""Adds :math:`w (\theta - \theta_0)` to the gradient (L2-SP).

  :math:`\theta_0` is what ``init`` was given. Before a clip and an optimiser::

    tx = optax.chain(pull_to_start(0.01), optax.adamw(1e-3))

  References:
    `Li, Grandvalet & Davoine (2018) <https://arxiv.org/abs/1802.01483>`_.
  """

  def update(updates, start, params=None):
    if params is None:
      raise ValueError("pull_to_start needs params in update().")
    pulled = jax.tree.map(
      lambda g, p, s: g + (weight * (p - s)).astype(g.dtype),
      updates,
      params,
      start,
    )
    return pulled, start

  def init(params):
    return jax.tree.map(jnp.array, params)

  return optax.GradientTransformation(init, update)


def _probe(
  model: Model,
  *,
  num_steps: int,
  tx: optax.GradientTransformation,
  label_smoothing: float,
  restraint: restraints.Restraint | None,
) -> phases.Phase:
  """The phase that fits the head, on features that are computed once."""

  def extra(params, key):
    del key
    head = jax.tree.map(jnp.zeros_like, params["fusion"]["last"])
    return {"head": head, "optimizer": tx.init(head)}

  def update(state, batch, key):
    del key

    def loss_fn(head):
      logits = _predict(model, head, batch["features"])
      loss = objectives.task_loss(
        model,
        logits,
        batch,
        label_smoothing=label_smoothing,
        restraint=restraint,
      )
      return loss, objectives.score(model, logits, batch)

    head = state.extra["head"]
    (loss, score), grads = jax.value_and_grad(loss_fn, has_aux=True)(head)
    updates, optimizer = tx.update(grads, state.extra["optimizer"], head)
    head = optax.apply_updates(head, updates)
    folded = fold(head, batch["mean"], batch["deviation"])
    params = {
      **state.params,
      "fusion": {**state.params["fusion"], "last": folded},
    }
    state = dataclasses.replace(
      state, params=params, extra={"head": head, "optimizer": optimizer}
    )
    metrics = {"loss": loss, objectives.score_name(model): score}
    return state, {**metrics, "gradient_norm": optax.tree.norm(grads)}

  return phases.Phase(
    name="probe",
    num_steps=num_steps,
    # What it trains is the standardised head, in its extra state.
    tx=optax.identity(),
    prepare=prepare,
    extra=extra,
    update=update,
    averaged=False,
    progress=restraint is not None,
  )


def prepare(params, state, cached, reference) -> dict:
  """The whole training set: standardised features, and by what."""
  del params, state, reference
  features = np.asarray(cached["features"])
  counted = np.any(np.stack(list(cached["present"].values())), axis=0)
  mean, deviation = statistics(features[counted])
  return {
    "features": (features - mean) / deviation,
    "mean": mean,
    "deviation": deviation,
    "label": cached["label"],
    "present": cached["present"],
  }


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(mean, deviation) ``[d]`` of ``[n, d]``; 1 where nothing varies."""
  if not len(features):
    raise ValueError(
      "the training set has no example with any of its modalities."
    )
  exact = features.astype(np.float64)
  mean, deviation = exact.mean(axis=0), exact.std(axis=0)
  # A constant feature would make noise in it decisive.
  deviation = np.where(deviation > _SMALLEST, deviation, 1)
  return mean.astype(np.float32), deviation.astype(np.float32)


def fold(head, mean, deviation) -> dict:
  """The head on features as they are, from that on standardised ones."""
  kernel = head["kernel"] / deviation[:, None]
  shift = jnp.einsum("d,dk->k", mean, kernel, precision="highest")
  return {"kernel": kernel, "bias": head["bias"] - shift}


def _predict(model: Model, head, features):
  """Logits; of a regression in units of the label."""
  found = jnp.einsum("bd,dk->bk", features, head["kernel"])
  found = found + head["bias"][None]
  if model.target is None:
    return found
  return model.target.mean + model.target.deviation * found
