"""What penalties of wrong letters buy a captioner of two modalities.

  OPENBLAS_NUM_THREADS=1 python benchmarks/captions.py \\
    --workdir=runs/captions --output=benchmarks/results/captions_av_digits.txt

Trains configs/captioning.py:av_digits with every penalty (but for published
dispersion) and seed: what is written and what is said differ, "seven three",
and a word is right or wrong by its slot. Then ``evaluation.caption_report``:
captions and words right, clean, under noise, with the image, the sound or both
attacked (linf PGD against the clean caption, at every radius), towards a fixed
sentence, by one step and by random search (both), and in the worst case over
all of these, example by example. At every radius that is compared with the
worst case of cross-entropy, with a 95 % interval (paired bootstrap over
examples and seeds) and its range over seeds. Where the first word is given, as
it is (prompt), with a letter changed (text) or with both attacked besides
(joint), the second word is right or not; these are no part of the worst case.
``distinct_2`` is how many different pairs of words are said, of all: a model
that says the same of everything loses little to an attack. Weights are those of
the configuration, not tuned to equal clean accuracy, and no arm trains on
adversarial inputs. What is measured is kept in --workdir.
"""

import argparse
import functools
import json
import pathlib

import grids
import jax
import numpy as np

import robust_mm
from robust_mm import config as config_lib
from robust_mm import evaluation
from robust_mm import training
from robust_mm.training import setup as setup_lib

SPEC = "configs/captioning.py:av_digits"


def _window(low, high, *more):
  return (f"penalty.options.window=({low}, {high})", *more)


# {row: (variants of the configuration, overrides)}
LOSSES = {
  "cross-entropy": ("", ()),
  "label smoothing .1": (",label_smoothing", ()),
  "confidence penalty .1": (",confidence_penalty", ()),
  "logit norm .01": (",logit_norm", ()),
  "PRSL (0, 2)": (",prsl", _window(0, 2)),
  "PRSL (0, 4)": (",prsl", _window(0, 4)),
  "PRSL (0, 8)": (",prsl", _window(0, 8)),
  "PRSL (0, 4), weight 1": (",prsl", _window(0, 4, "penalty.weight=1.0")),
  "PRSL published (0, 4)": (",prsl,published", _window(0, 4)),
  "DRSL .1": (",drsl", ()),
  "complement KL .1": (",complement_kl", ()),
  "top-4 margin .1": (",topk_margin", _window(0, 4)),
}
REFERENCE = "cross-entropy"
WORST = "worst case"
# {column: (attack, modalities)} of the report, at the largest radius
COLUMNS = {
  "clean": ("clean", ""),
  "noise": ("noise", "audio+image"),
  "image": ("input", "image"),
  "sound": ("input", "audio"),
  "both": ("input", "audio+image"),
  "queries": ("queries", "audio+image"),
  "prompt": ("prompt, clean", ""),
  "text": ("text", ""),
  "joint": ("joint", "audio+image"),
  WORST: (WORST, "audio+image"),
}


def main():
  options = _parser().parse_args()
  grids.claim(
    options.workdir,
    examples=options.examples,
    radii=options.radii,
    steps=options.steps,
    restarts=options.restarts,
    set=sorted(options.set),
    smoke=options.smoke,
  )
  found = {}
  for seed in range(options.seeds):
    for name in options.losses:
      found[name, seed] = grids.kept(
        options.workdir / grids.slug(name) / str(seed),
        functools.partial(_measured, options, name, seed),
      )
      print(json.dumps(_line(name, seed, found[name, seed])), flush=True)
  text = "\n".join(_tables(found, options))
  print(text)
  if options.output:
    options.output.write_text(text + "\n")


def _parser():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument(
    "--losses", nargs="+", default=list(LOSSES), choices=LOSSES
  )
  parser.add_argument("--examples", type=int, default=256)
  parser.add_argument(
    "--radii", type=float, nargs="+", default=[n / 255 for n in (1, 2, 4, 8)]
  )
  parser.add_argument("--steps", type=int, default=50, help="of PGD")
  parser.add_argument("--restarts", type=int, default=5, help="of PGD")
  parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
  parser.add_argument("--smoke", action="store_true", help="a few steps of all")
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path)
  return parser


def _measured(options, name, seed: int, folder: pathlib.Path) -> dict:
  variants, overrides = LOSSES[name]
  variants += ",smoke" if options.smoke else ""
  given = [f"seed={seed}", *overrides, *options.set]
  config = config_lib.load(
    f"{SPEC}{variants}", [f"--config.{setting}" for setting in given]
  )
  training.train(config, folder / "run", say=lambda line: None)
  model, params, state, _ = robust_mm.load(folder / "run")
  test = setup_lib.open_split(
    config, "test", limit=config.data.max_eval_examples
  )
  report = evaluation.caption_report(
    model,
    params,
    test.batch(),
    state=state,
    radii=options.radii,
    num_steps=options.steps,
    num_restarts=options.restarts,
    max_examples=options.examples,
  )
  return {**report, "train_steps": config.num_steps}


