"""What is done to an input before the base classifier sees it, as values."""

import dataclasses
import math
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm import modalities
from robust_mm._types import Inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
  """Gaussian noise on some modalities, sub-sampling of others.

  Made by :func:`gaussian`, :func:`subsample` and :func:`mixed`; hashable, so it
  can be a static argument of a jitted function.

  Attributes:
    sigma: standard deviation in raw input values, of every modality that is
      not sub-sampled, or ``((m, sigma), ...)`` with 0 where not named.
    keep: ``((m, number of elements that are kept), ...)``.
    axes: ``((m, axes of one input that number its elements), ...)``; by default
      all but the last, or the only one.
    fill: what dropped elements become.
    masked: modalities that get a mask channel.
  """

  sigma: Any = 0.0
  keep: tuple[tuple[str, int], ...] = ()
  axes: tuple[tuple[str, tuple[int, ...]], ...] = ()
  fill: float = 0.0
  masked: tuple[str, ...] = ()

  def kept(self, name: str) -> int | None:
    """How many elements of a modality are kept; None for all of them."""
    return dict(self.keep).get(name)

  def deviation(self, name: str) -> float:
    """The standard deviation on a modality, 0 where it has no such noise."""
    if self.kept(name) is not None:
      return 0.0
    if isinstance(self.sigma, tuple):
      return dict(self.sigma).get(name, 0.0)
    return self.sigma

  @property
  def kind(self) -> str:
    """``"gaussian"``, ``"subsample"`` or ``"mixed"``."""
    if not self.keep:
      return "gaussian"
    return "mixed" if self.sigma else "subsample"

  def element_axes(self, name: str, rank: int) -> tuple[int, ...]:
    """The axes of one input of ``rank`` axes that number its elements."""
    default = tuple(range(max(rank - 1, 1)))
    return dict(self.axes).get(name, default)

  def num_elements(self, name: str, shape: tuple[int, ...]) -> int:
    """How many elements one input of ``shape`` has."""
    return math.prod(shape[a] for a in self.element_axes(name, len(shape)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Votes:
  """Every choice of ``keep`` modalities has one vote; the others are absent."""

  keep: int

  kind = "votes"


def gaussian(*, sigma: float | Mapping[str, float]) -> Noise:
  """White noise of one standard deviation, or of one for each modality.

  Args:
    sigma: in raw input values; a number is for every modality. A modality
      that a mapping does not name has no noise, and its budget must be 0.

  Raises:
    ValueError: a number that is not positive.
  """
  return Noise(sigma=_deviations(sigma))


def subsample(
  *,
  keep: Mapping[str, int],
  axes: Mapping[str, Iterable[int]] | None = None,
  fill: float = 0.0,
  mask_channel: Iterable[str] = (),
) -> Noise:
  """A random choice of ``keep[m]`` elements of modality m is all that is seen.

  Drawn without replacement and independently for each modality; the budget of
  a modality counts elements. The base classifier sees arrays of the shape it
  knows: dropped elements hold ``fill`` in every entry. A modality in
  ``mask_channel`` gets one channel more, 1 where an element was kept and 0
  where it was dropped: at the end of the last axis, or, where that axis numbers
  elements, in a new last axis. The classifier must have been built for it.

  A modality that is not named is seen whole, and its budget must be 0.

  Args:
    keep: ``{m: k}``.
    axes: ``{m: axes}`` of one input, without the axis of examples, that number
      the elements; entries along the other axes belong to one element. By
      default all axes but the last, or the only one: pixels of ``[h, w, c]``,
      frames of ``[t, d]``, tokens of ``[t]``. Frames of ``[t, h, w, c]`` are
      ``axes={m: (0,)}``.
    fill: such as a padding token, or a mean pixel.
    mask_channel: names.

  Raises:
    ValueError: naming the argument that is wrong.
  """
  return _noise(0.0, keep, axes, fill, mask_channel)


def mixed(
  *,
  sigma: float | Mapping[str, float],
  keep: Mapping[str, int],
  axes: Mapping[str, Iterable[int]] | None = None,
  fill: float = 0.0,
  mask_channel: Iterable[str] = (),
) -> Noise:
  """Gaussian noise on some modalities, sub-sampling of others.

  Arguments as in :func:`gaussian` and :func:`subsample`; a number for ``sigma``
  is for every modality that ``keep`` does not name.

  Raises:
    ValueError: a modality named twice, or an argument that is wrong.
  """
  if isinstance(sigma, Mapping) and set(sigma) & set(keep):
    both = min(set(sigma) & set(keep))
    raise ValueError(f"sigma and keep both name the modality {both!r}.")
  return _noise(_deviations(sigma), keep, axes, fill, mask_channel)


def _noise(sigma, keep, axes, fill, mask_channel) -> Noise:
  if not keep:
    raise ValueError("keep must name at least one modality, got none.")
  for name, number in keep.items():
    _validate.at_least(1, **{f"keep[{name!r}]": number})
  if not math.isfinite(fill):
    raise ValueError(f"fill must be finite, got {fill}.")
  axes = {name: tuple(chosen) for name, chosen in (axes or {}).items()}
  masked = modalities.names(mask_channel)
  for argument, names in (("axes", axes), ("mask_channel", masked)):
    _validate.known(modalities.names(keep), **{argument: names})
  return Noise(
    sigma=sigma,
    keep=tuple(sorted((name, int(k)) for name, k in keep.items())),
    axes=tuple(sorted(axes.items())),
    fill=float(fill),
    masked=masked,
  )


def modality_votes(*, keep: int) -> Votes:
  """Elements are the modalities: all choices of ``keep`` of them vote once.

  Nothing is drawn, so counts are exact and the certificate holds for sure.

  Raises:
    ValueError: ``keep`` below 1.
  """
  _validate.at_least(1, keep=keep)
  return Votes(keep=int(keep))


def from_settings(
  names: Iterable[str],
  *,
  sigma: float | Mapping[str, float] = 0.0,
  keep: Mapping[str, int] | None = None,
  units: Mapping[str, float] | None = None,
) -> Noise:
  """Noise from plain numbers, with ``sigma`` in units of each modality.

  Args:
    names: the modalities.
    sigma: 0 for none, a number for every modality that is not sub-sampled, or
      ``{m: sigma}``.
    keep: ``{m: k}``, or nothing.
    units: ``{m: raw size of one unit}``, 1 where not named.

  Raises:
    ValueError: neither given, an unknown modality, or a number out of range.
  """
  names, keep, units = modalities.names(names), keep or {}, units or {}
  _validate.known(names, keep=keep)
  if not isinstance(sigma, Mapping):
    _validate.non_negative(sigma=sigma)
    sigma = {n: sigma for n in names if n not in keep} if sigma else {}
  _validate.known(names, sigma=sigma)
  raw = {name: float(v * units.get(name, 1.0)) for name, v in sigma.items()}
  if raw:
    return mixed(sigma=raw, keep=keep) if keep else gaussian(sigma=raw)
  if keep:
    return subsample(keep=keep)
  raise ValueError("sigma or keep must say what noise to add.")


def _deviations(sigma):
  if not isinstance(sigma, Mapping):
    _validate.positive(sigma=sigma)
    return float(sigma)
  for name, value in sigma.items():
    _validate.positive(**{f"sigma[{name!r}]": value})
  if not sigma:
    raise ValueError("sigma must name at least one modality, got none.")
  return tuple(sorted((name, float(value)) for name, value in sigma.items()))


def check(noise: Noise, inputs: Inputs) -> None:
  """Refuses noise that does not fit inputs ``{m: [b, ...]}``, by name."""
  names = modalities.names(inputs)
  named = {"keep": dict(noise.keep)}
  if isinstance(noise.sigma, tuple):
    named["sigma"] = dict(noise.sigma)
  _validate.known(names, **named)
  for name in names:
    shape = jnp.shape(inputs[name])[1:]
    integer = not jnp.issubdtype(jnp.result_type(inputs[name]), jnp.floating)
    if noise.deviation(name) and integer:
      raise ValueError(
        f"sigma cannot be for the modality {name!r}, which holds integers: "
        "name the others in a mapping, or sub-sample it."
      )
    if noise.kept(name) is not None:
      _check_elements(noise, name, shape)


def _check_elements(noise: Noise, name: str, shape: tuple[int, ...]) -> None:
  axes = noise.element_axes(name, len(shape))
  if (
    not axes
    or sorted(set(axes)) != sorted(axes)
    or not (set(axes) <= set(range(len(shape))))
  ):
    raise ValueError(
      f"axes[{name!r}] must be different axes among 0..{len(shape) - 1} of one "
      f"input of shape {shape}, got {axes}."
    )
  number = noise.num_elements(name, shape)
  if noise.kept(name) > number:
    raise ValueError(
      f"keep[{name!r}] must be at most {number}, the number of its elements, "
      f"got {noise.kept(name)}."
    )


def apply(noise: Noise, key: PRNGKeyArray, inputs: Inputs) -> dict[str, Any]:
  """Noise of its own on every row of ``{m: [s, ...]}``.

  Gaussian noise is float32 or finer, whatever the input is; sampling in finite
  precision is itself an approximation of the noise that the proof speaks of.

  Returns:
    ``{m: [s, ...]}``, with a mask channel where one was asked for.
  """
  found = {}
  for index, name in enumerate(modalities.names(inputs)):
    value, subkey = inputs[name], jax.random.fold_in(key, index)
    sigma = noise.deviation(name)
    if noise.kept(name) is not None:
      value = _subsample(noise, name, subkey, value)
    elif sigma:
      value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
      value += sigma * jax.random.normal(subkey, value.shape, value.dtype)
    found[name] = value
  return found


def _subsample(noise, name, key, value):
  shape = value.shape[1:]
  axes = noise.element_axes(name, len(shape))
  number = noise.num_elements(name, shape)
  chosen = choose(key, value.shape[0], number, noise.kept(name))
  spread = [n if axis in axes else 1 for axis, n in enumerate(shape)]
  chosen = jnp.reshape(chosen, (-1, *spread))
  seen = jnp.where(chosen, value, jnp.asarray(noise.fill, value.dtype))
  if name not in noise.masked:
    return seen
  if len(shape) - 1 in axes:
    seen, chosen = seen[..., None], chosen[..., None]
  mask = jnp.broadcast_to(chosen, (*seen.shape[:-1], 1)).astype(seen.dtype)
  return jnp.concatenate([seen, mask], axis=-1)


def choose(
  key: PRNGKeyArray, num_rows: int, number: int, kept: int
) -> Bool[Array, "s n"]:
  """In every row exactly ``kept`` of ``number`` are True, all choices alike.

  Floyd's way: as many draws as there are elements to choose, or to drop where
  these are fewer; a sort of random ranks took ten times as long.
  """
  few = min(kept, number - kept)
  lasts = jnp.arange(number - few, number)
  draws = jax.random.randint(key, (few, num_rows), 0, lasts[:, None] + 1)
  rows = jnp.arange(num_rows)

  def step(chosen, candidates):
    last, draw = candidates
    # The last one cannot be there yet, so it stands in for a repetition.
    new = jnp.where(chosen[rows, draw], last, draw)
    return chosen.at[rows, new].set(True), None

  chosen = jnp.zeros((num_rows, number), bool)
  chosen, _ = jax.lax.scan(step, chosen, (lasts, draws))
  return chosen if few == kept else ~chosen
