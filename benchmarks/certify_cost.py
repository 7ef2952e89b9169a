"""What does a certificate cost, next to the forward pass it needs anyway?

Prints, for several models and sizes, the time of ``certify`` with cached
tables over the time of the plain forward pass (both jitted, same precision,
calls interleaved), with a 95 % interval over blocks, and apart from it the time
to build the tables. Target: at most 1.15 for an encoder of the size people
train; a model of one thin layer shows the fixed part.

    python benchmarks/certify_cost.py [--repeats 200]
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

import robust_mm as rmm
from robust_mm import certification

TARGET = 1.15
BLOCK = 10


def hand_written(names, num_classes, *, input_size, width, depth, dim):
  """A dense late-fusion model by hand, without any library."""

  def init(key):
    params = {"head": {}, "layers": {}, "bias": jnp.zeros(num_classes)}
    sizes = [input_size] + [width] * depth + [dim]
    for name in names:
      key, *keys = jax.random.split(key, len(sizes) + 1)
      params["head"][name] = jax.random.normal(keys[0], (num_classes, dim))
      params["layers"][name] = [
        jax.random.normal(k, (i, o)) / i**0.5
        for k, i, o in zip(keys[1:], sizes[:-1], sizes[1:])
      ]
    return params, {}

  def encode_one(layers, x):
    for kernel in layers[:-1]:
      x = jax.nn.relu(x @ kernel)
    return x @ layers[-1]

  def encode(params, state, inputs, present, *, train=False, key=None):
    del train, key
    return {
      name: jnp.where(
        present[name][:, None],
        encode_one(params["layers"][name], inputs[name]),
        0.0,
      )
      for name in names
    }, state

  def fuse(params, embeddings, present):
    del present
    scores = {n: embeddings[n] @ params["head"][n].T for n in names}
    return rmm.Outputs(
      logits=sum(scores.values()) + params["bias"][None],
      scores=scores,
      embeddings=embeddings,
    )

  def geometry(params):
    return rmm.Geometry(
      head=params["head"],
      bias=params["bias"],
      lipschitz={
        n: jnp.prod(
          jnp.stack([rmm.linalg.gram_norm(w) for w in params["layers"][n]])
        )
        for n in names
      },
    )

  return rmm.Model(
    modalities=names,
    num_classes=num_classes,
    init=init,
    encode=encode,
    fuse=fuse,
    geometry=geometry,
  )


def measure(model, batch, repeats):
  """``(forward, certify, tables)``: seconds of interleaved calls."""
  params, state = model.init(jax.random.key(0))

  @jax.jit
  def forward(params, batch):
    with jax.default_matmul_precision("highest"):
      outputs, _ = model.apply(params, state, batch["inputs"], batch["present"])
    return outputs.logits

  @jax.jit
  def certify(params, batch, tables):
    return rmm.certify(model, params, batch, state=state, tables=tables)

  build = jax.jit(lambda p: certification.sensitivity_tables(model, p))
  tables = build(params)

  def seconds(function, *args):
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start

  calls = (forward, (params, batch)), (certify, (params, batch, tables))
  for function, args in calls * 3:
    seconds(function, *args)
  times = [
    [seconds(function, *args) for function, args in calls]
    for _ in range(repeats)
  ]
  return *zip(*times), [seconds(build, params) for _ in range(3)]


def report(name, model, batch, repeats):
  forward, certify, tables = measure(model, batch, repeats)
  # A ratio of medians per block: a burst of other work spoils one block only.
  ratios = [
    statistics.median(certify[i : i + BLOCK])
    / statistics.median(forward[i : i + BLOCK])
    for i in range(0, repeats - BLOCK + 1, BLOCK)
  ]
  ratio = statistics.median(ratios)
  spread = 1.96 * 1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5
  print(
    f"{name:<34} forward {1e3 * statistics.median(forward):8.3f} ms  "
    f"certify/forward {ratio:5.2f} +- {spread:4.2f}  "
    f"tables {1e3 * statistics.median(tables):8.2f} ms"
  )
  return ratio


def cases():
  """Name, model, batch; the first rows are the ones with the target."""
  for b, k, m, width in (
    (256, 10, 3, 512),
    (256, 10, 3, 256),
    (256, 10, 3, 32),
    (256, 100, 3, 512),
    (256, 10, 6, 512),
    (1024, 10, 3, 512),
  ):
    names = tuple(f"m{i}" for i in range(m))
    model = hand_written(
      names, k, input_size=256, width=width, depth=3, dim=128
    )
    yield f"dense {width}x3 b={b} k={k} m={m}", model, _batch(names, b, (256,))
  names = ("audio", "image", "text")
  encoder = rmm.models.lipschitz.lipschitz_mlp()
  model = rmm.models.late_fusion(
    {n: encoder for n in names},
    num_classes=10,
    input_shapes={n: (256,) for n in names},
  )
  yield "late_fusion(lipschitz_mlp) b=256", model, _batch(names, 256, (256,))


def _batch(names, size, shape):
  keys = jax.random.split(jax.random.key(1), len(names))
  return {
    "inputs": {
      n: jax.random.normal(k, (size, *shape)) for n, k in zip(names, keys)
    },
    "present": {n: jnp.ones(size, bool) for n in names},
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--repeats", type=int, default=200)
  arguments = parser.parse_args()
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
  first = None
  for case in cases():
    ratio = report(*case, arguments.repeats)
    first = ratio if first is None else first
  print(f"\nfirst row {first:.2f}, target at most {TARGET}")


if __name__ == "__main__":
  main()
