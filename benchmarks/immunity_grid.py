"""Does ModalImmune beat what is simpler, in the same number of steps?

  python benchmarks/immunity_grid.py --dataset=utd_mhad --specialists \\
    --workdir=runs/grid --output=benchmarks/results/immunity_utd_mhad.txt

Trains every arm (a variant of ``configs/modal_immune.py``, and a specialist for
every subset of modalities) for every seed, with the same encoders, data,
augmentation, averaging and number of steps; what a step costs is measured by
``immunity_cost.py``. On the test split: accuracy with every availability set,
mean corruption score with one modality corrupted at a time and with all at
once, of all kinds and of those that damage in training has not shown, accuracy
at missing rates. Tables have mean and standard deviation over seeds, and the
paired difference to an arm with its 95 % interval over seeds and examples (over
examples alone with one seed). What is done is kept in ``--workdir`` and not
done again: the same command goes on where it stopped, and one of other data,
severities or settings is refused. ``--set data.path=...`` overrides keys of all
arms; ``--also longer:every_subset:num_steps=900`` adds an arm that is another
with options of the recipe changed, or with as many steps as cost the same.
"""

import argparse
import contextlib
import functools
import json
import pathlib
import runpy

import grids
import jax
import jax.numpy as jnp
import numpy as np

import robust_mm
from robust_mm import _validate
from robust_mm import config as config_lib
from robust_mm import corruptions
from robust_mm import missing
from robust_mm import modalities
from robust_mm import training
from robust_mm.evaluation import metrics
from robust_mm.recipes.modal_immune import DAMAGE
from robust_mm.training import setup as setup_lib

FULL = "full"
SPEC = "configs/modal_immune.py"
RATES = (0.1, 0.3, 0.5, 0.7)
PLACES = ("each", "all")


def main():
  options = _parser().parse_args()
  grids.claim(
    options.workdir,
    dataset=options.dataset,
    severities=options.severities,
    set=sorted(options.set),
    smoke=options.smoke,
  )
  grids.keep_compiled(options.workdir)
  arms = {arm: (arm, ()) for arm in options.arms or _every_arm(options)}
  arms |= dict(grids.also(text) for text in options.also)
  found = {}
  for seed in range(options.seeds):
    for name, (arm, changes) in arms.items():
      found[name, seed] = grids.kept(
        options.workdir / name / str(seed),
        functools.partial(_measured, options, arm, changes, seed),
      )
      print(json.dumps(_line(name, seed, found[name, seed])), flush=True)
    if options.specialists:
      found["specialists", seed] = grids.kept(
        options.workdir / "specialists" / str(seed),
        functools.partial(_specialists, options, seed),
      )
  text = "\n".join(_tables(found, options))
  print(text)
  if options.output:
    options.output.write_text(text + "\n")


def _every_arm(options) -> list[str]:
  """The full method and every variant that the data set takes."""
  path, _ = config_lib.find(SPEC)
  arms = [FULL]
  for variant in runpy.run_path(str(path))["VARIANTS"]:
    with contextlib.suppress(_validate.UserError):
      config_lib.load(f"{SPEC}:{options.dataset},{variant}")
      arms.append(variant)
  return [arm for arm in arms if arm != "smoke"]


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--dataset", default="utd_mhad")
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--arms", nargs="*", default=[])
  parser.add_argument("--also", nargs="*", default=[], metavar="NAME:ARM:K=V")
  parser.add_argument("--specialists", action="store_true")
  parser.add_argument("--smoke", action="store_true", help="a few steps")
  parser.add_argument("--against", default="every_subset")
  parser.add_argument("--severities", type=int, nargs="+", default=[1, 3, 5])
  parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path)
  return parser


def _measured(
  options, arm: str, changes, seed: int, folder: pathlib.Path
) -> dict:
  config = _config(options, arm, seed, changes)
  model, data, reference = _train(config, folder)
  return {
    "correct": {
      modalities.subset_name(subset): _right(
        model, modalities.restrict(data, subset)
      )
      for subset in modalities.subsets(data["inputs"])
    },
    "average_precision": _average_precision(model, data),
    "corrupted": {
      place: _corrupted(model, data, reference, place, options.severities)
      for place in PLACES
    },
    "missing": {str(rate): _missing(model, data, rate) for rate in RATES},
  }


def _specialists(options, seed: int, folder: pathlib.Path) -> dict:
  """One model for each subset, trained on it and seeing nothing else."""
  spec = setup_lib.open_split(_config(options, "joint", seed), "test").spec
  correct = {}
  for subset in modalities.subsets(spec):
    name = modalities.subset_name(subset)
    config = _config(options, "joint", seed)
    config.data.modalities = subset
    config.evaluation.missing_rates = ()  # measured here, and of one none is
    with config.unlocked():
      for group in (config.model.encoders, config.augmentation):
        for other in set(group) - {*subset, "default"}:
          del group[other]
    model, data, _ = _train(config, folder / name)
    correct[name] = _right(model, data)
  return {"correct": correct}


