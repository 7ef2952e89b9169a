"""The measurements: attacked, by the cells of a plan."""

import copy
import dataclasses
import math
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robust_mm import attacks as attacks_lib
from robust_mm import modalities
from robust_mm.evaluation import batches
from robust_mm.evaluation import bounds as bounds_lib
from robust_mm.evaluation import forwards
from robust_mm.evaluation import protocol as protocol_lib

Tick = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """One attack on some modalities at one radius.

  Attributes:
    attack: its name in the results.
    modalities: attacked together, in one ball.
    radius: in the protocol's units.
    robust: ``bool[n]``, right and not broken.
    size: the largest perturbation made, in the protocol's units.
    broken_by: ``{member: examples it broke}`` of an ensemble, else None.
  """

  attack: str
  modalities: tuple[str, ...]
  radius: float
  robust: Any
  size: float
  broken_by: Mapping[str, int] | None = None


class Struck(NamedTuple):
  """What an attack did to some rows.

  Attributes:
    broken: ``bool[r]``.
    ratio: the largest size of a perturbation over its radius.
    broken_by: ``{member: examples it broke}`` of an ensemble, else None.
  """

  broken: np.ndarray
  ratio: float
  broken_by: dict[str, int] | None = None


def make_attack(
  given: Mapping[str, Any], protocol: protocol_lib.Protocol, *, units
):
  """The attack value of one entry of ``Protocol.attacks``.

  Raises:
    ValueError: no such attack, or one that does not take these arguments.
  """
  try:
    return attacks_lib.make(
      norm=protocol.norm,
      # Only a default: every call states its own.
      budget=max([*protocol.radii, 1.0]),
      units=units,
      valid_range=protocol.valid_range,
      **given,
    )
  except (TypeError, ValueError) as error:
    raise ValueError(f"attack {given['name']!r}: {error}") from error


