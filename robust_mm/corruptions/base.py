"""The value that every factory makes, and how it is called."""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm import modalities as modalities_lib
from robust_mm._types import Batch
from robust_mm._types import Inputs
from robust_mm._types import Present
from robust_mm.corruptions import donors as donors_lib
from robust_mm.corruptions import forms as forms_lib
from robust_mm.corruptions import kinds as kinds_lib

MAX_SEVERITY = 5


def _static():
  return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Corruption:
  """One kind of corruption at one severity; made by the factories.

  Hashable, and a pytree whose leaves are ``severity``, ``strength`` and
  ``share``: a jitted function that takes it as an argument compiles once for
  all severities of a kind.

  Attributes:
    severity: 0 (the identity, bit by bit) to 5.
    strength: of the kind's own table, or the one that was given; 0 at 0. May be
      replaced by one for each example, ``[b]``.
    share: chance of an example to be touched.
    kind: its factory's name.
    modalities: those it may change, or None for all it makes sense for.
    correlated: whether modalities share the decisions who, when and how much.
    forms: ``((m, form), ...)`` where a shape does not tell.
    options: ``((m, option), ...)`` of the kind; under None for all others.
  """

  severity: Any
  strength: Any
  share: Any
  kind: str = _static()
  modalities: tuple[str, ...] | None = _static()
  correlated: bool = _static()
  forms: tuple[tuple[str, str], ...] = _static()
  options: tuple[tuple[Any, Any], ...] = _static()

  def form(self, name: str, value: Any) -> str:
    """What the inputs ``value`` [b, ...] of a modality are taken for."""
    given = dict(self.forms).get(name)
    return given or forms_lib.form(tuple(value.shape[1:]), value.dtype)

  def targets(self, inputs: Inputs) -> tuple[str, ...]:
    """The modalities of ``inputs`` that this corruption may change.

    Raises:
      ValueError: a modality was named that is unknown or of the wrong form.
    """
    fitting = kinds_lib.KINDS[self.kind].forms
    names = modalities_lib.names(inputs)
    if self.modalities is None:
      return tuple(n for n in names if self.form(n, inputs[n]) in fitting)
    _validate.known(names, modalities=self.modalities)
    for name in self.modalities:
      form = self.form(name, inputs[name])
      if form not in fitting:
        raise ValueError(
          f"modalities names {name!r}, a {form}; {self.kind} is for "
          f"{', '.join(fitting)}."
        )
    return self.modalities

  def option(self, name: str) -> Any:
    """The option of a modality; ValueError where it has none."""
    options = dict(self.options)
    if name not in options and None not in options:
      raise ValueError(f"scale must name the modality {name!r}.")
    return options.get(name, options.get(None))

  def __call__(
    self,
    key: PRNGKeyArray,
    inputs: Inputs,
    present: Present,
    *,
    id: Any = None,
    label: Any = None,
    donors: Batch | None = None,
  ) -> tuple[dict[str, Array], dict[str, Array]]:
    """Corrupts a batch; what is absent, or not chosen, comes back as it was.

    The randomness of an example is that of ``fold_in(key, id)``, so neither the
    batch it comes in nor the devices change its result, and a higher severity
    keeps what a lower one drew.

    Args:
      key: typed; the same one for every batch of a data set.
      inputs: ``{m: [b, ...]}``.
      present: ``{m: bool[b]}``.
      id: ``int[b]``; row numbers by default, which depend on the batch.
      label: ``int[b]``, for ``swap`` only.
      donors: for ``swap`` only, the batch (``inputs``, ``present``, ``label``,
        ``id``) other samples come from; this one by default, and then the
        result depends on who is in it.

    Returns:
      ``(inputs, present)`` of the same shapes and dtypes; only ``absent``
      changes the second.

    Raises:
      ValueError: a modality of the wrong form, or no ``label`` for ``swap``.
    """
    inputs = {name: jnp.asarray(x) for name, x in inputs.items()}
    present = {name: jnp.asarray(flag) for name, flag in present.items()}
    targets = self.targets(inputs)
    if not targets:
      return inputs, present
    size = inputs[targets[0]].shape[0]
    id = jnp.arange(size) if id is None else jnp.asarray(id)
    id = id.astype(jnp.uint32)
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(id)
    draws = self._draws(keys, inputs, targets)
    hit = {n: self._hit(draws[n], present[n]) for n in targets}
    if self.kind == "absent":
      return _removed(keys, inputs, present, hit)
    if self.kind == "swap":
      if donors is None:
        donors = {"inputs": inputs, "present": present, "id": id}
        donors["label"] = label
      changed = donors_lib.swapped(
        {n: draw.decision for n, draw in draws.items()}, id, label, donors
      )
      hit = {n: hit[n] & changed[n][1] for n in targets}
      changed = {n: value for n, (value, _) in changed.items()}
    else:
      changed = {n: self._run(n, draws[n], inputs[n]) for n in targets}
    found = {
      n: jnp.where(expand(hit[n], inputs[n]), changed[n], inputs[n])
      for n in targets
    }
    return {**inputs, **found}, present

  def _draws(self, keys, inputs, targets) -> dict[str, kinds_lib.Draw]:
    """Keys ``[b]`` of every modality, by its name and not by its place."""
    frames = [
      inputs[n].shape[1]
      for n in targets
      if self.form(n, inputs[n]) in kinds_lib.TIMED
    ]
    draws = {}
    for name in targets:
      own = _fold(keys, zlib.crc32(name.encode()))
      timed = self.form(name, inputs[name]) in kinds_lib.TIMED
      ticks = inputs[name].shape[1] if timed else 1
      draws[name] = kinds_lib.Draw(
        noise=_fold(own, 1),
        decision=_fold(keys if self.correlated else own, 2),
        ticks=min(frames) if self.correlated and timed else ticks,
      )
    return draws

  def _hit(self, draw, present):
    """``bool[b]``: present, and drawn."""
    uniform = jax.vmap(jax.random.uniform)(_fold(draw.decision, 3))
    by_row = kinds_lib.KINDS[self.kind].by_row
    chance = self.share * (self.strength if by_row else 1.0)
    return present & (uniform < chance) & (self.strength > 0)

  def _run(self, name, draw, value):
    kind = kinds_lib.KINDS[self.kind]
    axes = forms_lib.axes(self.form(name, value), value.ndim - 1)
    strength = jnp.asarray(self.strength, jnp.float32)
    option = self.option(name)

    def one(noise, decision, x, strength):
      own = kinds_lib.Draw(noise, decision, draw.ticks)
      return kind.function(own, x, strength, axes, option)

    over = (0, 0, 0, 0 if strength.ndim else None)
    return jax.vmap(one, over)(draw.noise, draw.decision, value, strength)


