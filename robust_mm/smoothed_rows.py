"""``robust-mm certify --source=smoothing``: a row per example, resumable."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from robust_mm import _files
from robust_mm import _validate
from robust_mm import smoothing
from robust_mm import training
from robust_mm import unfinished
from robust_mm.evaluation import batches
from robust_mm.evaluation import smoothed
from robust_mm.training import runs
from robust_mm.training import setup as setup_lib
from robust_mm.training import sharding
from robust_mm.training import units as units_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """What is asked, as plain values; it names the partial counts as well.

  Attributes:
    sigma: in units, a number or ``{m: sigma}``; None for the evaluation's.
    keep: ``{m: elements kept}``.
    votes: modalities a vote sees, 0 for noise.
    num_selection: samples that choose the class.
    num_estimation: samples that count it.
    alpha: chance of a wrong certificate, for each example.
    seed: of the noise.
    chunk_size: copies of an example in one forward pass.
  """

  sigma: Any = None
  keep: Any = None
  votes: int = 0
  num_selection: int = 100
  num_estimation: int = 10_000
  alpha: float = 1e-3
  seed: int = 0
  chunk_size: int = smoothing.CHUNK_SIZE


def write(
  folder: pathlib.Path,
  *,
  question: Question,
  radii: tuple[float, ...],
  budgets: tuple[dict[str, float], ...] = (),
  output: str | None = None,
  units: str | None = None,
  split: str = "test",
  phase: str | None = None,
  limit: int | None = None,
  resume: bool = False,
  progress: Callable[..., None] = lambda done, total, text: None,
) -> None:
  """Certifies a split by smoothing, writes the rows, prints the shares.

  Args:
    folder: the run.
    question: the noise and the number of samples.
    radii: l2 sizes of a change, joint and of each modality alone.
    budgets: ``{m: size}`` each, all modalities at once; whole numbers for
      sub-sampled modalities.
    output: the CSV file; ``smoothed.csv`` in the folder by default. Counts of
      an unfinished job lie beside it.
    units: ``"raw"`` or ``"relative"``; the run's evaluation units by default.
    split: of the data.
    phase: whose model to take.
    limit: at most so many examples.
    resume: go on from the counts beside ``output``; without any, begin.
    progress: ``progress(done, total, text)``.

  Raises:
    UserError: a sentence; nothing has been written.
  """
  model, params, state, config = training.load(folder, phase=phase)
  facts = runs.describe(folder)
  units = units or config.evaluation.units
  sizes = units_lib.resolve(units, facts, "--units") or {}
  rows = setup_lib.open_split(config, split, limit=limit)
  setup_lib.check_same_data(rows, facts)
  for note in setup_lib.split_notes(config, split):
    print(f"note: {note}")
  data = batches.host_data(model, rows.batch())
  target = pathlib.Path(output) if output else folder / "smoothed.csv"
  question = _complete(question, config)
  with _validate.user_errors():
    if question.votes:
      found = _votes(model, params, state, data, question.votes)
    else:
      counter = _counter(model, params, state, data, question, sizes)
      told = {**dataclasses.asdict(question), "units": sizes, "split": split}
      del told["alpha"]  # the counts are the same for any
      told["examples"] = unfinished.digest([data.inputs, data.present, data.id])
      told["model"] = unfinished.digest([params, state])
      keeper = unfinished.Keeper(target, told)
      for budget in budgets:  # a mistake there is better found before the job
        counter.certificate(alpha=question.alpha, units=sizes).covers(budget)
      _count(counter, keeper, resume=resume, progress=progress)
      found = counter.certificate(alpha=question.alpha, units=sizes)
    covers = [found.covers(budget) for budget in budgets]
  if jax.process_index() == 0:
    columns = _columns(found, question, data, radii, budgets, covers)
    _files.write_columns(target, columns)
    if not question.votes:
      keeper.forget()
  name = f"{len(rows)} {split} examples"
  print(_headline(found, question, name, units))
  print("\n".join(_lines(found, data, radii, budgets, covers)))
  print(f"rows: {target}")


def _complete(question: Question, config) -> Question:
  """Without any noise named, that of the run's own evaluation."""
  if question.votes or question.sigma is not None or question.keep:
    return dataclasses.replace(
      question, sigma=question.sigma or 0.0, keep=question.keep or {}
    )
  if config.evaluation.certificate != "smoothing":
    raise _validate.UserError(
      "--source=smoothing needs --sigma=..., --keep=... or --votes=...: the "
      "run's configuration names no noise."
    )
  asked = config.evaluation.smoothing
  return dataclasses.replace(
    question, sigma=asked.sigma, keep=asked.keep.to_dict()
  )


def _counter(model, params, state, data, question, units) -> smoothed.Counter:
  return smoothed.make_counter(
    model,
    params,
    state,
    data,
    dataclasses.asdict(question),
    units=units,
    key=jax.random.key(question.seed),
    sharding=sharding.batch_sharding(sharding.make_mesh()),
  )


