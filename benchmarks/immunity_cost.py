"""What does a step of ModalImmune cost, next to random-subset dropout?

  OPENBLAS_NUM_THREADS=1 \
    python benchmarks/immunity_cost.py --dataset=mfeat --steps=400

Times the compiled training steps of several variants of
``configs/modal_immune.py`` in turn, a block of steps each, refreshes of the
gates included; then every job by itself. The mean step of a recipe is the step
plus each job over its period. Compilation does not count.
"""

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import config as config_lib
from robust_mm.training import recipe as recipe_lib
from robust_mm.training import setup as setup_lib
from robust_mm.training import state as state_lib
from robust_mm.training import steps

BASE = "random_subset"
BLOCK = 50


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--dataset", default="mfeat")
  parser.add_argument(
    "--arms", nargs="*", default=["every_subset", "no_gate", "full"]
  )
  parser.add_argument("--steps", type=int, default=400)
  parser.add_argument("--output", type=pathlib.Path)
  options = parser.parse_args()
  arms = {arm: _Arm(options.dataset, arm) for arm in (BASE, *options.arms)}
  times = {name: [] for name in arms}
  for _ in range(max(1, options.steps // BLOCK)):
    for name, arm in arms.items():
      times[name].append(arm.block())
  lines = [f"{options.dataset}, {jax.devices()[0].device_kind}, ms"]
  base = None
  for name, arm in arms.items():
    step = 1e3 * np.mean(times[name]) / BLOCK
    jobs = {
      job.name: (1e3 * arm.job(job), job.period) for job in arm.phase.jobs
    }
    mean = step + sum(cost / period for cost, period in jobs.values())
    base = base or mean
    said = ", ".join(
      f"{word} {cost:.0f} every {period}"
      for word, (cost, period) in jobs.items()
    )
    lines.append(
      f"{name:16s} step {step:8.2f}  with jobs {mean:8.2f}  "
      f"ratio {mean / base:5.2f}  {said}"
    )
  print("\n".join(lines))
  if options.output:
    options.output.write_text("\n".join(lines) + "\n")


class _Arm:
  """A variant, compiled."""

  def __init__(self, dataset: str, variant: str):
    words = [dataset] if variant == "full" else [dataset, variant]
    config = config_lib.load(f"configs/modal_immune.py:{','.join(words)}")
    setup = setup_lib.prepare(config)
    self.phase = recipe_lib.make(config, setup).phases[0]
    create = jax.jit(state_lib.initializer(setup.model, self.phase))
    self.state = create(jax.random.key(0))
    batch = setup.train.limit(config.data.batch_size).batch()
    self.batch = jax.tree.map(jnp.asarray, batch)
    self.step = jax.jit(steps.make_train_step(self.phase), donate_argnums=0)
    self.block()

  def block(self) -> float:
    """Seconds of ``BLOCK`` steps."""
    began = time.perf_counter()
    for _ in range(BLOCK):
      self.state, metrics = self.step(self.state, self.batch, jax.random.key(1))
    jax.block_until_ready((self.state, metrics))
    return time.perf_counter() - began

  def job(self, job) -> float:
    """Seconds of one time of a job, the median of three."""
    run = jax.jit(job.run)
    batch = (self.batch, self.batch) if job.with_training else self.batch
    found = []
    for _ in range(4):
      began = time.perf_counter()
      jax.block_until_ready(run(self.state, batch, jax.random.key(2)))
      found.append(time.perf_counter() - began)
    return float(np.median(found[1:]))


if __name__ == "__main__":
  main()
