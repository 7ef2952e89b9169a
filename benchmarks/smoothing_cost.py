"""What does randomised smoothing cost, next to its bare forward passes?

Prints, for several models and kinds of noise, the time of counting classes over
n noisy copies of some examples, divided by the time of n plain forward passes
on the same examples: no noise, no counting, whichever of several batch sizes is
fastest. Calls are interleaved; the number is the median of the ratios, with
their quartiles. Target: at most 1.5.

    python benchmarks/smoothing_cost.py [--repeats 15]
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

import robust_mm as rmm
from robust_mm import smoothing
from robust_mm.models import encoders

TARGET = 1.5
NUM_EXAMPLES = 4
NUM_SAMPLES = 2000
BATCHES = (250, 1000, 2000, 8000)


def seconds(function, *arguments):
  start = time.perf_counter()
  jax.block_until_ready(function(*arguments))
  return time.perf_counter() - start


def plain(predict, batch, size):
  """A function that makes all forward passes, ``size`` at a time."""
  total = NUM_EXAMPLES * NUM_SAMPLES
  rows = jax.tree.map(
    lambda x: jnp.repeat(x, size // NUM_EXAMPLES, axis=0),
    {name: batch[name] for name in ("inputs", "present")},
  )
  forward = jax.jit(lambda predict, inputs, present: predict(inputs, present))

  def run():
    return [
      forward(predict, rows["inputs"], rows["present"])
      for _ in range(total // size)
    ]

  return run


def measure(model, batch, noise, repeats):
  """``(plain seconds, their batch size, ratios)``."""
  params, state = model.init(jax.random.key(0))
  predict = smoothing.predict_fn(model, params, state)
  runs = {size: plain(predict, batch, size) for size in BATCHES}

  def count():
    return smoothing.count_classes(
      predict,
      batch["inputs"],
      batch["present"],
      batch["id"],
      jax.random.key(1),
      0,
      NUM_SAMPLES,
      noise=noise,
      num_chunks=NUM_SAMPLES // smoothing.CHUNK_SIZE,
    )

  for function in (*runs.values(), count) * 2:
    seconds(function)
  best = min(runs, key=lambda size: min(seconds(runs[size]) for _ in range(5)))
  times = [(seconds(runs[best]), seconds(count)) for _ in range(repeats)]
  return (
    statistics.median(first for first, _ in times),
    best,
    [second / first for first, second in times],
  )


def report(name, model, batch, noise, repeats):
  forward, size, ratios = measure(model, batch, noise, repeats)
  low, middle, high = statistics.quantiles(ratios, n=4)
  print(
    f"{name:<44} forward {1e3 * forward:8.1f} ms (batch {size:4d})  "
    f"smoothing/forward {middle:5.2f}  [{low:.2f}, {high:.2f}]",
    flush=True,
  )
  return middle


def cases():
  """Name, model, batch, noise; the first row has the target."""
  digits = {"left": (8, 4, 1), "right": (8, 4, 1)}
  encoder = encoders.mlp(hidden_sizes=(128,), embedding_dim=64)
  token = _model(rmm.models.token_fusion, encoder, digits)
  late = _model(rmm.models.concat_fusion, encoder, digits)
  gaussian = smoothing.gaussian(sigma=0.25)
  half = smoothing.subsample(keep={"left": 16, "right": 16})
  yield "digits, token fusion, gaussian", token, digits, gaussian
  yield "digits, token fusion, 16 of 32 pixels", token, digits, half
  yield "digits, mlp 32-128-64 + linear, gaussian", late, digits, gaussian
  images = {"image": (28, 28, 1)}
  few = smoothing.subsample(keep={"image": 50})
  wide = encoders.mlp(hidden_sizes=(512, 512), embedding_dim=64)
  wide = _model(rmm.models.concat_fusion, wide, images)
  yield "28x28, mlp 784-512-512-64, gaussian", wide, images, gaussian
  yield "28x28, mlp 784-512-512-64, 50 pixels", wide, images, few
  cnn = encoders.cnn(features=(16, 32), embedding_dim=64)
  cnn = _model(rmm.models.concat_fusion, cnn, images)
  yield "28x28, cnn 16-32, gaussian", cnn, images, gaussian


def _model(build, encoder, shapes):
  return build(
    dict.fromkeys(shapes, encoder), num_classes=10, input_shapes=shapes
  )


def _batch(shapes):
  keys = jax.random.split(jax.random.key(2), len(shapes))
  return {
    "inputs": {
      name: jax.random.uniform(key, (NUM_EXAMPLES, *shape))
      for key, (name, shape) in zip(keys, shapes.items())
    },
    "present": {name: jnp.ones(NUM_EXAMPLES, bool) for name in shapes},
    "id": jnp.arange(NUM_EXAMPLES),
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--repeats", type=int, default=15)
  repeats = parser.parse_args().repeats
  print(
    f"jax {jax.__version__}, {jax.devices()[0].device_kind}, "
    f"{NUM_EXAMPLES} examples x {NUM_SAMPLES} copies"
  )
  ratios = [
    report(name, model, _batch(shapes), noise, repeats)
    for name, model, shapes, noise in cases()
  ]
  print(
    f"\nfirst row {ratios[0]:.2f}, largest {max(ratios):.2f}, target at most "
    f"{TARGET}"
  )


if __name__ == "__main__":
  main()
