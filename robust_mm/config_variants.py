"""What several configurations change alike, each in place."""

from collections.abc import Collection

import ml_collections


def spare_attacks(config: ml_collections.ConfigDict) -> None:
  """Fewer attacks, in place: on video they are slow without an accelerator."""
  config.evaluation.radii = (0.1, 0.2, 0.4)
  config.evaluation.num_steps = 20
  config.evaluation.num_restarts = 2
  config.evaluation.tightness = ()
  config.evaluation.masking_examples = 20


# Of what users have extracted themselves; nothing has been measured on them.
LARGE = ("audioset", "kinetics", "imagenet_captions")

# What token models take of a data set, where it is not its default.
_TOKEN_MODALITIES = {
  "mfeat": ("fac", "fou", "kar", "mor", "pix", "zer"),
  "mosi": ("audio", "text", "video"),
}
_PATCHES = {
  "digits": dict.fromkeys(("left", "right"), (2, 2)),
  # 16 tokens a video: as good on validation as 64, in half the time.
  "utd_mhad": {"depth": (4, 24, 24)},
}

# Pace, place and posture differ from person to person.
_PACE = {"scale": 1.3, "shift": 0.1}
_AUGMENTATION = {
  "utd_mhad": {
    "inertial": {
      "warp_time": _PACE,
      "rotate": {"angle": 0.2},
      "scale": {"deviation": 0.1},
      "noise": {"deviation": 0.05},
    },
    "skeleton": {
      "warp_time": _PACE,
      "rotate": {"angle": 0.2, "axis": "y"},
      "scale": {"deviation": 0.1, "per": "axis"},
      "noise": {"deviation": 0.01},
    },
    "depth": {
      "warp_time": _PACE,
      "move": {"scale": 0.1, "shift": 0.08},
      "brighten": {"deviation": 0.02},
    },
  }
}


def augment(config: ml_collections.ConfigDict) -> None:
  """How examples of a data set are varied in training, in place; or not."""
  config.augmentation = _AUGMENTATION.get(config.data.name, {})


# (layers, width) of the token transformer; the first variant that is named
# decides. Two layers of 64 take a sixth of the time of four of 128, and can be
# trained to the end on one core.
_SIZES = {"smoke": (1, 32), "few": (2, 64)}
_FULL = (4, 128)


def token_model(
  config: ml_collections.ConfigDict, variants: Collection[str]
) -> None:
  """The token transformer of a data set and its optimiser, in place.

  The same for pretraining and what goes on from it, trained for epochs;
  smaller where ``variants`` name smoke or few.
  """
  config.num_steps = 0
  config.optimizer.name = "adamw"
  config.optimizer.weight_decay = 0.05
  config.optimizer.clip_norm = 1.0
  name = config.data.name
  config.data.modalities = _TOKEN_MODALITIES.get(name, ())
  config.model.fusion = "transformer"
  num_layers, width = next(
    (size for v, size in _SIZES.items() if v in variants), _FULL
  )
  config.model.fusion_options.num_layers = num_layers
  encoder = {"name": "patches", "embedding_dim": width}
  config.model.encoders = {
    "default": encoder,
    **{m: {**encoder, "patch": p} for m, p in _PATCHES.get(name, {}).items()},
  }
  augment(config)


def few(config: ml_collections.ConfigDict) -> None:
  """The first 6,000 examples of a large set, in smaller batches, in place.

  Those of av_digits have as many of every class; 2,000 are evaluated.
  """
  config.data.max_train_examples = 6000
  config.data.max_eval_examples = 2000
  config.data.batch_size = 64


def shrink(config: ml_collections.ConfigDict) -> None:
  """The smoke form of a configuration: every part runs, nothing is learnt."""
  config.num_steps = 4
  config.num_epochs = 0
  config.optimizer.warmup_steps = 0
  config.data.batch_size = 16
  config.data.max_train_examples = 64
  config.data.max_eval_examples = 32
  config.training.log_every = 2
  config.training.eval_every = 2
  config.training.checkpoint_every = 2
  config.evaluation.radii = (0.5,)
  config.evaluation.num_steps = 2
  config.evaluation.num_restarts = 1
  config.evaluation.num_queries = 10
  config.evaluation.captions.num_steps = 2
  config.evaluation.captions.num_restarts = 1
  config.evaluation.captions.num_queries = 10
  config.evaluation.masking_examples = 0
  config.evaluation.tightness = ()
  config.evaluation.smoothing.num_selection = 10
  config.evaluation.smoothing.num_estimation = 50
  config.evaluation.batch_size = 32
