"""The certificate as a value: what it says, and what can be asked of it."""

import dataclasses
import functools
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from robust_mm import _validate
from robust_mm import margins
from robust_mm import modalities
from robust_mm.certification import balls as balls_lib


class Slack(NamedTuple):
  """Safety margins for floating point, static.

  Margins are lowered by the larger of ``margin`` and ``rounding``.

  Attributes:
    margin: machine epsilons of the largest ``sum_m |c_m| + |bias|`` of the
      example.
    sensitivity: sensitivities are raised by this relative amount.
    rounding: machine epsilons of ``sum_m max_k |V_m[k]| (|phi_m| + L_m
      |x_m|)``, for certified models. Measured: 0.5 with offsets up to 1e6 in
      4 layers. Large biases inside an encoder that cancel one another, not
      the input, are beyond it; ``recheck_fp64`` finds them.
  """

  margin: float = 64.0
  sensitivity: float = 1e-5
  rounding: float = 8.0


DEFAULT_SLACK = Slack()
NO_SLACK = Slack(margin=0.0, sensitivity=0.0, rounding=0.0)
MAX_AVERAGED = 6  # modalities whose 2^m subsets a mean tries one by one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Certificate:
  r"""How far every example may move before its prediction can change.

  Sizes are :math:`\epsilon_m = \|\delta_m\| / s_m` with the units
  :math:`s_m`; balls are open; ties have radius 0.

  Formal guarantees:
    - Sound (``sound=True``): for every perturbation of the present inputs
      with :math:`\sum_m \epsilon_m^2 < radius^2` the predicted class stays
      ``prediction``; likewise for ``modality_radius`` (one modality alone) and
      ``covers``.
    - With ``sound=False`` all numbers are estimates and guarantee nothing;
      ``kind`` says "estimated".

  Attributes:
    prediction: int ``[b]``.
    radius: ``[b]``, all modalities together in one l2 ball. ``+inf`` where
      nothing can be attacked, or too little (``drops``); 0 for ties and for
      non-finite values.
    modality_radius: ``{m: [b]}``, that modality alone; ``+inf`` where it may be
      replaced by anything.
    margins: ``[b, k]`` logit of the prediction minus the others, lowered by
      the slack; ``+inf`` at the prediction, and everywhere for an example with
      nothing present; 0 in examples with non-finite values.
    sensitivity: ``{m: [b, k]}`` change of those margins per unit of size;
      ``+inf`` where no constant is known, but ``drops`` are.
    contributions: ``{m: [b, k]}`` terms of the logits, or None.
    nearest_class: int ``[b]``, the rival that sets ``radius``.
    runner_up: int ``[b]``, the second-largest logit (often another class).
    vulnerability: ``{m: [b]}`` shares of the squared sensitivity at
      ``nearest_class``; they depend on the units and sum to 1 (or are all 0).
    valid: bool ``[b]``, False with nothing present: left out of averages.
    present: ``{m: bool[b]}``.
    drops: ``{m: [b, k]}`` of the modalities whose embedding is bounded, the
      most that any input of that modality can take from the margins; None
      where there are none.
    balls: ``Balls`` that bounds inside a ball have proved, or None; the
      certified set is theirs and the polytope's together.
    radius_source: int ``[b]``, which of ``sources`` gave ``radius``, or None.
    units: ``{m: []}``.
    fusion: "additive" (a polytope of budgets), "joint" (an ellipsoid) or "ball"
      (``balls`` alone; ``sensitivity`` is then the slope at the example, a
      bound of nothing).
    source: where the encoder constants come from.
    sound: whether this is a certificate at all.
    rival: "all" classes, or the published "runner_up" only.
    norm: ``((m, "l2" | "linf" | "l1"), ...)``, how :math:`\|\delta_m\|` is
      measured.
    sources: names for ``radius_source``.
    reduction: "sum" of the contributions of present modalities, or "mean";
      ``margins``, ``sensitivity``, ``contributions`` and ``drops`` are those of
      the logits, divided already.
  """

  prediction: Any
  radius: Any
  modality_radius: Any
  margins: Any
  sensitivity: Any
  contributions: Any
  nearest_class: Any
  runner_up: Any
  vulnerability: Any
  valid: Any
  units: Any
  present: Any
  drops: Any = None
  balls: Any = None
  radius_source: Any = None
  fusion: str = dataclasses.field(metadata={"static": True})
  source: str = dataclasses.field(metadata={"static": True})
  sound: bool = dataclasses.field(metadata={"static": True})
  rival: str = dataclasses.field(metadata={"static": True})
  norm: tuple = dataclasses.field(metadata={"static": True})
  reduction: str = dataclasses.field(default="sum", metadata={"static": True})
  sources: tuple = dataclasses.field(default=(), metadata={"static": True})

  @property
  def kind(self) -> str:
    """``"certified"`` or ``"estimated"``."""
    return "certified" if self.sound else "estimated"

  @property
  def modalities(self) -> tuple[str, ...]:
    """Sorted names."""
    return modalities.names(self.sensitivity)

  def __repr__(self) -> str:
    shape = getattr(self.prediction, "shape", "?")
    return (
      f"Certificate({self.kind}, source={self.source!r}, "
      f"fusion={self.fusion!r}, modalities={self.modalities}, shape={shape})"
    )

  def covers(
    self, budgets: Mapping[str, Any], max_missing: int = 0
  ) -> Bool[Array, "*b"]:
    r"""Whether the prediction survives these budgets, all used at once.

    .. math:: \forall j:\ M_j - \sum_m \min(S_{m,j} \epsilon_m, drop_{m,j}) > 0

    and, when the attacker may also remove modalities, minus the
    ``max_missing`` largest positive values of keeping one (a sum), or for every
    subset that may be left (a mean: its weights depend on who is left).

    Args:
      budgets: ``{m: eps}`` in units of the certificate, scalars or ``[b]``; a
        modality that is not named has budget 0. ``inf``: replaced by anything,
        which a bounded embedding can bear (``encoders.bounded``).
      max_missing: how many present modalities may be removed as well.

    Returns:
      bool ``[b]``; the set of covered budgets is down-closed. False, inside
      jit, for a budget that is negative or NaN.

    Raises:
      ValueError: for an unknown modality, a budget that is negative, no number
        or of another shape, ``max_missing`` out of range, for a fusion that is
        not additive, or for a mean of more than 6 modalities.
    """
    modalities.check_sizes(
      "budgets", budgets, self.modalities, jnp.shape(self.prediction)
    )
    for name, value in budgets.items():
      _need_sizes(f"budgets[{name!r}]", value)
    _validate.whole_up_to(len(self.modalities), max_missing=max_missing)
    cost = {
      name: self._cost(name, budgets.get(name, 0.0)) for name in self.modalities
    }
    good = [jnp.asarray(size) >= 0 for size in budgets.values()]
    good = functools.reduce(jnp.logical_and, good, jnp.asarray(True))
    if max_missing:
      left = self._left_after_removal(cost, max_missing)
      return jnp.all(left > 0, axis=-1) & good
    inside = jnp.zeros(jnp.shape(self.prediction), bool)
    if self.fusion != "ball":
      ball = "linf" if self.fusion == "additive" else "l2"
      left = self.rival_margins() - margins.joint_sensitivity(cost, ball=ball)
      inside = jnp.all(left > 0, axis=-1)
    if self.balls is not None:
      inside |= balls_lib.covers(self.balls, self.present, budgets)
    return inside & good

  def radius_without(self, removed: Iterable[str]) -> Float[Array, "*b"]:
    """The joint radius for ``prediction`` once ``removed`` are gone.

    0 where removing them alone already changes the prediction; the prediction
    is still that of the full input.
    """
    removed = modalities.names(removed)
    _validate.known(self.modalities, removed=removed)
    if not removed:
      return self.radius
    terms = self._terms("radius_without")
    kept = np.array([name not in removed for name in self.modalities])
    weight = self._weight(kept)
    # Who is left weighs more in a mean, in its slope and in its cap.
    slopes = {
      name: weight * value if here else jnp.zeros_like(value)
      for (name, value), here in zip(sorted(self.sensitivity.items()), kept)
    }
    caps = {name: weight * value for name, value in (self.drops or {}).items()}
    left = self._left(terms, kept)
    return margins.radii(margins.joint_ratios(left, slopes, caps))

  def joint_radius(self, ball: str = "l2") -> Float[Array, "*b"]:
    r"""The radius of another joint ball over the sizes.

    Args:
      ball: ``"l2"`` (``radius``), ``"linf"`` (every :math:`\epsilon_m < r`) or
        ``"l1"`` (:math:`\sum_m \epsilon_m < r`).
    """
    radius = margins.radii(self._joint_ratios(ball))
    if self.fusion == "ball":
      radius = jnp.zeros_like(radius)
    if self.balls is None:
      return radius
    return jnp.maximum(radius, balls_lib.joint_radius(self.balls, ball))

  def joint_nearest_class(self, ball: str = "l2") -> Int[Array, "*b"]:
    """The rival that sets ``joint_radius(ball)``; the runner-up where none."""
    ratios = self._joint_ratios(ball)
    # With all ratios infinite the minimum is anywhere, the prediction included.
    endless = jnp.all(jnp.isposinf(ratios), axis=-1)
    return jnp.where(endless, self.runner_up, jnp.argmin(ratios, axis=-1))

  def sensitivity_shares(
    self, rival: Int[Array, "*b"]
  ) -> dict[str, Float[Array, "*b"]]:
    """Each modality's share of the squared sensitivity towards ``rival``.

    Args:
      rival: int ``[b]``; at ``nearest_class`` the shares are ``vulnerability``.

    Returns:
      ``{m: [b]}``, in the certificate's units; the sum is 1, or 0 where no
      modality matters.
    """
    chosen = margins.one_hot(rival, self.margins.shape[-1])
    stacked = jnp.concatenate(
      [margins.pick(self.sensitivity[m], chosen) for m in self.modalities],
      axis=-1,
    )
    # Endless ones share everything among themselves.
    endless = jnp.isposinf(stacked)
    ones = endless.astype(stacked.dtype)
    some = jnp.any(endless, axis=-1, keepdims=True)
    stacked = jnp.where(some, ones, stacked)
    length = margins.norm(stacked)[..., None]
    share = jnp.square(stacked / jnp.where(length > 0, length, 1))
    return {name: share[..., i] for i, name in enumerate(self.modalities)}

  def frontier(
    self, first: str, second: str, grid: Float[Array, " g"]
  ) -> Float[Array, "*b g"]:
    r"""The largest certified budget of ``second`` for each of ``first``.

    .. math:: \epsilon_2(\epsilon_1) = \max\Bigl(0, \min_j
              \frac{M_j - S_{1,j} \epsilon_1}{S_{2,j}}\Bigr)

    Concave and piecewise linear for additive fusion without ``drops``; with
    them :math:`S_{1,j} \epsilon_1` is capped, and j counts only where the drop
    of ``second`` reaches what is left. Other modalities have budget 0.

    Args:
      first: modality of the grid.
      second: modality of the answer.
      grid: ``[g]`` budgets of ``first``.

    Returns:
      ``[b, g]``; 0, inside jit, for a budget that is negative or NaN.

    Raises:
      ValueError: for an unknown modality, the same one twice, or a negative
        budget in ``grid``.
    """
    _validate.known(self.modalities, frontier=(first, second))
    if first == second:
      raise ValueError(
        f"second must be another modality than first, got {first!r} twice."
      )
    _need_sizes("grid", grid)
    margin = self.rival_margins()[..., None]
    one = self.sensitivity[first][..., None]
    two = self.sensitivity[second][..., None]
    size = jnp.reshape(grid, (1,) * (one.ndim - 1) + (-1,))
    cost = jnp.where((one == 0) | (size == 0), 0, one * size)
    caps = {m: cap[..., None] for m, cap in (self.drops or {}).items()}
    if first in caps:
      cost = jnp.minimum(cost, caps[first])
    left = margin - cost
    if self.fusion == "joint":
      # The product form of a difference of squares does not overflow.
      root = jnp.sqrt(jnp.maximum(left, 0)) * jnp.sqrt(margin + cost)
      left = jnp.where(left > 0, root, left)
    two = jnp.broadcast_to(two, left.shape)
    cap = caps.get(second)
    cap = None if cap is None else jnp.broadcast_to(cap, left.shape)
    ratio = margins.capped_ratio(left, two, cap)
    reach = jnp.maximum(jnp.min(ratio, axis=-2), 0)
    if self.fusion == "ball":
      reach = jnp.zeros_like(reach)
    if self.balls is not None:
      circle = balls_lib.frontier(self.balls, first, second, grid)
      reach = jnp.maximum(reach, circle)
    return jnp.where(jnp.asarray(grid) >= 0, reach, 0)

  def vulnerability_ratio(
    self, first: str, second: str
  ) -> Float[Array, "*b k"]:
    r"""Per rival :math:`\eta = S_{1,j} / S_{2,j}`.

    Above 1 ``first`` is the more vulnerable one, in these units.
    1 at the prediction and where neither modality matters, or both without
    limit.
    """
    _validate.known(self.modalities, vulnerability_ratio=(first, second))
    one, two = self.sensitivity[first], self.sensitivity[second]
    same = ((one == 0) & (two == 0)) | (jnp.isposinf(one) & jnp.isposinf(two))
    return jnp.where(same, 1, margins.ratio(one, two))

  def rival_margins(self) -> Float[Array, "*b k"]:
    """``margins`` of the classes that count: all, or the runner-up's only."""
    if self.rival == "all":
      return self.margins
    num_classes = self.margins.shape[-1]
    chosen = margins.one_hot(self.runner_up, num_classes)
    return jnp.where(chosen, self.margins, jnp.inf)

  def _left_after_removal(self, cost, max_missing):
    """The margins ``[b, k]`` that the worst removal leaves."""
    terms = self._terms("max_missing")
    keeping = {name: terms[name] - cost[name] for name in self.modalities}
    if self.reduction == "sum":
      left = self.rival_margins() - margins.joint_sensitivity(cost, ball="linf")
      gain = jnp.maximum(modalities.stack(keeping, axis=-1), 0)
      return left - jnp.sum(jax.lax.top_k(gain, max_missing)[0], axis=-1)
    number = len(self.modalities)
    if number > MAX_AVERAGED:
      raise ValueError(
        f"max_missing must be 0 for a head that averages over more than "
        f"{MAX_AVERAGED} modalities, got {number} of them: all subsets would "
        "have to be tried."
      )
    subsets = modalities.subsets(self.modalities, min_size=number - max_missing)
    kept = [[name in subset for name in self.modalities] for subset in subsets]
    left = jax.vmap(lambda row: self._left(keeping, row))(jnp.asarray(kept))
    return jnp.min(left, axis=0)

  def _left(self, values, kept):
    """Margins from the values of the kept ``bool [m]`` modalities alone."""
    terms, weight = self._terms("removal"), self._weight(kept)
    lost = sum(
      terms[name] - jnp.where(kept[index], weight * values[name], 0)
      for index, name in enumerate(self.modalities)
    )
    left = self.rival_margins() - lost
    # Infinity from infinity, of logits that overflow: nothing is proved.
    return jnp.where(jnp.isnan(left), -jnp.inf, left)

  def _weight(self, kept):
    """``[b, 1]``: what a term weighs once only the kept are left."""
    if self.reduction == "sum":
      return 1
    left = {
      name: self.present[name] & kept[index]
      for index, name in enumerate(self.modalities)
    }
    share = modalities.share(left) / modalities.share(self.present)
    return share[..., None].astype(self.margins.dtype)

  def _joint_ratios(self, ball):
    _validate.one_of(margins.BALLS, ball=ball)
    dual = ball
    if self.fusion == "joint":
      # The largest root of sum_m (S_m eps_m)^2 over the ball.
      dual = "l2" if ball == "linf" else "l1"
    return margins.joint_ratios(
      self.rival_margins(), self.sensitivity, self.drops, ball=dual
    )

  def _terms(self, argument):
    """``c_m[y] - c_m[j]``: what a modality gives to each margin."""
    if self.contributions is None:
      raise ValueError(
        f"{argument} needs an additive head with its contributions; this "
        f"certificate has fusion={self.fusion!r} and none."
      )
    selected = margins.one_hot(self.prediction, self.margins.shape[-1])
    return {
      name: margins.pick(value, selected) - value
      for name, value in self.contributions.items()
    }

  def _cost(self, name, budget):
    """``min(S eps, drop)``; 0 for any budget of something inert."""
    sensitivity = self.sensitivity[name]
    budget = jnp.asarray(budget, sensitivity.dtype)
    budget = budget[..., None] if budget.ndim else budget
    # inf * 0 would be NaN.
    inert = (sensitivity == 0) | (budget == 0)
    cost = jnp.where(inert, 0, sensitivity * budget)
    cap = (self.drops or {}).get(name)
    return cost if cap is None else jnp.minimum(cost, cap)


def _need_sizes(argument, value):
  if margins.known_values(value) and not np.all(np.asarray(value) >= 0):
    raise ValueError(f"{argument} must be non-negative, got {value}.")
