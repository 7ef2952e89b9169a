"""Label-preserving random changes of training inputs, as values.

``augmentation = augmentations.rotate(angle=0.3)`` is a frozen object;
``augmentation(key, x, present)`` changes every present example of ``x``
[b, ...] by a draw of its own. ``augmentations.make({"inertial": {"rotate":
{"angle": 0.3}, "noise": {"deviation": 0.1}}})`` is the intervention of a recipe
that does so for several modalities; a run's is ``config.augmentation``.

Operations are applied in this order, whatever the order they are written in:

- ``warp_time``: sequences and videos are stretched and shifted in time.
- ``rotate``: vectors (x, y, z) in the last axis are rotated.
- ``scale``: inputs are multiplied by a positive factor.
- ``move``: images and videos are stretched and shifted in space.
- ``brighten``: one offset is added to all that is no background.
- ``erase``: one box is set to zero.
- ``noise``: white noise is added.

Strength 0 is the identity, bit by bit. Results are a function of the key, the
shape and the row, whatever the devices; shapes and dtypes stay, integers are
refused. Absent examples stay as they are, and no value of them reaches others.
"""

from robust_mm import _lazy

# The command line checks options without jax.
__getattr__, __dir__, __all__ = _lazy.attach(
  __name__,
  names={
    "Augmentation": "robust_mm.augmentations.base",
    "brighten": "robust_mm.augmentations.factories",
    "check": "robust_mm.augmentations.composition",
    "erase": "robust_mm.augmentations.factories",
    "make": "robust_mm.augmentations.composition",
    "move": "robust_mm.augmentations.factories",
    "noise": "robust_mm.augmentations.factories",
    "rotate": "robust_mm.augmentations.factories",
    "scale": "robust_mm.augmentations.factories",
    "warp_time": "robust_mm.augmentations.factories",
  },
)
