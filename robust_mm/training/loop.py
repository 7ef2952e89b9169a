"""The one training loop: every recipe, from a laptop to a pod.

Phases under banners: devices and mesh, data, model, optimizer, state (created
sharded), restore, compile, loop, finish.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import signal
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from robust_mm import _compiling
from robust_mm import _validate
from robust_mm.recipes import Phase
from robust_mm.training import checkpoints
from robust_mm.training import context
from robust_mm.training import jobs as jobs_lib
from robust_mm.training import loading
from robust_mm.training import metrics as metrics_lib
from robust_mm.training import recipe as recipe_lib
from robust_mm.training import runs
from robust_mm.training import selection
from robust_mm.training import setup as setup_lib
from robust_mm.training import sharding
from robust_mm.training import state as state_lib
from robust_mm.training import steps
from robust_mm.training import streams
from robust_mm.training import validation
from robust_mm.training import writers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """How a run ended.

  Attributes:
    step: updates done, by this call and those before it.
    start: those before it.
    finished: False when the run was asked to stop before its end.
    metrics: validation metrics of the model that was kept.
    timing: seconds by part: setup, compile, train, total.
  """

  step: int
  start: int
  finished: bool
  metrics: dict
  timing: dict


def train(
  config: ml_collections.ConfigDict, workdir, *, say=print, progress=None
) -> Result:
  """Trains what a configuration says, from where the folder stands.

  The same call resumes a killed run exactly: bit-identical parameters on the
  same number of devices and processes, and the same batches, with other
  rounding, on another. SIGTERM saves a checkpoint and returns.

  Args:
    config: see ``robust_mm.config.default``.
    workdir: folder of the run; made when missing.
    say: prints one line.
    progress: ``progress(done, total, text)``, called now and then.

  Returns:
    The result; ``finished`` is False after SIGTERM.

  Raises:
    UserError: a mistake in the configuration, the data or the folder.
    NonFiniteError: the loss is not finite; names step and last checkpoint.
  """
  workdir = pathlib.Path(workdir).resolve()
  primary = jax.process_index() == 0
  if not primary:
    say, progress = (lambda line: None), None
  else:
    runs.check_free(workdir)
  stop, started = threading.Event(), time.perf_counter()
  with _on_sigterm(stop):
    plan = _plan(config)
    for note in plan.setup.facts["notes"]:
      say(f"note: {note}")
    # Not before: what is refused leaves no folder.
    with runs.lock(workdir) if primary else contextlib.nullcontext():
      run = _open(config, workdir, plan, say, stop)
      return _train(run, progress, started)


def _train(run: context.Run, progress, started: float) -> Result:
  config, say = run.config, run.say
  run.timing["setup"] = time.perf_counter() - started
  say(
    f"{run.recipe.name} on {config.data.name}: {len(run.setup.train)} "
    f"training examples, {run.recipe.num_steps} steps, "
    f"{_validate.counted(run.mesh.size, 'device')}"
  )
  try:
    result = _run_phases(run, progress)
  finally:
    run.writer.close()
    run.rolling.close()
  run.timing["total"] = time.perf_counter() - started
  return dataclasses.replace(result, timing=dict(run.timing))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
  """All that a configuration asks for, checked, before anything is written."""

  mesh: Any
  setup: setup_lib.Setup
  recipe: Any
  validator: Any


def _plan(config) -> _Plan:
  try:
    # ---- devices and mesh
    mesh = sharding.make_mesh(data=config.mesh.data, model=config.mesh.model)
    sharding.check_batch_size(config.data.batch_size, mesh)
    # ---- data, model
    setup = setup_lib.prepare(config)
    loading.check_start(config, setup.model)
    # ---- optimizer
    recipe = recipe_lib.make(config, setup)
    setup.facts["notes"] += setup_lib.recipe_notes(config, recipe)
    for phase in recipe.phases:
      abstract = context.abstract_state(setup.model, phase)
      sharding.state_shardings(abstract, mesh, config.mesh.rules, phase)
      jobs_lib.check(phase, setup, mesh)
    # A batch larger than the set is refused here.
    streams.training_batches(config, setup, mesh)
    return _Plan(
      mesh=mesh,
      setup=setup,
      recipe=recipe,
      validator=validation.make(config, setup, mesh),
    )
  except ValueError as error:
    raise _validate.UserError(str(error)) from error


def _open(config, workdir, plan: _Plan, say, stop) -> context.Run:
  """The run's files, opened."""
  primary = jax.process_index() == 0
  if primary:
    runs.save_config(workdir, config)
  rolling = checkpoints.Checkpoints(
    workdir / checkpoints.FOLDER / "state",
    keep=config.training.keep_checkpoints,
  )
  facts = _begin(workdir, config, plan.setup, plan.recipe, primary)
  writer = writers.NullWriter()
  if primary:
    writer = writers.Writer(workdir, step=rolling.latest_step or 0)
  return context.Run(
    config=config,
    workdir=workdir,
    setup=plan.setup,
    recipe=plan.recipe,
    mesh=plan.mesh,
    validator=plan.validator,
    rolling=rolling,
    writer=writer,
    say=say,
    timing={"compile": 0.0},
    stop=stop,
    facts=facts,
  )


