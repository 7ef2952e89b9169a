"""What does a curvature mask cost, next to the same step without it?

A step takes the task gradient and a collapse gradient of one view in turn, and
AdamW; the mask is between them and AdamW, at its default period. Adapters of
six views of the sizes of the mfeat data, batch 128; the collapse loss of all
views is what the gates measure, the Fisher mask has 16 task examples at each
refresh (and, apart from the target, the whole batch). Prints seconds a step
over whole periods, refreshes included, as a ratio to the step without a mask
(periods of both in turn), with a 95 % interval over periods. Target: at most
1.15.

    python benchmarks/mask_cost.py [--repeats 9]
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robust_mm import masking
from robust_mm import spectrum

TARGET = 1.15
VIEWS = {"fac": 216, "fou": 76, "kar": 64, "mor": 6, "pix": 240, "zer": 47}
NUM_CLASSES = 10


def init(key, width, dim):
  """Adapters Linear-GELU-Linear, a two-layer head on their concatenation."""

  def dense(key, shape):
    return jax.random.normal(key, shape) / shape[0] ** 0.5

  keys = iter(jax.random.split(key, 2 * len(VIEWS) + 2))
  params = {
    name: {
      "in": dense(next(keys), (size, width)),
      "out": dense(next(keys), (width, dim)),
    }
    for name, size in VIEWS.items()
  }
  params["rest"] = {
    "hidden": dense(next(keys), (dim * len(VIEWS), 128)),
    "head": dense(next(keys), (128, NUM_CLASSES)),
  }
  return params


def encode(params, inputs):
  return {
    name: jax.nn.gelu(x @ params[name]["in"]) @ params[name]["out"]
    for name, x in inputs.items()
  }


def task_loss(params, batch):
  Z = encode(params, batch["inputs"])
  fused = jnp.concatenate([Z[name] for name in sorted(Z)], axis=-1)
  logits = jax.nn.gelu(fused @ params["rest"]["hidden"])
  logits = logits @ params["rest"]["head"]
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
  )


def collapse_losses(params, batch):
  return jnp.stack(
    [
      0.1 * spectrum.collapse(z, spectral_weight=0.01).loss
      for _, z in sorted(encode(params, batch["inputs"]).items())
    ]
  )


def example_loss(params, example):
  return task_loss(params, jax.tree.map(lambda x: x[None], example))


def make_step(tx, masked, num_fisher):
  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, batch, arm):
    attacked = jax.nn.one_hot(arm, len(VIEWS))
    g = jax.grad(task_loss)(params, batch)
    q = jax.grad(lambda p: jnp.sum(attacked * collapse_losses(p, batch)))(
      params
    )
    if masked:
      updates, state = tx.update(
        g,
        state,
        params,
        destructive=q,
        value_fn=lambda p: jnp.sum(collapse_losses(p, batch)),
        fisher_batch=jax.tree.map(lambda x: x[:num_fisher], batch),
      )
    else:
      updates, state = tx.update(jax.tree.map(jnp.add, g, q), state, params)
    return optax.apply_updates(params, updates), state

  return step


def period_seconds(run, batch, num_steps):
  """Seconds a step over ``num_steps``; ``run`` is updated."""
  step, params, state = run
  start = time.perf_counter()
  for count in range(num_steps):
    params, state = step(params, state, batch, count % len(VIEWS))
  jax.block_until_ready((params, state))
  run[1:] = params, state
  return (time.perf_counter() - start) / num_steps


def labels(params):
  return {
    name: jax.tree.map(lambda _, name=name: name, params[name])
    for name in params
  }


def cases(batch_size):
  """Name, gate, whether all blocks share one loop, examples for Fisher.

  The last row has no target.
  """
  hessian = masking.hessian_gate()
  directional = masking.directional_gate()
  fisher = masking.fisher_mask(per_example_loss_fn=example_loss)
  yield "hessian, separable", hessian, True, 0
  yield "hessian", hessian, False, 0
  yield "directional, separable", directional, True, 0
  yield "directional", directional, False, 0
  yield "fisher, 16 examples", fisher, False, 16
  yield "fisher, whole batch", fisher, False, batch_size


def compare(name, gate, separable, num_fisher, batch, arguments):
  inner = optax.adamw(1e-3)
  tx = masking.curvature_mask(inner, labels, gate=gate, separable=separable)

  def start(tx, masked):
    params = init(jax.random.key(0), arguments.width, arguments.dim)
    step = make_step(tx, masked, num_fisher)
    return [step, params, tx.init(params)]

  plain, masked = start(inner, False), start(tx, True)
  # Whole periods, of about as many steps for every gate.
  num_steps = gate.period * max(1, 200 // gate.period)
  times = []
  for _ in range(arguments.repeats + 1):
    times.append(
      [period_seconds(run, batch, num_steps) for run in (plain, masked)]
    )
  times = times[1:]  # the first compiles
  ratios = [after / before for before, after in times]
  spread = 1.96 * 1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5
  before = 1e3 * statistics.median(t[0] for t in times)
  ratio = statistics.median(ratios)
  print(
    f"{name:<24} period {gate.period:4d}  step {before:6.3f} ms  "
    f"with/without {ratio:5.3f} +- {spread:5.3f}",
    flush=True,
  )
  return ratio


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--repeats", type=int, default=9)
  parser.add_argument("--batch_size", type=int, default=128)
  parser.add_argument("--width", type=int, default=128)
  parser.add_argument("--dim", type=int, default=32)
  arguments = parser.parse_args()
  rng = np.random.default_rng(0)
  size = arguments.batch_size
  batch = {
    "inputs": {
      name: jnp.asarray(rng.normal(size=(size, n)), jnp.float32)
      for name, n in VIEWS.items()
    },
    "label": jnp.asarray(rng.integers(0, NUM_CLASSES, size)),
  }
  print(
    f"jax {jax.__version__}, {jax.devices()[0].device_kind}; batch {size}, "
    f"adapters {arguments.width} wide, {arguments.dim} out"
  )
  ratios = [compare(*case, batch, arguments) for case in cases(size)]
  worst = max(ratios[:-1])
  print(f"\nworst but for the last row {worst:.3f}, target at most {TARGET}")


if __name__ == "__main__":
  main()
