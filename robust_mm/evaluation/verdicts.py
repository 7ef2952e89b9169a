"""From what attacks left to checks that passed or not, each with a sentence."""

import itertools
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

# Shares of accuracy, as far as the number of examples can tell.
TOLERANCE = 0.01
SATURATED = 0.02
RESCALED = 0.005
# With fewer one example is more than any difference that is looked for.
MIN_EXAMPLES = 20
CONCLUSIVE = "conclusive"


def least(num_examples: int, tolerance: float = TOLERANCE) -> float:
  """The smallest difference of shares that counts."""
  return max(tolerance, 1 / num_examples) + 1e-6


def check(name: str, passed: Any, message: str) -> dict[str, Any]:
  """One entry of ``"checks"``."""
  return {"name": name, "passed": bool(passed), "message": message}


def conclusive(
  num_examples: int, attacked: Mapping[str, float], far: float | None = None
) -> dict[str, Any]:
  """Whether the other checks could have failed; says why they could not.

  Args:
    num_examples: attacked.
    attacked: ``{"clean", "white box"}``, the shares left.
    far: the radius from which copies of other examples break something; None
      where none were tried.
  """
  clean, white = attacked["clean"], attacked["white box"]
  reasons = []
  if num_examples < MIN_EXAMPLES:
    reasons.append(
      f"{num_examples} examples are too few, {MIN_EXAMPLES} are needed."
    )
  if clean - white <= least(num_examples):
    reasons.append(
      f"The attack takes accuracy from {clean:.0%} to {white:.0%} only: the "
      "size is too small to tell, or the attack broken."
    )
  if far is not None and not far:
    reasons.append("No copy of an example with another label breaks anything.")
  message = " ".join(reasons) or (
    f"The attack takes accuracy from {clean:.0%} to {white:.0%}, on "
    f"{num_examples} examples."
  )
  return check(CONCLUSIVE, not reasons, message)


def gradients_exist(
  clean: np.ndarray, movable: np.ndarray, norms: np.ndarray
) -> dict[str, Any]:
  """Of the right examples that can be moved; each needs a slope.

  Args:
    clean: ``bool[n]``, who is right.
    movable: ``bool[n]``, who has an input with a gradient.
    norms: ``float[n]``, of the gradient of the margin.
  """
  judged = clean & movable
  lost = int(np.sum(judged & ~(np.isfinite(norms) & (norms > 0))))
  return check(
    "gradients_exist",
    not lost,
    f"The gradient of the margin is zero or not finite for {lost} of "
    f"{int(judged.sum())} examples.",
  )


def reaches_chance(
  last: tuple[float, float], copied: float, num_classes: int, least: float
) -> dict[str, Any]:
  """Of ``(radius, share left)`` where copies of others leave ``copied``."""
  radius, left = last
  return check(
    "reaches_chance",
    left <= max(1 / num_classes, copied) + least,
    f"At size {radius:.3g} the attack leaves {left:.0%} right; chance is "
    f"{1 / num_classes:.0%}, copying another example leaves {copied:.0%}.",
  )


def falls_with_radius(
  points: Sequence[tuple[float, float]], least: float
) -> dict[str, Any]:
  """Of ``(radius, share left)``, the radii ascending."""
  rises = [b - a for (_, a), (_, b) in itertools.pairwise(points)]
  listed = ", ".join(f"{share:.0%} at {r:.3g}" for r, share in points)
  return check(
    "falls_with_radius",
    max(rises, default=0.0) <= least,
    f"From size {points[0][0]:.3g} on it leaves {listed}.",
  )


def rivals(attacked: Mapping[str, float], least: float) -> list[dict[str, Any]]:
  """Of what the attack, one step, random search and noise leave."""
  clean, white = attacked["clean"], attacked["white box"]
  noise = attacked["noise"]
  return [
    *(
      check(
        name,
        white <= attacked[other] + least,
        f"The attack leaves {white:.0%}, {words} {attacked[other]:.0%}.",
      )
      for name, other, words in (
        ("many_steps_beat_one", "one step", "one step"),
        ("gradients_beat_queries", "queries", "random search"),
      )
      if other in attacked
    ),
    check(
      "attack_beats_noise",
      clean - noise <= (clean - white) / 2 + least,
      f"Noise takes accuracy from {clean:.0%} to {noise:.0%}, the "
      f"attack to {white:.0%}: where noise does as much, the size is too "
      "large or the attack broken.",
    ),
  ]


def scale(
  loss: str, found: Sequence[tuple[float, float]], num_examples: int
) -> dict[str, Any]:
  """Of ``(divisor of the logits, share left)`` under one loss."""
  whole, *divided = (share for _, share in found)
  if loss != "cross_entropy":
    spread = max(abs(share - whole) for share in divided)
    return check(
      f"{loss}_ignores_scale",
      spread <= least(num_examples, RESCALED),
      f"Divided logits change what the attack on the {loss} loss leaves by up "
      f"to {spread:.0%}.",
    )
  best = min(divided)
  return check(
    "cross_entropy_unsaturated",
    whole - best <= max(SATURATED, least(num_examples)),
    f"The attack on the cross-entropy leaves {whole:.0%}, with divided logits "
    f"{best:.0%}: a loss with the margin sees more.",
  )


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
  """The one line of a report."""
  failed = [check for check in found["checks"] if not check["passed"]]
  where = f"{found['num_examples']} examples at size {found['radius']:g}"
  said = " ".join(check["message"] for check in failed)
  if not failed:
    message = (
      f"No sign that gradients mislead the attacks: {where}, random search "
      f"left {found['accuracy']['queries']:.0%}, noise "
      f"{found['accuracy']['noise']:.0%}, the attack "
      f"{found['accuracy']['white box']:.0%}."
    )
  elif [check["name"] for check in failed] == [CONCLUSIVE]:
    message = f"Whether gradients mislead the attacks is open: {said} ({where})"
  else:
    message = (
      "Gradients may mislead the attacks, so attacked accuracies are too high: "
      f"{said} ({where})"
    )
  return {
    "name": "gradients_do_not_mislead",
    "passed": not failed,
    "required": False,
    "message": message,
  }
