"""Certified robust multimodal training with 1-Lipschitz encoders.

  robust-mm train --config=configs/crmt.py:digits --workdir=runs/crmt

The argument names the data set (digits, av_digits, utd_mhad, mfeat, mosi,
arrays) and, after a comma, a variant: AT (adversarial inputs), Mix (mixup),
published (ordinary encoders, the published losses, nothing certified), radius
(the certified-radius loss alone), ordinary (that loss with plain dense encoders
whose norms are penalised, so that their chain bound certifies something), trunk
(that loss with a 1-Lipschitz perceptron over all embeddings in place of the sum
of scores: the largest joint radius), smoke (a few steps of everything).

``published`` keeps the published rate of 1e-3, which underfits a set as small
as digits: 0.944 on the test set (mean of seeds 0, 1, 2: .947, .950, .936) and
0.970 on the training set, against 0.964 (.967, .956, .969) and 0.998 with
``--config.optimizer.lr=1e-2`` and all else equal. It takes 140 epochs for step
1 and 45 for step 2, on digits about a minute on two cores.
"""

from robust_mm import config as base
from robust_mm import config_variants

DATASETS = ("digits", "av_digits", "utd_mhad", "mfeat", "mosi", "arrays")
VARIANTS = ("AT", "Mix", "published", "radius", "ordinary", "trunk", "smoke")
# "radius" is one loss on clean inputs, of encoders with known constants.
APART = (
  ("published", "radius", "ordinary", "trunk"),
  ("AT", "Mix", "radius"),
  ("AT", "Mix", "ordinary"),
  ("AT", "Mix", "trunk"),
)

MLP = {"name": "lipschitz_mlp", "width": 128, "embedding_dim": 64}
TEMPORAL = {
  "name": "lipschitz_temporal_cnn",
  "features": (64, 64),
  "kernel_size": 3,
  "patch_size": 4,
  "embedding_dim": 64,
}
VIDEO = {
  "name": "lipschitz_cnn",
  "features": (32, 64),
  "patch_size": 4,
  "embedding_dim": 64,
}
# Orthonormal layers and max_min between: nothing of the radius is lost on the
# way, and a large learning rate trains them in a few hundred steps.
ORTHONORMAL = {
  "name": "lipschitz_mlp",
  "block": "bjorck",
  "stem": 128,
  "width": 64,
  "num_blocks": 1,
  "embedding_dim": 64,
}
# Nothing but orthonormal maps to where the modalities meet.
ISOMETRIC = {
  "name": "lipschitz_mlp",
  "block": "bjorck",
  "width": 64,
  "num_blocks": 0,
  "embedding_dim": 64,
}
TRUNK = {"stem": 128, "width": 64, "num_blocks": 1, "embedding_dim": 64}
ENCODERS = {
  "digits": {"default": ORTHONORMAL},
  "av_digits": {"default": {**ORTHONORMAL, "stem": None, "width": 128}},
  "utd_mhad": {"inertial": TEMPORAL, "skeleton": TEMPORAL, "depth": VIDEO},
  "mfeat": {"default": MLP},
  "mosi": {"default": MLP},
  "arrays": {"default": {"name": "lipschitz_auto"}},
}
ORDINARY = {
  "digits": {"default": {"name": "mlp"}},
  "av_digits": {
    "image": {"name": "cnn"},
    "audio": {"name": "temporal_cnn"},
  },
  "utd_mhad": {
    "inertial": {"name": "temporal_cnn"},
    "skeleton": {"name": "temporal_cnn"},
    "depth": {"name": "cnn"},
  },
  "mfeat": {"default": {"name": "mlp"}},
  "mosi": {"default": {"name": "mlp"}},
  "arrays": {"default": {"name": "auto"}},
}
DENSE = {"name": "mlp", "hidden_sizes": (128,), "embedding_dim": 64}
STEPS = {
  "digits": 700,
  "av_digits": 1500,
  "utd_mhad": 800,
  "mfeat": 1200,
  "mosi": 300,
  "arrays": 800,
}
BATCH = {"utd_mhad": 64, "arrays": 64}
RAW = ("digits", "av_digits")


