"""Does PGD cost more than the gradients it needs?

Prints, for several models, the time of a whole attack over (steps x restarts)
times one jitted input gradient on the same batch. The target is at most 1.1.
Attacks and as many gradients one after the other take turns: on a busy machine
the windows are of one length and slow down alike. Medians are compared.

  python benchmarks/attack_cost.py [--rounds 15] [--batch 256]
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

from robust_mm import attacks

TARGET = 1.1
NUM_STEPS = 50


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--rounds", type=int, default=15)
  parser.add_argument("--batch", type=int, default=256)
  arguments = parser.parse_args()
  print(f"{jax.devices()[0].device_kind}, batch {arguments.batch}")
  print(
    f"{'model':<22}{'attack':<22}{'gradients ms':>14}{'attack ms':>11}", end=""
  )
  print(f"{'ratio':>8}  target {TARGET}")
  for name, (logits_fn, inputs, label) in _models(arguments.batch).items():
    for title, attack in _attacks().items():
      gradients_s, attack_s = _medians(
        attack, logits_fn, inputs, label, arguments.rounds
      )
      ratio = attack_s / gradients_s
      verdict = "ok" if ratio <= TARGET else "above"
      print(
        f"{name:<22}{title:<22}{gradients_s * 1e3:>14.1f}{attack_s * 1e3:>11.1f}"
        f"{ratio:>8.3f}  {verdict}",
        flush=True,
      )


def _attacks():
  common = {"budget": 0.3, "num_steps": NUM_STEPS}
  ranged = {**common, "valid_range": (0.0, 1.0)}
  return {
    "l2": attacks.pgd(norm=2, num_restarts=1, **common),
    "l2, range": attacks.pgd(norm=2, num_restarts=1, **ranged),
    "linf, range": attacks.pgd(norm="linf", num_restarts=1, **ranged),
    "l2, range, 5 restarts": attacks.pgd(norm=2, num_restarts=5, **ranged),
  }


def _medians(attack, logits_fn, inputs, label, rounds):
  """Median seconds of all the gradients and of the attack, in turns."""

  def loss(inputs, label):
    return jnp.sum(attacks.losses.margin(logits_fn(inputs), label))

  gradient = jax.jit(jax.grad(loss))
  run = jax.jit(lambda key, x, y: attack(key, logits_fn, x, y))
  key = jax.random.key(0)
  _seconds(gradient, inputs, label)
  _seconds(run, key, inputs, label)
  num_grads = NUM_STEPS * attack.settings["num_restarts"]

  def gradients(inputs, label):
    for _ in range(num_grads):
      jax.block_until_ready(gradient(inputs, label))

  gradient_times, attack_times = [], []
  for _ in range(rounds):
    gradient_times.append(_seconds(gradients, inputs, label))
    attack_times.append(_seconds(run, key, inputs, label))
  return statistics.median(gradient_times), statistics.median(attack_times)


def _seconds(fn, *arguments):
  start = time.perf_counter()
  jax.block_until_ready(fn(*arguments))
  return time.perf_counter() - start


def _models(batch):
  digits = datasets.load_digits()
  rows = np.arange(batch) % len(digits.target)
  images = jnp.asarray(digits.images[rows] / 16, jnp.float32)
  label = jnp.asarray(digits.target[rows], jnp.int32)
  flat = jnp.reshape(images, (batch, 64))
  halves = {"left": flat[:, :32], "right": flat[:, 32:]}
  large = jax.image.resize(images, (batch, 28, 28), "linear")[..., None]
  return {
    "mlp 64-256-256-10": (_mlp((64, 256, 256, 10)), {"x": flat}, label),
    "two encoders 64-32": (_late_fusion(), halves, label),
    "mlp 784-512-512-10": (
      _mlp((784, 512, 512, 10)),
      {"x": jnp.reshape(large, (batch, 784))},
      label,
    ),
    "cnn 28x28, 16-32": (_cnn(), {"x": large}, label),
  }


def _mlp(sizes, seed=0):
  rng = np.random.default_rng(seed)
  kernels = [
    jnp.asarray(rng.normal(size=pair) / np.sqrt(pair[0]), jnp.float32)
    for pair in zip(sizes[:-1], sizes[1:])
  ]

  def logits_fn(inputs):
    (x,) = inputs.values()
    for kernel in kernels[:-1]:
      x = jax.nn.relu(x @ kernel)
    return x @ kernels[-1]

  return logits_fn


def _late_fusion():
  left, right = _mlp((32, 64, 32, 10)), _mlp((32, 64, 32, 10), seed=1)

  def logits_fn(inputs):
    parts = {name: {name: x} for name, x in inputs.items()}
    return left(parts["left"]) + right(parts["right"])

  return logits_fn


def _cnn():
  rng = np.random.default_rng(0)
  first = jnp.asarray(rng.normal(size=(3, 3, 1, 16)) / 3, jnp.float32)
  second = jnp.asarray(rng.normal(size=(3, 3, 16, 32)) / 12, jnp.float32)
  head = jnp.asarray(rng.normal(size=(32 * 49, 10)) / 40, jnp.float32)
  layout = ("NHWC", "HWIO", "NHWC")

  def logits_fn(inputs):
    (x,) = inputs.values()
    for kernel in (first, second):
      x = jax.lax.conv_general_dilated(
        x, kernel, (2, 2), "SAME", dimension_numbers=layout
      )
      x = jax.nn.relu(x)
    return jnp.reshape(x, (x.shape[0], 32 * 49)) @ head

  return logits_fn


if __name__ == "__main__":
  main()
