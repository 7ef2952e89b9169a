"""Does ModalImmune beat what is simpler, at the same gradient budget?

  python benchmarks/immunity_grid.py --dataset=utd_mhad --seeds=5 \\
    --workdir=runs/grid --output=benchmarks/results/immunity_utd_mhad.json

Trains every arm (a variant of ``configs/modal_immune.py``, and a specialist for
every subset of modalities) for every seed, with the same encoders, data,
augmentation, averaging and number of steps, and measures on the test split:
accuracy with every availability set, mean corruption score with one modality
corrupted at a time and with all at once, accuracy at missing rates. Tables have
mean and standard deviation over seeds, and the paired difference to an arm with
its 95 % interval over seeds and examples. What is done is kept in ``--workdir``
and not done again: the same command goes on where it stopped. ``--set
data.path=...`` overrides keys of all arms.
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

import robust_mm
from robust_mm import config as config_lib
from robust_mm import corruptions
from robust_mm import missing
from robust_mm import modalities
from robust_mm import training
from robust_mm.evaluation import metrics
from robust_mm.training import setup as setup_lib

BASELINES = ("joint", "leave_one_out", "random_subset", "every_subset")
FULL = "full"
ABLATIONS = (
  "no_consistency",
  "no_damage",
  "no_collapse",
  "no_spectral",
  "l2",
  "no_gate",
  "uniform",
  "fixed",
  "no_reconstruction",
  "published",
)
RATES = (0.1, 0.3, 0.5, 0.7)
PLACES = ("each", "all")


def main():
  options = _parser().parse_args()
  arms = options.arms or (*BASELINES, FULL, *ABLATIONS)
  found = {}
  for seed in range(options.seeds):
    for arm in arms:
      found[arm, seed] = _kept(options, arm, seed, _measured)
      print(json.dumps(_line(arm, seed, found[arm, seed])), flush=True)
    if options.specialists:
      found["specialists", seed] = _kept(
        options, "specialists", seed, _specialists
      )
  text = "\n".join(_tables(found, options))
  print(text)
  if options.output:
    options.output.write_text(text + "\n")


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--dataset", default="utd_mhad")
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--arms", nargs="*", default=[])
  parser.add_argument("--specialists", action="store_true")
  parser.add_argument("--against", default="every_subset")
  parser.add_argument("--severities", type=int, nargs="+", default=[1, 3, 5])
  parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path)
  return parser


def _kept(options, arm: str, seed: int, measure) -> dict:
  """A measurement, from its file where it has been made."""
  folder = options.workdir / arm / str(seed)
  path = folder / "measured.json"
  if not path.is_file():
    found = measure(options, arm, seed, folder)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(found))
    scratch.replace(path)
  return json.loads(path.read_text())


def _measured(options, arm: str, seed: int, folder: pathlib.Path) -> dict:
  variants = [] if arm == FULL else [arm]
  argument = ",".join([options.dataset, *variants])
  run, timing, steps = _train(options, argument, seed, folder)
  model, data, reference = run
  every = modalities.subsets(data["inputs"])
  return {
    "correct": {
      modalities.subset_name(subset): _right(
        model, modalities.restrict(data, subset)
      )
      for subset in every
    },
    "average_precision": _average_precision(model, data),
    "corrupted": {
      place: _corrupted(model, data, reference, place, options.severities)
      for place in PLACES
    },
    "missing": {str(rate): _missing(model, data, rate) for rate in RATES},
    "milliseconds_a_step": 1e3 * timing["train"] / steps,
  }


def _specialists(options, arm: str, seed: int, folder: pathlib.Path) -> dict:
  """One model for each subset, trained on it and seeing nothing else."""
  del arm
  spec = f"configs/modal_immune.py:{options.dataset},joint"
  names = config_lib.load(spec, _overrides(options, seed))
  names = setup_lib.open_split(names, "test").spec
  correct = {}
  for subset in modalities.subsets(names):
    name = modalities.subset_name(subset)
    (model, data, _), _, _ = _train(
      options,
      f"{options.dataset},joint",
      seed,
      folder / name,
      [f"--config.data.modalities={','.join(subset)}"],
    )
    correct[name] = _right(model, data)
  return {"correct": correct}


def _overrides(options, seed: int) -> list[str]:
  given = [f"--config.{setting}" for setting in options.set]
  return [f"--config.seed={seed}", *given]


def _train(options, argument: str, seed: int, folder, more=()):
  """((predict, test data, a part of the training data), seconds, steps)."""
  config = config_lib.load(
    f"configs/modal_immune.py:{argument}",
    [*_overrides(options, seed), *more],
  )
  folder.mkdir(parents=True, exist_ok=True)
  began = time.perf_counter()
  result = training.train(config, folder / "run", say=lambda line: None)
  timing = result.timing
  model, params, state, _ = robust_mm.load(folder / "run")
  print(f"{argument} {seed}: {time.perf_counter() - began:.0f} s", flush=True)

  @jax.jit
  def logits(inputs, present):
    outputs, _ = model.apply(params, state, inputs, present)
    return outputs.logits

  data = jax.tree.map(jnp.asarray, setup_lib.open_split(config, "test").batch())
  reference = setup_lib.reference_batch(setup_lib.open_split(config, "train"))
  return (logits, data, reference), timing, config.num_steps


def _right(model, data) -> list[int]:
  predicted = jnp.argmax(model(data["inputs"], data["present"]), axis=-1)
  return np.asarray(predicted == data["label"]).astype(int).tolist()


def _average_precision(model, data) -> float:
  scores = np.asarray(model(data["inputs"], data["present"]))
  label = np.eye(scores.shape[1], dtype=bool)[np.asarray(data["label"])]
  return metrics.mean_average_precision(label, scores)


def _corrupted(model, data, reference, place, severities) -> dict:
  """``{kind: {"modalities/severity": rows that are right}}``."""
  suite = corruptions.suite(
    {name: x.shape[1:] for name, x in data["inputs"].items()},
    modalities=place,
    severities=severities,
    scale=corruptions.deviations(reference),
  )

  @jax.jit
  def corrupt(corruption, inputs, present):
    return corruption(
      jax.random.key(0), inputs, present, id=data["id"], label=data["label"]
    )

  found = {}
  for name, corruption in suite.items():
    inputs, present = corrupt(corruption, data["inputs"], data["present"])
    kind, where = name.split("/", 1)
    rows = _right(model, {**data, "inputs": inputs, "present": present})
    found.setdefault(kind, {})[where] = rows
  return found


def _missing(model, data, rate: float) -> float:
  names, count = modalities.names(data["inputs"]), len(data["label"])
  masks = [
    missing.per_sample(missing.scores(names, count, seed=seed), rate)
    for seed in range(5)
  ]
  hits = []
  for mask in masks:
    present = {name: jnp.asarray(flag) for name, flag in mask.present.items()}
    inputs = modalities.mask(data["inputs"], present)
    hits.append(_right(model, {**data, "inputs": inputs, "present": present}))
  return float(np.mean(hits))


# ---- tables


def _line(arm: str, seed: int, found: dict) -> dict:
  scores = {name: np.mean(rows) for name, rows in found["correct"].items()}
  line = {"arm": arm, "seed": seed, **metrics.robustness(scores)}
  for place in PLACES:
    line[f"corrupted {place}"] = np.mean(_corruption_rows(found, place))
  return {k: v if isinstance(v, str) else round(v, 4) for k, v in line.items()}


def _subset_rows(found: dict) -> np.ndarray:
  """``[n]``: the share of subsets with which a row is right."""
  return np.mean(list(found["correct"].values()), axis=0)


def _corruption_rows(found: dict, place: str) -> np.ndarray:
  """``[n]``: a row's mean corruption score, every kind alike."""
  kinds = found["corrupted"][place].values()
  return np.mean([np.mean(list(k.values()), axis=0) for k in kinds], axis=0)


