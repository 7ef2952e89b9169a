"""Does the spread of wrong logits go with robustness, across ordinary models?

  OPENBLAS_NUM_THREADS=1 python benchmarks/dispersion_correlation.py \\
    --workdir=runs/correlation \\
    --output=benchmarks/results/dispersion_correlation_digits.txt

Models of digits, of cross-entropy alone, of several widths, lengths of training
and seeds: of each the mean standard deviation of its wrong logits, the same
divided by the size of its logits, which no scale of the logits moves, its clean
accuracy and its accuracy under ``attacks.auto`` (linf). Spearman's correlation
over models, and what is left of it with the ranks of clean accuracy taken out;
95 % intervals by a bootstrap over pairs of a width and a length, whose seeds
stay together. All is kept in --workdir.
"""

import argparse
import functools
import itertools
import json
import pathlib

import grids
import jax
import jax.numpy as jnp
import numpy as np
import restrained_softmax
import scipy.stats

from robust_mm import attacks
from robust_mm import config as config_lib
from robust_mm.training import setup as setup_lib

SPEC = "configs/restrained_softmax.py:digits,ce"
SPREADS = ("wrong std", "wrong std / logits")


def main():
  options = _parser().parse_args()
  grids.claim(
    options.workdir,
    radius=options.radius,
    strength=options.strength,
  )
  grids.keep_compiled(options.workdir)
  found = {}
  for width, num_steps, seed in itertools.product(
    options.widths, options.lengths, range(options.seeds)
  ):
    found[width, num_steps, seed] = grids.kept(
      options.workdir / f"{width}-{num_steps}-{seed}",
      functools.partial(_measured, options, width, num_steps, seed),
    )
    line = [width, num_steps, seed, found[width, num_steps, seed]]
    print(json.dumps(line), flush=True)
  text = "\n".join(_table(found, options))
  print(text)
  if options.output:
    options.output.write_text(text + "\n")


def _parser():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--widths", type=int, nargs="+", default=[16, 64, 256])
  parser.add_argument(
    "--lengths", type=int, nargs="+", default=[60, 125, 250, 500, 1000]
  )
  parser.add_argument("--seeds", type=int, default=2)
  parser.add_argument("--radius", type=float, default=0.08, help="linf")
  parser.add_argument("--strength", type=int, default=1, help="of attacks.auto")
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path)
  return parser


@functools.cache
def _data(width):
  """(configuration, setup, training arrays, test arrays) of a width."""
  config = config_lib.load(
    SPEC, [f"--config.model.encoders.default.hidden_sizes=({width},)"]
  )
  setup = setup_lib.prepare(config)
  arrays = (setup.train.batch(), setup_lib.open_split(config, "test").batch())
  return config, setup, *(jax.tree.map(jnp.asarray, x) for x in arrays)


@functools.cache
def _trainer(width, num_steps):
  config, setup, train, _ = _data(width)
  # The schedule of the rate has the length of the configuration.
  config = config.copy_and_resolve_references()
  config.num_steps = num_steps
  return restrained_softmax.trainer(config, setup, train)


def _measured(options, width, num_steps, seed, folder) -> dict:
  del folder
  _, setup, _, test = _data(width)
  params = _trainer(width, num_steps)(jax.random.key(seed))
  logits_fn = attacks.logits_fn(setup.model, params, {}, test["present"])
  logits = logits_fn(test["inputs"])
  label = np.asarray(test["label"])
  outcome = attacks.attack_survivors(
    jax.random.key(seed),
    attacks.auto(
      norm="linf",
      budget=options.radius,
      strength=options.strength,
      valid_range=setup_lib.value_range(setup.facts),
    ),
    logits_fn,
    test["inputs"],
    label,
  )
  return {**_spread(np.asarray(logits), label), **_accuracies(outcome, label)}


def _spread(logits, label) -> dict[str, float]:
  wrong = np.arange(logits.shape[1])[None] != label[:, None]
  others = logits[wrong].reshape(len(logits), -1)
  size = np.linalg.norm(logits - logits.mean(axis=1, keepdims=True), axis=1)
  deviation = others.std(axis=1)
  values = (deviation, deviation / size)
  return {name: float(np.mean(x)) for name, x in zip(SPREADS, values)}


def _accuracies(outcome, label) -> dict[str, float]:
  clean = outcome.broken_by != -2
  return {
    "clean": float(clean.mean()),
    "robust": outcome.robust_accuracy,
  }


# ---- the table


def _table(found, options):
  yield (
    f"digits, {len(found)} models of cross-entropy: widths "
    f"{', '.join(map(str, options.widths))}, steps "
    f"{', '.join(map(str, options.lengths))}, {options.seeds} seeds; auto of "
    f"strength {options.strength}, linf {options.radius:g}, jax "
    f"{jax.__version__}, {jax.devices()[0].device_kind}"
  )
  rows = {
    name: np.array([values[name] for values in found.values()])
    for name in (*SPREADS, "clean", "robust")
  }
  for name, values in rows.items():
    yield (
      f"{name:24s}{values.mean():8.3f}, {values.min():.3f} to "
      f"{values.max():.3f}"
    )
  yield ""
  yield "Spearman's correlation with the accuracy under attack, over models"
  heads = ["plain", "clean accuracy taken out"]
  yield grids.row("", heads, 28, first=24)
  for name in SPREADS:
    cells = [
      _interval(lambda *x: correlation(*x[:2]), rows, name, options.seeds),
      _interval(partial, rows, name, options.seeds),
    ]
    yield grids.row(name, cells, 28, first=24)


def correlation(first, second) -> float:
  """Of ranks."""
  return float(scipy.stats.spearmanr(first, second).statistic)


def partial(first, second, given) -> float:
  """Of ranks, with a straight line in the ranks of ``given`` taken out."""
  ranks = [scipy.stats.rankdata(x) for x in (first, second, given)]
  design = np.stack([np.ones_like(ranks[2]), ranks[2]], axis=1)
  left = [
    x - design @ np.linalg.lstsq(design, x, rcond=None)[0] for x in ranks[:2]
  ]
  return float(np.corrcoef(*left)[0, 1])


def _interval(statistic, rows, name, seeds) -> str:
  """Seeds are the last to change in the order of models."""
  values = np.stack([rows[name], rows["robust"], rows["clean"]])
  cells = values.reshape(3, -1, seeds)
  rng = np.random.default_rng(0)
  number = cells.shape[1]
  draws = [
    statistic(*cells[:, rng.integers(number, size=number)].reshape(3, -1))
    for _ in range(2000)
  ]
  low, high = np.nanquantile(draws, [0.025, 0.975])
  return f"{statistic(*values):+.2f} [{low:+.2f}, {high:+.2f}]"


if __name__ == "__main__":
  main()
