"""ModalImmune: one modality is removed and its encoder destroyed, on purpose.

  robust-mm train --config=configs/modal_immune.py:digits --workdir=runs/immune

The argument names the data set (digits, utd_mhad, mfeat, av_digits, mosi, and
diabetes, whose label is a number) and
variants: published (as published, known errors included); no_collapse,
no_spectral, l2 (shrinkage of all embeddings at the same total weight), no_gate,
uniform (arms alike), fixed (no meta-parameters are learnt), no_reconstruction;
leave_one_out (plain dropout of one modality) and random_subset (plain dropout
of a random subset), the controls every claim has to beat; smoke.

Models are selected by validation accuracy, or MAE, averaged over availability
sets. On
mosi nothing is selected or learnt on the validation split, whose labels its
features have evidently seen.
"""

from robust_mm import config as base

DATASETS = ("digits", "utd_mhad", "mfeat", "av_digits", "mosi", "diabetes")
VARIANTS = (
  "published",
  "no_collapse",
  "no_spectral",
  "l2",
  "no_gate",
  "uniform",
  "fixed",
  "no_reconstruction",
  "leave_one_out",
  "random_subset",
  "smoke",
)
CONTROLS = ("leave_one_out", "random_subset")
APART = (
  ("published", *CONTROLS),
  ("no_collapse", "no_spectral", "l2", *CONTROLS),
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
ENCODERS = {
  "digits": {"default": MLP},
  "utd_mhad": {"inertial": TEMPORAL, "skeleton": TEMPORAL, "depth": CNN},
  "mfeat": {"default": MLP},
  "av_digits": {"image": CNN, "audio": TEMPORAL},
  "mosi": {"default": MLP},
  "diabetes": {"default": MLP},
}
STEPS = {
  "digits": 600,
  "utd_mhad": 600,
  "mfeat": 800,
  "av_digits": 1000,
  "mosi": 300,
  "diabetes": 300,
}
BATCH = {"digits": 128, "utd_mhad": 64, "mfeat": 128, "av_digits": 128}
# What each variant changes in the options of the recipe.
CHANGES = {
  "published": {"fidelity": "published"},
  "no_collapse": {"collapse_weight": 0.0},
  "no_spectral": {"spectral_weight": 0.0},
  "l2": {"spectral_weight": 0.0, "collapse_on": "all"},
  "no_gate": {"gate": "none"},
  "uniform": {"controller": "uniform"},
  "fixed": {"adapt": False},
  "no_reconstruction": {"reconstruction_weight": 0.0},
  "leave_one_out": {
    "collapse_weight": 0.0,
    "controller": "uniform",
    "reconstruction_weight": 0.0,
    "guard_tolerance": None,
  },
}
CHANGES["random_subset"] = {**CHANGES["leave_one_out"], "removal": "subset"}


def get_config(argument: str = ""):
  """The configuration of one data set and its variants."""
  dataset, variants = base.parse(
    argument, datasets=DATASETS, flags=VARIANTS, apart=APART
  )
  config = base.default()
  config.data.name = dataset
  config.data.batch_size = BATCH.get(dataset, 64)
  config.num_steps = STEPS[dataset]
  config.model.encoders = ENCODERS[dataset]
  config.model.fusion = "masked"
  config.model.fusion_options.width = 64
  config.recipe.name = "modal_immune"
  config.optimizer.name = "adamw"
  config.optimizer.lr = 1e-3
  config.optimizer.weight_decay = 1e-2
  config.training.eval_every = 100
  config.selection.metric = "mean_over_subsets"
  for variant in sorted(variants - {"smoke"}):
    config.recipe.options.update(CHANGES[variant])
  if dataset == "mosi":
    config.data.modalities = ("tokens", "audio")
    config.model.encoders = {
      "tokens": {"name": "auto", "embedding_dim": 32},
      "audio": MLP,
    }
    config.selection.metric = "last"
    config.recipe.options.adapt = False
    if "published" not in variants:
      config.recipe.options.controller = "uniform"
  if dataset in ("mfeat", "mosi", "utd_mhad"):
    config.evaluation.units = "relative"
  if dataset == "utd_mhad":
    base.spare_attacks(config)
  if "smoke" in variants:
    base.shrink(config)
    config.recipe.options.controller_period = 2
    config.recipe.options.batch_size = 16
    config.recipe.options.outer_period = 4
  return config
