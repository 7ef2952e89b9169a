"""Do synthesised digits keep their class where the digits turn and shrink?

  OPENBLAS_NUM_THREADS=1 python benchmarks/class_visualization.py \\
    --workdir=runs/visual \\
    --output=benchmarks/results/class_visualization_digits.txt

Trains small CNNs on the images of av_digits (MNIST), one a seed, and a
perceptron; synthesises every class from several starts, in both readings of
what was published and with the controls; and counts how often a picture keeps
its class under fresh transformations with background outside: near (15 degrees,
x1.15, 2 pixels), far (30 degrees, x1.3, 3 pixels), near of another network
(there is none with one network), and near of the perceptron. Beside these:
total variation, spectral slope, distance of features to real digits of the
class (1 is that of real ones), diversity over starts. Intervals are 95 % of a
paired bootstrap over networks and (class, start). What is measured is kept in
``--workdir``.
"""

import argparse
import pathlib

import grids
import jax
import jax.numpy as jnp
import numpy as np

import robust_mm
from robust_mm import config as config_lib
from robust_mm import training
from robust_mm import visualization
from robust_mm.evaluation import metrics
from robust_mm.training import setup as setup_lib
from robust_mm.visualization import transforms

SPEC = "configs/joint.py:av_digits"
CLASSES = tuple(range(10))
SHAPE = (28, 28, 1)
ENCODERS = {
  "cnn": {"name": "cnn", "features": (16, 32), "embedding_dim": 64},
  "mlp": {"name": "mlp", "hidden_sizes": (128,), "embedding_dim": 64},
}


def _turned(degrees, share, jitter=2.0):
  return transforms.image(
    rotation=degrees, scale=(1 - share, 1 + share), jitter=jitter
  )


NONE = transforms.identity(of="image")
JITTER = transforms.image(rotation=0, scale=(1, 1))
BELOW = transforms.image(rotation=0, scale=(1, 1), jitter=0.5)
IN_PLACE = {"mode": "in_place"}
AUTO = {"objective_scale": "auto"}
HEAVY = {**AUTO, "tv_weight": 10.0, "l2_weight": 5.0}
# What is compared: {row: (transformations, options)}.
ROWS = {
  "none": (NONE, {}),
  "jitter 2 px only": (JITTER, {}),
  "sub-pixel shifts only": (BELOW, {}),
  "Fourier, none": (NONE, {"parameterization": "fourier"}),
  "rotation 10, scale .1, jitter 2": (_turned(10, 0.1), {}),
  "rotation 15, scale .15, jitter 2": (_turned(15, 0.15), {}),
  "rotation 20, scale .2, jitter 2": (_turned(20, 0.2), {}),
  "rotation 20, scale .2, no jitter": (_turned(20, 0.2, 0.0), {}),
  "rotation 30, scale .3, jitter 3": (_turned(30, 0.3, 3.0), {}),
  "rotation 45, scale .5, jitter 2": (_turned(45, 0.5), {}),
  "published: none": (
    NONE,
    {"objective": "logit", "tv_weight": 0.0, "annealing": 0.0},
  ),
  "published (rotation 15, scale .15)": (
    _turned(15, 0.15),
    {"fidelity": "published"},
  ),
  "in place: none": (NONE, IN_PLACE),
  "in place: sub-pixel shifts only": (BELOW, IN_PLACE),
  "in place: rotation 10, scale .1, jitter 2": (_turned(10, 0.1), IN_PLACE),
  "in place, every 2: the same": (_turned(10, 0.1), {**IN_PLACE, "every": 2}),
  "auto scale: none": (NONE, AUTO),
  "auto scale: rotation 15, scale .15, jitter 2": (_turned(15, 0.15), AUTO),
  "auto scale: rotation 20, scale .2, jitter 2": (_turned(20, 0.2), AUTO),
  "auto scale, weights 10 and 5: none": (NONE, HEAVY),
  "auto scale, weights 10 and 5: rotation 15": (_turned(15, 0.15), HEAVY),
}
NUMBERS = (
  "near",
  "far",
  "other",
  "mlp",
  "tv",
  "slope",
  "distance",
  "diversity",
)
CLAIM = 0.2
# {row or its beginning: what it is compared with}; else with "none".
BASES = {
  "published": "published: none",
  "in place": "in place: none",
  "auto scale, weights 10 and 5": "auto scale, weights 10 and 5: none",
  "auto scale:": "auto scale: none",
}
JITTERED = "jitter 2 px only"
# What shifts and blur alone do not explain: {row: control}.
AGAINST = {
  "rotation 10, scale .1, jitter 2": JITTERED,
  "rotation 15, scale .15, jitter 2": JITTERED,
  "rotation 20, scale .2, jitter 2": JITTERED,
  "rotation 45, scale .5, jitter 2": JITTERED,
  "in place: rotation 10, scale .1, jitter 2": (
    "in place: sub-pixel shifts only"
  ),
}


