"""Does nullspace noise make a vision transformer more robust than its controls?

  python benchmarks/nullspace_grid.py --workdir=runs/nullspace \\
    --output=benchmarks/results/nullspace_av_digits.txt

Fine-tunes every arm (the variants of ``configs/nullspace.py``) from the same
small transformer, trained once a seed on cross-entropy alone, in the same
number of updates; what a search costs comes on top. On test images:
clean accuracy; mean accuracy under corruption, of all kinds of image corruption
that leave something of the image, every kind and severity alike; accuracy under
``attacks.auto`` in l2; and what the noise of each learnt arm does to the model
that it trained.
Differences to ``--against`` are paired, with 95 % intervals over seeds and
images.

``--also NAME:key=value,...`` adds arms that are another with options changed,
such as ``far:bank:radius_factor=3``; ``long:twice_clean:num_steps=2400`` sets
the number of updates. What is done is kept in ``--workdir`` and not done again.
"""

import argparse
import functools
import json
import pathlib

import grids
import jax
import jax.numpy as jnp
import numpy as np

import robust_mm
from robust_mm import attacks
from robust_mm import config as config_lib
from robust_mm import corruptions
from robust_mm import nullspace
from robust_mm import training
from robust_mm.training import setup as setup_lib

SPEC = "configs/nullspace.py"
ARMS = (
  "clean",
  "twice_clean",
  "random",
  "random_at_criterion",
  "permuted",
  "published",
  "corrected",
  "bank",
)
# They leave nothing of the only image, or another one in its place.
NOTHING_LEFT = ("absent", "zeros", "swap", "stuck")
MODALITY = "image"


def main():
  options = _parser().parse_args()
  grids.claim(
    options.workdir,
    images=options.images,
    attacked=options.attacked,
    radius=options.radius,
    strength=options.strength,
    severities=options.severities,
    set=sorted(options.set),
    smoke=options.smoke,
  )
  grids.keep_compiled(options.workdir)
  arms = {arm: (arm, ()) for arm in options.arms}
  arms |= dict(grids.also(text) for text in options.also)
  found = {}
  # Seed by seed: a table of what there is can be made at any time.
  for seed in range(options.seeds):
    for name, (arm, changes) in arms.items():
      found[name, seed] = grids.kept(
        options.workdir / name / str(seed),
        functools.partial(_measured, options, arm, changes, seed),
      )
      print(json.dumps(_line(name, seed, found[name, seed])), flush=True)
  text = "\n".join(_tables(found, list(arms), options))
  print(text)
  if options.output:
    options.output.write_text(text + "\n")


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--arms", nargs="*", default=list(ARMS))
  parser.add_argument("--also", nargs="*", default=[], metavar="NAME:ARM:K=V")
  parser.add_argument("--against", nargs="*", default=["twice_clean"])
  parser.add_argument("--smoke", action="store_true", help="a few steps")
  parser.add_argument("--images", type=int, default=2000)
  parser.add_argument("--attacked", type=int, default=500)
  # At 0.5 nothing survives, of any arm.
  parser.add_argument("--radius", type=float, default=0.2, help="l2")
  parser.add_argument("--strength", type=int, default=4, help="of attacks.auto")
  parser.add_argument("--severities", type=int, nargs="+", default=[1, 3, 5])
  parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path)
  return parser


def _config(options, arm: str, seed: int, given: list[str]):
  words = ["av_digits", *([] if arm == "bank" else [arm])]
  words += ["smoke"] if options.smoke else []
  settings = [f"--config.{setting}" for setting in (*options.set, *given)]
  return config_lib.load(
    f"{SPEC}:{','.join(words)}", [f"--config.seed={seed}", *settings]
  )


def _pretrained(options, seed: int) -> pathlib.Path:
  """The run that all arms of a seed start from."""
  folder = options.workdir / "pretrained" / str(seed)
  config = _config(options, "clean", seed, ["num_steps=1"])
  training.train(config, folder, say=lambda line: None)
  return folder


