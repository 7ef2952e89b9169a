r"""Margins of each modality, certified radii, contrasts: means over examples.

Means are over the examples that have at least one modality present (where
``present`` is given); a batch with none has loss 0 and gradient 0. Everything
is a masked log-sum-exp: no ratio of exponentials, which loses its gradient from
a margin of 17 on and is NaN from 89.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from robust_mm import _validate
from robust_mm import margins
from robust_mm import modalities

PUBLISHED_FLOOR = 1e-5


def offset_cross_entropy(
  logits: Float[Array, "*b k"],
  label,
  *,
  offset: float,
  temperature: float = 0.25,
  present: Mapping | None = None,
) -> Float[Array, ""]:
  r"""Cross-entropy that asks for a logit margin of ``offset``.

  .. math:: T\, \mathrm{CE}\bigl((z - u\, e_y) / T\bigr)
            = T \log\bigl(1 + \textstyle\sum_j e^{(u - M_j) / T}\bigr)

  It depends on the scale of the logits: use it with heads whose scale is
  fixed. Published settings are :math:`T = 1/4` with :math:`u = \sqrt 2` (AOL)
  or :math:`1.5 \sqrt 2` (SLL).

  References:
    `Prach & Lampert (2022) <https://arxiv.org/abs/2208.03160>`_.
  """
  _validate.non_negative(offset=offset)
  loss = margins.shortfall(
    margins.pairwise(logits, label), target=offset, temperature=temperature
  )
  return _mean(loss, _anything(present, loss.shape))


def certified_radius(
  logits: Float[Array, "*b k"],
  sensitivity: Mapping[str, Array],
  label,
  *,
  r0: float | Array,
  temperature: float | Array,
  budgets: Mapping[str, float | Array] | None = None,
  present: Mapping | None = None,
  fusion: str = "additive",
) -> Float[Array, ""]:
  r"""Trains for a certified radius of at least ``r0`` around the label.

  .. math:: L = \frac1b \sum_b T \log\Bigl(1 + \sum_{j \ne y}
            e^{(r_0 - \rho_j) / T}\Bigr), \qquad
            \rho_j = \frac{M_j}{\sqrt{\sum_m S_{m,j}^2}}

  - Free of the scale of the head: for correct examples the gradient with
    respect to a common factor of all integration weights is 0.
  - A misclassified example gains nothing by a larger denominator.
  - Bounded below by 0; a radius beyond ``r0`` by a few ``temperature`` is done.

  Args:
    logits: ``[*b, k]``.
    sensitivity: ``{m: [*b, k]}`` **for the label as reference class**, zero
      where a modality is absent: ``certification.sensitivity``.
    label: int ``[*b]``.
    r0: the target radius in the units of the sensitivities, or with
      ``budgets`` the factor by which they are to be covered (1).
    temperature: :math:`T > 0` in the same units; ``r0 / 6`` is a good start.
    budgets: ``{m: eps}``; then :math:`\rho_j = M_j / \sum_m S_{m,j}
      \epsilon_m`.
    present: ``{m: bool[*b]}``; where given, examples with nothing present are
      not counted.
    fusion: "joint" behind a Lipschitz trunk: the denominators are then
      :math:`\max_m S_{m,j}` and :math:`\sqrt{\sum_m (S_{m,j} \epsilon_m)^2}`.

  Returns:
    The mean over examples, a scalar.
  """
  _validate.non_negative(r0=r0)
  _validate.positive(temperature=temperature)
  ratios = _radius_ratios(logits, sensitivity, label, budgets, fusion)
  loss = margins.shortfall(ratios, target=r0, temperature=temperature)
  return _mean(loss, _anything(present, loss.shape))


def hinge_radius(
  logits: Float[Array, "*b k"],
  sensitivity: Mapping[str, Array],
  label,
  *,
  r0: float | Array,
  budgets: Mapping[str, float | Array] | None = None,
  present: Mapping | None = None,
  fusion: str = "additive",
) -> Float[Array, ""]:
  r"""Mean of :math:`\max(0, r_0 - \min_j \rho_j)`.

  The limit of ``certified_radius`` for temperature 0; same arguments.
  """
  _validate.non_negative(r0=r0)
  ratios = _radius_ratios(logits, sensitivity, label, budgets, fusion)
  loss = margins.hard_shortfall(ratios, target=r0)
  return _mean(loss, _anything(present, loss.shape))


def unimodal_margin(
  scores: Mapping[str, Array],
  label,
  present: Mapping[str, Array],
  *,
  floor: float | None = PUBLISHED_FLOOR,
) -> Float[Array, ""]:
  r"""Enlarges every modality's own margin, the smallest first.

  .. math:: L_1 = \frac1b \sum_b \log\Bigl(\text{floor} +
            \sum_{m\ \text{present}} \sum_{j \ne y} e^{s_m[j] - s_m[y]}\Bigr)

  The share of the gradient that a modality gets is its share of the sum: the
  modality with the smaller margin takes nearly all of it. Between
  :math:`-\min M` and :math:`-\min M + \log(\#m\,(k-1))` without a floor.

  Args:
    scores: ``{m: [*b, k]}`` raw scores, without integration factors or bias.
    label: int ``[*b]``.
    present: ``{m: bool[*b]}``.
    floor: stops the growth of margins near :math:`-\log(\text{floor})`; None
      for the unbounded form.

  References:
    `Yang et al. (2024) <https://arxiv.org/abs/2402.06244>`_.
  """
  margin = margins.of_scores(scores, label)
  stacked = _stack_masked(margin, present)
  return _floored_mean(-stacked, _anything(present, stacked.shape[:-1]), floor)


def unimodal_radius(
  scores: Mapping[str, Array],
  label,
  present: Mapping[str, Array],
  lipschitz: Mapping[str, float | Array | None],
  *,
  r0: float | Array,
  temperature: float | Array,
) -> Float[Array, ""]:
  r"""Asks every present modality alone for a radius of ``r0``.

  .. math:: \frac1b \sum_b T \log\Bigl(1 + \sum_{m, j \ne y}
            e^{(r_0 - \rho_{m,j}) / T}\Bigr), \qquad
            \rho_{m,j} = \frac{s_m[y] - s_m[j]}{\sqrt 2\, L_m}

  Args:
    scores: ``{m: [*b, k]}`` raw scores of an orthonormal head.
    label: int ``[*b]``.
    present: ``{m: bool[*b]}``.
    lipschitz: ``{m: scalar}`` constants of the encoders, multiplied by the
      units of the modalities where there are units.
    r0: target radius.
    temperature: :math:`T > 0`.

  Raises:
    ValueError: naming ``lipschitz`` where a modality states no constant.
  """
  _validate.non_negative(r0=r0)
  _validate.positive(temperature=temperature)
  ratios = {}
  for name, margin in margins.of_scores(scores, label).items():
    bound = lipschitz.get(name)
    if bound is None:
      raise ValueError(
        f"lipschitz has no constant for modality {name!r}: build its encoder "
        'from robust_mm.models.lipschitz, or use fidelity="published" '
        "(unimodal_margin)."
      )
    _validate.positive(lipschitz=bound)
    scale = jnp.asarray(bound, margin.dtype) * math.sqrt(2.0)
    ratios[name] = margins.ratio(margin, jnp.full_like(margin, 1) * scale)
  stacked = _stack_masked(ratios, present)
  loss = margins.shortfall(stacked, target=r0, temperature=temperature)
  return _mean(loss, _anything(present, loss.shape))


def mixup_margin(
  scores: Mapping[str, Array],
  label,
  other_label,
  mix: float | Array,
  present: Mapping[str, Array],
  *,
  floor: float | None = PUBLISHED_FLOOR,
) -> Float[Array, ""]:
  r"""``unimodal_margin`` for inputs mixed from two examples.

  .. math:: \frac1b \sum_b \log\Bigl(\text{floor} + \sum_m
            \frac{\sum_{j \notin \{y, y'\}} e^{s_m[j]}}
            {e^{\lambda s_m[y] + (1 - \lambda) s_m[y']}}\Bigr)

  Equals ``unimodal_margin`` where the labels agree. An example without a rival
  (two classes, different labels) is not counted.

  Args:
    scores: ``{m: [*b, k]}`` of the mixed inputs.
    label: int ``[*b]``, the class with weight ``mix``.
    other_label: int ``[*b]``, the class with weight ``1 - mix``.
    mix: :math:`\lambda` in [0, 1], scalar or ``[*b]``.
    present: ``{m: bool[*b]}``: present in **both** mixed examples.
    floor: as in ``unimodal_margin``.
  """
  _validate.in_unit_interval(**({} if jnp.ndim(mix) else {"mix": mix}))
  negative, rivals = {}, None
  for name, score in scores.items():
    num_classes, shape = score.shape[-1], score.shape[:-1]
    margins.check_label(label, num_classes, shape)
    margins.check_label(other_label, num_classes, shape, argument="other_label")
    first = margins.one_hot(label, num_classes)
    second = margins.one_hot(other_label, num_classes)
    rivals = ~(first | second)
    weight = jnp.broadcast_to(jnp.asarray(mix, score.dtype), shape)[..., None]
    own = weight * margins.pick(score, first)
    own = own + (1 - weight) * margins.pick(score, second)
    negative[name] = jnp.where(rivals, own - score, jnp.inf)
  stacked = _stack_masked(negative, present)
  counted = _anything(present, stacked.shape[:-1]) & jnp.any(rivals, axis=-1)
  return _floored_mean(-stacked, counted, floor)


def info_nce(
  first: Float[Array, "b c"],
  second: Float[Array, "b c"],
  *,
  scale: float | Array,
  present: Array | None = None,
) -> Float[Array, ""]:
  r"""Symmetric InfoNCE: which row of one matrix belongs to which of the other.

  .. math:: L = \tfrac12 \bigl(CE(s\, Z Z'^T, diag) + CE(s\, Z' Z^T,
            diag)\bigr)

  - Rows that are not complete leave the numerators *and* the denominators: the
    loss is that of the batch without them.
  - Identical rows have the loss :math:`\log n`, n the number of complete ones.
  - Fewer than two complete rows: 0, with gradient 0.

  Args:
    first: ``[b, c]``, rows of length 1.
    second: ``[b, c]``, likewise.
    scale: s, the inverse temperature.
    present: ``bool[b]``, rows that have both; all by default. What the others
      hold, NaN included, is not looked at.

  References:
    `Radford et al. (2021) <https://arxiv.org/abs/2103.00020>`_.
  """
  _validate.positive(scale=scale)
  if first.shape != second.shape:
    raise ValueError(
      f"second must have the shape of first {first.shape}, got {second.shape}."
    )
  if present is None:
    present = jnp.ones(first.shape[0], bool)
  here = present[:, None]
  first, second = (
    jnp.where(here, z, jnp.zeros_like(z)) for z in (first, second)
  )
  logits = scale * jnp.einsum("ic,jc->ij", first, second, precision="highest")
  own = jnp.diagonal(logits)
  # Finite: a row that has nothing to compare with is not NaN but left out.
  lowest = jnp.finfo(logits.dtype).min
  total = jnp.zeros_like(own)
  for compared in (logits, logits.T):
    among = jnp.where(present[None], compared, lowest)
    total = total + jax.nn.logsumexp(among, axis=-1) - own
  enough = jnp.sum(present) >= 2
  return jnp.where(enough, _mean(0.5 * total, present), 0)


def _radius_ratios(logits, sensitivity, label, budgets, fusion):
  _validate.one_of(margins.FUSIONS, fusion=fusion)
  margin = margins.pairwise(logits, label)
  if fusion == "joint":
    if budgets is None:
      return margins.joint_ratios(margin, sensitivity, ball="l1")
    margins.check_budgets(sensitivity, budgets)
    weighted = {m: sensitivity[m] * budgets[m] for m in budgets}
    return margins.joint_ratios(margin, weighted)
  if budgets is None:
    return margins.joint_ratios(margin, sensitivity)
  return margins.budget_ratios(margin, sensitivity, budgets)


def _stack_masked(values: Mapping[str, Array], present: Mapping) -> Array:
  """``[*b, m * k]``, +inf where the modality is absent."""
  masked = {
    name: jnp.where(jnp.asarray(present[name])[..., None], value, jnp.inf)
    for name, value in values.items()
  }
  ordered = [masked[name] for name in modalities.names(masked)]
  return jnp.concatenate(ordered, axis=-1)


def _floored_mean(exponents: Array, counted: Array, floor: float | None):
  if floor is None:
    # Rows without any finite entry have no gradient: keep them out of it.
    safe = jnp.where(counted[..., None], exponents, 0)
    return _mean(jax.nn.logsumexp(safe, axis=-1), counted)
  _validate.positive(floor=floor)
  lowest = jnp.full_like(exponents[..., :1], math.log(floor))
  joined = jnp.concatenate([lowest, exponents], axis=-1)
  return _mean(jax.nn.logsumexp(joined, axis=-1), counted)


def _anything(present: Mapping | None, shape: tuple[int, ...]) -> Array:
  if present is None:
    return jnp.ones(shape, bool)
  stacked = modalities.stack(
    {name: jnp.asarray(value) for name, value in present.items()}, axis=-1
  )
  return jnp.any(stacked, axis=-1)


def _mean(values: Array, counted: Array) -> Array:
  total = jnp.sum(jnp.where(counted, values, 0))
  return total / jnp.maximum(jnp.sum(counted), 1).astype(values.dtype)
