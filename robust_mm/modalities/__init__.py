"""Sets of modalities, presence masks, what each of them is worth."""

from robust_mm.modalities.gains import GAINS
from robust_mm.modalities.gains import information_gain
from robust_mm.modalities.gains import leave_one_out
from robust_mm.modalities.presence import DISTRIBUTIONS
from robust_mm.modalities.presence import left_by_set
from robust_mm.modalities.presence import mask
from robust_mm.modalities.presence import random_presence
from robust_mm.modalities.presence import recombine
from robust_mm.modalities.presence import removed
from robust_mm.modalities.presence import restrict
from robust_mm.modalities.presence import sample_subsets
from robust_mm.modalities.presence import select
from robust_mm.modalities.presence import share
from robust_mm.modalities.presence import stack
from robust_mm.modalities.presence import stagger
from robust_mm.modalities.presence import without
from robust_mm.modalities.sets import SHIFTS
from robust_mm.modalities.sets import as_subset
from robust_mm.modalities.sets import availability_sets
from robust_mm.modalities.sets import check_sizes
from robust_mm.modalities.sets import names
from robust_mm.modalities.sets import shift
from robust_mm.modalities.sets import shift_pairs
from robust_mm.modalities.sets import subset_name
from robust_mm.modalities.sets import subsets

__all__ = [
  "DISTRIBUTIONS",
  "GAINS",
  "SHIFTS",
  "as_subset",
  "availability_sets",
  "check_sizes",
  "information_gain",
  "leave_one_out",
  "left_by_set",
  "mask",
  "names",
  "random_presence",
  "recombine",
  "removed",
  "restrict",
  "sample_subsets",
  "select",
  "share",
  "shift",
  "shift_pairs",
  "stack",
  "stagger",
  "subset_name",
  "subsets",
  "without",
]
