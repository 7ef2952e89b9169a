r"""Step 2 of CRMT: re-weighting modalities for a threat, encoders frozen.

Only the integration factors move, on cached scores: seconds on a CPU. What it
is for is a *changed* threat (one sensor more exposed, other units) without
retraining.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from robust_mm import _validate
from robust_mm import margins
from robust_mm import modalities
from robust_mm.certification import arrays
from robust_mm.certification import geometries
from robust_mm.certification import optimizers
from robust_mm.certification import tables

Factors = Mapping[str, Array]


def integration_factors(
  alpha: Float[Array, "m k"],
  scale: float | Array,
  *,
  fidelity: str = "corrected",
) -> Float[Array, "m k"]:
  r"""Factors from free parameters.

  Corrected: :math:`a = c\, k\, m\, \mathrm{softmax}(\alpha)` over all
  modalities and classes together, so the mean of a is ``scale`` whatever alpha
  is.
  Published: :math:`a = \mathrm{softplus}(\alpha)`.
  """
  _validate.one_of(arrays.FIDELITIES, fidelity=fidelity)
  if fidelity == "published":
    return jax.nn.softplus(alpha)
  return scale * alpha.size * jax.nn.softmax(alpha, axis=(0, 1))


def integration_parameters(
  factors: Float[Array, "m k"], *, fidelity: str = "corrected"
) -> tuple[Float[Array, "m k"], Float[Array, ""]]:
  """``(alpha, scale)`` whose ``integration_factors`` are ``factors``."""
  _validate.one_of(arrays.FIDELITIES, fidelity=fidelity)
  scale = jnp.mean(factors)
  # A factor of 0 has no finite parameter.
  safe = jnp.maximum(factors, 1e-6 * scale)
  if fidelity == "published":
    return optimizers.inverse_softplus(safe), scale
  return jnp.log(safe), scale


def integration_loss(
  factors: Factors,
  scores: Factors,
  label,
  present: Mapping[str, Any],
  lipschitz: Mapping[str, Any],
  *,
  r0: float | Array,
  temperature: float | Array,
  bias: Any = None,
  units: Mapping[str, Any] | None = None,
  fidelity: str = "corrected",
  reduction: str = "sum",
) -> Float[Array, ""]:
  r"""What step 2 minimises.

  Corrected, over all rivals and with the tight denominator:

  .. math:: \frac1b \sum_b T \log\Bigl(1 + \sum_{j \ne y}
            e^{(r_0 - \rho_j) / T}\Bigr), \qquad \rho_j =
            \frac{M_j}{\sqrt{\sum_m s_m^2 L_m^2 (a_m[y]^2 + a_m[j]^2)}}

  Published: minus the mean of :math:`M_j / \sqrt{\sum_m (a_m[y] \tau_{m,y} +
  a_m[j] \tau_{m,j})^2}` at the largest other logit j only, ``r0`` and
  ``temperature`` unused. Run to convergence it ruins clean accuracy.

  Args:
    factors: ``{m: [k]}`` integration factors, non-negative: those of a model's
      own parameters, or of ``integration_factors``.
    scores: ``{m: [b, k]}`` raw scores in evaluation mode.
    label: int ``[b]``.
    present: ``{m: bool[b]}``.
    lipschitz: ``{m: scalar}``; published also ``{m: [k]}``.
    r0: target radius.
    temperature: :math:`T > 0`.
    bias: ``[k]`` of the head, default 0.
    units: ``{m: s_m}``, default 1.
    fidelity: ``"corrected"`` or ``"published"``.
    reduction: ``"mean"`` for a head that averages over present modalities.

  Returns:
    a scalar; examples with nothing present are not counted.
  """
  _validate.one_of(arrays.FIDELITIES, fidelity=fidelity)
  margin, sensitivity, _ = _reweighted(
    factors, scores, label, present, lipschitz, bias, units, fidelity, reduction
  )
  counted = _anything(present)
  if fidelity == "corrected":
    ratios = margins.joint_ratios(margin, sensitivity)
    loss = margins.shortfall(ratios, target=r0, temperature=temperature)
  else:
    # The published form rewards a larger denominator of misclassified
    # examples, so the division here has no stop_gradient.
    total = margins.joint_sensitivity(sensitivity)
    nearest = margins.one_hot(jnp.argmin(margin, axis=-1), margin.shape[-1])
    rival = margins.pick(margin, nearest) / margins.pick(
      jnp.where(total > 0, total, 1), nearest
    )
    loss = -jnp.squeeze(rival, -1)
  total = jnp.sum(jnp.where(counted, loss, 0))
  return total / jnp.maximum(jnp.sum(counted), 1).astype(total.dtype)


def accept_integration(
  old: Factors,
  new: Factors,
  scores: Factors,
  label,
  present: Mapping[str, Any],
  lipschitz: Mapping[str, Any],
  *,
  r0: float | Array,
  bias: Any = None,
  units: Mapping[str, Any] | None = None,
  max_drop: float = 0.01,
  fidelity: str = "corrected",
  reduction: str = "sum",
) -> tuple[Bool[Array, ""], dict[str, Array]]:
  """Whether new factors are worth having, on validation scores.

  Corrected: certified accuracy at ``r0`` rises and clean accuracy falls by at
  most ``max_drop``. Published: clean accuracy does not fall.

  Args:
    old: ``{m: [k]}`` factors in use.
    new: ``{m: [k]}`` candidate.
    scores: ``{m: [b, k]}`` of validation data; the rest as in
      ``integration_loss``.
    label: int ``[b]``.
    present: ``{m: bool[b]}``.
    lipschitz: ``{m: scalar}``.
    r0: radius at which certified accuracy is compared.
    bias: ``[k]``.
    units: ``{m: s_m}``.
    max_drop: the clean accuracy that may be lost.
    fidelity: see above.
    reduction: as in ``integration_loss``.

  Returns:
    ``(accepted, metrics)``: bool [] and the four accuracies before and after.
  """
  _validate.non_negative(max_drop=max_drop, r0=r0)
  metrics, right = {}, {}
  counted = _anything(present)
  number = jnp.maximum(jnp.sum(counted), 1)
  for when, factors in (("before", old), ("after", new)):
    margin, sensitivity, correct = _reweighted(
      factors,
      scores,
      label,
      present,
      lipschitz,
      bias,
      units,
      fidelity,
      reduction,
    )
    radius = margins.radii(margins.joint_ratios(margin, sensitivity))
    certified = correct & (radius > r0)
    right[when] = jnp.sum(correct & counted)
    metrics[f"accuracy_{when}"] = right[when] / number
    metrics[f"certified_accuracy_{when}"] = (
      jnp.sum(certified & counted) / number
    )
  if fidelity == "published":
    accepted = right["after"] >= right["before"]
  else:
    # Examples are counted: 0.01 of 100 must not be lost to rounding, and 0.01
    # of 160 is one, not two.
    allowed = max_drop * number + 1e-3
    accepted = (right["before"] - right["after"] <= allowed) & (
      metrics["certified_accuracy_after"] > metrics["certified_accuracy_before"]
    )
  return accepted, metrics


def fit_integration(
  scores: Factors,
  label,
  present: Mapping[str, Any],
  lipschitz: Mapping[str, Any],
  integration: Factors,
  *,
  r0: float,
  temperature: float,
  num_steps: int = 500,
  validation: tuple | None = None,
  learning_rate: float = 1e-2,
  fidelity: str = "corrected",
  units: Mapping[str, Any] | None = None,
  bias: Any = None,
  optimizer: optax.GradientTransformation | None = None,
  reduction: str = "sum",
) -> tuple[dict[str, Array], Bool[Array, ""], dict[str, Any]]:
  r"""Fits the integration factors to a threat on cached scores.

  What ``recipes.crmt`` does in its second phase, with the same
  ``integration_loss``, ``integration_optimizer`` and ``accept_integration``, in
  one call.

  Full-batch Adam from the current factors; the iterate with the smallest loss
  is the candidate, so the objective never ends above its start. Their mean is
  kept (corrected): the scale of the logits stays, only the direction moves.

  Args:
    scores: ``{m: [b, k]}`` raw scores of the training set, evaluation mode.
    label: int ``[b]``.
    present: ``{m: bool[b]}``.
    lipschitz: ``{m: scalar}`` constants of the intended threat model; published
      also ``{m: [k]}`` estimates. Never a function of the factors.
    integration: ``{m: [k]}`` current factors, non-negative.
    r0: target radius, in the units.
    temperature: :math:`T > 0`.
    num_steps: optimiser steps.
    validation: ``(scores, label, present)`` for ``accept_integration``; the
      training scores where None.
    learning_rate: of Adam.
    fidelity: ``"corrected"`` or ``"published"`` (objective and softplus
      factors).
    units: ``{m: s_m}``, default 1.
    bias: ``[k]`` of the head, fixed.
    optimizer: instead of Adam, e.g. ``published_optimizer()``.
    reduction: as in ``integration_loss``.

  Returns:
    ``(integration, accepted, history)``: the candidate where accepted, else
    the factors that came in; bool []; and ``{"loss": [num_steps], "candidate":
    {m: [k]}, "accuracy_before": [], ...}``.

  Raises:
    ValueError: naming ``lipschitz`` where a constant is missing, not positive
      or not finite.
  """
  _validate.one_of(arrays.FIDELITIES, fidelity=fidelity)
  _validate.at_least(1, num_steps=num_steps)
  _validate.non_negative(r0=r0)
  _validate.positive(temperature=temperature, learning_rate=learning_rate)
  known = modalities.names(scores)
  for name, given in (("integration", integration), ("present", present)):
    if modalities.names(given) != known:
      raise ValueError(f"{name} must name the modalities {', '.join(known)}.")
  units = tables.check_units(units, known)
  lipschitz = _check_lipschitz(lipschitz, known, fidelity)
  stacked = modalities.stack(integration)
  known_values = margins.known_values(stacked)
  if known_values and not np.all(np.asarray(stacked) >= 0):
    raise ValueError("integration must be non-negative.")
  optimizer = optimizer or _adam(float(learning_rate))
  data = (scores, label, present, lipschitz)
  options = {"r0": r0, "temperature": temperature, "bias": bias, "units": units}
  candidate, losses = _fit(
    stacked, data, options, optimizer, num_steps, fidelity, reduction
  )
  candidate = _named(candidate, scores)
  validation = (scores, label, present) if validation is None else validation
  accepted, metrics = accept_integration(
    integration,
    candidate,
    *validation,
    lipschitz,
    r0=r0,
    bias=bias,
    units=units,
    fidelity=fidelity,
    reduction=reduction,
  )
  chosen = {
    name: jnp.where(accepted, candidate[name], integration[name])
    for name in known
  }
  return chosen, accepted, {"loss": losses, "candidate": candidate, **metrics}


@functools.lru_cache(maxsize=16)
def _adam(learning_rate: float) -> optax.GradientTransformation:
  # One object per rate, so that a second fit compiles nothing.
  return optax.adam(learning_rate)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _fit(stacked, data, options, optimizer, num_steps, fidelity, reduction):
  """``(factors [m, k], losses [num_steps])``; scores enter as arguments."""
  start, scale = integration_parameters(stacked, fidelity=fidelity)

  def loss_fn(alpha):
    factors = integration_factors(alpha, scale, fidelity=fidelity)
    factors = _named(factors, data[0])
    return integration_loss(
      factors, *data, fidelity=fidelity, reduction=reduction, **options
    )

  # One more, that goes back to the best.
  number = num_steps + 1
  tx = optimizers.integration_optimizer(optimizer, num_steps=number)

  def step(carry, _):
    alpha, state = carry
    loss, gradient = jax.value_and_grad(loss_fn)(alpha)
    updates, state = tx.update(gradient, state, alpha, value=loss)
    return (optax.apply_updates(alpha, updates), state), loss

  carry = (start, tx.init(start))
  (best, _), losses = jax.lax.scan(step, carry, length=number)
  return integration_factors(best, scale, fidelity=fidelity), losses[:-1]


def _reweighted(
  factors, scores, label, present, lipschitz, bias, units, fidelity, reduction
):
  """Margins and sensitivities of the label, and whether it is predicted."""
  _validate.one_of(geometries.REDUCTIONS, reduction=reduction)
  known = modalities.names(scores)
  units = tables.check_units(units, known)
  logits, sensitivity = 0, {}
  for name in known:
    here = jnp.asarray(present[name])[..., None]
    score = jnp.where(here, scores[name], 0)
    weight = jnp.broadcast_to(factors[name], score.shape)
    logits = logits + weight * score
    constant = jnp.asarray(lipschitz[name], score.dtype) * units[name]
    if fidelity == "published":
      term = jnp.broadcast_to(factors[name] * constant, score.shape)
      selected = margins.one_hot(label, score.shape[-1])
      rows = margins.pick(term, selected) + term
      sensitivity[name] = jnp.where(here & ~selected, rows, 0)
    else:
      rows = tables.closed_rows(factors[name], label, present[name])
      sensitivity[name] = rows * constant
  if reduction == "mean":
    here = {name: present[name] for name in known}
    logits = tables.averaged({"logits": logits}, here)["logits"]
    sensitivity = tables.averaged(sensitivity, here)
  if bias is not None:
    logits = logits + jnp.broadcast_to(jnp.asarray(bias), logits.shape)
  margin = margins.pairwise(logits, label)
  return margin, sensitivity, jnp.argmax(logits, axis=-1) == label


def _named(stacked, like):
  return {
    name: stacked[index] for index, name in enumerate(modalities.names(like))
  }


def _anything(present):
  here = {name: jnp.asarray(value) for name, value in present.items()}
  return jnp.any(modalities.stack(here, axis=-1), axis=-1)


def _check_lipschitz(lipschitz, known, fidelity):
  for name in known:
    bound = lipschitz.get(name)
    if bound is None:
      raise ValueError(f"lipschitz has no constant for modality {name!r}.")
    if jnp.ndim(bound) and fidelity == "corrected":
      raise ValueError(f"lipschitz[{name!r}] must be one number.")
    if margins.known_values(bound):
      value = np.asarray(bound)
      if not np.all(np.isfinite(value) & (value > 0)):
        raise ValueError(
          f"lipschitz[{name!r}] must be positive and finite, got {bound}."
        )
  return {name: lipschitz[name] for name in known}
