"""What does a hyper-gradient cost, in gradients and next to TorchOpt?

    python benchmarks/hypergradient_cost.py [--torch-python=PATH]

Prints, for tanh networks of several sizes in float32,

- gradient evaluations per term of the Neumann series and per step of
  conjugate gradients: the slope of the time between 10 and 40 steps over the
  time of one gradient of inner, all jitted and interleaved. Target: at most
  2.1 on every row.
- with the interpreter of an environment that has torch and torchopt, the time
  of ``torchopt.linalg.ns`` over that of ``hypergrad.neumann`` for the same
  series on the same problem (ours with one product more, the explicit
  residual; the faster of two Hessian products of torch).
  Target: at least 2 on every row.

Times are CPU seconds of one core, for both: work beside it counts for little.

    python3 -m venv PATH && PATH/bin/pip install torch torchopt numpy
"""

import argparse
import itertools
import os
import pathlib
import statistics
import subprocess
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from robust_mm import hypergrad

STEPS = 20
ALPHA = 0.1
PENALTY = 0.01
PEER = pathlib.Path(__file__).parent / "peers" / "hypergradient_torchopt.py"
# batch, sizes of the layers.
CASES = (
  (256, (64, 128, 128, 10)),
  (256, (64, 32, 10)),
  (256, (256, 512, 512, 10)),
)