def _tables(found: dict, options) -> list[str]:
  arms = list(dict.fromkeys(arm for arm, _ in found))
  of = {
    arm: [found[arm, seed] for seed in range(options.seeds)] for arm in arms
  }
  lines = [
    f"{options.dataset}, {options.seeds} seeds, jax {jax.__version__}, "
    f"{jax.devices()[0].device_kind}",
    "",
    "accuracy by availability set: mean +- standard deviation over seeds",
  ]
  names = list(of[arms[0]][0]["correct"])
  lines.append(_row("", [*names, "mean", "worst"], 24))
  for arm in arms:
    table = np.array(
      [[np.mean(m["correct"][n]) for n in names] for m in of[arm]]
    )
    columns = [*table.T, table.mean(1), table.min(1)]
    lines.append(_row(arm, [_spread(c) for c in columns], 24))
  measured = [arm for arm in arms if "corrupted" in of[arm][0]]
  lines += ["", "corruption and missing rates; milliseconds a training step"]
  words = [f"corrupted {place}" for place in PLACES]
  words += [f"missing {rate}" for rate in RATES] + ["mAP", "ms"]
  lines.append(_row("", words, 20))
  for arm in measured:
    columns = [
      [np.mean(_corruption_rows(m, place)) for m in of[arm]] for place in PLACES
    ]
    columns += [[m["missing"][str(r)] for m in of[arm]] for r in RATES]
    columns += [[m["average_precision"] for m in of[arm]]]
    cells = [_spread(c) for c in columns]
    cells.append(
      f"{np.median([m['milliseconds_a_step'] for m in of[arm]]):.1f}"
    )
    lines.append(_row(arm, cells, 20))
  if options.against in arms:
    lines += _differences(of, measured, options)
  return lines


def _differences(of: dict, arms: list[str], options) -> list[str]:
  """Paired differences to the arm ``--against``, with intervals."""
  lines = ["", f"difference to {options.against}, 95 % interval (points)"]
  lines.append(_row("", ["mean over sets", "worst set", *PLACES], 24))
  base = of[options.against]
  for arm in arms:
    if arm == options.against:
      continue
    cells = [_interval(*(map(_subset_rows, m) for m in (of[arm], base)))]
    means = [
      {n: np.mean([m["correct"][n] for m in ms]) for n in ms[0]["correct"]}
      for ms in (of[arm], base)
    ]
    worst = min(means[1], key=means[1].get)
    pairs = ([m["correct"][worst] for m in ms] for ms in (of[arm], base))
    cells.append(_interval(*pairs))
    for place in PLACES:
      pairs = (
        [_corruption_rows(m, place) for m in ms] for ms in (of[arm], base)
      )
      cells.append(_interval(*pairs))
    lines.append(_row(arm, cells, 24))
  if "specialists" in of and FULL in of:
    lines += ["", "full less the specialist of the subset (points)"]
    for name in of[FULL][0]["correct"]:
      pair = (
        [m["correct"][name] for m in of[a]] for a in (FULL, "specialists")
      )
      lines.append(_row(name, [_interval(*pair)], 24))
  return lines


def _interval(first, second) -> str:
  found = metrics.paired_bootstrap(
    np.array(list(first)), np.array(list(second))
  )
  mean, low, high = (100 * value for value in found[:3])
  return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def _spread(values) -> str:
  return f"{np.mean(values):.4f} +- {np.std(values):.4f}"


def _row(head: str, cells, width: int) -> str:
  return f"{head:18s}" + "".join(f"{cell:>{width}s}" for cell in cells)


if __name__ == "__main__":
  main()
