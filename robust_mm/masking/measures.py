"""What a gate measures at a refresh, and its verdict on every block."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray
from jaxtyping import PyTree

from robust_mm import curvature
from robust_mm import linalg
from robust_mm.linalg import trees
from robust_mm.masking import blocks as blocks_lib
from robust_mm.masking import gates as gates_lib


class Measured(NamedTuple):
  """The part of the state that a refresh replaces; ``{label: ...}`` each.

  Attributes:
    gates: bool, True for open.
    verdicts: int8 codes.
    evidence: ``{label: {name: float32}}``.
    failed: bool, whether what was measured is not finite.
    fisher: like the parameters, float32; None without a Fisher mask.
  """

  gates: Any
  verdicts: Any
  evidence: Any
  failed: Any
  fisher: Any


class Problem(NamedTuple):
  """What a gate looks at, in one step."""

  blocks: blocks_lib.Blocks
  params: PyTree
  destructive: PyTree
  value_fn: Callable | None
  fisher_batch: PyTree
  separable: bool | str


def initial(gate, gated: tuple[str, ...], fisher: PyTree) -> Measured:
  """Everything open, nothing measured."""
  start = {"threshold": jnp.inf, "kept_share": 1.0}

  def nothing(name):
    return jnp.asarray(start.get(name, jnp.nan), jnp.float32)

  return Measured(
    gates={name: jnp.ones((), bool) for name in gated},
    verdicts={name: jnp.zeros((), jnp.int8) for name in gated},
    evidence={
      name: {key: nothing(key) for key in gate.evidence} for name in gated
    },
    failed={name: jnp.zeros((), bool) for name in gated},
    fisher=fisher,
  )


def check(gate, problem: Problem) -> None:
  """The arguments of ``update`` that a gate cannot do without."""
  if isinstance(gate, gates_lib.FisherMask):
    if problem.fisher_batch is None:
      raise ValueError(
        "fisher_batch must be given in update() for fisher_mask."
      )
  elif problem.value_fn is None and not isinstance(gate, gates_lib.RandomGate):
    raise ValueError(
      "value_fn must be given in update(): the gate measures the curvature of "
      "the destructive loss."
    )


def measure(
  gate, problem: Problem, cached: Measured, key: PRNGKeyArray
) -> Measured:
  """A refresh."""
  if isinstance(gate, gates_lib.RandomGate):
    return _random(gate, cached, key)
  problem = problem._replace(params=problem.blocks.upcast(problem.params))
  if isinstance(gate, gates_lib.HessianGate):
    return _hessian(gate, problem, cached, key)
  if isinstance(gate, gates_lib.DirectionalGate):
    return _directional(gate, problem, cached, key)
  return _fisher(gate, problem, cached)


def _random(gate, cached, key):
  """Nothing is measured; labels are in order, so the draw is theirs."""
  closed = {
    name: jax.random.bernoulli(jax.random.fold_in(key, index), gate.rate)
    for index, name in enumerate(cached.gates)
  }
  nothing = jnp.zeros((), bool)
  return cached._replace(
    gates={name: ~value for name, value in closed.items()},
    verdicts={n: _verdict(c, ~c, nothing) for n, c in closed.items()},
  )


def _maps(problem: Problem, key: PRNGKeyArray):
  """Hessians, one of all blocks or one a block: matvec, leaves, labels."""
  blocks, params = problem.blocks, problem.params
  groups = [[name] for name in blocks.gated]
  if problem.separable:
    groups = [list(blocks.gated)]
  for names in groups:
    parts = blocks.take(params, names)
    matvec = curvature.hvp(
      lambda parts: problem.value_fn(blocks.put(params, parts)), parts
    )
    labels = {name: [name] * len(part) for name, part in parts.items()}
    if problem.separable == "check":
      other = jax.random.fold_in(key, len(blocks.gated))
      curvature.check_separable(matvec, parts, labels, other)
    yield matvec, parts, labels


def _hessian(gate, problem, cached, key):
  ritz = {}
  for index, (matvec, parts, labels) in enumerate(_maps(problem, key)):
    ritz |= linalg.block_lanczos(
      matvec,
      parts,
      labels,
      jax.random.fold_in(key, index),
      num_steps=gate.num_steps,
    )
  gates, verdicts, evidence, failed = {}, {}, {}, {}
  for name, found in ritz.items():
    share = block_share(gate, problem.blocks.take(problem.params, [name])[name])
    bounds = linalg.enclose(found, share, gate.failure_probability)
    size = jnp.maximum(jnp.abs(bounds.smallest), jnp.abs(bounds.largest))
    threshold = gate.tau * size
    if gate.tau_absolute is not None:
      threshold = gate.tau_absolute
    closed = bounds.smallest < -threshold - 1e-5 * size
    opened = bounds.lower >= -threshold
    failed[name] = ~jnp.all(jnp.isfinite(found.values))
    verdicts[name] = _verdict(closed, opened, failed[name])
    allowed = gate.undecided == "open"
    gates[name] = (opened | (allowed & ~closed)) & ~failed[name]
    evidence[name] = {
      "rho_min": bounds.smallest.astype(jnp.float32),
      "rho_max": bounds.largest.astype(jnp.float32),
    }
  return Measured(gates, verdicts, evidence, failed, cached.fisher)


def block_share(gate: gates_lib.HessianGate, leaves: list) -> float:
  """The share of its spread that a block's Ritz values may lack."""
  return linalg.error_share(
    trees.size(leaves), gate.num_steps, gate.failure_probability
  )


