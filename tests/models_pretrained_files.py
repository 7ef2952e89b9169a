"""A small vision transformer and how its files are read."""

import jax
import numpy as np
import vision_transformers as reference

from robust_mm.models import vit

SHAPE = (8, 8, 3)
NET = vit.vision_transformer(
  width=16,
  depth=2,
  num_heads=2,
  patch_size=2,
  num_classes=5,
  preprocess=vit.HALF,
)


def random_params():
  """Of NET, other ones than those it begins with."""
  return reference.random_params(NET, SHAPE)


def load(path, **options):
  return vit.load_safetensors(
    path, **{"preprocess": vit.HALF, "num_heads": 2, **options}
  )


def same(one, two):
  assert jax.tree.structure(one) == jax.tree.structure(two)
  jax.tree.map(np.testing.assert_array_equal, one, two)