def _measured(options, arm, changes, seed: int, folder: pathlib.Path) -> dict:
  start = _pretrained(options, seed)
  given = [
    *changes,
    f"init_from={start}",
    "init_phase=pretrain",
    "recipe.options.pretrain_steps=0",
  ]
  config = _config(options, arm, seed, given)
  folder.mkdir(parents=True, exist_ok=True)
  training.train(config, folder / "run", say=lambda line: None)
  model, params, state, _ = robust_mm.load(folder / "run")

  # Parameters are arguments, so that seeds of an arm share what is compiled.
  logits_of = jax.jit(functools.partial(_logits, model))
  logits_fn = functools.partial(logits_of, params, state)
  source = setup_lib.open_split(config, "test", limit=options.images)
  data = jax.tree.map(jnp.asarray, source.batch())

  def right(inputs):
    said = np.argmax(logits_fn(inputs), axis=-1)
    return (said == np.asarray(data["label"])).astype(int).tolist()

  return {
    "clean": right(data["inputs"]),
    "corrupted": _corrupted(options, config, right, data),
    "attacked": _attacked(options, (model, params, state), data),
    "searches": _searches(folder / "run"),
    "kernel": _kernel_noise(logits_fn, params, data["inputs"][MODALITY][:64]),
  }


def _logits(model, params, state, inputs):
  present = {MODALITY: jnp.ones(inputs[MODALITY].shape[0], bool)}
  return model.apply(params, state, inputs, present)[0].logits


def _corrupted(options, config, right, data) -> dict:
  """``{kind: {severity: rows that are right}}``."""
  train = setup_lib.open_split(config, "train")
  scale = corruptions.deviations(setup_lib.reference_batch(train))
  kinds = [k for k in corruptions.kinds("image") if k not in NOTHING_LEFT]
  suite = corruptions.suite(
    {MODALITY: data["inputs"][MODALITY].shape[1:]},
    kinds=kinds,
    severities=options.severities,
    scale=scale,
  )

  @jax.jit
  def corrupt(corruption, inputs, present):
    return corruption(
      jax.random.key(0), inputs, present, id=data["id"], label=data["label"]
    )

  found = {}
  for name, corruption in suite.items():
    inputs, _ = corrupt(corruption, data["inputs"], data["present"])
    kind, _, severity = name.split("/")
    found.setdefault(kind, {})[severity] = right(inputs)
  return found


def _attacked(options, trained, data) -> list[int]:
  attack = attacks.auto(
    norm=2,
    budget=options.radius,
    strength=options.strength,
    valid_range={MODALITY: (0.0, 1.0)},
  )
  label = data["label"][: options.attacked]
  inputs = data["inputs"][MODALITY][: options.attacked]
  present = {MODALITY: jnp.ones(len(label), bool)}
  found = attacks.attack_survivors(
    jax.random.key(0),
    attack,
    attacks.logits_fn(*trained, present),
    {MODALITY: inputs},
    label,
  )
  return found.robust.astype(int).tolist()


def _searches(workdir: pathlib.Path) -> dict:
  """First and last of what searches reported, and how many held."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  rows = [row for row in rows if f"noise_radius_{MODALITY}" in row]
  if not rows:
    return {}
  column = lambda word: [row[f"noise_{word}_{MODALITY}"] for row in rows]  # noqa: E731
  return {
    "rounds": len(rows),
    "held": int(sum(column("held"))),
    "radius": [column("radius")[0], column("radius")[-1]],
    "criterion": float(np.mean(column("criterion"))),
  }


def _kernel_noise(logits_fn, params, images) -> dict:
  """What the largest noise of the exact kernel does to logits, in float32."""
  weight = params["encoders"][MODALITY]["embed"]["kernel"]
  kernel = nullspace.patch_kernel(weight)
  images = jnp.reshape(images, (*images.shape[:3], 1))
  direction = jax.random.normal(jax.random.key(0), images.shape)
  noise = nullspace.largest_kernel_noise(kernel, images, direction)
  # Off the bounds of pixels, where black patches leave no room.
  grey = 0.25 + 0.5 * images
  free = nullspace.largest_kernel_noise(kernel, grey, direction)
  dims = kernel.dimensions.values()
  found = {"dim": kernel.dim, "dims": [min(dims), max(dims)]}
  for word, x, delta in (("black", images, noise), ("grey", grey, free)):
    clean = logits_fn({MODALITY: x})
    moved = logits_fn({MODALITY: x + delta}) - clean
    size = jnp.max(jnp.abs(clean))
    found[word] = {
      "norm": float(jnp.mean(_norms(delta))),
      "change": float(jnp.max(jnp.abs(moved)) / size),
    }
    generic = _norms(delta) * direction / _norms(direction)
    away = logits_fn({MODALITY: x + generic}) - clean
    found[word]["generic"] = float(jnp.max(jnp.abs(away)) / size)
  return found


def _norms(x):
  return jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2, 3), keepdims=True))


# ---- tables


def _corruption_rows(found: dict) -> np.ndarray:
  """``[n]``: a row's mean corruption score, every kind alike."""
  table = found["corrupted"]
  return np.mean(
    [np.mean(list(rows.values()), axis=0) for rows in table.values()], axis=0
  )


