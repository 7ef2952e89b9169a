r"""Pairwise sensitivities: how fast a logit difference can move.

.. math:: C_m[y, j] = L_m \|V_m[y] - V_m[j]\|_2

bounds the change of modality m's contribution to :math:`z_y - z_j` per unit of
l2 change of its raw input. One ``[k, k]`` table per modality and parameter set,
outside the batch loop.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float

from robust_mm import _validate
from robust_mm import lipschitz
from robust_mm import margins
from robust_mm import modalities
from robust_mm._types import Geometry
from robust_mm._types import Model
from robust_mm._types import Params
from robust_mm.certification import geometries

FORMS = ("general", "orthonormal", "split")
TRAINING_ITERS = 6  # Gram steps of a chain bound in a loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SensitivityTables:
  r"""What a certificate rests on; made once per parameter set.

  Attributes:
    tables: ``{m: [k, k]}`` per unit of raw l2 distance, diagonal 0.
    source: ``"global"`` (sound on the whole input space) or ``"empirical"``
      (an estimate from data, no bound).
    sound: whether every entry is an upper bound.
    lipschitz: ``{m: [] | None}`` constants of the encoders, so that a batch
      need not compute them again; None reads them from the model.
    reach: ``{m: [k, k]}`` of the modalities with a bounded embedding, or None:
      :math:`B_m \|V_m[y] - V_m[j]\|`, the size of :math:`c_m[y] - c_m[j]` that
      no input exceeds.
  """

  tables: Any
  lipschitz: Any = None
  reach: Any = None
  source: str = dataclasses.field(metadata={"static": True})
  sound: bool = dataclasses.field(metadata={"static": True})


def sensitivity_tables(
  model: Model, params: Params, *, source: str = "global"
) -> SensitivityTables:
  """Sound tables from the constants that the model states.

  Args:
    model: a late-fusion model.
    params: its parameters.
    source: only ``"global"``; ``empirical_tables`` needs data.

  Raises:
    ValueError: naming the modality whose encoder states no constant, or for a
      model whose logits are no sum of per-modality terms.
  """
  _validate.one_of(("global",), source=source)
  geometry = geometries.model_geometry(model, params)
  return dataclasses.replace(
    global_tables(geometry), lipschitz=dict(geometry.lipschitz)
  )


def global_tables(geometry: Geometry) -> SensitivityTables:
  """The general form and the reach, from one pass over pairs of rows."""
  distances = {
    name: row_distances(geometry.head[name])
    for name in modalities.names(geometry.head)
  }
  return SensitivityTables(
    tables={
      name: _smallest(geometry, name, distance)
      for name, distance in distances.items()
    },
    reach=reach_tables(geometry, distances),
    source="global",
    sound=True,
  )


def chain_table(
  geometry: Geometry, name: str, *, num_iters: int = 16
) -> Float[Array, "k k"] | None:
  """``lipschitz.dense_chain`` of a modality's encoder and head, or None."""
  if geometry.fusion != "additive":  # a chain ends in the rows of the head
    return None
  layers = (geometry.chain or {}).get(name)
  if layers is None:
    return None
  *hidden, last = layers
  return lipschitz.dense_chain(
    hidden, geometry.head[name], last=last, num_iters=num_iters
  )


def _smallest(geometry, name, distance):
  """The general form, or the chain bound where that is smaller."""
  bound = geometry.lipschitz.get(name)
  capped = (geometry.embedding_radius or {}).get(name) is not None
  # Behind a trunk there is no drop of one modality.
  capped = capped and geometry.fusion == "additive"
  if bound is None and capped:
    # A bounded embedding costs its drop at most, however fast it gets there.
    bound = jnp.asarray(jnp.inf, distance.dtype)
  else:
    bound = _bound(geometry, name, distance.dtype)
  # Not inf * 0: what equal rows make of an embedding cannot differ.
  table = jnp.where(distance == 0, 0, distance * bound)
  chain = chain_table(geometry, name)
  return table if chain is None else jnp.minimum(table, chain)


