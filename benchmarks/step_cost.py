"""What does the CRMT head add to a training step?

Ratio of one CRMT step (orthonormal head by Newton-Schulz, cross-entropy plus
the uni-modal margin loss) to the plain joint step (dense head, cross-entropy)
of the same ordinary encoders and the same optimiser, and of the head computed
as published, by an eigendecomposition in every step. Steps are interleaved, so
that other work on the machine falls on all of them alike; medians and their
ratios are printed.

  python benchmarks/step_cost.py --num_steps=60

Aim: at most 1.05 for up to 100 classes.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robust_mm import losses
from robust_mm import modalities
from robust_mm import models
from robust_mm.models import encoders

IMAGE, SOUND = (28, 28, 1), (64, 40)


def pairs(embedding_dim):
  """Encoders of an image and of a sound, small ones first."""
  dim = {"embedding_dim": embedding_dim}
  return {
    "mlp": (
      encoders.mlp(hidden_sizes=(256, 256), **dim),
      encoders.mlp(hidden_sizes=(256, 256), **dim),
    ),
    "cnn": (encoders.cnn(**dim), encoders.temporal_cnn(**dim)),
    "transformer": (
      encoders.transformer(**dim),
      encoders.transformer(**dim),
    ),
    "resnet18": (
      encoders.resnet18(width=16, **dim),
      encoders.temporal_cnn(**dim),
    ),
  }


class EighFusion(models.OrthogonalFusion):
  """The head as published: an inverse square root by eigendecomposition."""

  def rows(self, params):
    def orthonormal(proxy):
      values, vectors = jnp.linalg.eigh(proxy @ proxy.T)
      root = vectors @ (vectors / jnp.sqrt(values)[None]).T
      return root @ proxy

    return {name: orthonormal(z) for name, z in params["proxy"].items()}


def make_step(model, state, margin):
  """``step(params, opt_state, batch)``; the margin loss if asked for."""
  tx = optax.adam(1e-3)

  def loss_fn(params, batch):
    outputs, _ = model.apply(params, state, batch["inputs"], batch["present"])
    loss = jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(
        outputs.logits, batch["label"]
      )
    )
    if margin:
      loss += losses.unimodal_margin(
        outputs.scores, batch["label"], batch["present"]
      )
    return loss

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, opt_state, batch):
    loss, gradient = jax.value_and_grad(loss_fn)(params, batch)
    updates, opt_state = tx.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  return step, tx


def random_batch(num_classes, batch_size):
  """Arrays of the sizes of the av_digits data."""
  rng = np.random.default_rng(0)
  inputs = {"image": IMAGE, "sound": SOUND}
  return {
    "inputs": {
      name: jnp.asarray(rng.normal(size=(batch_size, *shape)), jnp.float32)
      for name, shape in inputs.items()
    },
    "present": {name: jnp.ones(batch_size, bool) for name in inputs},
    "label": jnp.asarray(rng.integers(0, num_classes, batch_size), jnp.int32),
  }


def measure(pair, num_classes, batch_size, num_steps):
  """Median seconds a step of each head."""
  heads = {
    "plain": (models.ConcatFusion(num_classes), False),
    "crmt": (models.OrthogonalFusion(num_classes), True),
    "eigh": (EighFusion(num_classes), True),
  }
  batch = random_batch(num_classes, batch_size)
  runs = {}
  for name, (head, margin) in heads.items():
    model = models.from_parts(
      dict(zip(modalities.names(batch["inputs"]), pair)),
      head,
      input_shapes={"image": IMAGE, "sound": SOUND},
    )
    params, state = model.init(jax.random.key(0))
    step, tx = make_step(model, state, margin)
    runs[name] = [step, params, tx.init(params), []]

  warm_up = 3
  for _ in range(num_steps + warm_up):
    for run in runs.values():
      step, params, opt_state, seconds = run
      start = time.perf_counter()
      params, opt_state, _ = jax.block_until_ready(
        step(params, opt_state, batch)
      )
      seconds.append(time.perf_counter() - start)
      run[1:3] = params, opt_state
  return {name: np.median(run[3][warm_up:]) for name, run in runs.items()}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--num_steps", type=int, default=40)
  parser.add_argument("--batch_size", type=int, default=256)
  parser.add_argument("--embedding_dim", type=int, default=128)
  parser.add_argument("--classes", type=int, nargs="+", default=[10, 31, 100])
  parser.add_argument("--encoders", nargs="+", default=None)
  arguments = parser.parse_args()

  device = jax.devices()[0]
  print(f"device {device.device_kind}, batch {arguments.batch_size}")
  print("encoders      classes  plain ms  crmt ms  ratio  published ms  ratio")
  chosen = pairs(arguments.embedding_dim)
  for name in arguments.encoders or chosen:
    for num_classes in arguments.classes:
      times = measure(
        chosen[name], num_classes, arguments.batch_size, arguments.num_steps
      )
      plain, crmt, eigh = (1e3 * times[n] for n in ("plain", "crmt", "eigh"))
      print(
        f"{name:12s}  {num_classes:7d}  {plain:8.2f}  {crmt:7.2f}  "
        f"{crmt / plain:5.3f}  {eigh:12.2f}  {eigh / plain:5.3f}",
        flush=True,
      )


if __name__ == "__main__":
  main()
