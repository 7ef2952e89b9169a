"""One transformation as a value: what it draws, does, and is defined for."""

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm.visualization import kinds

MOST_DEPTH_ROTATION = 10.0  # degrees; gravity points one way
LEAST_SCALE = 0.5  # of what is resampled; bilinear reading has no prefilter
# Options in which ranges are, and whether they are factors.
SIZES = ("rotation", "jitter", "time_shift", "mel_shift", "gain", "deviation")
FACTORS = ("scale", "stretch", "amplitude")
SHIFTS = ("jitter", "time_shift", "mel_shift")
# Of every kind the function that makes it; ``transforms`` writes them here.
FACTORIES: dict[str, Callable[..., "Transform"]] = {}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform:
  """One transformation with its options; made by the factories.

  Hashable, and a pytree without leaves: jitted functions take it as it is.

  Attributes:
    kind: its factory's name.
    options: ``((option, value), ...)``.
  """

  kind: str
  options: tuple[tuple[str, Any], ...] = ()

  def __call__(
    self, key: PRNGKeyArray, x: Array, *, strength: Any = 1.0
  ) -> Array:
    """``x`` changed by a draw; the same key gives the same.

    Args:
      key: typed; another one for every draw.
      x: one input, floats.
      strength: in [0, 1]; all ranges are shrunk by it.
    """
    return self.apply(x, self.sample(key, x.shape, strength=strength))

  def sample(
    self, key: PRNGKeyArray, shape: Sequence[int] = (), *, strength: Any = 1.0
  ) -> dict[str, Array]:
    """A draw ``{what: array}``; ``shape`` is that of one input."""
    kind = kinds.KINDS[self.kind]
    return kind.sample(key, tuple(shape), strength, **dict(self.options))

  def draws(
    self,
    key: PRNGKeyArray,
    num: int,
    shape: Sequence[int] = (),
    *,
    strength: Any = 1.0,
  ) -> dict[str, Array]:
    """``num`` draws ``{what: [num, ...]}``, a key of their own each."""
    stratified = kinds.KINDS[self.kind].draws
    if stratified is not None:
      options = dict(self.options)
      return stratified(key, tuple(shape), strength, num, **options)
    return jax.vmap(lambda k: self.sample(k, shape, strength=strength))(
      jax.random.split(key, num)
    )

  def apply(self, x: Array, draw: dict[str, Any]) -> Array:
    """``x`` changed by a draw; differentiable in both."""
    return kinds.KINDS[self.kind].apply(x, draw, **dict(self.options))

  def smooth_axes(self, shape: Sequence[int]) -> tuple[int, ...]:
    """The axes of one input along which total variation is taken."""
    kind = dict(self.options).get("of") or self.kind
    return kinds.KINDS[kind].smooth(len(shape))

  def is_still(self) -> bool:
    """Whether nothing ever changes: all draws are the same."""
    return self.kind == "identity"

  def has_frequencies(self, rank: int) -> bool:
    """Whether inputs of that rank are images of some kind, or may be."""
    if self.kind == "identity" and dict(self.options)["of"] is None:
      return rank >= 2
    kind = dict(self.options).get("of") or self.kind
    if kind == "depth":
      return rank == 2
    return kind in kinds.FREQUENCIES

  def replace(self, **options: Any) -> "Transform":
    """The same with other options, checked."""
    return FACTORIES[self.kind](**{**dict(self.options), **options})

  def filled(self, value: float) -> "Transform":
    """With ``value`` where the fill was left open."""
    if dict(self.options).get("fill", 0.0) is not None:
      return self
    return self.replace(fill=value)

  def widened(self, factor: float) -> "Transform":
    """All ranges times ``factor``, those of factors to its power."""
    options = dict(self.options)
    wide = {n: options[n] * factor for n in SIZES if n in options}
    for name in FACTORS:
      if name in options:
        wide[name] = tuple(bound**factor for bound in options[name])
    if self.kind == "depth":
      wide["rotation"] = min(wide["rotation"], MOST_DEPTH_ROTATION)
    return self.replace(**wide)

  def check(
    self, shape: Sequence[int], dtype: Any = jnp.float32, *, name: str = ""
  ) -> None:
    """Refuses inputs that the transformation is not defined for.

    Args:
      shape: of one input.
      dtype: of it.
      name: of the modality.

    Raises:
      ValueError: integers, or a shape of another form, naming the modality.
    """
    who = f"the modality {name!r}" if name else "the input"
    if not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f"modality: {who} holds {jnp.dtype(dtype)} (token ids, say), which "
        "have no gradient; use a modality of features."
      )
    kind = kinds.KINDS[self.kind]
    shape = tuple(shape)
    fits = len(shape) in kind.ranks
    if self.kind in ("inertial", "skeleton") and fits:
      fits = shape[-1] % 3 == 0
    if self.kind == "log_mel" and len(shape) == 3:
      fits = shape[-1] == 1
    if not fits:
      raise ValueError(
        f"transforms: {self.kind} is for {kind.form}; {who} has the shape "
        f"{shape}."
      )
    std = dict(self.options).get("std")
    if isinstance(std, tuple) and len(std) != shape[-1]:
      raise ValueError(
        f"std must have one entry for each of the {shape[-1]} features of "
        f"{who}, got {len(std)}."
      )

  def settings(self) -> dict[str, Any]:
    """Kind and options as plain values."""
    plain = {
      name: list(value) if isinstance(value, tuple) else value
      for name, value in self.options
    }
    return {"kind": self.kind, **plain}


def make(kind, *, sizes=None, factors=None, rest=None) -> Transform:
  """A checked value; equal options make equal, and equally hashed, values."""
  found = {}
  for name, size in (sizes or {}).items():
    _validate.non_negative(**{name: size})
    found[name] = float(size)
  for name, bounds in (factors or {}).items():
    found[name] = _bounds(name, bounds)
  if kind in kinds.RESAMPLED and found["scale"][0] < LEAST_SCALE:
    raise ValueError(
      f"scale must be at least {LEAST_SCALE}, or detail aliases: nothing is "
      f"smoothed before; got {found['scale'][0]}."
    )
  found.update(rest or {})
  return Transform(kind=kind, options=tuple(sorted(found.items())))


def fill(value: float | None) -> float | None:
  if value is None:
    return None
  if not np.isfinite(value):
    raise ValueError(f"fill must be finite, got {value}.")
  return float(value)


def _bounds(name: str, bounds: Any) -> tuple[float, float]:
  """The least and the largest factor."""
  try:
    low, high = (float(bound) for bound in bounds)
  except (TypeError, ValueError):
    low = high = 0.0
  if not 0 < low <= high < float("inf"):
    raise ValueError(
      f"{name} must be the least and the largest factor, both above 0, got "
      f"{bounds!r}."
    )
  return low, high
