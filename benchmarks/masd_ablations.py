"""Which choices of MASD matter: teacher, sets, weight, temperature, examples.

  OPENBLAS_NUM_THREADS=1 python benchmarks/masd_ablations.py \\
    --study=runs/shift --workdir=runs/ablations --seeds=2 \\
    --output=benchmarks/results/masd_ablations_utd_mhad.txt

Goes on from a finished ``robust-mm shift`` of a data set: its pretrained models
and its fine-tuned ones, which are what every arm is measured against. An arm is
the method masd of that study with some keys changed, at the budget that the
study gives it, trained on every single modality; the last ones pretrain anew.
Relative robustness, pooled over pairs, and the difference of every arm from
masd, with a paired 95 % interval over clusters of test examples (two seeds say
little about others). What is measured is kept in ``--workdir``.
"""

import argparse
import pathlib

import grids
import numpy as np

import robust_mm
from robust_mm import config as config_lib
from robust_mm import modalities
from robust_mm import shift_methods
from robust_mm import shift_study
from robust_mm import training
from robust_mm.evaluation import sets
from robust_mm.evaluation import shift
from robust_mm.evaluation import shift_scores

# {arm: (method of a study, keys of one run that change)}
ARMS = {
  "masd": ("masd", {}),
  "teacher ema": ("masd_ema", {}),
  "teacher frozen": ("masd", {"recipe.options.teacher": "frozen"}),
  "teacher of supersets": ("masd_supersets", {}),
  "size first": ("masd", {"recipe.options.distribution": "size_first"}),
  "leave one out": ("masd", {"recipe.options.distribution": "leave_one_out"}),
  "S may be T": ("masd", {"recipe.options.include_labelled": True}),
  "weight 0 (control)": ("masd_control", {}),
  "weight .3": ("masd", {"recipe.options.weight": 0.3}),
  "weight 3": ("masd", {"recipe.options.weight": 3.0}),
  "temperature 2": ("masd", {"recipe.options.temperature": 2.0}),
  "temperature 4": ("masd", {"recipe.options.temperature": 4.0}),
  "no ramp (published)": ("masd_published", {}),
  "other examples: none": ("masd_labelled", {}),
  "from a fresh head": ("masd", {"recipe.options.method": "finetune"}),
}
# {arm: variant of configs/pretraining.py}; None begins from scratch.
STARTS = {
  "masd after mae": "",
  "masd after mae, nothing hidden": "no_hiding",
  "masd after contrasts": "contrastive",
  "masd from scratch": None,
}
KINDS = ("shifted", "matched", "added", "transfer", "mixed")


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--study", required=True, type=pathlib.Path)
  parser.add_argument(
    "--config", default="configs/shift.py:utd_mhad", help="of that study"
  )
  parser.add_argument("--workdir", required=True, type=pathlib.Path)
  parser.add_argument("--seeds", type=int, default=2)
  every = [*ARMS, *STARTS]
  parser.add_argument("--arms", nargs="+", default=every, choices=every)
  parser.add_argument("--output", type=pathlib.Path)
  options = parser.parse_args()
  grids.claim(options.workdir, study=options.config)
  grids.keep_compiled(options.workdir)
  config = config_lib.load(options.config)
  study = shift_study.prepare(config, options.study)
  trains = [(name,) for name in study.names]
  found = {
    arm: np.array(
      [
        [_correct(options, study, arm, t, seed) for t in trains]
        for seed in range(options.seeds)
      ]
    )
    for arm in dict.fromkeys(("masd", *options.arms))
  }
  found["finetune"], matched = _references(options, study, trains)
  report = shift.shift_report(
    found,
    study.names,
    shift_scores.chance_level(study.test["label"]),
    "finetune",
    train_sets=trains,
    test_sets=study.test_sets,
    matched={"finetune": matched},
    clusters=study.clusters,
  )
  lines = [
    f"{options.config}, trained on one modality, {options.seeds} seeds: "
    f"pooled relative robustness",
    grids.row("", KINDS, 12, first=34) + f"{'less masd, shifted':>36s}",
  ]
  for arm in found:
    cells = [f"{report.estimate(arm, kind).value:.3f}" for kind in KINDS]
    line = grids.row(arm, cells, 12, first=34)
    if arm != "masd":
      apart = report.difference(arm, "masd")
      text = f"{apart.value:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}]"
      line += f"{text:>36s}"
    lines.append(line)
  print("\n".join(lines))
  if options.output:
    options.output.write_text("\n".join(lines) + "\n")


def _references(options, study, trains):
  """Fine-tuning of the study: its rows, and its matched scores by E."""
  label = study.test["label"]

  def right(train, seed):
    with np.load(study.place("finetune", train, seed) / "logits.npz") as kept:
      said = [kept[modalities.subset_name(e)] for e in study.test_sets]
    return np.argmax(said, axis=-1) == label

  seeds = range(options.seeds)
  rows = np.array([[right(t, seed) for t in trains] for seed in seeds])
  matched = {
    e: np.array([right(e, s)[study.test_sets.index(e)] for s in seeds])
    for e in study.test_sets
  }
  return rows, matched


def _correct(options, study, arm: str, train, seed: int) -> list:
  """``[E][item]``: what an arm's model has right of the test split."""
  folder = options.workdir / grids.slug(arm) / modalities.subset_name(train)

  def measure(folder):
    config = _configured(options, study, arm, train, seed)
    training.train(config, folder / "run", say=lambda line: None)
    model, params, state, _ = robust_mm.load(folder / "run")
    logits = sets.logits_by_set(
      model, params, state, study.test, sets=study.test_sets
    )
    label = study.test["label"]
    return [
      (np.argmax(logits[e], axis=-1) == label).tolist() for e in study.test_sets
    ]

  return grids.kept(folder / str(seed), measure)


def _configured(options, study, arm: str, train, seed: int):
  name, changes = ARMS.get(arm, ("masd", {}))
  config = shift_methods.configured(study.config, name, train, study.names)
  config.seed = seed
  config.init_from = str(_start(options, study, arm, seed))
  with config.unlocked():
    for key, value in changes.items():
      parent = config
      *path, last = key.split(".")
      for part in path:
        parent = parent[part]
      parent[last] = value
  config_lib.check(config)
  return config


def _start(options, study, arm: str, seed: int) -> pathlib.Path | str:
  """The pretraining that an arm begins from, made where it is not there."""
  if arm not in STARTS:
    return study.start(seed)
  if STARTS[arm] is None:
    return ""
  variant = STARTS[arm]
  config = study.config.copy_and_resolve_references()
  words = [config.data.name, *([variant] if variant else [])]
  config.study.pretraining = f"configs/pretraining.py:{','.join(words)}"
  folder = options.workdir / "pretraining" / (variant or "mae") / str(seed)
  training.train(
    shift_methods.pretraining(config, seed), folder, say=lambda line: None
  )
  return folder


if __name__ == "__main__":
  main()
