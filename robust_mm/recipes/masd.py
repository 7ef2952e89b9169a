r"""MASD: what a model says of labelled modalities teaches it about others.

A batch has labelled rows, of which the labelled modalities T are seen, and rows
without a label but with all modalities they have (``config.data.labelled`` and
``config.data.unlabelled_splits``).

References:
  `McKinzie et al. (2023) <https://arxiv.org/abs/2304.04385>`_; the form of
  ``robust_mm.distillation`` is our reading of it.
"""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from robust_mm import _validate
from robust_mm import distillation
from robust_mm import modalities
from robust_mm import weights
from robust_mm._types import Model
from robust_mm.recipes import objectives
from robust_mm.recipes import phases
from robust_mm.recipes import probing
from robust_mm.recipes import restraints

METHODS = ("lp_ft", "finetune")
# Of ``distillation.divergence``, by the task of the model.
_DIVERGENCES = {
  "classification": "single_label",
  "multi_label": "multi_label",
  "regression": "regression",
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
  """The arguments of :func:`masd`, checked."""

  model: Model
  num_steps: int
  labelled: tuple[str, ...]
  unlabelled_ratio: int
  weight: float
  temperature: float
  ramp: float
  teacher: str
  teacher_subset: str
  ema_decay: float
  distribution: str
  include_labelled: bool
  label_smoothing: float
  restraint: restraints.Restraint | None


def masd(
  model: Model,
  *,
  num_steps: int,
  tx: optax.GradientTransformation,
  labelled: Sequence[str] = (),
  unlabelled_ratio: int = 0,
  method: str = "lp_ft",
  weight: float = 1.0,
  temperature: float = 1.0,
  ramp: float = 0.1,
  teacher: str = "self",
  teacher_subset: str = "labelled",
  ema_decay: float = 0.999,
  distribution: str = "uniform",
  include_labelled: bool = False,
  label_smoothing: float = 0.0,
  restraint: restraints.Restraint | None = None,
  probe_steps: int = 1000,
  probe_lr: float = 1e-2,
  probe_decay: float = 0.05,
) -> phases.Recipe:
  r"""Fine-tuning with Modality Augmented Self-Distillation.

  .. math:: L = \operatorname{mean}_{labelled} \mathrm{CE}(f(x_T), y)
            + \lambda(t) \operatorname{mean}_{unlabelled} \tau^2 \mathrm{KL}
            (g(x_T) \,\|\, f(x_S))

  with S drawn anew for every row, and g the teacher, without gradient. A step
  costs one pass of training over all rows of the batch, and one without
  gradient for the teacher (:math:`2^{n - |T|}` for ``"supersets"``), over the
  rows without a label where ``unlabelled_ratio`` says which they are, else over
  all rows.

  Batches have ``labelled`` bool[b] (``data.pipeline(unlabelled=)``); one
  without is labelled throughout, and serves as unlabelled too: then only sets
  within T are taught, in a second pass of training.

  Args:
    model: any classifier or regression that takes absent modalities.
    num_steps: updates.
    tx: the optimiser.
    labelled: T; all modalities of the model where not given.
    unlabelled_ratio: r, where every labelled row of a batch is followed by r
      rows without a label, as ``data.pipeline(ratio=r)`` has them: a row in the
      place of another kind does not count. 0: rows may come in any order.
    method: ``lp_ft``: a linear probe first (``recipes.finetune``);
      ``finetune``: from the head as it is.
    weight: lambda, after the ramp.
    temperature: tau.
    ramp: share of the updates in which lambda rises from 0; 0 for none (as
      published).
    teacher: ``self``; ``ema``, the moving average of the parameters; or
      ``frozen``: fine-tuned on T for ``num_steps`` updates before, in a phase
      of its own.
    teacher_subset: ``labelled`` (as published), or ``supersets``: the mean of
      what the teacher says of all sets from T up to all that is there.
    ema_decay: of the teacher ``ema``.
    distribution: of S, see ``modalities.sample_subsets``.
    include_labelled: lets S be T.
    label_smoothing: share of every label that is spread over all classes.
    restraint: a penalty of the wrong logits of rows that have a label, in all
      phases (``recipes.Restraint``), or None.
    probe_steps: updates of the probe, each on all training examples.
    probe_lr: of the probe.
    probe_decay: weight decay of the probe.

  Raises:
    ValueError: naming the argument that is wrong.
  """
  _validate.one_of(METHODS, method=method)
  _validate.one_of(distillation.TEACHERS, teacher=teacher)
  _validate.one_of(distillation.TEACHER_SUBSETS, teacher_subset=teacher_subset)
  _validate.one_of(modalities.DISTRIBUTIONS, distribution=distribution)
  _validate.non_negative(weight=weight)
  _validate.at_least(0, unlabelled_ratio=unlabelled_ratio)
  _validate.positive(temperature=temperature)
  _validate.in_unit_interval(ramp=ramp)
  _validate.below_one(ema_decay=ema_decay, label_smoothing=label_smoothing)
  objectives.check_off(model, label_smoothing=label_smoothing)
  if restraint is not None:
    restraint.check(model, scores=False)
  _validate.known(model.modalities, labelled=labelled)
  if len(model.modalities) < 2:
    raise ValueError(
      f"masd needs a model of at least two modalities, got "
      f"{', '.join(model.modalities)}."
    )
  settings = Settings(
    model=model,
    num_steps=num_steps,
    labelled=tuple(labelled) or tuple(model.modalities),
    unlabelled_ratio=unlabelled_ratio,
    weight=weight,
    temperature=temperature,
    ramp=ramp,
    teacher=teacher,
    teacher_subset=teacher_subset,
    ema_decay=ema_decay,
    distribution=distribution,
    include_labelled=include_labelled,
    label_smoothing=label_smoothing,
    restraint=restraint,
  )
  before = []
  if method == "lp_ft":
    before += probing.finetune(
      model,
      num_steps=num_steps,
      tx=tx,
      method="probe",
      label_smoothing=label_smoothing,
      restraint=restraint,
      probe_steps=probe_steps,
      probe_lr=probe_lr,
      probe_decay=probe_decay,
    ).phases
  if teacher == "frozen":
    before.append(
      phases.Phase(
        name="teacher",
        num_steps=num_steps,
        tx=tx,
        loss=_taught(settings),
        progress=restraint is not None,
      )
    )
  phase = phases.Phase(
    name="masd",
    num_steps=num_steps,
    tx=tx,
    extra=make_extra(settings),
    update=make_update(settings, tx),
    progress=restraint is not None,
  )
  return phases.Recipe(name=f"masd-{teacher}", phases=(*before, phase))


def _taught(settings: Settings) -> Callable:
  """The loss of the rows that have a label, of T alone."""

  def first(tree):
    return jax.tree.map(lambda x: _split(settings, x)[:, 0], tree)

  def loss_fn(params, state, batch, *, key):
    if settings.unlabelled_ratio and "labelled" in batch:
      batch = {
        # Progress is of the run, not of a row.
        name: x if name == "progress" else first(x)
        for name, x in batch.items()
      }
    shown = {**batch, "present": _within(settings, batch)}
    outputs, state = settings.model.apply(
      params, state, batch["inputs"], shown["present"], train=True, key=key
    )
    loss, score = _of_labels(settings, outputs.logits, shown)
    name = objectives.score_name(settings.model)
    return loss, (state, {name: score})

  return loss_fn


def make_extra(settings: Settings) -> Callable:
  """``extra(params, key)``: updates done, and the teacher's parameters."""

  def extra(params, key):
    del key
    found = {"count": jnp.zeros((), jnp.int32)}
    if settings.teacher == "ema":
      found["teacher"] = weights.start_average(params)
    elif settings.teacher == "frozen":
      found["teacher"] = jax.tree.map(jnp.array, params)
    return found

  return extra


def make_update(
  settings: Settings, tx: optax.GradientTransformation
) -> Callable:
  """One step on both kinds of rows."""
  model = settings.model
  task = _DIVERGENCES[model.task]

  def update(state, batch, key):
    draw_key, model_key = jax.random.split(key)
    extra, present = state.extra, batch["present"]
    flag = batch.get("labelled", jnp.ones_like(next(iter(present.values()))))
    mixed = "labelled" in batch
    unlabelled = _unlabelled_rows(settings, mixed)
    subset = modalities.sample_subsets(
      draw_key,
      present,
      settings.labelled,
      settings.distribution,
      include_labelled=settings.include_labelled,
    )
    scale = distillation.ramp(
      extra["count"],
      settings.num_steps,
      weight=settings.weight,
      fraction=settings.ramp,
    )
    labelled = _within(settings, batch)
    asked = {m: present[m] & subset[m] for m in present}
    shown = {
      m: jnp.where(flag, labelled[m], asked[m]) if mixed else labelled[m]
      for m in present
    }

    inputs = unlabelled(batch["inputs"])

    def teacher_fn(params, present):
      return model.apply(params, state.model_state, inputs, present)[0].logits

    def loss_fn(params):
      outputs, model_state = model.apply(
        params,
        state.model_state,
        batch["inputs"],
        shown,
        train=True,
        key=model_key,
      )
      logits = outputs.logits
      task_loss, score = _of_labels(
        settings, logits, {**batch, "present": shown}
      )
      student = logits
      if not mixed:
        student = model.apply(
          params,
          state.model_state,
          batch["inputs"],
          asked,
          train=True,
          key=model_key,
        )[0].logits
      teacher = distillation.teacher_logits(
        teacher_fn,
        extra.get("teacher", params),
        unlabelled(present),
        settings.labelled,
        subset=settings.teacher_subset,
      )
      counts = distillation.item_weights(present, settings.labelled, asked)
      counts = unlabelled(jnp.where(flag & mixed, 0, counts))
      apart = distillation.divergence(
        _scaled(model, teacher),
        _scaled(model, unlabelled(student)),
        task=task,
        temperature=settings.temperature,
      )
      apart = jnp.where(counts > 0, apart, 0)
      apart = jnp.sum(apart) / jnp.maximum(jnp.sum(counts), 1)
      metrics = {
        objectives.score_name(model): score,
        "task_loss": task_loss,
        "distillation_loss": apart,
        "distillation_weight": scale,
        "distilled": jnp.sum(counts),
      }
      return task_loss + scale * apart, (model_state, metrics)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (model_state, metrics)), grads = grad_fn(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    extra = {**extra, "count": extra["count"] + 1}
    if settings.teacher == "ema":
      extra["teacher"] = weights.moving_average(
        extra["teacher"],
        params,
        decay=settings.ema_decay,
        count=extra["count"],
      )
    state = dataclasses.replace(
      state,
      params=params,
      model_state=model_state,
      opt_state=opt_state,
      extra=extra,
    )
    norm = optax.tree.norm(grads)
    return state, {"loss": loss, **metrics, "gradient_norm": norm}

  return update


def _split(settings: Settings, x):
  """``[b, ...]`` as ``[b / (1 + r), 1 + r, ...]``: the labelled row first."""
  return x.reshape(-1, 1 + settings.unlabelled_ratio, *x.shape[1:])


def _unlabelled_rows(settings: Settings, mixed: bool) -> Callable:
  """``rows(tree)``: those in the places of rows without a label, or all."""
  if not (mixed and settings.unlabelled_ratio):
    return lambda tree: tree

  def rows(x):
    return _split(settings, x)[:, 1:].reshape(-1, *x.shape[1:])

  return functools.partial(jax.tree.map, rows)


def _within(settings: Settings, batch) -> dict:
  """T of what is there."""
  return {
    name: flag & (name in settings.labelled)
    for name, flag in batch["present"].items()
  }


def _of_labels(settings: Settings, logits, batch):
  """(task loss, score) of the rows that have a label."""
  flag = batch.get("labelled")
  if flag is not None:
    # Rows without any modality do not count.
    present = {m: there & flag for m, there in batch["present"].items()}
    batch = {**batch, "present": present}
  loss = objectives.task_loss(
    settings.model,
    logits,
    batch,
    label_smoothing=settings.label_smoothing,
    restraint=settings.restraint,
  )
  return loss, objectives.score(settings.model, logits, batch)


def _scaled(model: Model, logits):
  """Numbers in deviations of the target, as the task loss has them."""
  return logits if model.target is None else logits / model.target.deviation
