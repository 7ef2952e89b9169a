"""Attacks on a few examples, at any radius, for the checks of the gradients."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from robust_mm import attacks
from robust_mm.evaluation import matrix
from robust_mm.evaluation import slopes


class Probe:
  """What several ways to change some examples leave right.

  Args:
    model: the model.
    forward: its predictions, compiled.
    device: where attacks run.
    data: the examples, each with a modality present.
    norm: 2 or infinity.
    units: ``{m: size of one unit}``.
    valid_range: to stay in.
    key: a JAX key, the same for all.
  """

  def __init__(
    self, model, forward, device, data, *, norm, units, valid_range, key
  ):
    self._model, self._forward, self._device = model, forward, device
    self.num_classes, self.num_examples = model.num_classes, data.size
    self.norm, self._data, self._units = norm, data, units
    self._range, self._key = valid_range, key
    self._rows = np.arange(data.size)
    self.clean = self.right()
    # {radius: who has survived every attack at that radius so far}.
    self._standing = {}

  def right(self, inputs: Mapping[str, Any] | None = None) -> np.ndarray:
    """Which examples are right, with these inputs instead of their own."""
    data = self._data
    if inputs is not None:
      data = dataclasses.replace(data, inputs={**data.inputs, **inputs})
    return self._forward(data, self._rows, data.names) == data.label

  def left_by(
    self, attacker: matrix.Attacker, radius: float, *, scale: float = 1.0
  ) -> float:
    """The share left by an attack on logits divided by ``scale``."""
    rows = np.flatnonzero(self.clean)
    names = self._data.names
    struck = attacker(self._key, self._data, rows, names, radius, scale=scale)
    left = self.clean.copy()
    left[rows[struck.broken]] = False
    self._survived(radius, left)
    return float((len(rows) - struck.broken.sum()) / self._data.size)

  def left(self, radius: float, **given: Any) -> float:
    """The share left by an attack of a few calls; ``attacks.make`` makes it."""
    attack = self._make(radius, **given)
    moved = self._moved(attack, self._model, self._device)
    return self.left_at(radius, moved)

  def left_at(self, radius: float, moved: Mapping[str, Any]) -> float:
    """The share left at points that an attack of that size has found."""
    left = self.clean & self.right(moved)
    self._survived(radius, left)
    return float(np.mean(left))

  def worst(self, radius: float) -> float:
    """The share left by all attacks so far together, example by example."""
    return float(np.mean(self._standing.get(radius, self.clean)))

  def _survived(self, radius, left):
    self._standing[radius] = self._standing.get(radius, self.clean) & left

  def moved_by(
    self, model, device, radius: float, **given: Any
  ) -> dict[str, np.ndarray]:
    """Adversarial inputs of PGD on another model."""
    return self._moved(self._make(radius, name="pgd", **given), model, device)

  def _make(self, radius, **given):
    return attacks.make(
      norm=self.norm,
      budget=radius,
      units=self._units,
      valid_range=self._range,
      **given,
    )

  def _moved(self, attack, model, device):
    searched, params = device.frozen(model)
    search = device.compile(_attack_fn(searched, attack), once=True)
    return device.map(
      lambda _, state, chunk, key: search(params, state, chunk, key),
      self._data,
      self._rows,
      device.chunk_size(self.num_examples),
      extra=lambda number: (self._key,),
    )

  def left_by_noise(self, radius: float, *, num_draws: int) -> float:
    """The share left by noise of that size, a mean over draws.

    A normal direction in l2, independent signs in linf, cut to the range.
    """
    seed = np.asarray(jax.random.key_data(self._key)).ravel()
    rng = np.random.default_rng(seed)
    shares = []
    for _ in range(num_draws):
      noise = {
        m: rng.normal(size=x.shape) * like(self._data.present[m], x)
        for m, x in self._floats().items()
      }
      if self.norm == 2:
        squares = sum(np.square(_flat(x)).sum(axis=1) for x in noise.values())
        size = np.sqrt(np.maximum(squares, 1e-30))
        noise = {m: x / like(size, x) for m, x in noise.items()}
      else:
        noise = {m: np.sign(x) for m, x in noise.items()}
      moved = {
        m: cut(x + radius * self._units[m] * noise[m], x, self._allowed(m))
        for m, x in self._floats().items()
      }
      shares.append(self.left_at(radius, moved))
    return float(np.mean(shares))

  def slopes(self, model=None, device=None) -> dict[str, np.ndarray]:
    """``slopes.measure`` of the model, or of another one, on the examples."""
    model, device = model or self._model, device or self._device
    return slopes.measure(model, self._data, device)

  @property
  def movable(self) -> np.ndarray:
    """Which examples have a modality with a gradient."""
    found = np.zeros(self.num_examples, bool)
    for m in self._floats():
      found |= self._data.present[m]
    return found

  def _floats(self):
    inputs = self._data.inputs
    return {m: x for m, x in inputs.items() if slopes.is_float(x)}

  def _allowed(self, name):
    pair = self._range
    return pair.get(name) if isinstance(pair, Mapping) else pair

  def copied(self) -> tuple[float, float]:
    """``(radius, share left)`` of the attack that copies another example.

    Each example becomes the nearest one with another label, where it has all
    its modalities; the radius reaches the furthest of those that this breaks.
    """
    data = self._data
    distance = np.zeros((data.size, data.size))
    usable = data.label[:, None] != data.label[None]
    for m in data.names:
      here = data.present[m]
      usable &= here[None] | ~here[:, None]
    for m, x in self._floats().items():
      apart = _distances(x / self._units[m], self.norm)
      apart = np.where(data.present[m][:, None], apart, 0)
      join = np.maximum if self.norm == math.inf else np.hypot
      distance = join(distance, apart)
    distance = np.where(usable, distance, np.inf)
    nearest, reach = distance.argmin(axis=1), distance.min(axis=1)
    copies = {m: x[nearest] for m, x in self._floats().items()}
    left = self.clean & (self.right(copies) | ~np.isfinite(reach))
    reached = reach[np.isfinite(reach) & ~left]
    return float(reached.max(initial=0.0)), float(np.mean(left))


def cut(moved: np.ndarray, clean: np.ndarray, pair: Any) -> np.ndarray:
  """In ``(low, high)``, or no further out than the clean values; None: as is.

  In the type of the clean ones.
  """
  if pair is not None:
    low, high = np.minimum(pair[0], clean), np.maximum(pair[1], clean)
    moved = np.clip(moved, low, high)
  return moved.astype(clean.dtype)


def like(values: np.ndarray, x: np.ndarray) -> np.ndarray:
  """``[n]`` with as many dimensions as ``x`` has."""
  return np.reshape(values, (-1,) + (1,) * (x.ndim - 1))


def _attack_fn(model, attack):
  def run(params, state, chunk, key):
    # Traced once, however often the attack calls it.
    @jax.jit
    def logits_fn(inputs):
      return model.apply(params, state, inputs, chunk["present"])[0].logits

    return attack(
      key, logits_fn, chunk["inputs"], chunk["label"], present=chunk["present"]
    )

  return run


def _distances(x, norm):
  """Between all pairs of rows: ``[n, n]``."""
  rows = _flat(np.asarray(x, np.float64))
  order = 2 if norm == 2 else np.inf
  return np.stack([np.linalg.norm(rows - row, order, axis=1) for row in rows])


def _flat(x):
  return np.reshape(x, (len(x), -1))
