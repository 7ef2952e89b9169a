"""``robust-mm visualize``: what it writes."""

import dataclasses
import io
import pathlib
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import numpy as np

from robust_mm import _files
from robust_mm import _tasks
from robust_mm import _validate
from robust_mm import evaluation
from robust_mm import visualization
from robust_mm.evaluation import visuals
from robust_mm.training import runs
from robust_mm.training import writers
from robust_mm.visualize_job import asking
from robust_mm.visualize_job import grids

PAGE = "visualization.html"
# Of a question: how much of the answer is made, not what is asked.
_DETAIL = ("modality", "seeds", "num_steps", "controls", "transfer", "seed")
# What the summary shows, and how it is called there.
_SHOWN = {
  "near": "near",
  "far": "far",
  "near alone": "near alone",
  "other probability": "other prob.",
  "other near": "other near",
  "feature_distance": "distance",
}


def run(
  folder: pathlib.Path,
  *,
  question: Mapping[str, Any],
  split: str = "test",
  phase: str | None = None,
  output: str | None = None,
  progress: Callable[..., None] = lambda done, total, text: None,
) -> list[pathlib.Path]:
  """Synthesises, measures, draws and writes; one grid a modality.

  Each grid is ``NAME.png``, ``NAME.json`` (settings, numbers, range of values)
  and ``NAME.npz`` (the inputs) in ``visualization/`` of the run's folder, where
  the report of the run finds them; ``visualization.html`` shows them all, and
  the report of an evaluated run is drawn again. NAME says what is asked, of
  which classes, and the split and phase where they are not the usual; a grid of
  other starts or steps alone replaces the one before.

  Args:
    folder: of the run.
    question: what is asked, the attributes of ``Question`` by name.
    split: of the real items, and of an item that is held fixed.
    phase: whose model; the last by default.
    output: another ``.png`` file for the grid; reports do not find it there.
    progress: ``progress(done, total, text)``.

  Returns:
    The PNG files.

  Raises:
    UserError: a sentence.
  """
  question = asking.Question(**question)
  opened = asking.open_run(folder, split, phase)
  others = asking.open_others(question, opened, folder)
  opened = dataclasses.replace(opened, others=others)
  with _validate.user_errors():
    made = grids.make(opened, question, progress)
  home = folder / visuals.FOLDER
  written = []
  for name, (array, told, arrays) in made.items():
    path = home / f"{_name(name, question, split, phase)}.png"
    if output is not None:
      path = pathlib.Path(output)
      if len(made) > 1:
        path = path.with_stem(f"{path.stem}-{name}")
    visualization.write_png(
      path, array, value_range=told.pop("value_range"), settings=told
    )
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    _files.write_bytes(path.with_suffix(".npz"), buffer.getvalue())
    written.append(path)
  if output is None:
    _draw_pages(folder, opened.dataset)
  return written


def of_evaluation(
  folder: pathlib.Path, *, split: str, phase: str | None, progress: Callable
) -> None:
  """Where the run asks for it, a grid of every modality that can have one."""
  config, facts = runs.read_config(folder), runs.describe(folder)
  # Runs of earlier versions do not state it.
  asked = config.evaluation.get("visualize", False)
  if not asked or runs.task(facts) != _tasks.CLASSIFICATION:
    return
  dataset = config.data.name
  for name in facts["input_shapes"]:
    if facts["kinds"][name] == "float" and asking.kind(facts, dataset, name):
      run(
        folder,
        question={"modality": name, "controls": False},
        split=split,
        phase=phase,
        progress=progress,
      )


def summary(paths: list[pathlib.Path]) -> str:
  """The numbers of the grids as text."""
  lines = []
  for path in paths:
    told = runs.read_json(path.with_suffix(".json"))
    lines.append(told["title"])
    shown = [n for n in _SHOWN if any(n in v for v in told["numbers"].values())]
    width = max(20, *map(len, told["numbers"]))
    heads = "".join(f"{_SHOWN[name]:>12s}" for name in shown)
    lines.append(f"  {'':{width}s}{heads}")
    for row, values in told["numbers"].items():
      cells = [values.get(name) for name in shown]
      cells = ["-" if cell is None else f"{cell:.3f}" for cell in cells]
      told_row = "".join(f"{cell:>12s}" for cell in cells)
      lines.append(f"  {row:{width}s}{told_row}")
    section = visuals.section(path.with_suffix(".json"))
    lines += [f"  note: {note}" for note in section["notes"]]
    lines.append(f"  {section['settings']}")
    lines.append(f"  grid: {path}")
  return "\n".join(lines)


def _draw_pages(folder: pathlib.Path, dataset: str) -> None:
  home = folder / visuals.FOLDER
  sections = [visuals.section(path) for path in sorted(home.glob("*.json"))]
  page = visuals.page(f"What activates the classes of {dataset}", sections)
  _files.write_bytes(folder / PAGE, page.encode())
  results = folder / "results.json"
  if results.is_file():
    evaluation.render(
      [runs.read_json(results)],
      histories=[writers.read(folder)],
      folders=[folder],
      path=folder,
    )


def _name(
  modality: str,
  question: asking.Question,
  split: str = "test",
  phase: str | None = None,
) -> str:
  """A file for each question; one of other detail alone is drawn over."""
  parts = [modality]
  for field in dataclasses.fields(question):
    value = getattr(question, field.name)
    if field.name not in _DETAIL and value != field.default:
      if field.name == "labels":
        parts.append(_classes(value))
        continue
      if isinstance(value, tuple):
        parts += [_slug(f"{option}{value}") for option, value in value]
        continue
      parts.append(f"{'' if isinstance(value, str) else field.name}{value}")
  parts += [split] if split != "test" else []
  # A phase may be called as an answer is, such as joint.
  parts += [f"phase_{phase}"] if phase is not None else []
  return "-".join(parts)


def _classes(labels) -> str:
  first, last = labels[0], labels[-1]
  if len(labels) > 2 and tuple(labels) == tuple(range(first, last + 1)):
    return f"class{first}_to_{last}"
  return f"class{'_'.join(map(str, labels))}"


def _slug(text: str) -> str:
  return "".join(c if c.isalnum() or c in "._" else "_" for c in text)