def main():
  options = _parser().parse_args()
  grids.claim(
    options.workdir,
    networks=options.networks,
    starts=options.starts,
    smoke=options.smoke,
  )
  networks = [
    _network(options, "cnn", seed) for seed in range(options.networks)
  ]
  other = _network(options, "mlp", options.networks)
  config = networks[0][3]
  items = setup_lib.open_split(config, "train", limit=2000).batch()
  test = setup_lib.open_split(config, "test").batch()
  found = {}
  for row in options.rows:
    chosen, given = ROWS[row]
    found[row] = grids.kept(
      options.workdir / grids.slug(row),
      lambda folder, chosen=chosen, given=given: _measured(
        networks,
        other,
        [
          _made(options, network, seed, chosen, given, items)
          for seed, network in enumerate(networks)
        ],
        items,
      ),
    )
    print(_line(row, found[row]), flush=True)
  rows = [np.flatnonzero(test["label"] == c)[: options.starts] for c in CLASSES]
  real = test["inputs"]["image"][np.stack(rows)]
  found["real test digits"] = _measured(
    networks, other, [real] * len(networks), items
  )
  lines = [
    f"av_digits images, {options.networks} networks x {options.starts} starts "
    f"x 10 classes, clean accuracy "
    f"{np.mean([_accuracy(n, test) for n in networks]):.4f}, jax "
    f"{jax.__version__}, {jax.devices()[0].device_kind}",
    f"{'':46s}" + "".join(f"{name:>10s}" for name in NUMBERS),
    *[_line(row, values) for row, values in found.items()],
    "",
    "far, against none with the same objective (paired):",
    *_differences(found),
    "",
    "far, against jitter only, or in place sub-pixel shifts only (paired):",
    *_controlled(found),
  ]
  print("\n".join(lines))
  if options.output:
    options.output.write_text("\n".join(lines) + "\n")


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--networks", type=int, default=3)
  parser.add_argument("--starts", type=int, default=3)
  parser.add_argument("--smoke", action="store_true", help="a few steps")
  parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path)
  return parser


def _network(options, kind: str, seed: int):
  """(model, params, state, config) of a run, trained where it is not yet."""
  folder = options.workdir / f"{kind}-{seed}"
  smoke = ",smoke" if options.smoke else ""
  config = config_lib.load(f"{SPEC}{smoke}", [f"--config.seed={seed}"])
  with config.unlocked():
    config.data.modalities = ("image",)
    config.model.encoders = {"image": ENCODERS[kind]}
  training.train(config, folder, say=lambda line: None)
  return robust_mm.load(folder)


def _made(options, network, seed, chosen, given, items) -> np.ndarray:
  model, params, state, _ = network
  found = visualization.class_visualization(
    model,
    params,
    "image",
    CLASSES,
    key=jax.random.key(seed),
    transforms=chosen,
    state=state,
    seeds=options.starts,
    num_steps=8 if options.smoke else 256,
    items=items,
    held_out={},
    **given,
  )
  return np.asarray(found.inputs)


def _measured(networks, other, made, items) -> dict:
  """``{number: [network][class, start]}``; diversity without starts."""
  # Outside is background, as in synthesis.
  tests = transforms.held_out(NONE, SHAPE, fill=0.0)
  found = {name: [] for name in NUMBERS}
  for index, x in enumerate(made):
    key = jax.random.key(1000 + index)

    def kept(network, what, x=x, key=key):
      model, params, state, _ = network
      return visualization.transformation_accuracy(
        model,
        params,
        x,
        CLASSES,
        tests[what],
        modality="image",
        key=key,
        state=state,
      )

    mine = networks[index]
    near = {
      "near": kept(mine, "near"),
      "far": kept(mine, "far"),
      "other": kept(networks[(index + 1) % len(networks)], "near")
      if len(networks) > 1
      else [np.nan],
      "mlp": kept(other, "near"),
    }
    model, params, state, _ = mine
    natural = visualization.naturalness(
      model,
      params,
      x,
      CLASSES,
      items,
      modality="image",
      state=state,
    )
    spread = visualization.diversity(
      model, params, x, modality="image", state=state
    )
    values = {
      **near,
      "tv": natural["total_variation"],
      "slope": natural["spectral_slope"],
      "distance": natural["feature_distance"],
      "diversity": spread,
    }
    for name, value in values.items():
      found[name].append(np.asarray(value, float).ravel().tolist())
  return found


def _accuracy(network, test) -> float:
  model, params, state, _ = network
  logits = model.apply(params, state, test["inputs"], test["present"])[0].logits
  return float(jnp.mean(jnp.argmax(logits, axis=-1) == test["label"]))


def _line(row: str, values: dict) -> str:
  return f"{row:46s}" + "".join(
    f"{np.mean(values[name]):10.3f}" for name in NUMBERS
  )


def _differences(found: dict) -> list[str]:
  lines = []
  for row in found:
    known = (base for start, base in BASES.items() if row.startswith(start))
    base = next(known, "none")
    if row == base or base not in found:
      continue
    line, low = _difference(found, row, base)
    # Of the interval: a point estimate would claim what it cannot.
    lines.append(line + ("  at least 20 points" if low >= CLAIM else ""))
  return lines


def _controlled(found: dict) -> list[str]:
  return [
    _difference(found, row, base)[0]
    for row, base in AGAINST.items()
    if row in found and base in found
  ]


def _difference(found: dict, row: str, base: str) -> tuple[str, float]:
  """A line, and the lower end of its interval."""
  value, low, high = metrics.paired_bootstrap(
    found[row]["far"], found[base]["far"]
  )
  return f"{row:46s}{value:+10.3f} [{low:+.3f}, {high:+.3f}]", low


if __name__ == "__main__":
  main()
