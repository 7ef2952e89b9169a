"""``robust-mm certify``: what a run's certificates say, a row per example."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import _files
from robust_mm import _validate
from robust_mm import certification
from robust_mm import data
from robust_mm import training
from robust_mm import unfinished
from robust_mm.evaluation import bounds
from robust_mm.training import runs
from robust_mm.training import setup as setup_lib
from robust_mm.training import sharding
from robust_mm.training import units as units_lib

# Every entry may move by a size of linf, so it is a much smaller one.
RADII = {
  "l2": (0.1, 0.25, 0.5),
  "linf": (0.01, 0.02, 0.05),
  "l1": (0.1, 0.25, 0.5),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """What is asked of every certificate.

  Attributes:
    radii: sizes of the joint ball and of each modality alone.
    budgets: ``{m: size}`` each, all modalities at once.
    max_missing: how many modalities may go missing besides every budget.
    norm: ``"l2"``, ``"linf"`` or ``"l1"``, of a modality and of the joint ball.
    units: ``{m: raw size of one unit}``, or None for 1.
    fidelity: ``"corrected"`` or ``"published"``.
    source: of ``certification.certify``.
  """

  radii: tuple[float, ...]
  budgets: tuple[dict[str, float], ...]
  max_missing: int
  norm: str
  units: Any
  fidelity: str
  source: str = "global"


def write(
  folder: pathlib.Path,
  *,
  radii: tuple[float, ...] | None = None,
  budgets: tuple[dict[str, float], ...] = (),
  max_missing: int = 0,
  output: str | None = None,
  source: str | None = None,
  units: str | None = None,
  norm: str | None = None,
  fidelity: str = "corrected",
  split: str = "test",
  phase: str | None = None,
  limit: int | None = None,
  resume: bool = False,
  progress: Callable[..., None] = lambda done, total, text: None,
) -> None:
  """Certifies a split of a run's data, writes the rows, prints the shares.

  Args:
    folder: the run.
    radii: see ``Question``, as ``budgets``, ``max_missing`` and ``fidelity``;
      ``RADII`` of the norm by default.
    output: the CSV file; ``certificates.csv`` in the folder by default.
    source: of ``certification.certify``; None for ``"global"``, or with
      ``fidelity="published"`` for ``"empirical"``.
    units: ``"raw"`` or ``"relative"``; the run's evaluation units by default.
    norm: the run's evaluation norm by default.
    split: of the data.
    phase: whose model to take.
    limit: at most so many examples.
    resume: go on from the rows beside ``output`` that a stopped job has left;
      without any, begin.
    progress: ``progress(done, total, text)``, in examples.

  Raises:
    UserError: a sentence; nothing has been written.
  """
  model, params, state, config = training.load(folder, phase=phase)
  facts = runs.describe(folder)
  units = units or config.evaluation.units
  if source is None:
    source = "empirical" if fidelity == "published" else "global"
  norm = norm or config.evaluation.norm
  radii = RADII[norm] if radii is None else radii
  question = Question(
    # Twice the same is one column.
    radii=tuple(dict.fromkeys(map(float, radii))),
    budgets=_distinct(budgets or (({},) if max_missing else ())),
    max_missing=max_missing,
    norm=norm,
    units=units_lib.resolve(units, facts, "--units", norm),
    fidelity=fidelity,
    source=source,
  )
  rows = setup_lib.open_split(config, split, limit=limit)
  setup_lib.check_same_data(rows, facts)
  for note in setup_lib.split_notes(config, split):
    print(f"note: {note}")
  target = pathlib.Path(output) if output else folder / "certificates.csv"
  batch = rows.batch()
  with _validate.user_errors():
    tables = _tables(model, params, state, config, source, fidelity)
    size = config.evaluation.batch_size
    size = size if tables is not None else min(size, bounds.BALL_BATCH)
    keeper = unfinished.Keeper(
      target,
      {
        **dataclasses.asdict(question),
        "split": split,
        "examples": unfinished.digest(batch),
        "model": unfinished.digest([params, state]),
      },
    )
    answers = _answers(model, params, state, tables, question, rows, size)
    done = _done(keeper, len(rows)) if resume else {}
    found = _nested(_kept(answers, done, len(rows), keeper, progress))
  sound = bool(found["sound"].all())
  columns = _columns(found, question, batch, sound=sound)
  if jax.process_index() == 0:
    _files.write_columns(target, columns)
    keeper.forget()
  word = "certified" if sound else "estimated (not certified)"
  print(
    f"{word} accuracy, {len(rows)} {split} examples, {question.norm} norm, "
    f"{units} units"
  )
  right = found["prediction"] == batch["label"]
  reach = {} if tables is None else tables.reach or {}
  bounded = {name: batch["present"][name] for name in reach}
  print("\n".join(_lines(found, question, right, bounded)))
  print(f"rows: {target}")


def _tables(model, params, state, config, source, fidelity):
  """What holds for all rows; None where every row has bounds of its own."""
  if source in certification.BALL_SOURCES:
    return None
  reference = None
  if source == "empirical":
    train = setup_lib.open_split(config, "train")
    reference = setup_lib.reference_batch(train)
  form = "split" if fidelity == "published" else "difference"
  return bounds.make_tables(
    model, params, state, source=source, reference=reference, form=form
  )


def _done(keeper: unfinished.Keeper, size: int) -> dict:
  """Rows that a stopped job has left, of all columns the same ones."""
  arrays = keeper.load() or {}
  lengths = {len(value) for value in arrays.values()}
  whole = len(lengths) == 1 and max(lengths) <= size and "prediction" in arrays
  if arrays and not whole:
    raise keeper.damaged("its columns differ in length")
  return arrays


def _answers(model, params, state, tables, question, rows, batch_size):
  """``answers(start)`` yields the columns of every batch from that row on."""
  mesh = sharding.make_mesh()
  # From the host: of several processes each has its own copy.
  params, state, tables = jax.device_put(
    jax.device_get((params, state, tables)), sharding.replicated(mesh)
  )

  @jax.jit
  def run(params, state, tables, batch):
    found = certification.certify(
      model,
      params,
      batch,
      state=state,
      tables=tables,
      units=question.units,
      norm=question.norm,
      fidelity=question.fidelity,
      source=question.source,
    )
    names = found.sources or (found.source,)
    return {
      "prediction": found.prediction,
      "radius": found.joint_radius(question.norm),
      **{
        f"modality_radius/{name}": reach
        for name, reach in found.modality_radius.items()
      },
      "nearest_class": found.joint_nearest_class(question.norm),
      "valid": found.valid,
      "source": _codes(found, names),
      # The certificate's own word: sound tables do not make it sound.
      "sound": jnp.full(found.valid.shape, found.sound),
      **{
        f"covers/{index}": found.covers(budget, question.max_missing)
        for index, budget in enumerate(question.budgets)
      },
    }

  batch_size = sharding.padded_size(batch_size, len(rows), mesh)

  def answers(start: int):
    return sharding.each_batch(
      lambda batch: run(params, state, tables, batch),
      data.evaluation_batches(rows, batch_size, start=start),
      sharding.batch_sharding(mesh),
    )

  return answers


def _kept(answers, done: dict, size: int, keeper, progress) -> dict:
  """All rows of ``answers(start)``, saved now and then and when it stops."""
  pieces = [done] if done else []
  start = len(done["prediction"]) if done else 0
  try:
    for piece in answers(start):
      pieces.append(piece)
      start += len(piece["prediction"])
      progress(start, size, "certificates")
      if keeper.due:
        keeper.save(_joined(pieces))
  finally:
    # Stopped, or at the end: the file of rows is still to be written.
    if pieces:
      keeper.save(_joined(pieces))
  return _joined(pieces)


def _joined(pieces: list[dict]) -> dict:
  return {
    name: np.concatenate([piece[name] for piece in pieces])
    for name in pieces[0]
  }


def _nested(flat: dict) -> dict:
  """``modality_radius`` as ``{m: [n]}``, ``covers`` as a list."""
  found = {name: value for name, value in flat.items() if "/" not in name}
  found["modality_radius"] = {
    name.partition("/")[2]: value
    for name, value in flat.items()
    if name.startswith("modality_radius/")
  }
  covers = [name for name in flat if name.startswith("covers/")]
  found["covers"] = [flat[f"covers/{i}"] for i in range(len(covers))]
  return found


def _codes(found, names):
  """Positions in ``certification.SOURCES`` of what gave each radius."""
  codes = jnp.asarray([certification.SOURCES.index(name) for name in names])
  if found.radius_source is None:
    return jnp.full(found.valid.shape, codes[0])
  return codes[found.radius_source]


def _columns(found, question, batch, *, sound: bool) -> dict:
  """The CSV file; what is no guarantee says so in its name."""
  prefix = "" if sound else "estimated_"
  alone = sorted(found["modality_radius"].items())
  columns = {
    "id": batch["id"],
    "label": batch["label"],
    "prediction": found["prediction"],
    "correct": found["prediction"] == batch["label"],
    f"{prefix}radius": found["radius"],
  }
  for name, reach in alone:
    columns[f"{prefix}radius_{name}"] = reach
  columns["nearest_class"] = found["nearest_class"]
  columns["valid"] = found["valid"]
  columns["source"] = [certification.SOURCES[i] for i in found["source"]]
  # About the prediction, right or wrong: "certified accuracy" needs both.
  for radius in question.radii:
    columns[f"{prefix}stable_at_{_written(radius)}"] = found["radius"] > radius
  for radius in question.radii:
    for name, reach in alone:
      columns[f"{prefix}stable_at_{_written(radius)}_{name}"] = reach > radius
  for budget, covered in zip(question.budgets, found["covers"]):
    words = [f"{name}={_written(size)}" for name, size in budget.items()]
    if question.max_missing:
      words.append(f"max_missing={question.max_missing}")
    columns[f"{prefix}covers_{'+'.join(words)}"] = covered
  # A radius without its norm and units says nothing.
  size = len(batch["id"])
  columns["norm"] = [question.norm] * size
  for name, _ in alone:
    columns[f"unit_{name}"] = [(question.units or {}).get(name, 1.0)] * size
  return columns


def _lines(found, question, right, bounded) -> list[str]:
  """Accuracies: a table of radii, then one line a budget.

  Only a modality with a bounded embedding may be replaced by anything;
  ``bounded`` says which examples have it.
  """
  counted = found["valid"]
  names = sorted(found["modality_radius"])
  reaches = [found["radius"], *(found["modality_radius"][n] for n in names)]
  table = [["radius", "joint", *(f"only {name}" for name in names)]]
  table.append(["clean", *[_share(right, counted)] * len(reaches)])
  for radius in question.radii:
    shares = [_share(right & (reach > radius), counted) for reach in reaches]
    table.append([_written(radius), *shares])
  widths = [max(map(len, column)) for column in zip(*table)]
  lines = [
    "  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in table
  ]
  for name, here in sorted(bounded.items()):
    # What is not there cannot be replaced.
    replaced = np.isinf(found["modality_radius"][name])
    lines.append(
      f"  {name} replaced: {_share(right & replaced, counted & here)}"
    )
  for budget, covered in zip(question.budgets, found["covers"]):
    sizes = ",".join(f"{m}={_written(size)}" for m, size in budget.items())
    words = [f"budget {sizes}"] if budget else []
    if question.max_missing:
      words.append(f"any {question.max_missing} missing")
    share = _share(right & covered, counted)
    lines.append(f"  {', '.join(words)}: {share}")
  return lines


def _share(hits, counted) -> str:
  return f"{np.mean(hits[counted]):.4f}" if counted.any() else "-"


def _written(size: float) -> str:
  """The shortest digits that no other float has, so that no columns meet."""
  return np.format_float_positional(size, trim="-")


def _distinct(budgets) -> tuple[dict[str, float], ...]:
  """Sorted by name, each once: the order of names is no other budget."""
  ordered = [{m: float(b[m]) for m in sorted(b)} for b in budgets]
  return tuple({tuple(b.items()): b for b in ordered}.values())