def _begin(workdir, config, setup, recipe, primary) -> dict:
  """Facts of the run, on disk before the first step."""
  path = workdir / runs.RUN_FILE
  if path.is_file():
    facts = runs.read_json(path)
    labels = ("num_classes", "target")
    for key in ("dataset", *setup_lib.INPUTS, *labels, "num_train"):
      there, here = facts.get(key), setup.facts.get(key)
      if there != here:
        raise _validate.UserError(
          f"the work directory {workdir} holds a run on other data: {key} is "
          f"{there} there and {here} here."
        )
    return facts
  facts = {
    **setup.facts,
    "recipe": recipe.name,
    "seed": config.seed,
    "phases": [
      {"name": phase.name, "num_steps": phase.num_steps}
      for phase in recipe.phases
    ],
    "finished": {},
  }
  if primary:
    runs.save_facts(workdir, facts)
  return facts


def _run_phases(run: context.Run, progress) -> Result:
  # ---- state, created sharded; restored where there is a checkpoint
  phases = run.recipe.phases
  done = run.rolling.latest_step or 0
  index, start = run.recipe.locate(done)
  if done:
    state = _restore(run, phases[min(index, len(phases) - 1)])
    run.say(f"resumed at step {done} of {run.recipe.num_steps}")
  else:
    state = _initial(run, phases[0])
  for position in range(index, len(phases)):
    phase = phases[position]
    with contextlib.closing(_batches(run, phase, state)) as batches:
      state, stopped = _run_phase(run, phase, state, start, batches, progress)
    if stopped:
      return Result(
        step=int(state.step), start=done, finished=False, metrics={}, timing={}
      )
    state = selection.finish_phase(run, position, state)
    start += phase.num_steps
    if position + 1 < len(phases):
      state = _enter(run, phases[position + 1], state)
    run.rolling.save(start, state_lib.stored(state))
  kept = run.facts["finished"][phases[-1].name]["metrics"]
  return Result(step=start, start=done, finished=True, metrics=kept, timing={})


def _initial(run: context.Run, phase: Phase) -> state_lib.TrainState:
  """The first state, every array created, or read, where it lives."""
  if run.config.get("init_from"):
    run.say(f"starts from the model of {run.config.init_from}")
    return _enter(run, phase, loading.start(run, phase))
  average = run.average_decay(phase) > 0
  create = state_lib.initializer(run.setup.model, phase, average=average)
  key, _ = _keys(run.config.seed)
  compiled = jax.jit(
    create,
    out_shardings=run.shardings(phase),
    compiler_options=_compiling.options_for_once(),
  )
  return compiled(key)


def _keys(seed: int):
  """(of the first parameters, of the steps)."""
  return jax.random.split(jax.random.key(seed))


def _restore(run: context.Run, phase: Phase) -> state_lib.TrainState:
  abstract = checkpoints.abstract_like(
    run.abstract(phase), run.shardings(phase)
  )
  tree = run.rolling.restore(state_lib.stored(abstract))
  return state_lib.TrainState(**tree)


def _enter(run: context.Run, phase: Phase, state) -> state_lib.TrainState:
  """The state at the beginning of a later phase."""
  average = run.average_decay(phase) > 0

  def create(step, params, model_state):
    key, _ = _keys(run.config.seed)
    return state_lib.create(
      step, params, model_state, phase, key, average=average
    )

  enter = jax.jit(
    create,
    out_shardings=run.shardings(phase),
    compiler_options=_compiling.options_for_once(),
  )
  return enter(state.step, state.params, state.model_state)


