"""What penalties of wrong logits buy under attacks that are not misled by them.

  OPENBLAS_NUM_THREADS=1 python benchmarks/restrained_softmax.py \\
    --dataset=digits --seeds=3 --workdir=runs/restrained \\
    --output=benchmarks/results/restrained_softmax.txt

Trains the model of configs/restrained_softmax.py with every loss and attacks
all modalities in one linf ball. FGSM, PGD on cross-entropy and on the logit
ratio are what flatters the family; what counts is the worst case, example by
example, over those, PGD on the margin aimed at every wrong class in turn and at
adaptive ones, ``attacks.auto``, Square, and points made for a cross-entropy
model of another seed. Beside it the difference from cross-entropy's in points,
with a 95 % interval (paired bootstrap over items and seeds) and its range over
seeds, and what the first seed's model shows in a thorough
``evaluation.masking_report`` at that radius, with points of that cross-entropy
model tried as well: the share that nothing broke, of 64 examples (``report``),
and the checks that fail. Weights are those of the configuration, not tuned.
``--radius`` is in units of the evaluation (raw; of mfeat and utd_mhad relative
to the size of an input). What is measured is kept in --workdir. A model of
av_digits takes five minutes on a core with ``--examples=250 --strength=1
--no-report``, which leaves the masking report out.
"""

import argparse
import functools
import json
import pathlib
import time

import grids
import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import attacks
from robust_mm import config as config_lib
from robust_mm import evaluation
from robust_mm import losses
from robust_mm.training import recipe as recipe_lib
from robust_mm.training import setup as setup_lib
from robust_mm.training import state as state_lib
from robust_mm.training import steps
from robust_mm.training import units as units_lib

SPEC = "configs/restrained_softmax.py"
# Where cross-entropy keeps about a half of its accuracy under a short PGD.
RADIUS = {"digits": 0.12, "av_digits": 0.03, "mfeat": 3e-4, "utd_mhad": 0.01}
LIMITS = {"av_digits": (12_000, 500)}
# {row: (variant of the configuration, overrides)}
LOSSES = {
  "cross-entropy": ("ce", ()),
  "label smoothing .5": ("label_smoothing", ()),
  "confidence penalty .1": ("confidence_penalty", ()),
  "logit norm .01": ("logit_norm", ()),
  "DRSL published": ("drsl,published", ()),
  "dispersion .1": ("drsl", ("penalty.weight=0.1",)),
  "dispersion 1": ("drsl", ()),
  "dispersion 10": ("drsl", ("penalty.weight=10.0",)),
  "dispersion 1, scores": ("drsl,scores", ()),
  "complement KL 1": ("complement_kl", ()),
  "PRSL published": ("prsl,published", ()),
  "level, logit 1": (
    "prsl",
    ("penalty.weight=1.0", "penalty.options.space=logit"),
  ),
  "level .1": ("prsl", ()),
  "level 1": ("prsl", ("penalty.weight=1.0",)),
  "top-4 dispersion 1": ("topk_dispersion", ()),
  "top-4 margin 1": ("topk_margin", ()),
}
REFERENCE = "cross-entropy"
ADVERSARIAL = {"adversarial": "ce", "adversarial, dispersion": "drsl"}
ATTACK_STEPS = 5
NAMES = ("fgsm", "pgd ce", "pgd dlr", "margin", "auto", "square", "transfer")
STATISTICS = ("clean", *NAMES, "worst")


def main():
  options = _parser().parse_args()
  bench = Bench(options)
  rows = {name: bench.row(name) for name in options.losses or _all()}
  text = "\n".join(_table(options, rows, bench.radius))
  print(text)
  if options.output:
    options.output.write_text(text + "\n")


def _parser():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--dataset", choices=RADIUS, default="digits")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--losses", nargs="*", help="rows; all by default")
  parser.add_argument("--radius", type=float, help="linf")
  parser.add_argument("--strength", type=int, default=4, help="of attacks.auto")
  parser.add_argument("--examples", type=int, help="of the test split")
  parser.add_argument("--no-report", action="store_true", help="no masking one")
  parser.add_argument("--data", help="config.data.path")
  parser.add_argument("--smoke", action="store_true", help="a few steps of all")
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path)
  return parser


def _all():
  return [*LOSSES, *ADVERSARIAL, *(f"{a}, equal cost" for a in ADVERSARIAL)]