# ---- tables


def _row(report: dict, column: str) -> dict:
  attack, names = COLUMNS[column]
  rows = [row for row in report["rows"] if row["attack"] == attack]
  rows = [row for row in rows if not names or row["modalities"] == names]
  return rows[-1]  # the largest radius is the last


def _line(name: str, seed: int, report: dict) -> dict:
  shares = {c: round(_row(report, c)["exact_match"], 4) for c in COLUMNS}
  return {"loss": name, "seed": seed, **shares}


def _tables(found: dict, options):
  seeds = range(options.seeds)
  of = {name: [found[name, s] for s in seeds] for name in options.losses}
  one = next(iter(of.values()))[0]
  yield (
    f"av_digits, captions of {one['num_examples']} test examples, "
    f"{options.seeds} seeds, {one['train_steps']} steps of training, linf up "
    f"to {max(options.radii):.4f}, PGD of {options.steps} steps and "
    f"{options.restarts} restarts, jax {jax.__version__}, "
    f"{jax.devices()[0].device_kind}"
  )
  yield from (f"set {setting}" for setting in options.set)
  yield ""
  yield (
    "captions right at the largest radius, mean over seeds; of prompt, text "
    "and joint the second word, the first one given"
  )
  yield from _by_column(of, lambda row: row["exact_match"])
  for place, radius in enumerate(sorted(options.radii)):
    yield ""
    yield from _worst_cases(of, place, radius)
  slots = list(one["rows"][0]["slots"])
  for slot in slots:
    yield ""
    yield f"words of the {slot} right"
    yield from _by_column(
      of, lambda row, slot=slot: row["slots"].get(slot, np.nan)
    )
  yield ""
  pairs = 100 / one["num_examples"]
  yield (
    f"distinct_2: pairs of words that are said, of all (of 100 at most, "
    f"{min(pairs, 1):.2f})"
  )
  yield from _by_column(of, lambda row: row["distinct_2"])
  yield ""
  yield "both attacked, captions right by radius; towards a fixed sentence"
  heads = [f"{radius:.4f}" for radius in sorted(options.radii)]
  yield grids.row("", [*heads, "reached"], 12, first=26) + "  failed checks"
  for name, reports in of.items():
    cells = [f"{value:.3f}" for value in _by_radius(reports)]
    cells.append(f"{_reached(reports):.3f}")
    failed = sorted(
      {c["name"] for r in reports for c in r["checks"] if not c["passed"]}
    )
    line = grids.row(name, cells, 12, first=26)
    yield f"{line}  {', '.join(failed) or '-'}"


def _worst_cases(of: dict, place: int, radius: float):
  yield (
    f"captions right in the worst case up to {radius:.4f}; sd over seeds; less "
    "that of cross-entropy (range over seeds)"
  )
  for name, reports in of.items():
    worst = [np.mean(r["right"][WORST][place]) for r in reports]
    cells = [f"{np.mean(worst):.3f}"]
    cells.append(f"{np.std(worst, ddof=1):.3f}" if len(worst) > 1 else "-")
    yield (
      grids.row(name, cells, 12, first=26)
      + _difference(reports, of.get(REFERENCE), name, place)
    )


def _by_column(of, value):
  yield grids.row("", COLUMNS, 12, first=26)
  for name, reports in of.items():
    cells = [
      np.mean([value(_row(report, column)) for report in reports])
      for column in COLUMNS
    ]
    cells = ["-" if np.isnan(cell) else f"{cell:.3f}" for cell in cells]
    yield grids.row(name, cells, 12, first=26)


def _by_radius(reports) -> np.ndarray:
  attack, names = COLUMNS["both"]
  return np.mean(
    [
      [
        row["exact_match"]
        for row in report["rows"]
        if (row["attack"], row["modalities"]) == (attack, names)
      ]
      for report in reports
    ],
    axis=0,
  )


def _reached(reports) -> float:
  """How often the attack has the fixed sentence said, as far as known."""
  found = [
    row["success"]
    for report in reports
    for row in report["rows"]
    if row["attack"] == "targeted" and row["success"] is not None
  ]
  return float(np.mean(found)) if found else float("nan")


def _difference(reports, reference, name: str, place: int) -> str:
  if reference is None or name == REFERENCE:
    return ""
  pairs = [
    [report["right"][WORST][place] for report in both]
    for both in zip(reports, reference)
  ]
  apart = [100 * (np.mean(a) - np.mean(b)) for a, b in pairs]
  text = grids.interval(*zip(*pairs))
  return f"{f'{text} ({min(apart):+.1f} to {max(apart):+.1f})':>46s}"


if __name__ == "__main__":
  main()
