r"""Margins of logits and of per-modality scores, hard and smooth, and radii.

With a reference class :math:`y`, a rival :math:`j` and modalities :math:`m`,

.. math:: M_j = z_y - z_j, \qquad
          |M_j(x + \delta) - M_j(x)| \le \sum_m S_{m,j}\,\epsilon_m,
          \qquad \epsilon_m = \|\delta_m\|,

so every radius is a minimum over **all** rivals of :math:`M_j` divided by some
combination of the sensitivities :math:`S_{m,j}`. The entry of the reference
class is ``+inf`` in margins and ratios and 0 in sensitivities, so that minima
and exponentials need no second mask.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from robust_mm import _extremes
from robust_mm import _validate
from robust_mm import modalities

FUSIONS = ("additive", "joint")  # see ``Geometry.fusion``
BALLS = ("l2", "linf", "l1")
_NUMBERS = {1: "l1", 2: "l2", math.inf: "linf", "inf": "linf"}


def norm_name(norm: Any, argument: str = "norm") -> str:
  """``"l1"``, ``"l2"`` or ``"linf"`` from a name, or from 1, 2 or infinity."""
  # True is no 1.
  if isinstance(norm, str | float | int) and not isinstance(norm, bool):
    norm = _NUMBERS.get(norm, norm)
  elif isinstance(norm, np.generic | np.ndarray | jax.Array):
    found = norm.item() if norm.size == 1 else None
    norm = _NUMBERS.get(found, str(norm))
  _validate.one_of(BALLS, **{argument: norm})
  return norm


def check_label(
  label, num_classes: int, shape: tuple[int, ...], *, argument: str = "label"
) -> None:
  """Class indices of ``shape`` in 0..k-1, or a ValueError naming ``argument``.

  Values are looked at only where they are known (not under jit).
  """
  if num_classes < 2:
    raise ValueError(f"logits need at least two classes, got {num_classes}.")
  if not hasattr(label, "dtype"):
    label = np.asarray(label)
  if label.shape != shape or not jnp.issubdtype(label.dtype, jnp.integer):
    raise ValueError(
      f"{argument} must be integer class indices of shape {shape}, got "
      f"{label.dtype}{list(label.shape)}."
    )
  if known_values(label) and label.size:
    # numpy: inside a trace, jnp would trace even a closed-over constant.
    values = np.asarray(label)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= num_classes:
      raise ValueError(
        f"{argument} must lie in 0..{num_classes - 1}, got {low}..{high}."
      )


def known_values(*arrays) -> bool:
  """Whether the values can be looked at now: no tracer, all of it here."""
  return not any(
    isinstance(array, jax.core.Tracer)
    or not getattr(array, "is_fully_addressable", True)
    for array in arrays
  )


def one_hot(label, num_classes: int) -> Bool[Array, "*b k"]:
  """True at the class ``label``."""
  return jax.nn.one_hot(label, num_classes, dtype=bool)


def pick(
  values: Float[Array, "*b k"], selected: Bool[Array, "*b k"]
) -> Float[Array, "*b 1"]:
  """The value at the one selected class; no gradient reaches the others."""
  chosen = jnp.where(selected, values, jnp.zeros_like(values))
  return jnp.sum(chosen, axis=-1, keepdims=True)


def pairwise(logits: Float[Array, "*b k"], reference) -> Float[Array, "*b k"]:
  r"""Margins :math:`M_j = z_y - z_j` to every class, ``+inf`` at ``reference``.

  Args:
    logits: ``[*b, k]`` with at least two classes.
    reference: int ``[*b]``, the label or the prediction.

  Returns:
    ``[*b, k]``; a correct prediction has all entries positive.

  Raises:
    ValueError: for fewer than two classes or a label that is none.

  >>> pairwise(jnp.array([1.0, 3.0, 2.0]), jnp.array(1)).tolist()
  [2.0, inf, 1.0]
  """
  num_classes = logits.shape[-1]
  check_label(reference, num_classes, logits.shape[:-1])
  selected = one_hot(reference, num_classes)
  return jnp.where(selected, jnp.inf, pick(logits, selected) - logits)


def of_scores(
  scores: Mapping[str, Float[Array, "*b k"]], reference
) -> dict[str, Float[Array, "*b k"]]:
  """``pairwise`` of every modality's scores alone."""
  return {name: pairwise(scores[name], reference) for name in scores}


def smallest(margins: Float[Array, "*b k"]) -> Float[Array, "*b"]:
  """The hard margin: the minimum over all rivals.

  Of equal ones the first has the gradient.
  """
  return _extremes.smallest(margins)


def smooth_smallest(
  margins: Float[Array, "*b k"], *, temperature: float | Array
) -> Float[Array, "*b"]:
  r"""A smooth lower bound of the smallest margin.

  .. math:: -T \log \sum_{j \ne y} e^{-M_j / T} \in
            [\min_j M_j - T \log(k - 1),\ \min_j M_j]

  Args:
    margins: ``[*b, k]``, ``+inf`` at the reference class.
    temperature: :math:`T > 0`; the hard minimum is the limit 0.
  """
  _validate.positive(temperature=temperature)
  return -temperature * jax.nn.logsumexp(-margins / temperature, axis=-1)


