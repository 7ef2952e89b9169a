"""What class visualisations say of modalities, of networks and of objectives.

  OPENBLAS_NUM_THREADS=1 python benchmarks/visualization_networks.py \\
    --workdir=runs/networks \\
    --output=benchmarks/results/visualization_networks.txt

Asks ``robust-mm visualize`` of freshly trained networks, one a seed:

- av_digits: image and audio with the other absent, at a fixed item (told apart:
  its own class agrees with it, the others are against it), on average over
  items, and both at once.
- utd_mhad: inertial and skeleton of four actions, likewise.
- networks of the image alone: plain, noise and adversarial convolutional ones;
  a plain and a strongly adversarial perceptron beside the certified one
  (1-Lipschitz, trained on its margin), which is a perceptron too. Accuracy
  stands beside.
- objectives of the plain one: margin, logit, log_prob.

A line of real items of the split stands under each. Numbers are means over
classes and starts: near and far, the share of held-out transformations under
which an input keeps its class; far less that of the controls without
transformations and with shifts only, seed by seed; the distance of its features
to real ones of the class (1 is that of real ones); total variation and
diversity over starts, both in units of those of real items (what a network
calls far is its own); spectral slope; and the mean, 0 and 1 the ends of the
range. Deviations are over seeds: no interval. Every run and grid stays in
``--workdir``.
"""

import argparse
import json
import pathlib

import grids
import numpy as np

import robust_mm
from robust_mm import config as config_lib
from robust_mm import data
from robust_mm import training
from robust_mm import visualize_job
from robust_mm.evaluation import sets
from robust_mm.evaluation import visuals
from robust_mm.training import setup as setup_lib

IMAGE = ("data.modalities=image",)
# As wide as the certified one.
MLP = {"name": "mlp", "hidden_sizes": (128,), "embedding_dim": 64}
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
  "plain_mlp": ("configs/joint.py:av_digits", IMAGE),
  "adversarial_mlp": (
    "configs/joint.py:av_digits,adversarial",
    (*IMAGE, "recipe.options.budget=1.5"),
  ),
  "certified": ("configs/crmt.py:av_digits,radius", IMAGE),
}
OTHERS = ("absent", "average", 0)
ACTIONS = ("swipe left", "clap", "catch", "stand to sit")  # no two alike
REAL, MADE = "real items", "synthesised"


def _settings() -> dict[str, list]:
  """``{part: [(network, words, question), ...]}``, no question twice."""
  names = data.registry.get("utd_mhad").class_names
  actions = {"labels": tuple(names.index(action) for action in ACTIONS)}
  pairs = {
    "av_digits": (("image", "audio"), {}),
    "utd_mhad": (("inertial", "skeleton"), actions),
  }
  with_others = []
  for network, (modalities, given) in pairs.items():
    for modality in modalities:
      for others in OTHERS:
        asked = {"modality": modality, "others": others, **given}
        with_others.append((network, f"others {others}", asked))
    # Of both modalities at once: one question.
    asked = {"modality": modalities[0], "others": "joint", **given}
    with_others.append((network, "others joint", asked))
  image = {"modality": "image"}
  objectives = [
    ("plain", objective, {**image, "objective": objective})
    for objective in ("logit", "log_prob")
  ]
  return {
    "with others": with_others,
    "networks": [(n, "", image) for n in NETWORKS if n not in pairs],
    "objectives": [("plain", "margin", image), *objectives],
  }


SETTINGS = _settings()
NUMBERS = (
  "near",
  "far",
  "far less none",
  "far less shifts",
  "feature_distance",
  "total_variation",
  "diversity",
  "spectral_slope",
  "mean",
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
  lines = []

  def say(line: str) -> None:
    lines.append(line)
    print(line, flush=True)
    if options.output:
      options.output.write_text("\n".join(lines) + "\n")

  say(
    f"{options.seeds} seeds, {options.starts} starts of every class; mean +- "
    f"deviation over seeds"
  )
  say(grids.row("", NUMBERS, 18, first=56))
  for part in options.parts:
    say("")
    say(part)
    for network, words, question in SETTINGS[part]:
      for line in _measured(options, network, words, question):
        say(line)


def _measured(options, network: str, words: str, question: dict) -> list[str]:
  """Lines of a table: of each modality that is synthesised, and real items."""
  found: dict[str, list] = {}
  for seed in range(options.seeds):
    folder = _trained(options, network, seed)
    for name, told in _asked(options, folder, question, seed).items():
      found.setdefault(name, []).append(told)
  accuracy = np.mean(
    [_accuracy(options, network, seed) for seed in range(options.seeds)]
  )
  lines = []
  for name, seeds in found.items():
    head = f"{network} {name}"
    if words:
      head += f" {words}"
    lines += _lines(f"{head} ({accuracy:.3f})", seeds)
  return lines


def _lines(head: str, seeds: list[dict]) -> list[str]:
  """Of what is made, of groups of its classes, and of real items."""
  lines = []
  for row in seeds[0]["numbers"]:
    base, _, group = row.partition(", ")
    if base not in (MADE, REAL):
      continue
    words = head if row == MADE else f"  {row}"
    cells = [_cell(seeds, row, name) for name in NUMBERS]
    lines.append(grids.row(words, cells, 18, first=56))
    # Seeds have items of one class: the same item of the split.
    parts = [told["margins"].get(group, {}) for told in seeds]
    if base == MADE and parts[0]:
      told = [
        f"{m} {grids.spread([part[m] for part in parts])}" for m in parts[0]
      ]
      lines.append(f"    margin by modality: {', '.join(told)}")
  return lines


def _cell(seeds: list[dict], row: str, name: str) -> str:
  values = [_value(told["numbers"], row, name) for told in seeds]
  if any(value is None for value in values):
    return "-"
  return grids.spread(values)


def _value(numbers: dict, row: str, name: str) -> float | None:
  own = numbers[row]
  if name.startswith("far less"):
    # Controls are of all classes, and of what is made.
    control = "none" if name.endswith("none") else "shifts only"
    other = numbers.get(control) if row == MADE else None
    pair = own.get("far"), (other or {}).get("far")
    return None if None in pair else pair[0] - pair[1]
  value = own.get(name)
  if name in ("total_variation", "diversity"):
    unit = numbers[REAL].get(name)
    return value / unit if unit and value is not None else None
  return value


def _asked(options, folder, question: dict, seed: int) -> dict[str, dict]:
  """``{modality: {"numbers", "margins"}}``, from its file if asked before."""
  asked = {**question, "seeds": options.starts, "seed": seed}
  if options.smoke:
    asked["num_steps"] = 8
  slug = "".join(c if c.isalnum() else "_" for c in json.dumps(question))

  def measure(_):
    found = {}
    for path in visualize_job.run(folder, question=asked):
      told = json.loads(path.with_suffix(".json").read_text())
      numbers, (low, high) = told["numbers"], told["value_range"]
      made = np.load(path.with_suffix(".npz"))["synthesised"]
      numbers[MADE]["mean"] = float((made.mean() - low) / (high - low))
      found[path.stem.split("-")[0]] = {
        "numbers": numbers,
        "margins": told["margin_means"],
      }
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
  if set(IMAGE) <= set(settings):
    # An encoder of what is not there would be refused.
    encoders = config.model.encoders.to_dict()
    own = encoders.get("image", encoders.get("default"))
    with config.unlocked():
      config.model.encoders = {"default": MLP if "mlp" in network else own}
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
