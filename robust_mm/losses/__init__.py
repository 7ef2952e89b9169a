r"""Training losses: cross-entropy, margins of each modality, certified radii.

Beside them what is said about the *wrong* classes: :func:`restrained_softmax`
adds a penalty of their logits to cross-entropy.

The cross-entropies are per example. The others are means over the examples that
have at least one modality present (where ``present`` is given); a batch with
none has loss 0 and gradient 0.
"""

from robust_mm.losses.dispersions import complement_kl
from robust_mm.losses.dispersions import sorted_slice_dispersion
from robust_mm.losses.dispersions import topk_dispersion
from robust_mm.losses.dispersions import wrong_class_dispersion
from robust_mm.losses.entropies import binary_cross_entropy
from robust_mm.losses.entropies import cross_entropy
from robust_mm.losses.entropies import soft_cross_entropy
from robust_mm.losses.levels import topk_level
from robust_mm.losses.levels import topk_margin
from robust_mm.losses.named import penalty
from robust_mm.losses.named import penalty_names
from robust_mm.losses.penalties import Penalty
from robust_mm.losses.penalties import confidence_penalty
from robust_mm.losses.penalties import label_smoothing
from robust_mm.losses.penalties import logit_norm
from robust_mm.losses.radii import PUBLISHED_FLOOR
from robust_mm.losses.radii import certified_radius
from robust_mm.losses.radii import hinge_radius
from robust_mm.losses.radii import info_nce
from robust_mm.losses.radii import mixup_margin
from robust_mm.losses.radii import offset_cross_entropy
from robust_mm.losses.radii import unimodal_margin
from robust_mm.losses.radii import unimodal_radius
from robust_mm.losses.restrained import mean_weight
from robust_mm.losses.restrained import restrained_softmax
from robust_mm.losses.restrained import score_penalty
from robust_mm.losses.restrained import weights_per_example

__all__ = [
  "PUBLISHED_FLOOR",
  "Penalty",
  "binary_cross_entropy",
  "certified_radius",
  "complement_kl",
  "confidence_penalty",
  "cross_entropy",
  "hinge_radius",
  "info_nce",
  "label_smoothing",
  "logit_norm",
  "mean_weight",
  "mixup_margin",
  "offset_cross_entropy",
  "penalty",
  "penalty_names",
  "restrained_softmax",
  "score_penalty",
  "soft_cross_entropy",
  "sorted_slice_dispersion",
  "topk_dispersion",
  "topk_level",
  "topk_margin",
  "unimodal_margin",
  "unimodal_radius",
  "weights_per_example",
  "wrong_class_dispersion",
]
