"""Which model of a phase is kept: by validation score, or by judgement."""

import dataclasses
import pathlib

import jax

from robust_mm import _validate
from robust_mm.recipes import Phase
from robust_mm.training import checkpoints
from robust_mm.training import context
from robust_mm.training import runs
from robust_mm.training import sharding
from robust_mm.training import state as state_lib
from robust_mm.training import steps
from robust_mm.training import validation


class Best:
  """Keeps the model of a phase that validation prefers, on disk.

  Of models of the same score the latest: where a validation set is small, many
  scores are equal, and the first of them is the model that is trained least.
  """

  def __init__(self, run: context.Run, phase: Phase):
    self._run = run
    self._phase = phase
    choose = steps.candidate(
      run.setup.model, phase, average=run.average_decay(phase) > 0
    )
    self._choose = None if choose is None else jax.jit(choose)
    self._evaluate = validation.own(run.config, run.setup, run.mesh, phase)
    self._store = checkpoints.Checkpoints(
      checkpoints.best(run.workdir, phase.name), keep=1
    )

  def consider(self, step: int, state) -> None:
    """Validates, writes the metrics, saves unless what is there is better."""
    run = self._run
    params = state.params
    if self._choose is not None:
      params = self._choose(params, state.average)
    if self._evaluate is None:
      metrics = run.validator(params, state.model_state)
    else:
      metrics = self._evaluate(dataclasses.replace(state, params=params))
    named = {f"validation_{name}": value for name, value in metrics.items()}
    run.writer.write(step, self._phase.name, named)
    latest = self._store.latest_step
    if latest is not None and step <= latest:
      # A resumed run: before the kill what lies there was preferred to this
      # very model, or is it.
      return
    metric = validation.metric(run.config, run.setup)
    chosen = metric != "last" and not self._phase.judges_last
    if latest is not None and chosen:
      held = validation.score(self._store.metrics(), metric)
      if validation.score(metrics, metric) < held:
        return
    model = {"params": params, "model_state": state.model_state}
    self._store.save(step, model, metrics=metrics)

  def close(self) -> None:
    self._store.close()


def finish_phase(
  run: context.Run, position: int, state
) -> state_lib.TrainState:
  """Takes the phase's selected model, or refuses it; records which."""
  phase = run.recipe.phases[position]
  name, sentence = phase.name, ""
  abstract = _model_like(state)
  model, metrics, step = read_model(run.workdir, name, abstract)
  if phase.judge is not None:
    previous = run.recipe.phases[position - 1].name
    earlier = run.facts["finished"][previous]["model"]
    before = read_model(run.workdir, earlier, abstract)
    accepted, sentence = _judged(run, phase, before[0], model)
    if phase.binding and not accepted:
      name, (model, metrics, step) = earlier, before
  run.facts["finished"][phase.name] = {
    "model": name,
    "step": step,
    "metrics": metrics,
    "verdict": sentence,
  }
  if jax.process_index() == 0:
    runs.save_facts(run.workdir, run.facts)
  radius = {"certified_accuracy": f" at {run.config.selection.radius:g}"}
  shown = ", ".join(
    f"{k}{radius.get(k, '')} {v:.4f}" for k, v in metrics.items()
  )
  run.say(
    f"phase {phase.name}: {sentence + '; ' if sentence else ''}keeps the "
    f"{name} model of step {step}, validation {shown}"
  )
  return dataclasses.replace(state, **model)


def _judged(run: context.Run, phase: Phase, before, after) -> tuple[bool, str]:
  """The phase's own judgement on validation, and what it means, in words."""
  cached = validation.cached_outputs(
    run.setup, run.config, run.mesh, run.setup.validation, after
  )
  accepted, sentence = phase.judge(
    before["params"],
    after["params"],
    after["model_state"],
    sharding.put_global(cached, sharding.replicated(run.mesh)),
    run.setup.reference,
  )
  if phase.binding:
    verdict = "accepted" if accepted else "no improvement, not taken"
  else:
    verdict = (
      f"kept without a question; acceptance would have "
      f"{'taken' if accepted else 'refused'} it"
    )
  return accepted, f"{verdict}: {sentence}"


def _model_like(state: state_lib.TrainState):
  tree = {"params": state.params, "model_state": state.model_state}
  return checkpoints.abstract_like(
    tree, jax.tree.map(lambda x: x.sharding, tree)
  )


def read_model(workdir: pathlib.Path, phase: str, abstract):
  """(``{"params", "model_state"}``, metrics, step) kept by a phase."""
  store = _open(workdir, phase)
  try:
    step = store.latest_step
    return store.restore(abstract), store.metrics(), step
  finally:
    store.close()


def misfits(workdir: pathlib.Path, phase: str, abstract) -> list[str]:
  """What differs between a phase's model and a tree, leaf by leaf."""
  store = _open(workdir, phase)
  try:
    return store.misfits(abstract)
  finally:
    store.close()


def _open(workdir: pathlib.Path, phase: str) -> checkpoints.Checkpoints:
  folder = checkpoints.best(workdir, phase)
  missing = _validate.UserError(
    f"{workdir} holds no model of phase {phase!r}: {folder} has no checkpoint."
  )
  if not folder.is_dir():
    raise missing
  store = checkpoints.Checkpoints(folder, keep=1, reading=True)
  if store.latest_step is None:
    store.close()
    raise missing
  return store