def reach_tables(
  geometry: Geometry, distances: Mapping[str, Array] | None = None
) -> dict[str, Float[Array, "k k"]] | None:
  r""":math:`B_m \|V_m[y] - V_m[j]\|` of the bounded modalities, or None.

  Raises:
    ValueError: naming an embedding radius that is negative, or of no modality.
  """
  radii = geometry.embedding_radius or {}
  _validate.known(geometry.head, **{"geometry.embedding_radius": radii})
  result = {}
  for name in modalities.names(radii):
    radius = radii[name]
    if radius is None:
      continue
    if margins.known_values(radius) and not np.asarray(radius) >= 0:
      raise ValueError(
        f"geometry.embedding_radius[{name!r}] must be non-negative, got "
        f"{radius}."
      )
    distance = (
      row_distances(geometry.head[name])
      if distances is None
      else distances[name]
    )
    result[name] = distance * jnp.asarray(radius, distance.dtype)
  return result or None


def pairwise_sensitivity(
  geometry: Geometry,
  form: str = "general",
  *,
  defect: Mapping[str, Any] | None = None,
) -> dict[str, Float[Array, "k k"]]:
  r"""Sensitivity tables in one of three forms.

  ==============  =====================================  ======================
  form            table over :math:`L_m`                 sound for
  ==============  =====================================  ======================
  "general"       :math:`\|V[y] - V[j]\|`                any head, the smallest;
                  or a chain, where smaller
  "orthonormal"   :math:`\sqrt{a[y]^2 + a[j]^2}`         factors, norm(W) <= 1
  "split"         :math:`|a[y]| + |a[j]|`                factors, unit rows
  ==============  =====================================  ======================

  Args:
    geometry: of the model.
    form: see above.
    defect: ``{m: max|W W^T - I|}``; the orthonormal form of a head of which
      only that is known is multiplied by :math:`\sqrt{1 + 2 D}`.

  Returns:
    ``{m: [k, k]}``, diagonal 0.
  """
  _validate.one_of(FORMS, form=form)
  tables = {}
  for name in modalities.names(geometry.head):
    if form == "general":
      tables[name] = _smallest(
        geometry, name, row_distances(geometry.head[name])
      )
      continue
    if form == "orthonormal":
      table = _closed_form(_factors(geometry, name))
      if defect is not None:
        table = table * jnp.sqrt(1 + 2 * jnp.asarray(defect[name]))
    else:
      factors = {name: _factors(geometry, name)}
      ones = {name: jnp.ones_like(factors[name])}
      table = split_tables(factors, ones)[name]
    tables[name] = table * _bound(geometry, name, table.dtype)
  return tables


def split_tables(
  factors: Mapping[str, Array], constants: Mapping[str, Array]
) -> dict[str, Float[Array, "k k"]]:
  r"""The published form :math:`|a_y| \tau_y + |a_j| \tau_j`.

  Args:
    factors: ``{m: [k]}`` integration factors.
    constants: ``{m: [k]}`` Lipschitz constants of the raw scores.
  """
  tables = {}
  for name in modalities.names(factors):
    term = jnp.abs(factors[name]) * constants[name]
    table = term[:, None] + term[None, :]
    tables[name] = _hollow(table)
  return tables


def sensitivity(
  geometry: Geometry,
  reference,
  present: Mapping[str, Array],
  units: Mapping[str, Any] | None = None,
) -> dict[str, Float[Array, "b k"]]:
  r"""Differentiable sensitivities of a batch, for training losses.

  Of a dense encoder (``geometry.chain``) the chain bound; else, with
  integration factors, the closed form :math:`s_m L_m \sqrt{a_y^2 + a_j^2}`
  (an upper bound of the general one), else rows of the general table.

  Args:
    geometry: of the current parameters; its constants may be learnt. Where it
      states nominal ones, they count: this is no certificate.
    reference: int ``[b]``, the label (or prediction).
    present: ``{m: bool[b]}``.
    units: ``{m: s_m}``, default 1.

  Returns:
    ``{m: [b, k]}``, 0 at the reference class and where m is absent; divided by
    the number of present modalities for a head that averages.
  """
  result = {}
  units = check_units(units, modalities.names(geometry.head))
  for name in modalities.names(geometry.head):
    head = geometry.head[name]
    margins.check_label(reference, head.shape[0], jnp.shape(present[name]))
    chain = chain_table(geometry, name, num_iters=TRAINING_ITERS)
    if chain is not None:
      result[name] = gather(chain, reference, present[name]) * units[name]
      continue
    if geometry.factors is None:
      rows = gather(row_distances(head), reference, present[name])
    else:
      factors = _factors(geometry, name)
      rows = closed_rows(factors, reference, present[name])
    constant = jnp.asarray(training_constant(geometry, name), rows.dtype)
    result[name] = rows * (constant * units[name])
  if geometry.reduction == "mean":
    result = averaged(result, {name: present[name] for name in result})
  return result


