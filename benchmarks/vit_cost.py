"""What do a vision transformer's forward and training step cost?

    python benchmarks/vit_cost.py --torch-python=PATH

Prints, for ViT-S/16 on images of 224 x 224 in float32, the seconds of a forward
pass and of a training step (cross-entropy, gradients, AdamW), and those of the
same model of Hugging Face transformers (fused attention, fused AdamW) divided
by them. Target: at least 1 for both.

The two take turns, one call each, in two processes on the same cores; a ratio
is one of neighbours, and the median of all counts: other work on the machine
meets both. "cpu" are seconds of all cores together, "wall" those of the clock.
One core by default (``--cores``): beside other work the threads of torch wait
for each other, and a machine that is not idle would flatter us. The peer draws
the weights, ours are loaded from the file it saves: logits and first losses
must agree.

    python benchmarks/vit_cost.py --rate

times training alone, of ViT-B/16 with 256 images in bfloat16 by default, ten
steps in a row as a training loop has them, and prints how much of the matrix
rate of an H200 (780 TFLOP/s) that is: for accelerators. Target: half of it.

    python3 -m venv PATH && PATH/bin/pip install torch transformers
"""

import argparse
import contextlib
import json
import math
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

from robust_mm.models import vit

SIDE = 224
NUM_CLASSES = 1000
LR, WEIGHT_DECAY = 1e-4, 0.01
RATE = 780.0  # TFLOP/s of an H200, dense bfloat16
PEER = pathlib.Path(__file__).parent / "peers" / "vit_transformers.py"


def inputs(batch):
  rng = np.random.default_rng(0)
  images = rng.random((batch, SIDE, SIDE, 3), np.float32)
  return images, rng.integers(NUM_CLASSES, size=batch)


def flops(net, batch):
  """Of the matrix products of a training step: three of a forward pass."""
  number = net.num_tokens((SIDE, SIDE)) + 1
  d, p = net.width, 3 * math.prod(net.patch_size)
  block = number * (4 * d * d + 2 * d * net.mlp_dim + 2 * number * d)
  forward = net.depth * block + (number - 1) * p * d + d * NUM_CLASSES
  return 3 * 2 * batch * forward


def functions(net, tx):
  """Jitted ``forward(params, images)`` and ``step(params, state, ...)``."""

  def loss_fn(params, images, labels):
    logits = net.apply(params, images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(loss)

  def step(params, state, images, labels):
    loss, gradient = jax.value_and_grad(loss_fn)(params, images, labels)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss

  return jax.jit(net.apply), jax.jit(step, donate_argnums=(0, 1))


class Ours:
  """A model and what is done with it, by the words the peer knows."""

  def __init__(self, net, params, images, labels):
    tx = optax.adamw(LR, weight_decay=WEIGHT_DECAY)
    self.given = jnp.asarray(images), jnp.asarray(labels)
    self.forward_fn, self.step_fn = functions(net, tx)
    self.params, self.state = params, jax.jit(tx.init)(params)

  def forward(self):
    return self.forward_fn(self.params, self.given[0]).ravel()[:10].tolist()

  def step(self):
    self.params, self.state, loss = self.step_fn(
      self.params, self.state, *self.given
    )
    jax.block_until_ready(self.params)
    return [float(loss)]

  def in_a_row(self, number):
    """Seconds a step, the next one asked for before the last is done."""
    begin = time.perf_counter()
    for _ in range(number):
      self.params, self.state, _ = self.step_fn(
        self.params, self.state, *self.given
      )
    jax.block_until_ready(self.params)
    return (time.perf_counter() - begin) / number

  def time(self, what):
    wall, cpu = time.perf_counter(), time.process_time()
    value = getattr(self, what)()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall, "cpu": cpu, "value": value}


