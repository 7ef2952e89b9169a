"""What does pretraining give a linear probe, against a random encoder?

  OPENBLAS_NUM_THREADS=1 python benchmarks/pretraining_probe.py \\
    --workdir=runs/probes \\
    --output=benchmarks/results/pretraining_probe_utd_mhad.txt

For every seed and every set T of modalities: a linear head on frozen features
of x_T, of the pretrained encoder and of the same network as it was drawn, on
the same training examples; the step of the probe is chosen on validation
examples. Test accuracy on x_T, and the difference in points with 95 % intervals
of a paired bootstrap over items and seeds. ``--pretrained`` takes runs that are
there, such as ``pretraining/0`` of a study of shift. Target on utd_mhad: 10
points. What is measured is kept in ``--workdir``.
"""

import argparse
import pathlib

import grids
import numpy as np

import robust_mm
from robust_mm import config as config_lib
from robust_mm import modalities
from robust_mm import training
from robust_mm.evaluation import sets
from robust_mm.training import setup as setup_lib


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--workdir", required=True, type=pathlib.Path)
  parser.add_argument("--dataset", default="utd_mhad")
  parser.add_argument(
    "--pretraining",
    nargs="+",
    default=["", ",both"],
    help="variants of configs/pretraining.py, as ,both",
  )
  parser.add_argument(
    "--pretrained",
    type=pathlib.Path,
    help="folder whose SEED are runs of the last of --pretraining",
  )
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--smoke", action="store_true", help="a few steps")
  parser.add_argument("--output", type=pathlib.Path)
  options = parser.parse_args()
  grids.claim(options.workdir, dataset=options.dataset, smoke=options.smoke)
  grids.keep_compiled(options.workdir)
  arms = ("random", *options.pretraining)
  found = {
    arm: [_probes(options, arm, seed) for seed in range(options.seeds)]
    for arm in arms
  }
  table = _table(options, found)
  print(table)
  if options.output:
    options.output.write_text(table + "\n")


def _probes(options, arm: str, seed: int) -> dict:
  """``{T: bool[n]}``: what the probe on T has right of the test split."""
  folder = options.workdir / (arm.strip(",") or "mae") / str(seed)
  small = ",smoke" if options.smoke else ""

  def measure(folder):
    start = ""
    if arm != "random":
      start = folder / "pretraining"
      if options.pretrained and arm == options.pretraining[-1]:
        start = options.pretrained / str(seed)
      else:
        spec = f"configs/pretraining.py:{options.dataset}{arm}{small}"
        training.train(_load(spec, seed), start)
    spec = f"configs/finetune.py:{options.dataset},probe{small}"
    right = {}
    for subset in modalities.subsets(_names(options.dataset)):
      config = _load(spec, seed)
      config.init_from = str(start)
      config.data.labelled = subset
      place = folder / modalities.subset_name(subset)
      training.train(config, place, say=lambda line: None)
      model, params, state, _ = robust_mm.load(place)
      test = setup_lib.open_split(config, "test").batch()
      logits = sets.logits_by_set(model, params, state, test, sets=[subset])
      said = np.argmax(logits[modalities.names(subset)], axis=-1)
      right[modalities.subset_name(subset)] = (said == test["label"]).tolist()
    return right

  return grids.kept(folder, measure)


def _load(spec: str, seed: int):
  return config_lib.load(spec, [f"--config.seed={seed}"])


def _names(dataset: str) -> tuple[str, ...]:
  config = config_lib.load(f"configs/finetune.py:{dataset}")
  return setup_lib.open_split(config, "test", limit=2).modalities


def _table(options, found: dict) -> str:
  random = found["random"]
  names = list(random[0])
  size = len(random[0][names[0]])
  lines = [
    f"{options.dataset}: linear probes of the same modalities in training and "
    f"test, {size} test examples, {options.seeds} seeds",
    "accuracy, mean +- deviation over seeds; difference to random in points "
    "[95 % interval]",
  ]
  for arm, seeds in found.items():
    lines += ["", {"random": "random encoder", "": "mae"}.get(arm, arm[1:])]
    for name in (*names, "mean over sets"):
      scores, first, second = [], [], []
      for own, other in zip(seeds, random):
        chosen = names if name == "mean over sets" else [name]
        first.append(np.mean([own[n] for n in chosen], axis=0))
        second.append(np.mean([other[n] for n in chosen], axis=0))
        scores.append(np.mean(first[-1]))
      line = f"  {name:28s}{grids.spread(scores)}"
      if arm != "random":
        line += f"   {grids.interval(first, second)}"
      lines.append(line)
  return "\n".join(lines)


if __name__ == "__main__":
  main()
