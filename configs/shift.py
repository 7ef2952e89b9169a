"""The study of modality shift: trained on every T, evaluated on every E.

  robust-mm shift --config=configs/shift.py:utd_mhad --workdir=runs/shift

The argument names the data set (digits, av_digits, av_digits/hard, utd_mhad,
mfeat, or of which nothing has been measured av_digits/speaker_disjoint, mosi
(by balanced accuracy), audioset (by mAP), kinetics, imagenet_captions) and
variants: scratch (no pretraining); few (the first 6,000 training and 2,000 test
examples: of av_digits, whose 55,000 pairs take a day); smoke (a few steps).
Everything but ``config.study`` is the configuration of one fine-tuning run
(``configs/finetune.py``), changed by each method (``robust_mm.shift_methods``).

``config.recipe.options`` go to every method; those of one are
``--config.study.options.masd.weight=3.0``. Two more controls that may be named
in ``--config.study.methods``: masd_labelled, masd_control.

Budgets: an update of MASD passes twice as many rows, and those without a label
once more without gradient, so it has 3 / 7 of the epochs; with a teacher of
supersets that is 3 / (6 + 2^(n - |T|)). With --config.study.equal_cost=batch,
as few has it, batches are as much smaller (what is left must divide over the
devices: of 64 it is 27, of 56 it is 24), and there are as many updates as in
fine-tuning. What each method passed is printed.
"""

import pathlib
import runpy

from robust_mm import config as base

_TUNED = runpy.run_path(str(pathlib.Path(__file__).with_name("finetune.py")))
DATASETS = _TUNED["DATASETS"]
VARIANTS = ("scratch", "few", "smoke")
EPOCHS = {"av_digits": 8}  # of fine-tuning, all its splits; else 60
# The best linear probe on validation; contrasts of av_digits would see labels.
OBJECTIVES = {"utd_mhad": ",both"}
CLUSTERS = {
  "av_digits": "speaker",
  "mosi": "video_index",
  "utd_mhad": "subject",
}
METHODS = (
  "finetune",
  "probe",
  "dropout",
  "masd",
  "masd_supersets",
  "wise_ft",
  "masd_wise_ft",
  "ema",
  "l2_sp",
  "ensemble",
  "class_mean",
  "oracle",
)
# Of six views: the singles, three of middling strength, and all.
TRAIN_SETS = {
  "mfeat": (
    *("fac", "fou", "kar", "mor", "pix", "zer"),
    "fou+mor+zer",
    "fac+fou+kar+mor+pix+zer",
  )
}


def get_config(argument: str = ""):
  """The configuration of one data set and its variants."""
  dataset, variants = base.parse(argument, datasets=DATASETS, flags=VARIANTS)
  smaller = "".join(f",{v}" for v in ("few", "smoke") if v in variants)
  config = _TUNED["get_config"](dataset + smaller)
  if not smaller:
    config.num_epochs = EPOCHS.get(dataset.split("/")[0], 60)
  study = config.study = base.study()
  study.methods = METHODS
  study.train_sets = TRAIN_SETS.get(dataset, ())
  study.test_sets = study.train_sets
  if dataset == "mosi":
    study.score = "balanced_accuracy"  # one of its two classes is larger
  study.cluster = CLUSTERS.get(dataset.split("/")[0], "")
  if "few" in variants and "smoke" not in variants:
    study.equal_cost = "batch"  # 14 epochs of MASD are few updates
  if "scratch" not in variants:
    objective = OBJECTIVES.get(dataset, "")
    study.pretraining = f"configs/pretraining.py:{dataset}{objective}{smaller}"
  if "smoke" in variants:
    study.seeds = 1
    study.methods = ("finetune", "masd", "wise_ft", "ensemble")
    study.num_samples = 200
  return config
