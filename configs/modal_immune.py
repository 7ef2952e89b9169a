"""ModalImmune: one modality is removed and its encoder destroyed, on purpose.

  robust-mm train --config=configs/modal_immune.py:digits --workdir=runs/immune

The argument names the data set (digits, utd_mhad, mfeat, av_digits, mosi,
diabetes, whose label is a number, audioset, which has several labels at once,
kinetics, imagenet_captions; of the last three nothing has been measured) and
variants: published (as published, known
errors included); no_consistency, no_damage, no_collapse, no_spectral, l2
(shrinkage of all embeddings at the same total weight), no_gate, uniform (arms
alike), fixed (no meta-parameters are learnt), no_reconstruction; and the
controls that every claim has to beat: joint (all modalities, nothing else),
leave_one_out (dropout of one modality), random_subset (dropout of a random
subset), every_subset (every set in every step), damage_alone (that, damaged
inputs and consistency, but nothing else of the method); smoke.

Models are selected by validation accuracy, MAE or mAP, averaged over
availability sets. On mosi nothing is: its features have evidently seen the
labels of the validation split. On utd_mhad nothing is either: the official
training set is trained on, validation subject included. Meta-parameters would
be learnt on what was trained on, so they are not: on utd_mhad but in published,
on mosi not at all. Nor would the controller see there what is still to be
learnt: arms are alike on both, but in published. fixed and uniform would change
nothing and are refused.
"""

from robust_mm import config as base
from robust_mm import config_variants

# Small networks on whatever arrays were extracted.
LARGE = config_variants.LARGE
DATASETS = (
  "digits",
  "utd_mhad",
  "mfeat",
  "av_digits",
  "mosi",
  "diabetes",
  *LARGE,
)
VARIANTS = (
  "published",
  "no_consistency",
  "no_damage",
  "no_collapse",
  "no_spectral",
  "l2",
  "no_gate",
  "uniform",
  "fixed",
  "no_reconstruction",
  "joint",
  "leave_one_out",
  "random_subset",
  "every_subset",
  "damage_alone",
  "smoke",
)
CONTROLS = (
  "joint",
  "leave_one_out",
  "random_subset",
  "every_subset",
  "damage_alone",
)
# What a control does not have anyway, or only by name.
_PARTS = (
  "no_consistency",
  "no_damage",
  "no_gate",
  "uniform",
  "fixed",
  "no_reconstruction",
)
APART = (
  ("published", *CONTROLS),
  ("published", "no_consistency"),
  ("published", "no_damage"),
  ("no_collapse", "no_spectral", "l2", *CONTROLS),
  *((part, *CONTROLS) for part in _PARTS),
)

# No activation, and no normalisation, after the last layer of an adapter.
MLP = {
  "name": "mlp",
  "hidden_sizes": (64,),
  "embedding_dim": 32,
  "activation": "gelu",
}
CNN = {"name": "cnn", "features": (16, 32), "embedding_dim": 32}
TEMPORAL = {"name": "temporal_cnn", "features": (64, 64), "embedding_dim": 32}
# Residual networks that see change: four persons are few to learn from.
RESIDUAL = {
  "inertial": {"name": "temporal_resnet", "num_blocks": 3, "dropout": 0.2},
  "skeleton": {"name": "temporal_resnet", "velocity": 10.0, "dropout": 0.2},
  "depth": {
    "name": "video_resnet",
    "pooling": 2,
    "velocity": 4.0,
    "appearance": False,
    "dropout": 0.2,
  },
}
ENCODERS = {
  "digits": {"default": MLP},
  "utd_mhad": RESIDUAL,
  "mfeat": {"default": MLP},
  "av_digits": {"image": CNN, "audio": TEMPORAL},
  "mosi": {"default": MLP},
  "diabetes": {"default": MLP},
  **{
    name: {"default": {"name": "auto", "embedding_dim": 64}} for name in LARGE
  },
}
STEPS = {
  "digits": 600,
  "utd_mhad": 600,
  "mfeat": 800,
  "av_digits": 1000,
  "mosi": 300,
  "diabetes": 300,
  **dict.fromkeys(LARGE, 2000),
}
BATCH = {"digits": 128, "utd_mhad": 64, "mfeat": 128, "av_digits": 128}
# Every set of modalities in every step, the full one as the teacher of the
# others (it is one of them, so it needs no term of its own), on inputs of which
# the attacked modality is corrupted half of the time.
OPTIONS = {
  "removal": "every",
  "clean_weight": 0.0,
  "consistency_weight": 0.5,
  "damage_rate": 0.5,
}
_PLAIN = {
  "consistency_weight": 0.0,
  "damage_rate": 0.0,
  "collapse_weight": 0.0,
  "controller": "uniform",
  "reconstruction_weight": 0.0,
  "guard_tolerance": None,
}
# What each variant changes in the options of the recipe.
CHANGES = {
  "published": {"fidelity": "published"},
  "no_consistency": {"consistency_weight": 0.0},
  "no_damage": {"damage_rate": 0.0},
  "no_collapse": {"collapse_weight": 0.0},
  "no_spectral": {"spectral_weight": 0.0},
  "l2": {"spectral_weight": 0.0, "collapse_on": "all"},
  "no_gate": {"gate": "none"},
  "uniform": {"controller": "uniform"},
  "fixed": {"adapt": False},
  "no_reconstruction": {"reconstruction_weight": 0.0},
  "leave_one_out": {**_PLAIN, "removal": "arm", "clean_weight": 1.0},
  "random_subset": {**_PLAIN, "removal": "subset"},
  "every_subset": _PLAIN,
  "damage_alone": {
    **_PLAIN,
    **{key: OPTIONS[key] for key in ("consistency_weight", "damage_rate")},
  },
}


