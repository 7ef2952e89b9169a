"""How far does randomised smoothing certify a model that has no geometry?

  python benchmarks/smoothing.py --seeds=3

Trains the token fusion on digits with Gaussian noise, without any (the
control), and with sub-sampling, smooths each by the noise it was trained for
(the control by the Gaussian one), and certifies all 360 test images. Last, the
smoothed classifier is attacked inside and outside its radii: PGD on the mean
probability of the prediction over noisy copies, then a vote of fresh ones.
"""

import argparse
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import robust_mm
from robust_mm import attacks
from robust_mm import config as config_lib
from robust_mm import data
from robust_mm import smoothing
from robust_mm import training

SIGMA = 0.25
KEEP = {"left": 6, "right": 6}
RADII = (0.1, 0.25, 0.5)
ELEMENTS = (1, 2, 3)
GAUSSIAN = smoothing.gaussian(sigma=SIGMA)
RECIPES = {
  "token, gaussian 0.25": ("configs/joint.py:digits,token,noise", [], GAUSSIAN),
  "token, trained clean": ("configs/joint.py:digits,token", [], GAUSSIAN),
  "late fusion, gaussian 0.25": ("configs/joint.py:digits,noise", [], GAUSSIAN),
  "token, 6 of 32 pixels": (
    "configs/joint.py:digits,token,noise",
    [
      "--config.recipe.options.sigma=0.0",
      f"--config.recipe.options.keep={KEEP}",
    ],
    smoothing.subsample(keep=KEEP),
  ),
}
COPIES = 32  # of the attack
ATTACKED = 60  # examples


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--num-samples", type=int, default=1000)
  parser.add_argument("--recipe", choices=RECIPES, action="append")
  parser.add_argument("--no-attack", action="store_true")
  options = parser.parse_args()
  print(
    f"jax {jax.__version__}, {jax.devices()[0].device_kind}, 360 test images, "
    f"{options.num_samples} samples, alpha 1e-3, seeds 0..{options.seeds - 1}"
  )
  for name in options.recipe or RECIPES:
    rows = [
      measure(*RECIPES[name], seed, options) for seed in range(options.seeds)
    ]
    print(f"\n{name}: mean, standard deviation over seeds")
    for key in rows[0]:
      values = np.array([row[key] for row in rows])
      print(f"  {key:44s} {values.mean():8.4f} {values.std():8.4f}", flush=True)


def measure(spec, overrides, noise, seed, options) -> dict:
  config = config_lib.load(spec, [f"--config.seed={seed}", *overrides])
  with tempfile.TemporaryDirectory() as workdir:
    training.train(config, workdir, say=lambda line: None)
    model, params, state, _ = robust_mm.load(workdir)
  batch = data.load("digits", split="test")
  predict = smoothing.predict_fn(model, params, state)
  clean = np.argmax(predict(batch["inputs"], batch["present"]), axis=-1)
  began = time.perf_counter()
  found = smoothing.certify(
    predict,
    batch,
    noise,
    jax.random.key(seed),
    num_estimation=options.num_samples,
  )
  seconds = time.perf_counter() - began
  right = found.prediction == batch["label"]
  row = {
    "base model, clean": np.mean(clean == batch["label"]),
    "smoothed, right": np.mean(right),
    "smoothed, abstains": np.mean(found.prediction < 0),
    "median radius": np.median(found.radius),
    "seconds, compilation included": seconds,
  }
  if noise is not GAUSSIAN:
    for size in ELEMENTS:
      held = found.radius >= size
      row[f"certified, any {size} pixels modified"] = np.mean(right & held)
    return row
  for radius in RADII:
    row[f"certified, joint l2 {radius}"] = np.mean(
      right & (found.radius > radius)
    )
  if options.no_attack:
    return row
  return row | attacked(predict, batch, found, noise, seed)


def attacked(predict, batch, found, noise, seed) -> dict:
  """Flips of the smoothed class at multiples of each example's radius."""
  rows = np.flatnonzero(found.prediction >= 0)[:ATTACKED]
  inputs = {n: jnp.asarray(x[rows]) for n, x in batch["inputs"].items()}
  present = {n: jnp.asarray(x[rows]) for n, x in batch["present"].items()}
  target = jnp.asarray(found.prediction[rows])
  key = jax.random.key(1000 + seed)

  def mean_logits(changed):
    copies = {n: jnp.repeat(x, COPIES, axis=0) for n, x in changed.items()}
    flags = {n: jnp.repeat(x, COPIES, axis=0) for n, x in present.items()}
    logits = predict(smoothing.apply(noise, key, copies), flags)
    chances = jax.nn.softmax(logits.reshape(len(rows), COPIES, -1))
    return jnp.log(jnp.mean(chances, axis=1) + 1e-9)

  attack = attacks.pgd(
    norm=2, budget=1.0, num_steps=20, num_restarts=1, loss="margin"
  )

  @jax.jit
  def run(budget):
    return attack(key, mean_logits, inputs, target, budget=budget)

  flips = {}
  for factor in (1.0, 1.5, 3.0):
    moved = run(jnp.asarray(factor * found.radius[rows]))
    again = smoothing.certify(
      predict,
      {"inputs": moved, "present": present},
      noise,
      jax.random.key(2000 + seed),
      num_selection=1000,
      num_estimation=1000,
    )
    # The class of most votes, abstention or not.
    vote = np.argmax(again.counts, axis=-1)
    flips[f"flipped at {factor:g} times the radius"] = np.mean(vote != target)
  return flips


if __name__ == "__main__":
  main()