class Attacker:
  """Runs one attack, radius after radius, with one compilation for all.

  Radii, labels and the choice of modalities are data of the compiled function.
  The members of an ensemble run one after the other on the rows left over, in
  chunks of the whole or, for few rows, a quarter of the size. ``loss`` is that
  of the attack, of an ensemble that of its first member.
  """

  def __init__(self, model, device, attack, forward, *, units, norm, size):
    self._device, self._forward = device, forward
    self._size, self._small = size, device.chunk_size(-(-size // 4))
    self._ensemble = bool(attack.members)
    members = attack.members or {attack.name: attack}
    self.loss = next(iter(members.values())).loss
    searched, self._params = device.frozen(model)
    self._runs = {
      name: self._judged(_attack_fn(searched, member, units, norm))
      for name, member in members.items()
    }

  def _judged(self, attack_fn):
    search = self._device.compile(attack_fn, moved=True)

    def run(params, state, chunk, key, chosen, scale):
      inputs, ratio = search(self._params, state, chunk, key, chosen, scale)
      attacked = {**chunk, "inputs": inputs}
      del attacked["radius"]
      every = forwards.keep_only(inputs, inputs)
      # The clean pass is compiled already, and judges clean and attacked alike.
      compiled = self._forward.compiled
      return compiled(params, state, attacked, every), ratio

    return run

  def first(self) -> "Attacker":
    """The same with the first member of an ensemble alone."""
    one = copy.copy(self)
    name, run = next(iter(self._runs.items()))
    one._runs, one._ensemble = {name: run}, False
    return one

  def __call__(self, key, data, rows, names, radii, *, scale=1.0) -> Struck:
    """Attacks some modalities of some rows, in one ball each example.

    Args:
      key: a JAX key.
      data: the data set; the attack moves away from its ``label``.
      rows: ``[r]`` row numbers.
      names: the modalities that may change.
      radii: a number, or ``[r]``.
      scale: the attack sees the logits divided by this.
    """
    radii = np.broadcast_to(np.float32(radii), rows.shape)
    broken, ratio, counts = np.zeros(len(rows), bool), 0.0, {}
    for number, (name, run) in enumerate(self._runs.items()):
      own = jax.random.fold_in(key, number) if self._ensemble else key
      left = np.flatnonzero(~broken)
      counts[name] = 0
      if len(left):
        lost, reach = self._struck(
          run, own, data, rows[left], names, radii[left], np.float32(scale)
        )
        broken[left[lost]] = True
        ratio, counts[name] = max(ratio, reach), int(lost.sum())
    return Struck(broken, ratio, counts if self._ensemble else None)

  def _struck(self, run, key, data, rows, names, radii, scale):
    chosen = forwards.keep_only(data.names, names)
    few = self._ensemble and len(rows) <= self._size // 2
    prediction, ratio = self._device.map(
      run,
      data,
      rows,
      self._small if few else self._size,
      extra=lambda number: (jax.random.fold_in(key, number), chosen, scale),
      aligned={"radius": radii},
    )
    return prediction != data.label[rows], float(ratio.max())


def _attack_fn(model, attack, units, norm):
  def run(params, state, chunk, key, chosen, scale):
    inputs, present = chunk["inputs"], chunk["present"]
    # To the attack, what it may not touch is absent; the model still reads it.
    open_to = {m: flag & chosen[m] for m, flag in present.items()}

    still, _ = model.encode(params, state, inputs, present)

    def logits_fn(changed):
      seen = {
        m: jnp.where(_like(open_to[m], x), changed[m], x)
        for m, x in inputs.items()
      }
      embeddings = forwards.embed(
        model, params, state, chunk, seen, still, chosen
      )
      return model.fuse(params, embeddings, present).logits / scale

    adversarial = attack(
      key,
      logits_fn,
      inputs,
      chunk["label"],
      present=open_to,
      budget=chunk["radius"],
    )
    size = _size(adversarial, inputs, present, units, norm)
    return adversarial, size / chunk["radius"]

  return run


def _like(flag, x):
  return jnp.reshape(flag, flag.shape + (1,) * (x.ndim - 1))


def _size(adversarial, inputs, present, units, norm):
  sizes = []
  for name in modalities.names(inputs):
    change = (adversarial[name] - inputs[name]).astype(jnp.float32)
    change = jnp.reshape(change, (change.shape[0], -1)) / units[name]
    if norm == math.inf:
      size = jnp.max(jnp.abs(change), axis=-1, initial=0.0)
    else:
      size = jnp.sqrt(jnp.sum(change**2, axis=-1))
    sizes.append(jnp.where(present[name], size, 0.0))
  sizes = jnp.stack(sizes)
  if norm == math.inf:
    return jnp.max(sizes, axis=0)
  return jnp.sqrt(jnp.sum(sizes**2, axis=0))


def attack_plan(
  protocol: protocol_lib.Protocol, names: tuple[str, ...]
) -> list[tuple[tuple[str, ...], float]]:
  """``[(modalities, radius)]``: one modality alone first, then all of them."""
  plan = []
  if len(names) > 1:
    for name in names:
      plan += [((name,), r) for r in protocol.modality_grid(name)]
  return plan + [(names, radius) for radius in protocol.radii]


def attacked(
  run: Attacker,
  data: batches.Data,
  correct: np.ndarray,
  protocol: protocol_lib.Protocol,
  *,
  name: str,
  key,
  tick: Tick,
) -> list[Cell]:
  """Every cell of the plan for one attack.

  With ``survivors_only`` an example already broken by a perturbation that the
  new ball contains is broken without a new search: a smaller radius of the
  same modalities, or, for the joint ball, of one modality.
  """
  cells = []
  for number, (names, radius) in enumerate(attack_plan(protocol, data.names)):
    robust = correct.copy()
    if protocol.survivors_only:
      for cell in cells:
        if cell.radius <= radius and set(cell.modalities) <= set(names):
          robust &= cell.robust
    reachable = np.any([data.present[m] for m in names], axis=0)
    rows = np.flatnonzero(robust & reachable)
    cell_key = jax.random.fold_in(key, number)
    struck = run(cell_key, data, rows, names, radius)
    robust[rows[struck.broken]] = False
    cells.append(
      Cell(
        attack=name,
        modalities=names,
        radius=radius,
        robust=robust,
        size=struck.ratio * radius,
        broken_by=struck.broken_by,
      )
    )
    tick(f"{name} {modalities.subset_name(names)} {radius:g}")
  return cells


def tightness(
  run: Attacker,
  data: batches.Data,
  bounds: bounds_lib.Bounds,
  factors,
  *,
  key,
  tick: Tick,
) -> dict | None:
  """How often an attack of ``factor`` times the joint radius flips a class.

  The prediction, right or wrong, is what the attack tries to change, example
  by example at its own radius; what is flipped stays so at larger factors.

  Returns:
    ``{"factors", "flipped", "num_examples"}`` over the examples with a finite
    positive radius; None without one.
  """
  usable = data.counted & (bounds.radius > 0) & np.isfinite(bounds.radius)
  if not usable.any() or not factors:
    return None
  target = dataclasses.replace(data, label=bounds.prediction)
  left, flipped = usable.copy(), []
  for number, factor in enumerate(factors):
    rows = np.flatnonzero(left)
    factor_key = jax.random.fold_in(key, number)
    radii = factor * bounds.radius[rows]
    struck = run(factor_key, target, rows, data.names, radii)
    left[rows[struck.broken]] = False
    flipped.append(1 - float(left.sum() / usable.sum()))
    tick(f"{factor:g} times the radius")
  return {
    "factors": list(factors),
    "flipped": flipped,
    "num_examples": int(usable.sum()),
  }
