"""How much does a recipe certify, next to what an attack leaves of it?

  python benchmarks/certified.py --config=configs/crmt.py:digits \\
    --baseline=configs/joint.py:digits --radii 0.5 --seeds=3 \\
    --certificate=best --output=benchmarks/results/certified_digits.json

Trains a configuration (and a baseline) for every seed, and evaluates both on
the test set: clean accuracy, accuracy under the ensemble of attacks (or
``--attack=pgd``) and certified accuracy, at every radius, for all modalities
together and for each alone, in the units of the configuration. Prints mean and
standard deviation over the seeds. ``--set data.path=...`` and the like override
keys of both.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import tempfile
import time

import numpy as np

import robust_mm
from robust_mm import config as config_lib
from robust_mm import data
from robust_mm import evaluation
from robust_mm import protocols
from robust_mm import training
from robust_mm.training import runs


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--config", required=True)
  parser.add_argument("--baseline")
  parser.add_argument("--radii", type=float, nargs="+", required=True)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--attack", default="auto")
  parser.add_argument("--certificate", default="auto")
  parser.add_argument("--limit", type=int)
  parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
  parser.add_argument("--output", type=pathlib.Path)
  options = parser.parse_args()
  rows = []
  for seed in range(options.seeds):
    for spec in filter(None, (options.baseline, options.config)):
      row = {"config": spec, "seed": seed, **measure(spec, seed, options)}
      print(json.dumps(row), flush=True)
      rows.append(row)
  for spec in dict.fromkeys(row["config"] for row in rows):
    chosen = [row for row in rows if row["config"] == spec]
    print(f"\n{spec}: mean, standard deviation over {len(chosen)} seeds")
    for name in chosen[0]:
      if name not in ("config", "seed"):
        values = np.array([row.get(name, np.nan) for row in chosen], float)
        print(f"  {name:36s} {values.mean():.4f}  {values.std():.4f}")
  if options.output:
    options.output.write_text(json.dumps(rows, indent=1) + "\n")


def measure(spec: str, seed: int, options) -> dict:
  """Accuracies of one run."""
  own = [f"--config.{item}" for item in options.set]
  certificate = options.certificate if spec == options.config else "auto"
  config = config_lib.load(
    spec,
    [
      *own,
      f"--config.seed={seed}",
      f"--config.evaluation.attack={options.attack}",
      f"--config.evaluation.certificate={certificate}",
      "--config.evaluation.tightness=()",
    ],
  )
  with tempfile.TemporaryDirectory() as workdir:
    began = time.perf_counter()
    training.train(config, workdir, say=lambda line: None)
    seconds = time.perf_counter() - began
    model, params, state, config = robust_mm.load(workdir)
    facts = runs.describe(pathlib.Path(workdir))
  path = config.data.path or None
  load = functools.partial(data.load, config.data.name, path=path)
  results = evaluation.evaluate(
    model,
    params,
    load(split="test"),
    state=state,
    reference=load(split="train"),
    protocol=dataclasses.replace(
      protocols.of_run(config, facts, tuple(options.radii)),
      max_examples=options.limit,
      subsets=False,
    ),
    seed=seed,
  ).results
  row = {
    "train_seconds": seconds,
    "evaluate_seconds": results["timing"]["total_seconds"],
    "clean": results["clean"]["accuracy"],
  }
  sound = [entry for entry in results["certified"] if entry["sound"]]
  asked = set(options.radii)
  for word, entries in (
    ("attacked", results["attacked"]),
    ("certified", sound),
  ):
    for entry in entries:
      names = entry["modalities"]
      who = names[0] if len(names) == 1 else "joint"
      if entry["radius"] in asked:
        row[f"{word} {entry['radius']:g} {who}"] = entry["accuracy"]
  return row


if __name__ == "__main__":
  main()
