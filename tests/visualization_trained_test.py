"""A small CNN on real digits: what the transformations are worth."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robust_mm import models
from robust_mm import visualization
from robust_mm.evaluation import metrics
from robust_mm.visualization import transforms

SEEDS = 3
CLASSES = tuple(range(10))


@pytest.fixture(scope="module")
def trained(shared_path):
  """Model, parameters and 1,000 test items; about four passes over 6,000."""
  stored = dict(np.load(shared_path / "data/av_digits/mnist_images.npz"))
  images = stored["train_images"][:6000, ..., None] / np.float32(255)
  labels = stored["train_labels"][:6000].astype(np.int32)
  model = models.late_fusion(
    {"image": models.encoders.cnn(features=(8, 16), embedding_dim=32)},
    num_classes=10,
    input_shapes={"image": (28, 28, 1)},
  )
  params, state = model.init(jax.random.key(0))
  num_steps, size = 360, 64
  tx = optax.adam(optax.cosine_decay_schedule(3e-3, num_steps))

  def loss(params, x, y):
    here = {"image": jnp.ones(size, bool)}
    logits = model.apply(params, state, {"image": x}, here)[0].logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  @jax.jit
  def fit(params, images, labels):
    def step(carry, rows):
      params, opt_state = carry
      grads = jax.grad(loss)(params, images[rows], labels[rows])
      updates, opt_state = tx.update(grads, opt_state)
      return (optax.apply_updates(params, updates), opt_state), None

    rows = jax.random.randint(jax.random.key(1), (num_steps, size), 0, 6000)
    return jax.lax.scan(step, (params, tx.init(params)), rows)[0][0]

  params = fit(params, images, labels)
  items = {
    "inputs": {
      "image": stored["test_images"][:1000, ..., None] / np.float32(255)
    },
    "present": {"image": np.ones(1000, bool)},
    "label": stored["test_labels"][:1000].astype(np.int32),
  }
  logits = model.apply(params, state, items["inputs"], items["present"])[0]
  assert metrics.accuracy(items["label"], logits.logits.argmax(-1)) > 0.93
  return model, params, items


@pytest.fixture(scope="module")
def pictures(trained):
  """``{control: Visualization}``, defaults but for the transformations."""
  model, params, _ = trained
  return {
    name: visualization.class_visualization(
      model,
      params,
      "image",
      CLASSES,
      key=jax.random.key(5),
      transforms=chosen,
      seeds=SEEDS,
    )
    for name, chosen in (
      ("none", transforms.identity(of="image")),
      ("defaults", transforms.image()),
    )
  }


def test_transformations_keep_the_class_far_more_often(pictures):
  far = [
    np.asarray(pictures[name].transforms_accuracy["far"]).ravel()
    for name in ("defaults", "none")
  ]
  found = metrics.paired_bootstrap(*far)
  assert found.difference >= 0.1
  assert found.low > 0


def test_metrics_tell_synthesised_inputs_from_real_ones(trained, pictures):
  model, params, items = trained
  image, label = items["inputs"]["image"], items["label"]
  rows = np.stack([np.flatnonzero(label == c)[:SEEDS] for c in CLASSES])
  real = image[rows]
  found = {"real": real, **{n: p.inputs for n, p in pictures.items()}}
  kind = {"modality": "image"}
  natural = {
    name: visualization.naturalness(model, params, x, CLASSES, items, **kind)
    for name, x in found.items()
  }
  # A real item is as far from the others as they are from each other.
  ratio = float(natural["real"]["feature_distance"].mean())
  assert 0.8 < ratio < 1.25
  for what in ("total_variation", "feature_distance"):
    mean = {n: float(natural[n][what].mean()) for n in natural}
    assert mean["real"] < mean["defaults"] < mean["none"]
  slope = {n: float(natural[n]["spectral_slope"].mean()) for n in natural}
  assert slope["defaults"] < slope["none"]
  assert abs(slope["defaults"] - slope["real"]) < slope["none"] - slope["real"]
  # The class of a real item is mostly kept by near changes, a wrong one never.
  near = transforms.held_out(transforms.image(), (28, 28, 1))["near"]
  kept = visualization.transformation_accuracy(
    model, params, real, CLASSES, near, key=jax.random.key(9), **kind
  )
  assert kept.shape == (10, SEEDS)
  wrong = visualization.transformation_accuracy(
    model,
    params,
    real,
    (*CLASSES[1:], CLASSES[0]),
    near,
    key=jax.random.key(9),
    **kind,
  )
  assert kept.mean() > 0.75 > 0.1 > wrong.mean()
  sure = visualization.class_probability(model, params, real, CLASSES, **kind)
  assert sure.mean() > 0.85
  assert np.all(visualization.diversity(model, params, real, **kind) > 0)
  same = np.repeat(real[:, :1], 2, axis=1)
  np.testing.assert_allclose(
    visualization.diversity(model, params, same, **kind), 0, atol=1e-5
  )


def test_spectral_slope_is_that_of_the_power_law():
  rows, columns = np.fft.fftfreq(64)[:, None], np.fft.rfftfreq(64)[None]
  frequency = np.sqrt(rows**2 + columns**2)
  frequency[0, 0] = 1.0
  draw = np.random.default_rng(0).normal(size=(2, 40, *frequency.shape))
  for power in (0.0, 2.0):
    spectrum = (draw[0] + 1j * draw[1]) * frequency ** (-power / 2)
    image = np.fft.irfft2(spectrum, s=(64, 64)).astype(np.float32)
    slopes = jax.vmap(visualization.spectral_slope)(jnp.asarray(image))
    assert abs(float(slopes.mean()) + power) < 0.1
