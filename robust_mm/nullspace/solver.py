r"""Noise that hardly changes a network's outputs, with the evidence for it."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm.nullspace import criteria
from robust_mm.nullspace import searching
from robust_mm.nullspace import tokens as tokens_lib
from robust_mm.nullspace.criteria import Items
from robust_mm.nullspace.searching import Search

STATUSES = (*searching.STATUSES, "early_stopped", "not_reached")
_HOLDOUT = 512
_REPORT = 1000


class Splits(NamedTuple):
  """Disjoint items of one solution, each ``[n, N, d]`` tokens.

  Attributes:
    optimise: whose gradients are followed.
    holdout: that decide what is feasible; at least 64, better 512.
    report: that the solver never looks at; at least 1, better 1,000.
  """

  optimise: Any
  holdout: Any
  report: Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NoiseResult:
  """Noise, and what is known about it.

  Attributes:
    noise: v, ``[1, N, d]``.
    radius: r, the mean length of its centred tokens in units of s.
    norm: of v.
    criterion: its mean on the report items, which no decision has seen.
    criterion_upper: one-sided upper bound of the mean on the hold-out items,
      which decided: at most ``eps`` where ``approximate``. NaN of published
      noise, which has none.
    agreement: share of the report items whose predicted class it does not
      change.
    eps: tolerance.
    bracket: (r that holds, next r that failed; infinite where none did). NaN
      of published noise, of which no radius was shown to hold.
    status: ``converged``: the bound holds, and failed at the next radius.
      ``max_radius``: feasible there, and changing next to nothing (a mean of at
      most eps / 100): an almost exact nullspace direction, and not maximal.
      ``saturated``: feasible there and no such direction: the search ended
      before the bound failed, or noise so large has replaced tokens at a cost
      that is bounded. ``infeasible``: no radius was found; noise is 0. Of
      published noise ``early_stopped`` (at a minibatch below eps) or
      ``not_reached``.
    history: ``{"radius", "upper", "optimised"}``, lists, a stage each.
  """

  noise: Any
  radius: float
  norm: float
  criterion: float
  criterion_upper: float
  agreement: float
  eps: float
  bracket: tuple[float, float]
  status: str
  history: dict[str, list]

  @property
  def converged(self) -> bool:
    """True for ``converged`` alone."""
    return self.status == "converged"

  @property
  def approximate(self) -> bool:
    """Whether noise may be called eps-approximate: its bound holds."""
    return self.status in ("converged", "max_radius", "saturated")


def split_items(
  tokens: Any,
  key: PRNGKeyArray,
  *,
  num_holdout: int = _HOLDOUT,
  num_report: int = _REPORT,
) -> Splits:
  """Three disjoint parts of ``tokens`` [n, N, d], drawn at random.

  Raises:
    ValueError: ``tokens`` has too few items to leave one to optimise on.
  """
  _validate.at_least(searching.MIN_HOLDOUT, num_holdout=num_holdout)
  _validate.at_least(1, num_report=num_report)
  total, held = len(tokens), num_holdout + num_report
  if total <= held:
    raise ValueError(
      f"tokens must have more than num_holdout + num_report = {held} items, "
      f"got {total}."
    )
  order = jax.random.permutation(key, total)
  parts = jnp.split(tokens[order], [num_holdout, held])
  return Splits(holdout=parts[0], report=parts[1], optimise=parts[2])


def encoder_noise(
  encode: Callable[..., Any],
  params: Any,
  tokens: Any,
  *,
  eps: float = 0.03,
  profile: str = "token",
  num_steps: int = 200,
  key: PRNGKeyArray,
  objective: str = "criterion",
  lr: float = 0.02,
  batch_size: int = 128,
  start_radius: float = 0.05,
  growth: float = 1.25,
  max_radius: float = 100.0,
  num_bisections: int = 5,
  confidence: float = 0.95,
) -> NoiseResult:
  r"""One noise for all inputs that changes outputs by at most eps on average.

  .. math:: \max_{w, r} r \quad \text{with} \quad v_n = r s w_n,\;
            \|w_n\| = 1,\; \bar w_n = 0,\; \overline{crit}(v) \le \epsilon

  crit as of :func:`criterion`, s the median length of centred tokens. Without
  the constraints on w the norm has no maximum in a network that begins with
  LayerNorms: what is constant over channels they remove, and one token may be
  destroyed at a bounded cost.

  Formal guarantees:
    - ``approximate``: the one-sided upper bound of the mean criterion on
      hold-out items is at most eps (``confidence``, of that one test: stages
      are tried one after the other, so look at the report items as well).
    - ``converged``: and at the next radius it was not.

  What is *not* claimed: that the radius is the largest possible (the problem is
  not convex), that a single input changes little, or any robustness. The set is
  not symmetric: -v is mostly no nullspace noise. Of a model of several
  modalities eps bounds noise on one of them, the others as they are: noise on
  several at a time is bounded by nothing. With other inputs, or items that do
  not count, use :func:`search` and :class:`Items`.

  Args:
    encode: ``encode(params, tokens) -> logits [n, k]``; bfloat16 is judged in
      float32. It is a static argument of a jitted search: every new lambda, or
      method of a new object that is not equal, is compiled again.
    params: pytree; constants.
    tokens: ``[n, N, d]``, split at random into 512 hold-out items, 1,000 to
      report on, and the rest; or :class:`Splits`.
    eps: tolerance on the mean criterion.
    profile: ``token``; or ``global``, for comparison: nearly all of it goes to
      few tokens. A network with RMSNorm sees the mean over channels; noise is
      then merely restricted to what has none.
    num_steps: of Adam at each radius.
    key: typed.
    objective: what the steps descend: ``criterion``, ``logit_l2``,
      ``logit_sq`` or ``kl``. The criterion judges, whatever it is.
    lr: of Adam, divided by max(1, r), along a cosine to 0.
    batch_size: of a step.
    start_radius: the first r; halved up to 6 times where it fails.
    growth: of r, until it fails.
    max_radius: where the search ends.
    num_bisections: of the last bracket.
    confidence: of the bound; 0.5 for the mean itself.

  Returns:
    See :class:`NoiseResult`.

  Raises:
    ValueError: naming the argument: a number out of range, fewer than 64
      hold-out items, splits that share items, tokens not ``[n, N, d]``, of one
      channel, or with the same value in all channels (s is 0).
  """
  settings = Search(
    eps=eps,
    profile=profile,
    objective=objective,
    num_steps=num_steps,
    lr=lr,
    batch_size=batch_size,
    start_radius=start_radius,
    growth=growth,
    max_radius=max_radius,
    num_bisections=num_bisections,
    confidence=confidence,
  )
  split_key, key = jax.random.split(key)
  splits = tokens
  if not isinstance(tokens, Splits):
    check_tokens(tokens=tokens)
    splits = split_items(tokens, split_key)
  check_splits(splits)
  tokens_lib.check_channels(splits.optimise)
  if not tokens_lib.scale(splits.optimise) > 0:
    raise ValueError(
      "tokens must differ over channels: s, the median length of centred "
      "tokens, is 0, and so is noise of any radius."
    )
  found = _search(
    encode,
    settings,
    params,
    Items(tokens=splits.optimise),
    Items(tokens=splits.holdout),
    key,
  )
  noise = found.noise
  mean, agreement = _score(
    encode, params, Items(tokens=splits.report), noise, settings.chunk_size
  )
  stages = int(found.num_stages)
  return NoiseResult(
    noise=noise[None],
    radius=float(found.radius),
    norm=float(jnp.linalg.norm(noise)),
    criterion=float(mean),
    criterion_upper=float(found.upper),
    agreement=float(agreement),
    eps=float(eps),
    bracket=(float(found.radius), float(found.failed)),
    status=STATUSES[int(found.status)],
    history={
      "radius": np.asarray(found.radii)[:stages].tolist(),
      "upper": np.asarray(found.uppers)[:stages].tolist(),
      "optimised": np.asarray(found.optimised)[:stages].tolist(),
    },
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _search(encode, settings, params, optimise, holdout, key):
  return searching.search(encode, params, optimise, holdout, settings, key)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _score(encode, params, items, noise, chunk_size):
  """(mean criterion, agreement)."""
  clean = criteria.in_chunks(encode, params, items, None, chunk_size)
  noisy = criteria.in_chunks(encode, params, items, noise, chunk_size)
  same = jnp.argmax(clean, axis=-1) == jnp.argmax(noisy, axis=-1)
  values = criteria.change(clean, noisy, "criterion")
  return items.mean(values), items.mean(same.astype(jnp.float32))


def check_splits(splits: Splits) -> None:
  """ValueError where splits differ in shape, are too small or share items."""
  check_tokens(**splits._asdict())
  shapes = {part.shape[1:] for part in splits}
  if len(shapes) > 1:
    raise ValueError(f"tokens must have one shape in all splits, got {shapes}.")
  if len(splits.holdout) < searching.MIN_HOLDOUT:
    raise ValueError(
      f"holdout must have at least {searching.MIN_HOLDOUT} items to judge by, "
      f"got {len(splits.holdout)}."
    )
  seen = {}
  for name, part in splits._asdict().items():
    rows = {row.tobytes() for row in np.asarray(part)}
    for other, there in seen.items():
      if not rows.isdisjoint(there):
        raise ValueError(
          f"tokens: the splits {other} and {name} share "
          f"{len(rows & there)} items; what decides must be new."
        )
    seen[name] = rows


def check_tokens(**arguments) -> None:
  """ValueError where an argument is not ``[n, N, d]``."""
  for name, value in arguments.items():
    if getattr(value, "ndim", 0) != 3 or 0 in value.shape:
      raise ValueError(
        f"{name} must be [n, N, d], got shape {getattr(value, 'shape', None)}."
      )


def published_result(
  encode: Callable,
  params: Any,
  report: Any,
  noise: Any,
  *,
  eps: float,
  reached: bool,
  history: dict[str, list],
) -> NoiseResult:
  """The result of a procedure that has no bound, scored on ``report``."""
  items = Items(tokens=report)
  mean, agreement = _score(encode, params, items, noise, Search.chunk_size)
  radius = float(tokens_lib.relative_radius(noise, tokens_lib.scale(report)))
  return NoiseResult(
    noise=noise[None],
    radius=radius,
    norm=float(jnp.linalg.norm(noise)),
    criterion=float(mean),
    criterion_upper=math.nan,
    agreement=float(agreement),
    eps=float(eps),
    bracket=(math.nan, math.nan),
    status="early_stopped" if reached else "not_reached",
    history=history,
  )