def _run_phase(run: context.Run, phase: Phase, state, start, batches, progress):
  """Steps to the end of the phase; (state, whether asked to stop)."""
  end = start + phase.num_steps
  # Made on the mesh: a process cannot put an array on devices of others.
  key = jax.jit(
    lambda: _keys(run.config.seed)[1],
    out_shardings=sharding.replicated(run.mesh),
  )()
  batch = next(batches)
  # ---- compile
  began = time.perf_counter()
  step_fn = jax.jit(
    steps.make_train_step(
      phase,
      steps.projection(run.setup.model, phase),
      average_decay=run.average_decay(phase),
      start=start,
    ),
    donate_argnums=0,
    out_shardings=(run.shardings(phase), sharding.replicated(run.mesh)),
  )
  step_fn = step_fn.lower(state, batch, key).compile()
  run.timing["compile"] += time.perf_counter() - began
  # ---- loop
  began = time.perf_counter()
  seen = metrics_lib.Accumulator()
  clock = _Clock(progress, run.recipe.num_steps)
  best = selection.Best(run, phase)
  step, stopped = int(state.step), False
  jobs = jobs_lib.Jobs(run, phase, key, start=start, step=step)
  while step < end:
    state, step_metrics = step_fn(state, batch, key)
    step += 1
    seen.push(step, step_metrics)
    state = jobs.work(step, state, batch)
    stopping = _should_stop(run, step, start)
    saving = stopping or _due(step, start, run.config.training.checkpoint_every)
    if saving or step == end:
      # What is saved has been looked at: no checkpoint holds a NaN.
      _log(run, phase, step, seen, clock)
      jobs.log()
    elif _due(step, start, run.config.training.log_every):
      # The newest step may still be computing; it is read a period later.
      _log(run, phase, step, seen, clock, newest=False)
      jobs.log()
    if _due(step, start, run.config.training.eval_every) or step == end:
      best.consider(step, state)
    if step < end:
      if saving:
        run.rolling.save(step, state_lib.stored(state))
      if stopping:
        run.say(f"stopped at step {step}; the same command goes on from here")
        stopped = True
        break
      batch = next(batches)
  if not stopped:
    best.close()
  jobs.close()
  run.timing["train"] = (
    run.timing.get("train", 0.0) + time.perf_counter() - began
  )
  return state, stopped


def _batches(run: context.Run, phase: Phase, state):
  """Device batches: streamed, or one prepared batch again and again.

  Update ``i`` of a run takes batch ``i`` of the stream, so the step is all that
  a checkpoint has to say about the data.
  """
  if phase.prepare is None:
    start = int(state.step)
    stream = streams.training_batches(
      run.config, run.setup, run.mesh, start=start
    )
    with contextlib.closing(iter(stream)) as iterator:
      for batch in iterator:
        yield sharding.put_batch(batch, run.batch_sharding)
  else:
    yield from itertools.repeat(
      validation.whole_set(run.setup, run.config, run.mesh, phase, state)
    )


def _due(step: int, start: int, period: int) -> bool:
  return (step - start) % period == 0


def _log(
  run: context.Run, phase: Phase, step: int, seen, clock, *, newest: bool = True
) -> None:
  try:
    row = seen.mean(newest=newest)
  except metrics_lib.NonFiniteError as error:
    saved = run.rolling.latest_step
    where = f"the last good checkpoint is of step {saved}"
    raise metrics_lib.NonFiniteError(
      f"{error} of phase {phase.name!r}; "
      f"{where if saved is not None else 'no checkpoint was saved before'}. "
      f"Lower config.optimizer.lr, or look at the data near that step."
    ) from error
  if row:
    run.writer.write(step, phase.name, row)
    clock.tick(step, f"{phase.name}: loss {row['loss']:.4f}")


def _should_stop(run: context.Run, step: int, start: int) -> bool:
  if jax.process_count() == 1:
    return run.stop.is_set()
  # All processes must agree, so they ask each other once a log period.
  if not _due(step, start, run.config.training.log_every):
    return False
  asked = sharding.gather(jnp.asarray([run.stop.is_set()]))
  return bool(np.any(asked))


class _Clock:
  """Tells the progress bar, and nobody when there is none."""

  def __init__(self, progress, total: int):
    self._progress = progress
    self._total = total

  def tick(self, step: int, text: str) -> None:
    if self._progress is not None:
      self._progress(step, self._total, text)


@contextlib.contextmanager
def _on_sigterm(stop: threading.Event):
  """SIGTERM asks the loop to save and end, a second one ends at once.

  Only in the main thread, where signals can be caught.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def ask(*_):
    stop.set()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

  old = signal.signal(signal.SIGTERM, ask)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, old)