def training_constant(geometry: Geometry, name: str) -> Array:
  """The constant of a modality that a loss counts with; see ``nominal``."""
  nominal = (geometry.nominal or {}).get(name)
  if nominal is not None:
    return nominal
  return _bound(geometry, name, geometry.head[name].dtype)


def averaged(
  values: Mapping[str, Array], present: Mapping[str, Array]
) -> dict[str, Float[Array, "b k"]]:
  """``{m: [b, k]}`` divided by the number of present modalities.

  ``present`` names all of them, ``values`` perhaps some only.
  """
  weight = modalities.share(
    {name: jnp.asarray(here) for name, here in present.items()}
  )
  return {
    name: value * weight[..., None].astype(value.dtype)
    for name, value in values.items()
  }


def gather(table: Float[Array, "k k"], reference, present) -> Array:
  """Rows of a table at the reference classes, 0 where absent: ``[b, k]``.

  A product with one-hot rows is exact at this precision and, unlike indexing,
  needs no output sharding on meshes with explicit axes.
  """
  chosen = jax.nn.one_hot(reference, table.shape[0], dtype=table.dtype)

  def rows_of(values):
    return jnp.einsum("...y,yj->...j", chosen, values, precision="highest")

  # 0 * inf would be NaN in every row: the infinite entries go by themselves.
  endless = jnp.isposinf(table)
  rows = rows_of(jnp.where(endless, 0, table))
  rows = jnp.where(rows_of(endless.astype(table.dtype)) > 0, jnp.inf, rows)
  return jnp.where(jnp.asarray(present)[..., None], rows, 0)


def check_units(units: Mapping | str | None, known: tuple[str, ...]) -> dict:
  """``{m: s_m}`` with 1 where not named; ValueError for a bad one."""
  if isinstance(units, str):
    raise ValueError(
      'units must be a mapping {modality: size}; for "relative" units pass '
      "certification.relative_units(training_batch)."
    )
  units = {} if units is None else units
  _validate.known(known, units=units)
  for name, value in units.items():
    if margins.known_values(value):
      _validate.positive(**{f"units[{name!r}]": value})
  return {name: units.get(name, 1.0) for name in known}


def _factors(geometry, name):
  if geometry.factors is None:
    raise ValueError(
      f"geometry.factors has no entry for modality {name!r}; use the "
      '"general" form.'
    )
  return geometry.factors[name]


def _bound(geometry, name, dtype):
  bound = geometry.lipschitz.get(name)
  if bound is None:
    raise ValueError(
      f"the encoder of modality {name!r} states no Lipschitz bound. Either "
      'estimate with source="empirical" (not a certificate), or use encoders '
      "from robust_mm.models.lipschitz or randomised smoothing."
    )
  if margins.known_values(bound) and not np.asarray(bound) >= 0:
    raise ValueError(
      f"geometry.lipschitz[{name!r}] must be non-negative, got {bound}."
    )
  return jnp.asarray(bound, dtype)


def row_distances(rows: Float[Array, "k d"]) -> Float[Array, "k k"]:
  # Rows are subtracted, one reference at a time: the expansion into a Gram
  # matrix is wrong by a factor of 4 for near-equal rows in float32.
  return jax.lax.map(functools.partial(_distances_to, rows), rows)


def _distances_to(rows, row):
  return margins.norm(row[None, :] - rows)


def _closed_form(factors: Float[Array, " k"]) -> Float[Array, "k k"]:
  num_classes = factors.shape[0]
  pairs = jnp.stack(
    [
      jnp.broadcast_to(factors[:, None], (num_classes, num_classes)),
      jnp.broadcast_to(factors[None, :], (num_classes, num_classes)),
    ],
    axis=-1,
  )
  return _hollow(margins.norm(pairs))


def closed_rows(factors, reference, present):
  """The closed form at the reference classes, without the ``[k, k]`` table."""
  num_classes = factors.shape[0]
  selected = margins.one_hot(reference, num_classes)
  others = jnp.broadcast_to(factors, selected.shape)
  own = jnp.broadcast_to(margins.pick(others, selected), selected.shape)
  used = ~selected & jnp.asarray(present)[..., None]
  # Masked before the root, so that nothing absent has a gradient.
  pairs = jnp.where(used[..., None], jnp.stack([own, others], axis=-1), 0)
  return margins.norm(pairs)


def _hollow(table):
  return jnp.where(jnp.eye(table.shape[0], dtype=bool), 0, table)
