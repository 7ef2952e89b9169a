"""Training recipes: ordered phases that one loop runs."""

from robust_mm.recipes.captioning import captioning
from robust_mm.recipes.crmt import certified_radius
from robust_mm.recipes.crmt import crmt
from robust_mm.recipes.decoders import statistics as feature_statistics
from robust_mm.recipes.joint import joint
from robust_mm.recipes.masd import masd
from robust_mm.recipes.modal_immune import modal_immune
from robust_mm.recipes.nullspace import nullspace
from robust_mm.recipes.phases import Job
from robust_mm.recipes.phases import Phase
from robust_mm.recipes.phases import Recipe
from robust_mm.recipes.pretraining import pretrain
from robust_mm.recipes.probing import finetune
from robust_mm.recipes.restraints import Restraint

__all__ = [
  "Job",
  "Phase",
  "Recipe",
  "Restraint",
  "captioning",
  "certified_radius",
  "crmt",
  "feature_statistics",
  "finetune",
  "joint",
  "masd",
  "modal_immune",
  "nullspace",
  "pretrain",
]