def get_config(argument: str = ""):
  """The configuration of one data set and its variants."""
  dataset, variants = base.parse(
    argument, datasets=DATASETS, flags=VARIANTS, apart=APART
  )
  config = base.default()
  config.data.name = dataset
  config.model.fusion = "orthogonal"
  config.training.eval_every = 100
  if "published" in variants:
    _published(config, dataset)
  else:
    _corrected(config, dataset)
  config.recipe.options.variant = next(
    (v for v in ("AT", "Mix") if v in variants), "JT"
  )
  if "ordinary" in variants:
    _ordinary(config)
  if "trunk" in variants:
    config.model.fusion = "trunk"
    config.model.fusion_options = TRUNK
  if dataset in RAW and "trunk" in variants:
    config.model.encoders = {"default": ISOMETRIC}
  if {"radius", "ordinary", "trunk"} & set(variants):
    config.recipe.name = "certified_radius"
    for name in ("variant", "rho", "integration_steps"):
      if name in config.recipe.options:
        del config.recipe.options[name]
  if dataset == "utd_mhad":
    config_variants.spare_attacks(config)
  if "smoke" in variants:
    config_variants.shrink(config)
    options = config.recipe.options
    if config.recipe.name == "crmt" and options.get("integration_steps") != 0:
      config.recipe.options.integration_steps = 4
  return config


def _corrected(config, dataset: str) -> None:
  raw = dataset in RAW
  config.data.batch_size = BATCH.get(dataset, 256)
  config.num_steps = STEPS[dataset]
  config.model.encoders = ENCODERS[dataset]
  config.model.normalization = "centre" if raw else "scale"
  config.recipe.name = "crmt"
  config.recipe.options.rho = 1.0
  config.recipe.options.r0 = {"digits": 0.7, "av_digits": 2.0}.get(dataset, 0.3)
  config.optimizer.lr = 2e-3
  config.selection.metric = "certified_accuracy"
  config.selection.radius = {"digits": 0.5, "av_digits": 0.5}.get(dataset, 0.2)
  if not raw:
    config.recipe.options.units = "relative"
    config.evaluation.units = "relative"
  if raw:
    # The companion term costs a point of certified accuracy here.
    config.recipe.options.rho = 0.0
    config.optimizer.b2 = 0.95
    # The rate ends at zero; picking a peak among few validation examples costs
    # a point on the test set.
    config.selection.metric = "last"
  if dataset == "digits":
    config.recipe.options.temperature = 0.05
    config.recipe.options.noise = 0.1
    config.optimizer.lr = 5e-2
    config.optimizer.warmup_steps = 35
  if dataset == "av_digits":
    config.recipe.options.temperature = 0.2
    # Step 2 works on the scores of all 55,000 examples at once, for nothing:
    # the factors are trained in step 1.
    config.recipe.options.integration_steps = 0
    config.optimizer.lr = 1e-2
    config.optimizer.warmup_steps = 100


def _ordinary(config) -> None:
  config.model.encoders = {"default": DENSE}
  config.recipe.options.spectral_penalty = 0.01
  config.recipe.options.noise = 0.0
  config.optimizer.lr = 2e-3
  config.optimizer.b2 = 0.999
  config.optimizer.warmup_steps = 0


def _published(config, dataset: str) -> None:
  config.model.encoders = ORDINARY[dataset]
  config.model.fusion_options = {
    "centre_rows": True,
    "use_bias": True,
    "integration": "softplus",
    "integration_init": 0.1,
  }
  config.recipe.name = "crmt"
  config.recipe.options.fidelity = "published"
  config.recipe.options.rho = 2.0
  # Kinetics-Sounds' schedule: the rate falls every 60 of 140 epochs.
  config.data.batch_size = 64
  config.num_steps = 0
  config.num_epochs = 140
  config.optimizer.name = "sgd"
  config.optimizer.lr = 1e-3
  config.optimizer.weight_decay = 1e-4
  config.optimizer.schedule = "step"
  config.optimizer.milestones = (60 / 140, 120 / 140)
  config.selection.metric = "accuracy"
