"""Random changes that keep a class, as values: one factory a kind of modality.

``transform = transforms.image(rotation=15, jitter=2)`` is a frozen object;
``transform(key, x)`` changes one input ``x`` by a fresh draw. What a kind may
do is what its sensor really does: images turn, spectrograms do not. Integer
tokens have no transformation.
"""

import numbers
from collections.abc import Sequence

import numpy as np

from robust_mm import _validate
from robust_mm.visualization import kinds
from robust_mm.visualization import transform as transform_lib
from robust_mm.visualization.transform import Transform

DEFAULT_SCALE = (0.85, 1.15)


def identity(*, of: str | None = None) -> Transform:
  """Nothing is changed: the control.

  Args:
    of: the kind that it stands for, such as ``"image"``, which says what it is
      tested with and along which axes its inputs vary smoothly; None for no
      kind, which is tested with nothing of itself.
  """
  if of is not None:
    _validate.one_of(sorted(set(FACTORIES) - {"identity"}), of=of)
  return transform_lib.make("identity", rest={"of": of})


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
    scale: the least and the largest factor, from 0.5; log-uniform. Below some
      0.7 fine detail aliases.
    jitter: pixels; shifts are uniform to either side, down and to the right.
    fill: what lies outside the image; None leaves it open
      (``class_visualization`` fills in the reference value; the nearest pixel
      otherwise).
  """
  return transform_lib.make(
    "image",
    sizes={"rotation": rotation, "jitter": jitter},
    factors={"scale": scale},
    rest={"fill": transform_lib.fill(fill)},
  )


def lucid(*, fill: float | None = None) -> Transform:
  """Published standard transforms for photos of some 224 pixels ``[h, w, c]``.

  Padded by 12 pixels of ``fill``; jitter of 8 pixels; scaled by one of 0.90,
  0.92, ..., 1.10; rotated by one of the integers -10..10 or five more zeros, in
  degrees; jitter of 4 pixels. Integer rolls first, then one resampling.

  Args:
    fill: as of ``image``: left open, it is the reference value, 0.5 for photos
      in [0, 1].

  References:
    `Olah et al. (2017) <https://distill.pub/2017/feature-visualization/>`_ and
    its software Lucid.
  """
  return transform_lib.make("lucid", rest={"fill": transform_lib.fill(fill)})


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
  return transform_lib.make(
    "shifts", rest={"offsets": listed, "fill": transform_lib.fill(fill)}
  )


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
    gain: added to every value of a logarithm, to either side, in units of the
      values, whatever those are: 0.05 suits a range of about 1.
    fill: as of ``image``.
  """
  return transform_lib.make(
    "log_mel",
    sizes={"time_shift": time_shift, "mel_shift": mel_shift, "gain": gain},
    factors={"stretch": stretch},
    rest={"fill": transform_lib.fill(fill)},
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
  return transform_lib.make(
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
  return transform_lib.make(
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
  most = transform_lib.MOST_DEPTH_ROTATION
  if rotation > most:
    raise ValueError(
      f"rotation must be at most {most:g} degrees for depth, got {rotation}."
    )
  return transform_lib.make(
    "depth",
    sizes={"rotation": rotation, "jitter": jitter, "time_shift": time_shift},
    factors={"scale": scale},
    rest={"fill": transform_lib.fill(fill)},
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
  return transform_lib.make(
    "vector", sizes={"deviation": deviation}, rest={"std": std}
  )


FACTORIES = transform_lib.FACTORIES
FACTORIES.update(
  {
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
)


def held_out(
  transform: Transform, shape: Sequence[int], *, fill: float | None = None
) -> dict[str, Transform]:
  """The transformations a result is tested with: ``near`` and ``far``.

  Of images, per 28 pixels: 15 degrees, a factor of 1.15, 2 pixels; and 30
  degrees, 1.3, 3 pixels. Of others the default ranges of the kind, and twice
  those. What the transformation of the synthesis was plays no role.

  Args:
    transform: of the modality; of an ``identity`` that does not say of what,
      nothing is known: ``{}``.
    shape: of one input.
    fill: what lies outside where the transformation leaves it open; the
      reference value, for all that is compared alike.
  """
  options = dict(transform.options)
  kind = transform.kind
  if kind == "identity":
    kind = options["of"]
  if kind is None:
    return {}
  if kind in kinds.IMAGES:
    pixels = min(shape[:2]) / 28
    near = image(
      scale=(1 / 1.15, 1.15), jitter=2 * pixels, fill=options.get("fill")
    )
    far = near.replace(rotation=30, scale=(1 / 1.3, 1.3), jitter=3 * pixels)
  else:
    kept = {n: options[n] for n in ("fill", "std", "vertical") if n in options}
    near = FACTORIES[kind](**kept)
    far = near.widened(2)
  found = {"near": near, "far": far}
  if fill is not None:
    found = {name: one.filled(fill) for name, one in found.items()}
  return found


def controls(transform: Transform) -> dict[str, Transform]:
  """What stands beside a result: none, shifts only, shifts below a pixel.

  The last resamples, and so blurs, as much as the whole does, whatever the
  shifts of the whole are. Without any, there are no "shifts only".
  """
  found = {"none": identity(of=_stands_for(transform))}
  if transform.kind == "lucid":
    # As far as its two jitters go.
    jitter = kinds.LUCID_ROLL + kinds.LUCID_JITTER
    transform = image(fill=dict(transform.options)["fill"], jitter=jitter)
  options = dict(transform.options)
  shifts = {n: options[n] for n in transform_lib.SHIFTS if n in options}
  if not shifts:
    return found
  still = {name: 0.0 for name in transform_lib.SIZES if name in options}
  still |= {n: (1.0, 1.0) for n in transform_lib.FACTORS if n in options}
  below = dict.fromkeys(shifts, 0.5)
  if any(shifts.values()):
    found["shifts only"] = transform.replace(**{**still, **shifts})
  found["sub-pixel shifts"] = transform.replace(**{**still, **below})
  return found


def _stands_for(transform: Transform) -> str | None:
  if transform.kind == "identity":
    return dict(transform.options)["of"]
  return transform.kind
