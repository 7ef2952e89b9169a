"""What the commands of ``robust-mm`` do, once jax is needed."""

import concurrent.futures
import contextlib
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
from typing import Any

import jax
import ml_collections
import tqdm

from robust_mm import _validate
from robust_mm import certificate_rows
from robust_mm import config as config_lib
from robust_mm import evaluation
from robust_mm import protocols
from robust_mm import shift_study
from robust_mm import smoothed_rows
from robust_mm import training
from robust_mm import visualize_job
from robust_mm import weight_paths
from robust_mm.training import runs
from robust_mm.training import setup as setup_lib
from robust_mm.training import sharding
from robust_mm.training import writers

QUICKSTART = {
  "joint": "configs/joint.py:digits",
  "certified": "configs/crmt.py:digits",
}
# Step 2 of CRMT re-weights modalities that step 1 has weighted already: ten
# seconds, for a judgement that nothing is improved.
_QUICK = {"certified": ["--config.recipe.options.integration_steps=0"]}

_SAY_EVERY = 30.0  # seconds


class _StoppedError(Exception):
  """A job ends because the one beside it has."""


def quickstart(workdir: str, *, seed: int = 0) -> int:
  """Joint baseline and certified model on digits, compared in one report.

  On one CPU device the baseline is made in a thread beside the other: most of
  the time goes into compiling, which a second core can do.
  """
  began = time.perf_counter()
  root = pathlib.Path(workdir)
  stop = threading.Event()

  def make(name: str) -> evaluation.Report | None:
    """The evaluation of one run, None where it was asked to stop."""
    overrides = [f"--config.seed={seed}", *_QUICK.get(name, ())]
    config = config_lib.load(QUICKSTART[name], overrides)
    try:
      if not _train_one(config, root / name, stop).finished:
        stop.set()
        return None
      return _evaluated(root / name, config=config, stop=stop)
    except BaseException:
      stop.set()  # the other one need not go on
      raise

  with concurrent.futures.ThreadPoolExecutor(1) as beside:
    baseline = beside.submit(make, "joint")
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
      # Programs over several devices must start in one order everywhere.
      concurrent.futures.wait([baseline])
    try:
      # SIGTERM reaches the main thread, so the longer one is here.
      certified = make("certified")
    except _StoppedError:
      baseline.result()  # raises the reason
      raise
  if certified is None:
    return 0
  reports = [baseline.result(), certified]
  # One after the other: drawing is not made for threads.
  for name, report in zip(QUICKSTART, reports):
    report.save(root / name, history=writers.read(root / name))
  evaluation.report.render(
    [report.results for report in reports],
    histories=[writers.read(root / name) for name in QUICKSTART],
    folders=[root / name for name in QUICKSTART],
    path=root,
  )
  print()
  _print_table([report.results for report in reports])
  print(
    f"\nreport: {root / 'report.html'}   "
    f"({time.perf_counter() - began:.0f} s since start-up)"
  )
  return 0


def train(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  device_count: int | None = None,
  distributed: bool = False,
) -> int:
  """Trains; 0 at the end and after SIGTERM."""
  _devices(device_count)
  if distributed:
    _join()
  _train_one(config, pathlib.Path(workdir))
  return 0


def evaluate(
  workdir: str,
  *,
  split: str = "test",
  phase: str | None = None,
  radii: tuple[float, ...] | None = None,
  attack: str | None = None,
  limit: int | None = None,
  surrogate: str | None = None,
  device_count: int | None = None,
) -> int:
  """Evaluates a run into its folder and prints the table."""
  _devices(device_count)
  report = _evaluate_one(
    pathlib.Path(workdir),
    split=split,
    phase=phase,
    radii=radii,
    attack=attack,
    limit=limit,
    surrogate=surrogate,
  )
  _print_table([report.results])
  print(f"\nreport: {pathlib.Path(workdir) / 'report.html'}")
  return 0