def _fold(keys, number: int):
  return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def expand(flag: Array, like: Array) -> Array:
  """``[b]`` as ``[b, 1, ...]``."""
  return jnp.reshape(flag, flag.shape + (1,) * (like.ndim - 1))


def _removed(keys, inputs, present, hit):
  """Absent where hit, but for one modality of who would have none left."""
  names = modalities_lib.names(present)
  left = {n: present[n] & ~hit[n] if n in hit else present[n] for n in names}
  scores = jax.vmap(lambda key: jax.random.uniform(key, (len(names),)))(
    _fold(keys, 4)
  )
  there = modalities_lib.stack(present, axis=-1)
  scores = jnp.where(there, scores, -1.0)
  protected = (scores >= jnp.max(scores, axis=-1, keepdims=True)) & there
  nothing = ~jnp.any(modalities_lib.stack(left, axis=-1), axis=-1)
  left = {n: left[n] | (nothing & protected[:, i]) for i, n in enumerate(names)}
  found = dict(inputs)
  for name in hit:
    gone = expand(present[name] & ~left[name], inputs[name])
    found[name] = jnp.where(gone, jnp.zeros_like(inputs[name]), inputs[name])
  return found, left


def make(
  kind: str,
  *,
  severity: int,
  modalities: Any = None,
  share: float = 1.0,
  correlated: bool = False,
  forms: Mapping[str, str] | None = None,
  strength: float | None = None,
  option: Any = None,
) -> Corruption:
  """A checked value; the factories document the arguments."""
  if isinstance(severity, bool) or severity not in range(MAX_SEVERITY + 1):
    raise ValueError(f"severity must be an integer 0 to 5, got {severity}.")
  _validate.in_unit_interval(share=share)
  table = (0.0, *kinds_lib.KINDS[kind].strengths)
  if strength is None:
    strength = table[severity]
  elif kind == "additive":
    _validate.non_negative(strength=strength)
  else:
    _check_strength(kind, strength)
  if isinstance(modalities, str):
    modalities = (modalities,)
  if modalities is not None:
    modalities = modalities_lib.names(modalities)
  mapped = option if isinstance(option, Mapping) else {None: option}
  return Corruption(
    severity=int(severity),
    strength=float(strength) if severity else 0.0,
    share=float(share),
    kind=kind,
    modalities=modalities,
    correlated=bool(correlated),
    forms=forms_lib.check(forms),
    options=tuple(sorted(mapped.items(), key=str)),
  )


def _check_strength(kind, strength):
  if kind == "blur":
    _validate.non_negative(strength=strength)
  elif not (math.isfinite(strength) and 0 <= strength <= 1):
    raise ValueError(f"strength must lie in [0, 1], got {strength}.")