def norm(values: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
  """The l2 norm without overflow or underflow; gradient 0 at the zero vector.

  A square that underflows would call a sensitivity zero, hence a radius
  infinite.
  """
  scale = jax.lax.stop_gradient(jnp.max(jnp.abs(values), axis, keepdims=True))
  scale = jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1)
  total = jnp.sum(jnp.square(values / scale), axis=axis)
  positive = total > 0
  # The inner where keeps the infinite slope of the root out of the gradient.
  root = jnp.sqrt(jnp.where(positive, total, 1))
  # A NaN total is neither positive nor zero and must stay visible.
  root = jnp.where(positive, root, total)
  return root * jnp.squeeze(scale, axis)


def ratio(
  margin: Float[Array, "*b"], sensitivity: Float[Array, "*b"]
) -> Float[Array, "*b"]:
  r"""Margin over sensitivity, with edge cases and gradients that are safe.

  ==============  ==========================================================
  case            value
  ==============  ==========================================================
  S > 0, M >= 0   ``M / S``
  S > 0, M < 0    ``M / stop_gradient(S)``: a misclassified example must not
                  gain by inflating its own denominator
  S = 0, M > 0    ``+inf``, nothing can be attacked
  S = 0, M <= 0   ``M``, which still has a gradient towards a positive margin
  ==============  ==========================================================
  """
  zero = sensitivity == 0
  safe = jnp.where(zero, 1, sensitivity)
  safe = jnp.where(margin < 0, jax.lax.stop_gradient(safe), safe)
  unreachable = (zero & (margin > 0)) | jnp.isposinf(margin)
  # inf / S has gradient -inf * 0 = nan: it must not enter the division.
  finite = jnp.where(unreachable, 0, margin)
  return jnp.where(unreachable, jnp.inf, finite / safe)


def joint_sensitivity(
  sensitivity: Mapping[str, Float[Array, "*b k"]], *, ball: str = "l2"
) -> Float[Array, "*b k"]:
  r"""The denominator of a joint radius over all modalities.

  ``ball`` says how the sizes :math:`\epsilon_m` are bounded together, and the
  denominator is the dual norm over modalities:

  - ``"l2"``: :math:`\sum_m \epsilon_m^2 \le r^2`, root of the sum of squares;
  - ``"linf"``: every :math:`\epsilon_m \le r`, sum;
  - ``"l1"``: :math:`\sum_m \epsilon_m \le r`, maximum.
  """
  _validate.one_of(BALLS, ball=ball)
  return _dual(modalities.stack(sensitivity, axis=-1), ball)


def _dual(stacked, ball):
  if ball == "l2":
    return norm(stacked)
  if ball == "linf":
    return jnp.sum(stacked, axis=-1)
  return _extremes.largest(stacked)


def joint_ratios(
  margins: Float[Array, "*b k"],
  sensitivity: Mapping[str, Float[Array, "*b k"]],
  caps: Mapping[str, Float[Array, "*b k"]] | None = None,
  *,
  ball: str = "l2",
) -> Float[Array, "*b k"]:
  """Per rival, the joint radius below which it cannot win.

  With ``caps`` ``{m: [*b, k]}``, the most that a modality can take from the
  margins (none where a modality is not named), see ``capped_joint_ratios``.
  """
  if caps:
    return capped_joint_ratios(margins, sensitivity, caps, ball=ball)
  return ratio(margins, joint_sensitivity(sensitivity, ball=ball))


def capped_ratio(
  margin: Float[Array, "*b"],
  sensitivity: Float[Array, "*b"],
  cap: Float[Array, "*b"] | None,
) -> Float[Array, "*b"]:
  r"""The smallest :math:`\epsilon` with :math:`\min(S \epsilon, D) \ge M`.

  ``ratio``, and ``+inf`` where the cap D is below the margin; None for no cap.
  """
  uncapped = ratio(margin, sensitivity)
  return uncapped if cap is None else jnp.where(cap < margin, jnp.inf, uncapped)