def get_config(argument: str = ""):
  """The configuration of one data set and its variants."""
  dataset, variants = base.parse(
    argument, datasets=DATASETS, flags=VARIANTS, apart=APART
  )
  if dataset in ("mosi", "utd_mhad"):
    base.refuse_idle(dataset, variants, ("fixed",))
    if "published" not in variants:
      base.refuse_idle(dataset, variants, ("uniform",))
  config = base.default()
  config.data.name = dataset
  config.data.batch_size = BATCH.get(dataset, 64)
  config.num_steps = STEPS[dataset]
  config.model.encoders = ENCODERS[dataset]
  if dataset != "utd_mhad":
    config.model.fusion = "masked"
    config.model.fusion_options.width = 64
  config.recipe.name = "modal_immune"
  config.optimizer.name = "adamw"
  config.optimizer.lr = 1e-3
  config.optimizer.weight_decay = 1e-2
  config.training.eval_every = 100
  config.training.checkpoint_every = 100
  config.selection.metric = "mean_over_subsets"
  if "joint" in variants:
    config.recipe.name = "joint"
    config.optimizer.clip_norm = 1.0  # the others clip as well, by block
  elif "published" not in variants:
    config.recipe.options.update(OPTIONS)
  for variant in sorted(variants & set(CHANGES)):
    config.recipe.options.update(CHANGES[variant])
  if dataset == "mosi":
    config.data.modalities = ("tokens", "audio")
    config.model.encoders = {
      "tokens": {"name": "auto", "embedding_dim": 32},
      "audio": MLP,
    }
    config.selection.metric = "last"
    if "joint" not in variants:
      config.recipe.options.adapt = False
      if "published" not in variants:
        config.recipe.options.controller = "uniform"
  if dataset in ("mfeat", "mosi", "utd_mhad", *LARGE):
    config.evaluation.units = "relative"
  if dataset == "utd_mhad":
    _official(config, published="published" in variants)
    config_variants.spare_attacks(config)
  # What it is for: the report has a curve and a table of both.
  config.evaluation.missing_rates = (0.1, 0.3, 0.5)
  config.evaluation.corruptions = "suite"
  if "smoke" in variants:
    config_variants.shrink(config)
    config.evaluation.corruptions = "none"
    if "joint" not in variants:
      config.recipe.options.controller_period = 2
      config.recipe.options.batch_size = 16
      config.recipe.options.outer_period = 4
  return config


def _official(config, *, published: bool) -> None:
  """What all arms share on utd_mhad, in place."""
  config.data.train_splits = ("train", "validation")
  config.selection.metric = "last"
  config.model.normalization = "none"  # metres, g, rad/s: of order one
  config_variants.augment(config)  # every arm alike
  config.optimizer.lr = 2e-3
  config.optimizer.warmup_steps = 50
  config.training.average_decay = 0.99
  config.recipe.options.label_smoothing = 0.1
  if config.recipe.name == "modal_immune" and not published:
    config.recipe.options.adapt = False
    config.recipe.options.controller = "uniform"
