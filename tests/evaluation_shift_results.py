"""Results of modality shift with shares made by hand."""

import numpy as np

from robust_mm import evaluation

NAMES = ("a", "b")
N = 1000
# Rows T, columns E: a, b, a+b.
REFERENCE = [[0.60, 0.30, 0.55], [0.25, 0.70, 0.65], [0.50, 0.60, 0.80]]
METHOD = [[0.58, 0.40, 0.62], [0.35, 0.66, 0.70], [0.56, 0.64, 0.78]]
CHANCE = 0.2


def right(matrix, num_items=N, num_seeds=1):
  """Results with exactly these shares: the first items are right."""
  counts = np.rint(np.asarray(matrix) * num_items)[None, ..., None]
  found = np.arange(num_items) < counts
  return np.repeat(found, num_seeds, axis=0)


def report_of(results, chance=CHANCE, reference="ft", names=NAMES, **options):
  options = {"num_samples": 200, **options}
  return evaluation.shift_report(results, names, chance, reference, **options)
