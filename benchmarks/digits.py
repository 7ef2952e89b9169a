"""How far do the digits recipes get, and does any attack beat a certificate?

  python benchmarks/digits.py --seeds=5 --output=benchmarks/results/digits.json

Trains the joint baseline and the certified model for every seed, attacks all
360 test images at joint l2 radius 0.5 (PGD, margin loss, 50 steps, 5 restarts),
and then attacks every image just inside its own certified radius, joint and
one modality at a time, and at the radius that a certificate with sensitivities
multiplied by 0.4 would claim. Takes about a minute a seed on two cores.
"""

import argparse
import json
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import robust_mm
from robust_mm import attacks
from robust_mm import certification
from robust_mm import config as config_lib
from robust_mm import data
from robust_mm import training

RADIUS = 0.5
RECIPES = {
  "joint": "configs/joint.py:digits",
  "certified": "configs/crmt.py:digits",
}


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--output", type=pathlib.Path)
  options = parser.parse_args()
  rows = [
    {"recipe": recipe, "seed": seed, **measure(spec, seed)}
    for seed in range(options.seeds)
    for recipe, spec in RECIPES.items()
  ]
  for recipe in RECIPES:
    chosen = [row for row in rows if row["recipe"] == recipe]
    print(f"\n{recipe}: mean, standard deviation over {len(chosen)} seeds")
    for name in chosen[0]:
      if name not in ("recipe", "seed"):
        values = np.array([row[name] for row in chosen], float)
        print(f"  {name:36s} {values.mean():.4f}  {values.std():.4f}")
  if options.output:
    options.output.write_text(json.dumps(rows, indent=1) + "\n")


def measure(spec: str, seed: int) -> dict:
  """Accuracies of one run, and flips inside its certificates."""
  config = config_lib.load(spec, [f"--config.seed={seed}"])
  with tempfile.TemporaryDirectory() as workdir:
    began = time.perf_counter()
    training.train(config, workdir, say=lambda line: None)
    seconds = time.perf_counter() - began
    model, params, state, _ = robust_mm.load(workdir)
  batch = jax.tree.map(jnp.asarray, data.load("digits", split="test"))
  logits_fn = attacks.logits_fn(model, params, state, batch["present"])
  attack = attacks.pgd(
    norm=2,
    budget=RADIUS,
    num_steps=50,
    num_restarts=5,
    loss="margin",
    valid_range=(0.0, 1.0),
  )
  key = jax.random.key(seed)
  clean = jnp.argmax(logits_fn(batch["inputs"]), -1)
  right = clean == batch["label"]

  # Compiled once for each kind of budget; radii enter as arguments.
  @jax.jit
  def flipped(against, budget):
    found = attack(key, logits_fn, batch["inputs"], against, budget=budget)
    return jnp.argmax(logits_fn(found), -1) != against

  broken = flipped(batch["label"], jnp.asarray(RADIUS))
  row = {
    "train_seconds": seconds,
    "clean": float(jnp.mean(right)),
    "attacked": float(jnp.mean(right & ~broken)),
  }
  if model.geometry is None or model.geometry(params).lipschitz["left"] is None:
    return row
  certificate = certification.certify(model, params, batch, state=state)
  row["certified"] = float(jnp.mean(right & (certificate.radius > RADIUS)))
  # No box here: certificates do not know of one, so neither may the attack.
  free = attacks.pgd(
    norm=2, budget=RADIUS, num_steps=100, num_restarts=5, loss="margin"
  )

  @jax.jit
  def freely(against, budget):
    found = free(key, logits_fn, batch["inputs"], against, budget=budget)
    return jnp.argmax(logits_fn(found), -1) != against

  radii = {"joint": certificate.radius, **certificate.modality_radius}
  for name, radius in radii.items():
    for label, factor in (("inside", 0.9999), ("tables x 0.4", 1 / 0.4)):
      size = radius * factor
      budget = size if name == "joint" else {name: size}
      flips = freely(certificate.prediction, budget)
      row[f"flipped {label}, {name}"] = float(jnp.mean(flips))
  print(json.dumps({"seed": seed, **row}), flush=True)
  return row


if __name__ == "__main__":
  main()
