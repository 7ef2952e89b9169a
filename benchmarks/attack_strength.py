"""Is attacks.auto as strong as AutoAttack, at a fifth of its cost?

Compares, on the reference networks, with the stored outcomes of pyautoattack
and foolbox, example by example: robust accuracy of ``attacks.auto``, what each
member broke, CPU seconds of a warm call, and the distances that
``attacks.minimum_norm`` finds. Ask for one core, as the stored seconds are:

  taskset -c 0 python benchmarks/attack_strength.py --reference DIR [--seeds 3]

DIR holds ``attacks/`` and ``certificates/`` of the reference values.
"""

import argparse
import pathlib
import shlex
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import attacks

RANGE = (0.0, 1.0)
# (problem, norm, budget): CPU seconds of AutoAttack as stored, foolbox's row.
CASES = {
  ("mlp", "linf", 0.1): ((6.2, 7.2), "foolbox_linf_pgd40"),
  ("mlp", "l2", 0.3): ((12.7, 14.7), "foolbox_l2_pgd50"),
  ("late fusion", "l2", 0.2): ((7.5, 8.3), "foolbox_l2_pgd50"),
  ("late fusion", "l2", 0.4): ((5.9, 6.9), "foolbox_l2_pgd50"),
  ("late fusion", "l2", 0.6): ((4.2, 5.0), "foolbox_l2_pgd50"),
}
POINT, ITEMS, SHARE, RATIO = 0.005, 1, 0.2, 1.02


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--reference", type=pathlib.Path, required=True)
  parser.add_argument("--seeds", type=int, default=3)
  arguments = parser.parse_args()
  words = ["python", *sys.argv]
  words[words.index(str(arguments.reference))] = "DIR"
  print(f"taskset -c 0 {shlex.join(words)}")
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
  problems = {
    "mlp": _mlp(arguments.reference),
    "late fusion": _late_fusion(arguments.reference),
  }
  met = [
    _strength(problems[case[0]], *case, seed)
    for case in CASES
    for seed in range(arguments.seeds)
  ]
  met += [_distances(name, *problem) for name, problem in problems.items()]
  print(f"\n{sum(met)} of {len(met)} rows meet every target")


def _strength(problem, name, norm, budget, seed):
  logits_fn, inputs, outcomes = problem
  (low, high), foolbox = CASES[name, norm, budget]
  attack = _auto(norm)

  def run():
    return attacks.attack_survivors(
      jax.random.key(seed),
      attack,
      logits_fn,
      inputs,
      outcomes["labels"],
      budget=budget,
    )

  run()
  start = time.process_time()
  found = run()
  seconds = time.process_time() - start
  strongest = outcomes[f"robust/autoattack_{norm}_eps{budget}"]
  weaker = outcomes[f"robust/{foolbox}_eps{budget}"]
  missed = int(np.sum(found.robust & ~strongest))
  more = int(np.sum(~found.robust & strongest))
  by_foolbox = float(np.mean(found.robust & ~weaker))
  ok = (
    found.robust_accuracy <= strongest.mean() + POINT
    and missed <= ITEMS
    and by_foolbox <= POINT
    and seconds <= SHARE * low
  )
  print(
    f"\n{name}, {norm} {budget:g}, seed {seed}: robust accuracy "
    f"{found.robust_accuracy:.4f}, AutoAttack {strongest.mean():.4f}\n"
    f"  broken by AutoAttack only {missed}, by auto only {more}; by foolbox's "
    f"PGD ({weaker.mean():.4f}) and not auto {by_foolbox:.4f}\n"
    f"  CPU {seconds:.2f} s, AutoAttack {low:g} to {high:g} s: a share of "
    f"{seconds / low:.2f}  {'ok' if ok else 'MISSED'}"
  )
  tried = "  ".join(
    f"{member} {count['broken']}/{count['tried']}"
    for member, count in found.members.items()
  )
  print(f"  {tried}", flush=True)
  return ok


_MADE = {}


def _auto(norm):
  """One value a norm: compiled programs belong to it."""
  if norm not in _MADE:
    _MADE[norm] = attacks.auto(norm=norm, budget=1.0, valid_range=RANGE)
  return _MADE[norm]


def _distances(name, logits_fn, inputs, outcomes):
  attack = attacks.minimum_norm(norm=2, valid_range=RANGE)
  label = outcomes["labels"]

  @jax.jit
  def run(key):
    return attacks.distances(key, attack, logits_fn, inputs, label)

  jax.block_until_ready(run(jax.random.key(0)))
  start = time.process_time()
  found = np.asarray(run(jax.random.key(0)), np.float64)
  seconds = time.process_time() - start
  best = outcomes["min_l2/best"]
  ratio = found.mean() / best.mean()
  theirs = outcomes["min_l2/fab_t_l2_iter100"].mean() / best.mean()
  away = best > 0
  each = found[away] / best[away]
  ok = ratio <= RATIO
  print(
    f"\n{name}, smallest l2: mean {found.mean():.4f}, best known "
    f"{best.mean():.4f}: ratio {ratio:.4f} (FAB-T {theirs:.4f})\n"
    f"  ratio of an example: median {np.median(each):.4f}, largest "
    f"{each.max():.3f}, smallest {each.min():.3f}; CPU {seconds:.2f} s  "
    f"{'ok' if ok else 'MISSED'}",
    flush=True,
  )
  return ok


def _mlp(folder):
  with np.load(folder / "attacks" / "digits_mlp.npz") as file:
    arrays = dict(file)

  def logits_fn(inputs):
    x = jax.nn.relu(_dense(arrays, "dense_0", inputs["x"]))
    x = jax.nn.relu(_dense(arrays, "dense_1", x))
    return _dense(arrays, "dense_2", x)

  return logits_fn, {"x": jnp.asarray(arrays["inputs"])}, arrays


def _late_fusion(folder):
  with np.load(folder / "attacks" / "digits_late_fusion.npz") as file:
    outcomes = dict(file)
  with np.load(folder / "certificates" / "digits_plain.npz") as file:
    arrays = dict(file)

  def logits_fn(inputs):
    total = arrays["params/head/bias"]
    for m in ("top", "bottom"):
      x = jax.nn.relu(_dense(arrays, f"{m}/dense_0", inputs[m]))
      x = jax.nn.relu(_dense(arrays, f"{m}/dense_1", x))
      total = total + x @ arrays[f"params/head/{m}/kernel"]
    return total

  inputs = {m: jnp.asarray(arrays[f"inputs/{m}"]) for m in ("top", "bottom")}
  return logits_fn, inputs, outcomes


def _dense(arrays, name, x):
  return x @ arrays[f"params/{name}/kernel"] + arrays[f"params/{name}/bias"]


if __name__ == "__main__":
  main()
