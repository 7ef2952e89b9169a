"""MASD: what is said of labelled modalities teaches a model about others.

  robust-mm train --config=configs/masd.py:utd_mhad --workdir=runs/masd \\
      --config.init_from=runs/pre --config.data.labelled=inertial

The argument names the data set (those of configs/finetune.py) and
variants: published (no ramp); ema, frozen (the teacher; the model itself
otherwise); supersets (the teacher is the mean over all sets that hold the
labelled one); finetune (from a fresh head, no linear probe first); few (the
first 6,000 examples, 64 a batch, for 32 epochs, two layers of 64); smoke (a few
steps).

--config.data.labelled names the modalities that have labels. Every batch has as
many training examples again without their label and with all modalities:
--config.data.unlabelled_splits, --config.data.unlabelled_ratio. Without any,
--config.data.unlabelled_splits=(), labelled examples teach sets within T alone.
"""

import pathlib
import runpy

from robust_mm import config as base

VARIANTS = (
  "published",
  "ema",
  "frozen",
  "supersets",
  "finetune",
  "few",
  "smoke",
)
APART = (("ema", "frozen"), ("published", "supersets"))


def get_config(argument: str = ""):
  """The configuration of one data set and its variants."""
  tuned = runpy.run_path(str(pathlib.Path(__file__).with_name("finetune.py")))
  dataset, variants = base.parse(
    argument, datasets=tuned["DATASETS"], flags=VARIANTS, apart=APART
  )
  handed = ("finetune", "few", "smoke")
  words = [dataset, *(v for v in handed if v in variants)]
  config = tuned["get_config"](",".join(words))
  config.recipe.name = "masd"
  config.data.unlabelled_splits = ("train",)
  if "published" in variants:
    config.recipe.options.ramp = 0.0
  for teacher in variants & {"ema", "frozen"}:
    config.recipe.options.teacher = teacher
  if "supersets" in variants:
    config.recipe.options.teacher_subset = "supersets"
  return config
