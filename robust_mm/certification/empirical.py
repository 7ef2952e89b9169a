"""Estimated sensitivities from data: baselines and monitors, no bounds."""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from robust_mm import _validate
from robust_mm import margins
from robust_mm._types import Batch
from robust_mm._types import Model
from robust_mm._types import Params
from robust_mm._types import State
from robust_mm.certification import batches
from robust_mm.certification import geometries
from robust_mm.certification import tables
from robust_mm.certification.tables import SensitivityTables


def empirical_lipschitz(
  model: Model,
  params: Params,
  batch: Batch,
  *,
  state: State = None,
  chunk: int = 64,
) -> dict[str, Float[Array, " k"]]:
  r"""Estimated constants :math:`\tau_{m,k} = \max \|\nabla_{x_m} s_m[k]\|`.

  The gradient is that of the raw score, not of the logit, so integration
  factors do not enter.

  Formal guarantees:
    - None: the maximum over data is a *lower* estimate of the constant.

  Args:
    model: a late-fusion model.
    params: its parameters.
    batch: training data, ``inputs`` and ``present``.
    state: the model's state.
    chunk: examples differentiated at once.

  Returns:
    ``{m: [k]}``.
  """
  geometry = geometries.model_geometry(model, params)
  return _largest_gradient(
    model, geometry, params, batch, state, chunk, margins.norm, True
  )


def empirical_tables(
  model: Model,
  params: Params,
  batch: Batch,
  *,
  state: State = None,
  chunk: int = 64,
  form: str = "difference",
) -> SensitivityTables:
  r"""Estimated tables, for encoders that state no constant.

  Args:
    model: a late-fusion model.
    params: its parameters.
    batch: training data, ``inputs`` and ``present``.
    state: the model's state.
    chunk: examples differentiated at once.
    form: ``"difference"``, :math:`\max \|\nabla_{x_m}(c_m[y] - c_m[j])\|` over
      the data, or ``"split"``, the published
      :math:`|a_y| \tau_y + |a_j| \tau_j`.

  Returns:
    tables with ``sound=False``: nothing made from them may be called certified.
  """
  _validate.one_of(("difference", "split"), form=form)
  geometry = geometries.model_geometry(model, params)
  if form == "split" and geometry.fusion != "additive":
    raise ValueError(
      "fidelity must be 'corrected' for a model with a trunk: the published "
      "form is about per-modality scores."
    )
  if form == "split":
    constants = empirical_lipschitz(
      model, params, batch, state=state, chunk=chunk
    )
    factors = (
      geometry.integration
      or geometry.factors
      or {name: jnp.ones_like(constants[name]) for name in constants}
    )
    result, reach = tables.split_tables(factors, constants), None
  else:
    result = _largest_gradient(
      model, geometry, params, batch, state, chunk, tables.row_distances, False
    )
    reach = tables.reach_tables(geometry)
  return SensitivityTables(
    tables=result, reach=reach, source="empirical", sound=False
  )


def _largest_gradient(
  model, geometry, params, batch, state, chunk, reduce, raw
):
  """Maximum over examples of ``reduce(jacobian [k, size])``, per modality."""
  _validate.at_least(1, chunk=chunk)
  present = batches.presence(batch, model.modalities, model.input_shapes)
  inputs = {name: _floating(batch["inputs"][name]) for name in present}
  num_examples = present[model.modalities[0]].shape[0]
  chunk = min(chunk, num_examples)
  num_chunks = -(-num_examples // chunk)
  # The last chunk is filled up with examples seen before, which leaves a
  # maximum as it is.
  order = (jnp.arange(num_chunks * chunk) % num_examples).reshape(-1, chunk)

  def per_example(params, geometry, inputs, present):
    inputs, present = jax.tree.map(lambda x: x[None], (inputs, present))
    result = {}
    for name in model.modalities:

      def term(value, name=name):
        given = {**inputs, name: value}
        return _modality_term(
          model, params, state, geometry, given, present, name, raw
        )

      jacobian = jax.jacrev(term)(inputs[name])
      result[name] = reduce(jacobian.reshape(jacobian.shape[0], -1))
    return result

  @jax.jit
  def run(params, geometry, inputs, present):
    def step(best, index):
      examples = jax.tree.map(lambda x: x[index], (inputs, present))
      found = jax.vmap(per_example, (None, None, 0, 0))(
        params, geometry, *examples
      )
      found = jax.tree.map(lambda x: jnp.max(x, axis=0), found)
      return jax.tree.map(jnp.maximum, best, found), None

    first = jax.tree.map(lambda x: x[0], (inputs, present))
    with jax.default_matmul_precision("highest"):
      shapes = jax.eval_shape(per_example, params, geometry, *first)
      best = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
      return jax.lax.scan(step, best, order)[0]

  return run(params, geometry, inputs, present)


def _floating(value):
  value = jnp.asarray(value)
  if jnp.issubdtype(value.dtype, jnp.floating):
    return value
  return value.astype(jnp.result_type(float))


def _modality_term(model, params, state, geometry, inputs, present, name, raw):
  """``[k]``: the raw score or the contribution of one modality."""
  embeddings, _ = model.encode(
    params, {} if state is None else state, inputs, present
  )
  if raw:
    outputs = model.fuse(params, embeddings, present)
    geometries.refuse_mixed(outputs)
    if outputs.scores is not None:
      return outputs.scores[name][0]
  if geometry.fusion == "joint":
    return model.fuse(params, embeddings, present).logits[0]
  term = embeddings[name][0] @ geometry.head[name].T
  return jnp.where(present[name][0], term, 0)
