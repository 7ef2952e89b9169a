"""How large are our radii next to those of established certifiers?

Six late-fusion networks whose certified radii by other libraries, and attack
distances, are stored (the folder with reference values is an argument). Per
network and source: the mean joint radius, misclassified examples counted 0;
the best stored one; how often ours exceeds a known attack (must be 0); the
seconds of a warm call on the whole test set. Then what one evaluation of the
linear relaxation costs per example, and the time to build the tables.

  taskset -c 0 python benchmarks/certificates.py --reference=PATH/certificates
"""

import argparse
import functools
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import robust_mm as rmm
from robust_mm import certification
from robust_mm.certification import relaxed

NETS = (
  "digits_plain",
  "digits_penalty0p03",
  "digits_penalty0p1",
  "mfeat_plain",
  "mfeat_penalty0p01",
  "mfeat_penalty0p03",
)
COLUMNS = ("product", "eclipse_fast", "ibp", "crown_ibp", "crown")
SOURCES = ("global", "local", "relaxation", "best")
BATCH = 40  # divides both sets; what it needs fits a processor's cache
# CPU seconds of auto_LiRPA on one core for one radius and the whole test set.
TORCH = {"digits": 0.12, "mfeat": 0.46}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--reference", type=pathlib.Path, required=True)
  parser.add_argument("--nets", nargs="+", default=NETS)
  arguments = parser.parse_args()
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
  for net in arguments.nets:
    report(net, arguments.reference / f"{net}.npz")


def report(net, path):
  with np.load(path, allow_pickle=False) as file:
    stored = dict(file)
  names = tuple(sorted(str(m) for m in stored["modalities"]))
  model, params = network(stored, names)
  batch = {"inputs": {m: jnp.asarray(stored[f"inputs/{m}"]) for m in names}}
  right = stored["prediction"] == stored["labels"]

  def mean(radius):
    return float(np.mean(np.where(right, radius, 0)))

  best = {c: mean(stored[f"radius/{c}/joint"]) for c in COLUMNS}
  name = max(best, key=best.get)
  print(
    f"\n{net}: stored best {best[name]:.4f} ({name}), chain "
    f"{best['eclipse_fast']:.4f}, attack {mean(stored['upper/joint']):.4f}"
  )
  for source in SOURCES:
    run = jax.jit(functools.partial(certify, model, source=source))
    found, seconds = timed(run, params, batch)
    beyond = np.sum(np.asarray(found.radius) > stored["upper/joint"])
    for m in names:
      alone = np.asarray(found.modality_radius[m])
      beyond += np.sum(alone > stored[f"upper/{m}"])
    print(
      f"  {source:<11} mean radius {mean(np.asarray(found.radius)):.4f}  "
      f"beyond an attack {beyond}  {1e3 * seconds:9.1f} ms",
      flush=True,
    )
  tables = jax.jit(lambda p: certification.sensitivity_tables(model, p))
  _, seconds = timed(tables, params)
  print(f"  chain tables {1e3 * seconds:.2f} ms")
  one_radius(net, model, params, batch, stored, names)


def certify(model, params, batch, *, source):
  return rmm.certify(model, params, batch, source=source)


def one_radius(net, model, params, batch, stored, names):
  """One evaluation of the relaxation on the whole test set, in batches."""
  size = len(stored["labels"])
  problems = [
    relaxed.Problem(
      params=params,
      state={},
      inputs={m: x[start : start + BATCH] for m, x in batch["inputs"].items()},
      present={m: jnp.ones(BATCH, bool) for m in names},
      prediction=jnp.asarray(stored["prediction"])[start : start + BATCH],
      units=dict.fromkeys(names, 1.0),
    )
    for start in range(0, size, BATCH)
  ]
  network_ = relaxed.network_of(model, problems[0])
  norm = tuple((m, "l2") for m in names)

  @jax.jit
  def one(problem, radius):
    sizes = {m: jnp.ones(BATCH) for m in names}
    return relaxed.confirms(network_, problem, sizes, radius, norm=norm)

  def run(problems, radius):
    return [one(problem, radius) for problem in problems]

  _, seconds = timed(run, problems, jnp.full(BATCH, 0.3))
  peer = TORCH[net.split("_")[0]]
  print(
    f"  one radius of all {size}: {1e3 * seconds:.1f} ms, "
    f"{peer / seconds:.1f} times as fast as the stored {1e3 * peer:.0f} ms"
  )


def timed(function, *arguments):
  """The result, and the median seconds of five warm calls."""
  result = jax.block_until_ready(function(*arguments))
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    seconds.append(time.perf_counter() - start)
  return result, statistics.median(seconds)


def network(stored, names):
  """The stored network as a model by hand."""

  def layers(m):
    return [
      (
        jnp.asarray(stored[f"params/{m}/dense_{i}/kernel"]),
        jnp.asarray(stored[f"params/{m}/dense_{i}/bias"]),
      )
      for i in (0, 1)
    ]

  params = {
    "layers": {m: layers(m) for m in names},
    "head": {
      m: jnp.asarray(stored[f"params/head/{m}/kernel"].T) for m in names
    },
    "bias": jnp.asarray(stored["params/head/bias"]),
  }

  def encode(params, state, inputs, present, *, train=False, key=None):
    del present, train, key
    embeddings = {}
    for m in names:
      x = inputs[m]
      for kernel, bias in params["layers"][m]:
        x = jax.nn.relu(x @ kernel + bias)
      embeddings[m] = x
    return embeddings, state

  def fuse(params, embeddings, present):
    del present
    scores = {m: embeddings[m] @ params["head"][m].T for m in names}
    return rmm.Outputs(
      logits=sum(scores.values()) + params["bias"],
      scores=scores,
      embeddings=embeddings,
    )

  def geometry(params):
    chain = {m: tuple(k.T for k, _ in params["layers"][m]) for m in names}
    norms = {
      m: rmm.lipschitz.compose(*map(rmm.lipschitz.dense_norm, chain[m]))
      for m in names
    }
    return rmm.Geometry(
      head=params["head"],
      bias=params["bias"],
      lipschitz=norms,
      chain={m: (*chain[m], jnp.eye(32)) for m in names},
    )

  model = rmm.Model(
    modalities=names,
    num_classes=10,
    init=lambda key: (params, {}),
    encode=encode,
    fuse=fuse,
    geometry=geometry,
  )
  return model, params


if __name__ == "__main__":
  main()
