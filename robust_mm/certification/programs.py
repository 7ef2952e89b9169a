"""What the traced program of a model must look like to carry a certificate."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from robust_mm.certification import geometries

_LOW_PRECISION = 4  # bytes: anything narrower voids the slack
SAME_ROW = 1e-4  # relative; rounding differs between batch sizes
_EXACT = (
  None,  # inherits "highest", under which the model is traced
  jax.lax.Precision.HIGHEST,
  jax.lax.DotAlgorithmPreset.F32_F32_F32,
  jax.lax.DotAlgorithmPreset.F64_F64_F64,
)


def evaluate(model, params, state, inputs, present, *, separate=True):
  """Outputs in evaluation mode at full precision.

  With ``separate``, what an additive certificate needs is checked as well: no
  mixed scores, every encoder reads its own modality only.

  Raises:
    ValueError: for 16-bit arithmetic or products at less than full precision
      anywhere inside, for mixed scores, and for an encoder that reads another
      modality. Reading is decided on the traced program, not on values: an
      encoder that multiplies another modality by zero reads it.
  """

  def forward(params, state, inputs, present):
    return model.apply(params, state, inputs, present, train=False)[0]

  with jax.default_matmul_precision("highest"):
    traced, outputs = jax.make_jaxpr(forward, return_shape=True)(
      params, state, inputs, present
    )
    if separate:
      geometries.refuse_mixed(outputs)
    _check_types(traced.jaxpr)
    _check_products(traced.jaxpr)
    if separate:
      _check_reads(traced.jaxpr, (params, state, inputs, present), outputs)
    return forward(params, state, inputs, present)


def check_rows(model, params, state, inputs, present, embeddings, sizes):
  """ValueError where an encoder reads other examples of the batch.

  A check of one example, the one with most modalities, beside a row of zeros
  instead of the batch it was in: it finds batch statistics, and proves nothing
  about other values.
  """
  counts = sum(np.asarray(here, np.int32) for here in present.values())
  if counts.ndim != 1 or not counts.size:
    return
  row = int(np.argmax(counts))
  pair = {}
  for name, value in inputs.items():
    value = np.asarray(value)[row]
    pair[name] = np.stack([value, np.zeros_like(value)])
  here = {name: np.repeat(np.asarray(present[name])[row], 2) for name in pair}
  found = _encode(model, params, state, pair, here)
  for name in inputs:
    before = np.asarray(embeddings[name], np.float64)[row]
    after = np.asarray(found[name], np.float64)[0]
    limit = SAME_ROW * float(np.asarray(sizes[name])[row])
    # NaN is no finding: the certificate has dealt with it.
    if np.linalg.norm(before - after) > limit + SAME_ROW * np.linalg.norm(
      after
    ):
      raise ValueError(
        f"the encoder of modality {name!r} reads other examples of the batch "
        "(batch statistics?): an embedding must depend on its own example "
        "alone, or there is no certificate."
      )


def trunk_keeps(model, params, geometry, outputs, present):
  """Whether logits behind a trunk move as slowly as its rows say: ``bool [b]``.

  The slope of every logit difference in all embeddings, at the embeddings of
  the batch and at none: what a claim that is too small shows in. It proves
  nothing elsewhere. Rows that differ between modalities are refused.
  """
  heads = list(geometry.head.values())
  same = functools.reduce(
    jnp.logical_and, [jnp.all(head == heads[0]) for head in heads]
  )
  rows, names = heads[0], sorted(geometry.head)
  embeddings = {name: outputs.embeddings[name] for name in names}

  def one(embeddings, present):
    here = {name: flag[None] for name, flag in present.items()}

    def logits(values):
      given = {name: value[None] for name, value in values.items()}
      return model.fuse(params, given, here).logits[0]

    return logits(embeddings), jax.jacrev(logits)(embeddings)

  with jax.default_matmul_precision("highest"):
    alone, slopes = jax.vmap(one)(embeddings, {n: present[n] for n in names})
  slope = jnp.concatenate([slopes[name] for name in names], axis=-1)

  def keeps(row):
    # Differences to one class at a time, [b, k].
    steep = jnp.linalg.norm(slope - slope[:, row][:, None], axis=-1)
    allowed = jnp.linalg.norm(rows - rows[row][None], axis=-1)
    return jnp.all(steep <= 1.0001 * allowed[None] + 1e-6, axis=-1)

  slow = jnp.all(jnp.stack([keeps(j) for j in range(len(rows))]), axis=0)
  scale = jnp.max(jnp.abs(outputs.logits), axis=-1) + jnp.max(
    jnp.linalg.norm(rows, axis=-1)
  ) * sum(jnp.linalg.norm(value, axis=-1) for value in embeddings.values())
  difference = jnp.max(jnp.abs(alone - outputs.logits), axis=-1)
  unlike = difference > SAME_ROW * scale
  # What is not a number proves nothing: the certificate deals with it.
  bad = jnp.isnan(difference) | jnp.any(jnp.isnan(slope), axis=(1, 2))
  return same & (bad | (slow & ~unlike))


@functools.partial(jax.jit, static_argnums=0)
def _encode(model, params, state, inputs, present):
  with jax.default_matmul_precision("highest"):
    return model.encode(params, state, inputs, present, train=False)[0]


def _check_types(jaxpr):
  dtypes = {
    variable.aval.dtype
    for equation in _equations(jaxpr)
    for variable in equation.outvars
    if hasattr(variable.aval, "dtype")
  }
  narrow = sorted(
    str(dtype)
    for dtype in dtypes
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < _LOW_PRECISION
  )
  if narrow:
    raise ValueError(
      f"the model computes in {', '.join(narrow)}, whose rounding a "
      "certificate cannot absorb. Cast its parameters and its dtype to "
      "float32; the certificate is then about that model."
    )


def _check_products(jaxpr):
  for equation in _equations(jaxpr):
    given = equation.params.get("precision")
    low = [p for p in _several(given) if p not in _EXACT]
    result = equation.outvars[0].aval.dtype if low else None
    if low and jnp.issubdtype(result, jnp.inexact):
      raise ValueError(
        f"the model asks for precision {low[0]} in {equation.primitive.name}, "
        "whose rounding a certificate cannot absorb. Leave precision unset or "
        'use "highest".'
      )


def _check_reads(jaxpr, arguments, outputs):
  """Every embedding depends on the arrays of its own modality alone."""
  params, state, inputs, present = arguments
  nothing = frozenset()
  labels = [nothing] * len(jax.tree.leaves((params, state)))
  for part in (inputs, present):
    for path, _ in jax.tree_util.tree_leaves_with_path(part):
      labels.append(frozenset((path[0].key,)))
  reads = _flow(jaxpr, labels)
  tree = jax.tree.unflatten(jax.tree.structure(outputs), reads)
  for name in inputs:
    found = jax.tree.leaves(
      tree.embeddings[name], is_leaf=lambda x: isinstance(x, frozenset)
    )
    others = sorted(nothing.union(*found) - {name})
    if others:
      raise ValueError(
        f"the encoder of modality {name!r} reads modality {others[0]!r}: its "
        "embedding must depend on its own input alone, or there is no margin "
        "certificate. Use separate encoders, or randomised smoothing."
      )


def _flow(jaxpr, labels) -> list[frozenset]:
  """Which labels reach each output, never fewer than truly do."""
  known = dict(zip(jaxpr.invars, labels, strict=True))

  def read(variable):
    if isinstance(variable, core.Literal):
      return frozenset()
    return known.get(variable, frozenset())

  for equation in jaxpr.eqns:
    given = [read(variable) for variable in equation.invars]
    known.update(zip(equation.outvars, _through(equation, given), strict=True))
  return [read(variable) for variable in jaxpr.outvars]


def _through(equation, given):
  """Labels of the results of one equation, from those of its operands."""
  name, params = equation.primitive.name, equation.params
  everything = [frozenset().union(*given)] * len(equation.outvars)
  if name == "scan":
    body = params["jaxpr"].jaxpr
    # By their shapes: the parameters of scan say it as ``num_consts`` until jax
    # 0.10 and in a tree of their own since then.
    size = _num_alike(equation.outvars, body.outvars)
    fixed = _num_alike(equation.invars, body.invars) - size
    return _loop(body, given, fixed, size)
  if name == "while":
    skipped, fixed = params["cond_nconsts"], params["body_nconsts"]
    body = given[skipped:]
    size = len(body) - fixed
    result = _loop(params["body_jaxpr"].jaxpr, body, fixed, size)
    # When a loop ends depends on whatever its condition reads.
    condition = params["cond_jaxpr"].jaxpr
    stop = _flow(condition, given[:skipped] + result)[0]
    rerun = body[:fixed] + [value | stop for value in result]
    return _loop(params["body_jaxpr"].jaxpr, rerun, fixed, size)
  if name == "cond":
    index, operands = given[0], given[1:]
    found = [_flow(branch.jaxpr, operands) for branch in params["branches"]]
    return [index.union(*values) for values in zip(*found)]
  inner = list(_inner(equation))
  if len(inner) != 1:
    return everything
  same_inputs = len(inner[0].invars) == len(given)
  if same_inputs and len(inner[0].outvars) == len(equation.outvars):
    return _flow(inner[0], given)
  return everything


def _num_alike(outside, inside) -> int:
  """How many values a loop passes whole, not one slice after another."""
  return sum(
    len(a.aval.shape) == len(b.aval.shape)
    for a, b in zip(outside, inside, strict=True)
  )


def _loop(body, given, num_fixed, num_carry):
  """A loop's results: its carry is fed back until nothing more is reached."""
  given = list(given)
  carried = slice(num_fixed, num_fixed + num_carry)
  while True:
    result = _flow(body, given)
    merged = [a | b for a, b in zip(given[carried], result[:num_carry])]
    if merged == given[carried]:
      return merged + result[num_carry:]
    given[carried] = merged


def _equations(jaxpr) -> Iterator[Any]:
  """All equations, those of inner functions included."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in _inner(equation):
      yield from _equations(inner)


def _inner(equation) -> Iterator[Any]:
  for value in equation.params.values():
    for inner in _several(value):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield inner


def _several(value):
  return value if isinstance(value, tuple | list) else (value,)
