r"""Randomised smoothing: certificates of any model, from many noisy copies.

The smoothed classifier g answers with the class that the base classifier f
gives most often when noise is added to its input. How often that is bounds how
far the input may move before g can answer otherwise; nothing about f is used.

  noise = smoothing.gaussian(sigma=0.25)
  found = smoothing.certify(logits_fn, batch, noise, jax.random.key(0))
  found.radius, found.modality_radius["left"], found.covers({"left": 0.3})

What may be claimed: with probability 1 - alpha *per example*, over the noise
that was drawn, g keeps its prediction inside the set. Of N examples up to
alpha N may be certified wrongly. Nothing is said about f itself, and f must
have been trained with the same noise to be any good under it
(``recipes.joint(variant="noise")``). Modality votes are exact: alpha = 0.

Inside, each module imports only from those before it: noise, bounds, sampling,
certificates, votes, door.

References:
  `Cohen et al. (2019) <https://arxiv.org/abs/1902.02918>`_, Gaussian noise;
  `Wang et al. (2024) <https://arxiv.org/abs/2403.19080>`_, sub-sampling.
"""

from robust_mm.smoothing.bounds import clopper_pearson
from robust_mm.smoothing.bounds import kept_probability
from robust_mm.smoothing.bounds import overlap
from robust_mm.smoothing.bounds import rival_probability
from robust_mm.smoothing.certificates import SmoothedCertificate
from robust_mm.smoothing.certificates import from_counts
from robust_mm.smoothing.door import certify
from robust_mm.smoothing.door import predict_fn
from robust_mm.smoothing.noise import Noise
from robust_mm.smoothing.noise import Votes
from robust_mm.smoothing.noise import apply
from robust_mm.smoothing.noise import check
from robust_mm.smoothing.noise import from_settings
from robust_mm.smoothing.noise import gaussian
from robust_mm.smoothing.noise import mixed
from robust_mm.smoothing.noise import modality_votes
from robust_mm.smoothing.noise import subsample
from robust_mm.smoothing.sampling import CHUNK_SIZE
from robust_mm.smoothing.sampling import count_classes
from robust_mm.smoothing.sampling import count_votes
from robust_mm.smoothing.sampling import streams
from robust_mm.smoothing.votes import VoteCertificate

__all__ = [
  "CHUNK_SIZE",
  "Noise",
  "SmoothedCertificate",
  "VoteCertificate",
  "Votes",
  "apply",
  "certify",
  "check",
  "clopper_pearson",
  "count_classes",
  "count_votes",
  "from_counts",
  "from_settings",
  "gaussian",
  "kept_probability",
  "mixed",
  "modality_votes",
  "overlap",
  "predict_fn",
  "rival_probability",
  "streams",
  "subsample",
]
