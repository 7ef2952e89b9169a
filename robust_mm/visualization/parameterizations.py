r"""How a synthesised input is written as free parameters u.

- ``pixels``: :math:`x = lo + (hi - lo)\,\sigma(u)`, inside its range by
  construction, so that no gradient dies at a bound.
- ``fourier``: u are Fourier coefficients, divided by their frequency, of what
  the sigmoid is taken of. Images and spectrograms only.
- ``unbounded``: x = u.
- ``projected``: x = u, clipped to its range after each step; of the mode
  ``in_place``.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import PRNGKeyArray

# Where a sigmoid starts: at the reference, but not where it is flat.
_START = (0.1, 0.9)
_BLUR_REACH = 3  # deviations


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Parameterization:
  """The map u -> x of one modality.

  Attributes:
    name: one of the above; static.
    shape: of x; static.
    low: an array that broadcasts against x; None where x is unbounded.
    high: likewise.
    reference: an array that broadcasts against x; what the l2 term pulls to.
    init_std: of the initial u in units of x, or of its logit; static.
  """

  name: str = dataclasses.field(metadata={"static": True})
  shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  low: Any
  high: Any
  reference: Any
  init_std: float = dataclasses.field(metadata={"static": True})

  @property
  def width(self) -> Any:
    """``high - low``, 1 where that is 0 or x is unbounded: the units of x."""
    if self.low is None:
      return jnp.ones(())
    width = self.high - self.low
    return jnp.where(width > 0, width, jnp.ones_like(width))

  def init(self, key: PRNGKeyArray) -> Array:
    """The first u: the reference value with a little noise."""
    if self.name == "fourier":
      drawn = jax.random.normal(key, self._coefficients())
      return drawn * self.init_std / jnp.std(self.spatial(drawn))
    noise = self.init_std * jax.random.normal(key, self.shape)
    if self.name == "unbounded":
      return self.reference + noise
    logit = self._start() + noise
    if self.name == "pixels":
      return logit
    return self.low + self.width * jax.nn.sigmoid(logit)

  def decode(self, u: Array) -> Array:
    """x, of one u."""
    if self.name in ("unbounded", "projected"):
      return u
    if self.name == "fourier":
      u = self._start() + self.spatial(u)
    return self.low + self.width * jax.nn.sigmoid(u)

  def project(self, x: Array) -> Array:
    """x put back into its range, where that is not so by construction."""
    if self.name == "projected":
      return jnp.clip(x, self.low, self.high)
    return x

  def blurred(self, u: Array, axes: Sequence[int]) -> Array:
    """The u whose x is blurred by a Gaussian of one pixel along the axes."""
    if self.name != "pixels":
      return blur(u, axes)
    share = jnp.clip(blur(jax.nn.sigmoid(u), axes), 1e-6, 1 - 1e-6)
    return jnp.log(share) - jnp.log1p(-share)

  def spatial(self, coefficients: Array) -> Array:
    """Coefficients as an image; unit ones give a standard deviation of 1."""
    height, width = self.shape[:2]
    filtered = jax.lax.complex(coefficients[0], coefficients[1])
    gain = self._gain()
    filtered = filtered * jnp.reshape(
      gain, gain.shape + (1,) * (filtered.ndim - 2)
    )
    return jnp.fft.irfft2(filtered, s=(height, width), axes=(0, 1))

  def _coefficients(self) -> tuple[int, ...]:
    height, width = self.shape[:2]
    return (2, height, width // 2 + 1, *self.shape[2:])

  def _gain(self) -> np.ndarray:
    height, width = self.shape[:2]
    rows = np.fft.fftfreq(height)[:, None]
    columns = np.fft.rfftfreq(width)[None]
    frequency = np.sqrt(rows**2 + columns**2)
    gain = 1 / np.maximum(frequency, 1 / max(height, width))
    # Every coefficient but those of column 0 (and of the last of an even width)
    # stands for its conjugate as well.
    twice = np.full(width // 2 + 1, 2.0)
    twice[0] = 1.0
    if width % 2 == 0:
      twice[-1] = 1.0
    power = np.sum((twice * gain) ** 2) / (height * width) ** 2
    return (gain / math.sqrt(power)).astype(np.float32)

  def _start(self) -> Array:
    share = jnp.clip((self.reference - self.low) / self.width, *_START)
    return jnp.log(share) - jnp.log1p(-share)


def blur(x: Array, axes: Sequence[int], sigma: float = 1.0) -> Array:
  """Gaussian along the axes; ends are held."""
  reach = math.ceil(_BLUR_REACH * sigma)
  offsets = np.arange(-reach, reach + 1)
  weights = np.exp(-0.5 * (offsets / sigma) ** 2)
  weights = (weights / weights.sum()).astype(np.float32)
  for axis in axes:
    size = x.shape[axis]
    places = np.clip(np.arange(size)[:, None] + offsets, 0, size - 1)
    taken = jnp.take(x, places, axis=axis)
    x = jnp.tensordot(taken, weights, axes=([axis + 1], [0]))
  return x


def total_variation(x: Array, axes: Sequence[int]) -> Array:
  """Mean absolute differences of neighbours, added over the axes."""
  found = jnp.zeros((), x.dtype)
  for axis in axes:
    if x.shape[axis] > 1:
      found += jnp.mean(jnp.abs(jnp.diff(x, axis=axis)))
  return found
