"""What does it cost to evaluate a model on every set of modalities?

  python benchmarks/subset_cost.py

Times ``evaluation.sets.logits_by_set`` over all sets of utd_mhad's test split
(token transformer of ``configs/finetune.py``, freshly initialised), next to as
many passes over the split with everything present, in turn; and counts
compilations, of all calls. Target: at most 1.2 times, one compilation.
"""

import argparse
import logging
import statistics
import time

import jax
import numpy as np

from robust_mm import config as config_lib
from robust_mm import modalities
from robust_mm.evaluation import batches
from robust_mm.evaluation import sets
from robust_mm.training import setup as setup_lib


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--dataset", default="utd_mhad")
  parser.add_argument("--repeats", type=int, default=5)
  options = parser.parse_args()
  config = config_lib.load(f"configs/finetune.py:{options.dataset}")
  model = setup_lib.prepare(config).model
  params, state = model.init(jax.random.key(0))
  batch = setup_lib.open_split(config, "test").batch()
  every = modalities.subsets(batch["inputs"])
  plain = _Plain(model, params, state, batch)
  plain()
  compiled = _Compilations()
  with compiled:
    sets.logits_by_set(model, params, state, batch)
    ratios = []
    for _ in range(options.repeats):
      one = _seconds(plain)
      all_of_them = _seconds(
        lambda: sets.logits_by_set(model, params, state, batch)
      )
      ratios.append(all_of_them / len(every) / one)
  print(
    f"{options.dataset}, {len(batch['label'])} examples, {len(every)} sets, "
    f"jax {jax.__version__}, {jax.devices()[0].device_kind}\n"
    f"a set / a pass with everything present: median "
    f"{statistics.median(ratios):.3f} of {np.round(ratios, 3).tolist()}; "
    f"compilations of the model {compiled.count}"
  )


class _Plain:
  """A pass over the split, without any sets."""

  def __init__(self, model, params, state, batch):
    self._data = batches.host_data(model, batch)
    self._device = batches.Device(params, state)
    self._forward = self._device.compile(
      lambda params, state, chunk: (
        model.apply(params, state, chunk["inputs"], chunk["present"])[0].logits
      )
    )

  def __call__(self):
    rows = np.arange(self._data.size)
    return self._device.map(self._forward, self._data, rows, 256)


class _Compilations(logging.Handler):
  """Counts programs named ``run``, which is what a Device compiles."""

  def __init__(self):
    super().__init__()
    self.count = 0

  def emit(self, record):
    self.count += "Compiling jit(run)" in record.getMessage()

  def __enter__(self):
    self._log = jax.log_compiles()
    self._log.__enter__()
    self._logger = logging.getLogger("jax")
    self._propagates = self._logger.propagate
    self._logger.propagate = False
    self._logger.addHandler(self)
    return self

  def __exit__(self, *reason):
    self._logger.removeHandler(self)
    self._logger.propagate = self._propagates
    self._log.__exit__(*reason)


def _seconds(fn) -> float:
  began = time.perf_counter()
  fn()
  return time.perf_counter() - began


if __name__ == "__main__":
  main()