def _line(name: str, seed: int, found: dict) -> dict:
  return {
    "arm": name,
    "seed": seed,
    "clean": round(np.mean(found["clean"]), 4),
    "corrupted": round(float(np.mean(_corruption_rows(found))), 4),
    "attacked": round(np.mean(found["attacked"]), 4),
    **found["searches"],
  }


def _tables(found: dict, arms: list[str], options) -> list[str]:
  of = {a: [found[a, seed] for seed in range(options.seeds)] for a in arms}
  kinds = list(of[arms[0]][0]["corrupted"])
  lines = [
    f"av_digits, {MODALITY}s, {options.seeds} seeds, {options.images} test "
    f"images, severities {', '.join(map(str, options.severities))}, auto of "
    f"strength {options.strength} in l2, {options.radius} on "
    f"{len(found[arms[0], 0]['attacked'])}, jax {jax.__version__}, "
    f"{jax.devices()[0].device_kind}",
    *[f"set {setting}" for setting in options.set],
    *[f"also {text}" for text in options.also],
    "",
    "accuracy: mean +- standard deviation over seeds",
    grids.row("", ["clean", "corrupted", "attacked"], 19),
  ]
  measures = {
    "clean": lambda m: np.array(m["clean"]),
    "corrupted": _corruption_rows,
    "attacked": lambda m: np.array(m["attacked"]),
  }
  for arm in arms:
    cells = [
      grids.spread([np.mean(rows(m)) for m in of[arm]])
      for rows in measures.values()
    ]
    lines.append(grids.row(arm, cells, 19))
  for base in [name for name in options.against if name in arms]:
    lines += ["", f"difference to {base}, 95 % interval (points)"]
    lines.append(grids.row("", list(measures), 25))
    for arm in arms:
      if arm != base:
        cells = [
          grids.interval(*([rows(m) for m in of[x]] for x in (arm, base)))
          for rows in measures.values()
        ]
        lines.append(grids.row(arm, cells, 25))
  lines += ["", "accuracy by kind of corruption", grids.row("", kinds, 17)]
  for arm in arms:
    cells = [
      f"{np.mean([list(m['corrupted'][k].values()) for m in of[arm]]):.4f}"
      for k in kinds
    ]
    lines.append(grids.row(arm, cells, 17))
  lines += ["", "searches, seed by seed, on the network of the arm itself"]
  for arm in arms:
    each = [measured["searches"] for measured in of[arm]]
    if all(each):
      radii = [f"{a:.2f} -> {b:.2f}" for a, b in (x["radius"] for x in each)]
      mean = np.mean([one["criterion"] for one in each])
      held, rounds = (
        sum(one[key] for one in each) for key in ("held", "rounds")
      )
      lines.append(
        f"{arm:24s}relative radius {', '.join(radii)}; mean criterion "
        f"{mean:.4f}, held in {held} of {rounds}"
      )
  lines += ["", "exact kernel of the trained models: largest relative change"]
  dims = [m["kernel"]["dims"] for ms in of.values() for m in ms]
  low, high = min(d[0] for d in dims), max(d[1] for d in dims)
  lines.append(f"dimension {low} to {high} at tolerances of 1e-8 to 1e-2")
  for word in ("black", "grey"):
    change, generic, norm = (
      [m["kernel"][word][key] for ms in of.values() for m in ms]
      for key in ("change", "generic", "norm")
    )
    lines.append(
      f"{word:24s}dimension {of[arms[0]][0]['kernel']['dim']}, norm "
      f"{np.mean(norm):.2f}, change at most {max(change):.1e}; Gaussian noise "
      f"of the same norm {min(generic):.2f} to {max(generic):.2f}"
    )
  return lines


if __name__ == "__main__":
  main()
