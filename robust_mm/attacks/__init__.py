"""Attacks on multimodal classifiers, as values.

``attack = attacks.pgd(norm=2, budget=0.5)`` is a frozen object;
``attack(key, logits_fn, inputs, label)`` are adversarial inputs. A perturbation
lives in one joint ball over all modalities or in a ball for each; what must not
move comes back bit-identical.
"""

from robust_mm.attacks import losses
from robust_mm.attacks.ascent import apgd
from robust_mm.attacks.base import Attack
from robust_mm.attacks.boundaries import minimum_norm
from robust_mm.attacks.ensemble import auto
from robust_mm.attacks.gradient import fgm
from robust_mm.attacks.gradient import pgd
from robust_mm.attacks.measures import distances
from robust_mm.attacks.measures import logits_fn
from robust_mm.attacks.measures import robust_accuracy
from robust_mm.attacks.measures import survives
from robust_mm.attacks.queries import square
from robust_mm.attacks.registry import arguments
from robust_mm.attacks.registry import make
from robust_mm.attacks.registry import names
from robust_mm.attacks.survivors import Outcome
from robust_mm.attacks.survivors import attack_survivors

__all__ = [
  "Attack",
  "Outcome",
  "apgd",
  "arguments",
  "attack_survivors",
  "auto",
  "distances",
  "fgm",
  "logits_fn",
  "losses",
  "make",
  "minimum_norm",
  "names",
  "pgd",
  "robust_accuracy",
  "square",
  "survives",
]
