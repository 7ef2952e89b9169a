"""Heads over embeddings that are the inputs themselves: all is exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import certification
from robust_mm._types import Geometry

NAMES = ("audio", "image", "text")
NO_SLACK = certification.NO_SLACK
HOLLOW = 1.0 - np.eye(3)


def head(seed, classes=6, sizes=(5, 7, 4)):
  rng = np.random.default_rng(seed)
  rows = {m: rng.normal(size=(classes, d)) for m, d in zip(NAMES, sizes)}
  return rows, rng.normal(size=classes) * 0.1


def geometry(rows, bias, lipschitz=1.0, factors=None, **kwargs):
  def f32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)

  return Geometry(
    head=f32(rows),
    bias=f32(bias),
    lipschitz=dict.fromkeys(rows, lipschitz),
    factors=None if factors is None else f32(factors),
    **kwargs,
  )


def tables(geometry, form="general"):
  return certification.SensitivityTables(
    tables=certification.pairwise_sensitivity(geometry, form),
    source="global",
    sound=True,
  )


def identity(seed, batch=200, present=None, dtype=np.float32, **kwargs):
  """Identity encoders: inputs, head, bias and the certificate."""
  rows, bias = head(seed)
  rng = np.random.default_rng(seed + 1)
  inputs = {m: rng.normal(size=(batch, w.shape[1])) for m, w in rows.items()}
  contributions = {m: jnp.asarray(inputs[m] @ rows[m].T, dtype) for m in rows}
  kwargs = {"slack": NO_SLACK, "bias": jnp.asarray(bias, dtype), **kwargs}

  @jax.jit
  def build(contributions, tables):
    return certification.margin_certificate(
      contributions, tables, present, **kwargs
    )

  found = build(contributions, tables(geometry(rows, bias)))
  return inputs, rows, bias, found


def logits(inputs, rows, bias):
  return sum(inputs[m] @ rows[m].T for m in rows) + bias


cached_identity = functools.lru_cache(identity)


def towards(inputs, rows, certificate, size, *, names=NAMES, rival=None):
  """Moves every example straight at a rival, by ``size`` in the joint norm."""
  y = np.asarray(certificate.prediction)
  j = np.asarray(certificate.nearest_class if rival is None else rival)
  direction = {m: rows[m][j] - rows[m][y] for m in names}
  length = np.sqrt(sum((d**2).sum(-1) for d in direction.values()))
  moved = dict(inputs)
  for m in names:
    moved[m] = inputs[m] + direction[m] * (size / length)[:, None]
  return moved


def orthonormal(seed, classes=6, size=12):
  rng = np.random.default_rng(seed)
  u, _, vt = np.linalg.svd(rng.normal(size=(classes, size)), False)
  return u @ vt


def plain(terms, tables, **kwargs):
  tables = certification.SensitivityTables(
    tables={m: jnp.asarray(t, jnp.float32) for m, t in tables.items()},
    source="global",
    sound=True,
  )
  terms = {m: jnp.asarray(t, jnp.float32) for m, t in terms.items()}
  return certification.margin_certificate(terms, tables, **kwargs)
