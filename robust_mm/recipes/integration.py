r"""Step 2 of CRMT as a phase: re-weights modalities on cached scores."""

from collections.abc import Mapping

import jax
import optax

from robust_mm import _validate
from robust_mm import certification
from robust_mm._types import Geometry
from robust_mm._types import Model
from robust_mm.certification import tables
from robust_mm.recipes import phases

TRAINABLE = "fusion/integration/"
# A hundredth must not be lost to the rounding of two shares.
_ROUNDING = 1e-6


def integration_phase(
  model: Model,
  *,
  num_steps: int,
  lr: float,
  fidelity: str,
  r0: float,
  temperature: float,
  tolerance: float,
  lipschitz: Mapping | None = None,
  units: Mapping | None = None,
) -> phases.Phase:
  """Step 2: only the integration factors move, on cached scores.

  The encoders, the proxies, the bias and all statistics stay bit-identical.

  Corrected, its result is kept only if on validation certified accuracy rises
  and accuracy falls by at most ``tolerance``. Both are the numbers the training
  loop measures: with the model's own constants, and the units and the radius of
  the selection. ``lipschitz`` (a threat that has changed) is what the factors
  are fitted to and is no part of that judgement; to judge a refit by the new
  threat, use ``certification.fit_integration`` on the trained model. Published,
  the result is kept without a question.

  Raises:
    ValueError: the head has no integration factors, or (corrected) no
      orthonormal rows; ``lipschitz`` or ``units`` are bad.
  """
  published = fidelity == "published"
  geometry = abstract_geometry(model)
  if stated_factors(geometry) is None:
    raise ValueError(
      "integration_steps must be 0 for a head without integration factors; "
      "model.fusion='orthogonal' has them."
    )
  if not published:
    need_orthonormal(geometry)
  scale = tables.check_units(units, model.modalities)
  if lipschitz is not None:
    lipschitz = _checked(lipschitz, model.modalities)

  def loss_fn(params, state, batch, *, key):
    del key
    geometry = model.geometry(params)
    loss = certification.integration_loss(
      stated_factors(geometry),
      batch["scores"],
      batch["label"],
      batch["present"],
      batch["lipschitz"],
      bias=geometry.bias,
      reduction=geometry.reduction,
      r0=r0,
      temperature=temperature,
      fidelity=fidelity,
    )
    return loss, (state, {})

  def prepare(params, state, cached, reference):
    constants = _constants(model, params, state, reference, lipschitz, fidelity)
    return {
      "scores": cached["scores"],
      "label": cached["label"],
      "present": cached["present"],
      "lipschitz": {n: c * scale[n] for n, c in constants.items()},
    }

  return phases.Phase(
    name="integration",
    num_steps=num_steps,
    loss=loss_fn,
    tx=certification.published_optimizer() if published else optax.adam(lr),
    trainable=TRAINABLE,
    prepare=prepare,
    accept=None if published else acceptance(tolerance),
  )


def acceptance(tolerance: float):
  """``accept(before, after)``: certified accuracy rises, accuracy is kept."""

  def accept(before, after):
    gained = after["certified_accuracy"] > before["certified_accuracy"]
    lost = before["accuracy"] - after["accuracy"]
    sentence = (
      f"certified accuracy {before['certified_accuracy']:.4f} -> "
      f"{after['certified_accuracy']:.4f}, accuracy {before['accuracy']:.4f} "
      f"-> {after['accuracy']:.4f} on validation"
    )
    return gained and lost <= tolerance + _ROUNDING, sentence

  return accept


def abstract_geometry(model: Model) -> Geometry:
  """The geometry of a late-fusion model in shapes: what it states at all."""
  if model.geometry is None:
    raise ValueError(
      "crmt needs a model whose logits are a sum of per-modality scores "
      "(model.fusion='orthogonal'); this one mixes modalities before them."
    )
  abstract = jax.eval_shape(lambda key: model.init(key)[0], jax.random.key(0))
  return jax.eval_shape(model.geometry, abstract)


def need_orthonormal(geometry: Geometry) -> None:
  """Only there is ``margin / (sqrt(2) L)`` of raw scores a radius."""
  if geometry.factors is None:
    raise ValueError(
      "the per-modality radii of fidelity='corrected' need orthonormal rows "
      "(model.fusion='orthogonal' with orthogonality='polar'); this head has "
      "none: choose it, or fidelity='published', or recipes.certified_radius, "
      "which takes any late-fusion head."
    )


def stated_factors(geometry: Geometry) -> Mapping | None:
  """The integration factors a head states, orthonormal or not."""
  if geometry.integration is None:
    return geometry.factors
  return geometry.integration


def _constants(model, params, state, reference, given, fidelity):
  if given is not None:
    return given
  if fidelity == "published":
    return certification.empirical_lipschitz(
      model, params, reference, state=state
    )
  return model.geometry(params).lipschitz


def _checked(lipschitz: Mapping, names: tuple[str, ...]) -> dict:
  _validate.known(names, lipschitz=lipschitz)
  for name in names:
    if name not in lipschitz:
      raise ValueError(f"lipschitz has no constant for modality {name!r}.")
    _validate.positive(**{f"lipschitz[{name!r}]": lipschitz[name]})
  return dict(lipschitz)