def certify(
  workdir: str,
  *,
  smoothing: dict | None = None,
  device_count: int | None = None,
  distributed: bool = False,
  **asked: Any,
) -> int:
  """Certificates of a run; ``asked`` as in ``certificate_rows.write``.

  With the source "smoothing", as in ``smoothed_rows.write``.
  """
  _devices(device_count)
  if distributed:
    _join()
  with _interrupted_by_sigterm():
    if asked["source"] == "smoothing":
      return _smooth(pathlib.Path(workdir), smoothing or {}, **asked)
    with _bar() as progress:
      certificate_rows.write(pathlib.Path(workdir), progress=progress, **asked)
  return 0


def _smooth(folder: pathlib.Path, smoothing: dict, **asked: Any) -> int:
  for name in ("source", "fidelity", "max_missing", "norm"):
    del asked[name]  # preflight has refused what they could ask
  asked["radii"] = asked["radii"] or certificate_rows.RADII["l2"]
  given = dict(smoothing)
  if "num_samples" in given:
    given["num_estimation"] = given.pop("num_samples")
  with _bar() as progress:
    smoothed_rows.write(
      folder,
      question=smoothed_rows.Question(**given),
      progress=progress,
      **asked,
    )
  return 0


def shift(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  device_count: int | None = None,
) -> int:
  """The study of modality shift; 0 at the end and after SIGTERM."""
  _devices(device_count)
  folder = pathlib.Path(workdir)
  with _bar() as progress:
    found = shift_study.run(config, folder, progress=progress, say=_say)
  if found is None:
    _say("stopped; the same command goes on")
    return 0
  print((folder / "shift.txt").read_text(), end="")
  print(f"\nreport: {folder / 'shift.html'}")
  return 0


def interpolate(
  workdir: str, *, device_count: int | None = None, **asked: Any
) -> int:
  """The path between two models; ``asked`` as ``weight_paths.trace``."""
  _devices(device_count)
  folder = pathlib.Path(workdir)
  with _bar() as progress:
    found = weight_paths.trace(folder, progress=progress, **asked)
  print(weight_paths.format_table(found))
  print(f"\nplot: {weight_paths.paths(folder, found['limit'])[1]}")
  return 0


def visualize(
  workdir: str, *, device_count: int | None = None, **asked: Any
) -> int:
  """Inputs that activate classes; ``asked`` as ``visualize_job.run``."""
  _devices(device_count)
  folder = pathlib.Path(workdir)
  with _bar() as progress:
    paths = visualize_job.run(folder, progress=progress, **asked)
  print(visualize_job.summary(paths))
  return 0


def report(workdirs: list[str], *, output: str | None = None) -> int:
  """Draws the report of evaluated runs again, from their files."""
  folders = [pathlib.Path(workdir) for workdir in workdirs]
  results = [runs.read_json(folder / "results.json") for folder in folders]
  histories = [writers.read(folder) for folder in folders]
  target = pathlib.Path(output or folders[0])
  with _validate.user_errors():
    evaluation.report.render(
      results, histories=histories, folders=folders, path=target
    )
  _print_table(results)
  page = target if target.suffix == ".html" else target / "report.html"
  print(f"\nreport: {page}")
  return 0


def _train_one(
  config, folder: pathlib.Path, stop: threading.Event | None = None
) -> training.Result:
  with _bar(stop) as progress:
    result = training.train(config, folder, say=_say, progress=progress)
  timing = result.timing
  steps = f"{result.step - result.start} steps"
  if result.start:
    steps += f" (of {result.step}; the others before)"
  _say(
    f"trained {steps} in {timing.get('train', 0):.1f} s "
    f"(set up {timing['setup']:.1f} s, compiled {timing['compile']:.1f} s; "
    f"{timing['total']:.1f} s in all)"
  )
  return result


