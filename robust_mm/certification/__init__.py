r"""Margin certificates of late-fusion models: how far an input may move.

The claim: for every perturbation of the arrays in ``batch["inputs"]`` inside
the certified set, the class that the model predicts stays what it is. Masks and
lengths are not attacked; preprocessing outside the model is outside the claim;
whether the prediction is *correct* is a separate factor
(``certified_accuracy``).

``certify`` asks a model; ``margin_certificate`` takes plain arrays of a model
of any framework; ``fit_integration`` re-weights modalities for a threat.
Inside, each module imports only from those before it: geometries, tables,
batches, empirical, programs, balls, certificates, arrays, relaxed, combined,
door, recheck, accuracy, optimizers, integration.

References:
  `Yang et al. (2024) <https://arxiv.org/abs/2402.06244>`_;
  `Tsuzuku et al. (2018) <https://arxiv.org/abs/1802.04034>`_.
"""

from robust_mm.certification.accuracy import certified_accuracy
from robust_mm.certification.accuracy import wilson_interval
from robust_mm.certification.arrays import margin_certificate
from robust_mm.certification.batches import relative_units
from robust_mm.certification.certificates import DEFAULT_SLACK
from robust_mm.certification.certificates import NO_SLACK
from robust_mm.certification.certificates import Certificate
from robust_mm.certification.certificates import Slack
from robust_mm.certification.door import BALL_SOURCES
from robust_mm.certification.door import SOURCES
from robust_mm.certification.door import certify
from robust_mm.certification.empirical import empirical_lipschitz
from robust_mm.certification.empirical import empirical_tables
from robust_mm.certification.geometries import abstract_geometry
from robust_mm.certification.geometries import missing_constants
from robust_mm.certification.integration import accept_integration
from robust_mm.certification.integration import fit_integration
from robust_mm.certification.integration import integration_factors
from robust_mm.certification.integration import integration_loss
from robust_mm.certification.integration import integration_parameters
from robust_mm.certification.optimizers import integration_optimizer
from robust_mm.certification.optimizers import published_optimizer
from robust_mm.certification.recheck import recheck_fp64
from robust_mm.certification.tables import SensitivityTables
from robust_mm.certification.tables import pairwise_sensitivity
from robust_mm.certification.tables import sensitivity
from robust_mm.certification.tables import sensitivity_tables
from robust_mm.certification.tables import split_tables

__all__ = [
  "BALL_SOURCES",
  "DEFAULT_SLACK",
  "NO_SLACK",
  "SOURCES",
  "Certificate",
  "SensitivityTables",
  "Slack",
  "abstract_geometry",
  "accept_integration",
  "certified_accuracy",
  "certify",
  "empirical_lipschitz",
  "empirical_tables",
  "fit_integration",
  "integration_factors",
  "integration_loss",
  "integration_optimizer",
  "integration_parameters",
  "margin_certificate",
  "missing_constants",
  "pairwise_sensitivity",
  "published_optimizer",
  "recheck_fp64",
  "relative_units",
  "sensitivity",
  "sensitivity_tables",
  "split_tables",
  "wilson_interval",
]
