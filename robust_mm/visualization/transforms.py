"""Random changes that keep a class, as values: one factory a kind of modality.

``transform = transforms.image(rotation=15, jitter=2)`` is a frozen object;
``transform(key, x)`` changes one input ``x`` by a fresh draw. What a kind may
do is what its sensor really does: images turn, spectrograms do not. Integer
tokens have no transformation.
"""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm.visualization import kinds

DEFAULT_SCALE = (0.85, 1.15)
MOST_DEPTH_ROTATION = 10.0  # degrees; gravity points one way
# Options in which ranges are, and whether they are factors.
_SIZES = ("rotation", "jitter", "time_shift", "mel_shift", "gain", "deviation")
_FACTORS = ("scale", "stretch", "amplitude")
_SHIFTS = ("jitter", "time_shift", "mel_shift")


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
    return kinds.KINDS[self.kind].smooth(len(shape))

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
    wide = {n: options[n] * factor for n in _SIZES if n in options}
    for name in _FACTORS:
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


def identity() -> Transform:
  """Nothing is changed: the control."""
  return Transform(kind="identity")


def image(
  *,
  rotation: float = 15.0,
  scale: Sequence[float] = DEFAULT_SCALE,
  jitter: float = 2.0,
  fill: float | None = None,
) -> Transform:
  """Images ``[h, w, c]`` rotated, scaled and shifted, in one resampling.

  Never flipped: a flipped digit is another one.

  Args:
    rotation: degrees; angles are uniform to either side.
    scale: the least and the largest factor; log-uniform.
    jitter: pixels; shifts are uniform to either side, down and to the right.
    fill: what lies outside the image; None leaves it open
      (``class_visualization`` fills in the reference value; the nearest pixel
      otherwise).
  """
  return _make(
    "image",
    sizes={"rotation": rotation, "jitter": jitter},
    factors={"scale": scale},
    rest={"fill": _fill(fill)},
  )


def lucid(*, fill: float = 0.5) -> Transform:
  """Published standard transforms for photos of some 224 pixels ``[h, w, c]``.

  Padded by 12 pixels of ``fill``; jitter of 8 pixels; scaled by one of 0.90,
  0.92, ..., 1.10; rotated by one of the integers -10..10 or five more zeros, in
  degrees; jitter of 4 pixels. Integer rolls first, then one resampling.

  References:
    `Olah et al. (2017) <https://distill.pub/2017/feature-visualization/>`_ and
    its software Lucid.
  """
  return _make("lucid", rest={"fill": _fill(fill)})


def shifts(
  *, offsets: Sequence[Sequence[int]], fill: float | None = None
) -> Transform:
  """Images ``[h, w, c]`` moved by one of the listed whole pixels: no blur.

  Of several draws of one step, each offset is drawn as often as any other.

  Args:
    offsets: ``((rows, columns), ...)``, down and to the right.
    fill: as of ``image``.
  """
  listed = tuple(tuple(int(pixels) for pixels in pair) for pair in offsets)
  if not listed or any(len(pair) != 2 for pair in listed):
    raise ValueError(
      f"offsets must be pairs (rows, columns), at least one, got {offsets}."
    )
  return _make("shifts", rest={"offsets": listed, "fill": _fill(fill)})


def log_mel(
  *,
  time_shift: float = 6.0,
  stretch: Sequence[float] = DEFAULT_SCALE,
  mel_shift: float = 1.0,
  gain: float = 0.05,
  fill: float | None = None,
) -> Transform:
  """Spectrograms ``[t, mel]`` later, longer, higher and louder.

  Never rotated: its axes are time and pitch.

  Args:
    time_shift: frames, to either side.
    stretch: the least and the largest factor of time.
    mel_shift: bands, to either side.
    gain: added to every value of a logarithm, in its own units.
    fill: as of ``image``.
  """
  return _make(
    "log_mel",
    sizes={"time_shift": time_shift, "mel_shift": mel_shift, "gain": gain},
    factors={"stretch": stretch},
    rest={"fill": _fill(fill)},
  )


def inertial(
  *,
  rotation: float = 20.0,
  amplitude: Sequence[float] = (0.8, 1.2),
  time_shift: float = 6.0,
  stretch: Sequence[float] = DEFAULT_SCALE,
) -> Transform:
  """Signals ``[t, 3 n]`` of sensors on one board.

  Args:
    rotation: degrees about a random axis, one rotation for all triads (x, y,
      z): accelerometer and gyroscope never turn apart.
    amplitude: the least and the largest factor.
    time_shift: frames, to either side.
    stretch: the least and the largest factor of time.
  """
  return _make(
    "inertial",
    sizes={"rotation": rotation, "time_shift": time_shift},
    factors={"amplitude": amplitude, "stretch": stretch},
  )