def problem(batch, sizes):
  """``inner, theta, phi, v``, the same numbers for both libraries."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  theta = []
  for fan_in, fan_out in itertools.pairwise(sizes):
    theta += [draw(fan_in, fan_out) / np.float32(fan_in**0.5), draw(fan_out)]
  inputs, labels = draw(batch, sizes[0]), rng.integers(sizes[-1], size=batch)
  v = [draw(*leaf.shape) / np.float32(leaf.size**0.5) for leaf in theta]

  def inner(theta, phi):
    x = jnp.asarray(inputs)
    for index in range(len(theta) // 2):
      x = x @ theta[2 * index] + theta[2 * index + 1][None]
      if index + 1 < len(theta) // 2:
        x = jnp.tanh(x)
    loss = optax.softmax_cross_entropy_with_integer_labels(x, labels)
    squares = sum(jnp.sum(leaf**2) for leaf in theta)
    return jnp.mean(loss) + 0.5 * jnp.exp(phi) * squares

  arrays = {"inputs": inputs, "labels": labels}
  arrays |= {f"theta{i}": leaf for i, leaf in enumerate(theta)}
  arrays |= {f"v{i}": leaf for i, leaf in enumerate(v)}
  to_jax = lambda tree: jax.tree.map(jnp.asarray, tree)  # noqa: E731
  phi = jnp.log(jnp.float32(PENALTY))
  return inner, to_jax(theta), phi, to_jax(v), arrays


def seconds(function, *args):
  start = time.process_time()
  jax.block_until_ready(function(*args))
  return time.process_time() - start


def interleaved(calls, repeats):
  """Median seconds of every call; medians of their differences too."""
  for function, args in calls * 3:
    seconds(function, *args)
  rows = [[seconds(f, *args) for f, args in calls] for _ in range(repeats)]
  return np.array(rows)


def solve_fn(inner, solver):
  """The series alone: linearisation, terms, explicit residual."""
  top = jnp.float32(1 / ALPHA)
  bounds = hypergrad.Interval(-top, top, jnp.float32(ALPHA))

  @jax.jit
  def solve(theta, phi, v):
    with jax.default_matmul_precision("highest"):
      gradient = lambda t: jax.grad(inner)(t, phi)  # noqa: E731
      return solver(jax.linearize(gradient, theta)[1], v, bounds).x

  return solve


def gradients_per_step(inner, theta, phi, make, repeats):
  """Cost of one step of the whole hyper-gradient, in gradients of inner."""
  outer = lambda t, f: inner(t, jnp.zeros_like(f))  # noqa: E731
  key = jax.random.key(0)

  def run(num_steps):
    fn = hypergrad.hypergradient(
      inner,
      outer,
      solver=make(num_steps),
      operator=hypergrad.damped(1.0),
      bounds=hypergrad.known_bounds(lower=-0.5, upper=10.0),
      acceptance=None,
    )
    return jax.jit(lambda t, f: fn(t, f, key=key)[0])

  few, many = 10, 40
  gradient = jax.jit(jax.grad(inner))
  calls = [(f, (theta, phi)) for f in (gradient, run(few), run(many))]
  times = interleaved(calls, repeats)
  # Blocks: a burst of other work spoils one block only.
  ratios = []
  for block in np.array_split(times, max(1, repeats // 5)):
    one, short, long = np.median(block, axis=0)
    ratios.append((long - short) / (many - few) / one)
  return statistics.median(ratios), 1e3 * np.median(times[:, 0])


def peer(python, arrays, repeats):
  """Seconds of TorchOpt by way of its product, its x, its version."""
  with tempfile.TemporaryDirectory() as folder:
    given, output = (str(pathlib.Path(folder) / n) for n in ("a.npz", "b.npz"))
    np.savez(
      given,
      **arrays,
      num_leaves=sum(name.startswith("theta") for name in arrays),
      num_steps=STEPS,
      alpha=ALPHA,
      penalty=PENALTY,
      repeats=repeats,
    )
    subprocess.run([python, str(PEER), given, output], check=True)
    return dict(np.load(output, allow_pickle=False))


def compare(python, case, repeats):
  """TorchOpt's seconds over ours: rounds of both, one after the other."""
  inner, theta, phi, v, arrays = problem(*case)
  ours = solve_fn(inner, hypergrad.neumann(STEPS, step_size=ALPHA))
  ratios, rows = [], []
  for _ in range(2):
    times = interleaved([(ours, (theta, phi, v))], repeats)[:, 0]
    found = peer(python, arrays, repeats)
    best = min(("double", "forward"), key=lambda name: np.median(found[name]))
    rows.append((np.median(times), np.median(found[best])))
    ratios.append(rows[-1][1] / rows[-1][0])
  x = ours(theta, phi, v)
  gap = max(
    float(jnp.linalg.norm(leaf - found[f"{best}_x{i}"]) / jnp.linalg.norm(leaf))
    for i, leaf in enumerate(x)
  )
  mine, other = np.median(rows, axis=0)
  print(
    f"  {found['version']}: {1e3 * other:8.2f} ms ({best})  "
    f"ours {1e3 * mine:8.2f} ms  ratio {statistics.median(ratios):5.2f} "
    f"({min(ratios):.2f} to {max(ratios):.2f})  x differ by {gap:.0e}"
  )
  return statistics.median(ratios)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--repeats", type=int, default=30)
  parser.add_argument("--torch-python", help="python with torch and torchopt")
  options = parser.parse_args()
  # Before any backend starts; the peer inherits it.
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {STEPS} steps")
  costs, ratios = [], []
  for case in CASES:
    inner, theta, phi, _, _ = problem(*case)
    print(f"batch {case[0]}, layers {'-'.join(map(str, case[1]))}")
    for name, make in (
      ("neumann", hypergrad.neumann),
      ("conjugate_gradient", hypergrad.conjugate_gradient),
    ):
      cost, one = gradients_per_step(inner, theta, phi, make, options.repeats)
      print(f"  {name:<19} {cost:5.2f} gradients a step, of {one:.2f} ms")
      costs.append(cost)
    if options.torch_python:
      ratios.append(compare(options.torch_python, case, options.repeats))
  print(f"\nat most {max(costs):.2f} gradients a step, target at most 2.1")
  if ratios:
    print(f"TorchOpt / ours at least {min(ratios):.2f}, target at least 2")


if __name__ == "__main__":
  main()