@contextlib.contextmanager
def peer(python, net, images, labels):
  """``(call, version, folder of its weights)`` of the other process."""
  with tempfile.TemporaryDirectory() as folder:
    np.savez(
      pathlib.Path(folder) / "inputs.npz",
      images=images,
      labels=labels,
      num_classes=NUM_CLASSES,
      lr=LR,
      weight_decay=WEIGHT_DECAY,
    )
    sizes = (net.width, net.depth, net.num_heads, net.patch_size[0], SIDE)
    process = subprocess.Popen(
      [python, str(PEER), folder, *map(str, sizes)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

    def call(what):
      process.stdin.write(f"{what}\n")
      process.stdin.flush()
      return json.loads(process.stdout.readline())

    try:
      version = json.loads(process.stdout.readline())["version"]
      yield call, version, folder
    finally:
      process.stdin.close()
      process.wait()


def compare(options):
  net = vit.vision_transformer(options.size, patch_size=options.patch_size)
  images, labels = inputs(options.batch)
  with peer(options.torch_python, net, images, labels) as (call, version, at):
    net, params = vit.load_safetensors(
      at, preprocess=vit.HALF, implementation=options.implementation
    )
    ours = Ours(net, params, images, labels)
    print(f"{version}; jax {jax.__version__}, {jax.default_backend()}")
    print(
      f"ViT-{options.size}/{options.patch_size}, batch {options.batch}, "
      f"float32, attention {options.implementation}, cores: "
      f"{options.cores}, {options.repeats} turns"
    )
    worst = math.inf
    for what in ("forward", "step"):
      pairs = [(call(what), ours.time(what))]
      gap = np.max(np.abs(np.subtract(*(side["value"] for side in pairs[0]))))
      turns = range(options.repeats + 1)
      pairs = []
      for turn in turns:  # who goes first takes turns as well
        if turn % 2:
          theirs, own = call(what), ours.time(what)
        else:
          own, theirs = ours.time(what), call(what)
        pairs.append((theirs, own))
      for kind in ("wall", "cpu"):
        seconds = np.array([[side[kind] for side in p] for p in pairs[1:]])
        ratios = seconds[:, 0] / seconds[:, 1]
        ratio = statistics.median(ratios)
        low, high = np.quantile(ratios, (0.25, 0.75))
        theirs, own = np.median(seconds, axis=0)
        print(
          f"  {what:7s} {kind:4s}  theirs {theirs:7.3f} s  ours {own:7.3f} s  "
          f"ratio {ratio:5.2f} (quartiles {low:.2f} to {high:.2f})",
          flush=True,
        )
        worst = min(worst, ratio)
      print(f"  {what:7s} results differ by {gap:.0e}", flush=True)
  print(f"\ntheirs / ours at least {worst:.2f}, target at least 1")


def rate(options):
  net = vit.vision_transformer(
    options.size,
    patch_size=options.patch_size,
    num_classes=NUM_CLASSES,
    preprocess=vit.HALF,
    dtype=options.dtype,
    remat=options.remat,
    implementation=options.implementation,
  )
  params = jax.jit(lambda key: net.init(key, (SIDE, SIDE, 3)))(
    jax.random.key(0)
  )
  ours = Ours(net, params, *inputs(options.batch))
  ours.step()
  times = [ours.in_a_row(10) for _ in range(options.repeats)]
  seconds = statistics.median(times)
  reached = flops(net, options.batch) / seconds / 1e12
  device = jax.devices()[0].device_kind
  print(
    f"jax {jax.__version__}, {device}, ViT-{options.size}/"
    f"{options.patch_size}, batch {options.batch}, {options.dtype}, remat "
    f"{options.remat}, attention {options.implementation}"
  )
  print(
    f"  step {1e3 * seconds:.1f} ms  {options.batch / seconds:.0f} images/s  "
    f"{reached:.1f} TFLOP/s, {reached / RATE:.0%} of {RATE:.0f}"
  )


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--torch-python", help="interpreter with transformers")
  parser.add_argument("--rate", action="store_true", help="training alone")
  parser.add_argument("--size", choices=vit.SIZES)
  parser.add_argument("--patch-size", type=int, default=16)
  parser.add_argument("--batch", type=int)
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--cores", type=int, default=1, help="of a comparison")
  parser.add_argument("--dtype", default="bfloat16", help="with --rate")
  parser.add_argument("--remat", default="none", help="with --rate")
  parser.add_argument("--implementation", default="xla", help="of attention")
  options = parser.parse_args()
  if not options.rate and not options.torch_python:
    parser.error("--torch-python=PATH or --rate is needed")
  options.size = options.size or ("base" if options.rate else "small")
  options.batch = options.batch or (256 if options.rate else 8)
  if options.rate:
    rate(options)
    return
  # Before any backend starts; the peer inherits it.
  cores = sorted(os.sched_getaffinity(0))[-options.cores :]
  os.sched_setaffinity(0, cores)
  compare(options)


if __name__ == "__main__":
  main()
