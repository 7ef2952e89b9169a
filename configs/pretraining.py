"""Pretraining of a token transformer: masked autoencoding, contrasts, or both.

  robust-mm train --config=configs/pretraining.py:utd_mhad --workdir=runs/pre

The argument names the data set (digits, av_digits, av_digits/hard, utd_mhad,
mosi, mfeat, or of which nothing has been measured av_digits/speaker_disjoint,
audioset, kinetics, imagenet_captions) and variants: contrastive (features of
one modality tell which of another belong to them) or both (a masked autoencoder
beside that) in place of the autoencoder alone; no_hiding (no modality is hidden
as a whole; not for mfeat and mosi, whose modalities are one token each); few
(the first 6,000 examples, 64 a batch, for 20 epochs, two layers of 64); smoke
(a few steps of a small model).

No label is read, and the model that is kept is the one with the smallest
pretraining loss on validation examples, masks the same every time. Its linear
head is untrained: configs/finetune.py goes on from here.

Pairs of av_digits are made by equal label, so contrasts there do see labels.
Text and video of mosi are activations of networks that have been trained on its
training labels; --config.data.modalities=audio,words has none of that.
"""

from robust_mm import config as base
from robust_mm import config_variants

DATASETS = (
  "digits",
  "av_digits",
  "av_digits/hard",
  "av_digits/speaker_disjoint",
  "utd_mhad",
  "mosi",
  "mfeat",
  *config_variants.LARGE,
)
VARIANTS = ("contrastive", "both", "no_hiding", "few", "smoke")
APART = (("contrastive", "both"), ("contrastive", "no_hiding"))

EPOCHS = {"av_digits": 10}  # and its other splits, 55,000 pairs; else 100
BATCH = {"utd_mhad": 64}


def get_config(argument: str = ""):
  """The configuration of one data set and its variants."""
  dataset, variants = base.parse(
    argument, datasets=DATASETS, flags=VARIANTS, apart=APART
  )
  config = base.default()
  config.data.name = dataset
  config_variants.token_model(config, variants)
  config.data.batch_size = BATCH.get(dataset, 256)
  config.num_epochs = EPOCHS.get(dataset.split("/")[0], 100)
  config.recipe.name = "pretrain"
  config.recipe.options.objective = next(
    (v for v in ("contrastive", "both") if v in variants), "mae"
  )
  if "no_hiding" in variants:
    config.recipe.options.hide_rate = 0.0
  config.optimizer.lr = 1e-3
  config.optimizer.warmup_steps = 25
  config.training.eval_every = 100
  config.selection.metric = "loss"
  if "few" in variants:
    config_variants.few(config)
    config.num_epochs = 20
  if "smoke" in variants:
    config_variants.shrink(config)
  return config