def _directional(gate, problem, cached, key):
  images, directions = {}, {}
  for matvec, parts, _ in _maps(problem, key):
    q = problem.blocks.take(problem.destructive, parts)
    q = {name: _unit(leaves) for name, leaves in q.items()}
    directions |= q
    images |= matvec(q)
  gates, verdicts, evidence, failed = {}, {}, {}, {}
  for name, q in directions.items():
    cosine = trees.dot(q, _unit(images[name])).astype(jnp.float32)
    closed = cosine < -gate.tau
    broken = ~jnp.isfinite(cosine)
    verdict = _verdict(closed, ~closed, broken)
    # Not attacked: nothing was measured, and what was decided stays.
    attacked = blocks_lib.largest(q) != 0
    keep = lambda new, old, attacked=attacked: jnp.where(attacked, new, old)  # noqa: E731
    gates[name] = keep(~closed & ~broken, cached.gates[name])
    verdicts[name] = keep(verdict, cached.verdicts[name])
    evidence[name] = {"cosine": keep(cosine, cached.evidence[name]["cosine"])}
    failed[name] = attacked & broken
  return Measured(gates, verdicts, evidence, failed, cached.fisher)


def _fisher(gate, problem, cached):
  blocks, params = problem.blocks, problem.params

  def loss_fn(parts, example):
    return gate.per_example_loss_fn(blocks.put(params, parts), example)

  found = curvature.fisher_diagonal(
    loss_fn,
    blocks.take(params, blocks.gated),
    problem.fisher_batch,
    chunk_size=gate.chunk_size,
  )
  old = blocks.take(cached.fisher, blocks.gated)
  gates, verdicts, evidence, failed, kept = {}, {}, {}, {}, {}
  for name, leaves in found.items():
    broken = ~jnp.isfinite(blocks_lib.largest(leaves))
    kept[name] = [
      jnp.where(
        broken,
        before,
        gate.decay * before + (1 - gate.decay) * after.astype(jnp.float32),
      )
      for before, after in zip(old[name], leaves)
    ]
    failed[name] = broken
    gates[name] = ~broken
    verdicts[name] = _verdict(jnp.zeros((), bool), ~broken, broken)
    evidence[name] = _fisher_evidence(kept[name], gate.quantile)
  return Measured(
    gates, verdicts, evidence, failed, blocks.put(cached.fisher, kept)
  )


def _fisher_evidence(leaves, quantile):
  threshold = curvature.quantile_threshold(leaves, quantile)
  number = trees.size(leaves)

  def share(test):
    count = sum(jnp.sum(test(leaf), dtype=jnp.int32) for leaf in leaves)
    return count.astype(jnp.float32) / number

  return {
    "threshold": threshold,
    "kept_share": share(lambda leaf: leaf <= threshold),
    "zero_share": share(lambda leaf: leaf == 0),
  }


def _verdict(closed, opened, broken):
  code = jnp.where(closed, gates_lib.CLOSED, gates_lib.UNDECIDED)
  code = jnp.where(opened & ~closed, gates_lib.OPEN, code)
  return jnp.where(broken, gates_lib.UNDECIDED, code).astype(jnp.int8)


def _unit(leaves):
  """Leaves in float32 at least, of length 1; zeros stay zeros."""
  size = blocks_lib.length(leaves)
  safe = jnp.where(size == 0, 1, size)
  return [a.astype(trees.solve_dtype(a)) / safe for a in leaves]