class Bench:
  """Models of one architecture, so that every attack is compiled once."""

  def __init__(self, options):
    self.options = options
    self.radius = options.radius or RADIUS[options.dataset]
    self.folder = options.workdir / options.dataset
    grids.claim(
      self.folder,
      radius=self.radius,
      strength=options.strength,
      smoke=options.smoke,
      **({"examples": options.examples} if options.examples else {}),
    )
    self.config = _load(options, "ce", ())
    self.setup = setup_lib.prepare(self.config)
    self.train = jax.tree.map(jnp.asarray, self.setup.train.batch())
    test = setup_lib.open_split(self.config, "test").batch()
    self.test = jax.tree.map(jnp.asarray, test)
    model, batch = self.setup.model, self.test
    present, label = batch["present"], batch["label"]

    def predict(params, inputs):
      logits = model.apply(params, {}, inputs, present)[0].logits
      return jnp.argmax(logits, axis=-1) == label

    def attacked(attack):
      def run(key, params):
        logits_fn = attacks.logits_fn(model, params, {}, present)
        return attack(key, logits_fn, batch["inputs"], label, present=present)

      return jax.jit(run)

    def describe(params):
      logits = model.apply(params, {}, batch["inputs"], present)[0].logits
      loss_fn = losses.restrained_softmax(losses.complement_kl(), 0.0)
      return loss_fn(logits, label)[1]

    self.predict, self.describe = jax.jit(predict), jax.jit(describe)
    self.attacks = {
      name: attacked(attack) for name, attack in self._attacks().items()
    }

  def _attacks(self):
    short = self.options.smoke
    common = {
      "norm": "linf",
      "budget": self.radius,
      "valid_range": setup_lib.value_range(self.setup.facts),
    }
    if (units := self._units()) is not None:
      common["units"] = units
    number = self.setup.model.num_classes
    steps_ = 2 if short else 50
    pgd = functools.partial(attacks.pgd, num_steps=steps_, **common)
    found = {
      "fgsm": attacks.fgm(loss="cross_entropy", **common),
      "pgd ce": pgd(loss="cross_entropy", num_restarts=5, targets="any"),
      "pgd dlr": pgd(loss="dlr", num_restarts=5, targets="any"),
      "margin": pgd(num_restarts=2 if short else number),
      "adaptive": pgd(num_restarts=2 if short else 5, targets="adaptive"),
      "square": attacks.square(num_queries=5 if short else 5000, **common),
    }
    if not short:
      strength = self.options.strength
      found["auto"] = attacks.auto(strength=strength, **common)
    return found

  def _units(self):
    return units_lib.of_evaluation(self.config, self.setup.facts, "linf")

  def row(self, name):
    """``{statistic: bool[seeds][items]}`` of one loss."""
    return [self._measured(name, seed) for seed in range(self.options.seeds)]

  def _measured(self, name, seed):
    path = self.folder / f"{name.replace(' ', '_')}-{seed}.json"
    if path.is_file():
      return json.loads(path.read_text())
    began = time.perf_counter()
    params = self._trained(name, seed)
    key = jax.random.key(seed)
    left = {"clean": self.predict(params, self.test["inputs"])}
    for attack, run in self.attacks.items():
      left[attack] = self.predict(params, run(key, params)) & left["clean"]
    moved = self._borrowed(seed)
    left["transfer"] = self.predict(params, moved) & left["clean"]
    left["worst"] = functools.reduce(jnp.logical_and, left.values())
    left["margin"] = left["margin"] & left.pop("adaptive")
    found = {k: np.asarray(v).astype(int).tolist() for k, v in left.items()}
    seen = self.describe(params)
    found["metrics"] = {k: float(v) for k, v in seen.items()}
    if seed == 0 and not (self.options.smoke or self.options.no_report):
      found.update(self._checked(params, self._trained(REFERENCE, 1000)))
    path.write_text(json.dumps(found))
    print(
      f"{name} {seed}: {time.perf_counter() - began:.0f} s, worst "
      f"{np.mean(found['worst']):.3f}",
      flush=True,
    )
    return found

  def _checked(self, params, other) -> dict:
    """What nothing broke of a few examples, and the checks that fail."""
    report = evaluation.masking_report(
      self.setup.model,
      params,
      jax.tree.map(np.asarray, self.test),
      radius=self.radius,
      norm="linf",
      units=self._units(),
      valid_range=setup_lib.value_range(self.setup.facts),
      thorough=True,
      surrogate=evaluation.Surrogate(model=self.setup.model, params=other),
    )
    failed = [c["name"] for c in report["checks"] if not c["passed"]]
    return {"misled": failed, "report": report["worst_case"]}

  @functools.cache  # noqa: B019  (one bench a process)
  def _borrowed(self, seed):
    """Points made for cross-entropy of a seed that no row has."""
    params = self._trained(REFERENCE, 1000 + seed)
    return self.attacks["margin"](jax.random.key(seed), params)

  def _trained(self, name, seed):
    key = jax.random.key(seed)
    return self._trainer(name)(key)

  @functools.cache  # noqa: B019
  def _trainer(self, name):
    config = self._configured(name)
    return trainer(config, self.setup, self.train)

  def _configured(self, name):
    base = name.removesuffix(", equal cost")
    if base not in ADVERSARIAL:
      return _load(self.options, *LOSSES[name])
    config = _load(self.options, ADVERSARIAL[base], ())
    with config.unlocked():
      config.recipe.options.variant = "adversarial"
      # l2 of the budget of the recipe; sized to about the same share of it.
      config.recipe.options.budget = _as_l2(self.radius, self.setup.facts)
      config.recipe.options.attack_steps = ATTACK_STEPS
    if base != name:
      config.num_steps = max(1, config.num_steps // (ATTACK_STEPS + 1))
    return config


def trainer(config, setup, train):
  """``key -> params`` of the one phase of a configuration, as one call.

  Batches are drawn with replacement from ``train``, arrays of the split on the
  device.
  """
  (phase,) = recipe_lib.make(config, setup).phases
  step = steps.make_train_step(phase)
  create = state_lib.initializer(setup.model, phase)
  size, total = config.data.batch_size, len(train["label"])

  def run(key):
    init_key, run_key = jax.random.split(key)

    def body(state, _):
      draw = jax.random.fold_in(jax.random.fold_in(run_key, 1), state.step)
      rows = jax.random.randint(draw, (size,), 0, total)
      batch = jax.tree.map(lambda x: x[rows], train)
      return step(state, batch, run_key)

    state, _ = jax.lax.scan(body, create(init_key), length=config.num_steps)
    return state.params

  return jax.jit(run)


def _as_l2(radius, facts):
  """Half the l2 size of the corners of the linf ball."""
  size = sum(int(np.prod(shape)) for shape in facts["input_shapes"].values())
  return 0.5 * radius * size**0.5


def _load(options, variant, overrides):
  train, test = LIMITS.get(options.dataset, (0, 0))
  test = options.examples or test
  if options.data:
    overrides = (*overrides, f"data.path={options.data}")
  if options.smoke:
    variant += ",smoke"
  else:
    overrides = (
      *overrides,
      f"data.max_train_examples={train}",
      f"data.max_eval_examples={test}",
    )
  return config_lib.load(
    f"{SPEC}:{options.dataset},{variant}",
    [f"--config.{override}" for override in overrides],
  )


def _table(options, rows, radius):
  items = len(next(iter(rows.values()))[0]["clean"])
  yield (
    f"{options.dataset}, linf {radius:g} over all modalities, {items} test "
    f"examples, {options.seeds} seeds, jax {jax.__version__}, "
    f"{jax.devices()[0].device_kind}"
  )
  yield "share right, mean over seeds; sd of the worst case over seeds"
  yield (
    f"{'':34s}"
    + "".join(f"{s:>9s}" for s in STATISTICS)
    + f"{'sd':>7s}{'worst less that of cross-entropy (seeds)':>44s}"
    + f"{'dispersion':>12s}{'logits':>8s}{'report':>8s}  misled"
  )
  reference = rows.get(REFERENCE)
  for name, runs in rows.items():
    cells = [
      np.mean([np.mean(run[s]) for run in runs]) if s in runs[0] else np.nan
      for s in STATISTICS
    ]
    worst = [np.mean(run["worst"]) for run in runs]
    spread = np.std(worst, ddof=1) if len(worst) > 1 else np.nan
    seen = [run["metrics"] for run in runs]
    line = f"{name:34s}" + "".join(f"{cell:9.3f}" for cell in cells)
    line += f"{spread:7.3f}" + _difference(runs, reference, name)
    for metric in ("wrong_dispersion", "logit_norm"):
      values = [found[metric] for found in seen]
      line += f"{np.mean(values):{12 if metric[0] == 'w' else 8}.2f}"
    report = runs[0].get("report")
    line += f"{'-' if report is None else f'{report:.3f}':>8s}"
    misled = ", ".join(runs[0].get("misled", ())) or "-"
    yield f"{line}  {'not looked for' if report is None else misled}"


def _difference(runs, reference, name):
  if reference is None or name == REFERENCE:
    return f"{'':>44s}"
  pairs = [(a["worst"], b["worst"]) for a, b in zip(runs, reference)]
  apart = [100 * (np.mean(a) - np.mean(b)) for a, b in pairs]
  text = grids.interval(*zip(*pairs))
  return f"{f'{text} ({min(apart):+.1f} to {max(apart):+.1f})':>44s}"


if __name__ == "__main__":
  main()