def capped_joint_ratios(
  margins: Float[Array, "*b k"],
  sensitivity: Mapping[str, Float[Array, "*b k"]],
  caps: Mapping[str, Float[Array, "*b k"]],
  *,
  ball: str = "l2",
) -> Float[Array, "*b k"]:
  r"""``joint_ratios`` where a modality can cost a margin no more than its cap.

  .. math:: \min \Bigl\{\|\epsilon\| :
            \sum_m \min(S_m \epsilon_m, D_m) \ge M\Bigr\}

  With the costs :math:`t_m = S_m \epsilon_m \le D_m` as unknowns this is
  convex, and solved exactly: costs grow together, :math:`t_m = \min(D_m,
  \lambda S_m^q)`, and a modality whose level :math:`\lambda_i = D_i / S_i^q` is
  passed before the costs reach M spends its whole cap. q is 2 for the l2 ball,
  1 for linf and infinite for l1 (the largest S first). ``+inf`` where all caps
  together stay below the margin.

  Args:
    margins: ``[*b, k]``.
    sensitivity: ``{m: [*b, k]}``.
    caps: ``{m: [*b, k]}``, non-negative; a modality not named has none.
    ball: as in ``joint_sensitivity``.
  """
  _validate.one_of(BALLS, ball=ball)
  slope = modalities.stack(sensitivity, axis=-1)
  no_cap = jnp.full_like(margins, jnp.inf)
  cap = modalities.stack(
    {name: caps.get(name, no_cap) for name in sensitivity}, axis=-1
  )
  inert = slope == 0
  cap = jnp.where(inert, 0, cap)
  safe = jnp.where(inert, 1, slope)
  margin = margins[..., None]
  spent = jnp.sum(_costs_at_levels(slope, safe, cap, ball), axis=-1) < margin
  alone = jnp.where(spent, cap, 0)
  rest = ratio(
    margins - jnp.sum(alone, axis=-1),
    _dual(jnp.where(spent, 0, slope), ball),
  )
  if ball == "linf":
    # Spent caps needed less than what the others need.
    return rest
  sizes = jnp.concatenate([alone / safe, rest[..., None]], axis=-1)
  total = norm(sizes) if ball == "l2" else jnp.sum(sizes, axis=-1)
  # Nothing spent, a margin below 0 included: the plain ratio.
  return jnp.where(jnp.any(spent & ~inert, axis=-1), total, rest)


def _costs_at_levels(slope, safe, cap, ball):
  """Cost of m at the level where i has spent its cap: ``[*b, k, i, m]``."""
  other, own = slope[..., None, :], safe[..., :, None]
  # x / x need not be 1 in compiled arithmetic, and here it must be.
  share = jnp.where(other == own, 1, other / own)
  if ball == "l1":
    share = jnp.where(other > own, jnp.inf, jnp.where(other < own, 0, share))
  elif ball == "l2":
    share = jnp.square(share)
  level = cap[..., :, None]
  # inf * 0: nothing is spent on what costs nothing, or at level zero.
  cost = jnp.where((share == 0) | (level == 0), 0, level * share)
  return jnp.minimum(cost, cap[..., None, :])


def modality_ratios(
  margins: Float[Array, "*b k"],
  sensitivity: Mapping[str, Array],
  caps: Mapping[str, Array] | None = None,
) -> dict[str, Float[Array, "*b k"]]:
  """Per modality and rival, the radius when only that modality is attacked.

  ``caps`` as in ``capped_joint_ratios``.
  """
  caps = caps or {}
  return {
    name: capped_ratio(margins, sensitivity[name], caps.get(name))
    for name in sensitivity
  }


def budget_ratios(
  margins: Float[Array, "*b k"],
  sensitivity: Mapping[str, Float[Array, "*b k"]],
  budgets: Mapping[str, float | Array],
) -> Float[Array, "*b k"]:
  r"""Per rival, the factor by which all ``budgets`` could grow together.

  .. math:: M_j / \sum_m S_{m,j} \epsilon_m

  The budgets are certified where every entry exceeds 1. A modality that is not
  named has budget 0.
  """
  check_budgets(sensitivity, budgets)
  cost = {name: sensitivity[name] * budgets[name] for name in budgets}
  return ratio(margins, joint_sensitivity(cost, ball="linf"))


def check_budgets(sensitivity: Mapping, budgets: Mapping) -> None:
  """ValueError for budgets of nothing, or of an unknown modality."""
  _validate.known(modalities.names(sensitivity), budgets=budgets)
  if not budgets:
    raise ValueError("budgets must name at least one modality.")


def radii(ratios: Float[Array, "*b k"]) -> Float[Array, "*b"]:
  """The certified radius: minimum over all rivals, 0 where one already wins."""
  return jnp.maximum(_extremes.smallest(ratios), 0)


def shortfall(
  ratios: Float[Array, "*b n"],
  *,
  target: float | Array,
  temperature: float | Array,
) -> Float[Array, "*b"]:
  r"""How much the ratios fall short of ``target``, smoothly and all together.

  .. math:: T \log\Bigl(1 + \sum_j e^{(r_0 - \rho_j) / T}\Bigr)

  Non-negative, zero in the limit of large ratios, and
  :math:`\max(0, r_0 - \min_j \rho_j)` in the limit :math:`T \to 0`. Infinite
  ratios (masked entries) take no part.

  Args:
    ratios: ``[*b, n]``; entries of ``+inf`` are left out.
    target: :math:`r_0`.
    temperature: :math:`T > 0`.
  """
  _validate.positive(temperature=temperature)
  excess = (target - ratios) / temperature
  # The 1 joins as a zero inside: finite even where everything is masked.
  zero = jnp.zeros_like(excess[..., :1])
  joined = jnp.concatenate([zero, excess], axis=-1)
  return temperature * jax.nn.logsumexp(joined, axis=-1)


def hard_shortfall(
  ratios: Float[Array, "*b n"], *, target: float | Array
) -> Float[Array, "*b"]:
  """``max(0, target - min_j ratio_j)``, the limit of ``shortfall``."""
  return jnp.maximum(target - _extremes.smallest(ratios), 0)
