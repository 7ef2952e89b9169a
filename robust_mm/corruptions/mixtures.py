"""One of several corruptions at random strength: destruction for training."""

import dataclasses
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import PRNGKeyArray

from robust_mm import _validate
from robust_mm.corruptions import base
from robust_mm.corruptions import factories
from robust_mm.corruptions import kinds as kinds_lib

# Whole rows are replaced by these, and a label says nothing any more.
_WHOLE = ("absent", "swap", "zeros")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
  """Made by :func:`mixture`, which says what the fields mean."""

  options: tuple[base.Corruption, ...]

  def fitting(
    self, name: str, shape: tuple[int, ...], dtype: Any = jnp.float32
  ) -> tuple[base.Corruption, ...]:
    """Those that make sense for a modality with inputs of a shape."""
    like = jax.ShapeDtypeStruct((1, *shape), dtype)
    return tuple(
      dataclasses.replace(option, modalities=(name,))
      for option in self.options
      if kinds_lib.fits(option.kind, option.form(name, like), shape)
    )

  def __call__(
    self, key: PRNGKeyArray, name: str, value: Array, touched: Array
  ) -> Array:
    """Corrupts one modality.

    The kind is drawn for the batch (only one of them is computed), the strength
    for each example, uniform between those of severity 1 and 5. A function of
    the key and of the row in the batch.

    Args:
      key: typed.
      name: the modality.
      value: ``[b, ...]``.
      touched: ``bool[b]``; other rows come back as they were.

    Returns:
      Of the shape and dtype of ``value``; ``value`` itself where no kind fits.
    """
    fitting = self.fitting(name, value.shape[1:], value.dtype)
    if not fitting:
      return value
    kind_key, strength_key, own = jax.random.split(key, 3)
    index = jax.random.randint(kind_key, (), 0, len(fitting))
    # Laid out over the devices as the rows are.
    row = jnp.where(touched, jnp.arange(value.shape[0], dtype=jnp.uint32), 0)
    share = jax.vmap(
      lambda number: jax.random.uniform(
        jax.random.fold_in(strength_key, number)
      )
    )(row)

    def run(option):
      low, *_, high = kinds_lib.KINDS[option.kind].strengths
      strong = dataclasses.replace(option, strength=low + share * (high - low))
      return lambda x: strong(own, {name: x}, {name: touched}, id=row)[0][name]

    return jax.lax.switch(index, [run(option) for option in fitting], value)


def mixture(
  kinds: Iterable[str],
  *,
  scale: Any = 1.0,
  forms: Mapping[str, str] | None = None,
) -> Mixture:
  """A draw from several kinds at a random strength, for training on.

  Args:
    kinds: names; none that replaces an example as a whole (``absent``,
      ``swap``, ``zeros``).
    scale: of :func:`additive`: a number, or ``{m: array}``.
    forms: ``{m: form}`` where a shape does not tell.

  Raises:
    ValueError: naming ``kinds`` if one is unknown, unfit, or there is none;
      ``scale`` or ``forms`` if one is bad.
  """
  kinds = tuple(kinds)
  allowed = tuple(n for n in sorted(kinds_lib.KINDS) if n not in _WHOLE)
  if not kinds:
    raise ValueError("kinds must name at least one corruption, got none.")
  for kind in kinds:
    _validate.one_of(allowed, kinds=kind)
  own = {"additive": {"scale": scale}}
  return Mixture(
    options=tuple(
      getattr(factories, kind)(
        severity=base.MAX_SEVERITY, forms=forms, **own.get(kind, {})
      )
      for kind in kinds
    )
  )
