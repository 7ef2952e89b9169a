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
from robust_mm import models

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
  for name, problem in _problems(arguments.batch).items():
    for title, attack in _attacks().items():
      gradients_s, attack_s = _medians(attack, *problem, arguments.rounds)
      ratio = attack_s / gradients_s
      verdict = "ok" if ratio <= TARGET else "above"
      print(
        f"{name:<22}{title:<22}{gradients_s * 1e3:>14.1f}"
        f"{attack_s * 1e3:>11.1f}{ratio:>8.3f}  {verdict}",
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


def _medians(attack, apply, params, inputs, label, rounds):
  """Median seconds of all the gradients and of the attack, in turns."""

  @jax.jit
  @jax.grad
  def gradient(inputs, params, label):
    return jnp.sum(attacks.losses.margin(apply(params, inputs), label))

  @jax.jit
  def run(inputs, params, label):
    key = jax.random.key(0)
    return attack(key, lambda x: apply(params, x), inputs, label)

  num_grads = NUM_STEPS * attack.settings["num_restarts"]

  def gradients(*arguments):
    for _ in range(num_grads):
      jax.block_until_ready(gradient(*arguments))

  _seconds(gradient, inputs, params, label)
  _seconds(run, inputs, params, label)
  gradient_times, attack_times = [], []
  for _ in range(rounds):
    gradient_times.append(_seconds(gradients, inputs, params, label))
    attack_times.append(_seconds(run, inputs, params, label))
  return statistics.median(gradient_times), statistics.median(attack_times)


def _seconds(fn, *arguments):
  start = time.perf_counter()
  jax.block_until_ready(fn(*arguments))
  return time.perf_counter() - start


def _problems(batch):
  """``{name: (apply(params, inputs), params, inputs, label)}``."""
  digits = datasets.load_digits()
  rows = np.arange(batch) % len(digits.target)
  images = jnp.asarray(digits.images[rows] / 16, jnp.float32)
  label = jnp.asarray(digits.target[rows], jnp.int32)
  flat = {"x": jnp.reshape(images, (batch, 64))}
  halves = {
    "left": jnp.reshape(images[:, :, :4], (batch, 32)),
    "right": jnp.reshape(images[:, :, 4:], (batch, 32)),
  }
  large = jax.image.resize(images, (batch, 28, 28), "linear")[..., None]
  parts = {
    "mlp, 64 inputs": (models.encoders.mlp(hidden_sizes=(256, 256)), flat),
    "mlp, 784 inputs": (
      models.encoders.mlp(hidden_sizes=(512, 512)),
      {"x": jnp.reshape(large, (batch, 784))},
    ),
    "cnn, 28x28": (models.encoders.cnn(), {"x": large}),
    "two mlps": (models.encoders.mlp(hidden_sizes=(64, 32)), halves),
    "two lipschitz mlps": (models.lipschitz.lipschitz_mlp(), halves),
  }
  return {
    name: (*_model(encoder, inputs), inputs, label)
    for name, (encoder, inputs) in parts.items()
  }


def _model(encoder, inputs):
  model = models.late_fusion(
    dict.fromkeys(inputs, encoder),
    10,
    input_shapes={m: x.shape[1:] for m, x in inputs.items()},
  )
  params, state = model.init(jax.random.key(0))
  present = {m: jnp.ones(x.shape[0], bool) for m, x in inputs.items()}

  def apply(params, inputs):
    return attacks.logits_fn(model, params, state, present)(inputs)

  return apply, params


if __name__ == "__main__":
  main()