def _config(options, arm: str, seed: int, changes=()):
  words = [options.dataset, *([] if arm == FULL else [arm])]
  words += ["smoke"] if options.smoke else []
  given = [f"--config.{setting}" for setting in (*options.set, *changes)]
  return config_lib.load(
    f"{SPEC}:{','.join(words)}", [f"--config.seed={seed}", *given]
  )


def _train(config, folder: pathlib.Path):
  """(predict, test data, a part of the training data)."""
  folder.mkdir(parents=True, exist_ok=True)
  training.train(config, folder / "run", say=lambda line: None)
  model, params, state, _ = robust_mm.load(folder / "run")

  @jax.jit
  def logits(inputs, present):
    outputs, _ = model.apply(params, state, inputs, present)
    return outputs.logits

  data = setup_lib.open_split(config, "test").batch()
  reference = setup_lib.reference_batch(setup_lib.open_split(config, "train"))
  return logits, jax.tree.map(jnp.asarray, data), reference


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
    for word, kinds in _kinds(found).items():
      rows = _corruption_rows(found, place, kinds)
      line[f"{word} {place}"] = np.mean(rows)
  return {k: v if isinstance(v, str) else round(v, 4) for k, v in line.items()}


def _subset_rows(found: dict) -> np.ndarray:
  """``[n]``: the share of subsets with which a row is right."""
  return np.mean(list(found["correct"].values()), axis=0)


def _kinds(found: dict) -> dict[str, list[str]]:
  """All kinds, and those that no damaged training input has."""
  every = list(found["corrupted"]["each"])
  unseen = [kind for kind in every if kind not in DAMAGE]
  return {"corrupted": every, "unseen": unseen}


def _corruption_rows(found: dict, place: str, kinds) -> np.ndarray:
  """``[n]``: a row's mean corruption score, every kind alike."""
  table = found["corrupted"][place]
  return np.mean(
    [np.mean(list(table[kind].values()), axis=0) for kind in kinds], axis=0
  )


def _tables(found: dict, options) -> list[str]:
  arms = list(dict.fromkeys(arm for arm, _ in found))
  of = {
    arm: [found[arm, seed] for seed in range(options.seeds)] for arm in arms
  }
  lines = [
    f"{options.dataset}, {options.seeds} seeds, severities "
    f"{', '.join(map(str, options.severities))}, jax {jax.__version__}, "
    f"{jax.devices()[0].device_kind}",
    *[f"also {text}" for text in options.also],
    "",
    "accuracy by availability set: mean +- standard deviation over seeds",
  ]
  names = list(of[arms[0]][0]["correct"])
  lines.append(grids.row("", [*names, "mean", "worst"], 25))
  for arm in arms:
    table = np.array(
      [[np.mean(m["correct"][n]) for n in names] for m in of[arm]]
    )
    columns = [*table.T, table.mean(1), table.min(1)]
    lines.append(grids.row(arm, [grids.spread(c) for c in columns], 25))
  measured = [arm for arm in arms if "corrupted" in of[arm][0]]
  kinds = _kinds(of[measured[0]][0])
  scores = [(word, place) for word in kinds for place in PLACES]
  words = [" ".join(score) for score in scores]
  lines += ["", "corruption (unseen: not in damage) and missing rates"]
  rates = [f"missing {rate}" for rate in RATES]
  lines.append(grids.row("", [*words, *rates, "mAP"], 20))
  for arm in measured:
    columns = [
      [np.mean(_corruption_rows(m, place, kinds[word])) for m in of[arm]]
      for word, place in scores
    ]
    columns += [[m["missing"][str(r)] for m in of[arm]] for r in RATES]
    columns += [[m["average_precision"] for m in of[arm]]]
    lines.append(grids.row(arm, [grids.spread(c) for c in columns], 20))
  if options.against in measured:
    others = [arm for arm in measured if arm != options.against]
    base = of[options.against]
    lines += ["", f"difference to {options.against}, 95 % interval (points)"]
    lines.append(grids.row("", ["mean over sets", *names, *words], 25))
    for arm in others:
      pairs = [(_subset_rows(m) for m in ms) for ms in (of[arm], base)]
      cells = [grids.interval(*pairs)]
      cells += [_difference(of[arm], base, name) for name in names]
      for word, place in scores:
        pairs = [
          [_corruption_rows(m, place, kinds[word]) for m in ms]
          for ms in (of[arm], base)
        ]
        cells.append(grids.interval(*pairs))
      lines.append(grids.row(arm, cells, 25))
  if "specialists" in of and FULL in of:
    lines += ["", "full less the specialist of the subset (points)"]
    cells = [_difference(of[FULL], of["specialists"], name) for name in names]
    lines += [grids.row("", names, 25), grids.row("", cells, 25)]
  return lines


def _difference(first, second, name: str) -> str:
  """With one availability set."""
  return grids.interval(
    *([m["correct"][name] for m in ms] for ms in (first, second))
  )


if __name__ == "__main__":
  main()
