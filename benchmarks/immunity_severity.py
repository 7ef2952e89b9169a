"""Does more collapse go with more robustness to missing modalities?

  OPENBLAS_NUM_THREADS=1 python benchmarks/immunity_severity.py \\
    --dataset=mfeat --seeds=5 --workdir=runs/severity \\
    --output=benchmarks/results/immunity_severity_mfeat.txt

Trains leave-one-out dropout with a collapse of the arm of growing weight, and,
beside it, plain shrinkage of all embeddings at the same total weight. On the
test split: severity 1 - R / R0, with R the stable rank of the embeddings of a
modality (mean over modalities) and R0 that of the same seed without collapse;
retention, the mean accuracy over incomplete sets as a share of that with all.
Spearman's correlation of the two, over weights and seeds, with a 95 % interval
from resampled seeds. What is trained is kept in ``--workdir``.
"""

import argparse
import functools
import pathlib

import grids
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

import robust_mm
from robust_mm import config as config_lib
from robust_mm import modalities
from robust_mm import spectrum
from robust_mm import training
from robust_mm.evaluation import metrics
from robust_mm.training import setup as setup_lib

SPEC = "configs/modal_immune.py"
WEIGHTS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
# Leave-one-out dropout, and what the collapse is.
COMMON = {
  "removal": "arm",
  "clean_weight": 1.0,
  "consistency_weight": 0.0,
  "damage_rate": 0.0,
  "controller": "uniform",
  "reconstruction_weight": 0.0,
  "guard_tolerance": None,
  "gate": "none",
  "adapt": False,
}
FORMS = {
  "arm, ratio .01": {"collapse_on": "arm", "spectral_weight": 0.01},
  "arm, ratio .1": {"collapse_on": "arm", "spectral_weight": 0.1},
  "all, shrinkage": {"collapse_on": "all", "spectral_weight": 0.0},
}


def main():
  options = _parser().parse_args()
  grids.claim(options.workdir, dataset=options.dataset, smoke=options.smoke)
  grids.keep_compiled(options.workdir)
  lines = [
    f"{options.dataset}, {options.seeds} seeds, jax {jax.__version__}, "
    f"{jax.devices()[0].device_kind}; mean over seeds",
    f"{'':16s}{'weight':>8s}{'severity':>10s}{'retention':>11s}{'mean':>8s}"
    f"{'worst':>8s}{'all':>8s}",
  ]
  for form in FORMS:
    table = np.array(
      [
        [_kept(options, form, weight, seed) for weight in WEIGHTS]
        for seed in range(options.seeds)
      ]
    )
    severity = 1 - table[..., 0] / table[:, :1, 0]
    for index, weight in enumerate(WEIGHTS):
      mean = table[:, index].mean(0)
      lines.append(
        f"{form:16s}{weight:8.2f}{severity[:, index].mean():10.3f}"
        f"{mean[1]:11.4f}{mean[2]:8.4f}{mean[3]:8.4f}{mean[4]:8.4f}"
      )
    found, low, high = _spearman(severity, table[..., 1])
    lines.append(
      f"{form:16s}Spearman of severity and retention "
      f"{found:+.2f} [{low:+.2f}, {high:+.2f}]"
    )
  print("\n".join(lines))
  if options.output:
    options.output.write_text("\n".join(lines) + "\n")


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--dataset", default="mfeat")
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--smoke", action="store_true", help="a few steps")
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path)
  return parser


def _spearman(severity, retention):
  """Over weights and seeds; the interval resamples seeds."""
  rng = np.random.default_rng(0)
  draws = rng.integers(len(severity), size=(2000, len(severity)))
  found = [
    scipy.stats.spearmanr(severity[d].ravel(), retention[d].ravel()).statistic
    for d in [np.arange(len(severity)), *draws]
  ]
  return found[0], *np.nanpercentile(found[1:], [2.5, 97.5])


def _kept(options, form: str, weight: float, seed: int) -> list[float]:
  """Stable rank, retention, mean, worst and full accuracy."""
  # Without collapse all forms are the same training.
  words = [form.replace(", ", "_").replace(" ", "_") if weight else "none"]
  words += [str(weight), str(seed)]
  return grids.kept(
    options.workdir / "-".join(words),
    functools.partial(_measured, options, form, weight, seed),
  )


def _measured(options, form, weight, seed, folder) -> list[float]:
  smoke = ",smoke" if options.smoke else ""
  config = config_lib.load(
    f"{SPEC}:{options.dataset}{smoke}", [f"--config.seed={seed}"]
  )
  given = {**COMMON, **FORMS[form], "collapse_weight": weight}
  if not weight:
    given["collapse_on"] = "arm"
  with config.unlocked():
    config.recipe.options.update(given)
  training.train(config, folder / "run", say=lambda line: None)
  model, params, state, _ = robust_mm.load(folder / "run")
  data = jax.tree.map(jnp.asarray, setup_lib.open_split(config, "test").batch())

  @jax.jit
  def encode(inputs, present):
    found, _ = model.encode(params, state, inputs, present, train=False)
    return found

  @jax.jit
  def predict(inputs, present):
    outputs, _ = model.apply(params, state, inputs, present)
    return jnp.argmax(outputs.logits, axis=-1)

  ranks = [
    float(spectrum.stable_rank(z))
    for z in encode(data["inputs"], data["present"]).values()
  ]
  scores = {}
  for subset in modalities.subsets(data["inputs"]):
    left = modalities.restrict(data, subset)
    right = predict(left["inputs"], left["present"]) == data["label"]
    scores[modalities.subset_name(subset)] = float(jnp.mean(right))
  found = metrics.robustness(scores)
  whole = scores[modalities.subset_name(tuple(data["inputs"]))]
  kept = np.mean(ranks), found["retention"], found["mean"], found["min"], whole
  print(form, weight, seed, np.round(kept, 4).tolist(), flush=True)
  return [float(value) for value in kept]


if __name__ == "__main__":
  main()
