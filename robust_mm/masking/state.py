"""The state of a curvature mask, and what it says of its gates."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import PyTree


class CurvatureMaskState(NamedTuple):
  """A plain pytree; saved and restored, it gives the same gates.

  Attributes:
    count: int32, updates so far; a refresh is due where ``period`` divides it.
    key: typed; a refresh uses ``fold_in(key, count)``.
    gates: ``{label: bool}``, True for open, since the last refresh.
    verdicts: ``{label: int8}``, positions in ``VERDICTS``.
    evidence: ``{label: {name: float32}}``, what the gate measured: ``rho_min``
      and ``rho_max``; ``cosine``; or ``threshold``, ``kept_share`` and
      ``zero_share``; nothing for a gate that measures nothing. NaN before the
      first refresh.
    closed_count: ``{label: int32}``, updates with a closed gate.
    nonfinite_count: ``{label: int32}``, updates whose destructive gradient was
      left out of the block as not finite, and refreshes without a finite
      result.
    fisher: like the parameters, float32, zero in blocks without a gate; None
      without a Fisher mask.
    inner_state: of the optimiser; ``(inner, destructive)`` for policy
      ``"separate"``.
  """

  count: Any
  key: Any
  gates: Any
  verdicts: Any
  evidence: Any
  closed_count: Any
  nonfinite_count: Any
  fisher: Any
  inner_state: Any


def gate_report(opt_state: PyTree) -> dict[str, dict[str, Array]]:
  """What the gates do, by label, from the state of any chain around a mask.

  Returns:
    ``{label: {"verdict", "gate", "rate", "nonfinite", ...}}``, scalars, fit for
    a jitted step: the code of the verdict (``VERDICTS[code]``), whether the
    gate is open, the share of updates so far with a closed gate (of a Fisher
    mask, the share of parameters masked out), the count of what was not finite,
    and what was measured (``CurvatureMaskState.evidence``). Labels of a second
    mask, nested or later in a chain, begin with ``"2/"``, and so on.

    A ``rate`` below .05 or above .95 says that the gate decides nothing.

  Raises:
    ValueError: naming ``opt_state`` if no mask is in it.
  """
  found = _masks(opt_state)
  if not found:
    raise ValueError("opt_state must hold the state of a curvature_mask.")
  report = {}
  for index, state in enumerate(found):
    prefix = f"{index + 1}/" if index else ""
    for label in state.gates:
      report[prefix + label] = _line(state, label)
  return report


def _masks(tree) -> list[CurvatureMaskState]:
  is_mask = lambda node: isinstance(node, CurvatureMaskState)  # noqa: E731
  found = []
  for node in jax.tree.leaves(tree, is_leaf=is_mask):
    if is_mask(node):
      found += [node, *_masks(node.inner_state)]
  return found


def _line(state, label):
  evidence = state.evidence[label]
  steps = jnp.maximum(state.count, 1).astype(jnp.float32)
  rate = state.closed_count[label].astype(jnp.float32) / steps
  if "kept_share" in evidence:
    rate = 1 - jnp.where(state.gates[label], evidence["kept_share"], 0)
  return {
    "verdict": state.verdicts[label],
    "gate": state.gates[label],
    "rate": rate,
    "nonfinite": state.nonfinite_count[label],
    **evidence,
  }
