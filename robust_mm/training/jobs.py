"""What a phase has due now and then, between its updates."""

from collections.abc import Iterator

import jax

from robust_mm import _compiling
from robust_mm import data
from robust_mm.recipes import Job
from robust_mm.recipes import Phase
from robust_mm.training import context
from robust_mm.training import sharding

# Folded into the run's key: apart from those of updates, which fold in steps.
_KEYS = 0x6A6F6200


class Jobs:
  """The jobs of a phase, each with its own stream of batches."""

  def __init__(self, run: context.Run, phase: Phase, key, *, start, step):
    """``start``: the phase's first step; ``step``: the one the run is at."""
    self._run = run
    self._phase = phase
    self._start = start
    self._pending = []
    out = (run.shardings(phase), sharding.replicated(run.mesh))
    self._jobs = []
    for index, job in enumerate(phase.jobs):
      fn = jax.jit(
        _keyed(job, index),
        donate_argnums=0,
        out_shardings=out,
        compiler_options=None if job.heavy else _compiling.options_for_once(),
      )
      self._jobs.append((job, fn, _stream(run, job, job.times(step - start))))
    self._key = key

  def work(self, step: int, state, batch):
    """The state after whatever is due after the update that made ``step``."""
    for job, fn, stream in self._jobs:
      if not job.due(step - self._start):
        continue
      taken = next(stream)
      taken = (taken, batch) if job.with_training else taken
      state, metrics = fn(state, taken, self._key)
      named = {f"{job.name}_{name}": m for name, m in metrics.items()}
      self._pending.append((step, named))
    return state

  def log(self) -> None:
    """Writes what the jobs have said since the last call."""
    for step, metrics in self._pending:
      row = {name: float(m) for name, m in jax.device_get(metrics).items()}
      self._run.writer.write(step, self._phase.name, row)
    self._pending = []

  def close(self) -> None:
    """Ends the streams."""
    for _, _, stream in self._jobs:
      stream.close()


def _keyed(job: Job, index: int):
  def run(state, batch, run_key):
    key = jax.random.fold_in(run_key, _KEYS + index)
    return job.run(state, batch, jax.random.fold_in(key, state.step))

  return run


def batch_size(job: Job, num_examples: int, mesh) -> int:
  """As wanted, or as many as there are, divisible over the data axis.

  Raises:
    ValueError: not even one example for each device, or fewer than the job can
      do with.
  """
  shards = mesh.shape[sharding.DATA_AXIS]
  size = min(job.batch_size, num_examples) // shards * shards
  if not size:
    raise ValueError(
      f"the {job.name} job needs at least {shards} {job.source} examples in a "
      f"batch, one for each part of the data axis of the mesh; it asks for "
      f"{job.batch_size} of {num_examples}."
    )
  if size < job.min_batch:
    limit = {"train": "max_train_examples", "validation": "max_eval_examples"}
    raise ValueError(
      f"the {job.name} job needs at least {job.min_batch} {job.source} "
      f"examples in a batch, and gets {size}: {job.option} is "
      f"{job.batch_size}, there are {num_examples} in the data, and "
      f"data.{limit[job.source]} limits them."
    )
  return size


def check(phase: Phase, setup, mesh) -> None:
  """Refuses, by name, a job that no batch can be made for."""
  for job in phase.jobs:
    batch_size(job, len(getattr(setup, job.source)), mesh)


def _stream(run: context.Run, job: Job, start: int) -> Iterator:
  source = getattr(run.setup, job.source)
  index, count = sharding.batch_part(run.mesh)
  stream = data.pipeline(
    source,
    batch_size=batch_size(job, len(source), run.mesh),
    seed=run.config.seed,
    start=start,
    process_index=index,
    process_count=count,
  )
  iterator = iter(stream)
  try:
    for batch in iterator:
      yield sharding.put_batch(batch, run.batch_sharding)
  finally:
    iterator.close()
