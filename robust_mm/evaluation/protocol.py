"""What an evaluation measures, as one frozen value."""

import dataclasses
import math
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from robust_mm import _validate
from robust_mm import certification
from robust_mm import corruptions as corruptions_lib
from robust_mm import missing as missing_lib
from robust_mm import modalities as modalities_lib

DEFAULT_RADII = {
  2: (0.1, 0.25, 0.5, 0.75, 1.0, 1.5),
  math.inf: (0.01, 0.02, 0.05, 0.1, 0.2),
}
DEFAULT_ATTACK = {
  "name": "pgd",
  "loss": "margin",
  "num_steps": 50,
  "num_restarts": 5,
}
DEFAULT_TIGHTNESS = (1.0, 1.2, 1.5, 2.0, 3.0)
CERTIFICATES = (
  "auto",
  "global",
  *certification.BALL_SOURCES,
  "empirical",
  "smoothing",
  None,
)
DEFAULT_SMOOTHING = {
  "sigma": 0.25,
  "keep": {},
  "num_selection": 100,
  "num_estimation": 1000,
  "chunk_size": 1000,
  "alpha": 1e-3,
}
CORRUPTION_SETTINGS = (
  "kinds",
  "severities",
  "modalities",
  "correlated",
  "share",
  "forms",
  "unknown",
)
MISSING_PROTOCOLS = ("per_sample", "one_kept", "per_batch", "frames")
_CAPTION_COUNTS = (
  "num_substitutions",
  "num_steps",
  "num_restarts",
  "num_queries",
)
CAPTION_SETTINGS = ("target", "threshold", *_CAPTION_COUNTS)
# Of ``corruptions.suite``, by name.
_SUITES = {
  "suite": {},
  "together": {"modalities": "all"},
  "correlated": {"modalities": "all", "correlated": True},
}
# Every subset of 6 modalities is 63 forward passes over the data.
MAX_MODALITIES_ALL_SUBSETS = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
  """What is measured and how; made by :func:`standard`.

  Attributes:
    radii: joint attack radii, ascending.
    modality_radii: radii for one modality alone, ascending: a tuple for every
      modality, or ``{m: tuple}``.
    norm: 2 or ``math.inf``, of attacks and certificates: the size of a change
      is that norm of all modalities together, each divided by its unit.
    attacks: keyword arguments of each attack, its factory under ``"name"``.
    units: None (raw), ``"relative"`` or ``{m: size of one unit}``.
    certificate: one of ``CERTIFICATES``.
    smoothing: settings of the last one, or None.
    subsets: True for every non-empty subset, False for none, or the subsets.
    valid_range: ``{m: (low, high)}`` attacks stay in, or None.
    batch_size: examples a device call, at most.
    max_examples: evenly spaced examples of the data to use, or None for all.
    survivors_only: attack an example only until a smaller or contained
      perturbation has broken it; it counts as broken from there on.
    tightness: multiples of each example's own joint radius to attack at.
    masking_examples: so many examples for :func:`evaluation.masking_report`.
    masking_thorough: that report with its costly checks.
    missing_rates: of the missing-rate curve, ascending.
    missing_protocol: of ``robust_mm.missing``, one of ``MISSING_PROTOCOLS``.
    missing_seeds: masks a rate.
    corruptions: arguments of ``corruptions.suite``, or None for no table.
    mispair: of captioners, whether modalities are shifted against each other.
    captions: of captioners, further arguments of ``caption_report``, or None.
  """

  radii: tuple[float, ...]
  modality_radii: Any
  norm: Any
  attacks: tuple[Mapping[str, Any], ...]
  units: Any
  certificate: str | None
  smoothing: Mapping[str, Any] | None
  subsets: Any
  valid_range: Any
  batch_size: int
  max_examples: int | None
  survivors_only: bool
  tightness: tuple[float, ...]
  masking_examples: int
  masking_thorough: bool
  missing_rates: tuple[float, ...]
  missing_protocol: str
  missing_seeds: int
  corruptions: Mapping[str, Any] | None
  mispair: bool
  captions: Mapping[str, Any] | None = None

  def modality_grid(self, modality: str) -> tuple[float, ...]:
    """The radii at which ``modality`` alone is attacked."""
    if isinstance(self.modality_radii, Mapping):
      return self.modality_radii.get(modality, ())
    return self.modality_radii

  def subset_names(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The subsets of ``names`` to evaluate, small ones first.

    Above six modalities ``subsets=True`` means: one alone, all but one, all.
    """
    names = modalities_lib.names(names)
    if self.subsets is False:
      return ()
    if self.subsets is not True:
      for subset in self.subsets:
        _validate.known(names, subsets=subset)
      return tuple(modalities_lib.names(subset) for subset in self.subsets)
    every = modalities_lib.subsets
    if len(names) <= MAX_MODALITIES_ALL_SUBSETS:
      return every(names)
    alone = tuple((name,) for name in names)
    return alone + every(names, min_size=len(names) - 1)

  @property
  def checks_masking(self) -> bool:
    """Whether there is an attack to check, and that is wanted."""
    return bool(self.masking_examples and self.attacks and self.radii)

  @property
  def middle_radius(self) -> float:
    """The middle one of the joint radii; there must be one."""
    return self.radii[len(self.radii) // 2]

  @property
  def settings(self) -> dict:
    """The same as plain values for JSON; infinity becomes ``"inf"``."""
    return {
      field.name: jsonable(getattr(self, field.name))
      for field in dataclasses.fields(self)
    }


def standard(
  *,
  radii: Sequence[float] | None = None,
  modality_radii: Any = None,
  norm: Any = 2,
  attack: Any = DEFAULT_ATTACK,
  units: Any = None,
  certificate: str | None = "auto",
  smoothing: Mapping[str, Any] | None = None,
  subsets: Any = True,
  valid_range: Any = None,
  batch_size: int = 512,
  max_examples: int | None = None,
  survivors_only: bool = True,
  tightness: Sequence[float] = DEFAULT_TIGHTNESS,
  masking_examples: int = 64,
  masking_thorough: bool = False,
  missing_rates: Sequence[float] = (),
  missing_protocol: str = "per_sample",
  missing_seeds: int = 5,
  corruptions: Any = None,
  mispair: bool = True,
  captions: Mapping[str, Any] | None = None,
) -> Protocol:
  """Clean, every subset of modalities, attacked and certified accuracy.

  >>> standard(radii=(0.25, 0.1)).radii
  (0.1, 0.25)

  Args:
    radii: joint radii: all modalities share one ball. Empty for none; by
      default 0.1 to 1.5, in the norm infinity 0.01 to 0.2.
    modality_radii: radii for each modality alone: one sequence for all,
      ``{m: sequence}``, or None for the joint ones. Empty for none.
    norm: 2 or infinity (``math.inf`` or ``"inf"``), of attacks and
      certificates. A bound on the largest entry comes from the l2 one, divided
      by the root of the number of inputs: sound, and further from the attacks.
    attack: ``{"name": factory in robust_mm.attacks, **its keyword arguments}``
      without norm, budget, units and valid_range; a sequence of such; or None
      for no attack.
    units: sizes are divided by these: None for raw, ``{m: size}``, or
      ``"relative"``, the median distance to the mean over the reference data,
      in ``norm``.
    certificate: a source of ``certify``: ``"global"``, ``"local"``,
      ``"relaxation"``, ``"best"`` (sound), ``"empirical"`` (estimated, never
      called certified); ``"smoothing"`` (any model; the results have an entry
      of their own for it), None, or ``"auto"``: ``"global"`` where the model
      allows it, else ``"empirical"``.
    smoothing: with that certificate, ``{"sigma", "keep", "num_selection",
      "num_estimation", "chunk_size", "alpha"}`` of ``robust_mm.smoothing``,
      sigma in units; 0.25, {}, 100, 1000, 1000 and 1e-3 where not named.
    subsets: True, False, or a sequence of sequences of modality names.
    valid_range: ``{m: (low, high)}`` or ``(low, high)`` attacks stay in.
    batch_size: examples a device call, at most.
    max_examples: use so many evenly spaced examples; None for all.
    survivors_only: skip what a smaller perturbation has already broken.
    tightness: with an attack and a certificate, also attack each example at
      these multiples of its own joint radius, the first attack only. At most 1
      nothing may flip. Empty for none.
    masking_examples: with an attack and a joint radius, check on so many
      examples that gradients do not mislead the first attack, at the middle one
      of the radii: :func:`masking_report` without its single step. With fewer
      than 20 it stays open. 0 for no check.
    masking_thorough: with all of that report, ``thorough=True``: a dozen more
      attacks on these examples.
    missing_rates: shares of what is lost, at which accuracy is measured. Empty
      for none.
    missing_protocol: of ``robust_mm.missing``: ``"per_sample"`` (cells at an
      exact rate, one modality of an example at least stays), ``"one_kept"``
      (one is kept, others by chance), ``"per_batch"`` (32 rows lose the same;
      three modalities, rates of its table) or ``"frames"`` (of every modality
      that has time, every frame by chance).
    missing_seeds: so many masks a rate, of the seeds 0, 1, ...
    corruptions: ``"suite"`` for every kind on one modality at a time,
      ``"together"`` on all at once, ``"correlated"`` where they share who, when
      and how much; or ``{"kinds", "severities", "modalities", "correlated",
      "share", "forms", "unknown"}`` of ``corruptions.suite`` (all of it where
      not named); None for none.
    mispair: of models that spell captions, as ``caption_report`` takes it.
    captions: likewise ``{"target", "threshold", "num_substitutions",
      "num_steps", "num_restarts", "num_queries"}``, its defaults where not
      named.

  Returns:
    A frozen :class:`Protocol`.

  Raises:
    ValueError: a bad value, naming the argument.
  """
  norm = _norm(norm)
  radii = _radii(DEFAULT_RADII[norm] if radii is None else radii, "radii")
  if modality_radii is None:
    modality_radii = radii
  elif isinstance(modality_radii, Mapping):
    modality_radii = {
      name: _radii(values, "modality_radii")
      for name, values in modality_radii.items()
    }
  else:
    modality_radii = _radii(modality_radii, "modality_radii")
  _validate.one_of(CERTIFICATES, certificate=certificate)
  _validate.at_least(1, batch_size=batch_size)
  if max_examples is not None:
    _validate.at_least(1, max_examples=max_examples)
  _validate.at_least(0, masking_examples=masking_examples)
  _validate.at_least(1, missing_seeds=missing_seeds)
  _validate.one_of(MISSING_PROTOCOLS, missing_protocol=missing_protocol)
  _check_units(units)
  norm = _norm(norm)
  smoothing = _smoothing(smoothing, certificate, norm)
  return Protocol(
    radii=radii,
    modality_radii=modality_radii,
    norm=norm,
    attacks=_attacks(attack),
    units=units,
    certificate=certificate,
    smoothing=smoothing,
    subsets=_subsets(subsets),
    valid_range=valid_range,
    batch_size=int(batch_size),
    max_examples=max_examples,
    survivors_only=bool(survivors_only),
    tightness=_radii(tightness, "tightness"),
    masking_examples=int(masking_examples),
    masking_thorough=bool(masking_thorough),
    missing_rates=_rates(missing_rates, missing_protocol),
    missing_protocol=missing_protocol,
    missing_seeds=int(missing_seeds),
    corruptions=_corruptions(corruptions),
    mispair=bool(mispair),
    captions=_captions(captions),
  )


def jsonable(value: Any) -> Any:
  """Plain Python values JSON can hold; infinity and NaN as strings."""
  if isinstance(value, Mapping):
    return {str(key): jsonable(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [jsonable(item) for item in value]
  if hasattr(value, "tolist"):
    return jsonable(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  return str(value)


def _radii(values, name: str) -> tuple[float, ...]:
  radii = tuple(sorted({float(value) for value in values}))
  for radius in radii:
    _validate.positive(**{name: radius})
  return radii


def _rates(values, kind: str) -> tuple[float, ...]:
  rates = tuple(sorted({float(value) for value in values}))
  for rate in rates:
    _validate.in_unit_interval(missing_rates=rate)
    if kind == "per_batch":
      _validate.one_of(missing_lib.PER_BATCH, missing_rates=rate)
  return rates


def _corruptions(given) -> dict | None:
  if given is None:
    return None
  if isinstance(given, str):
    _validate.one_of(_SUITES, corruptions=given)
    return dict(_SUITES[given])
  for name in given:
    _validate.one_of(CORRUPTION_SETTINGS, corruptions=name)
  # Refused now, and not after the attacks.
  corruptions_lib.suite({"any": (2, 2)}, **{**given, "forms": None})
  return dict(given)


def _captions(given) -> dict | None:
  if given is None:
    return None
  for name in given:
    _validate.one_of(CAPTION_SETTINGS, captions=name)
  if "threshold" in given:
    _validate.in_unit_interval(**{"captions.threshold": given["threshold"]})
  for name in _CAPTION_COUNTS:
    if name in given:
      _validate.at_least(1, **{f"captions.{name}": given[name]})
  return dict(given)


def _norm(norm):
  if norm in (math.inf, "inf", "linf"):
    return math.inf
  _validate.one_of((2, math.inf), norm=norm)
  return 2


def _smoothing(given, certificate, norm):
  if certificate != "smoothing":
    if given is not None:
      raise ValueError("smoothing goes with certificate='smoothing'.")
    return None
  if norm != 2:
    raise ValueError("norm must be 2 with certificate='smoothing'.")
  for name in given or {}:
    _validate.one_of(DEFAULT_SMOOTHING, smoothing=name)
  chosen = {**DEFAULT_SMOOTHING, **(given or {})}
  for name in ("num_selection", "num_estimation", "chunk_size"):
    _validate.at_least(1, **{f"smoothing[{name!r}]": chosen[name]})
  if not 0 < chosen["alpha"] < 1:
    raise ValueError(
      f"smoothing['alpha'] must lie in (0, 1), got {chosen['alpha']}."
    )
  return chosen


def _attacks(attack) -> tuple[Mapping[str, Any], ...]:
  if attack is None:
    return ()
  attacks = (attack,) if isinstance(attack, Mapping) else tuple(attack)
  for given in attacks:
    if not isinstance(given, Mapping) or "name" not in given:
      raise ValueError(
        "attack must be a mapping with a 'name', such as "
        f"{DEFAULT_ATTACK}; got {given!r}."
      )
    reserved = {"norm", "budget", "units", "valid_range"} & set(given)
    if reserved:
      raise ValueError(
        f"attack must not set {sorted(reserved)[0]!r}; it is an argument of "
        "the protocol."
      )
  return tuple(dict(given) for given in attacks)


def _subsets(subsets):
  if isinstance(subsets, bool):
    return subsets
  chosen = tuple(tuple(subset) for subset in subsets)
  if any(not subset for subset in chosen):
    raise ValueError("subsets must not contain the empty subset.")
  return chosen


def _check_units(units):
  if units is None:
    return
  if isinstance(units, str):
    _validate.one_of(("relative",), units=units)
    return
  for name, size in units.items():
    _validate.positive(**{f"units[{name!r}]": size})
