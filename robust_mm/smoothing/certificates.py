"""The smoothed certificate as a value: what it says, what one can ask it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from robust_mm import _validate
from robust_mm import modalities
from robust_mm.smoothing import bounds
from robust_mm.smoothing import noise as noise_lib


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SmoothedCertificate:
  r"""How far every example may move before the smoothed class can change.

  Sizes of a modality under Gaussian noise are
  :math:`\epsilon_m = \|\delta_m\|_2 / s_m` with the units :math:`s_m`; sizes of
  a sub-sampled one are numbers of elements. Balls are open; an abstention has
  radius 0 and covers nothing.

  Formal guarantees:
    - With probability at least ``1 - alpha`` for each example, over the noise
      drawn, the smoothed classifier keeps ``prediction`` inside the set.
    - Nothing about the base classifier, about correctness, or for all of many
      examples at once.

  Host-side values in NumPy: the Beta quantile is taken there in float64, and
  ``p_lower`` and every radius are rounded down to float32.

  Attributes:
    prediction: int32 ``[b]``, -1 where it abstains: ``p_lower <= 1/2``, which
      non-finite inputs lead to.
    p_lower: ``[b]`` lower bound of the chance of the selected class.
    counts: int32 ``[b, k]`` of the estimation; the rest of ``num_estimation``
      had non-finite logits.
    selection: int32 ``[b, k]``, the counts that chose the class.
    valid: bool ``[b]``, False with nothing present: left out of averages.
    present: ``{m: bool[b]}``.
    noise: the ``Noise``.
    alpha: see above.
    num_estimation: samples of the estimation.
    elements: ``{m: n_m}`` of the sub-sampled modalities.
    units: ``{m: s_m}`` in raw input values.
  """

  prediction: Any
  p_lower: Any
  counts: Any
  selection: Any
  valid: Any
  present: Any
  noise: noise_lib.Noise
  alpha: float
  num_estimation: int
  elements: Any
  units: Any

  @property
  def modalities(self) -> tuple[str, ...]:
    """Sorted names."""
    return modalities.names(self.present)

  @property
  def kind(self) -> str:
    """``"certified with probability 0.999"``."""
    return f"certified with probability {1 - self.alpha:.12g}"

  def __repr__(self) -> str:
    return (
      f"SmoothedCertificate({self.kind}, noise={self.noise}, "
      f"shape={self.prediction.shape})"
    )

  @property
  def radius(self) -> np.ndarray:
    r"""float32 ``[b]``, all modalities together.

    Gaussian noise: the l2 ball :math:`\sum_m \epsilon_m^2 < r^2`,
    :math:`r = R \min_m \sigma_m / s_m` with :math:`R =
    \Phi^{-1}(\underline p)`. Sub-sampling: that many elements modified,
    whichever modalities they are of. ``+inf`` with nothing present.

    Raises:
      ValueError: mixed noise, whose sizes have no common measure.
    """
    if self.noise.kind == "mixed":
      raise ValueError(
        "radius: Gaussian noise and sub-sampling have no joint radius; ask "
        "modality_radius or covers."
      )
    # Sub-sampling: log q is concave in the numbers of changed elements, so the
    # worst split of a total puts all of it on one modality.
    alone = self.modality_radius.values()
    return np.min(np.stack(list(alone)), axis=0)

  @property
  def modality_radius(self) -> dict[str, np.ndarray]:
    r"""``{m: float32 [b]}``, that modality alone.

    :math:`R \sigma_m / s_m`, or the largest number of modified elements; 0
    without noise, ``+inf`` where the modality is absent.
    """
    return {name: self._alone(name) for name in self.modalities}

  def _alone(self, name: str) -> np.ndarray:
    held = self.prediction >= 0
    kept = self.noise.kept(name)
    if kept is None:
      size = self.noise.deviation(name) / self.units[name]
      found = bounds.round_down(
        np.where(held, bounds.reach(self._p), 0.0) * size
      )
    else:
      number = self.elements[name]
      shared, _ = bounds.overlap(number, kept, number)
      # q falls with r: how many of r = 0, 1, ... have p - 1 + q > 1/2.
      proved = np.searchsorted(-shared, -(1.5 - self._p), side="left")
      found = np.maximum(proved - 1, 0).astype(np.float32)
    found = np.where(self.present[name], found, np.float32(np.inf))
    return np.where(held, found, np.float32(0))

  def covers(
    self, budgets: Mapping[str, Any], *, change: str = "modify"
  ) -> np.ndarray:
    r"""Whether the smoothed class survives these budgets, all used at once.

    .. math:: \sum_m \epsilon_m^2 s_m^2 / \sigma_m^2 < \rho^2

    over the modalities with Gaussian noise, with the largest :math:`\rho` that
    the numbers of changed elements leave.

    Args:
      budgets: ``{m: size}``, scalars or ``[b]``: in units of the certificate
        under Gaussian noise, whole numbers of elements under sub-sampling. A
        modality that is not named, or absent, does not change; one without
        noise must not.
      change: whether elements are changed (``"modify"``), taken away
        (``"delete"``) or joined by others (``"add"``). The last two speak of a
        classifier that sees a sub-sample and not how many there were, of an
        input whose n_m elements are all real (no padding).

    Returns:
      bool ``[b]``; the set of covered budgets is down-closed.

    Raises:
      ValueError: an unknown modality or change, a negative or NaN budget, a
        number of elements that is not whole.
    """
    modalities.check_sizes(
      "budgets", budgets, self.modalities, np.shape(self.prediction)
    )
    _validate.one_of(bounds.CHANGES, change=change)
    square, shared, moved = 0.0, 1.0, 1.0
    for name, size in budgets.items():
      size = self._budget(name, size)
      if self.noise.kept(name) is None:
        square = square + self._standardised(name, size) ** 2
      else:
        q, q_moved = self._overlap(name, size, change)
        shared, moved = shared * q, moved * q_moved
    room = bounds.reach(self._p, shared, moved)
    room = bounds.round_down(np.maximum(room, 0)).astype(np.float64)
    return (self.prediction >= 0) & (np.sqrt(square) < room)

  @property
  def _p(self) -> np.ndarray:
    return np.asarray(self.p_lower, np.float64)

  def _budget(self, name: str, size) -> np.ndarray:
    size = np.asarray(size, np.float64)
    if not np.all(size >= 0):
      raise ValueError(f"budgets[{name!r}] must be non-negative, got {size}.")
    whole = np.isinf(size) | (size == np.floor(size))
    if self.noise.kept(name) is not None and not np.all(whole):
      raise ValueError(
        f"budgets[{name!r}] must be whole numbers of elements, got {size}."
      )
    return np.where(self.present[name], size, 0.0)

  def _standardised(self, name, size):
    sigma = self.noise.deviation(name)
    raw = size * self.units[name]
    if not sigma:
      return np.where(raw > 0, np.inf, 0.0)
    return raw / sigma

  def _overlap(self, name, size, change):
    number, kept = self.elements[name], self.noise.kept(name)
    finite = np.isfinite(size)
    whole = np.where(finite, size, 0).astype(np.int64)
    # A modality has no more elements than it has; any number may be added.
    most = whole if change == "add" else np.minimum(whole, number)
    q, q_moved = bounds.overlap(number, kept, int(most.max()), change)
    beyond = ~finite | (most < whole)
    return (
      np.where(beyond, 0.0, q[most]),
      np.where(beyond, 0.0, q_moved[most]),
    )


def from_counts(
  selection,
  estimation,
  *,
  noise: noise_lib.Noise,
  present: Mapping[str, Any],
  shapes: Mapping[str, tuple[int, ...]],
  num_estimation: int,
  alpha: float,
  units: Mapping[str, float] | None = None,
) -> SmoothedCertificate:
  """The certificate that counts prove.

  Args:
    selection: int ``[b, k]``, which chooses the class: the first of equals.
    estimation: int ``[b, k]`` of other samples.
    noise: that was added.
    present: ``{m: bool[b]}``.
    shapes: ``{m: shape}`` of one input.
    num_estimation: samples of the estimation.
    alpha: in (0, 1), for each example.
    units: ``{m: s_m}``, 1 where not named.

  Raises:
    ValueError: naming the argument that is wrong.
  """
  selection = np.asarray(selection, np.int32)
  counts = np.asarray(estimation, np.int32)
  present = {name: np.asarray(flag, bool) for name, flag in present.items()}
  chosen = np.argmax(selection, axis=-1)
  hits = np.take_along_axis(counts, chosen[:, None], axis=-1)[:, 0]
  p_lower = bounds.round_down(
    bounds.clopper_pearson(hits, num_estimation, alpha)
  )
  prediction = np.where(p_lower > 0.5, chosen, -1).astype(np.int32)
  return SmoothedCertificate(
    prediction=prediction,
    p_lower=p_lower,
    counts=counts,
    selection=selection,
    valid=np.any(list(present.values()), axis=0),
    present=present,
    noise=noise,
    alpha=float(alpha),
    num_estimation=int(num_estimation),
    elements={
      name: noise.num_elements(name, tuple(shapes[name]))
      for name, _ in noise.keep
    },
    units=check_units(units, tuple(present)),
  )


def check_units(units, names: tuple[str, ...]) -> dict[str, float]:
  """``{m: s_m}``, positive, 1 where not named."""
  _validate.known(names, units=units or {})
  for name, size in (units or {}).items():
    _validate.positive(**{f"units[{name!r}]": size})
  return {name: float((units or {}).get(name, 1.0)) for name in names}
