r"""What a network wants to see: inputs synthesised to activate a class.

Gradient ascent on the input of one modality under random transformations that
keep its class, with the other modalities absent, held at an item, or
synthesised as well; numbers beside the pictures; PNG without a library.

  found = visualization.class_visualization(
    model, params, "image", range(10), key=jax.random.key(0),
    transforms=visualization.transforms.image(rotation=15, jitter=2),
  )
  found.transforms_accuracy["far"]
  picture = visualization.grid(found.inputs, num_columns=10)
  visualization.write_png("digits.png", picture, value_range=(0.0, 1.0))

Inside, each module imports only from those before it: affine, kinds, transform,
transforms, parameterizations, objectives, views, checks, metrics, ascent, door;
colours, drawing, pictures.

References:
  `Li et al. (2021) <https://arxiv.org/abs/2106.09982>`_, in our reading;
  `Olah et al. (2017) <https://distill.pub/2017/feature-visualization/>`_.
"""

from robust_mm.visualization import drawing
from robust_mm.visualization import metrics
from robust_mm.visualization import transforms
from robust_mm.visualization.affine import resample
from robust_mm.visualization.door import Visualization
from robust_mm.visualization.door import class_visualization
from robust_mm.visualization.metrics import class_probability
from robust_mm.visualization.metrics import diversity
from robust_mm.visualization.metrics import modality_margins
from robust_mm.visualization.metrics import naturalness
from robust_mm.visualization.metrics import spectral_slope
from robust_mm.visualization.metrics import transformation_accuracy
from robust_mm.visualization.objectives import objective
from robust_mm.visualization.pictures import grid
from robust_mm.visualization.pictures import png
from robust_mm.visualization.pictures import tile
from robust_mm.visualization.pictures import write_png
from robust_mm.visualization.transforms import Transform

__all__ = [
  "Transform",
  "Visualization",
  "class_probability",
  "class_visualization",
  "diversity",
  "drawing",
  "grid",
  "metrics",
  "modality_margins",
  "naturalness",
  "objective",
  "png",
  "resample",
  "spectral_slope",
  "tile",
  "transformation_accuracy",
  "transforms",
  "write_png",
]
