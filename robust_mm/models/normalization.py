"""Normalisation of raw inputs as constants inside the model.

Inside, so that attack budgets and certified radii are in the units of the data,
and its Lipschitz constant is counted.
"""

import dataclasses
import math
from collections.abc import Iterator
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from robust_mm import _validate
from robust_mm import lipschitz

KINDS = ("none", "centre", "scale", "standardize")
_CHUNK = 2048
_MIN_SCALE = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Normalization:
  """``x -> (x - mean) / scale`` of one modality.

  Attributes:
    mean: array that broadcasts to the shape of one input, or None: no
      normalisation at all, integer inputs stay integers.
    scale: as ``mean``, positive.
  """

  mean: np.ndarray | None = None
  scale: np.ndarray | None = None

  def __post_init__(self):
    if (self.mean is None) != (self.scale is None):
      raise ValueError("mean and scale must be given together.")
    if self.mean is None:
      return
    for name in ("mean", "scale"):
      value = np.asarray(getattr(self, name), np.float32)
      if not np.all(np.isfinite(value)):
        raise ValueError(f"{name} of a normalisation must be finite.")
      object.__setattr__(self, name, value)
    if not np.all(self.scale > 0):
      raise ValueError("scale of a normalisation must be positive.")

  @property
  def constant(self) -> float:
    """Its Lipschitz constant, ``1 / min scale``; 1 for none."""
    return 1.0 if self.scale is None else lipschitz.normalization(self.scale)

  def __call__(self, x: Array) -> Array:
    """Normalises inputs ``[b, ...]``."""
    if self.mean is None:
      return x
    if not jnp.issubdtype(x.dtype, jnp.floating):
      x = x.astype(jnp.float32)
    mean, scale = (
      jnp.broadcast_to(jnp.asarray(value, x.dtype), x.shape)
      for value in (self.mean, self.scale)
    )
    return (x - mean) / scale

  def before(
    self, layers: tuple[Array, ...], shape: tuple[int, ...]
  ) -> tuple[Array, ...]:
    """Matrices of a dense encoder with the division by ``scale`` in the first.

    Args:
      layers: ``[out, in]``, the first on a flat input.
      shape: of one input.
    """
    if self.scale is None:
      return layers
    first, *rest = layers
    scale = jnp.broadcast_to(jnp.asarray(self.scale, first.dtype), shape)
    return (first / jnp.reshape(scale, (1, -1)), *rest)

  def to_json(self) -> dict | None:
    """Plain lists and numbers; :meth:`from_json` gives the same float32s."""
    if self.mean is None:
      return None
    return {"mean": self.mean.tolist(), "scale": self.scale.tolist()}

  @classmethod
  def from_json(cls, value: Mapping | None) -> "Normalization":
    """The inverse of :meth:`to_json`."""
    if value is None:
      return cls()
    return cls(np.asarray(value["mean"]), np.asarray(value["scale"]))


def fit_normalization(kind: str, inputs, present=None):
  r"""Normalisation constants of training inputs, on the host.

  - "none": none.
  - "centre": mean per entry, scale 1.
  - "scale": mean per entry; one scale, the median of ``||x - mean||_2``.
  - "standardize": mean and standard deviation + 1e-6 per channel.

  "scale" makes the median input have norm 1 and is the choice for 1-Lipschitz
  encoders: an l2 distance inside is then in *relative units* (``units=
  "relative"`` of ``certify``), comparable between modalities, and no direction
  is stretched. "standardize" suits ordinary encoders; its channels are features
  for vectors and the last axis for images and sequences; a constant channel
  keeps scale 1, since dividing by 1e-6 would make noise in it decisive.

  Args:
    kind: one of these.
    inputs: ``[N, ...]`` of one modality, or ``{m: [N, ...]}``. Signed integers
      are tokens and are never normalised. Unsigned ones are pixels, normalised
      as they are given: their unit is one grey level, where the data set
      ``arrays`` has already scaled them to [0, 1].
    present: ``bool[N]`` or ``{m: bool[N]}``; absent examples do not count.

  Returns:
    A :class:`Normalization`, or one per modality.
  """
  _validate.one_of(KINDS, kind=kind)
  if isinstance(inputs, Mapping):
    return {
      name: fit_normalization(
        kind, value, None if present is None else present[name]
      )
      for name, value in inputs.items()
    }
  inputs = np.asarray(inputs)
  if present is not None:
    inputs = inputs[np.asarray(present, bool)]
  if kind == "none" or not len(inputs) or _is_token(inputs):
    return Normalization()
  if kind == "standardize":
    return _standardize(inputs)
  mean = np.mean(inputs, axis=0, dtype=np.float64)
  scale = 1.0
  if kind == "scale":
    distances = np.concatenate(
      [np.linalg.norm(_rows(x - mean), axis=1) for x in _chunks(inputs)]
    )
    scale = float(np.median(distances))
    if not scale > _MIN_SCALE * (1 + float(np.max(np.abs(mean)))):
      scale = 1.0
  return Normalization(mean, np.asarray(scale))


def _standardize(inputs: np.ndarray) -> Normalization:
  axes = (0,) if inputs.ndim == 2 else tuple(range(inputs.ndim - 1))
  mean = np.mean(inputs, axis=axes, dtype=np.float64)
  total = sum(np.sum(np.square(x - mean), axis=axes) for x in _chunks(inputs))
  count = math.prod(inputs.shape[axis] for axis in axes)
  deviation = np.sqrt(total / count)
  constant = deviation <= _MIN_SCALE * (1 + np.abs(mean))
  return Normalization(mean, np.where(constant, 1.0, deviation + _MIN_SCALE))


def _chunks(inputs: np.ndarray) -> Iterator[np.ndarray]:
  """Float64 pieces: the whole of a large set in float64 may not fit."""
  for start in range(0, len(inputs), _CHUNK):
    yield inputs[start : start + _CHUNK].astype(np.float64)


def _rows(x: np.ndarray) -> np.ndarray:
  return np.reshape(x, (len(x), -1))


def _is_token(inputs: np.ndarray | jax.Array) -> bool:
  return bool(np.issubdtype(inputs.dtype, np.signedinteger))
