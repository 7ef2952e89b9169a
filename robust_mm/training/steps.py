"""The pure steps: one update, one evaluation pass over a batch."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from robust_mm import _tasks
from robust_mm import certification
from robust_mm import modalities
from robust_mm import weights
from robust_mm._types import Model
from robust_mm.recipes import Phase
from robust_mm.recipes import objectives
from robust_mm.training import state as state_lib

PROJECT_EVERY = 16  # updates


def projection(model: Model, phase: Phase) -> Callable | None:
  """``params -> params``, or None; what a phase freezes stays bit-identical."""
  if model.project is None:
    return None

  def project(params):
    _, frozen = state_lib.split(params, phase.trainable)
    projected, _ = state_lib.split(model.project(params), phase.trainable)
    return state_lib.merge(projected, frozen)

  return project


def candidate(
  model: Model, phase: Phase, *, average: bool = False
) -> Callable | None:
  """``(params, average) -> params`` that are validated and kept, or None.

  The average of the trainable parameters where there is one, projected; None
  where these are the parameters as they are.
  """
  project = projection(model, phase)
  if project is None and not average:
    return None

  def choose(params, running):
    if average:
      params = state_lib.averaged(params, running, phase)
    return params if project is None else project(params)

  return choose


def make_train_step(
  phase: Phase,
  project: Callable | None = None,
  *,
  average_decay: float = 0.0,
  start: int = 0,
) -> Callable:
  """``step(state, batch, run_key) -> (state, metrics)``, pure.

  The step's randomness is folded from the run's key and the state's step, so a
  resumed run draws what the undisturbed one draws.

  Args:
    phase: its own update, or loss, optimiser and trainable parameters; and
      interventions.
    project: from ``projection``; applied every ``PROJECT_EVERY`` updates.
    average_decay: of ``state.average``; 0 where there is none.
    start: updates of the run before the phase.
  """
  advance = phase.update or _gradient_step(phase)

  def train_step(state: state_lib.TrainState, batch, run_key):
    key = jax.random.fold_in(run_key, state.step)
    loss_key, *keys = jax.random.split(key, 1 + len(phase.interventions))
    for intervention, subkey in zip(phase.interventions, keys):
      batch = intervention(subkey, state.params, state.model_state, batch)
    if phase.progress:
      done = (state.step - start).astype(jnp.float32)
      batch = {**batch, "progress": done / phase.num_steps}
    state, metrics = advance(state, batch, loss_key)
    params = state.params
    if project is not None:
      due = (state.step + 1) % PROJECT_EVERY == 0
      params = jax.lax.cond(due, project, lambda params: params, params)
    chosen, _ = state_lib.split(params, phase.trainable)
    # Not finite as soon as one parameter is not.
    metrics = {**metrics, "parameter_norm": optax.tree.norm(chosen)}
    state = dataclasses.replace(state, step=state.step + 1, params=params)
    if average_decay:
      average = weights.moving_average(
        state.average, chosen, decay=average_decay, count=state.step - start
      )
      state = dataclasses.replace(state, average=average)
    return state, metrics

  return train_step


def _gradient_step(phase: Phase) -> Callable:
  """The update of a phase that has none of its own: down its loss."""
  # Those that keep the best parameters are told the loss.
  tx = optax.with_extra_args_support(phase.tx)

  def advance(state: state_lib.TrainState, batch, key):
    chosen, frozen = state_lib.split(state.params, phase.trainable)

    def loss_fn(chosen):
      params = state_lib.merge(chosen, frozen)
      return phase.loss(params, state.model_state, batch, key=key)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (model_state, metrics)), grads = grad_fn(chosen)
    updates, opt_state = tx.update(grads, state.opt_state, chosen, value=loss)
    chosen = optax.apply_updates(chosen, updates)
    state = dataclasses.replace(
      state,
      params=state_lib.merge(chosen, frozen),
      model_state=model_state,
      opt_state=opt_state,
    )
    norm = optax.tree.norm(grads)
    return state, {"loss": loss, **metrics, "gradient_norm": norm}

  return advance


def make_predict(
  model: Model, *, units=None, certified: bool, subsets: bool = False
) -> Callable:
  """``predict(params, state, batch) -> {correct, loss, counted, radius?}``.

  Of a regression ``prediction`` and ``label`` in place of ``correct``, and
  ``subset_error`` in place of ``subset_correct``. Each is ``[b]``; ``counted``
  is False for an example without any modality. Of a multi-label model
  ``prediction`` (logits) and ``label`` are ``[b, k]``, and
  ``subset_prediction`` is ``[b, s, k]``.

  ``radius`` is the joint certified l2 radius; it is there for models that
  state sound constants, and when ``certified`` asks for it. ``subset_correct``
  and ``subset_counted`` are ``[b, s]``, one column an availability set.
  """

  def predict(params, model_state, batch):
    outputs, _ = model.apply(
      params, model_state, batch["inputs"], batch["present"]
    )
    label = batch["label"]
    counted = jnp.any(modalities.stack(batch["present"]), axis=0)
    if not model.classifies:
      said = model.said(outputs.logits)
      result = {"prediction": said, "label": label, "counted": counted}
      result["loss"] = objectives.each_loss(model, outputs.logits, label)
      if subsets:
        result.update(_by_subset(model, params, outputs.embeddings, batch))
      return result
    result = {
      "correct": jnp.argmax(outputs.logits, axis=-1) == label,
      "counted": counted,
      "loss": optax.losses.softmax_cross_entropy_with_integer_labels(
        outputs.logits, label
      ),
    }
    if certified:
      certificate = certification.certify(
        model, params, batch, state=model_state, units=units
      )
      # A radius is about the prediction of the pass that computed it.
      result["correct"] = certificate.prediction == label
      result["radius"] = certificate.radius
    if subsets:
      result.update(_by_subset(model, params, outputs.embeddings, batch))
    return result

  return predict


def make_spell(model: Model) -> Callable:
  """``spell(params, model_state, batch) -> {"whole", "counted"}``, bool[b].

  Whether the greedy caption of the batch's ``classes`` is right in every
  letter, and which examples have any modality.
  """
  captions = model.captions

  def spell(params, model_state, batch):
    present = batch["present"]
    embeddings, _ = model.encode(params, model_state, batch["inputs"], present)
    said = captions.generate(params, embeddings, present)
    meant = captions.spell(batch["classes"], present)
    return {
      "whole": jnp.all(said == meant, axis=-1),
      "counted": jnp.any(modalities.stack(present), axis=0),
    }

  return spell


def _by_subset(model: Model, params, embeddings, batch) -> dict:
  """What is right, how far off, or said, with each availability set.

  One pass of the encoders.
  """
  name = {
    _tasks.CLASSIFICATION: "subset_correct",
    _tasks.REGRESSION: "subset_error",
    _tasks.MULTI_LABEL: "subset_prediction",
  }[model.task]

  def one(left):
    logits = model.fuse(params, modalities.mask(embeddings, left), left).logits
    if model.classifies:
      found = jnp.argmax(logits, axis=-1) == batch["label"]
    else:
      found = model.said(logits)
    if model.task == _tasks.REGRESSION:
      found = jnp.abs(found - batch["label"])
    return found, jnp.any(modalities.stack(left), axis=0)

  found, counted = jax.lax.map(one, modalities.left_by_set(batch["present"]))
  return {name: jnp.moveaxis(found, 0, 1), "subset_counted": counted.T}


def make_encode(model: Model) -> Callable:
  """``encode(params, state, batch) -> {scores, logits, label, present}``.

  In evaluation mode; what a phase that works on cached outputs needs, with the
  pooled ``features`` of a model that has them.
  """

  def encode(params, model_state, batch):
    # What is fitted to and judged is what will be certified.
    with jax.default_matmul_precision("highest"):
      outputs, _ = model.apply(
        params, model_state, batch["inputs"], batch["present"]
      )
      found = {"scores": outputs.scores, "logits": outputs.logits}
      if model.features is not None:
        found["features"] = model.features(
          params, outputs.embeddings, batch["present"]
        )
    return {**found, "label": batch["label"], "present": batch["present"]}

  return encode
