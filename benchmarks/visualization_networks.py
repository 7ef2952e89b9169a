"""What class visualisations say of modalities, of networks and of objectives.

  OPENBLAS_NUM_THREADS=1 python benchmarks/visualization_networks.py \\
    --workdir=runs/networks \\
    --output=benchmarks/results/visualization_networks.txt

Asks ``robust-mm visualize`` of freshly trained networks, one a seed:

- av_digits: image and audio with the other absent, at a fixed item (of one
  class, so in conflict with nine), on average over items, and both at once.
- utd_mhad: inertial and skeleton of four actions, likewise.
- networks of the image alone: plain, noise, adversarial, and certified ones
  (1-Lipschitz, trained on their margin), whose accuracy stands beside.
- objectives of the plain one: margin, logit, log_prob.

Numbers are means over classes and starts: near and far, the share of held-out
transformations under which an input keeps its class (and far of the control
without transformations in synthesis); the distance of its features to real ones
of the class (1 is that of real ones), total variation, spectral slope, and
diversity over starts. Every run and grid stays in ``--workdir``.
"""

import argparse
import json
import pathlib

import grids
import numpy as np

import robust_mm
from robust_mm import config as config_lib
from robust_mm import training
from robust_mm import visualize_job
from robust_mm.evaluation import sets
from robust_mm.evaluation import visuals
from robust_mm.training import setup as setup_lib

IMAGE = ("data.modalities=image",)
# {network: (configuration, settings)}
NETWORKS = {
  "av_digits": ("configs/joint.py:av_digits,dropout", ()),
  "utd_mhad": (
    "configs/joint.py:utd_mhad,dropout",
    ("data.modalities=inertial,skeleton",),
  ),
  "plain": ("configs/joint.py:av_digits", IMAGE),
  "noise": ("configs/joint.py:av_digits,noise", IMAGE),
  "adversarial": ("configs/joint.py:av_digits,adversarial", IMAGE),
  "certified": ("configs/crmt.py:av_digits,radius", IMAGE),
}
OTHERS = ("absent", "average", 0, "joint")
ACTIONS = (0, 5, 13, 20)  # swipe left, clap, catch, stand to sit: no two alike
SETTINGS = {
  "with others": [
    ("av_digits", {"modality": m, "others": o})
    for m in ("image", "audio")
    for o in OTHERS
  ]
  + [
    ("utd_mhad", {"modality": m, "others": o, "labels": ACTIONS})
    for m in ("inertial", "skeleton")
    for o in OTHERS
  ],
  "networks": [
    (network, {"modality": "image"})
    for network in ("plain", "noise", "adversarial", "certified")
  ],
  "objectives": [
    ("plain", {"modality": "image", "objective": objective})
    for objective in ("margin", "logit", "log_prob")
  ],
}
NUMBERS = (
  "near",
  "far",
  "far of none",
  "feature_distance",
  "total_variation",
  "spectral_slope",
  "diversity",
)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--workdir", required=True, type=pathlib.Path)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--starts", type=int, default=3)
  parser.add_argument(
    "--parts", nargs="+", default=list(SETTINGS), choices=SETTINGS
  )
  parser.add_argument("--smoke", action="store_true", help="a few steps")
  parser.add_argument("--output", type=pathlib.Path)
  options = parser.parse_args()
  grids.claim(options.workdir, starts=options.starts, smoke=options.smoke)
  grids.keep_compiled(options.workdir)
  lines = [
    f"{options.seeds} seeds, {options.starts} starts of every class; mean +- "
    f"deviation over seeds",
    grids.row("", NUMBERS, 18, first=40),
  ]
  for part in options.parts:
    lines += ["", part]
    for network, question in SETTINGS[part]:
      for line in _measured(options, network, question):
        lines.append(line)
        print(line, flush=True)
  table = "\n".join(lines)
  if options.output:
    options.output.write_text(table + "\n")


def _measured(options, network: str, question: dict) -> list[str]:
  """Lines of a table: one a modality that is synthesised."""
  found: dict[str, list] = {}
  for seed in range(options.seeds):
    folder = _trained(options, network, seed)
    for name, numbers in _asked(options, folder, question, seed).items():
      found.setdefault(name, []).append(numbers)
  accuracy = np.mean(
    [_accuracy(options, network, seed) for seed in range(options.seeds)]
  )
  lines = []
  for name, seeds in found.items():
    words = [network, name]
    words += [f"others {question['others']}"] * ("others" in question)
    words += [question["objective"]] * ("objective" in question)
    head = f"{' '.join(words)} ({accuracy:.3f})"
    lines.append(
      grids.row(head, [_cell(seeds, n) for n in NUMBERS], 18, first=40)
    )
  return lines


def _cell(seeds: list[dict], name: str) -> str:
  values = [numbers.get(name) for numbers in seeds]
  if any(value is None for value in values):
    return "-"
  return grids.spread(values)


def _asked(options, folder, question: dict, seed: int) -> dict[str, dict]:
  """``{modality: numbers}`` of a question, of its files where it was asked."""
  asked = {**question, "seeds": options.starts, "seed": seed}
  if options.smoke:
    asked["num_steps"] = 8
  slug = "".join(c if c.isalnum() else "_" for c in json.dumps(question))

  def measure(_):
    written = visualize_job.run(folder, question=asked)
    found = {}
    for path in written:
      told = json.loads(path.with_suffix(".json").read_text())["numbers"]
      none = told.get("none", {}).get("far")
      name = path.stem.split("-")[0]
      found[name] = {**told["synthesised"], "far of none": none}
    return found

  return grids.kept(folder / visuals.FOLDER / slug, measure)


def _trained(options, network: str, seed: int) -> pathlib.Path:
  """The folder of a run, trained where it is not yet."""
  folder = options.workdir / network / str(seed)
  spec, settings = NETWORKS[network]
  small = ",smoke" if options.smoke else ""
  config = config_lib.load(
    f"{spec}{small}",
    [f"--config.{setting}" for setting in (*settings, f"seed={seed}")],
  )
  if settings == IMAGE:
    # An encoder of what is not there would be refused.
    encoders = config.model.encoders.to_dict()
    with config.unlocked():
      config.model.encoders = {"default": encoders.popitem()[1]}
  training.train(config, folder, say=lambda line: None)
  return folder


def _accuracy(options, network: str, seed: int) -> float:
  """Clean, on the test split, of the modalities that the network has."""
  folder = options.workdir / network / str(seed)

  def measure(_):
    model, params, state, config = robust_mm.load(folder)
    test = setup_lib.open_split(config, "test").batch()
    every = model.modalities
    logits = sets.logits_by_set(model, params, state, test, sets=[every])
    return float(np.mean(logits[every].argmax(axis=-1) == test["label"]))

  return grids.kept(folder / "accuracy", measure)


if __name__ == "__main__":
  main()
