"""The joint baseline: one encoder a modality, one linear head, cross-entropy.

  robust-mm train --config=configs/joint.py:digits --workdir=runs/joint

The argument names the data set (digits, av_digits, utd_mhad, mfeat, mosi,
diabetes, arrays, audioset, kinetics, imagenet_captions) and, after a comma, a
variant: dropout (random subsets of
modalities), adversarial (joint l2 PGD), mixup, noise (the base model of
randomised smoothing, which then certifies it), spectral (plain dense encoders
whose norms are penalised, so that their chain bound certifies something), token
(masked token transformer instead of the linear head), vit (vision transformers
for the images of digits and av_digits; weights=FILE.safetensors among the
options of such an encoder is where it begins), smoke (a few steps of all).

Labels that are numbers (diabetes, arrays with float labels) are predicted, with
an L1 loss, and several labels at once (audioset, arrays with labels [n, k])
with sigmoid cross-entropy; of the variants dropout, noise, token and smoke take
them (arrays with noise: --config.evaluation.certificate=auto, nothing certifies
either). audioset, kinetics and imagenet_captions begin with small networks on
whatever arrays were extracted, and 2,000 steps: nothing has been measured.

Expect on the test set, clean: digits 0.98; diabetes a mean absolute error of
45, as linear regression has (58.6 is that of the best constant).
"""

from robust_mm import config as base
from robust_mm import config_variants

DATASETS = (
  "digits",
  "av_digits",
  "utd_mhad",
  "mfeat",
  "mosi",
  "diabetes",
  "arrays",
  "audioset",
  "kinetics",
  "imagenet_captions",
)
VARIANTS = (
  "dropout",
  "adversarial",
  "mixup",
  "noise",
  "spectral",
  "token",
  "vit",
  "smoke",
)
# A mixing head leaves nothing for the norms of encoders to bound.
APART = (
  ("dropout", "adversarial", "mixup", "noise"),
  ("spectral", "token"),
  ("spectral", "vit"),
)

LARGE = ("audioset", "kinetics", "imagenet_captions")

MLP = {"name": "mlp", "hidden_sizes": (128,), "embedding_dim": 64}
SMALL = {"name": "mlp", "hidden_sizes": (32,), "embedding_dim": 16}
CNN = {"name": "cnn", "features": (16, 32), "embedding_dim": 64}
TEMPORAL = {"name": "temporal_cnn", "features": (64, 64), "embedding_dim": 64}
ENCODERS = {
  "digits": {"default": MLP},
  "av_digits": {"image": CNN, "audio": TEMPORAL},
  "utd_mhad": {"inertial": TEMPORAL, "skeleton": TEMPORAL, "depth": CNN},
  "mfeat": {"default": MLP},
  "mosi": {"default": MLP},
  "diabetes": {"default": SMALL},
  "arrays": {"default": {"name": "auto"}},
  **{name: {"default": {"name": "auto"}} for name in LARGE},
}
VIT = {
  "name": "vit",
  "size": None,
  "width": 64,
  "depth": 4,
  "num_heads": 4,
  "patch_size": 7,
}
VISION = {
  "digits": {"default": {**VIT, "width": 32, "depth": 2, "patch_size": 2}},
  "av_digits": {"image": VIT, "audio": TEMPORAL},
}
STEPS = {
  "digits": 500,
  "av_digits": 600,
  "utd_mhad": 400,
  "mfeat": 600,
  "mosi": 200,
  "diabetes": 300,
  "arrays": 600,
  **dict.fromkeys(LARGE, 2000),
}
SIGMA = 0.25  # in units of the evaluation
BATCH = {
  "digits": 256,
  "utd_mhad": 64,
  "diabetes": 64,
  "arrays": 64,
  **dict.fromkeys(LARGE, 64),
}


def get_config(argument: str = ""):
  """The configuration of one data set and its variants."""
  dataset, variants = base.parse(
    argument, datasets=DATASETS, flags=VARIANTS, apart=APART
  )
  if dataset not in VISION:
    base.refuse_idle(dataset, variants, ("vit",))
  config = base.default()
  config.data.name = dataset
  config.data.batch_size = BATCH.get(dataset, 128)
  config.num_steps = STEPS[dataset]
  config.model.encoders = ENCODERS[dataset]
  if "vit" in variants:
    config.model.encoders = VISION[dataset]
  config.model.fusion = "token" if "token" in variants else "concat"
  config.recipe.name = "joint"
  config.recipe.options.variant = next(
    (v for v in ("dropout", "adversarial", "mixup", "noise") if v in variants),
    "plain",
  )
  config.optimizer.lr = 2e-3
  config.training.eval_every = 100
  if dataset == "digits":
    # 144 validation examples cannot tell step 100 from step 500.
    config.selection.metric = "last"
  if "adversarial" in variants:
    config.recipe.options.budget = 0.3
  if "spectral" in variants:
    config.model.encoders = {"default": MLP}
    config.recipe.options.spectral_penalty = 0.03
  if "noise" in variants:
    config.recipe.options.sigma = SIGMA
    if dataset not in ("diabetes", "audioset"):
      config.evaluation.certificate = "smoothing"
      config.evaluation.smoothing.sigma = SIGMA
  raw_scales = ("mfeat", "mosi", "utd_mhad", "diabetes", "arrays", *LARGE)
  if dataset in raw_scales:
    config.evaluation.units = "relative"
    config.recipe.options.units = "relative"
  if dataset == "utd_mhad":
    config_variants.spare_attacks(config)
  if "smoke" in variants:
    config_variants.shrink(config)
  return config
