"""Small models whose visualisations have a closed form."""

import jax
import jax.numpy as jnp

from robust_mm import visualization
from robust_mm._types import Model
from robust_mm._types import Outputs
from robust_mm.visualization import transforms

KEY = jax.random.key(3)
SHAPE = (6, 5, 1)
NUM_CLASSES = 4
WEIGHTS = jax.random.normal(jax.random.key(11), (NUM_CLASSES, *SHAPE))
BIAS = jnp.array([0.5, 0.0, -0.5, 1.0])


def linear(params, inputs):
  logits = jnp.einsum(
    "bhwc,khwc->bk", inputs["image"], params, precision="highest"
  )
  return logits + BIAS[None]


def make(fn=linear, params=WEIGHTS, classes=(0, 2), **options):
  options = {
    "transforms": transforms.identity(),
    "shape": SHAPE,
    "key": KEY,
    "held_out": {},
    "seeds": 2,
    "num_steps": 12,
    **options,
  }
  return visualization.class_visualization(
    fn, params, "image", classes, **options
  )


def additive():
  """A sum of scores of two modalities, the image's not linear."""
  heads = {
    "image": WEIGHTS,
    "sound": jax.random.normal(jax.random.key(5), (NUM_CLASSES, 3)),
  }

  def encode(params, state, inputs, present, *, train=False, key=None):
    return {
      name: jnp.where(
        present[name].reshape((-1,) + (1,) * (x.ndim - 1)), x, 0.0
      )
      for name, x in inputs.items()
    }, state

  def fuse(params, embeddings, present):
    scores = {
      "image": jnp.einsum(
        "bhwc,khwc->bk", jnp.tanh(embeddings["image"]), params["image"]
      ),
      "sound": embeddings["sound"] @ params["sound"].T,
    }
    embeddings = {name: x.reshape(len(x), -1) for name, x in embeddings.items()}
    logits = scores["image"] + scores["sound"]
    return Outputs(logits=logits, scores=scores, embeddings=embeddings)

  return Model(
    modalities=("image", "sound"),
    num_classes=NUM_CLASSES,
    init=lambda key: (heads, {}),
    encode=encode,
    fuse=fuse,
    input_shapes={"image": SHAPE, "sound": (3,)},
  ), heads
