r"""Which modality to attack next: exponential weights over arms.

A controller is a frozen value with pure functions; its state is a pytree, its
weights are logarithms::

  controller = controllers.hedge(3, num_rounds=500)
  state = controller.init()
  arm = controller.draw(key, state)
  rewards, scale, finite = controllers.scale_gains(scale, gains)
  state = controller.update(state, rewards, arm)

A round is an update, not a training step. ``exp3`` and ``exp3s`` read the
reward of the drawn arm alone (bandits), ``hedge`` reads all of them,
``uniform`` none: it is the control that every claim has to beat. One
measurement is one update, with the arm drawn from the same state; a gain is
never used twice.

References:
  `Auer et al. (2002) <https://doi.org/10.1137/S0097539701398375>`_, Exp3 and
  Exp3.S; `Freund & Schapire (1997) <https://doi.org/10.1006/jcss.1997.1504>`_,
  Hedge; `Herbster & Warmuth (1998)
  <https://doi.org/10.1023/A:1007424614876>`_, fixed share.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import PRNGKeyArray

from robust_mm import _validate

# Gains below this are noise.
SMALLEST_SCALE = 1e-6
_BISECTIONS = 60
# Log-probabilities below this are as good as never drawn.
_LOWEST = -60.0


class ControllerState(NamedTuple):
  """What a controller has learnt.

  Attributes:
    log_weights: ``[num_arms]``, the largest is 0.
    rounds: int32, updates so far.
  """

  log_weights: Float[Array, " m"]
  rounds: Int[Array, ""]


class Rewards(NamedTuple):
  """Gains brought to [0, 1]; see :func:`scale_gains`.

  Attributes:
    rewards: ``[num_arms]`` in [0, 1].
    scale: to be handed in with the next gains.
    finite: False if a measured gain was not finite (its reward is 0).
  """

  rewards: Float[Array, " m"]
  scale: Float[Array, ""]
  finite: Bool[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controller:
  """Exponential weights; made by one of the factories of this module.

  Attributes:
    kind: ``"exp3"``, ``"exp3s"``, ``"hedge"`` or ``"uniform"``.
    num_arms: M.
    rate: gamma of ``exp3`` and ``exp3s``, learning rate of ``hedge``.
    share: of weight that is spread over all arms in every update.
    p_min: the least probability of an arm.
    p_max: the largest one.
    no_attack: probability of drawing no arm.
  """

  kind: str
  num_arms: int
  rate: float = 0.0
  share: float = 0.0
  p_min: float = 0.0
  p_max: float = 1.0
  no_attack: float = 0.0

  def init(self) -> ControllerState:
    """All arms alike, no round played."""
    return ControllerState(
      jnp.zeros(self.num_arms, jnp.float32), jnp.zeros((), jnp.int32)
    )

  def probabilities(self, state: ControllerState) -> Float[Array, " m"]:
    """``[num_arms]``; they sum to ``1 - no_attack``."""
    return (1 - self.no_attack) * self._given_attack(state)

  def draw(self, key: PRNGKeyArray, state: ControllerState) -> Int[Array, ""]:
    """An arm, int32; ``num_arms`` stands for no attack."""
    p = self.probabilities(state)
    p = jnp.append(p, jnp.asarray(self.no_attack, p.dtype))
    arm = jax.random.categorical(key, jnp.log(p))
    return arm.astype(jnp.int32)

  def update(
    self,
    state: ControllerState,
    rewards: Array,
    arm: int | Int[Array, ""],
  ) -> ControllerState:
    """One round.

    Args:
      state: the one that ``arm`` was drawn from.
      rewards: ``[num_arms]`` in [0, 1]; a bandit reads ``rewards[arm]`` alone.
        Values outside are cut, NaN is 0.
      arm: that was played; ``num_arms`` (no attack) teaches a bandit nothing.

    Raises:
      ValueError: rewards of another length.
    """
    if rewards.shape != (self.num_arms,):
      raise ValueError(
        f"rewards must have shape ({self.num_arms},), got {rewards.shape}."
      )
    rewards = jnp.clip(jnp.nan_to_num(rewards, nan=0.0), 0, 1)
    w = state.log_weights
    rewards = rewards.astype(w.dtype)
    total = jax.nn.logsumexp(w)
    if self.kind in ("exp3", "exp3s"):
      played = jnp.arange(self.num_arms) == arm
      chance = jnp.where(played, self.probabilities(state), 1)
      w = w + self.rate / self.num_arms * jnp.where(played, rewards / chance, 0)
      if self.share:
        spread = math.log(math.e * self.share / self.num_arms)
        w = jnp.logaddexp(w, spread + total)
    elif self.kind == "hedge":
      w = w + self.rate * rewards
      if self.share:
        kept = math.log1p(-self.share) + w - jax.nn.logsumexp(w)
        w = jnp.logaddexp(kept, math.log(self.share / self.num_arms))
    return ControllerState(w - jnp.max(w), state.rounds + 1)

  def _given_attack(self, state):
    log_q = jax.nn.log_softmax(state.log_weights)
    if self.kind == "uniform":
      log_q = jnp.full_like(log_q, -math.log(self.num_arms))
    q = jnp.exp(log_q)
    if self.kind in ("exp3", "exp3s"):
      q = (1 - self.rate) * q + self.rate / self.num_arms
    if self.p_min > 0 or self.p_max < 1:
      q = _within(q, self.p_min, self.p_max)
    return q


def exp3(
  num_arms: int,
  *,
  num_rounds: int | None = None,
  gamma: float | None = None,
  p_min: float = 0.0,
  p_max: float = 1.0,
  no_attack: float = 0.0,
) -> Controller:
  r"""Exp3: a bandit against the best fixed arm.

  .. math:: p = (1 - \gamma) q + \gamma / M, \qquad
            w_m \mathrel{+}= \frac{\gamma}{M} \frac{r_m}{p_m} 1[m = arm]

  Formal guarantees:
    - ``r / p`` on the drawn arm is an unbiased estimate of the rewards.
    - With rewards in [0, 1], the default gamma and no cap, the expected regret
      against the best fixed arm is at most :math:`2 \sqrt{e - 1} \sqrt{T M \ln
      M}`, whatever the rewards.

  >>> controller = exp3(3, num_rounds=1000)
  >>> [round(float(p), 3) for p in controller.probabilities(controller.init())]
  [0.333, 0.333, 0.333]

  Args:
    num_arms: M, at least 2.
    num_rounds: T, updates in all; sets :math:`\gamma = \min(1, \sqrt{M \ln M /
      ((e - 1) T)})`.
    gamma: in (0, 1], in place of ``num_rounds``.
    p_min: no arm is less probable (given an attack).
    p_max: no arm is more probable; probabilities in between keep their ratios.
      Both void the regret bound.
    no_attack: fixed probability of drawing none, by which the variance of the
      estimate grows: with any, a bandit's bound is for other rates than the
      defaults. Regret counts the rounds with an attack.

  Raises:
    ValueError: a bad value, naming the argument.
  """
  _validate.at_least(2, num_arms=num_arms)
  if gamma is None:
    gamma = _bandit_rate(num_arms, num_rounds, math.log(num_arms))
  _check_gamma(gamma)
  return _make("exp3", num_arms, gamma, 0.0, p_min, p_max, no_attack)


def exp3s(
  num_arms: int,
  *,
  num_rounds: int | None = None,
  num_segments: int = 4,
  gamma: float | None = None,
  share: float | None = None,
  p_min: float = 0.0,
  p_max: float = 1.0,
  no_attack: float = 0.0,
) -> Controller:
  r"""Exp3.S: a bandit against a best arm that changes.

  .. math:: w \leftarrow \log\bigl(e^{w + \gamma \hat r / M} +
            \tfrac{e \alpha}{M} \textstyle\sum_i e^{w_i}\bigr)

  Formal guarantees:
    - With rewards in [0, 1], the defaults and no cap, the expected regret
      against every policy of S segments is at most :math:`2 \sqrt{e - 1}
      \sqrt{T M (S \ln(M T) + e)}`.

  Args:
    num_arms: M, at least 2.
    num_rounds: T; sets :math:`\gamma = \min(1, \sqrt{M (S \ln(M T) + e) / ((e -
      1) T)})` and ``share`` = 1/T.
    num_segments: S.
    gamma: in (0, 1], in place of the formula.
    share: :math:`\alpha` in [0, 1); with 0 this is :func:`exp3`.
    p_min, p_max, no_attack: see :func:`exp3`.

  Raises:
    ValueError: a bad value, naming the argument.
  """
  _validate.at_least(2, num_arms=num_arms)
  _validate.at_least(1, num_segments=num_segments)
  if gamma is None:
    rounds = _rounds(num_rounds, "gamma")
    log_term = num_segments * math.log(num_arms * rounds) + math.e
    gamma = _bandit_rate(num_arms, num_rounds, log_term)
  _check_gamma(gamma)
  share = _share(share, num_rounds)
  return _make("exp3s", num_arms, gamma, share, p_min, p_max, no_attack)


def hedge(
  num_arms: int,
  *,
  num_rounds: int | None = None,
  learning_rate: float | None = None,
  share: float | None = None,
  p_min: float = 0.0,
  p_max: float = 1.0,
  no_attack: float = 0.0,
) -> Controller:
  r"""Hedge with fixed share: full information, an arm that may change.

  .. math:: w_m \mathrel{+}= \eta r_m, \qquad w \leftarrow
            \log\bigl((1 - \alpha) \operatorname{softmax}(w) + \alpha / M\bigr)

  The default of the project: measuring every arm costs one forward pass for
  each, and teaches far more than one arm does.

  Formal guarantees:
    - With ``share=0``, rewards in [0, 1], the default rate and no cap, the
      regret against the best fixed arm is at most :math:`\sqrt{T \ln M / 2}`.

  Args:
    num_arms: M, at least 2.
    num_rounds: T; sets :math:`\eta = \sqrt{8 \ln M / T}` and ``share`` = 1/T.
    learning_rate: :math:`\eta > 0`, in place of the formula.
    share: :math:`\alpha` in [0, 1); 0 for plain Hedge.
    p_min, p_max, no_attack: see :func:`exp3`.

  Raises:
    ValueError: a bad value, naming the argument.
  """
  _validate.at_least(2, num_arms=num_arms)
  if learning_rate is None:
    rounds = _rounds(num_rounds, "learning_rate")
    learning_rate = math.sqrt(8 * math.log(num_arms) / rounds)
  _validate.positive(learning_rate=learning_rate)
  share = _share(share, num_rounds)
  return _make("hedge", num_arms, learning_rate, share, p_min, p_max, no_attack)


def uniform(num_arms: int, *, no_attack: float = 0.0) -> Controller:
  """Every arm alike, for ever: the control of every experiment."""
  _validate.at_least(2, num_arms=num_arms)
  return _make("uniform", num_arms, 0.0, 0.0, 0.0, 1.0, no_attack)


def initial_scale() -> Float[Array, ""]:
  """The first scale of :func:`scale_gains`."""
  return jnp.asarray(SMALLEST_SCALE, jnp.float32)


def scale_gains(
  scale: Float[Array, ""],
  gains: Float[Array, " m"],
  *,
  measured: Bool[Array, " m"] | None = None,
  decay: float = 0.995,
) -> Rewards:
  r"""Gains as rewards in [0, 1], a premise of every regret bound.

  .. math:: c_t = \max(0.995\, c_{t-1}, \max_m g_m, 10^{-6}), \qquad
            r = \min(\max(g / c_t, 0), 1)

  >>> scaled = scale_gains(initial_scale(), jnp.array([0.5, 0.25, -1.0]))
  >>> scaled.rewards.tolist()
  [1.0, 0.5, 0.0]

  Args:
    scale: :math:`c_{t-1}`, at first ``initial_scale()``.
    gains: ``[num_arms]``, such as ``modalities.stack(information_gain(...))``.
      A gain that is not finite gets reward 0 and leaves the scale alone.
    measured: ``bool[num_arms]``, where only some were; the others get 0.
    decay: in [0, 1], of the scale.
  """
  _validate.in_unit_interval(decay=decay)
  measured = jnp.ones_like(gains, bool) if measured is None else measured
  finite = jnp.isfinite(gains)
  counted = jnp.where(measured & finite, gains, 0).astype(scale.dtype)
  scale = jnp.maximum(decay * scale, jnp.max(counted))
  scale = jnp.maximum(scale, SMALLEST_SCALE)
  return Rewards(
    jnp.clip(counted / scale, 0, 1), scale, jnp.all(finite | ~measured)
  )


def _within(q, low: float, high: float):
  """``min(max(c q, low), high)`` with the one c for which it sums to 1."""
  log_q = jnp.maximum(jnp.log(q), _LOWEST)

  def cut(log_c):
    return jnp.clip(jnp.exp(log_q + log_c), low, high)

  def halve(_, ends):
    below, above = ends
    middle = (below + above) / 2
    short = jnp.sum(cut(middle)) < 1
    return jnp.where(short, middle, below), jnp.where(short, above, middle)

  end = jnp.asarray(-_LOWEST + 10, log_q.dtype)
  below, above = jax.lax.fori_loop(0, _BISECTIONS, halve, (-end, end))
  found = cut((below + above) / 2)
  return found / jnp.sum(found)


def _make(kind, num_arms, rate, share, p_min, p_max, no_attack) -> Controller:
  _validate.in_unit_interval(p_min=p_min, p_max=p_max)
  if not 0 <= no_attack < 1:
    raise ValueError(f"no_attack must lie in [0, 1), got {no_attack}.")
  if p_min * num_arms > 1:
    raise ValueError(
      f"p_min must be at most 1/{num_arms} for {num_arms} arms, got {p_min}."
    )
  if p_max * num_arms < 1:
    raise ValueError(
      f"p_max must be at least 1/{num_arms} for {num_arms} arms, got {p_max}."
    )
  return Controller(
    kind=kind,
    num_arms=int(num_arms),
    rate=float(rate),
    share=float(share),
    p_min=float(p_min),
    p_max=float(p_max),
    no_attack=float(no_attack),
  )


def _check_gamma(gamma) -> None:
  if not 0 < gamma <= 1:
    raise ValueError(f"gamma must lie in (0, 1], got {gamma}.")


def _rounds(num_rounds, other: str) -> int:
  if num_rounds is None:
    raise ValueError(f"num_rounds must be given where {other} is not.")
  _validate.at_least(1, num_rounds=num_rounds)
  return num_rounds


def _bandit_rate(num_arms, num_rounds, log_term) -> float:
  rounds = _rounds(num_rounds, "gamma")
  return min(1.0, math.sqrt(num_arms * log_term / ((math.e - 1) * rounds)))


def _share(share, num_rounds) -> float:
  if share is None:
    share = 1 / num_rounds if num_rounds and num_rounds > 1 else 0.0
  if not 0 <= share < 1:
    raise ValueError(f"share must lie in [0, 1), got {share}.")
  return share