def skeleton(
  *,
  rotation: float = 30.0,
  vertical: int = 1,
  scale: Sequence[float] = DEFAULT_SCALE,
  time_shift: float = 2.0,
  stretch: Sequence[float] = DEFAULT_SCALE,
) -> Transform:
  """Joints ``[t, 3 n]`` or ``[t, n, 3]``; single joints never turn.

  Args:
    rotation: degrees about the vertical through the mean of all joints.
    vertical: which of x, y, z it is, 0 to 2.
    scale: the least and the largest body.
    time_shift: frames, to either side.
    stretch: the least and the largest factor of time.
  """
  _validate.whole_up_to(2, vertical=vertical)
  return _make(
    "skeleton",
    sizes={"rotation": rotation, "time_shift": time_shift},
    factors={"scale": scale, "stretch": stretch},
    rest={"vertical": int(vertical)},
  )


def depth(
  *,
  rotation: float = 0.0,
  scale: Sequence[float] = (0.9, 1.1),
  jitter: float = 2.0,
  time_shift: float = 1.0,
  fill: float | None = None,
) -> Transform:
  """Depth videos ``[t, h, w, c]`` and motion maps ``[h, w]``, frames alike.

  Args:
    rotation: degrees, at most 10.
    scale: the least and the largest factor.
    jitter: pixels, to either side.
    time_shift: frames, to either side.
    fill: as of ``image``.
  """
  if rotation > MOST_DEPTH_ROTATION:
    raise ValueError(
      f"rotation must be at most {MOST_DEPTH_ROTATION:g} degrees for depth, "
      f"got {rotation}."
    )
  return _make(
    "depth",
    sizes={"rotation": rotation, "jitter": jitter, "time_shift": time_shift},
    factors={"scale": scale},
    rest={"fill": _fill(fill)},
  )


def vector(
  *, deviation: float = 0.1, std: float | Sequence[float] = 1.0
) -> Transform:
  """Gaussian noise on feature vectors ``[d]``.

  Args:
    deviation: of the noise, in units of ``std``.
    std: of the training data, one number or one a feature.
  """
  if not isinstance(std, numbers.Real):
    std = tuple(float(value) for value in np.asarray(std).ravel())
  for value in std if isinstance(std, tuple) else (std,):
    _validate.non_negative(std=value)
  return _make("vector", sizes={"deviation": deviation}, rest={"std": std})


FACTORIES = {
  "depth": depth,
  "identity": identity,
  "image": image,
  "inertial": inertial,
  "log_mel": log_mel,
  "lucid": lucid,
  "shifts": shifts,
  "skeleton": skeleton,
  "vector": vector,
}


def held_out(
  transform: Transform, shape: Sequence[int]
) -> dict[str, Transform]:
  """The transformations a result is tested with: ``near`` and ``far``.

  Of images, per 28 pixels: 15 degrees, a factor of 1.15, 2 pixels; and 30
  degrees, 1.3, 3 pixels. Of others the default ranges of the kind, and twice
  those. What the transformation of the synthesis was plays no role.

  Args:
    transform: of the modality; of ``identity`` only images ``[h, w, c]`` and
      vectors ``[d]`` are known.
    shape: of one input.
  """
  by_rank = {1: "vector", 3: "image"}
  kind = transform.kind
  if kind == "identity":
    kind = by_rank.get(len(shape))
  if kind is None:
    return {}
  options = dict(transform.options)
  if kind in ("image", "lucid", "shifts"):
    pixels = min(shape[:2]) / 28
    fill = {"fill": options.get("fill")}
    return {
      "near": image(scale=(1 / 1.15, 1.15), jitter=2 * pixels, **fill),
      "far": image(
        rotation=30, scale=(1 / 1.3, 1.3), jitter=3 * pixels, **fill
      ),
    }
  kept = {n: options[n] for n in ("fill", "std", "vertical") if n in options}
  near = FACTORIES[kind](**kept)
  return {"near": near, "far": near.widened(2)}


def controls(transform: Transform) -> dict[str, Transform]:
  """What stands beside a result: none, shifts only, shifts below a pixel.

  The last resamples, and so blurs, as much as the whole does.
  """
  found = {"none": identity()}
  if transform.kind == "lucid":
    transform = image(fill=dict(transform.options)["fill"])
  options = dict(transform.options)
  if not any(name in options for name in _SHIFTS):
    return found
  still = {name: 0.0 for name in _SIZES if name in options}
  still |= {name: (1.0, 1.0) for name in _FACTORS if name in options}
  shifts = {name: options[name] for name in _SHIFTS if name in options}
  below = {name: min(size, 0.5) for name, size in shifts.items()}
  found["shifts only"] = transform.replace(**{**still, **shifts})
  found["sub-pixel shifts"] = transform.replace(**{**still, **below})
  return found


def _make(kind, *, sizes=None, factors=None, rest=None) -> Transform:
  """A checked value; equal options make equal, and equally hashed, values."""
  found = {}
  for name, size in (sizes or {}).items():
    _validate.non_negative(**{name: size})
    found[name] = float(size)
  for name, bounds in (factors or {}).items():
    bounds = tuple(float(bound) for bound in bounds)
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] < float("inf"):
      raise ValueError(
        f"{name} must be the least and the largest factor, both above 0, got "
        f"{bounds}."
      )
    found[name] = bounds
  found.update(rest or {})
  return Transform(kind=kind, options=tuple(sorted(found.items())))


def _fill(value: float | None) -> float | None:
  if value is None:
    return None
  if not np.isfinite(value):
    raise ValueError(f"fill must be finite, got {value}.")
  return float(value)
