"""What does a 1-Lipschitz encoder's training step cost next to a plain one?

A perceptron 784-512-512-10 at batch 64, Adam and cross-entropy: plain layers
against each kind of 1-Lipschitz ones of the same sizes. "projected" layers are
made orthonormal every 16 updates, as in the training loop, and that is in their
time. Steps are interleaved; means over whole periods, their ratios, and the
largest exact norm of any layer of the model that would be certified (float64
SVD of the materialised map, activations left out) are printed.

  python benchmarks/lipschitz_cost.py --num_steps=64

Aim: at most 3 times the plain step, every norm at most 1 + 1e-5.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from robust_mm.models import encoders
from robust_mm.models import functional
from robust_mm.models import lipschitz_layers
from robust_mm.training import steps

SIZES = (784, 512, 512, 10)
BLOCKS = ("projected", "sll", "bjorck", "cayley", "aol")
WARM_UP = steps.PROJECT_EVERY


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--num_steps", type=int, default=64)
  parser.add_argument("--batch_size", type=int, default=64)
  arguments = parser.parse_args()
  if arguments.num_steps % steps.PROJECT_EVERY:
    parser.error(f"--num_steps must be a multiple of {steps.PROJECT_EVERY}")
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(arguments.batch_size, SIZES[0])), "float32")
  y = jnp.asarray(rng.integers(0, SIZES[-1], arguments.batch_size), "int32")
  kinds = {
    "plain": encoders.mlp(hidden_sizes=SIZES[1:-1], embedding_dim=SIZES[-1]),
    **{
      block: encoders.lipschitz_mlp(
        width=SIZES[1], num_blocks=1, embedding_dim=SIZES[-1], block=block
      )
      for block in BLOCKS
    },
  }
  runs = {name: start(encoder) for name, encoder in kinds.items()}
  for index in range(arguments.num_steps + WARM_UP):
    for run in runs.values():
      began = time.perf_counter()
      run["params"], run["opt_state"] = jax.block_until_ready(
        run["step"](run["params"], run["opt_state"], index, x, y)
      )
      run["seconds"].append(time.perf_counter() - began)
  plain = np.mean(runs["plain"]["seconds"][WARM_UP:])
  print(f"{jax.devices()[0].device_kind}, batch {arguments.batch_size}")
  for name, run in runs.items():
    seconds = np.mean(run["seconds"][WARM_UP:])
    line = f"{name:<8} {1e3 * seconds:8.2f} ms  ratio {seconds / plain:5.2f}"
    if name != "plain":
      line += f"  largest layer norm - 1: {largest_norm(run):.1e}"
    print(line)


def start(encoder):
  functions = functional.encoder_functions(encoder, (SIZES[0],))
  params, _ = functions.init(jax.random.key(0))
  tx = optax.adam(1e-3)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, opt_state, index, x, y):
    def loss_fn(params):
      logits, _ = functions.apply(params, {}, x, train=True)
      return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(logits, y)
      )

    updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
    params = optax.apply_updates(params, updates)
    if functions.project is not None:
      due = (index + 1) % steps.PROJECT_EVERY == 0
      params = jax.lax.cond(due, functions.project, lambda p: p, params)
    return params, opt_state

  return {
    "step": step,
    "params": params,
    "opt_state": tx.init(params),
    "functions": functions,
    "seconds": [],
  }


def largest_norm(run):
  """Of any layer, minus 1; of a residual block, at random points."""
  functions, params = run["functions"], run["params"]
  if functions.project is not None:
    params = functions.project(params)
  module = functions.bind(params, {})
  norms = []
  for _, part in nnx.iter_modules(module):
    if isinstance(part, lipschitz_layers.Dense):
      norms += [_norm(matrix) for matrix in part.matrices()]
    elif isinstance(part, lipschitz_layers.SLLDense):
      width = part.weight[...].shape[1]
      for key in jax.random.split(jax.random.key(1), 3):
        at = 3 * jax.random.normal(key, (width,))
        norms.append(_norm(jax.jacrev(functools.partial(_one, part))(at)))
  return max(norms) - 1


def _one(part, x):
  return part(x[None])[0]


def _norm(matrix):
  return np.linalg.norm(np.asarray(matrix, np.float64), 2)


if __name__ == "__main__":
  main()