def _evaluate_one(folder: pathlib.Path, **asked: Any) -> evaluation.Report:
  """``_evaluated``, and written into the run's folder."""
  found = _evaluated(folder, **asked)
  with _bar() as progress:
    visualize_job.of_evaluation(
      folder, split=asked["split"], phase=asked["phase"], progress=progress
    )
  found.save(folder, history=writers.read(folder))
  return found


def _evaluated(
  folder: pathlib.Path,
  *,
  split: str = "test",
  phase: str | None = None,
  radii: tuple[float, ...] | None = None,
  attack: str | None = None,
  limit: int | None = None,
  surrogate: str | None = None,
  config=None,
  stop: threading.Event | None = None,
) -> evaluation.Report:
  model, params, state, stored = training.load(folder, phase=phase)
  config = config or stored
  facts = runs.describe(folder)
  source = setup_lib.open_split(config, split, limit=limit)
  setup_lib.check_same_data(source, facts)
  for note in setup_lib.split_notes(config, split):
    _say(f"note: {note}")
  reference = setup_lib.reference_batch(setup_lib.open_split(config, "train"))
  mesh = sharding.make_mesh()
  with _bar(stop) as progress, _validate.user_errors():
    found = evaluation.evaluate(
      model,
      params,
      source.batch(),
      state=state,
      protocol=protocols.of_run(config, facts, radii, attack),
      seed=config.seed,
      reference=reference,
      dataset=config.data.name,
      recipe=_recipe_name(facts, config),
      progress=progress,
      sharding=sharding.batch_sharding(mesh),
      surrogate=protocols.surrogate(
        surrogate or config.evaluation.get("surrogate", "")
      ),
    )
  return found


def _recipe_name(facts, config) -> str:
  """That of the run, with the penalty of wrong logits beside it."""
  penalty = config.penalty.name if "penalty" in config else ""
  return f"{facts['recipe']} + {penalty}" if penalty else facts["recipe"]


def _devices(count: int | None) -> None:
  if count is not None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def _join() -> None:
  """Joins the job: on SLURM, TPU and the like JAX finds out how by itself.

  Elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say.
  """
  counts = {
    name: int(os.environ[variable])
    for name, variable in (
      ("num_processes", "JAX_NUM_PROCESSES"),
      ("process_id", "JAX_PROCESS_ID"),
    )
    if variable in os.environ
  }
  try:
    jax.distributed.initialize(**counts)
  except (RuntimeError, ValueError) as error:
    raise _validate.UserError(
      f"--distributed: the job cannot be joined: {error}"
    ) from error


def _print_table(results: list[dict]) -> None:
  width = None
  if sys.stdout.isatty():
    width = shutil.get_terminal_size().columns
  print(evaluation.table(results, width=width))


@contextlib.contextmanager
def _interrupted_by_sigterm():
  """SIGTERM stops as Ctrl-C does, so that what is done is kept.

  Only in the main thread, where signals can be caught.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  old = signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, old)


def _say(line: str) -> None:
  tqdm.tqdm.write(line, file=sys.stderr)


@contextlib.contextmanager
def _bar(stop: threading.Event | None = None):
  """``progress(done, total, text)``: a bar on a terminal.

  Elsewhere a line every half minute, so that a log shows a long job is alive.
  Once ``stop`` is set it raises a ``_StoppedError``.
  """
  terminal = sys.stderr.isatty()
  bar = tqdm.tqdm(disable=not terminal, leave=False, dynamic_ncols=True)
  said = time.monotonic()

  def progress(done: int, total: int, text: str = "") -> None:
    nonlocal said
    if stop is not None and stop.is_set():
      raise _StoppedError
    if not terminal and time.monotonic() - said > _SAY_EVERY:
      said = time.monotonic()
      _say(f"{done}/{total} {text}".rstrip())
    bar.total = total
    bar.n = done
    bar.set_description_str(text, refresh=False)
    bar.refresh()

  try:
    yield progress
  finally:
    bar.close()
