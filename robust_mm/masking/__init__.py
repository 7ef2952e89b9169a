r"""Destructive gradients, let in only where measured curvature allows it.

:func:`curvature_mask` is an optax transformation around an optimiser. It takes
a second gradient q (collapse, unlearning, an adversarial push) beside the
ordinary one and adds it block by block where a *gate* is open::

  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    masking.curvature_mask(
      optax.adamw(1e-3),
      lambda params: {m: jax.tree.map(lambda _: m, params[m]) for m in params},
      gate=masking.hessian_gate(tau=0.5),
    ),
  )
  updates, opt_state = tx.update(
    g, opt_state, params, destructive=q, value_fn=lambda params: J(params)
  )

Gates are values: :func:`hessian_gate` looks at the smallest curvature of a
block, :func:`directional_gate` at that along q, :func:`fisher_mask` lets q pass
where the task is insensitive, :func:`published_gate` is always open, and
:func:`random_gate` closes by chance: the control.

What may be claimed: *closed* certifies a direction of curvature below the
printed threshold for this loss, batch and precision (``hessian_gate``); *open*
is certified with the stated probability over the start vector where the verdict
says open. That gating helps training is for an ablation to show, against a
:func:`random_gate` that closes as often; nothing here is a certificate of
robustness.

Inside, each module imports only from those before it: gates, blocks, measures,
policies, state, transformation.

References:
  `Fu et al. (2026) <https://arxiv.org/abs/2602.16197>`_, the idea;
  `Ghorbani, Krishnan & Xiao (2019) <https://arxiv.org/abs/1901.10159>`_;
  `Kirkpatrick et al. (2017) <https://arxiv.org/abs/1612.00796>`_, the diagonal
  Fisher as a guard of coordinates.
"""

from robust_mm.masking.gates import CLOSED
from robust_mm.masking.gates import OPEN
from robust_mm.masking.gates import UNDECIDED
from robust_mm.masking.gates import VERDICTS
from robust_mm.masking.gates import directional_gate
from robust_mm.masking.gates import fisher_mask
from robust_mm.masking.gates import hessian_gate
from robust_mm.masking.gates import published_gate
from robust_mm.masking.gates import random_gate
from robust_mm.masking.state import CurvatureMaskState
from robust_mm.masking.state import gate_report
from robust_mm.masking.transformation import curvature_mask

__all__ = [
  "CLOSED",
  "OPEN",
  "UNDECIDED",
  "VERDICTS",
  "CurvatureMaskState",
  "curvature_mask",
  "directional_gate",
  "fisher_mask",
  "gate_report",
  "hessian_gate",
  "published_gate",
  "random_gate",
]
