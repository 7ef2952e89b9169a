"""The gates of ModalImmune, by name, around its optimiser."""

import inspect
import warnings
from collections.abc import Callable
from collections.abc import Mapping

import jax
import optax

from robust_mm import _validate
from robust_mm import masking
from robust_mm._types import Model
from robust_mm.recipes import destruction
from robust_mm.recipes import immunity
from robust_mm.recipes import objectives

_FACTORIES = {
  "hessian": masking.hessian_gate,
  "directional": masking.directional_gate,
  "fisher": masking.fisher_mask,
  "random": masking.random_gate,
}
GATES = (*_FACTORIES, "published", "none")


def masked(
  tx: optax.GradientTransformation,
  model: Model,
  gate: str,
  options: Mapping,
  *,
  period: int | None,
  clip: float | None,
) -> optax.GradientTransformation:
  """The optimiser with gates around it, and a clip by block before them.

  Raises:
    ValueError: naming ``gate`` or ``gate_options``.
  """
  _validate.one_of(GATES, gate=gate)
  options = dict(options)
  if gate == "published":
    with warnings.catch_warnings():
      # That it never closes is said in the recipe.
      warnings.simplefilter("ignore", UserWarning)
      chosen = {"fidelity": "published", "gate": masking.published_gate()}
  elif gate == "none":
    chosen = {"gated": ()}
  else:
    chosen = {}
  if chosen and options:
    raise ValueError(f"gate_options must be empty where gate is {gate!r}.")
  if not chosen:
    chosen = {"gate": _make(model, gate, options)}
  mask = masking.curvature_mask(
    tx,
    destruction.block_labels,
    period=period,
    separable=True,
    destructive_clip=clip,
    **chosen,
  )
  if clip is None:
    return mask
  return optax.chain(destruction.clip_by_block(clip), mask)


def _make(model: Model, gate: str, options: dict):
  factory = _FACTORIES[gate]
  known = set(inspect.signature(factory).parameters) - {"per_example_loss_fn"}
  for name in options:
    if name not in known:
      raise ValueError(
        f"gate_options has {name!r}, which gate {gate!r} does not take."
        f"{_validate.suggestion(name, known)}"
      )
  if gate == "fisher":
    options["per_example_loss_fn"] = _loss_of_example(model)
  return factory(**options)


def _loss_of_example(model: Model) -> Callable:
  """The task loss of one row of :func:`destruction.task_examples`."""

  def loss_fn(params, example):
    batch = jax.tree.map(lambda x: x[None], example["batch"])
    embeddings, _ = model.encode(
      params, example["state"], batch["inputs"], batch["present"], train=False
    )
    logits = immunity.logits_of(model, params, embeddings, batch["present"])
    return objectives.task_loss(model, logits, batch)

  return loss_fn
