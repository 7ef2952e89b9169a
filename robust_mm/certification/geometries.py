"""What a model says of itself, and whether that can carry a certificate."""

import functools

import jax

from robust_mm import _validate
from robust_mm import margins
from robust_mm import modalities
from robust_mm._types import Geometry
from robust_mm._types import Model
from robust_mm._types import Params

REDUCTIONS = ("sum", "mean")


def model_geometry(model: Model, params: Params) -> Geometry:
  """The geometry at full precision, or a ValueError that says what to do."""
  need_geometry(model)
  # Tensor-float or bfloat16 products are wrong by more than the slack.
  with jax.default_matmul_precision("highest"):
    geometry = model.geometry(params)
  if geometry is None:
    raise ValueError("model.geometry must return a Geometry, got None.")
  _validate.one_of(REDUCTIONS, **{"geometry.reduction": geometry.reduction})
  _validate.one_of(margins.FUSIONS, **{"geometry.fusion": geometry.fusion})
  return geometry


def need_geometry(model: Model) -> None:
  """ValueError for a model whose logits are no sum over modalities."""
  if model.geometry is None:
    raise ValueError(
      f"the model over {', '.join(model.modalities)} has no geometry: its "
      "logits are no sum of per-modality terms, so it has no margin "
      "certificate. Three ways out: source='relaxation', which bounds any "
      "model that is affine between known activations; a late-fusion head or "
      "a Lipschitz trunk; or randomised smoothing (robust_mm.smoothing; "
      "robust-mm certify --source=smoothing)."
    )


def abstract_geometry(model: Model, params: Params = None) -> Geometry:
  """The geometry in shapes: what a model states at all, whatever its values.

  Args:
    model: a late-fusion model.
    params: its parameters or their shapes; None for those of ``model.init``.

  Raises:
    ValueError: the model has no geometry.
  """
  need_geometry(model)
  if params is None:
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
  return jax.eval_shape(functools.partial(model_geometry, model), params)


def missing_constants(
  geometry: Geometry, *, bounded: bool = False
) -> tuple[str, ...]:
  """The modalities whose encoders state no Lipschitz bound, sorted.

  No radius is trained for unless this is empty.

  Args:
    geometry: of a model, or its shapes.
    bounded: leave out those with an embedding radius, whose replacement can be
      certified, as long as nothing less is asked; nothing else is certified
      unless this is empty then.
  """
  # Behind a trunk nothing is certified against replacement.
  bounded = bounded and geometry.fusion == "additive"
  radii = (geometry.embedding_radius or {}) if bounded else {}
  return tuple(
    name
    for name in modalities.names(geometry.head)
    if geometry.lipschitz.get(name) is None and radii.get(name) is None
  )


def refuse_mixed(outputs) -> None:
  """Scores that depend on other modalities carry no certificate."""
  if outputs.mixed:
    raise ValueError(
      "the model mixes modalities before its scores (Outputs.mixed), so it "
      "has no margin certificate. Use a late-fusion head, or randomised "
      "smoothing."
    )
