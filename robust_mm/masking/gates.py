"""Gates as values: what is measured, and when a block is closed."""

import dataclasses
import warnings
from collections.abc import Callable

from robust_mm import _validate
from robust_mm import curvature

OPEN, CLOSED, UNDECIDED = 0, 1, 2
VERDICTS = ("open", "closed", "undecided")
"""``VERDICTS[code]`` for the int8 codes in the state."""
_MIN_STEPS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class HessianGate:
  """Made by :func:`hessian_gate`, which says what the fields mean."""

  tau: float
  tau_absolute: float | None
  num_steps: int
  failure_probability: float
  undecided: str

  period = 200
  evidence = ("rho_min", "rho_max")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectionalGate:
  """Made by :func:`directional_gate`, which says what the fields mean."""

  tau: float

  period = 20
  evidence = ("cosine",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FisherMask:
  """Made by :func:`fisher_mask`, which says what the fields mean."""

  quantile: float
  decay: float
  per_example_loss_fn: Callable
  chunk_size: int

  period = 20
  evidence = ("threshold", "kept_share", "zero_share")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedGate:
  """Made by :func:`published_gate`."""

  period = 200
  evidence = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomGate:
  """Made by :func:`random_gate`, which says what the field means."""

  rate: float

  period = 200
  evidence = ()


Gate = HessianGate | DirectionalGate | FisherMask | PublishedGate | RandomGate


def hessian_gate(
  *,
  tau: float = 0.5,
  num_steps: int = 20,
  failure_probability: float = 1e-3,
  undecided: str = "open",
  tau_absolute: float | None = None,
) -> HessianGate:
  r"""Closes a block whose destructive loss is sharply concave somewhere.

  With the Ritz values :math:`\rho` of ``num_steps`` Lanczos steps on the
  block's Hessian and :math:`s = \max(|\rho_{min}|, |\rho_{max}|)`,

  .. math:: \text{closed} \iff \rho_{min} < -\tau s - 10^{-5} s, \qquad
            \text{open} \iff \rho_{min} - \text{margin} \ge -\tau s,

  and undecided in between; the margin is that of ``linalg.spectral_bounds``.

  Formal guarantees:
    - *closed* certifies :math:`\lambda_{min} < -\tau` with ``tau_absolute``:
      Ritz values lie inside the spectrum. With the relative ``tau`` it
      certifies :math:`\lambda_{min} \le \rho_{min}`, both printed; the ratio to
      the true norm is an estimate.
    - *open* certifies that no eigenvalue lies below the threshold, with
      probability ``1 - failure_probability`` over the start vector.
    - *undecided* certifies nothing: a negative eigenvalue may be missed by few
      steps long after the largest one is exact.
    - A Hessian or Ritz value that is not finite is undecided, and the block is
      closed until the next refresh whatever ``undecided`` says.

  Choose ``tau`` on data: one that closes in less than 5 % or more than 95 % of
  the steps does nothing (``gate_report``).

  Args:
    tau: relative threshold, non-negative.
    num_steps: products, at least 10; a smaller block takes its size and is
      exact.
    failure_probability: of both ends together, in (0, 1).
    undecided: ``"open"`` or ``"closed"``.
    tau_absolute: in units of the loss per squared parameter, in place of
      ``tau``.

  Raises:
    ValueError: a bad value, naming the argument.
  """
  _validate.non_negative(tau=tau)
  _validate.at_least(_MIN_STEPS, num_steps=num_steps)
  _validate.one_of(("open", "closed"), undecided=undecided)
  if not 0 < failure_probability < 1:
    raise ValueError(
      f"failure_probability must lie in (0, 1), got {failure_probability}."
    )
  if tau_absolute is not None:
    _validate.non_negative(tau_absolute=tau_absolute)
  return HessianGate(
    tau=tau,
    tau_absolute=tau_absolute,
    num_steps=int(num_steps),
    failure_probability=failure_probability,
    undecided=undecided,
  )


def directional_gate(*, tau: float = 0.0) -> DirectionalGate:
  r"""Closes a block that is concave along its destructive gradient.

  .. math:: \cos_j = \frac{\langle q_j, H_j q_j \rangle}{\|q_j\| \|H_j q_j\|},
            \qquad \text{closed} \iff \cos_j < -\tau

  Along a concave direction the quadratic model of a step has no minimum to stop
  at. One product a refresh; blind to every other direction. A block with
  :math:`q_j = 0` keeps what was decided before; with :math:`H_j q_j = 0` the
  cosine is 0.

  Args:
    tau: in [0, 1].

  Raises:
    ValueError: naming ``tau``.
  """
  _validate.in_unit_interval(tau=tau)
  return DirectionalGate(tau=tau)


def fisher_mask(
  *,
  per_example_loss_fn: Callable | None = None,
  quantile: float = 0.9,
  decay: float = 0.99,
  chunk_size: int = 16,
) -> FisherMask:
  r"""Lets single parameters be destroyed where the task does not need them.

  .. math:: F \leftarrow d F + (1 - d) \frac1b \sum_e \Bigl( \frac{\partial
            \ell_e}{\partial \theta} \Bigr)^2, \qquad M_i = 1[F_i \le t_j]

  with :math:`t_j` the order statistic of rank :math:`\lceil q n_j \rceil` of
  block j, exactly; ties are all kept. Dead units (F = 0) are always in the
  mask: their share is reported.

  A batch whose Fisher is not finite leaves F alone and closes the block until
  the next refresh.

  Args:
    per_example_loss_fn: task loss ``(params, example) -> scalar``. Needed.
    quantile: share of a block that is let through, in (0, 1].
    decay: in [0, 1). No bias correction: a common factor moves no order.
    chunk_size: gradients at a time, see ``curvature.fisher_diagonal``.

  Raises:
    ValueError: a bad value, naming the argument.
  """
  if per_example_loss_fn is None:
    raise ValueError("per_example_loss_fn must be given for fisher_mask.")
  curvature.check_quantile(quantile)
  _validate.at_least(1, chunk_size=chunk_size)
  if not 0 <= decay < 1:
    raise ValueError(f"decay must lie in [0, 1), got {decay}.")
  return FisherMask(
    quantile=quantile,
    decay=decay,
    per_example_loss_fn=per_example_loss_fn,
    chunk_size=int(chunk_size),
  )


def random_gate(*, rate: float = 0.5) -> RandomGate:
  """Closes a block by chance: what a gate that measures has to beat.

  Closing by whatever rule also destroys less. Give it the rate at which the
  other gate closes (``gate_report``) and its period: what is left of the
  difference is owed to the measurement.

  Args:
    rate: probability that a refresh closes a block, of every block by itself;
      in [0, 1]. The draws are of the mask's ``seed``.

  Raises:
    ValueError: naming ``rate``.
  """
  _validate.in_unit_interval(rate=rate)
  return RandomGate(rate=rate)


def published_gate() -> PublishedGate:
  r"""The rule as published, which is the gate that never closes.

  It closes a block where the smallest eigenvalue of its empirical Fisher (or
  Gauss-Newton) matrix is below :math:`-\tau`. Both are positive semidefinite,
  so for no :math:`\tau > 0` is it ever; computed, the eigenvalue is rounding.
  Dropping the sign would not repair it: every matrix of fewer examples than
  parameters is singular.

  Warns:
    UserWarning: once for every construction, saying so.
  """
  warnings.warn(
    "published_gate never closes: the smallest eigenvalue of a positive "
    "semidefinite matrix is not below -tau. Use hessian_gate for one that can.",
    UserWarning,
    stacklevel=2,
  )
  return PublishedGate()