def _votes(model, params, state, data, keep: int):
  batch = {"inputs": data.inputs, "present": data.present}
  noise = smoothing.modality_votes(keep=keep)
  key = jax.random.key(0)
  return smoothing.certify(model, batch, noise, key, params=params, state=state)


def _count(counter, keeper: unfinished.Keeper, *, resume, progress) -> None:
  """Runs the job to its end, saving it now and then and when it is stopped."""
  if resume:
    _restore(counter, keeper)
  try:
    while counter.done < counter.num_blocks:
      counter.advance()
      progress(counter.done, counter.num_blocks, "smoothing")
      if keeper.due:
        keeper.save(counter.tallies)
  finally:
    # Also at the end: the rows are still to be written.
    if any(tally.any() for tally in counter.tallies.values()):
      keeper.save(counter.tallies)


def _restore(counter, keeper: unfinished.Keeper) -> None:
  arrays = keeper.load()
  if arrays is None:
    return
  try:
    counter.restore({stage: arrays[stage] for stage in smoothed.STAGES})
  except (KeyError, ValueError) as error:
    raise keeper.damaged(error) from error


def _is_counted(found, name: str) -> bool:
  """Whether its radius is a number of elements or modalities, no l2 size."""
  if found.noise.kind == "votes":
    return True
  return found.noise.kept(name) is not None


def _columns(found, question, data, radii, budgets, covers) -> dict:
  """The CSV file: smoothed numbers in columns of that name only."""
  size, votes = data.size, question.votes
  columns = {
    "id": data.id,
    "label": data.label,
    "smoothed_prediction": found.prediction,
    "abstained": found.prediction < 0,
    "correct": found.prediction == data.label,
    "valid": found.valid,
  }
  if not votes:
    columns["p_lower"] = found.p_lower
  columns["votes"] = found.counts.max(axis=-1)
  columns["num_samples"] = [_total(found)] * size
  alone = found.modality_radius
  if found.noise.kind != "mixed":
    columns["smoothed_radius"] = found.radius
  for name in data.names:
    columns[f"smoothed_radius_{name}"] = alone[name]
  for radius in radii:
    word = f"smoothed_stable_at_{radius:g}"
    if found.noise.kind == "gaussian":
      columns[word] = found.radius > radius
    for name in data.names:
      if not _is_counted(found, name):
        columns[f"{word}_{name}"] = alone[name] > radius
  for budget, covered in zip(budgets, covers):
    words = "+".join(f"{name}={value:.9g}" for name, value in budget.items())
    columns[f"smoothed_covers_{words}"] = covered
  columns["alpha"] = [found.alpha] * size
  for name in data.names if not votes else ():
    kept = found.noise.kept(name)
    if kept is None:
      columns[f"sigma_{name}"] = [found.noise.deviation(name)] * size
      columns[f"unit_{name}"] = [found.units[name]] * size
    else:
      columns[f"keep_{name}"] = [kept] * size
  return columns


def _total(found) -> int:
  if found.noise.kind == "votes":
    return len(found.subsets)
  return found.num_estimation


def _headline(found, question, examples: str, units: str) -> str:
  if question.votes:
    return (
      f"certified accuracy of the vote of {len(found.subsets)} choices of "
      f"{question.votes} modalities, {examples}"
    )
  noise = []
  if question.sigma:
    noise.append(f"sigma {_words(question.sigma)} in {units} units, l2 norm")
  if question.keep:
    noise.append(f"elements kept {_words(question.keep)}")
  return (
    f"certified with probability 1 - alpha = {1 - question.alpha:.12g} for "
    f"each example: accuracy of the smoothed classifier, {examples}, "
    f"{', '.join(noise)}, {question.num_estimation} samples"
  )


def _words(value) -> str:
  if not isinstance(value, dict):
    return f"{value:g}"
  return ",".join(f"{name}={size:g}" for name, size in value.items())


def _lines(found, data, radii, budgets, covers) -> list[str]:
  right = (found.prediction == data.label)[data.counted]

  def share(held=True) -> str:
    held = held if held is True else held[data.counted]
    return f"{np.mean(right & held):.4f}" if len(right) else "-"

  abstained = np.mean(found.prediction[data.counted] < 0)
  lines = [f"  smoothed: {share()}, abstained: {abstained:.4f}"]
  alone = found.modality_radius
  if found.noise.kind == "gaussian":
    lines += [
      f"  all by {size:g}: {share(found.radius > size)}" for size in radii
    ]
  for name in data.names:
    if found.noise.kind == "votes":
      lines.append(f"  {name} replaced: {share(np.isinf(alone[name]))}")
    elif _is_counted(found, name):
      middle = np.median(alone[name][data.counted])
      lines.append(f"  {name}: median of {middle:g} elements")
    else:
      lines += [
        f"  only {name} by {size:g}: {share(alone[name] > size)}"
        for size in radii
      ]
  for budget, covered in zip(budgets, covers):
    lines.append(f"  budget {_words(budget)}: {share(covered)}")
  return lines
