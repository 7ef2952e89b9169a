r"""The set an attack may move in: a norm ball, cut with a valid range.

With a unit :math:`u_m` per modality (1 unless given),

.. math:: \|\delta\|_2 = \sqrt{\sum_m \|\delta_m\|_2^2 / u_m^2} \qquad
          \|\delta\|_\infty = \max_m \|\delta_m\|_\infty / u_m

A *joint* ball bounds that one number. *Separate* balls bound each
:math:`\|\delta_m\| / u_m` on its own.

The valid range is an interval per entry. An entry that lies outside it from
the start may stay where it is and move back, never further out; so the
interval used here always contains the clean value, and shrinking towards the
clean value never leaves it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from robust_mm import modalities

# Rows of this length are summed on their own in the last projection, so that
# the rounding error of the norm of a large input stays below 1e-6.
_ROW = 256
# Relative, of a norm summed like that.
_TOLERANCE = 3e-7


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Region:
  """Where the perturbation of a batch may go.

  Perturbations and gradients are dicts ``{m: float32[b, ...]}`` (or wider)
  with the keys of ``clean``.

  Attributes:
    clean: ``{m: [b, ...]}``, the modalities that may move, finite everywhere.
    radius: ``{m: [b]}``, 0 where a modality must not move (it is absent, or
      its budget is 0). One number for all others when ``joint``.
    units: ``{m: scalar}``.
    valid_range: ``{m: (low, high)}`` of the shape of ``clean[m]``, around it; a
      modality that is not named has none.
    norm: ``"l2"`` or ``"linf"``.
    joint: one ball for all modalities, or one each.
  """

  clean: Mapping[str, Any]
  radius: Mapping[str, Any]
  units: Mapping[str, Any]
  valid_range: Mapping[str, tuple[Any, Any]]
  norm: str
  joint: bool

  @property
  def dtype(self) -> Any:
    """The one dtype of perturbations and sizes: float32 or wider."""
    return jnp.result_type(jnp.float32, *self.clean.values())

  def zeros(self) -> dict:
    """No perturbation."""
    return {m: jnp.zeros_like(x, self.dtype) for m, x in self.clean.items()}

  def size(self, delta: Mapping[str, Any]) -> dict:
    """``{m: [b]}`` in units; the same for all when an l2 ball is joint."""
    scaled = {m: d / self.units[m] for m, d in delta.items()}
    if self.norm == "linf":
      return {m: _largest(d) for m, d in scaled.items()}
    squares = {m: jnp.sum(_rows(d * d), axis=-1) for m, d in scaled.items()}
    return {m: jnp.sqrt(total) for m, total in self._joined(squares).items()}

  def extent(self, delta: Mapping[str, Any]) -> Any:
    """By what factor the ball must be scaled to hold ``delta``: ``[b]``."""
    size = self.size(delta)
    return jnp.max(
      modalities.stack(
        {
          m: jnp.where(r > 0, size[m] / _nonzero(r), 0)
          for m, r in self.radius.items()
        }
      ),
      axis=0,
    )

  def steepest(
    self, delta: Mapping, grad: Mapping, otherwise: Mapping
  ) -> dict[str, Any]:
    r"""The direction of size 1 along which a linear loss grows fastest.

    l2: :math:`u_m^2 g_m / \|u g\|_2`; linf: :math:`u_m sign(g_m)`. Entries at
    the end of the valid range that would leave it take no part. A gradient that
    is zero over a whole ball gives no direction: ``otherwise`` is used in its
    place. Non-finite entries count as zero.
    """
    grad = {m: self._free(m, delta[m], g) for m, g in grad.items()}
    # Scaled to 1 first: the squares of a small gradient underflow, which would
    # call it zero.
    largest = {m: _largest(g) for m, g in grad.items()}
    if self.joint and self.norm == "l2":
      top = jnp.max(modalities.stack(largest), axis=0)
      largest = dict.fromkeys(largest, top)
    inverse = {m: 1 / _nonzero(top) for m, top in largest.items()}
    direction = {
      m: jnp.where(
        like(largest[m] > 0, g), g * like(inverse[m], g), otherwise[m]
      )
      * self.units[m]
      for m, g in grad.items()
    }
    if self.norm == "linf":
      return {m: self.units[m] * jnp.sign(d) for m, d in direction.items()}
    squares = {m: jnp.sum(_rows(d * d), axis=-1) for m, d in direction.items()}
    inverse = {
      m: self.units[m] / jnp.sqrt(_nonzero(total))
      for m, total in self._joined(squares).items()
    }
    return {m: d * like(inverse[m], d) for m, d in direction.items()}

  def move(self, delta: Mapping, direction: Mapping, length: Mapping) -> dict:
    """``delta + length * direction``, projected; ``length`` is in units."""
    return self.project(
      {m: d + like(length[m], d) * direction[m] for m, d in delta.items()}
    )

  def project(self, delta: Mapping[str, Any]) -> dict:
    """Into the valid range, then towards zero until the size fits.

    Always feasible; the nearest point where only one of the two is active.
    """
    delta = self.in_range(delta)
    if self.norm == "linf":
      bound = {m: self.radius[m] * self.units[m] for m in delta}
      return {
        m: jnp.clip(d, -like(bound[m], d), like(bound[m], d))
        for m, d in delta.items()
      }
    size = self.size(delta)
    return {
      m: d * like(jnp.minimum(1, self.radius[m] / _nonzero(size[m])), d)
      for m, d in delta.items()
    }

  def in_range(self, delta: Mapping[str, Any]) -> dict:
    """The nearest perturbation that leaves every entry in the valid range."""
    return {m: self._in_range(m, d) for m, d in delta.items()}

  def inside(self, delta: Mapping[str, Any]) -> dict:
    """Where an entry is strictly inside its valid range: ``{m: bool}``."""
    flags = {m: jnp.ones_like(d, bool) for m, d in delta.items()}
    for m, (low, high) in self.valid_range.items():
      clean = self.clean[m].astype(self.dtype)
      flags[m] = (delta[m] > low - clean) & (delta[m] < high - clean)
    return flags

  def random(self, key: Any) -> dict:
    """A random direction: of size 1 in l2, entries in [-1, 1] in linf."""
    keys = jax.random.split(key, len(self.clean))
    draw = jax.random.normal if self.norm == "l2" else _signed_uniform
    direction = {
      m: self.units[m] * draw(keys[i], x.shape, self.dtype)
      for i, (m, x) in enumerate(sorted(self.clean.items()))
    }
    direction = {
      m: jnp.where(like(self.radius[m] > 0, d), d, 0)
      for m, d in direction.items()
    }
    if self.norm == "linf":
      return direction
    size = self.size(direction)
    return {m: d / like(_nonzero(size[m]), d) for m, d in direction.items()}

  def inputs(self, delta: Mapping[str, Any]) -> dict:
    """``clean + delta`` in the valid range and the dtype of ``clean``."""
    return {
      m: (x + self._in_range(m, delta[m])).astype(x.dtype)
      if m in self.valid_range
      else (x + delta[m]).astype(x.dtype)
      for m, x in self.clean.items()
    }

  def finished(self, delta: Mapping[str, Any]) -> dict:
    r"""The inputs, with every bound kept after rounding.

    Formal guarantees:
      - The exact size of ``finished - clean`` is at most radius (1 + 1e-6).
      - Every entry is in the valid range exactly.
      - Where ``delta`` is 0, the bits of ``clean``.
    """
    moved = {m: self._toward_clean(m, d) for m, d in delta.items()}
    if self.norm == "l2":
      actual = {
        m: moved[m].astype(d.dtype) - self.clean[m].astype(d.dtype)
        for m, d in delta.items()
      }
      squares = {
        m: _careful_sum(jnp.square(d / self.units[m]))
        for m, d in actual.items()
      }
      size = {m: jnp.sqrt(s) for m, s in self._joined(squares).items()}
      over = {m: size[m] > self.radius[m] * (1 + _TOLERANCE) for m in size}
      shrink = {m: self.radius[m] / _nonzero(size[m]) for m in size}
      moved = {
        m: jnp.where(
          like(over[m], d),
          self._toward_clean(m, d * like(shrink[m], d)),
          moved[m],
        )
        for m, d in actual.items()
      }
    return moved

  def _toward_clean(self, name, delta):
    """Rounds ``clean + delta`` so that no entry moves further than delta."""
    clean = self.clean[name]
    if self.norm == "linf":
      bound = like(self.radius[name] * self.units[name], delta)
      delta = jnp.clip(delta, -bound, bound)
    moved = (clean + delta).astype(clean.dtype)
    for _ in range(2):  # the subtraction that measures it is rounded as well
      change = moved.astype(delta.dtype) - clean.astype(delta.dtype)
      too_far = jnp.abs(change) > jnp.abs(delta)
      moved = jnp.where(too_far, jnp.nextafter(moved, clean), moved)
    if name in self.valid_range:
      moved = jnp.clip(moved, *self.valid_range[name])
    # 0 added to -0.0 is 0.0: other bits.
    return jnp.where(delta == 0, clean, moved)

  def _in_range(self, name, delta):
    if name not in self.valid_range:
      return delta
    clean = self.clean[name].astype(delta.dtype)
    low, high = self.valid_range[name]
    low = low.astype(delta.dtype)
    high = high.astype(delta.dtype)
    return jnp.clip(clean + delta, low, high) - clean

  def _free(self, name, delta, grad):
    grad = grad.astype(delta.dtype)
    counts = jnp.isfinite(grad) & like(self.radius[name] > 0, grad)
    if name in self.valid_range:
      low, high = self.valid_range[name]
      inputs = self.clean[name] + delta
      counts &= ~((inputs >= high) & (grad > 0))
      counts &= ~((inputs <= low) & (grad < 0))
    return jnp.where(counts, grad, 0)

  def _joined(self, per_modality):
    if not self.joint:
      return per_modality
    total = sum(per_modality[m] for m in modalities.names(per_modality))
    return dict.fromkeys(per_modality, total)


def choose(flag: Any, yes: Any, no: Any) -> Any:
  """``yes`` for the examples with ``flag`` [b], else ``no``; both [b, ...]."""
  return jnp.where(like(flag, yes), yes, no)


def _signed_uniform(key, shape, dtype):
  return jax.random.uniform(key, shape, dtype, -1, 1)


def _rows(x):
  return jnp.reshape(x, (x.shape[0], math.prod(x.shape[1:])))


def _largest(x):
  return jnp.max(_rows(jnp.abs(x)), axis=-1, initial=0)


def _careful_sum(x):
  x = _rows(x)
  padding = -x.shape[-1] % _ROW
  x = jnp.pad(x, ((0, 0), (0, padding)))
  return jnp.sum(jnp.sum(jnp.reshape(x, (x.shape[0], -1, _ROW)), -1), -1)


def _nonzero(x):
  return jnp.where(x > 0, x, 1)


def like(values: Any, x: Any) -> Any:
  """``[b]`` or a scalar, shaped to combine with ``x`` ``[b, ...]``."""
  values = jnp.asarray(values)
  return jnp.reshape(values, values.shape + (1,) * (x.ndim - values.ndim))
