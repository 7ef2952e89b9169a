"""The strongest attack there is here: several, the cheap ones first."""

import dataclasses
from typing import Any

import jax

from robust_mm import _validate
from robust_mm.attacks import ascent
from robust_mm.attacks import base
from robust_mm.attacks import boundaries
from robust_mm.attacks import gradient
from robust_mm.attacks import losses
from robust_mm.attacks import queries

# Of a run of strength 1; Auto-PGD on the cross-entropy takes twice the steps.
NUM_STEPS = 25
NUM_QUERIES = 400


def auto(
  *,
  norm: Any,
  budget: Any,
  strength: int = 1,
  valid_range: Any = None,
  units: Any = None,
) -> base.Attack:
  r"""The ensemble to report robust accuracy with.

  In this order, each on what the ones before it have not broken:

  ================ =========================================================
  ``pgd``          two aimed restarts on the margin, the cheapest first blow
  ``apgd_ce``      Auto-PGD on the cross-entropy, any class
  ``apgd_dlr``     Auto-PGD on the ratio of logits, each rival class in turn
  ``minimum_norm`` the boundary to each rival class in turn
  ``pgd_margin``   a restart on the margin for each rival class
  ``square``       random search without gradients
  ================ =========================================================

  Called like any attack, also under ``jit``, every member runs on every example
  and the best point is returned. :func:`attacks.attack_survivors` (and
  ``evaluate``, and the command line) run a member on the survivors only, at a
  fraction of the cost, and tell what each has broken. Both are deterministic in
  the key, but do not draw the same random numbers.

  >>> list(auto(norm=2, budget=0.5).members)[:3]
  ['pgd', 'apgd_ce', 'apgd_dlr']

  Args:
    norm: 2 or ``"l2"``; infinity or ``"linf"``.
    budget: a number, one joint ball over all float modalities; or a mapping,
      one ball for each modality it names. See :class:`attacks.Attack`.
    strength: multiplies the steps and queries of every member, 1 for one look
      at a model, 4 and more for a number to publish.
    valid_range: ``(low, high)`` for all modalities or ``{m: (low, high)}``.
    units: ``{m: size of one unit}``, 1 where not named.

  Returns:
    A frozen :class:`attacks.Attack` with ``members``.

  Raises:
    ValueError: a bad value, naming the argument.

  References:
    `Croce & Hein (2020) <https://arxiv.org/abs/2003.01690>`_, section 5.
  """
  _validate.at_least(1, strength=strength)
  num_steps = NUM_STEPS * int(strength)
  common = {
    "norm": norm,
    "budget": budget,
    "valid_range": valid_range,
    "units": units,
  }
  aimed = {"targets": "rivals", "num_steps": num_steps, **common}
  members = {
    "pgd": gradient.pgd(num_restarts=2, num_steps=num_steps, **common),
    "apgd_ce": ascent.apgd(num_steps=2 * num_steps, **common),
    "apgd_dlr": ascent.apgd(loss="dlr", **aimed),
    "minimum_norm": boundaries.minimum_norm(**aimed),
    "pgd_margin": gradient.pgd(num_restarts=9, **aimed),
    "square": queries.square(num_queries=NUM_QUERIES * int(strength), **common),
  }
  options = {
    "strength": int(strength),
    "members": {name: _own(member) for name, member in members.items()},
  }

  def search(key, objective):
    best = objective.nothing_found()
    for number, member in enumerate(members.values()):
      own = dataclasses.replace(objective, loss=losses.get(member.loss))
      delta = member.search(jax.random.fold_in(key, number), own)
      delta = objective.region.project(delta)
      best = best.updated(delta, objective(delta))
    return best.delta

  return base.make_attack(
    "auto",
    loss="margin",
    options=options,
    search=search,
    members=members,
    **common,
  )


def _own(member):
  shared = ("norm", "budget", "valid_range", "units")
  return {k: v for k, v in member.settings.items() if k not in shared}
