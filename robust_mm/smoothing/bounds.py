r"""What a probability under noise says about a moved input; float64, host.

``p_A`` is the chance of the predicted class under noise at x, ``q`` the chance
that a sub-sample of x has only elements that the moved input shares, ``q'`` the
same of a sub-sample of the moved input, and ``rho`` the length of the move of
the other modalities in units of their noise.
"""

import numpy as np
from scipy import special
from scipy import stats

from robust_mm import _validate

CHANGES = ("modify", "delete", "add")
# The quantile is right to 1e-12 or so; float32 is far coarser than this cut.
_CUT = 1e-9


def clopper_pearson(successes, trials, alpha: float) -> np.ndarray:
  r"""A lower bound of a probability that holds with probability 1 - alpha.

  .. math:: \underline p = B^{-1}(\alpha; n_A, n - n_A + 1)

  the Beta quantile; :math:`\alpha^{1/n}` for :math:`n_A = n`, 0 for
  :math:`n_A = 0`.

  >>> float(round(clopper_pearson(990, 1000, 1e-3)[()], 4))
  0.9764

  Args:
    successes: :math:`n_A`, integers.
    trials: n, at least 1.
    alpha: in (0, 1).

  Returns:
    float64, of the shape of ``successes``.
  """
  check_alpha(alpha)
  successes = np.asarray(successes, np.float64)
  trials = np.asarray(trials, np.float64)
  inside = np.clip(successes, 1, np.maximum(trials - 1, 1))
  bound = stats.beta.ppf(alpha, inside, trials - inside + 1)
  bound = np.where(successes >= trials, alpha ** (1 / trials), bound)
  return np.where(successes <= 0, 0.0, bound)


def check_alpha(alpha: float) -> None:
  """``alpha must lie in (0, 1), got 2.``"""
  if not 0 < alpha < 1:
    raise ValueError(f"alpha must lie in (0, 1), got {alpha}.")


def round_down(values) -> np.ndarray:
  """Non-negative float64 as float32, below by at least 1e-9 of the value."""
  values = np.asarray(values, np.float64)
  below = np.where(np.isinf(values), values, values * (1 - _CUT))
  found = below.astype(np.float32)
  above = found.astype(np.float64) > below
  return np.where(above, np.nextafter(found, np.float32(0)), found)


def overlap(
  number: int, kept: int, changed: int, change: str = "modify"
) -> tuple[np.ndarray, np.ndarray]:
  r"""``(q, q')`` for 0, 1, ..., ``changed`` elements of one modality.

  .. math:: q = \prod_{i < k} \frac{e - i}{n - i}, \qquad
            q' = \prod_{i < k} \frac{e - i}{n' - i}

  with e common elements and n' after the change: modified n' = n, e = n - r;
  deleted n' = e = n - r; added n' = n + r, e = n. Both are running products
  over r, which multiply the same factors in another order.

  Args:
    number: n, elements of the input.
    kept: k, elements of a sub-sample.
    changed: the largest r.
    change: ``"modify"``, ``"delete"`` or ``"add"``.

  Returns:
    two arrays ``[changed + 1]``; 0 where too few elements are left to sample.
  """
  _validate.one_of(CHANGES, change=change)
  steps = np.arange(changed, dtype=np.float64)
  if change == "add":
    # C(n + r, k) grows by (n + r + 1) / (n + r + 1 - k).
    factors = (number + steps + 1 - kept) / (number + steps + 1)
    return np.ones(changed + 1), _running(factors)
  left = np.maximum(number - steps, 1)
  shared = _running(np.maximum(number - steps - kept, 0) / left)
  if change == "modify":
    return shared, shared
  return shared, (shared > 0).astype(np.float64)


def _running(factors) -> np.ndarray:
  return np.concatenate([[1.0], np.cumprod(factors)])


def kept_probability(p, q=1.0, q_moved=1.0, rho=0.0) -> np.ndarray:
  r"""The least chance of the predicted class at a moved input.

  .. math:: p'_A \ge q' \Phi(\Phi^{-1}(\max(0, p_A - 1 + q) / q) - \rho)

  Exact in the worst case (Neyman-Pearson).
  """
  q = np.asarray(q, np.float64)
  share = np.maximum(0, p - (1 - q)) / np.where(q > 0, q, 1)
  if np.all(np.asarray(rho) == 0):
    # The quantile and back would only add rounding.
    return np.where(q > 0, share * q_moved, 0.0)
  with np.errstate(invalid="ignore"):
    moved = special.ndtr(special.ndtri(np.minimum(share, 1)) - rho)
  return np.where((q > 0) & (share > 0), moved * q_moved, 0.0)


def rival_probability(p, q=1.0, q_moved=1.0, rho=0.0) -> np.ndarray:
  r"""The largest chance of a class of probability ``p`` at a moved input.

  .. math:: p'_B \le 1 - q' + q' \Phi(\Phi^{-1}(\min(1, p_B / q)) + \rho)

  With :math:`p_B = 1 - p_A` it is :math:`1 - p'_A`.
  """
  q = np.asarray(q, np.float64)
  share = np.minimum(1, p / np.where(q > 0, q, 1))
  if not np.all(np.asarray(rho) == 0):
    moved = special.ndtr(special.ndtri(share) + rho)
    share = np.where(share < 1, moved, 1.0)
  return np.where(q > 0, 1 - q_moved + q_moved * share, 1.0)


def reach(p, q=1.0, q_moved=1.0) -> np.ndarray:
  r"""The largest ``rho`` at which :math:`p'_A > 1/2` is proved, float64.

  Negative, or minus infinity, where it is not even at 0.
  """
  q = np.asarray(q, np.float64)
  q_moved = np.asarray(q_moved, np.float64)
  share = np.maximum(0, p - (1 - q)) / np.where(q > 0, q, 1)
  # q' at most 1/2 has no chance: the quantile of 1 is infinity.
  wanted = np.minimum(1, 0.5 / np.where(q_moved > 0, q_moved, 0.5))
  possible = (q > 0) & (share > 0) & (wanted < 1)
  share = np.where(possible, np.minimum(share, 1), 0.5)
  wanted = np.where(possible, wanted, 0.5)
  found = special.ndtri(share) - special.ndtri(wanted)
  return np.where(possible, found, -np.inf)
