"""Penalties by name, for configurations."""

from typing import Any

from robust_mm import _validate
from robust_mm.losses import dispersions
from robust_mm.losses import levels
from robust_mm.losses import penalties
from robust_mm.losses.penalties import Penalty

_FACTORIES = {
  "wrong_class_dispersion": dispersions.wrong_class_dispersion,
  "complement_kl": dispersions.complement_kl,
  "sorted_slice_dispersion": dispersions.sorted_slice_dispersion,
  "topk_level": levels.topk_level,
  "topk_dispersion": dispersions.topk_dispersion,
  "topk_margin": levels.topk_margin,
  "label_smoothing": penalties.label_smoothing,
  "confidence_penalty": penalties.confidence_penalty,
  "logit_norm": penalties.logit_norm,
}


def penalty_names() -> tuple[str, ...]:
  """The names that :func:`penalty` knows."""
  return tuple(_FACTORIES)


def penalty(name: str, **options: Any) -> Penalty:
  """The penalty of that name, for configurations.

  Raises:
    ValueError: an unknown name or option, or what the factory refuses.

  >>> penalty("topk_level", window=(0, 2)).window
  (0, 2)
  """
  _validate.one_of(_FACTORIES, name=name)
  try:
    return _FACTORIES[name](**options)
  except TypeError as error:
    raise ValueError(f"options of the penalty {name!r}: {error}.") from error
