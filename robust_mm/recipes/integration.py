r"""Step 2 of CRMT as a phase: re-weights modalities on cached scores."""

from collections.abc import Mapping

import jax
import optax

from robust_mm import _validate
from robust_mm import certification
from robust_mm._types import Geometry
from robust_mm._types import Model
from robust_mm.certification import geometries
from robust_mm.certification import tables
from robust_mm.recipes import phases

TRAINABLE = "fusion/integration/"
CORRECTED_STEPS = 500
PUBLISHED_EPOCHS = 45
_PER_EXAMPLE = ("scores", "label", "present")


def integration_phase(
  model: Model,
  *,
  num_steps: int | None,
  lr: float,
  fidelity: str,
  r0: float,
  temperature: float,
  tolerance: float,
  steps_per_epoch: int | None = None,
  batch_size: int = 64,
  lipschitz: Mapping | None = None,
  units: Mapping | None = None,
) -> phases.Phase:
  """Step 2: only the integration factors move, on cached scores.

  The encoders, the proxies, the bias and all statistics stay bit-identical.

  Corrected: full-batch Adam on the direction of the factors (their mean stays,
  see ``certification.integration_optimizer``); the last update goes back to the
  smallest loss seen. Kept only if on validation certified accuracy at
  ``r0`` rises and accuracy falls by at most ``tolerance``, both by
  ``certification.accept_integration`` against the threat the factors were
  fitted to: ``lipschitz`` where given, and ``units``.

  Published: 45 epochs of ``certification.published_optimizer``, each update on
  ``batch_size`` examples drawn at random from the training set. Its result is
  kept without a question; what acceptance says of it is reported.

  Raises:
    ValueError: the head has no integration factors, or (corrected) no
      orthonormal rows; ``lipschitz``, ``units``, ``batch_size`` or
      (published) ``steps_per_epoch`` are bad; (corrected) the geometry does not
      say how the factors are made of the parameters.
  """
  published = fidelity == "published"
  geometry = abstract_geometry(model)
  need_scores(geometry)
  if stated_factors(geometry) is None:
    raise ValueError(
      "integration_steps must be 0 for a head without integration factors; "
      "model.fusion='orthogonal' has them."
    )
  if published:
    how = _published(num_steps, steps_per_epoch, batch_size)
  else:
    need_orthonormal(geometry)
    how = _corrected(num_steps or CORRECTED_STEPS, lr, geometry.positivity)
  scale = tables.check_units(units, model.modalities)
  given = lipschitz is not None
  if given:
    lipschitz = _checked(lipschitz, model.modalities)

  # Compiled: run one by one, the products of a head cost seconds.
  @jax.jit
  def stated_constants(params):
    return geometries.model_geometry(model, params).lipschitz

  @jax.jit
  def weigh(before, after, cached, constants):
    old = geometries.model_geometry(model, before)
    new = geometries.model_geometry(model, after)
    return certification.accept_integration(
      stated_factors(old),
      stated_factors(new),
      *(cached[name] for name in _PER_EXAMPLE),
      constants,
      r0=r0,
      bias=new.bias,
      max_drop=tolerance,
      fidelity=fidelity,
      reduction=new.reduction,
    )

  def threat(params, state, reference):
    """``{m: constant}`` in units: what is fitted to is what judges."""
    constants = lipschitz
    if not given and published:
      constants = certification.empirical_lipschitz(
        model, params, reference, state=state
      )
    elif not given:
      constants = stated_constants(params)
    return {name: value * scale[name] for name, value in constants.items()}

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
    return {
      **{name: cached[name] for name in _PER_EXAMPLE},
      "lipschitz": threat(params, state, reference),
    }

  def judge(before, after, state, cached, reference):
    constants = threat(after, state, reference)
    accepted, metrics = weigh(before, after, cached, constants)
    kind = "estimated" if published else "certified"
    words = " with the constants given" if given else ""
    return bool(accepted), (
      f"{kind} accuracy at radius {r0:g}{words} "
      f"{metrics['certified_accuracy_before']:.4f} -> "
      f"{metrics['certified_accuracy_after']:.4f}, accuracy "
      f"{metrics['accuracy_before']:.4f} -> {metrics['accuracy_after']:.4f} "
      f"on validation"
    )

  return phases.Phase(
    name="integration",
    loss=loss_fn,
    trainable=TRAINABLE,
    prepare=prepare,
    judge=judge,
    binding=not published,
    **how,
  )


def _corrected(num_steps, lr, positivity) -> dict:
  """How long the corrected step 2 is, and its optimiser."""
  if positivity is None:
    raise ValueError(
      "geometry.positivity must say how the integration factors are made of "
      "their parameters ('simplex' or 'softplus'), so that step 2 can keep "
      "their mean; or set integration_steps=0."
    )
  tx = certification.integration_optimizer(
    optax.adam(lr), num_steps=num_steps, positivity=positivity
  )
  # It keeps the mean of the factors, and goes back to the best it saw.
  return {"num_steps": num_steps, "tx": tx, "averaged": False}


def _published(num_steps, steps_per_epoch, batch_size) -> dict:
  """How long the published step 2 is, its optimiser and its batches."""
  if steps_per_epoch is None:
    raise ValueError(
      "steps_per_epoch must be given with fidelity='published', whose step 2 "
      "counts epochs of the training set; or set integration_steps=0."
    )
  _validate.at_least(1, steps_per_epoch=steps_per_epoch, batch_size=batch_size)

  def draw(key, params, state, batch):
    del params, state
    size = batch["label"].shape[0]
    rows = jax.random.choice(key, size, (min(batch_size, size),), replace=False)
    drawn = {name: batch[name] for name in _PER_EXAMPLE}
    return {**batch, **jax.tree.map(lambda x: x[rows], drawn)}

  return {
    "num_steps": num_steps or PUBLISHED_EPOCHS * steps_per_epoch,
    "tx": certification.published_optimizer(steps_per_epoch=steps_per_epoch),
    "interventions": (draw,),
  }


def abstract_geometry(model: Model) -> Geometry:
  """The geometry of a late-fusion model in shapes: what it states at all."""
  if model.geometry is None:
    raise ValueError(
      "crmt needs a model whose logits are a sum of per-modality scores "
      "(model.fusion='orthogonal'); this one mixes modalities before them."
    )
  return certification.abstract_geometry(model)


def need_scores(geometry: Geometry) -> None:
  """A trunk leaves no score of a modality by itself."""
  if geometry.fusion != "additive":
    raise ValueError(
      "crmt works on per-modality scores and model.fusion='trunk' has none: "
      "use recipes.certified_radius, or a late-fusion head."
    )


def need_orthonormal(geometry: Geometry) -> None:
  """Only there is ``margin / (sqrt(2) L)`` of raw scores a radius."""
  need_scores(geometry)
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


def _checked(lipschitz: Mapping, names: tuple[str, ...]) -> dict:
  _validate.known(names, lipschitz=lipschitz)
  for name in names:
    if name not in lipschitz:
      raise ValueError(f"lipschitz has no constant for modality {name!r}.")
    _validate.positive(**{f"lipschitz[{name!r}]": lipschitz[name]})
  return dict(lipschitz)
