r"""Training a token transformer without labels, on whatever is there.

Masked autoencoding, contrasts between modalities, or both. What only serves
this (decoder, projections, temperature) lives in the phase's extra state, so
that the model that is kept is the one that will be used.

References:
  `He et al. (2022) <https://arxiv.org/abs/2111.06377>`_;
  `Radford et al. (2021) <https://arxiv.org/abs/2103.00020>`_;
  `McKinzie et al. (2023) <https://arxiv.org/abs/2304.04385>`_.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from robust_mm import _validate
from robust_mm._types import Model
from robust_mm.models import decoding
from robust_mm.recipes import contrasts
from robust_mm.recipes import phases
from robust_mm.recipes import reconstruction

OBJECTIVES = ("mae", "contrastive", "both")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
  """The arguments of :func:`pretrain`, checked and filled in."""

  model: Model
  decoder: decoding.TokenDecoder | None
  masking: reconstruction.Masking
  variance_floor: float
  contrastive_weight: float
  projection_dim: int
  temperature: float
  max_scale: float


def pretrain(
  model: Model,
  *,
  num_steps: int,
  tx: optax.GradientTransformation,
  objective: str = "mae",
  mask_ratio: float = 0.75,
  hide_rate: float = 0.3,
  variance_floor: float = 1e-4,
  decoder_layers: int = 1,
  decoder_width: int = 64,
  decoder_heads: int = 4,
  contrastive_weight: float = 1.0,
  projection_dim: int = 64,
  temperature: float = 0.07,
  max_scale: float = 100.0,
) -> phases.Recipe:
  r"""Representation learning on all modalities, labels unread.

  .. math:: L = L_{mae} + \beta L_{con}, \qquad
            L_{mae} = \operatorname{mean}_m \operatorname{mean}_{masked\ n}
            \|\hat r_{mn} - r_{mn}\|^2 / p_m

  - ``mae``: of every modality ``mask_ratio`` of the tokens, and whole
    modalities with the chance ``hide_rate``, are hidden and told from the rest:
    see :func:`reconstruction.loss`.
  - ``contrastive``: the pooled features of each modality alone, projected, tell
    which belong together: see :func:`contrasts.loss`.
  - ``both``: the sum, with :math:`\beta` = ``contrastive_weight``.

  Formal guarantees:
    - The linear head ``fusion/last`` stays bit-identical.
    - No label is read, and no value of an absent modality.

  Args:
    model: of ``fusion="transformer"``; with at least two modalities, but for
      ``mae``.
    num_steps: optimiser updates.
    tx: the optimiser; decoder and projections are trained by the same, with a
      state of their own.
    objective: ``mae``, ``contrastive`` or ``both``.
    mask_ratio: share of the tokens of a modality that are hidden, in (0, 1); at
      least one is and one is not. A modality of one token is hidden as a whole
      alone.
    hide_rate: chance that a modality an item has is hidden as a whole, in
      [0, 1); one of those it has stays.
    variance_floor: added to the variance of a patch, in units of normalised
      inputs. 1e-4 keeps the rounding of 8-bit pixels in a constant patch small.
    decoder_layers: blocks of the decoder.
    decoder_width: of the decoder.
    decoder_heads: attention heads of the decoder.
    contrastive_weight: beta of ``both``, positive.
    projection_dim: of the space in which modalities are compared.
    temperature: at the beginning; it is learnt.
    max_scale: the largest inverse temperature.

  Raises:
    ValueError: naming the argument that is wrong.
  """
  _validate.one_of(OBJECTIVES, objective=objective)
  if model.token_parts is None:
    raise ValueError(
      "pretrain needs a model of tokens: config.model.fusion='transformer', or "
      "models.token_transformer."
    )
  if not 0 < mask_ratio < 1:
    raise ValueError(f"mask_ratio must lie in (0, 1), got {mask_ratio}.")
  _validate.below_one(hide_rate=hide_rate)
  _validate.positive(
    variance_floor=variance_floor,
    contrastive_weight=contrastive_weight,
    temperature=temperature,
    max_scale=max_scale,
  )
  _validate.at_least(1, projection_dim=projection_dim)
  if temperature * max_scale < 1:
    raise ValueError(
      f"temperature must be at least 1 / max_scale ({1 / max_scale:g}), got "
      f"{temperature}."
    )
  if objective != "mae" and len(model.modalities) < 2:
    raise ValueError(
      f"objective={objective!r} compares modalities and needs at least two, "
      f"got {', '.join(model.modalities)}; 'mae' takes one."
    )
  decoder = decoding.for_model(
    model,
    num_layers=decoder_layers,
    width=decoder_width,
    num_heads=decoder_heads,
  )
  weight = {"mae": 0.0, "contrastive": 1.0, "both": contrastive_weight}
  masking = reconstruction.Masking(mask_ratio=mask_ratio, hide_rate=hide_rate)
  if objective != "contrastive":
    _check_targets(model, hide_rate)
  settings = Settings(
    model=model,
    decoder=None if objective == "contrastive" else decoder,
    masking=masking,
    variance_floor=variance_floor,
    contrastive_weight=weight[objective],
    projection_dim=projection_dim,
    temperature=temperature,
    max_scale=max_scale,
  )
  phase = phases.Phase(
    name="pretrain",
    num_steps=num_steps,
    tx=tx,
    extra=make_extra(settings, tx),
    update=make_update(settings, tx),
    evaluate=make_evaluate(settings),
  )
  return phases.Recipe(name=f"pretrain-{objective}", phases=(phase,))


def _check_targets(model: Model, hide_rate: float) -> None:
  parts = model.token_parts
  hides = hide_rate > 0 and len(model.modalities) > 1
  if not hides and max(parts.num_tokens.values()) == 1:
    raise ValueError(
      "hide_rate must be positive, and there must be two modalities, where "
      "all of them are one token: nothing else is masked."
    )


def make_extra(
  settings: Settings, tx: optax.GradientTransformation
) -> Callable:
  """``extra(params, key)``: what training needs beside the model."""

  def extra(params, key):
    del params
    decoder_key, projection_key = jax.random.split(key)
    side = {}
    if settings.decoder is not None:
      side["decoder"] = settings.decoder.init(decoder_key)
    if settings.contrastive_weight:
      side["contrast"] = contrasts.init(
        projection_key,
        settings.model.modalities,
        settings.model.token_parts.width,
        settings.projection_dim,
      )
    return {"side": side, "optimizer": tx.init(side)}

  return extra


def loss(
  settings: Settings, params, side: Mapping, state, batch, key, *, train: bool
) -> tuple[Any, tuple[Any, dict]]:
  """``(L, (model state, metrics))`` of a batch; labels are not read."""
  mask_key, model_key = jax.random.split(key)
  model, present = settings.model, batch["present"]
  tokens, state = model.encode(
    params, state, batch["inputs"], present, train=train, key=model_key
  )
  total, metrics = jnp.zeros(()), {}
  if settings.decoder is not None:
    targets = model.token_parts.patches(batch["inputs"], present)
    rebuilt = reconstruction.loss(
      model,
      params,
      settings.decoder,
      side["decoder"],
      tokens,
      targets,
      present,
      mask_key,
      masking=settings.masking,
      variance_floor=settings.variance_floor,
    )
    total = total + rebuilt
    metrics["reconstruction_loss"] = rebuilt
  if settings.contrastive_weight:
    scale = contrasts.scale(
      side["contrast"], settings.temperature, settings.max_scale
    )
    told = contrasts.loss(
      model, params, side["contrast"], tokens, present, scale
    )
    total = total + settings.contrastive_weight * told
    metrics["contrastive_loss"] = told
    metrics["scale"] = scale
  return total, (state, metrics)


def make_update(
  settings: Settings, tx: optax.GradientTransformation
) -> Callable:
  """One step of the model and of what serves it alone."""
  tx = optax.with_extra_args_support(tx)

  def update(state, batch, key):
    def loss_fn(params, side):
      return loss(
        settings, params, side, state.model_state, batch, key, train=True
      )

    side = state.extra["side"]
    grad_fn = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    (value, (model_state, metrics)), grads = grad_fn(state.params, side)
    moves, opt_state = tx.update(
      grads[0], state.opt_state, state.params, value=value
    )
    # Weight decay, too, leaves the head alone.
    params = optax.apply_updates(state.params, moves)
    head = {"last": state.params["fusion"]["last"]}
    params = {**params, "fusion": {**params["fusion"], **head}}
    moves, optimizer = tx.update(
      grads[1], state.extra["optimizer"], side, value=value
    )
    side = optax.apply_updates(side, moves)
    if "contrast" in side:
      clipped = contrasts.clip(
        side["contrast"], settings.temperature, settings.max_scale
      )
      side = {**side, "contrast": clipped}
    state = dataclasses.replace(
      state,
      params=params,
      model_state=model_state,
      opt_state=opt_state,
      extra={"side": side, "optimizer": optimizer},
    )
    norm = optax.tree.norm(grads)
    return state, {"loss": value, **metrics, "gradient_norm": norm}

  return update


def make_evaluate(settings: Settings) -> Callable:
  """``evaluate(state, batch) -> {"loss", ...}``: the same masks every time."""

  def evaluate(state, batch):
    # Rows that fill a batch up have no id: they are neither input nor target.
    counted = batch["id"] >= 0
    present = {name: flag & counted for name, flag in batch["present"].items()}
    key = jax.random.key(0)
    value, (_, metrics) = loss(
      settings,
      state.params,
      state.extra["side"],
      state.model_state,
      {**batch, "present": present},
      key,
      train=False,
    )
    return {"loss": value, **metrics}

  return evaluate
